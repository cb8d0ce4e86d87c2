"""One process or several (`accelerate launch`, torchrun): who am I, who writes, and sums over all."""

import os
from typing import Any

import torch
from torch import Tensor

from corpora import values
from corpora.errors import UserError
from corpora.values import from_environment

__all__ = ["Processes"]


def _check_launched(count: int) -> None:
    """Refuse what no launcher sets: torch and accelerate would end in a traceback, or wait for ever."""
    for variable, most in (("RANK", count - 1), ("LOCAL_RANK", count - 1), ("MASTER_PORT", 65535)):
        from_environment(variable, values.count(0, most), None)
    for variable in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(variable):
            raise UserError(
                f"WORLD_SIZE={count} says that there are several processes, but {variable} is not set; start them with "
                "`accelerate launch`, or unset WORLD_SIZE"
            )


class Processes:
    """This process among those that share an evaluation. index: 0 writes records and prints; count: 1 when alone.

    on_cpu: they compute there, whatever GPUs the machine has. Raises UserError if there are more than GPUs.
    """

    def __init__(self, on_cpu: bool = False) -> None:
        self._state: Any = None
        count = from_environment("WORLD_SIZE", values.count(), 1)
        if count > 1:
            _check_launched(count)
            from accelerate import PartialState

            # Without being told, it takes a launcher's processes without GPUs for one each.
            on_cpu = on_cpu or not torch.cuda.is_available()
            here, gpus = from_environment("LOCAL_WORLD_SIZE", values.count(1, count), 1), torch.cuda.device_count()
            if not on_cpu and here > gpus:
                raise UserError(
                    f"{here} processes were started on a machine that shows {gpus} CUDA GPUs, and each needs its own; "
                    f"start {gpus}, or give --device cpu"
                )
            if on_cpu:  # its barriers name a GPU of the process' own index wherever they see any
                os.environ["CUDA_VISIBLE_DEVICES"] = ""
            self._state = PartialState(cpu=on_cpu)
        self.index: int = 0 if self._state is None else self._state.process_index
        self.count: int = 1 if self._state is None else self._state.num_processes

    @property
    def is_first(self) -> bool:
        """Whether this one writes and prints."""
        return self.index == 0

    @property
    def device(self) -> torch.device | None:
        """The device that accelerate gave this process; None when it is alone."""
        return None if self._state is None else self._state.device

    def accelerator(self) -> Any:
        """An `accelerate.Accelerator` of these processes, for libraries that want one; None when alone."""
        if self._state is None:
            return None
        from accelerate import Accelerator

        return Accelerator(cpu=self._state.device.type == "cpu")

    def mine(self, batches: range) -> range:
        """This process' share of some batches."""
        return batches[self.index :: self.count]

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on the CPU; each must have called it."""
        if self._state is None:
            return tensor
        from accelerate.utils import reduce

        return reduce(tensor.to(self._state.device), "sum").cpu()

    def wait(self) -> None:
        """Go on once every process has come as far; each must have called it."""
        self.summed(torch.zeros(1))
