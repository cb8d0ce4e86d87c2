"""python -m eval report: published tables with our finished runs beside them, as one HTML file."""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora import values
from corpora.errors import UserError, one_line
from eval.programs.asked import ALL, add_asked, papers_of, scope_of, scope_of_words, without_models, words_of

if TYPE_CHECKING:
    from eval.report.page import Shown
    from eval.tables.declared import Scope
    from eval.tables.noted import Noted

__all__ = ["add", "run"]

log = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  python -m eval report
  python -m eval report intactkv-1 --model smollm2-135m --window 512 --limit 4
  python -m eval report all --out published.html
"""


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    report = commands.add_parser(
        "report",
        help="published tables with finished runs beside them, as one HTML file",
        description=(
            "Writes one HTML file that needs no network: our figures beside the published ones, each with its run, "
            "its settings and its command. Runs nothing. Without options it shows every table that `reproduce` or "
            "`cluster` ran, at the size that it was run. A named table is shown with all its published models, too."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_asked(report)
    report.add_argument(
        "--out",
        type=values.path,
        metavar="FILE.html",
        help="the file to write (default: outputs/report.html); replaces only a report of this program",
    )


def run(options: argparse.Namespace) -> None:
    """Write the report and print its path."""
    from datetime import UTC, datetime

    from corpora.paths import outputs_dir
    from corpora.targets import check_report
    from corpora.writing import write_beside

    out = options.out or outputs_dir() / "report.html"
    check_report(out)
    papers_of(options.tables or [ALL])  # refuses an unknown one

    from eval.report.html import html_of
    from eval.report.page import report_of
    from eval.tables.ledger import all_entries
    from eval.tables.noted import all_noted

    left_out: list[str] = []
    noted = [(one, scope) for one in all_noted(left_out) if (scope := _scope(one, left_out)) is not None]
    report = report_of(_shown(options, noted))
    entries = all_entries(left_out)
    report.left_out += left_out
    for line in report.left_out:
        log.warning(line)
    if not report.sections:
        raise UserError(_nothing(options, noted))
    report.elsewhere = len({entry["record"] for entry in entries if "record" in entry} - report.cards.keys())
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = html_of(report, made=made, command=shlex.join(["python", "-m", "eval", *sys.argv[1:]]))
    with write_beside(out) as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")
    print(out)


def _scope(noted: "Noted", left_out: list[str]) -> "Scope | None":
    """The size that was noted; None, and a line for `left_out`, where its words are no options."""
    try:
        return scope_of_words(noted.words)
    except UserError as error:
        left_out.append(f"left out: note of a table {noted.file}: {one_line(str(error))}")
        return None


def _shown(options: argparse.Namespace, noted: "Sequence[tuple[Noted, Scope]]") -> "list[Shown]":
    """What the report is asked for: tables that were run, as they were run, unless a size is given. Of tables that are
    named also the models that are given, or the published ones, whether something was run for them or not."""
    from eval.report.page import Shown
    from eval.tables.papers import PAPERS
    from eval.tables.preview import place_of

    papers = papers_of(options.tables or [ALL])
    given = [path if path.is_dir() and path.name else place_of(path.resolve().name) for path in options.model or ()]
    published = [Path(name) for paper in papers for name in paper.models]
    wanted, scope = without_models(scope_of(options), [*given, *(one.model for one, _ in noted), *published])
    size, words = replace(scope, only=()), tuple(words_of(options))
    found = {
        (one.table, one.model.name, its_size): Shown(PAPERS[one.table], one.model, its_size, one.words, always=False)
        for one, its_size in noted
        if one.table in PAPERS and PAPERS[one.table] in papers and (not words or its_size == size)
    }
    there = {place[:2] for place in found}
    for paper in papers if options.tables else ():
        for model in (given if paper.models else None) or map(place_of, paper.shown_for):
            if (paper.name, model.name) not in there:
                found[paper.name, model.name, size] = Shown(paper, model, size, words)
    names = {model.name for model in given}
    chosen = [
        replace(one, scope=replace(one.scope, only=scope.only))
        for one in found.values()
        if (not names or one.model.name in names) and (not wanted or one.model.name in wanted)
    ]
    order = list(PAPERS.values())
    return sorted(chosen, key=lambda one: order.index(one.paper))


def _nothing(options: argparse.Namespace, noted: "Sequence[tuple[Noted, Scope]]") -> str:
    """Why there is nothing to show."""
    if options.tables and options.only:
        return f"--only {' '.join(options.only)} leaves nothing of {', '.join(options.tables)}"
    if not noted:
        return "no table was run; run `python -m eval reproduce TABLE` first, or name a TABLE to see the published one"
    ways = [shlex.join([one.table, "--model", one.model.name, *one.words]) for one, _ in noted]
    more = f" and {len(ways) - 5} more" if len(ways) > 5 else ""
    return f"nothing that was run fits what is asked for; there are {'; '.join(ways[:5])}{more}"
