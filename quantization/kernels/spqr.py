"""The product with SpQR's weights on a GPU: how a matrix is laid out for it, and by how many rows.

    y_n = Σ_g s_gn (Σ_(k∈g) q_kn x_k − z_gn Σ_(k∈g) x_k) + Σ_(k of row n) r_kn x_k

s and z stay codes on the grids of the second level, and r stays in compressed sparse rows; x is read in the order in
which the channels were quantized. The words of a group and an output hold as many whole codes as fit, from bit 0 on,
and those of neighbouring outputs are neighbours. The kernels are in `spqr_triton`; with many rows they make the
matrix, for torch's own product, which is also what passes gradients on.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quantization.grids.sparse import SpQRWeight
from quantization.kernels.launch import runs_triton
from quantization.kernels.protocols import Prepared, Stored, in_place

__all__ = ["GROUP", "Spqr", "layout"]

GROUP = 64  # channels of a group, at most: the kernels have no loop over them


class Spqr:
    """x Ŵᵀ + b straight from SpQR's codes and outliers, by Triton."""

    name: ClassVar[str] = "spqr"

    def takes(self, stored: Stored, device: torch.device) -> bool:
        """SpQR's matrices with groups of at most `GROUP` channels on a CUDA device, if Triton serves it."""
        if stored.kind != SpQRWeight.kind or not runs_triton(device):
            return False
        return stored.header["channels"] // stored.parts["second_level"].shape[1] <= GROUP

    def prepare(self, stored: Stored) -> Prepared:
        """words (groups, words, outputs) int32; grid_codes (groups, outputs), q_s below q_z; second_level (groups,
        tiles, 4), s₂ z_s s₃ z_z; row_pointers, columns and values as they are stored; order (channels,) int32."""
        from quantization.kernels.spqr_triton import SpqrCodes, dequantized, multiply  # triton is not everywhere

        weight = stored.weight
        assert isinstance(weight, SpQRWeight)
        groups, outputs = weight.scales.codes.shape
        tensors = {
            "words": layout(weight.codes, weight.bits, groups),
            "grid_codes": (weight.scales.codes.int() | weight.zero_points.codes.int() << weight.scale_bits).to(
                torch.uint8 if weight.scale_bits + weight.zero_bits <= 8 else torch.int32
            ),
            "second_level": stored.parts["second_level"].permute(1, 2, 0).contiguous(),
            "row_pointers": weight.corrections.row_pointers,
            "columns": weight.corrections.columns,
            "values": weight.corrections.values,
        }
        if weight.order is not None:
            tensors["order"] = weight.order.int()
        size, tile = weight.codes.shape[1] // groups, outputs // weight.scales.scale.shape[-1]
        codes = SpqrCodes(weight.bits, weight.scale_bits, weight.zero_bits, size, tile)

        def product(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
            return multiply(x, tensors, bias, codes)

        def dequantize(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
            return in_place(dequantized(tensors, codes, dtype), tensors.get("order"))

        return Prepared(tensors, product, dequantize)


def layout(codes: Tensor, bits: int, groups: int) -> Tensor:
    """Codes (outputs, channels) uint8 as words (groups, words, outputs) int32, 32 // bits codes each."""
    per_word = 32 // bits
    of_group = codes.T.unflatten(0, (groups, -1))  # (groups, channels of a group, outputs)
    words = torch.zeros(groups, -(-of_group.shape[1] // per_word), len(codes), dtype=torch.int32, device=codes.device)
    for place in range(of_group.shape[1]):
        words[:, place // per_word] |= of_group[:, place].int() << bits * (place % per_word)
    return words
