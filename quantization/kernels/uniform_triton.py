"""Start the Triton kernels of `uniform_kernels`: which one for how many rows, and with what tiles."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from quantization.kernels.launch import start
from quantization.kernels.uniform_kernels import (
    dequantize_kernel,
    few_rows_kernel,
    scale_kernel,
    some_rows_kernel,
    sum_kernel,
    turn_kernel,
)

__all__ = ["DotTile", "Tile", "UniformCodes", "dequantized", "few_rows", "multiply", "some_rows"]

FEW, SOME = 4, 16  # rows up to which the kernels without and with tensor cores are taken
PROGRAMS = 768  # that share the inputs of a large matrix of 2 or 3 bits: six for each of an H200's processors
LARGE = 2**27  # weights from which on operations count, not bytes or starts
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of inputs
SUMMED = 256  # results that a program sums over the splits
DENSE = 64  # outputs that a program dequantizes, a unit of each


@dataclass(frozen=True, eq=False)
class UniformCodes:
    """What the tensors of `uniform.Uniform.prepare` do not tell: per_group units share a scale; zero_point: of all
    groups, where it is one number."""

    bits: int
    channels: int
    outputs: int
    per_group: int
    zero_point: float | None
    plans: dict[Any, Any] = field(default_factory=dict)  # how products are started, by rows and tile


@dataclass(frozen=True)
class Tile:
    """How `few_rows_kernel` is started: outputs · tiles outputs of a program, warps, stages of loads; scaled: with
    inputs that are scaled ahead; ahead: with words that are read ahead; splits: of the inputs."""

    outputs: int = 16
    tiles: int = 2
    warps: int = 8
    stages: int = 1
    scaled: bool = False
    ahead: bool = False
    splits: int = 1

    @property
    def units(self) -> int:
        """Units that are read at a time: a thread has four outputs of one, in every tile."""
        return max(1, self.warps * 128 // self.outputs)


@dataclass(frozen=True)
class DotTile:
    """How `some_rows_kernel` is started: outputs of a program, units that are read at a time, warps, stages of loads;
    inputs are split so that there are about so many programs; aligned: with codes that are shifted to bit 0."""

    outputs: int = 64
    units: int = 32
    warps: int = 4
    stages: int = 2
    programs: int = 792
    aligned: bool = False


def multiply(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, codes: UniformCodes) -> Tensor:
    """x Ŵᵀ + b: (..., channels) to (..., outputs), of any float dtype."""
    rows = x.numel() // codes.channels
    order = tensors.get("order")
    if order is not None:
        x = x.index_select(-1, order)
    others = rows == 0 or rows > SOME or x.dtype not in DTYPES
    if others or (x.requires_grad and torch.is_grad_enabled()):
        return torch.nn.functional.linear(x, dequantized(tensors, codes, x.dtype), bias)
    if not x.is_contiguous() or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    y = x.new_empty(x.shape[:-1] + (codes.outputs,))  # noqa: RUF005 — unpacking a shape takes longer
    if rows <= FEW:
        few_rows(x, tensors, bias, y, codes, rows)
    else:
        some_rows(x, tensors, bias, y, codes, rows)
    return y


def tile_of(codes: UniformCodes, rows: int) -> Tile:
    """What was fastest on an H200, by shape, bits and rows.

    In a large matrix the operations count, so inputs are scaled ahead, by a kernel of their own, and words are read
    ahead. In a small one time counts. With few outputs more threads share one, so that all of the GPU has work.
    """
    large, many = codes.outputs * codes.channels >= LARGE, codes.outputs > 8192
    if rows > 1:
        return Tile(16, 2, 4, scaled=True) if large else Tile(16, 2 if rows < 4 else 1, 8)
    if codes.bits == 8 and large:
        return Tile(16, 2, 4, stages=3)
    if not large:
        return Tile(32, 2, 4, stages=3) if many and codes.bits < 8 else Tile(8, 2, 8)
    if codes.bits == 4:
        return Tile(32 if codes.outputs >= 2**15 else 16, 2, 8, scaled=True, ahead=True)
    return Tile(32, 2, 4, scaled=True, ahead=True, splits=max(1, min(8, PROGRAMS * 64 // codes.outputs)))


def dot_tile_of(codes: UniformCodes, dtype: torch.dtype) -> DotTile:
    """What was fastest on an H200 with 16 rows in half precision. What takes more room has one stage."""
    large, wide = codes.outputs * codes.channels >= LARGE, codes.bits == 8 or dtype == torch.float32
    return DotTile(aligned=codes.bits < 4 and large, stages=1 if wide else 2)


class FewRows(NamedTuple):
    """How a product of a few rows is started; filled: units of a row that is scaled ahead."""

    tile: Tile
    filled: int
    grid: tuple[int, int, int]
    numbers: tuple[Any, ...]
    scale_grid: tuple[int, int, int]
    scale_numbers: tuple[int, ...]
    sum_grid: tuple[int, int, int]
    sum_numbers: tuple[int, ...]


class SomeRows(NamedTuple):
    """How a product of some rows is started; padded: rows, filled: units of a row, once they are turned."""

    tile: DotTile
    padded: int
    filled: int
    splits: int
    turn_grid: tuple[int, int, int]
    turn_numbers: tuple[int, ...]
    grid: tuple[int, int, int]
    numbers: tuple[Any, ...]
    sum_grid: tuple[int, int, int]
    sum_numbers: tuple[int, ...]


def few_rows(
    x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, y: Tensor, codes: UniformCodes, rows: int,
    tile: Tile | None = None,
) -> None:  # fmt: skip
    """y = x Ŵᵀ + b by `few_rows_kernel`. tile: another one than is taken for the codes."""
    words = tensors["words"]
    plan = codes.plans.get((rows, tile))
    if plan is None:
        plan = codes.plans[rows, tile] = _for_few_rows(words, codes, rows, tile or tile_of(codes, rows))
    tile, inputs, sums, result, added = plan.tile, x, None, y, bias
    if tile.scaled:
        inputs = torch.empty(rows, plan.filled, 32, dtype=torch.float32, device=x.device)
        sums = torch.empty(rows, plan.filled, dtype=torch.float32, device=x.device)
        start(scale_kernel, plan.scale_grid, (x, inputs, sums), plan.scale_numbers, 1)
    if tile.splits > 1:
        result, added = torch.empty(tile.splits, rows, codes.outputs, dtype=torch.float32, device=x.device), None
    weight = words, tensors["scale"], tensors.get("zero_point")
    start(few_rows_kernel, plan.grid, (inputs, sums, *weight, added, result), plan.numbers, tile.warps)
    if tile.splits > 1:
        start(sum_kernel, plan.sum_grid, (result, bias, y), plan.sum_numbers, 4)


def _for_few_rows(words: Tensor, codes: UniformCodes, rows: int, tile: Tile) -> FewRows:
    units, _, padded = words.shape
    per_split = -(-units // (tile.units * tile.splits)) * tile.units
    filled = per_split * tile.splits if tile.scaled else units
    size = rows * codes.outputs
    numbers = (units, filled, per_split, padded, codes.outputs, rows, codes.bits, codes.per_group, codes.zero_point,
               tile.units, tile.outputs, tile.tiles, tile.stages, tile.ahead, tile.splits > 1)  # fmt: skip
    return FewRows(
        tile, filled, (padded // (tile.outputs * tile.tiles), tile.splits, 1), numbers,
        (-(-filled // 16), rows, 1), (units, filled, codes.bits, 16),
        (-(-size // SUMMED), 1, 1), (tile.splits, size, codes.outputs, SUMMED),
    )  # fmt: skip


def some_rows(
    x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, y: Tensor, codes: UniformCodes, rows: int,
    tile: DotTile | None = None,
) -> None:  # fmt: skip
    """y = x Ŵᵀ + b by `some_rows_kernel`, of inputs that are turned before, and the sum of its splits. tile: another
    one than is taken for the codes."""
    words = tensors["words"]
    key = rows, x.dtype, tile
    plan = codes.plans.get(key)
    if plan is None:
        plan = codes.plans[key] = _for_some_rows(words, codes, rows, tile or dot_tile_of(codes, x.dtype))
    turned = torch.empty(plan.padded, 32, plan.filled, dtype=x.dtype, device=x.device)
    parts = torch.empty(plan.splits, rows, codes.outputs, dtype=torch.float32, device=x.device)
    start(turn_kernel, plan.turn_grid, (x, turned), plan.turn_numbers, 1)
    weight = words, tensors["scale"], tensors.get("zero_point")
    start(some_rows_kernel, plan.grid, (turned, *weight, parts), plan.numbers, plan.tile.warps)
    start(sum_kernel, plan.sum_grid, (parts, bias, y), plan.sum_numbers, 4)


def _for_some_rows(words: Tensor, codes: UniformCodes, rows: int, tile: DotTile) -> SomeRows:
    units, _, outputs = words.shape
    padded = max(16, triton.next_power_of_2(rows))
    steps, programs = -(-units // tile.units), outputs // tile.outputs
    per_split = -(-steps // max(1, min(tile.programs // programs, steps)))
    splits, filled, size = -(-steps // per_split), steps * tile.units, rows * codes.outputs
    numbers = (rows, units, filled, outputs, codes.outputs, per_split, codes.bits, codes.per_group, codes.zero_point,
               padded, tile.units, tile.outputs, tile.stages, "ieee", tile.aligned)  # fmt: skip
    return SomeRows(
        tile, padded, filled, splits, (-(-filled // 32), padded, 1), (rows, units, filled, 32),
        (programs, splits, 1), numbers, (-(-size // SUMMED), 1, 1), (splits, size, codes.outputs, SUMMED),
    )  # fmt: skip


def dequantized(tensors: Mapping[str, Tensor], codes: UniformCodes, dtype: torch.dtype) -> Tensor:
    """Ŵ, (outputs, channels), its channels in the order of their groups: a view of its transpose."""
    words = tensors["words"]
    units, _, outputs = words.shape
    dense = torch.empty(codes.channels, outputs, dtype=dtype, device=words.device)
    weight, grid = (words, tensors["scale"], tensors.get("zero_point")), (units, -(-outputs // DENSE), 1)
    start(dequantize_kernel, grid, (*weight, dense), (outputs, codes.bits, codes.per_group, codes.zero_point, DENSE), 1)
    return dense[:, : codes.outputs].T
