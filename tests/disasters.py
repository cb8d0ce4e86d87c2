"""Programs that are killed, starved of disk and locked out, each in a process of its own.

A warm process imports everything once and forks a child for each call. An audit hook in the child sees every change
that Python makes below a root, before it is made (safetensors' own writes lie between two of them), and strikes at the
chosen one: SIGKILL, SIGKILL with the file half written, or an error of the disk.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as pytest does, for `python -m tests.reliability`

from common import ROOT, error_line, tree

__all__ = ["Call", "Outcome", "Warm", "kind_of", "lasting", "refusal"]

# What another run of the same call may say otherwise: times, memory, and how often it was killed.
VOLATILE = {"started", "environment", "tstamp", "answer_id", "answers_sha256", "blocks_found", "answered_now"}
TIMED = re.compile(r"(seconds|memory|per_second|latency)")


@dataclass(frozen=True)
class Call:
    """One call of a program: a package, or Python code if it has a line end.

    strike: how ("kill", "half" or an errno's name), and at which change below the root, from 0. limit: of a file's
    size, in bytes. hooks: code to run first.
    """

    program: str
    arguments: tuple[str, ...] = ()
    root: str = ""
    strike: tuple[str, int] | None = None
    user: int | None = None
    umask: int | None = None
    limit: int | None = None
    hooks: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a call. status: exit code, or minus the signal that ended it. changes: below the root."""

    status: int
    out: str
    err: str
    changes: list[tuple[str, str]] = field(default_factory=list)


class Warm:
    """The process that forks: `with Warm() as warm: warm.run(Call(…))`."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "no-key",
                                    "no_proxy": "127.0.0.1", "PYTHONWARNINGS": "ignore"}  # fmt: skip
        self.process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def __enter__(self) -> "Warm":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(self, call: Call) -> Outcome:
        """One call, until its end."""
        return self.together([call])[0]

    def together(self, calls: Sequence[Call]) -> list[Outcome]:
        """Several calls at once, until the end of all."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([asdict(call) for call in calls]), file=self.process.stdin, flush=True)
        found = json.loads(self.process.stdout.readline())
        return [Outcome(**one | {"changes": [tuple(change) for change in one["changes"]]}) for one in found]


def refusal(outcome: Outcome) -> str:
    """The one line in which a program ends that could not do its work; fails for anything else."""
    assert outcome.status == 2, f"status {outcome.status}: {outcome.err[-3000:]}"
    return error_line(outcome.err)


def kind_of(change: tuple[str, str]) -> str:
    """What kind of change it is, for counts: "rename file", …"""
    event, path = change
    name = Path(path).name
    if event == "os.rename":
        return "hidden directory gone, not renamed" if name.endswith(".whole") else "written, in the hidden directory"
    if event == "shutil.rmtree":
        return "written, beside the hidden directory"
    if event == "os.rmdir":
        return "hidden directory empty"
    if event == "os.mkdir":
        hidden = name.endswith(".partial") and name.startswith(".")
        return "before the hidden directory" if hidden else "before a directory"
    if event == "fcntl.flock":
        return "before the lock"
    if event == "os.remove":
        return "before a file is removed"
    if event == "open":
        return "before the lock file" if name == "lock" or name.endswith(".lock") else "before the payload"
    return event


# Files ----------------------------------------------------------------------------------------------------------------


def lasting(root: Path) -> dict[str, str]:
    """Every file and directory below a root, but for the times in them."""
    return tree(root, _timeless)


def _timeless(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return re.sub(rb'\\"[a-z_]*(seconds|memory)[a-z_]*\\": *[0-9.e-]+', b"", content)
    if path.suffix not in (".json", ".jsonl") or not content:
        return content
    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    return json.dumps([_without_times(json.loads(line)) for line in lines if line.strip()]).encode()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        sums = {name for name in ("sha256", "sum") if isinstance(value.get(name), str)}  # of the times, too
        return {key: _without_times(inner) for key, inner in value.items()
                if key not in VOLATILE | sums and not TIMED.search(key)}  # fmt: skip
    return [_without_times(inner) for inner in value] if isinstance(value, list) else value


# In the warm process --------------------------------------------------------------------------------------------------

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree", "fcntl.flock")


class Strikes:
    """The audit hook of a child."""

    def __init__(self, root: str, strike: tuple[str, int] | None) -> None:
        self.root, self.strike = f"{root.rstrip('/')}/", strike
        self.changes: list[tuple[str, str]] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES and not (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        named = arguments[0]
        if event in ("os.remove", "os.rmdir") and isinstance(arguments[1], int) and arguments[1] >= 0:
            named = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), os.fsdecode(named))
        elif hasattr(named, "fileno") or isinstance(named, int):
            descriptor = named if isinstance(named, int) else named.fileno()
            try:
                named = os.readlink(f"/proc/self/fd/{descriptor}")
            except OSError:
                return
        path = os.path.abspath(os.fsdecode(named))
        if not path.startswith(self.root):
            return
        self.changes.append((event, path))
        if self.strike is None or len(self.changes) - 1 != self.strike[1]:
            return
        how = self.strike[0]
        if how == "half" and os.path.isfile(path):
            self.strike = None
            os.truncate(path, os.path.getsize(path) // 2)
        if how in ("kill", "half"):
            os.kill(os.getpid(), signal.SIGKILL)
        if how.startswith("E"):
            number = getattr(errno, how)
            raise OSError(number, os.strerror(number), path)


def _child(call: dict[str, Any], folder: Path) -> None:
    """Run one call; everything it says goes to files."""
    import resource
    import traceback

    for stream, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), descriptor)
    changes = os.open(folder / "changes", os.O_WRONLY | os.O_CREAT, 0o666)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    os.environ["INTACTKV_ROOT"] = call["root"]
    if call["umask"] is not None:
        os.umask(call["umask"])
    if call["user"] is not None:
        os.setgroups([])
        os.setgid(call["user"])
        os.setuid(call["user"])
    if call["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (call["limit"], call["limit"]))
    code = 0
    strikes = Strikes(call["root"], call["strike"])
    try:
        exec(call["hooks"], {})
        sys.addaudithook(strikes)
        sys.argv = ["program", *call["arguments"]]
        if "\n" in call["program"]:
            exec(call["program"], {"__name__": "call"})
        else:
            from corpora.errors import run_program

            run_program(_main_of(call["program"]))
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    strikes.strike, strikes.root = None, "no more/"
    try:
        sys.stdout.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2) if os.getuid() == 0 else None
        os.write(changes, json.dumps(strikes.changes).encode())
    finally:
        os._exit(code)


