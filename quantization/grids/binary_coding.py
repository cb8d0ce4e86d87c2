"""Binary coding: every group of weights as a sum of scaled sign vectors, packed as the LUT-GEMM kernel reads it.

    ŵ = Σ_i α_i b_i + z₀      b_i ∈ {−1, +1}^g, α_1 ≥ … ≥ α_q ≥ 0      1802.00150; with z₀ and the layout: 2206.09557

A code of q bits names the signs of a weight: its highest bit is b_1's, and 1 means +1. Evenly spaced levels are the
special case of α that halve from one to the next: `from_uniform` stores the result of RTN or GPTQ without any loss,

    s·(c − z) = Σ_i s·2^(q−1−i) b_i + s·((2^q − 1)/2 − z)       i = 1 … q

Layout: bit t of word w is the sign of input 32·w + t, the output index runs fastest, and byte j of a word picks the
entry of table 4·w + j of `quantization.kernels.lut`. Departs from the kernel: every group begins with a new word. A
group size that is a multiple of 32 leaves no gap; another leaves unused bits, which meet zeros of x in the product.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from corpora.errors import UserError
from quantization.grids.uniform import SCALE_DTYPES, QuantizedTensor, check_bits, split_groups

__all__ = ["WORD", "BinaryCoded", "BinaryGrid", "from_uniform", "pack_planes", "pad_groups", "signs", "unpack_planes"]

WORD = 32  # inputs of a word


@dataclass(frozen=True)
class BinaryGrid:
    """Levels ±α_1 … ±α_q (+ z₀) per group of consecutive channels.

    bits: 1 to 8, the number of sign vectors. group_size: channels per group along the last axis; −1 takes the whole
    row as one group. offset: whether the levels have a free z₀; without, they lie around 0. scale_dtype: what α and z₀
    are stored in; they are rounded to it before the codes are chosen.
    """

    bits: int
    group_size: int = -1
    offset: bool = False
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_bits("bits", self.bits, "leave the recipe out for full precision", lowest=1)
        if self.group_size != -1 and self.group_size < 1:
            raise UserError(
                f"group_size={self.group_size} is not allowed; use a positive divisor of the input "
                "channels, or -1 for one group per row"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise UserError(f"unknown scale_dtype {self.scale_dtype!r}; choose from {', '.join(SCALE_DTYPES)}")


@dataclass(frozen=True)
class BinaryCoded:
    """A binary-coded (out, in) matrix.

    planes: (words, q, out) int32. alpha: (groups, q, out), in the grid's scale dtype. offset: (groups, out), likewise,
    or None for z₀ = 0. channels: input channels.
    """

    planes: Tensor
    alpha: Tensor
    offset: Tensor | None
    grid: BinaryGrid
    channels: int
    kind: ClassVar[str] = "bcq"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Real values Σ α_i b_i + z₀, summed in float32: (out, in)."""
        codes = split_groups(unpack_planes(self.planes, self.channels, self.grid.group_size), self.grid.group_size)
        alpha = self.alpha.float().permute(1, 2, 0)[..., None]  # (q, out, groups, 1)
        total = torch.zeros(codes.shape, device=codes.device)
        for i in range(self.grid.bits):
            bit = (codes >> (self.grid.bits - 1 - i)) & 1
            total += torch.where(bit.bool(), alpha[i], -alpha[i])
        if self.offset is not None:
            total += self.offset.float().T[..., None]
        return total.flatten(1).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: q·in/32 words, q scales and at most one offset per group, for every output."""
        return {"planes": self.planes, "alpha": self.alpha} | ({} if self.offset is None else {"offset": self.offset})

    def header(self) -> dict[str, Any]:
        """What `tensors` does not tell: the grid and the number of channels."""
        return asdict(self.grid) | {"channels": self.channels}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> "BinaryCoded":
        """Undo `tensors` and `header`."""
        fields = dict(header)
        channels = fields.pop("channels")
        return cls(tensors["planes"], tensors["alpha"], tensors.get("offset"), BinaryGrid(**fields), channels)


def signs(bits: int, device: torch.device | None = None) -> Tensor:
    """The signs that every code stands for, (2^q, q) float32 of ±1; column i belongs to α_(i+1)."""
    codes, shifts = torch.arange(2**bits, device=device), torch.arange(bits - 1, -1, -1, device=device)
    return (((codes[:, None] >> shifts) & 1) * 2 - 1).float()


def pad_groups(x: Tensor, group_size: int, name: str = "tensor") -> Tensor:
    """(..., channels) as (..., words, 32): every group begins with a new word and is filled up with zeros.

    Raises UserError if the group size does not divide the channels.
    """
    groups = split_groups(x, group_size, name)
    return torch.nn.functional.pad(groups, (0, -groups.shape[-1] % WORD)).flatten(-2).unflatten(-1, (-1, WORD))


def pack_planes(codes: Tensor, bits: int, group_size: int = -1) -> Tensor:
    """Codes (out, in) uint8 to words (words, q, out) int32. Raises UserError if the groups do not fill the rows."""
    octets = pad_groups(codes, group_size).permute(1, 2, 0).unflatten(1, (4, 8))  # (words, 4, 8, out)
    planes = []
    for i in range(bits):
        plane = (octets >> (bits - 1 - i)) & 1
        byte = torch.stack([plane[:, :, t] << t for t in range(8)]).sum(0, dtype=torch.uint8).int()  # (words, 4, out)
        planes.append(byte[:, 0] | byte[:, 1] << 8 | byte[:, 2] << 16 | byte[:, 3] << 24)
    return torch.stack(planes, dim=1).contiguous()


def unpack_planes(planes: Tensor, channels: int, group_size: int = -1) -> Tensor:
    """Undo `pack_planes`: words (words, q, out) to codes (out, channels) uint8."""
    words, bits, out = planes.shape
    size = channels if group_size == -1 else group_size
    codes = torch.zeros(words, 4, 8, out, dtype=torch.uint8, device=planes.device)
    for i in range(bits):
        for j in range(4):
            byte = ((planes[:, i] >> (8 * j)) & 255).to(torch.uint8)
            for t in range(8):
                codes[:, j, t] |= ((byte >> t) & 1) << (bits - 1 - i)
    return codes.view(channels // size, -1, out)[:, :size].flatten(0, 1).T.contiguous()


def from_uniform(weight: QuantizedTensor, name: str = "weight") -> BinaryCoded:
    """The same matrix in binary coding, whatever convention its zero points follow; α and z₀ in float32.

    In float16 they would no longer be the same levels: z₀ is up to 2^(q−1) steps, so its rounding alone is up to 0.4 %
    of a step at 4 bits and 6 % at 8. Raises UserError for groups that are not runs of neighbouring channels.
    """
    if weight.group_index is not None:
        raise UserError(
            f"{name}: its groups were formed in activation order; binary coding needs runs of neighbouring channels: "
            "quantize with static groups (--set weights.static_groups=true)"
        )
    bits, scale = weight.grid.bits, weight.scale.float()
    alpha = scale[..., None] * 2.0 ** torch.arange(bits - 2, -2, -1, device=scale.device)  # (out, groups, q)
    offset = scale * ((2**bits - 1) / 2 - weight.zero_point)
    return BinaryCoded(
        pack_planes(weight.codes, bits, weight.grid.group_size),
        alpha.permute(1, 2, 0).contiguous(),
        offset.T.contiguous(),
        BinaryGrid(bits, weight.grid.group_size, offset=True),
        weight.codes.shape[1],
    )
