"""BCQ, binary-coding quantization: fit α, signs (and z₀) of every group of weights to the weights themselves.

    min Σ_j d_j (w_j − Σ_i α_i b_ij − z₀)²                              d_j = 1, z₀ = 0 as published
    greedy       b_i = sign(r), α_i = mean |r|, r ← r − α_i b_i          Guo et al. 2017, 1706.02021
    scale step   α ← (B D Bᵀ)⁻¹ B D w                                    Xu et al. 2018, 1802.00150: alternating
    assignment   every w_j takes the nearest of the 2^q sums             the same, by binary search

LUT-GEMM (Park et al., ICLR 2024, arXiv:2206.09557) multiplies by the result without rebuilding the weights.

`greedy`, `scale_step` and `assignment_step` work on sorted groups. All three cut a sorted group into runs of equal
codes, so running sums of the sorted weights give B D Bᵀ and B D w: a round costs 2^q searches, however long the group.

Departs from the references: α is solved for directly and in float64, with 1e-9 · Σd on the diagonal because planes can
coincide (reference: q steps of conjugate gradients); sign(0) = +1. Ours are the free offset z₀, the start from the
uniform grid of RTN, and d = diag H, the mean square of every input.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from corpora.errors import UserError
from quantization.grids.binary_coding import BinaryCoded, BinaryGrid, from_uniform, pack_planes, signs
from quantization.grids.uniform import SCALE_DTYPES, UniformGrid, finite, split_groups
from quantization.grids.uniform import fit as fit_uniform
from quantization.model.blocks import DecoderBlock
from quantization.model.routed import sum_of, with_unseen
from quantization.weights.base import GridQuantizer
from quantization.weights.gptq import GPTQ

__all__ = [
    "BCQ",
    "Coding",
    "GPTQToBCQ",
    "Runs",
    "SortedGroups",
    "assignment_step",
    "bcq",
    "codes_of",
    "fit",
    "greedy",
    "scale_step",
    "sort_groups",
    "uniform_start",
]

RIDGE = 1e-9  # of Σd, on the diagonal of the scale step's system
CHUNK = 2**20  # weights that are fitted at a time; a row is never cut


class SortedGroups(NamedTuple):
    """Groups (n, g) in rising order. order: where each weight came from. mass, moment: running sums of d and d·w that
    start with 0, (n, g + 1) float64."""

    values: Tensor
    order: Tensor
    mass: Tensor
    moment: Tensor


class Coding(NamedTuple):
    """Levels of every group, float64: alpha (n, q) ≥ 0, falling after a scale step; offset (n, 1), zeros for none."""

    alpha: Tensor
    offset: Tensor

    def levels(self) -> Tensor:
        """The 2^q sums, in the order of their codes: (n, 2^q)."""
        return self.alpha @ signs(self.alpha.shape[1], self.alpha.device).double().T + self.offset

    def rounded(self, dtype: torch.dtype) -> "Coding":
        """The levels as they will be read back from a checkpoint that keeps this dtype."""
        return Coding(self.alpha.to(dtype).double(), self.offset.to(dtype).double())


class Runs(NamedTuple):
    """Which weights of a sorted group have which code: the k-th run, from edges[k] to edges[k + 1], has codes[k].

    codes: (n, 2^q), a permutation of 0 … 2^q − 1. edges: (n, 2^q + 1), from 0 to g; runs may be empty.
    """

    codes: Tensor
    edges: Tensor


def sort_groups(groups: Tensor, importance: Tensor | None = None) -> SortedGroups:
    """Sort groups (n, g) of float32 weights; importance: d ≥ 0, broadcastable to them, or None for 1.

    A group without any importance is fitted as if all its weights were equally important.
    """
    values, order = groups.sort(dim=1)
    if importance is None:
        d = torch.ones_like(values, dtype=torch.float64)
    else:
        d = importance.double().expand(groups.shape).gather(1, order)
        d = torch.where(d.sum(1, keepdim=True) > 0, d, 1.0)
    mass, moment = (torch.nn.functional.pad(x.cumsum(1), (1, 0)) for x in (d, d * values))
    return SortedGroups(values, order, mass, moment)


def greedy(groups: SortedGroups, bits: int, offset: bool = False) -> tuple[Coding, Runs]:
    """One plane after the other: the signs of what is left, times its mean size. An offset is the mean, taken first."""
    d, total = groups.mass.diff(dim=1), groups.mass[:, -1:]
    start = groups.moment[:, -1:] / total if offset else torch.zeros_like(total)
    residual = groups.values - start
    codes, alpha = torch.zeros_like(groups.order, dtype=torch.int32), []
    for _ in range(bits):
        alpha.append((d * residual.abs()).sum(1, keepdim=True) / total)
        positive = residual >= 0
        codes = codes * 2 + positive
        residual = residual - torch.where(positive, alpha[-1], -alpha[-1])
    # Codes rise with the weights: where two first differ, their residuals differ as the weights do.
    names = torch.arange(2**bits, dtype=torch.int32, device=codes.device).expand(len(codes), -1).contiguous()
    edges = torch.searchsorted(codes, names, right=True)
    return Coding(torch.cat(alpha, dim=1), start), Runs(names.long(), torch.nn.functional.pad(edges, (1, 0)))


def uniform_start(groups: SortedGroups, bits: int) -> Coding:
    """RTN's levels s·(c − z) as a coding: α_i = s·2^(q−1−i), z₀ = s·((2^q − 1)/2 − z)."""
    scale, zero_point = (part.double() for part in fit_uniform(groups.values, UniformGrid(bits)))
    halving = 2.0 ** torch.arange(bits - 2, -2, -1, dtype=torch.float64, device=scale.device)
    return Coding(scale * halving, scale * ((2**bits - 1) / 2 - zero_point))


