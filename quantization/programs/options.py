"""Command-line options that several programs share, each with one name and one meaning everywhere.

Only the standard library is imported here, so that `--help` answers at once.
"""

import argparse
from typing import TYPE_CHECKING

from corpora import values
from quantization.programs.kv_options import add_kv_options, kv_artefact_of, with_kv
from quantization.programs.recipe_options import (
    CALIBRATION,
    WEIGHTS,
    add_recipe_options,
    check_agreement,
    fields_of,
    given_parts,
    with_model_defaults,
)

if TYPE_CHECKING:
    import torch

    from quantization.recipes.recipe import Recipe
    from quantization.runs.checkpoint import Checkpoint
    from quantization.runs.plan import Plan

__all__ = [
    "ALL_GPUS",
    "add_plan_option",
    "add_plan_options",
    "add_text_seed",
    "chosen_device",
    "chosen_dtype",
    "chosen_recipe",
    "plan_of",
    "show_log",
    "stop_at_plan",
]

ALL_GPUS = "cuda:all"


def add_plan_options(
    parser: argparse.ArgumentParser,
    *,
    several: bool = False,
    recipe: bool = True,
    calibration: bool = True,
    prefix: bool = True,
    run: bool = True,
    dtype: bool = True,
) -> None:
    """The options that make a plan, and --plan.

    several: the program can spread one model over all GPUs. recipe, calibration, prefix, dtype: with these options.
    run: with those of a model that runs: the arm, packed weights. The KV policy goes with either: a recipe's other
    parts may be searched or trained with it at work.
    """
    add_model_options(parser, several=several)
    if recipe:
        add_recipe_options(parser)
    if calibration:
        add_calibration_options(parser)
    group = parser.add_argument_group("at run time") if run else parser
    if prefix:
        add_prefix_option(group)
    if recipe or run:
        add_kv_options(group)
    if run:
        add_run_options(group)
    if dtype:
        add_dtype_option(group)
    add_plan_option(parser)


def add_plan_option(parser: argparse._ActionsContainer) -> None:
    """--plan."""
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print which checkpoints and prefixes would be read and made (there or missing, sizes, about what memory) "
        "and stop",
    )


def add_model_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """--model and where it computes. several: the program can spread one model over all GPUs."""
    parser.add_argument(
        "--model",
        type=values.path,
        required=True,
        metavar="DIR",
        help="directory of a dense Hugging Face checkpoint, or of a quantized one",
    )
    parser.add_argument(
        "--device",
        type=values.device,
        default="auto",
        metavar="auto|cpu|cuda[:N]" + ("|cuda:all" if several else ""),
        help="where to compute (default: auto, a GPU if there is one)"
        + ("; cuda:all spreads a model that is larger than one GPU over all of them" if several else ""),
    )
    if several:
        parser.add_argument(
            "--max-memory",
            type=values.size,
            metavar="SIZE",
            help=f"with --device {ALL_GPUS}: what the model may take of each GPU, as 65GiB; the rest goes to main "
            "memory (default: as much as there is)",
        )


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """The text that methods calibrate on, and whether it runs behind the prefix."""
    group = parser.add_argument_group("calibration (methods that need none refuse these)")
    group.add_argument(
        "--calibration",
        type=values.name,
        metavar="NAME|FILE",
        help="a corpus by name or a text file (default: the paper's, or the model's own where that has one)",
    )
    group.add_argument(
        "--calibration-samples", type=values.count(), metavar="N", help="pieces of text (default: the same)"
    )
    group.add_argument(
        "--calibration-length", type=values.count(), metavar="T", help="tokens of a piece (default: the same)"
    )
    group.add_argument("--seed", type=values.seed, metavar="S", help="of the draw (default: the recipe's)")
    group.add_argument(
        "--calibrate-behind-prefix",
        action="store_true",
        help="let the text run behind the intact --prefix, as it will when the model is used; the result is refused "
        "without that prefix",
    )


def add_prefix_option(parser: argparse._ActionsContainer) -> None:
    """--prefix."""
    parser.add_argument(
        "--prefix",
        type=values.text,
        default=None,
        metavar='none|bos|prompt|auto|FILE|"text"',
        help="tokens whose keys and values stay as the full-precision model wrote them; auto: those that PrefixQuant "
        "discovers, once for a model, on random pieces of the text of --calibration or of the model's own (auto:NAME "
        "for another corpus, auto@64 or auto:NAME@64 for the ratio to the median that makes an outlier) (default: the "
        "recipe's, or the one that a checkpoint was calibrated behind)",
    )


