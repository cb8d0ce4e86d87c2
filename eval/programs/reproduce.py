"""python -m eval reproduce: run what published tables need, and print our figures beside theirs."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora import values
from corpora.errors import UserError, one_line
from eval.programs.asked import add_asked, asked_for, words_of

if TYPE_CHECKING:
    from eval.execution import Failure, Outcome, Worker
    from eval.tables.asked import Call, Run
    from eval.tables.declared import Paper, Scope

__all__ = ["add", "run"]

EXAMPLES = """\
examples:
  python -m eval reproduce --list
  python -m eval reproduce intactkv-1 --dry-run
  python -m eval reproduce intactkv-1 --model modelzoo/smollm2/smollm2-135m --window 512 --limit 4
  python -m eval reproduce intactkv-1 intactkv-5 --model modelzoo/llama-2/llama-2-7b --only rtn gptq --workers 2
"""


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    reproduce = commands.add_parser(
        "reproduce",
        help="run published tables, and print our figures beside theirs",
        description=(
            "Runs what published tables need: shared checkpoints and prefixes once, then every figure, each as a "
            "program of its own. What is finished is not run again, so a killed call goes on when it is "
            "repeated. Prints our figures beside the published ones. At full size a table takes the published models, "
            "data and hours."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reproduce.add_argument("--list", action="store_true", help="print the tables, one a line, and stop")
    add_asked(reproduce)
    _add_execution(reproduce)
    reproduce.add_argument(
        "--dry-run",
        action="store_true",
        help="print the runs, what is finished, disk and estimated GPU hours, and what is lacking; run nothing",
    )
    reproduce.add_argument("--commands", action="store_true", help="with --dry-run: also every command line")
    reproduce.add_argument(
        "--format", default="markdown", choices=["markdown", "csv", "latex"], help="of the table (default: markdown)"
    )


def _add_execution(reproduce: argparse.ArgumentParser) -> None:
    group = reproduce.add_argument_group("how it is run")
    group.add_argument(
        "--device",
        type=values.device,
        default="auto",
        metavar="auto|cpu|cuda[:N]|cuda:all",
        help="where to compute (default: auto, every visible GPU, one run on each; cuda:all: one model over all)",
    )
    group.add_argument("--max-memory", type=values.size, metavar="SIZE", help="with cuda:all: of each GPU, as 65GiB")
    group.add_argument(
        "--workers",
        type=values.automatic(values.count(1, 64)),
        metavar="N|auto",
        help="runs at a time (default: auto, one for every visible GPU, on a CPU one); more than GPUs share them",
    )
    group.add_argument("--again", action="store_true", help="ask every program, also what is finished: each reads its "
                       "own record back if nothing has changed")  # fmt: skip
    group.add_argument("--force", action="store_true", help="measure again, even if there is a record")


def run(options: argparse.Namespace) -> None:
    """Plan, and run what is left; exit code 1 if a run failed."""
    if options.list:
        _list()
        return
    if options.max_memory is not None and options.device != "cuda:all":
        raise UserError("--max-memory is for a model that is spread: add --device cuda:all, or leave it out")
    if options.commands and not options.dry_run:
        raise UserError("--commands are of --dry-run; add it, or leave --commands out")
    asked, chosen, scope = asked_for(options)

    from eval.doctor.lacking import lacking, refuse_lacking
    from eval.tables.asked import calls_of
    from eval.tables.noted import note
    from eval.tables.preview import plan_tables
    from eval.tables.render import render

    papers = [paper for paper, _ in chosen]
    models = list(dict.fromkeys(run.model for run in asked))
    if options.dry_run:
        table, lines = plan_tables(papers, models, scope, asked, options.device, lacking(asked))
        print(render([table], options.format), end="")
        if options.commands:
            print("", *lines, sep="\n")
        return
    refuse_lacking(papers, asked)
    note(chosen, words_of(options))

    from eval.execution import execute, workers_of

    workers = workers_of(options.device, options.workers, options.max_memory)
    if all(worker.device == "cpu" for worker in workers) and any(run.program == "latency" for run in asked):
        print("latencies of kernels need a GPU: their cells stay n/a", file=sys.stderr)
        asked = [run for run in asked if run.program != "latency"]
    watcher = _Bar(asked, workers)
    started = time.perf_counter()
    try:
        outcome = execute(calls_of(asked), workers, again=options.again, force=options.force, watcher=watcher)
    finally:
        watcher.close()
    _print(chosen, scope, options.format)
    _tell(outcome, time.perf_counter() - started)
    if outcome.failed:
        sys.exit(1)


def _list() -> None:
    from eval.tables.papers import PAPERS

    width = max(map(len, PAPERS), default=0)
    for name, paper in PAPERS.items():
        print(f"{name:<{width}}  {paper.source}: {paper.title}  [{', '.join(paper.models) or 'of no model'}]")


def _print(chosen: "Sequence[tuple[Paper, list[Path]]]", scope: "Scope", style: str) -> None:
    """Every table, ours beside theirs."""
    from eval.tables.beside import paper_table
    from eval.tables.compare import filled
    from eval.tables.render import render

    left_out: list[str] = []
    tables = [
        table
        for paper, models in chosen
        for model in models
        for table in paper_table(paper, filled(paper, model, scope, left_out), called=scope.called)
    ]
    print(render(tables, style), end="")
    for line in left_out:
        print(line, file=sys.stderr)


def _tell(outcome: "Outcome", seconds: float) -> None:
    """What was run, on stderr: stdout has the table. What failed for one reason is told once."""
    made = len(outcome.made)
    print(
        f"{made} {_runs(made)} made, {len(outcome.finished)} finished before, {len(outcome.failed)} failed, "
        f"{len(outcome.left_out)} left out, {seconds:.0f} s",
        file=sys.stderr,
    )
    reasons: dict[str, list[Failure]] = {}
    for failure in outcome.failed:
        reasons.setdefault(_reason(failure), []).append(failure)
    for failures in reasons.values():
        more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
        print(f"failed: {failures[0].run.label}{more}: {one_line(failures[0].said)}", file=sys.stderr)
    if number := len(outcome.left_out):
        print(f"left out: {number} {_runs(number)} that need what failed", file=sys.stderr)


def _runs(number: int) -> str:
    return "run" if number == 1 else "runs"


def _reason(failure: "Failure") -> str:
    """Why a run failed, without the log that is its own."""
    return one_line(failure.said).partition(" (all of it: ")[0]


class _Bar:
    """One line on stderr for the whole: N of M runs, what runs, elapsed, what is left. Where stderr is no terminal, a
    line for every call that has ended."""

    def __init__(self, asked: "Sequence[Run]", workers: "Sequence[Worker]"):
        from tqdm import tqdm

        from eval.tables.asked import calls_of
        from eval.tables.estimate import seconds_of, size_of
        from eval.tables.ledger import open_runs

        self._live = sys.stderr.isatty()
        self._number, self._done = len(asked), 0
        self._started = time.perf_counter()
        sizes = {model: size_of(model) for model in {run.model for run in asked}}
        self._reasons, self._lost = set[str](), set[str]()  # what was told of failures, and the keys of what failed
        self._work: dict[str, float] = {}  # estimated seconds by the key of a run
        wanted = open_runs(asked)
        for call in calls_of(run for run in asked if run.key in wanted):
            size = sizes[call.first.model]
            seconds = 1.0 if size is None else seconds_of(call, size)
            self._work |= {run.key: seconds / len(call.runs) for run in call.runs}
        self._whole, self._left = sum(self._work.values()), sum(self._work.values())
        self._done = self._number - len(self._work)
        self._bar = tqdm(
            total=self._number, initial=self._done, disable=not self._live, dynamic_ncols=True, leave=False,
            bar_format="{n_fmt} of {total_fmt} runs  {elapsed} elapsed{desc}",
        )  # fmt: skip
        if not self._live:
            print(
                f"{self._done} of {self._number} {_runs(self._number)} finished, {len(workers)} at a time",
                file=sys.stderr,
            )

    def doing(self, calls: "Sequence[tuple[Call, str]]") -> None:
        """Several times a second: what runs now, each with the last line that it said."""
        if self._live:
            said = " | ".join(f"{_short(call.label)}  {one_line(last)[:60]}".rstrip() for call, last in calls)
            self._bar.set_description_str(f"{self._expected()}  {said}")

    def _expected(self) -> str:
        """What is left, if the rest goes on as what was made did; nothing as long as nothing was made."""
        made = self._whole - self._left
        if made <= 0:
            return ""
        seconds = (time.perf_counter() - self._started) * self._left / made
        return f", about {_clock(seconds)} left"

    def _ended(self, runs: "Sequence[Run]", line: str) -> None:
        self._done += len(runs)
        self._left -= sum(self._work.pop(run.key, 0.0) for run in runs)
        self._bar.update(len(runs))
        if not line:
            return
        text = f"{self._done:>4} of {self._number}  {line}"
        if self._live:
            self._bar.write(text, file=sys.stderr)
        else:
            print(f"{text}{self._expected()}", file=sys.stderr, flush=True)

    def made(self, call: "Call", seconds: float) -> None:
        """A call has ended well."""
        self._ended(call.runs, f"{seconds:7.1f} s  {call.label}")

    def failed(self, failure: "Failure") -> None:
        """A run has failed, or is left out."""
        reason = _reason(failure)
        told = reason in self._reasons or any(needed.key in self._lost for needed in failure.run.needs)
        self._reasons.add(reason)
        self._lost.add(failure.run.key)
        self._ended([failure.run], "" if told else f"failed: {failure.run.label}: {one_line(failure.said)}")

    def close(self) -> None:
        """Take the line away."""
        self._bar.close()


def _short(label: str) -> str:
    return label if len(label) <= 70 else f"{label[:69]}…"


def _clock(seconds: float) -> str:
    minutes = int(seconds) // 60
    return (
        f"{minutes // 60}:{minutes % 60:02}:{int(seconds) % 60:02}"
        if minutes >= 60
        else f"{minutes}:{int(seconds) % 60:02}"
    )
