"""The product with uniform codes of 2, 3, 4 or 8 bits on a GPU: how a matrix is laid out for it, and by how many rows.

    y_n = Σ_g s_gn (Σ_(k∈g) c_kn x_k − z_gn Σ_(k∈g) x_k)

A *unit* is 32 channels of one output: as many words of 32 bits as a code has bits, filled from the lowest bit of the
first one on. The words of neighbouring outputs are neighbours, so that the threads of a GPU read whole lines. The
kernels are in `uniform_kernels`.

One row, or a few: the codes are multiplied as they are read. Some rows: tile by tile, dequantized, on tensor cores.
More: the matrix is dequantized once, for torch's own product, which is also what passes gradients on.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quantization.grids.uniform import QuantizedTensor
from quantization.kernels.launch import runs_triton
from quantization.kernels.protocols import Prepared, Stored, in_place

__all__ = ["BITS", "UNIT", "Uniform", "layout"]

BITS = (2, 3, 4, 8)
UNIT = 32  # channels
PAD = 64  # outputs are filled up to a multiple, so that tiles need no masks


class Uniform:
    """x Ŵᵀ + b straight from uniform codes, by Triton."""

    name: ClassVar[str] = "uniform"

    def takes(self, stored: Stored, device: torch.device) -> bool:
        """Uniform codes of 2, 3, 4 or 8 bits in groups of whole units, where Triton runs."""
        if stored.kind != QuantizedTensor.kind or not runs_triton(device):
            return False
        channels, size = stored.header["channels"], stored.header["group_size"]
        size = channels if size == -1 else size
        index = stored.parts.get("group_index")
        even = index is None or bool((index.long().bincount() == size).all())
        return stored.header["bits"] in BITS and size % UNIT == 0 and channels % size == 0 and even

    def prepare(self, stored: Stored) -> Prepared:
        """words (units, bits, outputs) int32, scale and zero_point (groups, outputs), outputs filled up to `PAD`; order
        (channels,) int64, the channels by their groups, where groups are not runs of neighbours."""
        from quantization.kernels.uniform_triton import UniformCodes, dequantized, multiply  # triton is not everywhere

        weight = stored.weight
        assert isinstance(weight, QuantizedTensor)
        rule, codes, tensors = weight.grid.rule, weight.codes, dict[str, Tensor]()
        if weight.group_index is not None:
            tensors["order"] = weight.group_index.long().argsort(stable=True)
            codes = codes[:, tensors["order"]]
        tensors["words"] = layout(_filled(codes), weight.grid.bits)
        tensors["scale"] = _filled(weight.scale).T.contiguous()
        if rule.zero_point != "constant":
            zero = weight.zero_point.half() if rule.zero_point == "code" else weight.zero_point
            tensors["zero_point"] = _filled(zero).T.contiguous()
        outputs, channels = codes.shape
        constant = float(weight.zero_point[0, 0]) if rule.zero_point == "constant" else None
        per_group = channels // weight.scale.shape[1] // UNIT
        laid_out = UniformCodes(weight.grid.bits, channels, outputs, per_group, constant)

        def product(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
            return multiply(x, tensors, bias, laid_out)

        def dequantize(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
            return in_place(dequantized(tensors, laid_out, dtype), tensors.get("order"))

        return Prepared(tensors, product, dequantize)


def _filled(rows: Tensor) -> Tensor:
    """(outputs, n) with zeros behind, up to a multiple of `PAD` outputs."""
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % PAD))


def layout(codes: Tensor, bits: int) -> Tensor:
    """Codes (outputs, channels) uint8, channels a multiple of `UNIT`, as words (units, bits, outputs), int32."""
    units = codes.T.unflatten(0, (-1, UNIT))  # (units, 32, outputs)
    words = torch.zeros(len(units), bits, codes.shape[0], dtype=torch.int32, device=codes.device)
    for place in range(UNIT):
        (word, bit), code = divmod(bits * place, 32), units[:, place].int()
        words[:, word] |= code << bit
        if bit + bits > 32:
            words[:, word + 1] |= code >> (32 - bit)
    return words
