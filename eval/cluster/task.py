"""One task on its node: what is printed first and last, and how it ends when Slurm wants the node back."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from types import FrameType

from corpora.errors import UserError, one_line
from corpora.machine import commit
from corpora.paths import outputs_dir, root
from corpora.writing import locked
from eval.cluster.states import Note, keep_note
from eval.cluster.tasks import Task, is_finished, read_tasks
from eval.execution import Failure, Watcher, Worker, execute
from eval.tables.asked import Call
from eval.tables.ledger import entry_of

__all__ = ["STOPPED", "run_task"]

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: goes on when it is called again
SEEN = 60  # seconds after which another node surely sees a new file: NFS keeps names for up to a minute
EVERY = 30  # seconds between two lines of a program's progress
PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "lm_eval")


def run_task(name: str, index: int, device: str = "auto") -> int:
    """Run a task of a submission as `reproduce` would, and say in status/ how far it is. Returns the exit code:

    0: the ledger has all its runs. 1: the program failed. 75: it was told to stop, and goes on when it is called again.
    128 + N: signal N ended the program. Raises UserError for a task that the list does not have.
    """
    tasks = read_tasks(name)
    if not 0 <= index < len(tasks):
        raise UserError(f"{name} has no task {index}; choose from 0 to {len(tasks) - 1}")
    task = tasks[index]
    note = _first_note()
    _print_head(name, task, device)
    watcher = _Log()
    try:
        with _told_to_stop():
            keep_note(name, index, note)
            code = _made(task, [tasks[other] for other in task.needs], device, watcher)
    except KeyboardInterrupt:
        code, watcher.said = STOPPED, "it was told to stop, and goes on when it is called again"
    state = {0: "done", STOPPED: "stopped"}.get(code, "failed")
    keep_note(name, index, {**note, "state": state, "said": watcher.said, "ended": _now()})
    for line in [f"{state}: {watcher.said}".rstrip(": "), *(_results(task) if code == 0 else [])]:
        print(line, flush=True)
    return code


def _made(task: Task, needs: Sequence[Task], device: str, watcher: "_Log") -> int:
    """Call the program, alone among all that would make the same. Returns the exit code."""
    with ExitStack() as stack:
        for key in sorted(run.key for run in task.call.runs):  # in one order, so that no two wait for each other
            stack.enter_context(locked(outputs_dir() / "cluster" / "running" / key))
        if is_finished(task):
            watcher.said = "it was finished before"
            return 0
        if lacking := _unfinished(needs):
            watcher.said = f"it needs task {lacking[0].index}, which is not done"
            return 1
        outcome = execute([task.call], [Worker(device)], watcher=watcher)
    if not outcome.failed:
        return 0
    return max(128 + failure.signal if failure.signal else 1 for failure in outcome.failed)


def _unfinished(needs: Sequence[Task]) -> list[Task]:
    """The tasks that the ledger does not have. Slurm starts a task right after those that it needs, maybe on a node
    that does not see their entries yet: there it looks again until they must be seen."""
    until = time.monotonic() + (SEEN if _job() else 0)
    while (left := [need for need in needs if not is_finished(need)]) and time.monotonic() < until:
        time.sleep(1)
    return left


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """Let USR1 and TERM raise KeyboardInterrupt, once: the program is then interrupted, and ends cleanly."""

    def stop(number: int, frame: FrameType | None) -> None:
        for ignored in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(ignored, signal.SIG_IGN)
        raise KeyboardInterrupt

    # A shell lets what it starts in the background ignore Ctrl-C, and so would the program.
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    before |= {number: signal.signal(number, stop) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Log(Watcher):
    """The program's progress as lines of a log: the newest, not more often than every half minute. said: why it
    ended."""

    def __init__(self) -> None:
        self.said = ""
        self._last, self._at = "", time.monotonic()

    def doing(self, calls: Sequence[tuple[Call, str]]) -> None:
        """Several times a second: what runs now, each with the last line that it said."""
        for _, line in calls:
            if line != self._last and time.monotonic() - self._at > EVERY:
                self._last, self._at = line, time.monotonic()
                print(one_line(line), flush=True)

    def made(self, call: Call, seconds: float) -> None:
        """A call has ended well."""
        print(f"{seconds:.1f} s: {call.label}", flush=True)

    def failed(self, failure: Failure) -> None:
        """A run has failed."""
        self.said = one_line(failure.said)
        print(f"failed: {failure.run.label}: {self.said}", flush=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _job() -> str:
    """This task as Slurm calls it; empty where it is called by hand."""
    array, number = (os.environ.get(f"SLURM_ARRAY_{part}_ID", "") for part in ("JOB", "TASK"))
    return f"{array}_{number}" if array else ""


def _first_note() -> Note:
    return {"state": "running", "job": _job(), "host": socket.gethostname(), "pid": os.getpid(), "started": _now(),
            "said": ""}  # fmt: skip


def _print_head(name: str, task: Task, device: str) -> None:
    """What a reader of the log must know first."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    for what, said in (
        ("command", shlex.join(Worker(device).command(task.call))),
        ("commit", commit()),
        ("versions", f"python {sys.version.split()[0]}, {', '.join(map(_version, PACKAGES))}"),
        ("gpu", _gpu()),
        ("runs", " ".join(run.key for run in task.call.runs)),
        (
            "task",
            f"{task.index} of {name}, job {_job() or 'none'} on {socket.gethostname()}, queued again {restarts} times",
        ),
    ):
        print(f"{what}: {one_line(said)}", flush=True)


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def _gpu() -> str:
    """Name, memory and driver of the GPUs; torch would take seconds to say it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    if shutil.which("nvidia-smi") is None:
        return f"no driver{seen}"
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False).stdout
    except subprocess.TimeoutExpired:
        said = "nvidia-smi does not answer"
    return f"{'; '.join(said.split(chr(10))).strip('; ')}{seen}"


def _results(task: Task) -> list[str]:
    """Where the results lie, one a line."""
    entries = [entry for run in task.call.runs if (entry := entry_of(run)) is not None]
    return [
        str(outputs_dir() / "runs" / entry["record"] if "record" in entry else root() / entry["made"])
        for entry in entries
    ]
