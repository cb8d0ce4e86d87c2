"""python -m eval table: finished runs as a table."""

import argparse
from typing import Any

from corpora.errors import UserError

__all__ = ["add", "add_filters", "chosen_rows", "run"]


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    table = commands.add_parser(
        "table",
        help="finished runs as a table, vanilla beside IntactKV",
        description="Print the perplexities in outputs/runs/, vanilla beside IntactKV.",
    )
    table.add_argument("--format", default="markdown", choices=["markdown", "csv"], help="default: markdown")
    table.add_argument(
        "--costs", action="store_true", help="also what quantizing took: bits per weight, seconds, peak memory"
    )
    add_filters(table, required=False)


def add_filters(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Which finished runs to show."""
    parser.add_argument("--model", required=required, metavar="NAME", help="only this one, for example smollm2-135m")
    parser.add_argument("--corpus", metavar="NAME", help="only runs on this corpus or text file")
    parser.add_argument("--protocol", choices=["intactkv", "gptq"], help="only runs by this protocol")
    parser.add_argument("--window", type=int, metavar="TOKENS", help="only runs with this window")
    parser.add_argument("--limit", metavar="WINDOWS|all", help="only runs with this limit")
    parser.add_argument("--dtype", metavar="NAME", help="only runs computed in this dtype")
    parser.add_argument("--device", metavar="cpu|cuda", help="only runs on this kind of device")


FILTERS = ("model", "corpus", "protocol", "window", "limit", "dtype", "device")


def _shown(value: Any) -> str:
    """A setting as a filter spells it; no limit is `all`."""
    return "all" if value is None else str(value)


def chosen_rows(options: argparse.Namespace) -> list[Any]:
    """The finished perplexities that the filters leave. Raises UserError if there are none."""
    from corpora.paths import outputs_dir
    from eval.runs import all_records
    from eval.tables import perplexity_rows

    wanted = {key: getattr(options, key) for key in FILTERS}
    records = [
        record
        for record in all_records("ppl")
        if all(value is None or str(value) == _shown(record["settings"][key]) for key, value in wanted.items())
    ]
    if not records:
        raise UserError(f"{outputs_dir() / 'runs'} holds no finished run that fits; run `python -m eval ppl` first")
    return perplexity_rows(records)


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    from eval.tables import print_table

    print_table(chosen_rows(options), options.format, options.costs)
