"""python -m intactkv (or python -m quantization prefix): build, discover, train and export prefixes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora import values
from corpora.errors import Parser, UserError
from quantization.programs.options import (
    add_plan_options,
    add_text_seed,
    plan_of,
    show_log,
    stop_at_plan,
)
from quantization.programs.out_option import check_out
from quantization.programs.train import (  # fmt: skip
    CALIBRATE,
    TRAIN_PREFIX,
    add_calibrate_options,
    add_train_options,
    calibrate_prefix,
    train_prefix_file,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from intactkv.prefix import Prefix
    from quantization.runs.auto_prefix import Found

__all__ = ["prefix_program"]

DISCOVER = """\
Find the prefix that `--prefix auto` stands for, PrefixQuant's: the tokens whose inputs of the feed-forward part's last
linear exceed the threshold times the median, most frequent first, then [BOS]. Needs the dense full-precision model
once; the result is kept beside the model's prefixes and found again. Prints the tokens, and per block the largest ratio
of a token to the median before the prefix and behind it.
"""


def prefix_parser(program: str) -> argparse.ArgumentParser:
    """The options of the prefix programs."""
    parser = Parser(prog=program, description="Prefixes: keys and values of the pivot tokens.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="build|export|calibrate|discover|train-prefix"
    )

    def command(name: str, short: str, description: str, example: str) -> argparse.ArgumentParser:
        epilog = f"example: {program} {name} --model modelzoo/smollm2/smollm2-135m {example}"
        return commands.add_parser(name, help=short, description=description, epilog=epilog)

    build = command(
        "build",
        "compute a prefix with the full-precision twin and write it to a file",
        "Compute the prefix of a model (of a recipe's full-precision twin) and write it to a file.",
        "--prefix bos --out bos.safetensors",
    )
    export = command(
        "export",
        "write a prefix in a form that other programs load",
        "Write a prefix as a PEFT prefix-tuning adapter, for the model and all its quantized forms. That needs nothing "
        "more; whoever loads the adapter through PEFT needs `pip install peft`. All programs here take the directory "
        "as --prefix, too.",
        "--prefix bos --out modelzoo/bos-peft",
    )
    for one in (build, export):
        add_plan_options(one, run=False)
    build.add_argument("--out", type=values.path, required=True, metavar="FILE", help="file to write, *.safetensors")
    export.add_argument("--format", choices=["peft"], default="peft", help="what to write (default: %(default)s)")
    export.add_argument(
        "--out", type=values.path, required=True, metavar="DIR", help="directory to write; must not exist yet"
    )
    add_calibrate_options(
        command(
            "calibrate",
            "train a prefix for a quantized model",
            CALIBRATE,
            "--recipe rtn-w3 --prefix prompt --samples 64 --max-length 256 --steps 40 --batch-size 4 "
            "--out prompt-cal.safetensors",
        )
    )
    add_discover_options(command("discover", "find the outlier tokens that --prefix auto puts in front", DISCOVER, ""))
    add_train_options(
        command(
            "train-prefix",
            "train the embeddings of a prefix in full precision",
            TRAIN_PREFIX,
            "--prefix-len 4 --prefix-epochs 3 --length 256 --out trained.safetensors",
        )
    )
    return parser


def prefix_program(arguments: list[str], program: str = "python -m quantization prefix") -> None:
    """The prefix programs; `python -m intactkv` comes here, too."""
    options = prefix_parser(program).parse_args(arguments)
    programs = {"build": build_prefix, "export": export_prefix, "calibrate": calibrate_prefix,
                "discover": discover_prefix, "train-prefix": train_prefix_file}  # fmt: skip
    show_log()
    programs[options.command](options)


NO_PREFIX = "no prefix was named"


def build_prefix(options: argparse.Namespace) -> None:
    """Write a prefix file."""
    check_out(options, "prefix")
    prefix = plan_of(options, needs_prefix=NO_PREFIX, makes="prefix").intact_prefix()
    prefix.save(options.out)
    print(f"{_facts(prefix)}  {options.out}")


def export_prefix(options: argparse.Namespace) -> None:
    """Write a PEFT adapter."""
    check_out(options, "directory")
    plan = plan_of(options, needs_prefix=NO_PREFIX, makes="prefix")
    from intactkv.peft import write_adapter

    prefix = plan.intact_prefix()
    write_adapter(prefix, options.out, base_model=options.model)
    print(f"{_facts(prefix)}  {options.out}")


def _facts(prefix: "Prefix") -> str:
    return f"{len(prefix)} tokens {prefix.ids.tolist()}  {prefix.dtype}  basis {prefix.model.basis}"


def add_discover_options(command: argparse.ArgumentParser) -> None:
    """The options of `discover`."""
    add_plan_options(command, recipe=False, calibration=False, prefix=False, run=False)
    text = command.add_argument_group("text")
    text.add_argument(
        "--corpus",
        type=values.name,
        metavar="NAME|FILE",
        help="random pieces of which text (default: the model's own, or pile)",
    )
    text.add_argument("--samples", type=values.count(), metavar="N", help="pieces (default: 64)")
    text.add_argument("--length", type=values.count(), metavar="T",
                      help="tokens of a piece (default: 512, at most half the model's positions)")  # fmt: skip
    add_text_seed(text, 2, "of the pieces' draw")
    command.add_argument(
        "--threshold",
        type=values.number(above=1, like="64"),
        default=64.0,
        metavar="R",
        help="an outlier exceeds R × the median (default: 64)",
    )
    command.add_argument(
        "--ablate", type=values.count(), metavar="N", help="look behind the first N tokens of the prefix only"
    )
    command.add_argument(
        "--out", type=values.path, metavar="FILE", help="write the prefix, too (*.safetensors), for --prefix FILE; "
        "what --prefix auto finds needs none"
    )  # fmt: skip


def discover_prefix(options: argparse.Namespace) -> None:
    """Discover, look behind the prefix, print both."""
    check_out(options, "prefix")

    from dataclasses import replace

    from tqdm import tqdm

    from corpora.catalog import CORPORA, corpus_files
    from intactkv.discover import down_maxima, largest_ratios
    from intactkv.prefix import build_prefix
    from quantization.runs.auto_prefix import default_search, find
    from quantization.runs.checkpoint import dense_directory, find_checkpoint

    options.model = dense_directory(find_checkpoint(options.model), "outlier tokens are looked for there")
    plan = plan_of(options, makes="discovery")
    search = default_search(plan.checkpoint, plan.tokenizer, plan.context, options.corpus)
    given = {"samples": options.samples, "length": options.length}
    text = replace(search.text, **{name: value for name, value in given.items() if value is not None})
    if text.corpus in CORPORA and not corpus_files(text.corpus, "calibration"):
        raise UserError(
            f"the text {text.corpus} is missing; run 'bash scripts/prepare/data.sh {text.corpus}', or name another: "
            "--corpus NAME|FILE"
        )
    if plan.context is not None and 2 * text.length > plan.context:
        raise UserError(
            f"--length {text.length}: pieces take at most half of the {plan.context} positions of "
            f"{plan.checkpoint.name}; use {plan.context // 2} or fewer"
        )
    search = replace(search, text=text, seed=options.text_seed, threshold=options.threshold)
    stop_at_plan(options, replace(plan, search=search, named=None), "discovery")
    loaded: list[PreTrainedModel] = []

    def dense(_directory: Path) -> "PreTrainedModel":
        if not loaded:
            loaded.append(plan.load().model)
        return loaded[0]

    with tqdm(total=2 * text.samples, desc="outlier tokens", unit="piece") as bar:
        found = find(search, dense, bar.update)
        kept = found.prefix if options.ablate is None else found.prefix[: options.ablate]
        behind = found.behind if kept == found.prefix else None
        if behind is None or options.out is not None:
            model = dense(plan.checkpoint.directory)
            prefix = build_prefix(model, kept)
            if behind is None:
                ids = search.pieces()
                behind = largest_ratios(down_maxima(model, ids, prefix, advance=bar.update))
            if kept == found.prefix and found.behind is None:
                replace(found, behind=behind).write()
            if options.out is not None:
                prefix.save(options.out)
        bar.update(bar.total - bar.n)
    print(_table(found, kept, behind, plan.tokenizer))
    print(options.out or found.file)


def _table(found: "Found", kept: tuple[int, ...], behind: tuple[float, ...], tokenizer: Any) -> str:
    """Tokens and ratios, to be read."""

    def word(token: int) -> str:
        return repr(tokenizer.decode([token]))

    drawn, threshold = found.made_of["drawn"], found.made_of["threshold"]
    lines = [
        f"{drawn['samples']} × {drawn['length']} tokens of {drawn['corpus']}, outliers above {threshold:g} × median: "
        f"o = {found.number} per sequence; position 0, apart, {found.position_0} times",
        "",
        f"{'id':>7}  {'token':<16}  {'count':>6}",
        *(f"{token:>7}  {word(token):<16}  {count:>6}" for token, count in found.counts[:10]),
        "",
        f"prefix: {list(kept)}  {' '.join(map(word, kept))}",
        "",
        f"{'block':>7}  {'largest ratio':>13}  {'behind it':>9}",
        *(f"{i:>7}  {a:>13.1f}  {b:>9.1f}" for i, (a, b) in enumerate(zip(found.ratios, behind, strict=True))),
        f"{'all':>7}  {max(found.ratios):>13.1f}  {max(behind):>9.1f}",
    ]
    return "\n".join(lines)
