"""python -m corpora check: what a model directory holds, and which methods run on it, before anything is read of it."""

import argparse
import json
import textwrap
from typing import TYPE_CHECKING, Any

from corpora import values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eval.doctor.suits import Checked

__all__ = ["add", "run"]

EXAMPLES = """\
examples:
  python -m corpora check modelzoo/smollm2/smollm2-135m
  python -m corpora check DIR --json

Exit code 0: something runs. 1: nothing does, because files are missing or damaged, or no method takes the model. 2: it
is no causal language model that transformers knows.
"""
WIDTH = 118
BYTES = "bytes of "
OF_TOKENS = ("vocabulary", "positions", "sliding window")
SHOWN = 20  # names of methods that one reason refuses


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    check = commands.add_parser(
        "check",
        help="what a model directory holds, and which methods run on it",
        description="Reads the configuration, the headers of the weights and the tokenizer of a model directory, and "
        "says what family it is, whether its files are whole, and for every recipe, KV policy, prefix and export "
        "format that it runs, or why not. No weights are read.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("directory", type=values.path, metavar="DIR", help="a Hugging Face checkpoint, or one of ours")
    check.add_argument("--json", action="store_true", help="print all of it as JSON")


def run(options: argparse.Namespace) -> None:
    """Print what was found. Exits with 1 if nothing runs. Raises UserError for what is no model."""
    from dataclasses import asdict

    from eval.doctor.suits import check

    found = check(options.directory)
    if options.json:
        print(json.dumps(asdict(found) | {"runs": found.runs}, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(found)))
    if not found.runs:
        raise SystemExit(1)


def _lines(found: "Checked") -> "Iterator[str]":
    from eval.doctor.suits import KINDS

    yield found.directory
    for name, value in found.facts.items():
        yield _wrapped(f"  {name.removeprefix(BYTES)}: ", _fact(name, value))
    yield _wrapped("  files: ", found.damage or found.files)
    said = set[str]()
    for kind, words in KINDS.items():
        mine = [method for method in found.methods if method.kind == kind]
        runs = [method.name for method in mine if method.reason is None]
        yield f"{words}: {len(runs)} of {len(mine)} run{', once its files are whole' if found.damage else ''}"
        if runs:
            yield _wrapped("  runs: ", ", ".join(runs))
        reasons: dict[str, list[str]] = {}
        for method in mine:
            if method.reason is not None:
                reasons.setdefault(method.reason, []).append(method.name)
        for reason, names in reasons.items():
            who = ", ".join(names) if len(names) <= SHOWN else f"{len(names)} (--json names them)"
            yield _wrapped("  refused: ", f"{who}: {'the same' if reason in said else reason}")
            said.add(reason)


def _fact(name: str, value: str | int) -> str:
    """With its unit."""
    if isinstance(value, str):
        return value
    if name.startswith(BYTES):
        return f"{value / 1e6:,.1f} MB"
    return f"{value:,}{' tokens' if name in OF_TOKENS else ''}"


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=head, subsequent_indent=" " * 4, break_long_words=False, break_on_hyphens=False
    )
