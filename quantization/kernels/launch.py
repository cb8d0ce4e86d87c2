"""Where Triton's kernels run, and how they are started in a hurry: what was compiled for the same arguments before is
started by addresses, without asking again.

Triton looks at every argument of every call to find the compiled kernel, and asks the driver about every pointer, which
takes longer than a small product. What it would look at is the key here: every number, and of every tensor its dtype,
its device and whether it begins at a multiple of 16 bytes.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["runs_triton", "start"]

log = logging.getLogger(__name__)

CAPABILITY = (8, 0)  # of a GPU: products in bfloat16
ALIGNED = 16  # bytes

_compiled: dict[tuple[Any, ...], Callable[..., None]] = {}


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run there; why not on a CUDA device goes into the log, once."""
    if device.type != "cuda":
        return False
    if find_spec("triton") is None:
        _say("Triton is not installed: on a GPU torch does what its kernels would do much faster")
        return False
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        _say(f"{torch.cuda.get_device_name(device)} is older than Triton's kernels: torch does it, much slower")
        return False
    return True


@cache
def _say(why: str) -> None:
    log.warning(why)


def start(
    kernel: Any, grid: tuple[int, int, int], tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...], warps: int
) -> None:
    """Start a kernel on the device of its first tensor.

    tensors, numbers: its arguments in the order of its parameters, first those that are tensors or none.
    """
    first = tensors[0]
    assert first is not None
    device = first.get_device()  # −1 on a CPU, where kernels are interpreted
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton starts kernels on the current device
            start(kernel, grid, tensors, numbers, warps)
        return
    addresses: list[int | None] = []
    kinds: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            addresses.append(None)
            kinds.append(None)
        else:
            address = tensor.data_ptr()
            addresses.append(address)
            kinds += (tensor.dtype, tensor.get_device(), address % ALIGNED == 0)
    key = (id(kernel), grid, numbers, warps, *kinds)
    again = _compiled.get(key)
    if again is not None:
        again(*addresses, *numbers, stream=torch._C._cuda_getCurrentRawStream(device))
        return
    made = kernel[grid](*tensors, *numbers, num_warps=warps)
    if made is not None:  # the interpreter compiles nothing
        _compiled[key] = made[grid]