def scale_step(groups: SortedGroups, runs: Runs, offset: bool = False) -> Coding:
    """The α (and z₀) of least squares for given signs."""
    bits = runs.codes.shape[1].bit_length() - 1
    columns = signs(bits, runs.codes.device).double()  # (2^q, q)
    if offset:
        columns = torch.nn.functional.pad(columns, (0, 1), value=1.0)
    # Σd and Σdw of every code, out of the running sums at the edges of its run.
    mass, moment = (
        torch.zeros_like(runs.codes, dtype=torch.float64).scatter_(1, runs.codes, x.gather(1, runs.edges).diff(dim=1))
        for x in (groups.mass, groups.moment)
    )
    products = (columns[:, :, None] * columns[:, None, :]).flatten(1)
    system = (mass @ products).unflatten(1, (-1, columns.shape[1]))
    system.diagonal(dim1=1, dim2=2).add_(RIDGE * groups.mass[:, -1:])
    solved = torch.linalg.solve(system, moment @ columns)
    # Signs and order of the planes are free: the assignment chooses them anew.
    alpha = solved[:, :bits].abs().sort(dim=1, descending=True).values
    return Coding(alpha, solved[:, bits:] if offset else torch.zeros_like(alpha[:, :1]))


def assignment_step(groups: SortedGroups, coding: Coding) -> Runs:
    """Every weight to the nearest level: sorted groups are cut at the midpoints between the levels."""
    levels, codes = coding.levels().sort(dim=1)
    midpoints = ((levels[:, 1:] + levels[:, :-1]) / 2).float()
    edges = torch.nn.functional.pad(torch.searchsorted(groups.values, midpoints), (1, 1))
    edges[:, -1] = groups.values.shape[1]
    return Runs(codes, edges)


def codes_of(groups: SortedGroups, runs: Runs) -> Tensor:
    """Every weight's code, in the order that the groups had before they were sorted: (n, g) uint8."""
    position = torch.arange(groups.values.shape[1], device=groups.values.device).expand(groups.values.shape)
    run = torch.searchsorted(runs.edges[:, 1:].contiguous(), position.contiguous(), right=True)
    codes = runs.codes.gather(1, run).to(torch.uint8)
    return torch.empty_like(codes).scatter_(1, groups.order, codes)


def fit(groups: SortedGroups, grid: BinaryGrid, rounds: int, start: str = "greedy") -> tuple[Coding, Runs]:
    """Levels, as the grid's scale dtype keeps them, and codes after `rounds` of scale and assignment step.

    One plane without an offset needs no round: greedy is the best there is.
    """
    dtype = SCALE_DTYPES[grid.scale_dtype]
    if start == "uniform":
        coding = uniform_start(groups, grid.bits)
        runs = assignment_step(groups, coding)
    else:
        coding, runs = greedy(groups, grid.bits, grid.offset)
        if not rounds:
            return coding.rounded(dtype), runs
    for _ in range(rounds if grid.bits > 1 or grid.offset else 0):
        coding = scale_step(groups, runs, grid.offset)
        runs = assignment_step(groups, coding)
    coding = coding.rounded(dtype)
    return coding, assignment_step(groups, coding)


