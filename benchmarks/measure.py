"""What the benchmarks share: alternating timings, peak unshared memory of a child process, and the printed line."""

import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from corpora.machine import environment


def alternating(
    first: Callable[[], Any], second: Callable[[], Any], rounds: int, device: str = "cpu"
) -> tuple[list[float], list[float]]:
    """Seconds of two functions, called in turn (and in changing order), after one warm-up call of each."""
    times: tuple[list[float], list[float]] = ([], [])
    first()
    second()
    for i in range(rounds):
        for which in ((0, 1), (1, 0))[i % 2]:
            _wait(device)
            start = time.perf_counter()
            (first, second)[which]()
            _wait(device)
            times[which].append(time.perf_counter() - start)
    return times


def ratio(mine: list[float], peer: list[float]) -> float:
    """Median over rounds of mine / peer: pairs of one round saw the same machine."""
    return statistics.median(m / p for m, p in zip(mine, peer, strict=True))


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


class _Operations(TorchDispatchMode):
    """Counts tensor operations, and those that need their result on the host."""

    WAITS = ("aten.item", "aten._local_scalar_dense", "aten.is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, call: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.waits += str(call).startswith(self.WAITS)
        return call(*args, **(kwargs or {}))


def asked_of_host(call: Callable[[], Any]) -> tuple[int, int]:
    """Tensor operations of a call, and how often it waits for the device: each look at a number does. On a GPU torch
    itself says when; elsewhere the looks are counted."""
    with _Operations() as found:
        call()
    if not torch.cuda.is_available():
        return found.count, found.waits
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found.count, sum("synchronizing" in str(warning.message) for warning in said)


def peak_unshared_mb(command: list[str], **variables: str) -> float:
    """Peak of a child process's anonymous memory in MB, sampled every 5 ms. Pages of mapped files do not count: the
    system can drop them at any time. Linux only."""
    child = subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            break
        peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.005)
    _, errors = child.communicate()
    if child.returncode != 0:
        raise RuntimeError(errors.decode())
    return peak * 1024 / 1e6


def report(**figures: Any) -> None:
    """Print one JSON line with the figures, the hardware and the date."""
    machine = {k: v for k, v in environment().items() if k in ("processor", "cores", "gpu", "torch", "commit")}
    print(json.dumps(figures | machine | {"date": date.today().isoformat()}))
    sys.stdout.flush()


# On a GPU ------------------------------------------------------------------------------------------------------------

CACHE = 300e6  # bytes that matrices which take turns have together, at least: more than a GPU's cache


def graph_time(calls: list[Callable[[], Any]], replays: int = 7) -> float:
    """Median microseconds of a call within a CUDA graph of all of them, one after the other."""
    torch.cuda.synchronize()  # what the calls read was made on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return statistics.median(_elapsed(graph.replay) for _ in range(replays)) / len(calls)


def eager_time(calls: list[Callable[[], Any]], rounds: int = 7) -> float:
    """Median microseconds of a plain call."""

    def run() -> None:
        for call in calls:
            call()

    return statistics.median(_elapsed(run) for _ in range(rounds)) / len(calls)


def _elapsed(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def bandwidth(device: str) -> float:
    """Bytes a second of a copy, read and written."""
    source, target = (torch.zeros(2**28, device=device) for _ in range(2))
    return 2 * 2**30 / (graph_time([lambda: torch.add(source, 1, out=target)] * 5) * 1e-6)


def in_turn(call: Callable[[int], Any], copies: int, enough: int) -> list[Callable[[], Any]]:
    """Calls with every copy in turn, so many that there are enough."""
    count = copies * -(-enough // copies)
    return [lambda i=i: call(i % copies) for i in range(count)]
