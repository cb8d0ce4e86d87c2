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

FEW, SOME = 4, 16  # rows up to which the kernels without and with tensor cores are taken
PROGRAMS = 768  # that share the inputs of a large matrix of 2 or 3 bits: six for each of an H200's processors
LARGE = 2**27  # weights from which on operations count, not bytes or starts
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of inputs
SUMMED = 256  # results that a program sums over the splits
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
        some_rows(x, tensors, bias, y, codes, rows, dot_tile_of(codes, x.dtype))


def tile_of(codes: Codes, rows: int) -> Tile:
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


def dot_tile_of(codes: Codes, dtype: torch.dtype) -> DotTile:
    """What was fastest on an H200 with 16 rows in half precision. What takes more room has one stage."""
    large, wide = codes.outputs * codes.channels >= LARGE, codes.bits == 8 or dtype == torch.float32
    return DotTile(aligned=codes.bits < 4 and large, stages=1 if wide else 2)


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
    again = _first_call(x, tensors, bias, y, codes, rows, tile or tile_of(codes, rows))
    if again is not None:  # by the interpreter nothing is compiled
        codes.started[key] = again


def _first_call(
    x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, y: Tensor, codes: Codes, rows: int, tile: Tile
) -> Callable[..., None] | None:
    """The product by Triton's own start of kernels, which compiles them; what does it again for other tensors."""
    words, device, bits = tensors["words"], x.get_device(), codes.bits
    units, padded = words.shape[0], words.shape[2]
    per_split = -(-units // (tile.units * tile.splits)) * tile.units
    filled = per_split * tile.splits if tile.scaled else units
    grid, scale_grid = (padded // (tile.outputs * tile.tiles), tile.splits, 1), (triton.cdiv(filled, 16), rows, 1)
    sum_grid = (triton.cdiv(rows * codes.outputs, SUMMED), 1, 1)
    constants = (units, filled, per_split, padded, codes.outputs, rows, bits, codes.per_group, codes.zero_point,
                 tile.units, tile.outputs, tile.tiles, tile.stages, tile.ahead, tile.splits > 1)  # fmt: skip
    scale_constants, sum_constants = (
        (units, filled, bits, 16),
        (tile.splits, rows * codes.outputs, codes.outputs, SUMMED),
    )
    scaled, sums, parts = _scratch(x, rows, filled, codes, tile)
    split = parts is not None
    scaling = None
    if tile.scaled:
        scaling = scale_kernel[scale_grid](x, scaled, sums, *scale_constants, num_warps=1)
    fixed = (words, tensors["scale"], tensors.get("zero_point"), None if split else bias, parts if split else y)
    multiplying = few_rows_kernel[grid](x if scaled is None else scaled, sums, *fixed, *constants, num_warps=tile.warps)
    summing = sum_kernel[sum_grid](parts, bias, y, *sum_constants) if split else None
    if multiplying is None:
        return None
    start = multiplying[grid]
    start_scaling = None if scaling is None else scaling[scale_grid]
    start_summing = None if summing is None else summing[sum_grid]

    def again(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, y: Tensor) -> None:
        zero, stream = tensors.get("zero_point"), torch._C._cuda_getCurrentRawStream(device)
        inputs, unit_sums, result = x.data_ptr(), None, y.data_ptr()
        added = None if bias is None else bias.data_ptr()
        weight = tensors["words"].data_ptr(), tensors["scale"].data_ptr(), None if zero is None else zero.data_ptr()
        if start_scaling is None and start_summing is None:
            start(inputs, None, *weight, added, result, *constants, stream=stream)
            return
        scaled, sums, parts = _scratch(x, rows, filled, codes, tile)
        if start_scaling is not None and scaled is not None and sums is not None:
            start_scaling(inputs, scaled.data_ptr(), sums.data_ptr(), *scale_constants, stream=stream)
            inputs, unit_sums = scaled.data_ptr(), sums.data_ptr()
        if start_summing is None or parts is None:
            start(inputs, unit_sums, *weight, added, result, *constants, stream=stream)
            return
        start(inputs, unit_sums, *weight, None, parts.data_ptr(), *constants, stream=stream)
        start_summing(parts.data_ptr(), added, result, *sum_constants, stream=stream)

    return again


def _scratch(
    x: Tensor, rows: int, filled: int, codes: Codes, tile: Tile
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Room for scaled inputs, for the sums of their units, and for the sums over splits."""
    scaled = torch.empty(rows, filled, 32, device=x.device) if tile.scaled else None
    sums = torch.empty(rows, filled, device=x.device) if tile.scaled else None
    parts = torch.empty(tile.splits, rows, codes.outputs, device=x.device) if tile.splits > 1 else None
    return scaled, sums, parts


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
    parts = torch.empty(splits, rows, codes.outputs, dtype=torch.float32, device=x.device)
    key = (rows, x.dtype, x.get_device(), words.get_device(), bias is None, tile)
    _launch(codes, ("turn", *key), turn_kernel, (triton.cdiv(filled, 32), padded, 1), 1,
            x, turned, rows, units, filled, 32)  # fmt: skip
    _launch(codes, ("some", *key), some_rows_kernel, (programs, splits, 1), tile.warps,
            turned, words, tensors["scale"], tensors.get("zero_point"), parts, rows, units, filled, words.shape[2],
            codes.outputs, per_split, codes.bits, codes.per_group, codes.zero_point, padded, tile.units, tile.outputs,
            tile.stages, "ieee", tile.aligned)  # fmt: skip
    _launch(codes, ("sum", *key), sum_kernel, (triton.cdiv(y.numel(), SUMMED), 1, 1), 4,
            parts, bias, y, splits, y.numel(), codes.outputs, SUMMED)  # fmt: skip


def _launch(
    codes: Codes, key: tuple[Any, ...], kernel: Any, grid: tuple[int, int, int], warps: int, *arguments: Any
) -> None:
    """Start a kernel: by Triton the first time, then what that compiled, by addresses alone (as `few_rows` does)."""
    start = codes.started.get(key)
    if start is not None:
        stream = torch._C._cuda_getCurrentRawStream(key[3])
        start(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), stream=stream)
        return
    compiled = kernel[grid](*arguments, num_warps=warps)
    if compiled is not None:
        codes.started[key] = compiled[grid]


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