def add_dtype_option(parser: argparse._ActionsContainer) -> None:
    """--dtype."""
    parser.add_argument(
        "--dtype",
        default=None,
        choices=["float32", "float16", "bfloat16"],
        help="of the computation (default: float32 on a CPU, the checkpoint's on a GPU)",
    )


def add_run_options(group: argparse._ActionsContainer) -> None:
    """What is chosen when a model runs: its arm, how its weights are kept."""
    group.add_argument(
        "--vanilla",
        action="store_true",
        help="put the prefix's tokens in front, but let the quantized model compute them: the arm to compare with",
    )
    group.add_argument(
        "--kernel",
        type=values.name,
        default=None,
        metavar="NAME",
        help="keep quantized weights packed, and multiply by the product of this name: uniform (grids, on a GPU), lut "
        "(binary coding), spqr (on a GPU) or unpack, which computes the same bits as dequantized weights; auto is the "
        "fastest that takes a weight (default: dequantize when loading)",
    )
    group.add_argument(
        "--kv-storage",
        default="fake",
        choices=["fake", "packed"],
        help="what the KV cache keeps of rounded tokens: numbers (fake, the default), or the codes that the bits "
        "promise (packed); the results are the same",
    )


def add_text_seed(parser: argparse._ActionsContainer, default: int, what: str) -> None:
    """--text-seed, of a text that a program draws by itself; --seed is the calibration's everywhere."""
    parser.add_argument(
        "--text-seed", type=values.seed, default=default, metavar="S", help=f"{what} (default: {default})"
    )


def chosen_recipe(options: argparse.Namespace, checkpoint: "Checkpoint") -> "Recipe":
    """The recipe that the options spell, with the model's own group size. Raises UserError for what cannot be."""
    from dataclasses import replace

    from corpora.errors import UserError
    from quantization.named import named_recipe, put_together
    from quantization.recipes.recipe import with_settings
    from quantization.runs.kept import held_kv, needed_prefix
    from quantization.runs.prefixes import searched_in

    if not hasattr(options, "recipe"):
        return named_recipe("fp16")
    check_agreement(options)
    parts, left = given_parts(options)
    if checkpoint.manifest is not None and (parts.keys() - {"kv_cache"} or options.recipe == "fp16"):
        raise UserError(
            f"{checkpoint.directory} is quantized already ({checkpoint.manifest['label']}), so its weights, transforms "
            "and inputs are settled; give its dense checkpoint, or leave out all options of the recipe but the cache's"
        )
    recipe = put_together(named_recipe(options.recipe or "fp16"), parts)
    spelled = " ".join([options.recipe or "fp16", *(f"with {field} {'+'.join(n)}" for field, n in parts.items())])
    if recipe.weights is None and (options.bits is not None or options.group_size is not None):
        raise UserError(
            f"--bits and --group-size set the grid of the weights, but the recipe {spelled} quantizes none; name one "
            "that does, for example --recipe rtn"
        )
    # Prefix and KV policy first: a setting may need the one or reach into the other.
    if getattr(options, "prefix", None) is not None:
        behind = recipe.calibrate_behind_prefix and options.prefix != "none"  # of a recipe that does so by itself
        recipe = replace(recipe, prefix=options.prefix, calibrate_behind_prefix=behind)
    elif recipe.prefix == "none":
        recipe = replace(recipe, prefix=needed_prefix(checkpoint))
    recipe = with_kv(recipe, options, checkpoint, "kv_cache" in parts)
    settings, calibration = fields_of(options, WEIGHTS), fields_of(options, CALIBRATION)
    # Whether a method calibrates may depend on its fields.
    chosen = with_settings(recipe, [s for s in left if s.startswith(("weights.", "activations."))])
    fitted = kv_artefact_of(options) is not None or chosen.kv_cache == held_kv(checkpoint)
    if calibration and (not chosen.calibrates or (fitted and not chosen.checkpoint_part.calibrates)):
        raise UserError(
            f"the recipe {spelled} calibrates on no text, so {calibration[0].replace('.', ' ', 1)} "
            "has nothing to act on; leave it out"
        )
    recipe = with_settings(
        recipe, with_model_defaults(chosen, checkpoint.family_name, [*settings, *calibration, *left])
    )
    if any(setting.startswith("calibration.corpus=") for setting in (*calibration, *options.settings)):
        recipe = replace(recipe, prefix=searched_in(recipe.prefix, recipe.calibration.corpus))
    if getattr(options, "calibrate_behind_prefix", False):
        recipe = replace(recipe, calibrate_behind_prefix=True)
    return recipe


