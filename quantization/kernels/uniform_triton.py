"""Start the Triton kernels of `uniform_kernels`: which one for how many rows, and with what tiles."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from quantization.kernels.uniform_kernels import (
    dequantize_kernel,
    few_rows_kernel,
    scale_kernel,
    some_rows_kernel,
    sum_kernel,
    turn_kernel,
)

__all__ = ["Codes", "DotTile", "Tile", "dequantized", "few_rows", "multiply", "some_rows"]

FEW, SOME = 4, 64  # rows up to which the kernels without and with tensor cores are taken
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of inputs
DENSE = 64  # outputs that a program dequantizes, a unit of each


@dataclass(frozen=True, eq=False)
class Codes:
    """What the tensors of `uniform.Uniform.prepare` do not tell: per_group units share a scale; zero_point: of all
    groups, where it is one number."""

    bits: int
    channels: int
    outputs: int
    per_group: int
    zero_point: float | None
    started: dict[tuple[Any, ...], Callable[..., None]] = field(default_factory=dict)  # kernels, by what they depend on


@dataclass(frozen=True)
class Tile:
    """How `few_rows_kernel` is started: outputs · tiles outputs of a program, warps, stages of loads."""

    outputs: int = 16
    tiles: int = 2
    warps: int = 8
    stages: int = 1
    scaled: bool = False
    ahead: bool = False

    @property
    def units(self) -> int:
        """Units that are read at a time: a thread has four outputs of one, in every tile."""
        return max(1, self.warps * 128 // self.outputs)


@dataclass(frozen=True)
class DotTile:
    """How `some_rows_kernel` is started: outputs of a program, units that are read at a time, warps, stages of loads;
    inputs are split so that there are about so many programs."""

    outputs: int = 64
    units: int = 16
    warps: int = 4
    stages: int = 1
    programs: int = 528
    aligned: bool = False


def multiply(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, codes: Codes) -> Tensor:
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
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(x):  # Triton starts kernels on the current device
            _start(x, tensors, bias, y, codes, rows)
    else:
        _start(x, tensors, bias, y, codes, rows)
    return y


def _start(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, y: Tensor, codes: Codes, rows: int) -> None:
    if rows <= FEW:
        few_rows(x, tensors, bias, y, codes, rows)
    else:
        some_rows(x, tensors, bias, y, codes, rows, DotTile())


def tile_of(codes: Codes, rows: int) -> Tile:
    """What was fastest: with few outputs more threads share one, so that all of the GPU has work."""
    if rows > 1:
        return Tile(16, 2 if rows < 4 else 1, 8)
    return Tile(16, 2, 16) if codes.outputs <= 8192 else Tile(16, 4, 8)


def few_rows(
    x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, y: Tensor, codes: Codes, rows: int,
    tile: Tile | None = None,
) -> None:  # fmt: skip
    """y = x Ŵᵀ + b by `few_rows_kernel`. tile: another one than is taken for the codes.

    Triton looks at every argument of every call to find the compiled kernel, and asks the driver for every pointer,
    which takes longer than a small product. What it would look at is the key of `codes.started`; pointers are
    multiples of 16.
    """
    words, device = tensors["words"], x.get_device()
    key = (rows, x.dtype, device, words.get_device(), bias is None, tile)
    again = codes.started.get(key)
    if again is not None:
        again(x, tensors, bias, y)
        return
    tile = tile or tile_of(codes, rows)
    units, size = words.shape[0], rows * words.shape[0]
    constants = (units, words.shape[2], codes.outputs, rows, codes.bits, codes.per_group, codes.zero_point, tile.units,
                 tile.outputs, tile.tiles, tile.stages, tile.ahead)  # fmt: skip
    grid, scale_grid = (words.shape[2] // (tile.outputs * tile.tiles), 1, 1), (triton.cdiv(size, 16), 1, 1)
    fixed = (words, tensors["scale"], tensors.get("zero_point"), bias, y, *constants)
    if tile.scaled:
        scaled, sums = _scratch(x, rows, units)
        scale_run = scale_kernel[scale_grid](x, scaled, sums, size, codes.bits, 16, num_warps=1)
        run = few_rows_kernel[grid](scaled, sums, *fixed, num_warps=tile.warps)
    else:
        scale_run, run = None, few_rows_kernel[grid](x, None, *fixed, num_warps=tile.warps)
    if run is None:  # by the interpreter nothing is compiled
        return
    start, start_scaling = run[grid], None if scale_run is None else scale_run[scale_grid]

    def started(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, y: Tensor) -> None:
        zero, stream = tensors.get("zero_point"), torch._C._cuda_getCurrentRawStream(device)
        inputs, sums = x.data_ptr(), None
        if start_scaling is not None:
            scaled, unit_sums = _scratch(x, rows, units)
            start_scaling(inputs, scaled.data_ptr(), unit_sums.data_ptr(), size, codes.bits, 16, stream=stream)
            inputs, sums = scaled.data_ptr(), unit_sums.data_ptr()
        start(
            inputs, sums, tensors["words"].data_ptr(), tensors["scale"].data_ptr(), zero if zero is None else
            zero.data_ptr(), bias if bias is None else bias.data_ptr(), y.data_ptr(), *constants, stream=stream,
        )  # fmt: skip

    codes.started[key] = started


def _scratch(x: Tensor, rows: int, units: int) -> tuple[Tensor, Tensor]:
    """Room for scaled inputs, and for the sums of their units."""
    return torch.empty(rows, units, 32, device=x.device), torch.empty(rows, units, device=x.device)


def some_rows(
    x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, y: Tensor, codes: Codes, rows: int, tile: DotTile
) -> None:  # fmt: skip
    """y = x Ŵᵀ + b by `some_rows_kernel`, of inputs that are turned before, and the sum of its splits."""
    words = tensors["words"]
    units, padded = words.shape[0], max(16, triton.next_power_of_2(rows))
    steps, programs = -(-units // tile.units), words.shape[2] // tile.outputs
    per_split = -(-steps // max(1, min(tile.programs // programs, steps)))
    splits, filled = -(-steps // per_split), steps * tile.units
    turned = torch.empty(padded, 32, filled, dtype=x.dtype, device=x.device)
    turn_kernel[(triton.cdiv(filled, 32), padded)](x, turned, rows, units, filled, UNITS=32, num_warps=1)
    parts = torch.empty(splits, rows, codes.outputs, dtype=torch.float32, device=x.device)
    some_rows_kernel[(programs, splits)](
        turned, words, tensors["scale"], tensors.get("zero_point"), parts, rows, units, filled, words.shape[2],
        codes.outputs, per_split,
        BITS=codes.bits, PER=codes.per_group, ZERO=codes.zero_point, ROWS=padded,
        UNITS=tile.units, OUTPUTS=tile.outputs, STAGES=tile.stages, PRECISION="ieee", ALIGNED=tile.aligned,
        num_warps=tile.warps,
    )  # fmt: skip
    sum_kernel[(triton.cdiv(y.numel(), 1024),)](parts, bias, y, splits, y.numel(), codes.outputs, BLOCK=1024)


def dequantized(tensors: Mapping[str, Tensor], codes: Codes, dtype: torch.dtype) -> Tensor:
    """Ŵ, (outputs, channels): a view of its transpose."""
    words = tensors["words"]
    dense = torch.empty(codes.channels, words.shape[2], dtype=dtype, device=words.device)
    with torch.cuda.device_of(words):
        dequantize_kernel[(words.shape[0], triton.cdiv(words.shape[2], DENSE))](
            words, tensors["scale"], tensors.get("zero_point"), dense, words.shape[2],
            BITS=codes.bits, PER=codes.per_group, ZERO=codes.zero_point, OUTPUTS=DENSE, num_warps=DENSE // 128 or 1,
        )  # fmt: skip
    return dense[:, : codes.outputs].T
