"""Submit what is left of a list, once: what is finished, or waits or runs as a part of any submission, is left out.

An array waits for what its tasks need (afterok), and for nothing else. Slurm removes tasks that can never start,
because an artefact failed (--kill-on-invalid-dep=yes in the scripts), and `status` says why.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from corpora.errors import UserError, one_line
from corpora.paths import outputs_dir
from corpora.writing import locked, write_beside
from eval.cluster import slurm
from eval.cluster.scripts import indices, script_of
from eval.cluster.site import Site
from eval.cluster.slurm import Queued
from eval.cluster.states import Job, State, job_of, read_jobs, states_of, write_jobs
from eval.cluster.tasks import Array, Task, arrays_of, folder_of, is_finished, names, read_tasks, write_tasks

__all__ = ["Part", "cancel", "lines_of", "look", "parts_of", "submit", "write_scripts"]


@dataclass(frozen=True)
class Part:
    """What is left of an array. tasks: to submit. elsewhere: those whose runs another submission has at work."""

    array: Array
    tasks: tuple[Task, ...]
    elsewhere: tuple[Task, ...] = ()


def write_scripts(name: str, tasks: Sequence[Task], site: Site, at_once: int | None, device: str) -> None:
    """Write the list and the batch scripts."""
    if "%" in str(outputs_dir()):
        raise UserError(f"{outputs_dir()} holds a %, which Slurm replaces in the names of logs; use a root without it")
    if not os.path.lexists(folder_of(name) / "jobs.json"):
        write_jobs(name, [])  # in front of the list, with which others see the submission
    write_tasks(name, tasks)
    (folder_of(name) / "logs").mkdir(exist_ok=True)
    for array in arrays_of(tasks):
        with write_beside(folder_of(name) / array.file_name) as beside:
            beside.write_text(script_of(name, array, site, at_once, device), encoding="utf-8")


def wanted(tasks: Sequence[Task]) -> set[int]:
    """The tasks that are left: those that nobody needs and are not finished, and what they need that is not there."""
    needed = {other for task in tasks for other in task.needs}
    open_tasks = {task.index for task in tasks if not is_finished(task)}
    found = open_tasks - needed
    for task in reversed(tasks):  # what a task needs has a smaller number
        if task.index in found:
            found |= open_tasks & set(task.needs)
    return found


def at_work(queue: Mapping[str, Queued]) -> dict[str, str]:
    """Runs that wait or run as a part of any submission: key of the run → its task, as Slurm calls it."""
    found: dict[str, str] = {}
    arrays = {job.partition("_")[0] for job in queue}
    for name in names():
        jobs = read_jobs(name)
        if any(array["job"] in arrays for array in jobs):
            for task in read_tasks(name):
                at = job_of(task, jobs)
                if at is not None and at[0] in queue:
                    found |= {run.key: at[0] for run in task.call.runs}
    return found


def parts_of(tasks: Sequence[Task], chosen: set[int], busy: Mapping[str, str]) -> list[Part]:
    """What of each array is to be submitted. chosen: numbers of tasks. busy: runs that are at work."""
    parts = []
    for array in arrays_of(tasks):
        mine = [task for task in array.tasks if task.index in chosen]
        elsewhere = tuple(task for task in mine if all(run.key in busy for run in task.call.runs))
        parts.append(Part(array, tuple(task for task in mine if task not in elsewhere), elsewhere))
    return [part for part in parts if part.tasks or part.elsewhere]


def submit(
    name: str,
    tasks: Sequence[Task],
    site: Site,
    *,
    at_once: int | None = None,
    device: str = "auto",
    failed_alone: bool = False,
) -> list[Part]:
    """Submit what is left of a list. at_once: of one array. device: as --device has it. failed_alone: only what failed,
    and what could not start for it. Returns what was submitted, and what is at work elsewhere.

    Raises UserError if Slurm refuses; what was submitted until then stays.
    """
    with locked(outputs_dir() / "cluster" / "submitting"):  # two submissions at once would both see an empty queue
        write_scripts(name, tasks, site, at_once, device)
        queue = slurm.queue()
        busy = at_work(queue)
        chosen = wanted(tasks)
        if failed_alone:
            states = look(name, tasks, queue)
            chosen &= {state.task.index for state in states if state.word == "failed"}
        jobs = read_jobs(name)
        parts = parts_of(tasks, chosen, busy)
        for part in parts:
            if part.tasks:
                jobs.append(_submitted(name, part, tasks, jobs, busy, site, at_once))
                write_jobs(name, jobs)
                busy |= {run.key: job for task in part.tasks if (job := _job(task, jobs)) for run in task.call.runs}
    return parts


def _job(task: Task, jobs: Sequence[Job]) -> str:
    at = job_of(task, jobs)
    return at[0] if at else ""


def _submitted(
    name: str, part: Part, tasks: Sequence[Task], jobs: Sequence[Job], busy: Mapping[str, str], site: Site,
    at_once: int | None,
) -> Job:  # fmt: skip
    """Submit a part of an array behind what makes its artefacts."""
    needs = [run.key for other in part.tasks[0].needs for run in tasks[other].call.runs]
    after = list(dict.fromkeys(busy[key] for key in needs if key in busy))
    options = _options(part, after, site, at_once)
    job = slurm.submit(folder_of(name) / part.array.file_name, options, site.asked)
    return {
        "job": job, "array": part.array.number, "first": part.array.first,
        "tasks": [task.index for task in part.tasks], "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _options(part: Part, after: Sequence[str], site: Site, at_once: int | None) -> list[str]:
    """What sbatch is told beside the script. after: jobs that must end well first."""
    options = [f"--array={indices((task.index - part.array.first for task in part.tasks), at_once)}"]
    options += [f"--dependency=afterok:{':'.join(after)}"] * bool(after)
    return options + [f"--cpus-per-task={site.cpus}"] * bool(site.cpus)


def lines_of(name: str, tasks: Sequence[Task], parts: Sequence[Part], site: Site, at_once: int | None) -> list[str]:
    """The lines of a shell that submit parts, as `submit` does where nothing of them waits or runs yet."""
    asked = [shlex.join(["export", *(f"{key}={value}" for key, value in site.asked.items())])] * bool(site.asked)
    chosen = {task.index for part in parts for task in part.tasks}
    lines = [*asked, shlex.join(["cd", str(folder_of(name))])]
    for part in parts:
        needs = [tasks[other] for other in part.tasks[0].needs if other in chosen]
        first = {array.number: array.first for array in arrays_of(tasks)}
        after = [f"${{JOB{task.array:02}}}_{task.index - first[task.array]}" for task in needs]
        words = ["sbatch", "--parsable", *_options(part, after, site, at_once), part.array.file_name]
        count, label = len(part.tasks), one_line(part.tasks[0].call.label)
        lines.append(f"JOB{part.array.number:02}=$({' '.join(words)})  # {count} of {len(part.array.tasks)}: {label}")
    return lines


def look(name: str, tasks: Sequence[Task], queue: Mapping[str, Queued] | None) -> list[State]:
    """The state of every task of a submission. queue: None where squeue does not answer."""
    jobs = read_jobs(name)
    gone = [at[0] for task in tasks if (at := job_of(task, jobs)) and at[0] not in (queue or {})]
    return states_of(name, tasks, jobs, queue, slurm.ended(gone) if queue is not None else {})


def cancel(name: str) -> list[str]:
    """Take all tasks of a submission out of the queue, or end them; returns them as Slurm calls them."""
    tasks, jobs = read_tasks(name), read_jobs(name)
    queue = slurm.queue()
    mine = [job for task in tasks if (job := _job(task, jobs)) in queue]
    marked: list[Job] = [{**job, "cancelled": True} for job in jobs]
    write_jobs(name, marked)  # first, so that what ends now is known to be cancelled
    slurm.cancel(mine)
    return mine