def plan_of(
    options: argparse.Namespace,
    *,
    several: bool = False,
    device: "torch.device | None" = None,
    needs_prefix: str = "",
    makes: str = "run",
    shown: bool = True,
) -> "Plan":
    """The plan that the options of `add_plan_options` spell. With --plan it is printed, and the program ends.

    device: in place of --device. needs_prefix: why the program cannot do without a prefix. makes: what it makes of the
    plan (`quantization.runs.preview.preview`). shown: whether this process prints.
    Raises UserError for options that cannot be.
    """
    from corpora.errors import UserError
    from quantization.runs.checkpoint import find_checkpoint
    from quantization.runs.plan import plan_run

    if device is None:
        device = chosen_device(options.device, several=several, planned=options.plan)
    spread, size = several and options.device == ALL_GPUS, getattr(options, "max_memory", None)
    if size is not None and not spread:
        raise UserError(f"--max-memory is for a model that is spread: add --device {ALL_GPUS}, or leave it out")
    checkpoint = find_checkpoint(options.model)
    plan = plan_run(
        checkpoint,
        chosen_recipe(options, checkpoint),
        device=device,
        dtype=chosen_dtype(getattr(options, "dtype", None)),
        vanilla=getattr(options, "vanilla", False),
        kernel=getattr(options, "kernel", None),
        packed_kv=getattr(options, "kv_storage", "fake") == "packed",
        spread=spread,
        max_memory=size,
        makes=makes,
        given_kv=kv_artefact_of(options),
    )
    if needs_prefix and (not plan.has_prefix or plan.vanilla):
        raise UserError(f"{needs_prefix}; name one, for example --prefix bos" + " (without --vanilla)" * plan.vanilla)
    if makes != "discovery":  # whose text is not among these options
        stop_at_plan(options, plan, makes, shown)
    return plan


def stop_at_plan(options: argparse.Namespace, plan: "Plan", makes: str = "run", shown: bool = True) -> None:
    """With --plan: print what the plan would read and make, and end the program."""
    if options.plan:
        from quantization.runs.preview import preview, table

        if shown:
            out = getattr(options, "out", None) if makes in ("checkpoint", "kv") else None
            print(table(preview(plan, makes, out)))
        raise SystemExit(0)


def chosen_device(name: str, *, several: bool = False, planned: bool = False) -> "torch.device":
    """auto, cpu, cuda or cuda:N as a device; cuda:all, where a program knows to spread a model, as the first GPU.

    planned: for a plan, a GPU need not be there: the job may run elsewhere. Raises UserError for one that is not there.
    """
    import torch

    from corpora.errors import UserError

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    if planned:
        count = 1_000
    if name == ALL_GPUS and several:
        if not count:
            raise UserError(f"--device {name}: this machine shows no CUDA GPUs; choose cpu")
        return torch.device("cuda:0")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        known = "auto, cpu, cuda, cuda:N" + (f" or {ALL_GPUS}" if several else "")
        raise UserError(f"--device {name} is not known; choose one of {known}")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(
            f"--device {name}: this machine shows {count} CUDA GPUs; choose cpu"
            + (f" or cuda:0 to cuda:{count - 1}" if count else "")
        )
    return device


def chosen_dtype(name: str | None) -> "torch.dtype | None":
    """A dtype by its name; None stays None (the device's default)."""
    import torch

    return None if name is None else getattr(torch, name)


def show_log(verbose: bool = True) -> None:
    """Let the library's log lines (one per block, prefix, cache) appear on stderr, and nobody else's."""
    import logging

    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    class AboveBars(logging.StreamHandler):
        """A line takes the place of the bar, which goes on below it."""

        def emit(self, record: logging.LogRecord) -> None:
            with tqdm.external_write_mode(self.stream):
                super().emit(record)

    logging.basicConfig(
        format="%(message)s", level=logging.INFO if verbose else logging.WARNING, handlers=[AboveBars()]
    )
    for noisy in ("httpx", "huggingface_hub", "transformers", "datasets", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    disable_progress_bar()  # one bar a program: ours
