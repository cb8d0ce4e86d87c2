"""Where Triton's kernels run and what the log says where not, and what a compiled kernel is started for again."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from quantization.kernels import launch
from quantization.kernels.launch import runs_triton, start

CUDA = torch.device("cuda:0")
NUMBERS, GRID = (7, 0.5, None), (2, 1, 1)


class Kernel:
    """What Triton would do with one: compile it for its arguments. It keeps what every compiled one is started with."""

    def __init__(self) -> None:
        self.compiled: list[list[tuple[Any, ...]]] = []

    def __getitem__(self, grid: Any) -> Any:
        def first(*arguments: Any, num_warps: int) -> Any:
            starts: list[tuple[Any, ...]] = []
            self.compiled.append(starts)
            return {grid: lambda *again, stream: starts.append((*again, stream))}

        return first


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)
    runs_triton.cache_clear()
    launch._say.cache_clear()
    yield
    runs_triton.cache_clear()
    launch._say.cache_clear()


def test_a_second_call_starts_what_the_first_compiled_by_addresses() -> None:
    kernel, x, y = Kernel(), torch.zeros(8), torch.zeros(8)
    start(kernel, GRID, (x, None, torch.zeros(8)), NUMBERS, 4)
    start(kernel, GRID, (x, None, y), NUMBERS, 4)
    assert kernel.compiled == [[(x.data_ptr(), None, y.data_ptr(), *NUMBERS, 5)]]


def test_another_dtype_alignment_number_or_grid_is_compiled_anew() -> None:
    """model.to makes float32 scales bfloat16: the kernel of the old ones would read other numbers from their bytes."""
    kernel, x, scale = Kernel(), torch.zeros(8), torch.zeros(9)
    calls: list[tuple[Any, ...]] = [
        (GRID, (x, scale), NUMBERS, 4),
        (GRID, (x, scale.bfloat16()), NUMBERS, 4),
        (GRID, (x, scale.half()), NUMBERS, 4),
        (GRID, (x.half(), scale), NUMBERS, 4),
        (GRID, (x, scale[1:]), NUMBERS, 4),
        (GRID, (x, None), NUMBERS, 4),
        (GRID, (x, scale), (8, 0.5, None), 4),
        (GRID, (x, scale), NUMBERS, 8),
        ((9, 1, 1), (x, scale), NUMBERS, 4),
    ]
    for call in calls:
        start(kernel, *call)
    assert kernel.compiled == [[] for _ in calls]
    for call in calls:
        start(kernel, *call)
    assert [len(starts) for starts in kernel.compiled] == [1] * len(calls)


def test_kernels_run_on_cuda_devices_that_are_new_enough(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found: list[Any] = ["triton"]
    monkeypatch.setattr(launch, "find_spec", lambda name: found[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if device.index == 0 else (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    with caplog.at_level(logging.WARNING):
        assert not runs_triton(torch.device("cpu"))
        assert runs_triton(CUDA)
        assert not caplog.records
        assert [runs_triton(torch.device("cuda", index)) for index in (1, 2, 1)] == [False] * 3
        runs_triton.cache_clear()
        found[0] = None
        assert [runs_triton(device) for device in (CUDA, torch.device("cuda"), CUDA)] == [False] * 3
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "an old GPU is older than Triton's kernels",
        "Triton is not installed",
    ]
