"""python -m eval reproduce: run what published tables need, and print our figures beside theirs."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora import values
from corpora.errors import UserError, one_line

if TYPE_CHECKING:
    from eval.execution import Failure, Outcome, Worker
    from eval.tables.asked import Call, Run
    from eval.tables.declared import Paper, Scope

__all__ = ["add", "add_scope", "asked_of", "models_of", "papers_of", "run", "scope_of", "texts_of"]

EXAMPLES = """\
examples:
  python -m eval reproduce --list
  python -m eval reproduce intactkv-1 --dry-run
  python -m eval reproduce intactkv-1 --model modelzoo/smollm2/smollm2-135m --window 512 --limit 4
  python -m eval reproduce intactkv-1 intactkv-5 --model modelzoo/llama-2/llama-2-7b --only rtn gptq --workers 2
"""
ALL = "all"


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
    reproduce.add_argument("tables", nargs="*", type=values.name, metavar="TABLE", help="names of --list, or all")
    reproduce.add_argument("--list", action="store_true", help="print the tables, one a line, and stop")
    reproduce.add_argument(
        "--model",
        type=values.path,
        action="append",
        metavar="DIR",
        help="directory of a dense checkpoint; may be given several times (default: every published model of the table "
        "that is in modelzoo/)",
    )
    add_scope(reproduce)
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


def add_scope(parser: argparse.ArgumentParser) -> None:
    """Which runs of a table, and at what size."""
    group = parser.add_argument_group("what is run (default: the whole table, at the published size)")
    group.add_argument(
        "--only",
        type=values.name,
        nargs="+",
        action="extend",
        metavar="WORD",
        help="methods, widths (4-bit), models, arms ([B]; alone: without a prefix) or measures; of several kinds, one "
        "of each must fit",
    )
    group.add_argument(
        "--seeds",
        type=values.seed,
        nargs="+",
        metavar="S",
        help="of calibration, a run for each (default: the recipe's)",
    )
    group.add_argument(
        "--corpus",
        type=values.name,
        action="append",
        metavar="NAME|FILE",
        help="for perplexity, in place of the table's",
    )
    group.add_argument("--protocol", choices=["intactkv", "gptq"], help="of perplexity, in place of the table's")
    group.add_argument("--window", type=values.count(3), metavar="TOKENS", help="of perplexity (default: the table's)")
    group.add_argument(
        "--limit", type=values.count(), metavar="N", help="at most so many windows, or questions of a task"
    )
    group.add_argument(
        "--tasks",
        type=values.several(values.name),
        metavar="NAME,…",
        help="columns of these tasks, in place of the table's",
    )
    group.add_argument("--mmlu-protocol", choices=["hendrycks", "lm-eval"], help="of MMLU, in place of the table's")
    group.add_argument("--fewshot", type=values.count(0), metavar="N", help="shots of tasks (default: the table's)")
    group.add_argument("--batch-size", type=values.count(), metavar="N", help="windows or rows of a forward pass")
    group.add_argument("--data", choices=["local", "sample", "hub"], help="where the questions of tasks come from")
    group.add_argument(
        "--calibration", type=values.name, metavar="NAME|FILE", help="the text that methods calibrate on"
    )
    group.add_argument("--calibration-samples", type=values.count(), metavar="N", help="pieces of it")
    group.add_argument("--calibration-length", type=values.count(), metavar="T", help="tokens of a piece")
    group.add_argument(
        "--behind", action="store_true", help="methods that calibrate also do so behind the prefix of an arm"
    )
    group.add_argument(
        "--set",
        type=values.name,
        action="append",
        dest="settings",
        metavar="PART.FIELD=VALUE",
        help="a setting of every recipe but full precision, such as weights.damp=0.1",
    )
    group.add_argument(
        "--options", type=values.words, default=(), metavar='"--OPTION …"', help="more options of every such recipe"
    )
    group.add_argument(
        "--training", type=values.words, default=(), metavar='"--OPTION …"', help="more options of what trains a prefix"
    )
    group.add_argument(
        "--judge-model", type=values.name, metavar="NAME|local:DIR", help="judge answers (default: none is asked)"
    )
    group.add_argument(
        "--judge-options", type=values.words, default=(), metavar='"--OPTION …"', help="more options of `eval judge`"
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


def scope_of(options: argparse.Namespace) -> "Scope":
    """What the options leave of a table."""
    from eval.tables.declared import Scope

    def told(**given: object) -> tuple[str, ...]:
        return tuple(word for name, value in given.items() if value is not None
                     for word in (f"--{name.replace('_', '-')}", str(value)))  # fmt: skip

    names = ("calibration", "calibration_samples", "calibration_length")
    calibration = told(**{name: getattr(options, name) for name in names})
    judge = () if options.judge_model is None else ("--judge-model", options.judge_model, *options.judge_options)
    if options.judge_options and not judge:
        raise UserError("--judge-options are of a judge, but none is named; add --judge-model, or leave them out")
    settings = [word for setting in options.settings or () for word in ("--set", setting)]
    return Scope(
        seeds=tuple(dict.fromkeys(options.seeds or ())),
        only=tuple(options.only or ()),
        behind=options.behind,
        corpora=tuple(options.corpus or ()),
        tasks=options.tasks or (),
        limit=options.limit,
        window=options.window,
        data=options.data,
        scoring=told(protocol=options.protocol, batch_size=options.batch_size),
        asking=told(fewshot=options.fewshot, batch_size=options.batch_size),
        mmlu=told(protocol=options.mmlu_protocol),
        calibration=calibration,
        options=(*settings, *options.options),
        training=options.training,
        judge=judge,
    )


def run(options: argparse.Namespace) -> None:
    """Plan, and run what is left; exit code 1 if a run failed."""
    if options.list:
        _list()
        return
    papers = papers_of(options.tables)
    if options.commands and not options.dry_run:
        raise UserError("--commands are of --dry-run; add it, or leave --commands out")
    scope = scope_of(options)

    from eval.tables.asked import calls_of
    from eval.tables.preview import lacking, plan_tables
    from eval.tables.render import render

    chosen, scope = models_of(papers, options, scope)
    asked = asked_of(chosen, scope)
    if not asked:
        raise UserError(_nothing(chosen, scope))
    models = list(dict.fromkeys(run.model for run in asked))
    if options.dry_run:
        table, lines = plan_tables(papers, models, scope, asked, options.device)
        print(render([table], options.format), end="")
        if options.commands:
            print("", *lines, sep="\n")
        return
    if missing := lacking(asked, texts_of(asked, scope)):
        raise UserError(f"{', '.join(p.name for p in papers)} cannot run: {'; '.join(missing)}")

    from eval.execution import execute, workers_of

    workers = workers_of(options.device, options.workers, options.max_memory)
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


def papers_of(names: Sequence[str]) -> "list[Paper]":
    """The tables of some names. Raises UserError for one that there is not, or none."""
    from eval.tables.papers import PAPERS

    if not names:
        raise UserError("no table is named; `python -m eval reproduce --list` prints all, `all` stands for every one")
    if ALL in names:
        return list(PAPERS.values())
    for name in names:
        if name not in PAPERS:
            raise UserError(f"unknown table {values.shown(name)}; known are {', '.join(PAPERS)}, and all")
    return [PAPERS[name] for name in dict.fromkeys(names)]


def _list() -> None:
    from eval.tables.papers import PAPERS

    width = max(map(len, PAPERS), default=0)
    for name, paper in PAPERS.items():
        print(f"{name:<{width}}  {paper.source}: {paper.title}  [{', '.join(paper.models)}]")


def models_of(
    papers: "Sequence[Paper]", options: argparse.Namespace, scope: "Scope"
) -> "tuple[list[tuple[Paper, list[Path]]], Scope]":
    """Every table with the models that it is run for, and the scope without the words of --only that are models.

    Raises UserError if nothing of modelzoo/ is in a table and no model is named.
    """
    from dataclasses import replace

    from eval.tables.preview import place_of

    published = {name.lower() for paper in papers for name in paper.models}
    given = {path.name.lower() for path in options.model or ()}
    wanted = {word.lower() for word in scope.only if word.lower() in published | given}
    scope = replace(scope, only=tuple(word for word in scope.only if word.lower() not in wanted))
    chosen = []
    for paper in papers:
        places = list(options.model or map(place_of, paper.models))
        if wanted:
            places = [place for place in places if place.name.lower() in wanted]
        if not options.dry_run and not options.model:
            there = [place for place in places if (place / "config.json").is_file()]
            if not there and len(papers) == 1:
                names = ", ".join(place.name for place in places)
                raise UserError(
                    f"none of the models of {paper.name} is in modelzoo/ ({names}); "
                    "name a directory with --model DIR, or fetch one as modelzoo/README.md says"
                )
            places = there
        chosen.append((paper, places))
    if not any(places for _, places in chosen):
        raise UserError("no model is left to run; name a directory with --model DIR")
    return chosen, scope


def asked_of(chosen: "Sequence[tuple[Paper, list[Path]]]", scope: "Scope") -> "list[Run]":
    """All runs of all tables, each once."""
    from eval.tables.asked import cells_of, runs_of

    return runs_of([cell for paper, models in chosen for model in models for cell in cells_of(paper, model, scope)])


def _nothing(chosen: "Sequence[tuple[Paper, list[Path]]]", scope: "Scope") -> str:
    """Why no run is left, with the words that --only takes of these tables."""
    from eval.tables.asked import words_of

    known: dict[str, None] = {}
    for paper, _ in chosen:
        known |= dict.fromkeys(word for kind in words_of(paper, paper.measures) for word in sorted(kind))
    names = ", ".join(paper.name for paper, _ in chosen)
    if not scope.only:
        return f"{names}: nothing is left to run; tables of judged answers need --judge-model"
    return f"--only {' '.join(scope.only)} leaves nothing of {names}; known are models and {', '.join(known)}"


def texts_of(asked: "Sequence[Run]", scope: "Scope") -> list[str]:
    """The corpora that methods calibrate on."""
    from corpora.catalog import model_defaults

    if "--calibration" in scope.calibration:
        return [scope.calibration[scope.calibration.index("--calibration") + 1]]
    found: list[str] = []
    for run in asked:
        if run.program != "quantization" or model_defaults(run.model.name).default_calibration is not None:
            continue
        if "--calibration" in run.words:
            found.append(run.words[run.words.index("--calibration") + 1])
        else:
            from quantization.named import RECIPES

            recipe = RECIPES[run.words[run.words.index("--recipe") + 1]].recipe
            found += [recipe.calibration.corpus] if recipe.calibrates else []
    return found


def _print(chosen: "Sequence[tuple[Paper, list[Path]]]", scope: "Scope", style: str) -> None:
    """Every table, ours beside theirs."""
    from eval.tables.compare import filled, paper_table
    from eval.tables.render import render

    left_out: list[str] = []
    tables = [
        table
        for paper, models in chosen
        for model in models
        for table in paper_table(paper, filled(paper, model, scope, left_out))
    ]
    print(render(tables, style), end="")
    for line in left_out:
        print(line, file=sys.stderr)


def _tell(outcome: "Outcome", seconds: float) -> None:
    """What was run, on stderr: stdout has the table."""
    print(
        f"{len(outcome.made)} runs made, {len(outcome.finished)} were finished, {len(outcome.failed)} failed, "
        f"{len(outcome.left_out)} left out, {seconds:.0f} s",
        file=sys.stderr,
    )
    for kind, failures in (("failed", outcome.failed), ("left out", outcome.left_out)):
        for failure in failures:
            print(f"{kind}: {failure.run.label}: {one_line(failure.said)}", file=sys.stderr)


class _Bar:
    """One line on stderr for the whole: N of M runs, what runs, elapsed, what is left. Where stderr is no terminal, a
    line for every call that has ended."""

    def __init__(self, asked: "Sequence[Run]", workers: "Sequence[Worker]"):
        from tqdm import tqdm

        from eval.tables.asked import calls_of
        from eval.tables.estimate import seconds_of, size_of
        from eval.tables.ledger import is_done

        self._live = sys.stderr.isatty()
        self._number, self._done = len(asked), 0
        self._started = time.perf_counter()
        sizes = {model: size_of(model) for model in {run.model for run in asked}}
        self._work: dict[str, float] = {}  # estimated seconds by the key of a run
        for call in calls_of(run for run in asked if not is_done(run)):
            size = sizes[call.first.model]
            seconds = 1.0 if size is None else seconds_of(call, size)
            self._work |= {run.key: seconds / len(call.runs) for run in call.runs}
        self._whole, self._left = sum(self._work.values()), sum(self._work.values())
        self._done = self._number - len(self._work)
        self._bar = tqdm(
            total=self._number, initial=self._done, disable=not self._live, dynamic_ncols=True, leave=False,
            bar_format="{n_fmt} of {total_fmt} runs  {elapsed}{desc}",
        )  # fmt: skip
        if not self._live:
            print(f"{self._done} of {self._number} runs are finished, {len(workers)} at a time", file=sys.stderr)

    def doing(self, calls: "Sequence[tuple[Call, str]]") -> None:
        """Several times a second: what runs now, each with the last line that it said."""
        if self._live:
            said = " | ".join(f"{_short(call.label)}: {one_line(last)[:60]}" for call, last in calls)
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
        self._ended([failure.run], f"failed: {failure.run.label}: {one_line(failure.said)}")

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
