"""python -m quantization: write a quantized checkpoint, list the recipes, build and export prefixes."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from corpora.errors import Parser, UserError, run_program
from quantization.programs.calibrate import DESCRIPTION as CALIBRATING
from quantization.programs.calibrate import add_options as add_calibrate_options
from quantization.programs.calibrate import calibrate_prefix
from quantization.programs.options import (
    add_calibration_options,
    add_dtype_option,
    add_model_options,
    add_prefix_option,
    add_recipe_options,
    chosen_device,
    chosen_dtype,
    chosen_recipe,
    show_log,
)
from quantization.programs.train import DESCRIPTION as TRAINING
from quantization.programs.train import add_options as add_train_options
from quantization.programs.train import train_prefix_file
from quantization.runs.auto_prefix import DESCRIPTION as DISCOVERING
from quantization.runs.auto_prefix import add_options as add_discover_options
from quantization.runs.auto_prefix import discover_prefix

if TYPE_CHECKING:
    from intactkv.prefix import Prefix
    from quantization.runs.plan import Plan


def quantize_parser(listing: bool) -> argparse.ArgumentParser:
    """The options of the main program."""
    parser = Parser(
        prog="python -m quantization",
        description="Quantize a dense checkpoint, one decoder block at a time. A killed run goes on where it stopped.",
        epilog="example: python -m quantization --model modelzoo/smollm2/smollm2-135m --recipe rtn --bits 4 "
        "--out modelzoo/my-w4.   `python -m quantization prefix --help` is about prefixes.",
    )
    if not listing:
        add_model_options(parser)
        add_recipe_options(parser)
        add_calibration_options(parser)
        add_prefix_option(parser)
        parser.add_argument(
            "--out", type=Path, metavar="DIR", help="where to write (default: modelzoo/quantized/MODEL/RECIPE-IDENTITY)"
        )
        parser.add_argument("--verbose", action="store_true", help="one log line per block on stderr")
    parser.add_argument("--list", action="store_true", help="print the named recipes, one a line, and stop")
    return parser


def quantize(arguments: list[str]) -> None:
    """The main program."""
    options = quantize_parser("--list" in arguments and "--help" not in arguments).parse_args(arguments)
    if options.list:
        list_recipes()
        return
    from quantization.runs.checkpoint import read_cost
    from quantization.runs.pipeline import quantize_checkpoint
    from quantization.runs.plan import find_checkpoint, plan_run, quantized_directory

    show_log(options.verbose)
    device = chosen_device(options.device)
    recipe = chosen_recipe(options, find_checkpoint(options.model))
    plan = plan_run(options.model, recipe, device=device)
    out = options.out or quantized_directory(plan.checkpoint, recipe, plan.segments, plan.calibration_prefix)
    quantize_checkpoint(
        options.model,
        recipe,
        out,
        segments=plan.segments,
        prefix_ids=plan.calibration_prefix,
        device=device,
        fingerprint=plan.checkpoint.fingerprint,
    )
    cost = read_cost(out)
    bits = "" if cost["bits_per_weight"] is None else f"{cost['bits_per_weight']:.2f} bits per weight  "
    repaired = int(cost["figures"].get("repaired_hessians", 0))
    print(
        f"{recipe.label()}  {bits}{cost['seconds']:.0f} s  {cost['peak_memory_mb']:.0f} MB  "
        + (f"{repaired} Hessians needed more damping  " if repaired else "")
        + str(out)
    )


def list_recipes() -> None:
    """One recipe a line: name, paper, note."""
    from quantization.named import RECIPES

    width = max(map(len, RECIPES))
    papers = max(len(row.paper) for row in RECIPES.values())
    for name, row in RECIPES.items():
        print(f"{name:<{width}}  {row.paper:<{papers}}  {row.note}")


def prefix_parser(program: str) -> argparse.ArgumentParser:
    """The options of the prefix programs."""
    parser = Parser(prog=program, description="Prefixes: keys and values of the pivot tokens.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="build|export|calibrate|discover|train-prefix"
    )
    build = commands.add_parser(
        "build",
        help="compute a prefix with the full-precision twin and write it to a file",
        description="Compute the prefix of a model (of a recipe's full-precision twin) and write it to a file.",
        epilog=f"example: {program} build --model modelzoo/smollm2/smollm2-135m --prefix bos --out bos.safetensors",
    )
    export = commands.add_parser(
        "export",
        help="write a prefix in a form that other programs load",
        description="Write a prefix as a PEFT prefix-tuning adapter, for the model and all its quantized forms. That "
        "needs nothing more; whoever loads the adapter through PEFT needs `pip install peft`. All programs here take "
        "the directory as --prefix, too.",
        epilog=f"example: {program} export --model modelzoo/smollm2/smollm2-135m --prefix bos --out modelzoo/bos-peft",
    )
    calibrate = commands.add_parser(
        "calibrate",
        help="train a prefix for a quantized model",
        description=CALIBRATING,
        epilog=f"example: {program} calibrate --model modelzoo/smollm2/smollm2-135m --recipe rtn-w3 --prefix prompt "
        "--samples 64 --max-length 256 --steps 40 --batch-size 4 --out prompt-cal.safetensors",
    )
    add_calibrate_options(calibrate)
    discover = commands.add_parser(
        "discover",
        help="find the outlier tokens that --prefix auto puts in front",
        description=DISCOVERING,
        epilog=f"example: {program} discover --model modelzoo/smollm2/smollm2-135m",
    )
    add_discover_options(discover)
    train = commands.add_parser(
        "train-prefix",
        help="train the embeddings of a prefix in full precision",
        description=TRAINING,
        epilog=f"example: {program} train-prefix --model modelzoo/smollm2/smollm2-135m --prefix-len 4 "
        "--prefix-epochs 3 --length 256 --out trained.safetensors",
    )
    add_train_options(train)
    for command in (build, export):
        add_model_options(command)
        add_recipe_options(command)
        add_calibration_options(command)
        add_prefix_option(command)
        add_dtype_option(command)
    build.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, *.safetensors")
    export.add_argument("--format", choices=["peft"], default="peft", help="what to write (default: %(default)s)")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write; must not exist yet")
    return parser


def prefix_program(arguments: list[str], program: str = "python -m quantization prefix") -> None:
    """The prefix programs; `python -m intactkv` comes here, too."""
    options = prefix_parser(program).parse_args(arguments)
    programs = {"build": build_prefix, "export": export_prefix, "calibrate": calibrate_prefix,
                "discover": discover_prefix, "train-prefix": train_prefix_file}  # fmt: skip
    programs[options.command](options)


def build_prefix(options: argparse.Namespace) -> None:
    """Write a prefix file."""
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out {options.out}: a prefix file ends in .safetensors")
    from intactkv.prefix import Prefix

    if options.out.exists():
        Prefix.load(options.out)  # replaces an older prefix, and refuses to replace anything else
    prefix = _prefix_plan(options).prefix()
    prefix.save(options.out)
    print(f"{_facts(prefix)}  {options.out}")


def export_prefix(options: argparse.Namespace) -> None:
    """Write a PEFT adapter."""
    if options.out.exists():
        raise UserError(f"--out {options.out} exists already; choose another directory or remove it")
    from intactkv.peft import write_adapter
    from quantization.runs.prefixes import check_belongs

    plan = _prefix_plan(options)
    prefix = plan.prefix()
    check_belongs(prefix, options.model, (plan.checkpoint.fingerprint, plan.basis))
    write_adapter(prefix, options.out, base_model=options.model)
    print(f"{_facts(prefix)}  {options.out}")


def _prefix_plan(options: argparse.Namespace) -> "Plan":
    """What the options of a prefix program mean. Raises UserError if they name no prefix."""
    from quantization.runs.plan import find_checkpoint, plan_run

    show_log()
    device, dtype = chosen_device(options.device), chosen_dtype(options.dtype)
    plan = plan_run(options.model, chosen_recipe(options, find_checkpoint(options.model)), device=device, dtype=dtype)
    if not plan.choice.ids:
        raise UserError("no prefix was named; add --prefix bos, --prefix prompt or a text")
    return plan


def _facts(prefix: "Prefix") -> str:
    return f"{len(prefix)} tokens {prefix.ids.tolist()}  {prefix.dtype}  basis {prefix.model.basis}"


def main() -> None:
    """Choose the program by its first word."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["prefix"]:
        prefix_program(arguments[1:])
    else:
        quantize(arguments)


if __name__ == "__main__":
    run_program(main)
