"""python -m eval cluster: submit the runs of published tables to Slurm, look at them, cancel them, submit again what
failed."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from corpora import values
from corpora.errors import Parser, UserError
from eval.programs.asked import add_asked, asked_for, words_of

if TYPE_CHECKING:
    from eval.cluster.site import Site
    from eval.cluster.states import State
    from eval.cluster.submitting import Part
    from eval.cluster.tasks import Task

__all__ = ["add", "run"]

EXAMPLES = """\
examples:
  python -m eval cluster submit intactkv-1 --model modelzoo/llama-2/llama-2-7b --dry-run
  python -m eval cluster submit intactkv-1 intactkv-5 --model modelzoo/llama-2/llama-2-7b --at-once 8
  python -m eval cluster status
  python -m eval cluster retry NAME --time 8:00:00 --mem 120G
"""


def add(commands: Any) -> None:
    """Declare the subcommand, its actions and their options."""
    cluster = commands.add_parser(
        "cluster",
        help="the runs of published tables as Slurm jobs",
        description="The runs of `python -m eval reproduce` as Slurm arrays. What your cluster wants stands in "
        "cluster.env (scripts/cluster/cluster.env.example explains it); all that is submitted lies in "
        "outputs/cluster/NAME/.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = cluster.add_subparsers(dest="action", required=True, parser_class=Parser)
    submit = actions.add_parser(
        "submit", help="submit what is left of tables",
        description="Submits what is not finished and not in the queue yet; the same line again submits nothing twice.",
    )  # fmt: skip
    add_asked(submit)
    submit.add_argument(
        "--name", type=values.plain, metavar="NAME", help="of the submission (default: tables and models)"
    )
    submit.add_argument("--dry-run", action="store_true", help="write the scripts, print the plan, submit nothing")
    _add_limits(submit)
    status = actions.add_parser("status", help="how far every task is", description="Every task, with the last line of "
                                "its log; without a name: every submission.")  # fmt: skip
    status.add_argument("name", nargs="?", type=values.plain, metavar="NAME", help="a submission")
    cancel = actions.add_parser("cancel", help="take a submission out of the queue", description="Ends all that "
                                "waits or runs of a submission; what is finished stays.")  # fmt: skip
    cancel.add_argument("name", type=values.plain, metavar="NAME", help="a submission")
    retry = actions.add_parser("retry", help="submit again what failed", description="Submits what failed or "
                               "vanished, and what could not start for it.")  # fmt: skip
    retry.add_argument("name", type=values.plain, metavar="NAME", help="a submission")
    _add_limits(retry)
    task = actions.add_parser(
        "run",
        help="run one task here, as a job does",
        description="What a job calls. It exits with 75 when it was told to stop, and goes on when it is called again.",
    )
    _add_device(task)
    task.add_argument("name", type=values.plain, metavar="NAME", help="a submission")
    task.add_argument("task", type=values.count(0), metavar="TASK", help="its number in tasks.jsonl")


def _add_device(parser: Any) -> None:
    parser.add_argument(
        "--device",
        type=values.device,
        default="auto",
        metavar="auto|cpu|cuda|cuda:all",
        help="where a task computes, of what Slurm lets it see (default: auto; cuda:all: one model over all its GPUs)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """What a site allows a task, and how many run at a time."""
    group = parser.add_argument_group("how it is queued")
    _add_device(group)
    group.add_argument(
        "--at-once",
        type=values.count(1, 100_000),
        metavar="K",
        help="at most so many tasks of an array run at a time (default: as many as the cluster lets)",
    )
    group.add_argument("--time", type=values.duration, metavar="TIME", help="a task may take (default: cluster.env's)")
    group.add_argument("--mem", type=values.memory, metavar="SIZE", help="a task may use (default: cluster.env's)")


def run(options: argparse.Namespace) -> None:
    """Do what the action says."""
    {"submit": _submit, "status": _status, "cancel": _cancel, "retry": _retry, "run": _run}[options.action](options)


def _run(options: argparse.Namespace) -> None:
    from eval.cluster.task import run_task

    sys.exit(run_task(options.name, options.task, options.device))


def _submit(options: argparse.Namespace) -> None:
    from eval.cluster.submitting import submit, write_scripts
    from eval.cluster.tasks import submission_name, tasks_of
    from eval.doctor.lacking import lacking, refuse_lacking
    from eval.tables.noted import note

    given = {path.absolute(): path for path in options.model or ()}  # a job need not start where this program did
    options.model = list(given) or None
    asked, chosen, _ = asked_for(options)
    tasks = tasks_of(asked)
    models = list(dict.fromkeys(path for _, paths in chosen for path in paths))
    name = _checked(options.name) or submission_name([paper.name for paper, _ in chosen], models, tasks)
    if options.dry_run:
        site = _site(options, missing=True)
        write_scripts(name, tasks, site, options.at_once, options.device)
        _print_plan(name, tasks, site, options.at_once)
        for line in lacking(asked):
            print(f"lacking: {line}", file=sys.stderr)
        return
    refuse_lacking([paper for paper, _ in chosen], asked)
    note([(paper, [given.get(path, path) for path in paths]) for paper, paths in chosen], words_of(options))
    parts = submit(name, tasks, _site(options), at_once=options.at_once, device=options.device)
    _tell(name, tasks, parts)


def _checked(name: str | None) -> str | None:
    """A name of the user's. Raises UserError for one that makes a path, or that Slurm would read as a pattern."""
    import re

    if name is not None and not re.fullmatch(r"\w[\w.-]{0,99}", name, re.ASCII):
        raise UserError(f"--name {values.shown(name)} is not allowed; use letters, digits, dots and dashes")
    return name


