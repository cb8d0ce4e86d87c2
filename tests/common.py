"""What many tests share beside the fixtures: places, texts, and many cases in one test."""

import hashlib
import inspect
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]  # the checkout
SMOLLM2 = ROOT / "modelzoo" / "smollm2" / "smollm2-135m"
FOXES = " ".join(f"The {i} brown foxes jump over {i * i} lazy dogs, said no one." for i in range(60))

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
KERNELS = [False, pytest.param(True, marks=needs_triton)]  # torch alone, and Triton's kernel


def every(names: str | tuple[str, ...], values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`pytest.mark.parametrize`, but one test goes over all values, and its failure names each that fails.

    Several stacked ones go over all combinations. Fixtures are made once: not for tests that change what one gives.
    """
    keys = (names,) if isinstance(names, str) else names
    cases = [dict(zip(keys, (value,) if isinstance(names, str) else value, strict=True)) for value in values]
    assert cases, f"there is no value of {', '.join(keys)}"

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        inner: list[dict[str, Any]] = getattr(test, "cases", [{}])
        body: Callable[..., None] = getattr(test, "body", test)

        @wraps(body)
        def run(**fixtures: Any) -> None:
            failed: list[tuple[dict[str, Any], BaseException]] = []
            for case in run.cases:  # type: ignore[attr-defined]
                try:
                    body(**case, **fixtures)
                except (Exception, pytest.fail.Exception) as error:
                    failed.append((case, error))
            if failed:
                told = "; ".join(", ".join(f"{name}={value}" for name, value in case.items()) for case, _ in failed)
                raise AssertionError(f"{len(failed)} of {len(run.cases)} cases fail: {told}") from failed[0][1]  # type: ignore[attr-defined]

        run.cases = [case | other for case in cases for other in inner]  # type: ignore[attr-defined]
        run.body = body  # type: ignore[attr-defined]
        signature = inspect.signature(body)
        own = [parameter for name, parameter in signature.parameters.items() if name not in run.cases[0]]  # type: ignore[attr-defined]
        run.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        return run

    return decorate


def error_line(err: str) -> str:
    """The one line in which a program ends that could not do its work, of its stderr; fails for anything else."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err[-3000:]
    assert "Traceback" not in err, err[-3000:]
    return lines[0]


def tree(top: Path, content: Callable[[Path], bytes] = Path.read_bytes) -> dict[str, str]:
    """What lies below a directory, hidden too, by name: its kind and the hash of a file's content."""
    found: dict[str, str] = {}
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "directory"
        elif path.is_file() and os.access(path, os.R_OK):
            found[name] = hashlib.sha256(content(path)).hexdigest()
        else:
            found[name] = f"special {path.stat().st_mode:o}"
    return found


def refusals(stderr: str) -> list[str]:
    """What a script's stderr says against its call: all but the lines on what it is going to do."""
    return [line for line in stderr.splitlines() if not line.startswith(("measured as in ", "arms: "))]


class Rounds:
    """How a KV policy rounds the keys and values of one layer, apart from any cache. tensors: what it calibrated to."""

    def __init__(self, policy: Any, tensors: Any = None) -> None:
        self.roundings: Any = policy.roundings if isinstance(policy, Rounds) else policy.roundings(tensors)

    def keys(self, states: Tensor) -> Tensor:
        """Keys (batch, KV heads, tokens, D) as attention reads them."""
        return self._rounded(0, states)

    def values(self, states: Tensor) -> Tensor:
        """Values as attention reads them."""
        return self._rounded(1, states)

    def _rounded(self, side: int, states: Tensor) -> Tensor:
        from intactkv.rope import Places  # here: processes that are struck read this file without the project

        return self.roundings[side].numbers(states.float(), Places(0, states.shape[2])).to(states.dtype)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at. They lie below those that the system gives to whom asks for any, so that none of
    them is taken before it is used."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


@contextmanager
def computing_at_most(seconds: float) -> Iterator[None]:
    """Fail if the processes that the block starts and ends compute for longer. Time in which others are at work is not
    theirs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    yield
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < seconds


# A training that is killed where it would write its state for the second time: behind all that the first does not hold.
KILLED_TRAINING = """
import os, runpy, signal
from intactkv.training import Descent
save, saved = Descent.save, []
def save_once(self, path):
    if saved: os.kill(os.getpid(), signal.SIGKILL)
    saved.append(save(self, path))
Descent.save = save_once
runpy.run_module("intactkv", run_name="__main__", alter_sys=True)
"""


def kill_training(*words: str) -> None:
    """Call `python -m intactkv` with these words, and kill it (SIGKILL) between its first state and its second."""
    command, environment = [sys.executable, "-c", KILLED_TRAINING, *words], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def compiled_for(capability: int, program: str, cache: Path) -> list[int]:
    """Have a program of this folder compile Triton kernels to machine code of a GPU that is not there, which finds what
    the interpreter lets pass; the numbers that it prints. cache: a folder for what is compiled."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "tests" / program), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(line) for line in done.stdout.split()]
