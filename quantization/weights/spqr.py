"""SpQR (Dettmers et al., ICLR 2024, arXiv:2306.03078): GPTQ with tiny groups and a few weights left nearly exact.

    s = (hi − lo)/(2^b − 1),  z = −lo/s,  q = round(w/s + z),  ŵ = s·(q − z)       section 4.1; z is a real number
    s, z on the same kind of grid over tiles of `scale_group` rows                 bilevel quantization
    T = τ · mean_j Var(W_:j)/u_j²,   e = (w − ŵ)/u_c,   outlier: e² > T            section 4.1; u = diag U, U as in GPTQ
    b̄ = b_w + (b_s + b_z)/β₁ + 64/(β₁β₂) + 32·r                                    Eq. 9 (r: share of outliers)

`fit_groups` makes the grids of the next β₁ channels, without what `leave_one_out_gain` finds likely to be an outlier;
`spqr` is one matrix, and its stored form is `quantization.grids.sparse.SpQRWeight`.

Departs from the reference: an outlier is its rounded value plus a half-precision correction, so that its error is that
correction's rounding error instead of 0 and the stored matrix is the simulated one bit for bit; codes of scales and
zero points are computed for second-level grids that are rounded to half precision already; a group of (nearly) equal
values gets a range that includes 0 instead of −1…1, a tile of equal scales is stored exactly; inputs that no token ever
feeds keep H_jj = λ, in H's own unit, instead of 1; leave-one-out takes three grids per group instead of β₁.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from corpora.errors import UserError
from quantization.grids.sparse import SMALLEST_SCALE, SecondLevel, SparseRows, SpQRWeight, first_level
from quantization.grids.uniform import TINY, Fit, UniformGrid, check_bits, encode, finite, split_groups
from quantization.kernels.columns import Levels
from quantization.model.blocks import DecoderBlock
from quantization.weights.base import GridQuantizer
from quantization.weights.gptq import column_loop, inverse_factor, quantize_sets

__all__ = ["SpQR", "average_bits", "fit_first", "fit_groups", "fit_second", "leave_one_out_gain", "spqr"]

log = logging.getLogger(__name__)

FARTHEST = 2.0**15  # the largest |z|, in steps; half precision, which zero points are stored in, ends at 2^16
TOLERANCE = 0.005  # bits; the papers print two decimals
TRIALS = 20  # of the threshold; a handful is usual
FIRST_THRESHOLD = 0.25  # the published one at 3 bits


@dataclass(frozen=True)
class SpQR(GridQuantizer):
    """Second-order rounding on bilevel grids, with outliers.

    grid: of the weights; its group size is β₁. scale_bits, zero_bits, scale_group: the second level, β₂ rows share one
    of its grids. threshold: τ; inf for no outliers. average_bits: if not 0, τ is searched for this b̄ instead, once for
    every set of linears that read the same input. damp: λ as a share of mean diag H. act_order: channels in the order
    of falling diag H. simplified: grids are fitted on whole groups, without leave-one-out. true_sequential: see GPTQ.
    """

    grid: UniformGrid
    scale_bits: int = 3
    zero_bits: int = 3
    scale_group: int = 16
    threshold: float = field(default=0.25, metadata={"infinite": True})
    average_bits: float = 0.0
    damp: float = 0.01
    act_order: bool = True
    simplified: bool = False
    true_sequential: bool = False
    name: ClassVar[str] = "spqr"

    def __post_init__(self) -> None:
        if self.grid != UniformGrid(self.grid.bits, self.grid.group_size, "spqr-asym"):
            raise UserError(
                f"weights.grid={self.grid} is not SpQR's: it has the convention spqr-asym, no clip search, and half "
                "precision in its second level only; set weights.grid.bits and weights.grid.group_size alone"
            )
        if self.grid.group_size == 1:
            raise UserError("weights.grid.group_size=1 is not allowed: SpQR fits grids to a group without one weight")
        for name, bits in (("scale_bits", self.scale_bits), ("zero_bits", self.zero_bits)):
            check_bits(f"weights.{name}", bits, "leave it out for 3, as published")
        if self.scale_group < 1:
            raise UserError(f"weights.scale_group={self.scale_group} is not allowed; give a number of rows, such as 16")
        if self.average_bits < 0:
            raise UserError(f"weights.average_bits={self.average_bits:g} is not allowed; give bits, 0 for none asked")
        if not self.threshold >= 0:
            raise UserError(f"weights.threshold={self.threshold:g} is not allowed; give 0 or more, inf for no outliers")
        if not self.damp > 0:
            raise UserError(f"weights.damp={self.damp:g} is not allowed; give a positive share, 0.01 as published")

    def check(self, block: DecoderBlock) -> None:
        """Groups must fill every row, tiles every column; average bits must be reachable. Raises UserError."""
        super().check(block)
        for name, linear in block.linears().items():
            if linear.out_features % self.scale_group:
                raise UserError(
                    f"{block.name}.{name}: weights.scale_group={self.scale_group} does not divide its "
                    f"{linear.out_features} rows; use a divisor of {linear.out_features}"
                )
            dense = average_bits(self, linear.in_features, 0)
            if self.average_bits and not dense < self.average_bits < 16:
                raise UserError(
                    f"{block.name}.{name}: weights.average_bits={self.average_bits:g} cannot be reached; it lies "
                    f"above {dense:g}, what this grid takes without outliers, and below 16, full precision"
                )

    def quantize_block(self, block: DecoderBlock) -> Mapping[str, SpQRWeight]:
        """Every linear of the block. `figures` gets the proxy loss, the number of repaired Hessians, and numbers of
        weights, outliers and stored bits (as the paper counts them), whose ratios are averages over blocks."""
        linears = block.linears()

        def choose(
            names: tuple[str, ...], weight: Tensor, hessian: Tensor, name: str
        ) -> tuple[dict[str, SpQRWeight], float, int]:
            rows = [linears[linear].out_features for linear in names]
            whole, loss, repairs = spqr(weight, hessian, self, rows=rows, name=name)
            ranges = pairwise(accumulate(rows, initial=0))
            return {linear: whole.rows(*range_) for linear, range_ in zip(names, ranges, strict=True)}, loss, repairs

        quantized = quantize_sets(block, self.true_sequential, choose)
        for name, stored in quantized.items():
            outliers = stored.corrections.values.numel()
            block.report(weights=linears[name].weight.numel(), outliers=outliers, bits=stored.counted_bits())
        return quantized


def average_bits(how: SpQR, channels: int, outlier_rate: float) -> float:
    """b̄ of a matrix with that many input channels. Not counted: row pointers, 32/in, and channel order, 16/out."""
    size = channels if how.grid.group_size == -1 else how.grid.group_size
    second_level = (how.scale_bits + how.zero_bits) / size + 64 / (size * how.scale_group)
    return how.grid.bits + second_level + 32 * outlier_rate


def fit_first(low: Tensor, high: Tensor, grid: UniformGrid) -> Fit:
    """Scale and zero point of groups that span low…high, both of that shape; scale 0 for a group of zeros.

    Where z would lie beyond what its stored form can hold, the values are equal but for rounding: their range is
    extended to include 0, which makes the end that is farther from 0 a level.
    """
    equal = (high - low) * FARTHEST <= grid.top * torch.maximum(low.abs(), high.abs())
    low, high = torch.where(equal, low.clamp_max(0), low), torch.where(equal, high.clamp_min(0), high)
    scale, zero_point = grid.rule.fit(low, high, grid.bits)
    zeros = high - low < TINY
    return Fit(scale.masked_fill(zeros, 0), zero_point.masked_fill(zeros, 0))


def fit_second(values: Tensor, rows: int, bits: int) -> SecondLevel:
    """Put numbers, one per row (out,), on the grids of their tiles of `rows` rows.

    A tile whose range has no half-precision scale or zero point counts as equal: scale 1, zero point −lo.
    """
    tiles = values.unflatten(0, (-1, rows))
    low, high = tiles.aminmax(dim=1)
    top = 2**bits - 1
    scale = ((high - low) / top).half()
    zero_point = (-low / scale.float()).half()
    equal = (scale == 0) | ~torch.isfinite(zero_point)
    scale, zero_point = scale.masked_fill(equal, 1), torch.where(equal, (-low).half(), zero_point)
    codes = torch.round(tiles / scale.float()[:, None] + zero_point.float()[:, None]).clamp(0, top)
    return SecondLevel(codes.flatten().to(torch.uint8), scale, zero_point)


def leave_one_out_gain(group: Tensor, pivots: Tensor, grid: UniformGrid) -> Tensor:
    """What the weighted squared error of a group loses if one of its weights is taken out, for each: (β₁, out).

    gain_j = Σ_k (err_k/u_k)² with a grid for all − Σ_{k≠j} (err′_k/u_k)² with a grid for all but j
    group: (β₁, out). pivots: u of these channels, (β₁, 1). First level only. The grid changes with the smallest or the
    largest weight alone, so for the others the gain is their own error.
    """
    low, at_low = group.min(dim=0)
    high, at_high = group.max(dim=0)
    next_low = group.scatter(0, at_low[None], torch.inf).amin(dim=0)
    next_high = group.scatter(0, at_high[None], -torch.inf).amax(dim=0)

    def squared_errors(low: Tensor, high: Tensor) -> Tensor:
        fitted = fit_first(low, high, grid)
        fitted = Fit(fitted.scale.clamp_min(SMALLEST_SCALE), fitted.zero_point)
        restored = (encode(group, fitted, grid) - fitted.zero_point) * fitted.scale
        return ((restored - group) / pivots).square_()

    errors = squared_errors(low, high)
    total, gain = errors.sum(dim=0), errors
    for at, without in (
        (at_low[None], squared_errors(next_low, high)),
        (at_high[None], squared_errors(low, next_high)),
    ):
        rest = without.scatter(0, at, 0.0).sum(dim=0)  # not total minus one term: that term can dwarf the others
        gain = gain.scatter(0, at, (total - rest)[None])
    return gain


def fit_groups(group: Tensor, pivots: Tensor, limit: Tensor | None, how: SpQR) -> tuple[SecondLevel, SecondLevel]:
    """Scales and zero points of one group of channels, for every row, as they are stored.

    group: (β₁, out), current weights. pivots: (β₁, 1). limit: T of every row, (out,); None for no outliers. Likely
    outliers count as the mean of the rest of their group.
    """
    if limit is not None and not how.simplified:
        kept = leave_one_out_gain(group, pivots, how.grid) <= limit
        mean = (group * kept).sum(dim=0) / kept.sum(dim=0).clamp_min(1)
        group = torch.where(kept, group, mean)
    scale, zero_point = fit_first(*group.aminmax(dim=0), how.grid)
    tiles = scale.unflatten(0, (-1, how.scale_group))
    smallest = torch.where(tiles > 0, tiles, torch.inf).amin(dim=1, keepdim=True)
    # A group of zeros takes any scale: one that does not widen the range of its tile.
    scale = torch.where(tiles > 0, tiles, torch.where(smallest < torch.inf, smallest, 0.0)).flatten()
    return fit_second(scale, how.scale_group, how.scale_bits), fit_second(zero_point, how.scale_group, how.zero_bits)


@dataclass(frozen=True)
class Problem:
    """A matrix that is ready for the loop. w: (in, out) float32, channels in processing order. factor: U, (in, in).
    unit: T of every row at τ = 1, (out,). order: (in,), or None."""

    w: Tensor
    factor: Tensor
    unit: Tensor
    order: Tensor | None


def spqr(
    weight: Tensor, hessian: Tensor, how: SpQR, *, rows: list[int] | None = None, name: str = "weight"
) -> tuple[SpQRWeight, float, int]:
    """One matrix: its stored form, its loss ‖E‖², and how often the damping grew.

    weight: (out, in). hessian: (in, in) float32, overwritten. rows: of each linear, if several that read the same input
    are stacked; T is each one's own. Raises UserError for weights that are not finite, or too large for half-precision
    scales, and for a Hessian without a factor.
    """
    # (in, out) float32: a channel is a contiguous row. Copied once, because stacked linears are large.
    w = torch.empty(weight.T.shape, device=weight.device).copy_(finite(weight, name).T)
    split_groups(weight, how.grid.group_size, name)  # refuses groups that do not fill a row
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if dead.all():  # the weights stay, to be rounded as they are
        diagonal.fill_(1.0)
    else:
        w[dead] = 0  # no token ever fed them
    order = torch.argsort(diagonal, descending=True, stable=True) if how.act_order else None
    if order is not None:
        w = w.index_select(0, order)
    factor, repairs = inverse_factor(hessian, how.damp, name, order)
    del hessian, diagonal
    weighted = factor.diagonal().square()
    unit = [(part.var(dim=1) / weighted).mean().expand(part.shape[1]) for part in w.split(rows or w.shape[1], dim=1)]
    problem = Problem(w, factor, torch.cat(unit), order)
    if how.average_bits:
        stored, loss = search(problem, how, name)
    else:
        stored, loss = round_all(problem, how, how.threshold, name)
    return stored, loss, repairs


def round_all(problem: Problem, how: SpQR, threshold: float, name: str) -> tuple[SpQRWeight, float]:
    """The column loop with one threshold τ: the stored form and the loss."""
    channels, out = problem.w.shape
    size = channels if how.grid.group_size == -1 else how.grid.group_size
    pivots = problem.factor.diagonal()[:, None]  # u, (in, 1)
    limit = None if math.isinf(threshold) else threshold * problem.unit
    w = problem.w.clone()
    codes = torch.empty(channels, out, dtype=torch.uint8, device=w.device)
    corrections = torch.zeros(channels, out, dtype=torch.float16, device=w.device)
    fitted: list[tuple[SecondLevel, SecondLevel]] = []
    in_group = torch.zeros(size, dtype=torch.int32, device=w.device)

    def levels(first: int, last: int) -> Levels:
        if first % size == 0:
            fitted.append(fit_groups(w[first : first + size], pivots[first : first + size], limit, how))
        scale, zero_point = first_level(*fitted[-1])
        rule = how.grid.rule
        return Levels(scale[None], zero_point[None], in_group[: last - first], how.grid.top, rule.round_sum, limit)

    loss = float(column_loop(w, problem.factor, levels, codes, corrections, run=size))
    if not math.isfinite(loss):
        raise UserError(f"{name} holds values up to {problem.w.abs().max():.3g}, too large for half-precision scales")
    sparse = SparseRows.from_dense(corrections.T)
    order = None if problem.order is None else problem.order.to(sparse.columns.dtype)
    scales, zero_points = (stacked(parts) for parts in zip(*fitted, strict=True))
    return (
        SpQRWeight(
            codes.T.contiguous(), scales, zero_points, sparse, order, how.grid.bits, how.scale_bits, how.zero_bits
        ),
        loss,
    )


def stacked(parts: tuple[SecondLevel, ...]) -> SecondLevel:
    """The second level of all groups, (groups, …), from that of each."""
    return SecondLevel(*(torch.stack([getattr(p, f) for p in parts]) for f in ("codes", "scale", "zero_point")))


def search(problem: Problem, how: SpQR, name: str) -> tuple[SpQRWeight, float]:
    """`round_all` with the threshold that takes `how.average_bits`, to `TOLERANCE` where single outliers allow it.

    The share of outliers falls as τ rises, about as τ⁻¹·⁵: this law proposes the next τ, and the interval between those
    that took too many and too few outliers is halved where the law would leave it.
    """
    channels, out = problem.w.shape
    wanted = (how.average_bits - average_bits(how, channels, 0)) / 32 * channels * out
    low, high, exponent = -math.inf, math.inf, math.log2(FIRST_THRESHOLD)
    best: tuple[SpQRWeight, float] | None = None
    missed, threshold = math.inf, FIRST_THRESHOLD
    for _ in range(TRIALS):
        found = round_all(problem, how, 2.0**exponent, name)
        outliers = found[0].corrections.values.numel()
        if abs(outliers - wanted) < missed:
            best, missed, threshold = found, abs(outliers - wanted), 2.0**exponent
        if missed <= max(TOLERANCE / 32 * channels * out, 0.5):
            break
        low, high = (exponent, high) if outliers > wanted else (low, exponent)
        exponent += math.log2(max(outliers, 0.5) / max(wanted, 0.5)) / 1.5
        if not low < exponent < high:
            exponent = (low + high) / 2
    assert best is not None
    reached = average_bits(how, channels, best[0].corrections.values.numel() / (channels * out))
    log.info("%s: %.3f bits with the threshold %.4g", name, reached, threshold)
    return best