def _retry(options: argparse.Namespace) -> None:
    from eval.cluster.submitting import submit
    from eval.cluster.tasks import read_tasks

    tasks = read_tasks(_checked(options.name) or "")
    parts = submit(
        options.name, tasks, _site(options), at_once=options.at_once, device=options.device, failed_alone=True
    )
    _tell(options.name, tasks, parts)


def _cancel(options: argparse.Namespace) -> None:
    from eval.cluster.submitting import cancel

    ended = cancel(_checked(options.name) or "")
    print(f"{options.name}: {len(ended)} tasks cancelled; `submit` with the same words goes on")


def _site(options: argparse.Namespace, missing: bool = False) -> "Site":
    """The site's settings, with the limits of the options. missing: for a dry run there need be none."""
    from dataclasses import replace

    from eval.cluster.site import LIMITS, Site, read_site, site_file

    site = Site() if missing and not site_file().exists() else read_site()
    given = {LIMITS[name]: value for name in LIMITS if (value := getattr(options, name)) is not None}
    return replace(site, asked={**site.asked, **given})


def _print_plan(name: str, tasks: "Sequence[Task]", site: "Site", at_once: int | None) -> None:
    """What would be submitted, as the lines of a shell that do it."""
    from eval.cluster.site import EXAMPLE, site_file
    from eval.cluster.submitting import lines_of, parts_of, wanted

    parts = parts_of(tasks, wanted(tasks), {})
    if parts:
        print(*lines_of(name, tasks, parts, site, at_once), sep="\n")
    count = sum(len(part.tasks) for part in parts)
    print(f"{name}: {len(tasks)} tasks, {len(tasks) - count} need not run, {count} to submit; nothing was submitted")
    if not site_file().exists():
        print(f"{site_file()} is missing; copy {EXAMPLE} to it before you submit", file=sys.stderr)


def _tell(name: str, tasks: "Sequence[Task]", parts: "Sequence[Part]") -> None:
    """What was submitted."""
    submitted, elsewhere = sum(len(part.tasks) for part in parts), sum(len(part.elsewhere) for part in parts)
    print(
        f"{name}: {submitted} of {len(tasks)} tasks submitted, {elsewhere} wait or run already, "
        f"{len(tasks) - submitted - elsewhere} need not run; `python -m eval cluster status {name}` shows them"
    )


def _status(options: argparse.Namespace) -> None:
    from collections import Counter

    from eval.cluster.slurm import queue
    from eval.cluster.states import read_jobs
    from eval.cluster.submitting import look
    from eval.cluster.tasks import names, read_tasks

    wanted = [_checked(options.name) or ""] if options.name else [name for name in names() if read_jobs(name)]
    if not wanted:
        raise UserError("nothing was submitted yet; `python -m eval cluster submit TABLE` does it")
    lists, queued, silence = {name: read_tasks(name) for name in wanted}, None, ""
    try:
        queued = queue()
    except UserError as error:
        silence = f"what waits and runs is not known: {str(error).partition('; ')[0]}"
    found = {name: look(name, tasks, queued) for name, tasks in lists.items()}
    if silence:
        print(silence, file=sys.stderr)
    for name, states in found.items():
        if options.name:
            _print_states(name, states)
        counts = Counter(state.word for state in states)
        print(f"{name}: {', '.join(f'{count} {word}' for word, count in counts.items())}")


def _print_states(name: str, states: "Sequence[State]") -> None:
    """A line for every task."""
    from eval.cluster.states import last_line, log_of

    for state in states:
        said = last_line(log_of(name, state.task, state.job)) if state.job else ""
        more = "; ".join(part for part in (state.why, said) if part)
        print(
            f"{state.task.index:>4}  {state.word:<9}  {state.job:<10}  {_short(state.task.call.label)}"
            + f"  {more}" * bool(more)
        )


def _short(label: str, longest: int = 90) -> str:
    """A label whose middle is left out: the ends tell runs apart."""
    half = longest // 2
    return label if len(label) <= longest else f"{label[:half]}…{label[1 - half :]}"
