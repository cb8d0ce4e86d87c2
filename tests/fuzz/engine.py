"""One call of a program in this process, and what is wrong with how it ended.

A world is a directory that holds all that a call reads; $INTACTKV_ROOT and the working directory point to it. It stands
several directories deep, so that a path like ../../x, written to, lands where it is seen.
"""

import contextlib
import io
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from common import tree

from corpora.errors import run_program
from fuzz.damage import DAMAGES

__all__ = ["FAULTS", "Call", "Case", "Outcome", "Program", "Scratch", "call", "judge"]

CHECKOUT = Path(__file__).resolve().parents[2]
SECONDS = 10  # a call that takes a twentieth of a second when all is well
# What can be wrong, the worst first.
FAULTS = ("traceback", "hang", "silent", "exit code", "lines", "control", "leftover", "changed")
BAR = re.compile(r"(?!error:).*(\d%\||\[\d\d:\d\d[<,])")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# What any call may leave: tokens that were cached.
ALLOWED = re.compile(r"^outputs(/cache(/tokens(/[0-9a-f]+\.safetensors)?)?)?$")


class Hang(BaseException):
    """The time is over; no `except Exception` of a program stops it."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended. code: None for a traceback or a hang. log: lines of progress. frame: the deepest frame of ours
    in a traceback."""

    code: int | None
    out: str
    err: str
    log: str
    fault: str | None = None
    frame: str = ""


@dataclass(frozen=True)
class Program:
    """A call and what it computes. words: the command line, its package first. figures: of a finished call, from its
    output and the world; equal figures are the same result. answers: exit codes of a call that has done its work."""

    name: str
    words: tuple[str, ...]
    figures: Callable[[Outcome, Path], Any]
    answers: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Case:
    """One damage of one file under one program; the name says it all."""

    kind: str
    program: str
    file: str
    damage: str
    variant: int

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.program}:{self.file}:{self.damage}:{self.variant}"

    @classmethod
    def named(cls, name: str) -> "Case":
        kind, program, rest = name.split(":", 2)
        file, damage, variant = rest.rsplit(":", 2)
        return cls(kind, program, file, damage, int(variant))


@dataclass(frozen=True)
class Call:
    """A case and how it went. done: what the damage was. fault: one of FAULTS, None if all is well. told: of what."""

    name: str
    done: str
    fault: str | None
    told: str
    outcome: Outcome = field(repr=False)


class Scratch:
    """Worlds in a directory of their own: templates that are built once, and a copy of one for every call."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.count = 0
        self._templates: dict[str, Path] = {}

    def template(self, name: str, build: Callable[[Path, "Scratch"], None]) -> Path:
        """The finished world of that name, built when it is first asked for."""
        if name not in self._templates:
            path = self.directory / "templates" / name / "a" / "b" / "world"
            path.mkdir(parents=True)
            with _within(path):
                build(path, self)
            self._templates[name] = path
        return self._templates[name]

    @contextlib.contextmanager
    def copy(self, template: Path) -> Iterator[Path]:
        """A copy of a world, for one call."""
        self.count += 1
        top = self.directory / "calls" / str(self.count)
        world = top / "a" / "b" / "world"
        shutil.copytree(template, world, symlinks=True)
        try:
            yield world
        finally:
            shutil.rmtree(top, ignore_errors=True)


@contextlib.contextmanager
def scratch() -> Iterator[Scratch]:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        yield Scratch(Path(directory))


@contextlib.contextmanager
def _within(world: Path) -> Iterator[None]:
    """Work in a world, and leave this process as it was."""
    before, root = Path.cwd(), os.environ.get("INTACTKV_ROOT")
    os.chdir(world)
    os.environ["INTACTKV_ROOT"] = str(world)
    loggers = {None: logging.getLogger()} | {n: x for n, x in logging.root.manager.loggerDict.items() if "." not in n}
    kept = {name: (x.level, list(x.handlers)) for name, x in loggers.items() if isinstance(x, logging.Logger)}
    logging.getLogger().handlers.clear()
    try:
        yield
    finally:
        for name, (level, handlers) in kept.items():
            logger = logging.getLogger(name)
            logger.setLevel(level)
            logger.handlers[:] = handlers
        os.chdir(before)
        if root is None:
            os.environ.pop("INTACTKV_ROOT", None)
        else:
            os.environ["INTACTKV_ROOT"] = root


@contextlib.contextmanager
def _logged(stream: io.StringIO, log: io.StringIO) -> Iterator[None]:
    """Log lines of progress into `log`, as they are no complaint; warnings into a call's stderr, also those of
    transformers, whose handler keeps the stderr that it saw first."""
    root, progress, warnings = logging.getLogger(), logging.StreamHandler(log), logging.StreamHandler(stream)
    warnings.setLevel(logging.WARNING)
    progress.addFilter(lambda record: record.levelno < logging.WARNING)
    root.setLevel(logging.INFO)
    root.handlers[:] = [progress, warnings]
    handlers = [x for x in logging.getLogger("transformers").handlers if isinstance(x, logging.StreamHandler)]
    earlier = [(handler, handler.setStream(stream)) for handler in handlers]
    try:
        yield
    finally:
        for handler, before in earlier:
            if before is not None:
                handler.setStream(before)


# Who opens a pipe waits for ever, in a library's code even where no signal is heard: another process is its other end.
OTHER_END = """
import os, select, stat, sys
while not select.select([0], [], [], 0.02)[0]:
    try:
        end = os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK)
        if stat.S_ISFIFO(os.fstat(end).st_mode):  # and not the file that took its place
            print("opened", flush=True)
        os.close(end)
    except OSError:
        pass
