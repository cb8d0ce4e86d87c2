"""python -m eval report: published tables with our finished runs beside them, as one HTML file."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora import values
from corpora.errors import UserError
from eval.programs.asked import ALL, add_asked, papers_of, scope_of, without_models

if TYPE_CHECKING:
    from eval.tables.declared import Paper, Scope
    from eval.tables.ledger import Entry

__all__ = ["add", "run"]

EXAMPLES = """\
examples:
  python -m eval report
  python -m eval report intactkv-1 --model modelzoo/smollm2/smollm2-135m --window 512 --limit 4
  python -m eval report all --out published.html
"""


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    report = commands.add_parser(
        "report",
        help="published tables with finished runs beside them, as one HTML file",
        description=(
            "Writes one HTML file that needs no network: our figures beside the published ones, each with its run, "
            "its settings and its command. Runs nothing. Give the options that `reproduce` was given: runs at another "
            "size stand in another table. Without TABLE it shows every table that has a finished run; a named table is "
            "shown with all its published models."
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
    papers = papers_of(options.tables or [ALL])
    scope = scope_of(options)

    from eval.report.html import html_of
    from eval.report.page import report_of
    from eval.tables.ledger import all_entries

    left_out: list[str] = []
    entries = all_entries(left_out)
    chosen, scope = _chosen(papers, options, scope, entries)
    report = report_of(chosen, scope, options=_words(scope))
    if not report.sections:
        raise UserError(_nothing(entries))
    report.left_out += left_out
    report.elsewhere = len({entry["record"] for entry in entries if "record" in entry} - report.cards.keys())
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = html_of(report, made=made, command=shlex.join(["python", "-m", "eval", *sys.argv[1:]]))
    with write_beside(out) as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")
    print(out)


def _chosen(
    papers: "Sequence[Paper]", options: argparse.Namespace, scope: "Scope", entries: "Sequence[Entry]"
) -> "tuple[list[tuple[Paper, dict[Path, bool]]], Scope]":
    """Every table with its models, and for each of them whether it is shown without a run, too.

    Those are the models that were given, or the table's own, of a table that was named. Others are shown if something
    was run for them.
    """
    from eval.tables.preview import place_of

    given = [path if path.is_dir() else place_of(path.name) for path in options.model or ()]
    ran = [] if given else [place_of(name) for name in dict.fromkeys(entry["model"] for entry in entries)]
    published = [Path(name) for paper in papers for name in paper.models]
    wanted, scope = without_models(scope, [*given, *ran, *published])
    chosen = []
    for paper in papers:
        own = (given if paper.models else None) or map(place_of, paper.shown_for)
        models = dict.fromkeys(ran, False) | dict.fromkeys(own, bool(options.tables))
        chosen.append((paper, {place: all_ for place, all_ in models.items() if not wanted or place.name in wanted}))
    return chosen, scope


def _words(scope: "Scope") -> list[str]:
    """The options that `reproduce` takes for a scope."""
    words: list[str] = []
    for name, several in (("--seeds", [str(seed) for seed in scope.seeds]), ("--only", scope.only)):
        words += [name, *several] if several else []
    for name, value in (("--limit", scope.limit), ("--window", scope.window), ("--data", scope.data)):
        words += [] if value is None else [name, str(value)]
    words += [word for corpus in scope.corpora for word in ("--corpus", corpus)]
    words += [*scope.calibration, *scope.judge[:2]]
    more = {"--options": scope.options, "--training": scope.training, "--judge-options": scope.judge[2:]}
    return words + [f"{name}={shlex.join(options)}" for name, options in more.items() if options]


def _nothing(entries: "Sequence[Entry]") -> str:
    """Why there is nothing to show."""
    if not entries:
        return (
            "no table has a finished run; run `python -m eval reproduce TABLE` first, or name a TABLE to see it empty"
        )
    newest = max(entries, key=lambda entry: entry["finished"])
    return (
        f"none of the {len(entries)} finished runs has a place in these tables as they are asked for; give the options "
        f"that `reproduce` was given (the newest run: {shlex.join(newest['command'][1:])[:300]})"
    )
