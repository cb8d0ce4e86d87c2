"""QuantLinear: a linear layer that keeps its weight packed and unpacks it on use."""

from typing import Any

import torch
from torch import Tensor, nn

from quantization.grids.stored import StoredWeight, restore

__all__ = ["QuantLinear"]


class QuantLinear(nn.Module):
    """y = x Ŵᵀ + b with Ŵ unpacked on every call: a quarter of the memory, not the speed.

    The buffers are the stored weight's tensors. Use the dequantized form of a checkpoint where speed counts; the two
    give the same bits.
    """

    def __init__(
        self, kind: str, parts: dict[str, Tensor], header: dict[str, Any], shape: torch.Size, bias: Tensor | None
    ):
        super().__init__()
        self.kind, self.header = kind, header
        self.out_features, self.in_features = shape
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def stored(self) -> StoredWeight:
        """The weight in its stored form."""
        return restore(self.kind, dict(self.named_buffers()), self.header)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) to (..., out)."""
        return nn.functional.linear(x, self.stored().dequantize(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Shape and grid, as torch's modules print themselves."""
        grid = ", ".join(f"{key}={value}" for key, value in self.header.items() if key != "channels")
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}, {grid}"
