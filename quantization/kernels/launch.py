"""Start Triton kernels in a hurry: what was compiled for the same arguments before is started without asking again.

Triton looks at every argument of every call to find the compiled kernel, which takes longer than a small product. What
it would look at is the key here: dtypes and every number; all pointers are multiples of 16 bytes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["start"]

_compiled: dict[tuple[Any, ...], Callable[..., None]] = {}


def start(kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], warps: int) -> None:
    """Start a kernel on the device of its first argument. arguments: all of them, in the order of its parameters."""
    device, current = arguments[0].get_device(), -1
    if device >= 0:
        current = torch.cuda.current_device()
    if device != current:
        with torch.cuda.device(device):  # Triton starts kernels on the current device
            start(kernel, grid, arguments, warps)
        return
    pointers = 0
    for argument in arguments:
        if isinstance(argument, Tensor):
            pointers |= argument.data_ptr()
    kinds = (argument.dtype if isinstance(argument, Tensor) else argument for argument in arguments)
    key = (id(kernel), grid, warps, device, *kinds)
    again = None if pointers % 16 else _compiled.get(key)
    if again is not None:
        again(*arguments)
        return
    made = kernel[grid](*arguments, num_warps=warps)  # in the interpreter, on a CPU, nothing is made
    if device >= 0 and pointers % 16 == 0:
        _compiled[key] = made[grid]
