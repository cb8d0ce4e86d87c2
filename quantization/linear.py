"""QuantLinear: a linear layer that keeps its weight packed and unpacks it on use."""

import torch
from torch import Tensor, nn

from quantization.grids import QuantizedTensor, UniformGrid, pack_codes, unpack_codes

__all__ = ["QuantLinear", "stored_tensors", "unpack_weight"]


def stored_tensors(weight: QuantizedTensor) -> dict[str, Tensor]:
    """What a checkpoint keeps of a weight: `codes` (packed), `scale`, and `zero_point` as its convention says.

    Integer zero points are packed like codes, real ones stay float32, constant ones follow from the grid.
    """
    stored = {"codes": pack_codes(weight.codes, weight.grid.bits), "scale": weight.scale}
    kind = weight.grid.rule.zero_point
    if kind == "code":
        stored["zero_point"] = pack_codes(weight.zero_point.to(torch.uint8), weight.grid.bits)
    elif kind == "real":
        stored["zero_point"] = weight.zero_point
    return stored


def unpack_weight(stored: dict[str, Tensor], grid: UniformGrid, channels: int) -> QuantizedTensor:
    """Undo `stored_tensors` for a weight of `channels` input channels."""
    codes = unpack_codes(stored["codes"], grid.bits, channels)
    scale = stored["scale"]
    kind = grid.rule.zero_point
    if kind == "code":
        zero_point = unpack_codes(stored["zero_point"], grid.bits, scale.shape[-1]).float()
    elif kind == "real":
        zero_point = stored["zero_point"]
    else:
        one = torch.ones(1)
        zero_point = grid.rule.fit(-one, one, grid.bits).zero_point.to(scale.device).expand(scale.shape)
    return QuantizedTensor(codes, scale, zero_point, grid)


class QuantLinear(nn.Module):
    """y = x Ŵᵀ + b with Ŵ = s·(q − z) unpacked on every call: a quarter of the memory, not the speed.

    Buffers: `codes` uint8 (out, ceil(in/8)·bits), `scale` (out, groups), `zero_point`. Use the dequantized form of a
    checkpoint where speed counts; the two give the same bits.
    """

    def __init__(self, stored: dict[str, Tensor], grid: UniformGrid, in_features: int, bias: Tensor | None):
        super().__init__()
        self.grid = grid
        self.in_features = in_features
        self.out_features = stored["codes"].shape[0]
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight in real values: (out, in)."""
        return unpack_weight(dict(self.named_buffers()), self.grid, self.in_features).dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) to (..., out)."""
        return nn.functional.linear(x, self.dequantized(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Shape and grid, as torch's modules print themselves."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.grid}"
