"""Where the seconds of a run go: reading, passes, Hessians, rounding, writing. Costs nothing unless somebody asks."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seconds_by_stage", "stage", "stages_are_counted"]

_asked: list[dict[str, float]] = []  # at most one
_open: list[float] = []  # seconds that inner stages took, of every stage that has begun


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the seconds of what is done inside, without those of stages within, if `seconds_by_stage` asks."""
    if not _asked:
        yield
        return
    _open.append(0.0)
    start = _now()
    try:
        yield
    finally:
        took = _now() - start
        _asked[0][name] += took - _open.pop()
        if _open:
            _open[-1] += took


@contextmanager
def seconds_by_stage() -> Iterator[dict[str, float]]:
    """Seconds by stage of what is done inside. A GPU is waited for at both ends of every stage, which takes time."""
    _asked.append(defaultdict(float))
    try:
        yield _asked[0]
    finally:
        _asked.pop()


def stages_are_counted() -> bool:
    """Whether `seconds_by_stage` asks: then nothing is done in the background, so that every second has its stage."""
    return bool(_asked)


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
