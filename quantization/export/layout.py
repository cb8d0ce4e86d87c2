"""What the export formats share: which grids they can hold, dense 32-bit words, scales in half precision.

    x ≈ s · (q − z),    q and z integers in 0…2^b − 1,    groups of neighbouring input channels

A convention with a constant zero point is symmetric: its codes are moved so that z = 2^(b−1), which every format knows
(`smoothquant-sym`, levels ±(2^(b−1) − 1), moves by one step, the others are there already). Integer zero points go
out as they are. Real ones, and codes that are no uniform grid, have no place in these formats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from corpora.errors import UserError
from quantization.grids.packing import pack_codes
from quantization.grids.stored import StoredWeight
from quantization.grids.uniform import QuantizedTensor

__all__ = [
    "Contents", "Packed", "Scheme", "check_known", "common_scheme", "half_scale", "integers", "pack_words", "refuse",
]  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """What a format's configuration says about a linear.

    act_order: its groups are not runs of neighbours. scale_dtype: of the scales here, before the format rounds them.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    scale_dtype: torch.dtype

    def __str__(self) -> str:
        group = "one group per row" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{self.bits} bits, {group}, {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True)
class Packed:
    """A linear in a format: its tensors by the last part of their name, and what it is.

    scale_change: the largest |s' − s| / s where the format's scales are narrower than ours.
    """

    tensors: dict[str, Tensor]
    scheme: Scheme
    scale_change: float = 0.0


@dataclass(frozen=True)
class Contents:
    """All that a format's configuration is made from.

    schemes: of the packed linears, by name. plain: linears that are not quantized. blocks: where the decoder blocks
    are. dtype: what the model computes in by default. unpacked: whether a linear reads its own weight (Falcon's), so
    that no other product can stand in for it.
    """

    schemes: Mapping[str, Scheme]
    plain: Sequence[str]
    blocks: str
    dtype: torch.dtype
    unpacked: bool = False


def refuse(name: str, what: str, way_out: str = "use --format compressed-tensors") -> UserError:
    """The error for a linear that a format cannot hold; the dense export always can."""
    return UserError(f"{name}: {what}; {way_out}, or export real values: --format dense")


def integers(weight: StoredWeight, name: str) -> tuple[QuantizedTensor, Tensor, Tensor, Scheme]:
    """The weight itself, its codes (out, in) and zero points (out, groups), uint8 in 0…2^b − 1, and the scheme.

    Raises UserError if it is on no uniform grid, or has zero points that are no integers in that range.
    """
    if not isinstance(weight, QuantizedTensor):
        raise refuse(
            name,
            f"weights of the kind {weight.kind!r} are no codes of evenly spaced levels, which is all that packed "
            "formats hold",
            "quantize with a recipe on a uniform grid, such as gptq",
        )
    grid = weight.grid
    codes, zero_point, top = weight.codes, weight.zero_point, 2**grid.bits - 1
    symmetric = grid.rule.zero_point == "constant"
    if symmetric:
        shift = 2 ** (grid.bits - 1) - int(zero_point.flatten()[0])
        codes, zero_point = codes + shift, zero_point + shift
        assert int(codes.max()) <= top, "a symmetric convention reaches beyond the signed range of its bits"
    wrong = (zero_point != zero_point.round()) | (zero_point < 0) | (zero_point > top)
    if bool(wrong.any()):
        raise refuse(
            name,
            f"the zero point {float(zero_point[wrong][0]):g} of the convention {grid.convention} is no integer in "
            f"0…{top}, which is all that the format holds",
            "quantize with an integer zero point, for example --set weights.grid.convention=gptq-asym",
        )
    scheme = Scheme(grid.bits, grid.group_size, symmetric, weight.group_index is not None, weight.scale.dtype)
    return weight, codes, zero_point.to(torch.uint8), scheme


def check_known(scheme: Scheme, name: str, what: str, bits: Sequence[int], group_sizes: Sequence[int]) -> None:
    """Raise UserError for bits or a group size that the readers of a format do not take. what: the format."""
    for field_name, value, known in (("bits", scheme.bits, bits), ("group_size", scheme.group_size, group_sizes)):
        if value not in known:
            taken = ", ".join(map(str, known))
            raise refuse(name, f"{field_name}={value} is taken by no reader of {what}; they know {taken}")


def pack_words(values: Tensor, bits: int, axis: int) -> Tensor:
    """Pack unsigned values of a matrix along an axis, without gaps: 32 of them become `bits` words.

    The value i of a line occupies bits i·bits … (i+1)·bits − 1 of a little-endian stream, which is cut into int32
    words; the last is filled up with zeros.
    """
    lines = values if axis == 1 else values.T
    padded = torch.nn.functional.pad(lines, (0, -lines.shape[1] % 32))
    words = pack_codes(padded, bits).contiguous().view(torch.int32)[:, : -(-lines.shape[1] * bits // 32)]
    return (words if axis == 1 else words.T).contiguous()


def half_scale(weight: QuantizedTensor, name: str) -> tuple[Tensor, float]:
    """Scales in float16, as GPTQ's and AWQ's formats keep them, and their largest relative change.

    Raises UserError for a scale beyond float16, or one that becomes 0 there and was not that of a group of zeros.
    """
    scale = weight.scale.float()
    half = scale.to(torch.float16)
    lost = half == 0
    if not bool(torch.isfinite(half).all()):
        raise refuse(
            name,
            f"its scale {float(scale.max()):g} is beyond float16 ({torch.finfo(torch.float16).max:g}), in which the "
            "format keeps scales",
        )
    if bool(lost.any()) and bool(replace(weight, scale=scale * lost).dequantize().any()):
        raise refuse(
            name,
            f"its scale {float(scale[lost].max()):.1e} becomes 0 in float16, in which the format keeps scales",
            "use --format compressed-tensors, quantize with --set weights.grid.scale_dtype=float16",
        )
    return half, float(torch.where(lost, 0, (half.float() - scale) / scale).abs().max())


def common_scheme(schemes: Mapping[str, Scheme], what: str) -> Scheme:
    """The one scheme that all linears share. Raises UserError, with the first that differs, if they do not.

    what: can hold no more than one, for the message.
    """
    first, scheme = next(iter(schemes.items()))
    for name, other in schemes.items():
        if other != scheme:
            raise refuse(
                name, f"{other} differs from {first} ({scheme}), and {what} has one grid for all linears",
                "quantize all linears alike",
            )  # fmt: skip
    return scheme
