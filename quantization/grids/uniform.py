"""Number grids: evenly spaced levels per group, in the conventions that published quantizers use.

    codes q = clamp(round(x / s) + z, 0, top),    x ≈ s · (q − z)      affine map: Jacob et al. 2018, 1712.05877, Eq. 1

Codes are unsigned here: a signed convention with levels −n…n' is the same grid with the constant zero point z = n.
Only how a group's range becomes (s, z, top) differs between papers. `CONVENTIONS` holds those rules, one row each;
mixing them up changes published numbers. All arithmetic is in float32, rounding is half-to-even.

Departs from the references: a group without any spread (below `TINY`) keeps a scale of one step instead of dividing by
zero.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from corpora.errors import UserError
from corpora.storage import is_finite
from quantization.grids.packing import pack_codes, unpack_codes

__all__ = [
    "CONVENTIONS",
    "Convention",
    "QuantizedTensor",
    "UniformGrid",
    "constant_zero_point",
    "encode",
    "fake_quantize",
    "fit",
    "merge_groups",
    "quantize",
    "split_groups",
]

EPS = 1e-5  # smallest range (AWQ) or maximum (SmoothQuant, QuaRot) that those repositories divide by
TINY = torch.finfo(torch.float32).tiny  # a smaller range divided by the number of steps may be 0
CLIP_NORM = 2.4  # GPTQ's error norm in the clip search
CLIP_STEPS = 100  # its grid: candidates 1 − i/100 …
CLIP_SHRINK = 0.8  # … for i < 80


class Fit(NamedTuple):
    """Scale and zero point of every group, broadcastable against the group: (..., 1), float32."""

    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class Convention:
    """One published rule from a group's range to its grid.

    fit: (lowest, highest, bits) -> Fit, on tensors of shape (..., 1).
    top: bits -> the largest code.
    zero_point: how it is stored: "code" (an integer in 0…2^b − 1), "constant" (follows from the bits),
        "real" (any float).
    round_sum: round(x/s + z) instead of round(x/s) + z; they differ on ties when z is odd.
    """

    fit: Callable[[Tensor, Tensor, int], Fit]
    top: Callable[[int], int]
    zero_point: str
    round_sum: bool = False


def _full_range(bits: int) -> int:
    return 2**bits - 1


def _symmetric_range(bits: int) -> int:
    return 2**bits - 2


def _fit_gptq_asym(low: Tensor, high: Tensor, bits: int) -> Fit:
    """s = (hi − lo)/(2^b − 1), z = round(−lo/s), with lo ≤ 0 ≤ hi so that 0 is a level; an all-zero group gets ±1."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    empty = high - low < TINY
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = (high - low) / _full_range(bits)
    return Fit(scale, torch.round(-low / scale))


def _fit_gptq_sym(low: Tensor, high: Tensor, bits: int) -> Fit:
    """s = 2m/(2^b − 1), z = 2^(b−1), m = max|x| (also for groups of one sign, which lose half the levels in GPTQ)."""
    largest = _largest(low, high)
    scale = 2 * torch.where(largest < TINY, 1.0, largest) / _full_range(bits)
    return Fit(scale, torch.full_like(scale, 2 ** (bits - 1)))


def _fit_awq_asym(low: Tensor, high: Tensor, bits: int) -> Fit:
    """s = max(hi − lo, 1e-5)/(2^b − 1), z = clamp(−round(lo/s), 0, 2^b − 1); wrecks groups of one sign, as AWQ does."""
    scale = (high - low).clamp_min(EPS) / _full_range(bits)
    return Fit(scale, (-torch.round(low / scale)).clamp(0, _full_range(bits)))


def _fit_smoothquant_sym(low: Tensor, high: Tensor, bits: int) -> Fit:
    """s = max(m, 1e-5)/(2^(b−1) − 1); levels ±(2^(b−1) − 1)."""
    scale = _largest(low, high).clamp_min(EPS) / (2 ** (bits - 1) - 1)
    return Fit(scale, torch.full_like(scale, 2 ** (bits - 1) - 1))


def _fit_quarot_sym(low: Tensor, high: Tensor, bits: int) -> Fit:
    """SmoothQuant's scale with one level more at the bottom: −2^(b−1)…2^(b−1) − 1."""
    scale = _largest(low, high).clamp_min(EPS) / (2 ** (bits - 1) - 1)
    return Fit(scale, torch.full_like(scale, 2 ** (bits - 1)))