"""


@contextlib.contextmanager
def _watched(path: Path) -> Iterator[Callable[[], bool]]:
    """Watch a pipe, and let go whoever opened it. Yields a question for the end: did somebody?"""
    if not path.is_fifo():
        yield lambda: False
        return
    command = [sys.executable, "-S", "-E", "-c", OTHER_END, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as watcher:

        def opened() -> bool:
            return bool(watcher.communicate()[0])  # it ends when its input does

        try:
            yield opened
        finally:
            watcher.kill()


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `Hang` behind so many seconds of computing, or six times as many of waiting: the machine may be busy."""
    computed, started = time.process_time(), time.monotonic()

    def stop(*_: Any) -> None:
        if time.process_time() - computed > seconds or time.monotonic() - started > 6 * seconds:
            raise Hang

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds / 4, seconds / 4)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def call(world: Path, words: Sequence[str], seconds: float | None = None) -> Outcome:
    """Run a program in this process, in a world. words: its package, then its arguments."""
    out, err, log, argv = io.StringIO(), io.StringIO(), io.StringIO(), sys.argv
    code: int | None = 0
    fault, frame = None, ""
    with _within(world), _logged(err, log):
        sys.argv = ["program", *words[1:]]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _limited(seconds or SECONDS):
                run_program(import_module(f"{words[0]}.__main__").main)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        except Hang as error:
            code, fault, frame = None, "hang", _deepest(error)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            code, fault = None, "traceback"
            frame = f"{_deepest(error)}: {type(error).__name__}: {' '.join(str(error).split())[:160]!a}"
        finally:
            sys.argv = argv
    return Outcome(code, out.getvalue(), err.getvalue(), log.getvalue(), fault, frame)


def _deepest(error: BaseException) -> str:
    """The deepest frame of the project's own code in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.is_relative_to(CHECKOUT) and path.relative_to(CHECKOUT).parts[0] not in ("tests", ".venv"):
            return f"{path.relative_to(CHECKOUT)}:{frame.lineno} {frame.name}"
    return f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].name}"


def said(err: str) -> list[str]:
    """The lines of stderr that are no progress bar."""
    lines = re.split(r"[\n\r]", err)
    return [line for line in lines if line.strip() and not BAR.match(line)]


def judge(
    outcome: Outcome,
    before: dict[str, str],
    after: dict[str, str],
    same: Callable[[], bool],
    rewritten: re.Pattern[str] | None = None,
) -> tuple[str | None, str]:
    """What is wrong with how a call ended, and the details.

    before, after: the tree around the world. same: whether the figures of a finished call are right. rewritten: files
    that the program may write, whatever becomes of the call.
    """
    if outcome.fault is not None:
        return outcome.fault, outcome.frame
    if outcome.code not in (0, 2):
        return "exit code", f"exit code {outcome.code}: {outcome.err[-300:]!a}"
    inside = {name.removeprefix("a/b/world/"): name for name in sorted(before.keys() | after.keys())}
    names = {short for short, name in inside.items() if name in before}
    touched = [
        short
        for short, name in inside.items()
        if before.get(name) != after.get(name) and not (rewritten and rewritten.search(short))
    ]
    news = [short for short in touched if short not in names and not ALLOWED.search(short)]
    changed = [short for short in touched if short in names]
    if found := CONTROL.search("\n".join([*said(outcome.err), outcome.log, outcome.out])):
        return "control", f"raw {found.group()!a} in {(outcome.log + outcome.err + outcome.out)[-600:]!a}"
    if outcome.code == 0:
        outside = [name for name in after if name not in before and not f"{name}/".startswith(("a/b/world/", "a/"))]
        if outside:
            return "leftover", f"written outside: {', '.join(outside)}"
        if changed:
            return "changed", ", ".join(changed)
        try:
            equal = same()
        except Exception as error:
            return "silent", f"exit 0 without figures: {type(error).__name__} {error}"[:300]
        return (None, "") if equal else ("silent", f"other figures; stderr {said(outcome.err)[-2:]!a}")
    lines = said(outcome.err)
    if len(lines) != 1 or not lines[0].startswith("error:"):
        return "lines", f"{len(lines)} lines: {outcome.err[-600:]!a}"
    if news:
        return "leftover", ", ".join(news[:6])
    if changed:
        return "changed", ", ".join(changed)
    return None, ""


def damaged(
    scratch: Scratch,
    case: Case,
    template: Path,
    program: Program,
    expected: Any,
    *,
    own: bool,
    rewritten: re.Pattern[str] | None,
    without: Callable[[Outcome, str], bool] | None,
    keep: Path | None = None,
) -> Call:
    """Damage a file of a copied world, call the program and judge. Raises Inapplicable.

    expected: the control's figures. own: a file that carries a sum, so no damage may pass. without: whether a finished
    call rightly went without the file.
    """
    with scratch.copy(template) as world:
        path = world / case.file
        others = [other for other in sorted(world.rglob("*")) if other.is_file() and not other.is_symlink()]
        rng = random.Random(case.name)
        done, broken = DAMAGES[case.damage].work(path, rng, others)
        top = world.parents[2]
        before = tree(top)
        if keep is not None:
            shutil.copytree(world, keep, symlinks=True)
        with _watched(path) as opened:
            outcome = call(world, program.words)
            waited = opened()
        if outcome.code in program.answers:
            outcome = replace(outcome, code=0)
        after = tree(top)

        def same() -> bool:
            if program.figures(outcome, world) == expected:
                return True
            if without is not None and without(outcome, case.file):
                return True
            return not (own or broken)

        fault, told = judge(outcome, before, after, same, rewritten)
        if waited:
            fault, told = "hang", f"opened the pipe and waited for its other end; then {fault}: {told}"
        return Call(case.name, done, fault, told, outcome)
