"""Runs of a table as processes: what others need first, as many at once as there are workers, each on its own GPU.

    waiting ──its needs are made──▶ a worker's process ──its --json──▶ the ledger

Every call is the program that a user would start: its own memory, its own peak, its own GPU. One that fails stops only
what needs it. Ctrl-C reaches every process; what is finished stays, and the same command goes on.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from corpora.errors import UserError, one_line
from corpora.paths import outputs_dir, root
from eval.tables.asked import Call, Run
from eval.tables.ledger import Entry, keep, open_runs, read_before
from eval.tables.stamps import Versions

__all__ = ["Failure", "Outcome", "Watcher", "Worker", "execute", "workers_of"]

ALL_GPUS = "cuda:all"
ONE_DEVICE = ("quantization", "calibrate", "train-prefix")  # they hold a block at a time, or train on one GPU
WITH_FORCE = ("ppl", "tasks", "needle", "mtbench", "chat", "latency")
FILE_ALONE = ("calibrate", "train-prefix")  # they leave the file of our naming, and no record
PATIENCE = 60  # seconds that an interrupted process gets to end cleanly
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
KEPT_LINES = 400  # of what a process says, for the log of one that fails


@dataclass(frozen=True)
class Worker:
    """Where one call at a time runs. device: the word of --device. visible: its GPU, as CUDA_VISIBLE_DEVICES spells it;
    empty: as it is. threads: of the CPU; 0: as it is. max_memory: with cuda:all, what a model may take of each GPU."""

    device: str = "auto"
    visible: str = ""
    threads: int = 0
    max_memory: int | None = None

    def command(self, call: Call, force: bool = False) -> list[str]:
        """The command line of a call here."""
        program = call.first.program
        device = "cuda" if self.device == ALL_GPUS and program in ONE_DEVICE else self.device
        more = [] if program in FILE_ALONE else ["--json"]
        if device == ALL_GPUS and self.max_memory is not None:
            more += ["--max-memory", f"{self.max_memory / 2**30:g}GiB"]
        return [*call.command(device), *more, *(["--force"] if force and program in WITH_FORCE else [])]

    def environment(self) -> dict[str, str]:
        """What its processes see."""
        own = {"CUDA_VISIBLE_DEVICES": self.visible} if self.visible else {}
        if self.threads and "OMP_NUM_THREADS" not in os.environ:
            own["OMP_NUM_THREADS"] = str(self.threads)
        return {**os.environ, **own}


def workers_of(device: str, count: int | None = None, max_memory: int | None = None) -> list[Worker]:
    """The workers of a machine: one for each visible GPU, or one on a CPU; `count` of them share the GPUs in turn.

    device: as --device has it; cuda:N is one GPU, cuda:all one model over all. Raises UserError for a GPU that is not
    there.
    """
    gpus = [] if device == "cpu" else _visible_gpus()
    if device == "cpu" or (device == "auto" and not gpus):
        shared = max(1, (os.cpu_count() or 1) // count) if count and count > 1 else 0
        return [Worker("cpu", threads=shared)] * (count or 1)
    if not gpus:
        raise UserError(f"--device {device}: this machine shows no CUDA GPUs; choose cpu")
    if device == ALL_GPUS:
        if count not in (None, 1):
            raise UserError(f"--device {ALL_GPUS} spreads one model over all GPUs; leave --workers out")
        return [Worker(ALL_GPUS, max_memory=max_memory)]
    if device.startswith("cuda:"):
        index = int(device.removeprefix("cuda:"))
        if index >= len(gpus):
            raise UserError(f"--device {device}: this machine shows {len(gpus)} CUDA GPUs; choose cpu or a lower index")
        gpus = [gpus[index]]
    return [Worker("cuda", gpus[i % len(gpus)]) for i in range(count or len(gpus))]


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    number = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:number] if named else [str(i) for i in range(number)]


@dataclass(frozen=True)
class Failure:
    """A run that failed, or that could not be made because another one did. said: why, in one line. signal: that
    ended its program."""

    run: Run
    said: str
    signal: int = 0


@dataclass
class Outcome:
    """What became of runs. made, finished: those made now, and those that were there."""

    made: list[Run] = field(default_factory=list)
    finished: list[Run] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    left_out: list[Failure] = field(default_factory=list)


class Watcher(Protocol):
    """Who is told while runs are made."""

    def doing(self, calls: Sequence[tuple[Call, str]]) -> None:
        """Several times a second: what runs now, each with the last line that it said."""

    def made(self, call: Call, seconds: float) -> None:
        """A call has ended well."""

    def failed(self, failure: Failure) -> None:
        """A run has failed, or is left out."""


def execute(
    calls: Sequence[Call],
    workers: Sequence[Worker],
    *,
    again: bool = False,
    force: bool = False,
    watcher: Watcher,
) -> Outcome:
    """Make what calls ask for and is not there yet; each as soon as what it needs is there.

    calls: in any order. again: ask every program, finished or not; it reads its own record back. force: have programs
    that write records measure anew. Returns what became of every run. KeyboardInterrupt ends the processes first.
    """
    outcome, open_calls = Outcome(), list[Call]()
    every = [run for call in calls for run in call.runs]
    wanted = {run.key for run in every} if again or force else open_runs(every)
    for call in calls:
        left = tuple(run for run in call.runs if run.key in wanted)
        outcome.finished += [run for run in call.runs if run not in left]
        if left:
            open_calls.append(Call(left))
    waiting = {run.key for call in open_calls for run in call.runs}  # or at work
    lost: set[str] = set()  # keys of runs that failed or were left out
    ahead: set[str] = set()  # what programs make on the way, while one is at it
    free, busy = list(workers), dict[Future[list[Entry]], tuple[Call, Worker, _Process]]()
    before: dict[str, Versions] = {}  # what a run read, by its key, as it was when its program began

    def fail(call: Call, said: str, to: list[Failure], number: int = 0) -> None:
        for run in call.runs:
            waiting.discard(run.key)
            lost.add(run.key)
            to.append(Failure(run, said, number))
            watcher.failed(to[-1])

    with _terminated_as_interrupted(), ThreadPoolExecutor(len(workers)) as threads:
        try:
            while open_calls or busy:
                for call in list(open_calls):
                    needed = [run for run in call.needs if run.key in waiting]
                    if broken := next((run for run in call.needs if run.key in lost), None):
                        open_calls.remove(call)
                        fail(call, f"it needs `{broken.label}`, which failed", outcome.left_out)
                    elif not needed and free and call.first.on_the_way not in ahead:
                        open_calls.remove(call)
                        if call.first.on_the_way:
                            ahead.add(call.first.on_the_way)
                        worker = free.pop(0)
                        before |= {run.key: read_before(run) for run in call.runs}
                        process = _Process(worker.command(call, force), worker.environment())
                        busy[threads.submit(_made, call, process)] = (call, worker, process)
                ended, _ = wait(busy, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in ended:
                    call, worker, process = busy.pop(future)
                    free.append(worker)
                    ahead.discard(call.first.on_the_way)
                    try:
                        entries = future.result()
                    except UserError as error:
                        if len(call.runs) > 1:  # one item may be the reason, and the others are asked alone
                            open_calls = [*(Call((run,)) for run in call.runs), *open_calls]
                        else:
                            fail(call, str(error), outcome.failed, getattr(error, "signal", 0))
                        continue
                    for run, entry in zip(call.runs, entries, strict=True):
                        keep(run, entry, before.pop(run.key))
                        waiting.discard(run.key)
                        outcome.made.append(run)
                    watcher.made(call, process.seconds)
                watcher.doing([(call, process.last) for call, _, process in busy.values()])
        except BaseException:
            _end([process for _, _, process in busy.values()])
            raise
    return outcome


_LIBC: ctypes.CDLL | None
try:
    _LIBC = ctypes.CDLL(None, use_errno=True)
    _LIBC.prctl  # noqa: B018  # only Linux has it
except (OSError, AttributeError):
    _LIBC = None


def _ends_with(parent: int) -> Callable[[], None]:
    """What a new process does first, so that Linux ends it once its parent is killed, which then can tell it nothing.

    It calls one function of C that was looked up before: between fork and exec little else is safe.
    """

    def tied() -> None:
        if _LIBC is not None:
            _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it was killed before
                os._exit(128 + signal.SIGTERM)

    return tied


class _Process:
    """A program that runs: its stdout, the last line of its stderr, and how it ended."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.command = command
        self.last = ""
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.started = time.perf_counter()
        self.seconds = 0.0
        # Of a group of its own, so that Ctrl-C reaches it once, from us.
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            process_group=0, preexec_fn=_ends_with(os.getpid()),
        )  # fmt: skip

    def ended(self) -> tuple[int, str]:
        """Wait for it: its exit code and its stdout."""
        listener = threading.Thread(target=self._listen, daemon=True)
        listener.start()
        assert self._process.stdout is not None
        out = self._process.stdout.read().decode(errors="replace")
        code = self._process.wait()
        listener.join(5)  # a grandchild may hold the pipe
        self.seconds = time.perf_counter() - self.started
        return code, out

    def _listen(self) -> None:
        assert self._process.stderr is not None
        rest = ""
        while chunk := os.read(self._process.stderr.fileno(), 65536):
            *whole, rest = re.split(r"[\r\n]+", rest + chunk.decode(errors="replace"))
            self.lines.extend(line for line in whole if line.strip())
            self.last = next((line for line in (rest, *reversed(whole)) if line.strip()), self.last).strip()
        if rest.strip():
            self.lines.append(rest)

    def signal(self, number: int) -> None:
        """Tell it, if it still runs."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Whether it ends in time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


class _Ended(UserError):
    """A program failed. signal: that ended it."""

    def __init__(self, said: str, number: int):
        super().__init__(said)
        self.signal = number


def _made(call: Call, process: _Process) -> list[Entry]:
    """What a call leaves behind, an entry for every run. Raises UserError with the one line of a program that fails."""
    code, out = process.ended()
    if code != 0:
        raise _Ended(_why(call, process, code), max(0, -code))
    common: dict[str, Any] = {
        "program": call.first.program, "model": call.first.model.name, "command": process.command,
        "seconds": round(process.seconds / len(call.runs), 2), "finished": datetime.now(UTC).isoformat(),
    }  # fmt: skip
    if call.first.program in FILE_ALONE:
        found: list[dict[str, Any]] = [{}]
    else:
        told = _json_in(out)
        found = told if isinstance(told, list) else [told]
    if len(found) != len(call.runs):
        raise UserError(
            f"`{call.label}` left {len(found)} records for {len(call.runs)} runs; name tasks that have one record each"
        )
    return [Entry(**common, item=run.item, **_left(run, record)) for run, record in zip(call.runs, found, strict=True)]  # type: ignore[typeddict-item]


def _left(run: Run, told: dict[str, Any]) -> dict[str, str]:
    """Where a run left its record, and the file or directory that others read."""
    left: dict[str, str] = {}
    if "path" in told and "task" in told:
        left["record"] = Path(told["path"]).name
    made = told.get("directory") if run.program == "quantization" else run.file
    if made is not None:
        left["made"] = os.path.relpath(made, root())
    return left


def _json_in(out: str) -> Any:
    """The record on a stdout, behind whatever a library printed in front of it, such as a line with [a date]."""
    for start in re.finditer(r"^[\[{]", out, re.MULTILINE):
        try:
            return json.loads(out[start.start() :])
        except ValueError:
            continue
    raise UserError(f"no record was printed, but {one_line(out[:100])!r}")


def _why(call: Call, process: _Process, code: int) -> str:
    """Why a program failed: its own line for a user's mistake; else its last one, and where all of it can be read."""
    said = [line for line in process.lines if line.startswith("error: ")]
    if code == 2 and said:
        return said[-1].removeprefix("error: ")
    if code in (130, -signal.SIGINT, -signal.SIGTERM):
        return "it was interrupted"
    if code == -signal.SIGKILL:
        return "it was killed; the memory may have been short"
    log = outputs_dir() / "asked" / f"{call.first.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("\n".join([" ".join(process.command), *process.lines, ""]), encoding="utf-8")
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{ended}: {process.lines[-1].strip() if process.lines else 'it said nothing'} (all of it: {log})"


def _end(processes: Sequence[_Process]) -> None:
    """Interrupt processes, wait for their clean end, and end those that do not; a second Ctrl-C ends them at once."""
    steps: list[tuple[int, float]] = [(signal.SIGINT, PATIENCE), (signal.SIGTERM, 5), (signal.SIGKILL, 5)]
    for number, seconds in steps:
        until = time.monotonic() + seconds
        for process in processes:
            process.signal(number)
        try:
            if all(process.wait(max(0.0, until - time.monotonic())) for process in processes):
                return
        except KeyboardInterrupt:
            continue


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the processes, too, as Ctrl-C does; under nohup SIGHUP stays ignored."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before: dict[signal.Signals, Callable[..., Any] | int | None] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
