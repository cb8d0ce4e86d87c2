"""Triton kernels for SpQR's weights: products of a few rows of x, and the matrix; `spqr.py` says what they compute.

A program takes a tile of outputs, all their groups and all their outliers, and sums in float32, always in the same
order. So the outliers are added before the only rounding, and a call gives the same bits every time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from quantization.grids.sparse import SMALLEST_SCALE
from quantization.kernels.launch import start

__all__ = ["SpqrCodes", "dequantized", "multiply"]

SMALLEST = tl.constexpr(SMALLEST_SCALE)
ROWS = 2  # of x that the kernel multiplies one by one; with more it is cheaper to make the matrix
TILE = 16  # outputs of a program
GROUPS = 64  # that a program reads at a time
WARPS = 8
ENTRIES = 64  # outliers of a row that it reads at a time
DENSE = 512  # outputs of a program that makes the matrix


@dataclass(frozen=True)
class SpqrCodes:
    """What the tensors of `Spqr.prepare` do not tell.

    bits, scale_bits, zero_bits: of q, q_s and q_z. size: channels of a group. tile: rows that share the second level.
    """

    bits: int
    scale_bits: int
    zero_bits: int
    size: int
    tile: int


@triton.jit
def _level(tile, seen):
    """s₂, z_s, s₃ and z_z of some tiles, float32."""
    return (
        tl.load(tile, mask=seen, other=0.0).to(tl.float32),
        tl.load(tile + 1, mask=seen, other=0.0).to(tl.float32),
        tl.load(tile + 2, mask=seen, other=0.0).to(tl.float32),
        tl.load(tile + 3, mask=seen, other=0.0).to(tl.float32),
    )


@triton.jit
def _grid(code, s2, z_s, s3, z_z, SCALE_BITS: tl.constexpr, ZERO_BITS: tl.constexpr):
    """Scale and zero point of some groups and outputs: s₂(q_s − z_s), s₃(q_z − z_z)."""
    code = code.to(tl.int32)
    s = ((code & (2**SCALE_BITS - 1)).to(tl.float32) - z_s) * s2
    z = (((code >> SCALE_BITS) & (2**ZERO_BITS - 1)).to(tl.float32) - z_z) * s3
    return tl.maximum(s, SMALLEST), z


@triton.jit
def _number(word, PLACE: tl.constexpr, BITS: tl.constexpr):
    """The code at a place of a word as float32, without a conversion: at bit J, in the mantissa of 2^(23 − J)."""
    FIT: tl.constexpr = 23 // BITS  # codes of which none has to be shifted
    J: tl.constexpr = PLACE % FIT * BITS
    if PLACE >= FIT:
        word = word >> (PLACE // FIT * FIT * BITS)
    code = (word & ((2**BITS - 1) << J)) | ((127 + 23 - J) << 23)
    return code.to(tl.float32, bitcast=True) - 2.0 ** (23 - J)


@triton.jit(do_not_specialize=["groups"])
def _product_kernel(
    x, words, grid_codes, second_level, row_pointers, columns, values, bias, y, N, groups,
    BITS: tl.constexpr, SCALE_BITS: tl.constexpr, ZERO_BITS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    GROUPS: tl.constexpr, OUTPUTS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """y = x Ŵᵀ + b of OUTPUTS outputs and one row of x."""
    PER_WORD: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = (SIZE + PER_WORD - 1) // PER_WORD
    first_output = tl.program_id(0) * OUTPUTS
    n = first_output + tl.arange(0, OUTPUTS)
    seen = n < N  # no minimum: neighbours must be seen to be neighbours
    x += tl.program_id(1).to(tl.int64) * groups * SIZE
    total = tl.zeros((GROUPS, OUTPUTS), tl.float32)
    for begin in range(0, groups, GROUPS):
        number = begin + tl.arange(0, GROUPS)
        group, there = tl.minimum(number, groups - 1), number < groups
        code = tl.load(grid_codes + group[:, None] * N + n[None, :], mask=seen[None, :], other=0)
        if TILE % OUTPUTS == 0:  # all outputs are in one tile
            s2, z_s, s3, z_z = _level(second_level + (group * (N // TILE) + first_output // TILE) * 4, there)
            s, z = _grid(code, s2[:, None], z_s[:, None], s3[:, None], z_z[:, None], SCALE_BITS, ZERO_BITS)
        else:
            tile = second_level + (group[:, None] * (N // TILE) + (n // TILE)[None, :]) * 4
            s2, z_s, s3, z_z = _level(tile, seen[None, :])
            s, z = _grid(code, s2, z_s, s3, z_z, SCALE_BITS, ZERO_BITS)
        product, inputs = tl.zeros((GROUPS, OUTPUTS), tl.float32), tl.zeros((GROUPS,), tl.float32)
        for w in tl.static_range(WORDS):
            word = tl.load(words + (group * WORDS + w)[:, None] * N + n[None, :], mask=seen[None, :], other=0)
            for place in tl.static_range(min(PER_WORD, SIZE - w * PER_WORD)):
                value = tl.load(x + group * SIZE + w * PER_WORD + place, mask=there, other=0.0).to(tl.float32)
                product += _number(word, place, BITS) * value[:, None]
                inputs += value
        total += s * (product - z * inputs[:, None])
    result = tl.sum(total, 0)

    first = tl.load(row_pointers + n, mask=seen, other=0)
    last = tl.load(row_pointers + n + 1, mask=seen, other=0)
    outliers = tl.zeros((OUTPUTS, ENTRIES), tl.float32)
    for begin in range(0, tl.max(last - first, 0), ENTRIES):
        at = (first + begin)[:, None] + tl.arange(0, ENTRIES)[None, :]
        there = at < last[:, None]
        channel = tl.load(columns + at, mask=there, other=0).to(tl.int32)
        r = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
        outliers += r * tl.load(x + channel, mask=there, other=0.0).to(tl.float32)
    result += tl.sum(outliers, 1)
    if bias is not None:
        result += tl.load(bias + n, mask=seen, other=0.0).to(tl.float32)
    tl.store(y + tl.program_id(1).to(tl.int64) * N + n, result.to(y.dtype.element_ty), mask=seen)


@triton.jit
def _dequantize_kernel(
    words, grid_codes, second_level, dense, N,
    BITS: tl.constexpr, SCALE_BITS: tl.constexpr, ZERO_BITS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """s·(q − z) of OUTPUTS outputs of one group: dense (channels, N)."""
    PER_WORD: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = (SIZE + PER_WORD - 1) // PER_WORD
    group, n = tl.program_id(0), tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    seen = n < N  # no minimum: neighbours must be seen to be neighbours
    s2, z_s, s3, z_z = _level(second_level + (group * (N // TILE) + n // TILE) * 4, seen)
    code = tl.load(grid_codes + group * N + n, mask=seen, other=0)
    s, z = _grid(code, s2, z_s, s3, z_z, SCALE_BITS, ZERO_BITS)
    for w in tl.static_range(WORDS):
        word = tl.load(words + (group * WORDS + w) * N + n, mask=seen, other=0)
        for place in tl.static_range(min(PER_WORD, SIZE - w * PER_WORD)):
            at = (group * SIZE + w * PER_WORD + place).to(tl.int64) * N + n
            tl.store(dense + at, ((_number(word, place, BITS) - z) * s).to(dense.dtype.element_ty), mask=seen)


@triton.jit
def _outliers_kernel(
    words, grid_codes, second_level, row_pointers, columns, values, dense, N,
    BITS: tl.constexpr, SCALE_BITS: tl.constexpr, ZERO_BITS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    OUTPUTS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """s·(q − z) + r where there are outliers, computed anew, so that the sum is rounded once."""
    PER_WORD: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = (SIZE + PER_WORD - 1) // PER_WORD
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    seen = n < N  # no minimum: neighbours must be seen to be neighbours
    first = tl.load(row_pointers + n, mask=seen, other=0)
    last = tl.load(row_pointers + n + 1, mask=seen, other=0)
    for begin in range(0, tl.max(last - first, 0), ENTRIES):
        at = (first + begin)[:, None] + tl.arange(0, ENTRIES)[None, :]
        there = at < last[:, None]
        column = tl.load(columns + at, mask=there, other=0).to(tl.int32)
        group, place = column // SIZE, column % SIZE
        s2, z_s, s3, z_z = _level(second_level + (group * (N // TILE) + n[:, None] // TILE) * 4, there)
        grid_code = tl.load(grid_codes + group * N + n[:, None], mask=there, other=0)
        s, z = _grid(grid_code, s2, z_s, s3, z_z, SCALE_BITS, ZERO_BITS)
        word = tl.load(words + (group * WORDS + place // PER_WORD) * N + n[:, None], mask=there, other=0)
        r = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
        code = (word >> (place % PER_WORD * BITS)) & (2**BITS - 1)
        w = (code.to(tl.float32) - z) * s + r
        tl.store(dense + column.to(tl.int64) * N + n[:, None], w.to(dense.dtype.element_ty), mask=there)


# launch ---------------------------------------------------------------------------------------------------------------


def multiply(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, codes: SpqrCodes) -> Tensor:
    """x Ŵᵀ + b: (..., channels) to (..., outputs), of any float dtype."""
    words, order = tensors["words"], tensors.get("order")
    if order is not None:
        x = x.index_select(-1, order)
    rows = x.reshape(-1, x.shape[-1])
    if not 0 < len(rows) <= ROWS or (x.requires_grad and torch.is_grad_enabled()):
        return nn.functional.linear(x, dequantized(tensors, codes, x.dtype), bias)
    rows, outputs = rows.contiguous(), words.shape[2]
    y = rows.new_empty(*x.shape[:-1], outputs)
    numbers = outputs, len(words), *_numbers(codes), GROUPS, TILE, ENTRIES
    grid = (-(-outputs // TILE), len(rows), 1)
    start(_product_kernel, grid, (rows, words, *_parts(tensors), bias, y), numbers, WARPS)
    return y


def dequantized(tensors: Mapping[str, Tensor], codes: SpqrCodes, dtype: torch.dtype) -> Tensor:
    """Ŵ with its channels in the order of quantization, (outputs, channels): a view of its transpose."""
    words = tensors["words"]
    groups, _, outputs = words.shape
    dense = torch.empty(groups * codes.size, outputs, dtype=dtype, device=words.device)
    grid_codes, second_level, *outliers = _parts(tensors)
    grids, numbers = (words, grid_codes, second_level), (outputs, *_numbers(codes))
    start(_dequantize_kernel, (groups, -(-outputs // DENSE), 1), (*grids, dense), (*numbers, DENSE), 4)
    tiles = (-(-outputs // TILE), 1, 1)
    start(_outliers_kernel, tiles, (*grids, *outliers, dense), (*numbers, TILE, ENTRIES), 4)
    return dense.T


def _parts(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensors[name] for name in ("grid_codes", "second_level", "row_pointers", "columns", "values")]


def _numbers(codes: SpqrCodes) -> tuple[int, ...]:
    return codes.bits, codes.scale_bits, codes.zero_bits, codes.size, codes.tile
