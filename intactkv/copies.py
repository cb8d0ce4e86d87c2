"""A prefix may lie elsewhere than the model: on the CPU, in another dtype, one layer here and the next one there."""

import torch
from torch import Tensor

__all__ = ["Copies"]


class Copies:
    """A prefix's keys and values on other devices, or in other dtypes, made once: each copy makes the host wait."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def near(self, layer: int, prefix: tuple[Tensor, Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's, on the device and in the dtype of `like`; with their gradients if they have any."""
        keys, values = prefix
        if (keys.device, keys.dtype) == (like.device, like.dtype):
            return prefix
        if keys.requires_grad or values.requires_grad:
            return keys.to(like), values.to(like)
        key = layer, like.device, like.dtype
        if key not in self._made:
            with torch.inference_mode(False):  # they outlast this call, and the next one may train
                self._made[key] = keys.to(like), values.to(like)
        return self._made[key]
