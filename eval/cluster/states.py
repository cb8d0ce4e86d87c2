"""How far the tasks of a submission are: the ledger first, then the queue, then what the tasks say of themselves.

done         the ledger has all its runs
pending      it waits in the queue        requeued   the same, and it ran before
running      it runs                      failed     it has ended, and the ledger lacks a run; `retry` takes it
cancelled    `cancel` took it out         open       it was never submitted
unknown      squeue does not answer
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import one_line
from corpora.json_files import read_json, with_sum, without_sum, write_json
from eval.cluster.slurm import Queued
from eval.cluster.tasks import Task, folder_of, is_finished

__all__ = [
    "Job",
    "Note",
    "State",
    "job_of",
    "keep_note",
    "last_line",
    "log_of",
    "note_of",
    "read_jobs",
    "states_of",
    "write_jobs",
]

TAIL = 4096  # bytes of a log that hold its last line
MEND = "delete the file; what is finished stays, and `submit` goes on"


class Job(TypedDict):
    """An array that was submitted: tasks of the list, of which task `first` is its number 0."""

    job: str
    array: int
    first: int
    tasks: list[int]
    submitted: str
    cancelled: NotRequired[bool]


class Note(TypedDict):
    """What a task says of itself. state: running, done, failed, or stopped (it goes on later)."""

    state: str
    job: str
    host: str
    pid: int
    started: str
    said: str
    ended: NotRequired[str]


class _Jobs(TypedDict):
    jobs: list[Job]
    sha256: str


class _Note(Note):
    sha256: str


@dataclass(frozen=True)
class State:
    """How far a task is. word: of the table above. why: more of it. job: as Slurm calls it; empty: never submitted."""

    task: Task
    word: str
    why: str = ""
    job: str = ""


def read_jobs(name: str) -> list[Job]:
    """What was submitted, the oldest first. Raises UserError if the file is damaged or missing."""
    path = folder_of(name) / "jobs.json"
    found: _Jobs = read_json(path, "the list of jobs", _Jobs, mend=MEND)
    without_sum(found, f"the list of jobs {path}", mend=MEND)
    return found["jobs"]


def write_jobs(name: str, jobs: Sequence[Job]) -> None:
    """Keep what was submitted."""
    write_json(folder_of(name) / "jobs.json", with_sum({"jobs": list(jobs)}))


def job_of(task: Task, jobs: Sequence[Job]) -> tuple[str, Job] | None:
    """The newest job of a task, and the array that it is of."""
    for job in reversed(jobs):
        if task.index in job["tasks"]:
            return f"{job['job']}_{task.index - job['first']}", job
    return None


def log_of(name: str, task: Task, job: str) -> Path:
    """What a task printed, in every run of one job; the name that the batch script gives."""
    return folder_of(name) / "logs" / f"{name}.{task.array:02}_{job}.out"


def last_line(log: Path) -> str:
    """The last line of a log that says something; empty if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
    except OSError:
        return ""
    return one_line(next((line for line in reversed(lines) if line.strip()), ""))


def _note_file(name: str, index: int) -> Path:
    return folder_of(name) / "status" / f"{index}.json"


def keep_note(name: str, index: int, note: Note) -> None:
    """Say how far a task is."""
    write_json(_note_file(name, index), with_sum(note))


def note_of(name: str, index: int) -> Note | None:
    """What a task said last; None if it never ran."""
    path = _note_file(name, index)
    if not os.path.lexists(path):
        return None
    found: _Note = read_json(path, "the status of a task", _Note, mend=MEND)
    without_sum(found, f"the status of a task {path}", mend=MEND)
    return found


def states_of(
    name: str, tasks: Sequence[Task], jobs: Sequence[Job], queue: Mapping[str, Queued] | None, ended: Mapping[str, str]
) -> list[State]:
    """The state of every task. queue: None where squeue does not answer. ended: sacct's words, where it answers."""
    found: list[State] = []
    for task in tasks:  # those that it needs have smaller numbers
        at = job_of(task, jobs)
        if is_finished(task):
            state = State(task, "done", "", at[0] if at else "")
        elif at is None:
            state = State(task, "open")
        else:
            broken = [other for other in task.needs if found[other].word in ("failed", "cancelled")]
            state = _submitted(task, *at, note_of(name, task.index), queue, ended, broken)
        found.append(state)
    return found


def _submitted(
    task: Task, job: str, array: Job, note: Note | None, queue: Mapping[str, Queued] | None, ended: Mapping[str, str],
    broken: Sequence[int],
) -> State:  # fmt: skip
    """The state of a task that was submitted and is not done."""
    note = note if note is not None and note["job"] == job else None  # of the job before says nothing of this one
    if queue is not None and job in queue:
        queued = queue[job]
        if not queued.waits:
            return State(task, "running", note["host"] if note else queued.state.lower(), job)
        return State(task, "requeued" if note else "pending", queued.reason, job)
    if note is not None and note["state"] == "failed":
        return State(task, "failed", note["said"], job)
    if queue is None:
        return State(task, "unknown", f"squeue does not answer; it said {note['state']!r} last" if note else "", job)
    if array.get("cancelled"):
        return State(task, "cancelled", "", job)
    if broken:
        return State(task, "failed", f"it needs task {broken[0]}, which failed", job)
    if word := ended.get(job):
        return State(task, "failed", f"Slurm says {word}", job)
    gone = "it left the queue without a word (killed, node gone, out of memory, time limit)"
    if note is not None and note["state"] == "stopped":
        gone = "it was told to stop and did not come back (too often, or with its node)"
    return State(task, "failed", f"{gone}; see its log", job)