def _fit_deepspeed_sym(low: Tensor, high: Tensor, bits: int) -> Fit:
    """s = 2m/2^b; the largest positive value is clipped by one step (ZeroQuant, DeepSpeed)."""
    largest = _largest(low, high)
    scale = torch.where(largest < TINY, 1.0, largest) / 2 ** (bits - 1)
    return Fit(scale, torch.full_like(scale, 2 ** (bits - 1)))


def _fit_deepspeed_asym(low: Tensor, high: Tensor, bits: int) -> Fit:
    """s = (hi − lo)/2^b with the offset s·round(lo/s), that is z = −round(lo/s), which no clamp holds in 0…2^b − 1."""
    spread = high - low
    # A constant group: one level must hit the value, so its scale is the value itself (1 for zeros).
    scale = torch.where(spread < TINY, torch.where(low == 0, 1.0, low.abs()), spread / 2**bits)
    return Fit(scale, -torch.round(low / scale))


def _fit_spqr_asym(low: Tensor, high: Tensor, bits: int) -> Fit:
    """s = (hi − lo)/(2^b − 1), z = −lo/s, a real number; a constant group gets the range −1, +1."""
    constant = high - low < TINY
    low, high = torch.where(constant, -1.0, low), torch.where(constant, 1.0, high)
    scale = (high - low) / _full_range(bits)
    return Fit(scale, -low / scale)


def _fit_intactkv_asym(low: Tensor, high: Tensor, bits: int) -> Fit:
    """The next rule with a range that contains 0, so that z is a code, as what is stored needs it."""
    return _fit_minmax_asym(low.clamp_max(0), high.clamp_min(0), bits)


def _fit_minmax_asym(low: Tensor, high: Tensor, bits: int) -> Fit:
    """IntactKV's and PrefixQuant's dynamic rule: s = clamp((hi − lo)/(2^b − 1), 1e-5, 1e4), z = round(−lo/s).

    Groups of one sign keep all levels; their z is no code. The published clamp of z to ±1e4 is left out: where it acts,
    a group without spread far from 0, it moves the whole group, which is exact here.
    """
    scale = ((high - low) / _full_range(bits)).clamp(1e-5, 1e4)
    return Fit(scale, torch.round(-low / scale))