def _main_of(program: str) -> Any:
    from importlib import import_module

    names = {"quantization.export": "quantization.programs.export"}
    return import_module(names.get(program, f"{program}.__main__")).main


def _serve() -> None:
    """Fork a child for every call of every line on stdin."""
    sys.path.insert(0, str(ROOT))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print on import
    import torch

    torch.set_num_threads(1)
    _import_everything()
    for line in sys.stdin:
        started = []
        for call in json.loads(line):
            folder = Path(tempfile.mkdtemp(prefix="call-"))
            folder.chmod(0o777)
            pid = os.fork()
            if pid == 0:
                _child(call, folder)
            started.append((pid, folder))
        outcomes = []
        for pid, folder in started:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            out, err, changes = ((folder / name).read_text(errors="replace") for name in ("out", "err", "changes"))
            shutil.rmtree(folder)
            outcomes.append({"status": status, "out": out, "err": err, "changes": json.loads(changes or "[]")})
        print(json.dumps(outcomes), file=answers, flush=True)


def _import_everything() -> None:
    """What programs import when they are called, so that children find it done, also those of a user who may not read
    this one's Python: codecs are found late."""
    import encodings
    import pkgutil
    from importlib import import_module

    paths = {package: [str(ROOT / package)] for package in ("corpora", "intactkv", "quantization", "eval")}
    for package, path in {**paths, "encodings": list(encodings.__path__)}.items():
        for module in pkgutil.walk_packages(path, f"{package}."):
            if "_triton" not in module.name and not module.name.endswith("__main__"):
                try:
                    import_module(module.name)
                except ImportError:  # an optional library, or another system's
                    continue
    for name in ("transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto",
                 "matplotlib.backends.backend_pdf", "matplotlib.backends.backend_agg", "openai", "tqdm",
                 "transformers.generation.utils"):  # fmt: skip
        import_module(name)


if __name__ == "__main__":
    _serve()
