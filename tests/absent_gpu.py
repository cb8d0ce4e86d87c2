"""A GPU that is not there: after `from absent_gpu import compiled`, kernels are compiled for it and nothing runs.

sys.argv[1]: its compute capability, such as 90. compiled: the kernels so far, each with its machine code.
"""

import sys
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = ["compiled"]


class Absent:
    """A driver that knows what to compile for and has nothing to run it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    kernel = launched(self, *args, grid=grid, warmup=True, **options)
    assert kernel.asm["cubin"]
    compiled.append(kernel)  # and none to start, as in the interpreter


compiled: list[Any] = []
launched = JITFunction.run
JITFunction.run = compile_only
driver.set_active(Absent())