def _largest(low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(low.abs(), high.abs())


CONVENTIONS: Mapping[str, Convention] = {
    "gptq-asym": Convention(_fit_gptq_asym, _full_range, "code"),
    "gptq-sym": Convention(_fit_gptq_sym, _full_range, "constant"),
    "awq-asym": Convention(_fit_awq_asym, _full_range, "code"),
    "smoothquant-sym": Convention(_fit_smoothquant_sym, _symmetric_range, "constant"),
    "quarot-sym": Convention(_fit_quarot_sym, _full_range, "constant"),
    "deepspeed-sym": Convention(_fit_deepspeed_sym, _full_range, "constant"),
    "deepspeed-asym": Convention(_fit_deepspeed_asym, _full_range, "real", round_sum=True),
    "spqr-asym": Convention(_fit_spqr_asym, _full_range, "real", round_sum=True),
    "intactkv-asym": Convention(_fit_intactkv_asym, _full_range, "code"),
    "minmax-asym": Convention(_fit_minmax_asym, _full_range, "real"),
}

SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def check_bits(field: str, bits: object, way_out: str, lowest: int = 2, highest: int = 8) -> None:
    """Raise UserError for a number of bits that a field cannot have. way_out: what else can be done."""
    if not (isinstance(bits, int) and lowest <= bits <= highest):
        raise UserError(f"{field}={bits} is not supported; use {lowest} to {highest}, or {way_out}")


@dataclass(frozen=True)
class UniformGrid:
    """Evenly spaced levels per group of consecutive channels.

    bits: 2 to 8. group_size: channels per group along the last axis; −1 takes the whole row as one group.
    convention: a row of `CONVENTIONS`. clip_search: GPTQ's search for a smaller range (2.4-norm, 80 candidates).
    scale_dtype: what scales are stored in; they are rounded to it before the codes are computed.
    """

    bits: int
    group_size: int = -1
    convention: str = "gptq-asym"
    clip_search: bool = False
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_bits("bits", self.bits, "leave the recipe out for full precision")
        if self.group_size != -1 and self.group_size < 1:
            raise UserError(
                f"group_size={self.group_size} is not allowed; use a positive divisor of the input "
                "channels, or -1 for one group per row"
            )
        if self.convention not in CONVENTIONS:
            raise UserError(f"unknown convention {self.convention!r}; choose from {', '.join(CONVENTIONS)}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise UserError(f"unknown scale_dtype {self.scale_dtype!r}; choose from {', '.join(SCALE_DTYPES)}")

    @property
    def rule(self) -> Convention:
        """The convention's row."""
        return CONVENTIONS[self.convention]

    @property
    def top(self) -> int:
        """The largest code."""
        return self.rule.top(self.bits)


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix on its grid.

    codes: (rows, channels) uint8, 0…grid.top. scale: (rows, groups), in the grid's scale dtype.
    zero_point: (rows, groups) float32, integers unless the convention's zero point is real.
    group_index: (channels,) int32, the group of every channel, where groups are not runs of neighbours (GPTQ's
    activation order without static groups); None where they are.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    grid: UniformGrid
    group_index: Tensor | None = None
    kind: ClassVar[str] = "uniform"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Real values s·(q − z), computed in float32: (rows, channels)."""
        if self.group_index is not None:
            of_channel = self.group_index.long()
            return ((self.codes.float() - self.zero_point[:, of_channel]) * self.scale.float()[:, of_channel]).to(dtype)
        codes = split_groups(self.codes, self.grid.group_size).float()
        return merge_groups((codes - self.zero_point[..., None]) * self.scale.float()[..., None]).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: `codes` (packed), `scale`, `zero_point` as its convention says, `group_index`.

        Integer zero points are packed like codes, real ones stay float32, constant ones follow from the grid.
        """
        stored = {"codes": pack_codes(self.codes, self.grid.bits), "scale": self.scale}
        if self.grid.rule.zero_point == "code":
            stored["zero_point"] = pack_codes(self.zero_point.to(torch.uint8), self.grid.bits)
        elif self.grid.rule.zero_point == "real":
            stored["zero_point"] = self.zero_point
        if self.group_index is not None:
            stored["group_index"] = self.group_index
        return stored

    def header(self) -> dict[str, Any]:
        """What `tensors` does not tell: the grid and the number of channels."""
        return asdict(self.grid) | {"channels": self.codes.shape[1]}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> "QuantizedTensor":
        """Undo `tensors` and `header`."""
        fields = dict(header)
        channels = fields.pop("channels")
        grid = UniformGrid(**fields)
        scale = tensors["scale"]
        if grid.rule.zero_point == "code":
            zero_point = unpack_codes(tensors["zero_point"], grid.bits, scale.shape[-1]).float()
        elif grid.rule.zero_point == "real":
            zero_point = tensors["zero_point"]
        else:
            zero_point = constant_zero_point(grid).to(scale.device).expand(scale.shape)
        codes = unpack_codes(tensors["codes"], grid.bits, channels)
        return cls(codes, scale, zero_point, grid, tensors.get("group_index"))


def constant_zero_point(grid: UniformGrid) -> Tensor:
    """The zero point (1,) of a convention where it follows from the bits."""
    one = torch.ones(1)
    return grid.rule.fit(-one, one, grid.bits).zero_point


def split_groups(x: Tensor, group_size: int, name: str = "tensor") -> Tensor:
    """View (..., channels) as (..., groups, group_size); no group ever crosses a row.

    Raises UserError if the group size does not divide the number of channels.
    """
    channels = x.shape[-1]
    size = channels if group_size == -1 else group_size
    if channels % size:
        raise UserError(
            f"{name}: group_size={size} does not divide its {channels} input channels; use a divisor of "
            f"{channels}, or -1 for one group per row"
        )
    return x.unflatten(-1, (channels // size, size))


def merge_groups(x: Tensor) -> Tensor:
    """Undo `split_groups`: (..., groups, group_size) to (..., channels)."""
    return x.flatten(-2)


def fit(groups: Tensor, grid: UniformGrid) -> Fit:
    """Scale and zero point for every group of (..., group_size), float32: each (..., 1)."""
    # Not aminmax: it has no gradient in torch 2.11.
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best = _stored(grid.rule.fit(low, high, grid.bits), grid)
    if not grid.clip_search:
        return best
    best_error = _clip_error(groups, best, grid)
    for i in range(1, int(CLIP_SHRINK * CLIP_STEPS)):
        keep = 1 - i / CLIP_STEPS
        candidate = _stored(grid.rule.fit(low * keep, high * keep, grid.bits), grid)
        error = _clip_error(groups, candidate, grid)
        better = error < best_error
        best = Fit(*(torch.where(better, new, old) for new, old in zip(candidate, best, strict=True)))
        best_error = torch.where(better, error, best_error)
    return best


def _stored(fitted: Fit, grid: UniformGrid) -> Fit:
    """Round the scale to the dtype it is stored in, so that the codes fit the scale that will be read back."""
    dtype = SCALE_DTYPES[grid.scale_dtype]
    if dtype == torch.float32:
        return fitted
    # A scale below the smallest half-precision number would become 0 and divide by 0.
    scale = fitted.scale.to(dtype).float().clamp_min(torch.finfo(dtype).tiny)
    if grid.rule.zero_point != "real":
        return Fit(scale, fitted.zero_point)
    zero_point = fitted.zero_point * fitted.scale / scale  # the offset s·z stays: it may be many steps from 0
    return Fit(scale, zero_point if grid.rule.round_sum else torch.round(zero_point))


def _clip_error(groups: Tensor, fitted: Fit, grid: UniformGrid) -> Tensor:
    restored = (encode(groups, fitted, grid) - fitted.zero_point) * fitted.scale
    return (restored - groups).abs_().pow_(CLIP_NORM).sum(-1, keepdim=True)


def fit_finite(groups: Tensor, grid: UniformGrid, name: str) -> Fit:
    """`fit`. Raises UserError if a value is too large for the grid's scales."""
    fitted = fit(groups, grid)
    if not torch.isfinite(fitted.scale).all():
        raise UserError(f"{name} holds values up to {groups.abs().max():.3g}, too large for {grid.scale_dtype} scales")
    return fitted


def finite(weight: Tensor, name: str) -> Tensor:
    """The weight itself. Raises UserError if it holds NaN or infinity."""
    if not is_finite(weight):  # files are looked at where they are read: what was made of them is too large
        dtype = str(weight.dtype).removeprefix("torch.")
        raise UserError(f"{name} holds values that are not finite in {dtype}; convert the checkpoint to a wider dtype")
    return weight


def encode(groups: Tensor, fitted: Fit, grid: UniformGrid) -> Tensor:
    """Codes of (..., group_size) float32 values on a fitted grid, as float32 integers 0…grid.top."""
    steps = groups / fitted.scale  # the rest happens in its memory
    if grid.rule.round_sum:
        return steps.add_(fitted.zero_point).round_().clamp_(0, grid.top)
    return steps.round_().add_(fitted.zero_point).clamp_(0, grid.top)


def fake_quantize(x: Tensor, grid: UniformGrid) -> Tensor:
    """Round every group of x to its own grid and map it back to real values.

    x: (..., channels), any float dtype. Returns the shape and dtype of x; the arithmetic is float32.
    Raises UserError if the group size does not divide the number of channels.
    """
    groups = split_groups(x.float(), grid.group_size)
    fitted = fit(groups, grid)
    return merge_groups(encode(groups, fitted, grid).sub_(fitted.zero_point).mul_(fitted.scale)).to(x.dtype)


def quantize(weight: Tensor, grid: UniformGrid, name: str = "weight") -> QuantizedTensor:
    """Put a (rows, channels) matrix on its grid. Raises UserError if the group size does not divide the channels, or
    if the matrix holds a value that is not finite, or too large for the grid's scales."""
    groups = split_groups(finite(weight, name).float(), grid.group_size, name)
    fitted = fit_finite(groups, grid, name)
    codes = merge_groups(encode(groups, fitted, grid)).to(torch.uint8)
    return QuantizedTensor(
        codes, fitted.scale[..., 0].to(SCALE_DTYPES[grid.scale_dtype]), fitted.zero_point[..., 0], grid
    )