def bcq(
    weight: Tensor,
    grid: BinaryGrid,
    *,
    rounds: int = 30,
    start: str = "greedy",
    importance: Tensor | None = None,
    name: str = "weight",
) -> BinaryCoded:
    """Fit an (out, in) matrix. importance: d of every input channel, (in,), or None for 1.

    Raises UserError for groups that do not fill a row, and for weights that are not finite or too large for the scales.
    """
    channels, dtype = weight.shape[1], SCALE_DTYPES[grid.scale_dtype]
    split_groups(finite(weight, name), grid.group_size, name)
    codes, alpha, offset = [], [], []
    for rows in weight.split(max(1, CHUNK // channels)):
        d = None if importance is None else split_groups(importance, grid.group_size).repeat(len(rows), 1)
        groups = sort_groups(split_groups(rows.float(), grid.group_size).flatten(0, 1), d)
        coding, runs = fit(groups, grid, rounds, start)
        codes.append(codes_of(groups, runs).view(rows.shape))
        alpha.append(coding.alpha.to(dtype).unflatten(0, (len(rows), -1)))
        offset.append(coding.offset.to(dtype).view(len(rows), -1))
    scales, offsets = torch.cat(alpha), torch.cat(offset)  # (out, groups, q), (out, groups)
    if not (torch.isfinite(scales).all() and torch.isfinite(offsets).all()):
        raise UserError(f"{name} holds values up to {weight.abs().max():.3g}, too large for {grid.scale_dtype} scales")
    return BinaryCoded(
        pack_planes(torch.cat(codes), grid.bits, grid.group_size),
        scales.permute(1, 2, 0).contiguous(),
        offsets.T.contiguous() if grid.offset else None,
        grid,
        channels,
    )


@dataclass(frozen=True)
class BCQ(GridQuantizer):
    """Binary coding of every linear of a block, fitted to its weights.

    rounds: of scale and assignment step; 0 is greedy, 1 what LUT-GEMM's scripts call refined greedy, 30 published.
    start: "greedy", or "uniform" from RTN's levels, which have an offset (set grid.offset first). weighted: the fit
    counts the error of a weight by the mean square of its input, from calibration text.
    """

    grid: BinaryGrid
    rounds: int = 30
    start: str = "greedy"
    weighted: bool = False
    name: ClassVar[str] = "bcq"

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise UserError(f"weights.rounds={self.rounds} is not allowed; give 0 (greedy) or more, 30 as published")
        if self.start not in ("greedy", "uniform"):
            raise UserError(f"weights.start={self.start} is not known; choose greedy or uniform")
        if self.start == "uniform" and not (self.grid.offset and self.grid.bits > 1):
            raise UserError(
                "weights.start=uniform needs 2 bits or more and an offset, as uniform levels have one; put --set "
                "weights.grid.offset=true before it"
            )

    @property
    def calibrates(self) -> bool:  # type: ignore[override]  # depends on a field
        """Only the weighted fit looks at calibration text."""
        return self.weighted

    def quantize_block(self, block: DecoderBlock) -> dict[str, BinaryCoded]:
        """Every linear of the block in binary coding, by the linear's name within the block."""
        importance: dict[str, Tensor] = {}
        first_of = {name: names[0] for names in block.architecture.linears for name in names}

        def look(name: str, x: Tensor) -> None:
            if name not in first_of.values():
                return
            energy = x.float().square().sum(dim=(0, 1))
            importance[name] = importance[name] + energy if name in importance else energy

        if self.weighted:
            block.observe(look)
            importance = with_unseen(block, importance, sum_of)
        return {
            name: bcq(
                linear.weight.data,
                self.grid,
                rounds=self.rounds,
                start=self.start,
                importance=importance.get(first_of[name]),
                name=f"{block.name}.{name}",
            )
            for name, linear in block.linears().items()
        }


@dataclass(frozen=True)
class GPTQToBCQ(GPTQ):
    """GPTQ on its uniform grid, stored in binary coding: GPTQ's accuracy in the form that the LUT product reads."""

    name: ClassVar[str] = "gptq-bcq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.act_order and not self.static_groups and self.grid.group_size != -1:
            raise UserError(
                "weights.static_groups=false forms groups in activation order, which binary coding cannot store; leave "
                "it true, or --set weights.act_order=false before it"
            )

    def quantize_block(self, block: DecoderBlock) -> Mapping[str, BinaryCoded]:  # type: ignore[override]
        """Every linear of the block as GPTQ leaves it, by the linear's name within the block."""
        uniform = super().quantize_block(block)
        return {name: from_uniform(weight, f"{block.name}.{name}") for name, weight in uniform.items()}
