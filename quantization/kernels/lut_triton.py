"""Triton kernels of LUT-GEMM's product with binary-coded weights; `quantization.kernels.lut` is what they compute.

The sign planes of a word are q·out neighbouring words, and all of them look into the same tables. So the planes are
rows of their own here: P_r = Σ_groups α_r · Σ_tables T[bits_r], and a second kernel adds the q planes of every output.
A program takes a tile of these rows and a run of words. It leaves its sums in a buffer; the second kernel adds the runs
in their order, nothing is added atomically, so a call gives the same bits every time. All sums are float32.

A table lies in shared memory (`tl.gather` puts it there), which has 32 banks: of 32 lanes that read a table of 256
entries at random, 3.4 meet in one bank and wait for each other. Up to 32 entries nobody waits: whoever meets there
reads the same number. So the tables are of 5, 5 and 6 inputs, and so small that each program makes its own.
"""

# ruff: noqa: SIM102 — a condition on what is known when a kernel is compiled stands alone; it removes what is inside

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantization.kernels.launch import start

__all__ = ["Plan", "Signs", "dequantized", "plan_for", "product"]

WORD = tl.constexpr(32)  # inputs of a word
DENSE = 256  # outputs of a program that makes the matrix
LONGEST = 16  # words that α is multiplied with at a time, at most
ROWS = 1024  # of a tile
AT_ONCE = 3  # programs of a multiprocessor, at least
SMALL = 2**19  # words in all of a matrix for which starting a second kernel takes longer than tables save
PARTS = 128  # that are read at a time when they are added, at most
PROCESSORS = 132  # of an H100; where no GPU tells (the interpreter)


@dataclass(frozen=True)
class Plan:
    """How the table product is cut up.

    rows: of a tile. inputs: of a table, 4; 5: tables of 5, 5 and 6. warps: of a program. splits: runs of words.
    """

    rows: int
    inputs: int = 5
    warps: int = 4
    splits: int = 1


@dataclass(frozen=True)
class Signs:
    """How the product without tables is cut up: outputs and warps of a program, words that it reads at a time."""

    outputs: int = 16
    words: int = 64
    warps: int = 8


@triton.jit
def _sums(x, first, code, WIDTH: tl.constexpr):
    """Σ ±x of WIDTH inputs from number `first` on, + where the code has a 1: entries of tables, as the codes are."""
    total = tl.zeros(code.shape, tl.float32)
    for s in tl.static_range(WIDTH):
        value = tl.load(x + first + s).to(tl.float32)
        total += tl.where(((code >> s) & 1) == 1, value, -value)
    return total


@triton.jit
def _first_tables(x, INPUTS: tl.constexpr):
    """The tables of a word's inputs that are looked up first: four, one behind the other."""
    entry = tl.arange(0, 4 * 2**INPUTS)
    table, code = entry // 2**INPUTS, entry % 2**INPUTS
    first = table // 2 * 16 + table % 2 * 5 if INPUTS == 5 else table * INPUTS
    return _sums(x, first, code, INPUTS)


@triton.jit
def _other_tables(x, INPUTS: tl.constexpr):
    """Those that are looked up then: four of 4 inputs, or two of 6."""
    if INPUTS == 5:
        entry = tl.arange(0, 128)
        return _sums(x, 10 + entry // 64 * 16, entry % 64, 6)
    else:
        return _first_tables(x + WORD // 2, INPUTS)


@triton.jit
def _index(word, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr):
    """Where some rows' entries of a table lie, WIDTH bits of their words from START on, in number TABLE of several."""
    return ((word >> START) & (2**WIDTH - 1)) + TABLE * 2**WIDTH


@triton.jit
def _four(tables, word, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
          ROWS: tl.constexpr):  # fmt: skip
    """Σ T[bits] over four tables, whose bits start at A, B, C and D: (ROWS,)."""
    even = tl.join(_index(word, A, WIDTH, 0), _index(word, C, WIDTH, 2))
    odd = tl.join(_index(word, B, WIDTH, 1), _index(word, D, WIDTH, 3))
    found = tl.reshape(tl.gather(tables, tl.reshape(tl.join(even, odd), 4 * ROWS), 0), ROWS, 2, 2)
    even, odd = tl.split(found)
    low, high = tl.split(even + odd)
    return low + high


@triton.jit
def _two(tables, word, A: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Σ T[bits] over two tables, whose bits start at A and B: (ROWS,)."""
    both = tl.join(_index(word, A, WIDTH, 0), _index(word, B, WIDTH, 1))
    low, high = tl.split(tl.reshape(tl.gather(tables, tl.reshape(both, 2 * ROWS), 0), ROWS, 2))
    return low + high


@triton.jit
def _looked_up(first, other, word, INPUTS: tl.constexpr, ROWS: tl.constexpr):
    """Σ T[bits] over all tables of a word."""
    if INPUTS == 4:
        return _four(first, word, 0, 4, 8, 12, 4, ROWS) + _four(other, word, 16, 20, 24, 28, 4, ROWS)
    else:
        return _four(first, word, 0, 5, 16, 21, 5, ROWS) + _two(other, word, 10, 26, 6, ROWS)


@triton.jit(do_not_specialize=["words", "per_group", "per_chunk", "chunks", "per_split"])
def _rows_kernel(
    x,  # (batch, 32·words)
    planes,  # (words, rows) int32
    alpha,  # (groups, rows)
    offset,  # (groups, outputs), or none
    sums,  # (batch, splits, rows) float32
    outputs,
    rows,
    words,
    per_group,  # words of a group
    per_chunk,  # words of a chunk; the last of a group may have fewer
    chunks,  # of a group
    per_split,  # chunks of a split
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    CHUNK: tl.constexpr,  # inputs of a chunk, or the next power of two
):
    """One run of words for one tile of rows and one row of x."""
    tile, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tile * ROWS + tl.arange(0, ROWS)
    there = row < rows
    x += batch.to(tl.int64) * words * WORD
    result = tl.zeros((ROWS,), tl.float32)
    first = split * per_split
    last = tl.minimum(first + per_split, words // per_group * chunks)
    start = first // chunks * per_group + first % chunks * per_chunk
    # Words and tables are made ready while those before them are looked up.
    next_word = tl.load(planes + start.to(tl.int64) * rows + row, mask=there, other=0)
    next_tables = _first_tables(x + start * WORD, INPUTS)
    other_tables = _other_tables(x + start * WORD, INPUTS)
    for chunk in range(first, last):
        group = chunk // chunks
        begin = group * per_group + chunk % chunks * per_chunk
        end = tl.minimum(begin + per_chunk, (group + 1) * per_group)
        scale = tl.load(alpha + group.to(tl.int64) * rows + row, mask=there, other=0.0)
        total = tl.zeros((ROWS,), tl.float32)
        for w in range(begin, end):
            word, following = next_word, tl.minimum(w + 1, words - 1)
            next_word = tl.load(planes + following.to(tl.int64) * rows + row, mask=there, other=0)
            tables, others = next_tables, other_tables
            next_tables = _first_tables(x + following * WORD, INPUTS)
            other_tables = _other_tables(x + following * WORD, INPUTS)
            total += _looked_up(tables, others, word, INPUTS, ROWS)
        result += scale.to(tl.float32) * total
        if offset is not None:
            if tile * ROWS < outputs:
                inputs = tl.arange(0, CHUNK)
                own = tl.load(x + begin * WORD + inputs, mask=inputs < (end - begin) * WORD, other=0.0)
                z = tl.load(offset + group.to(tl.int64) * outputs + row, mask=row < outputs, other=0.0)
                result += z.to(tl.float32) * tl.sum(own.to(tl.float32), 0)
    splits = tl.num_programs(1)
    tl.store(sums + (batch * splits + split).to(tl.int64) * rows + row, result, mask=there)


@triton.jit(do_not_specialize=["parts"])
def _sum_kernel(sums, bias, y, parts, outputs, PARTS: tl.constexpr, OUTPUTS: tl.constexpr):
    """The planes and runs of every output, in their order: y (batch, outputs)."""
    part, n = tl.arange(0, PARTS), tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    sums += tl.program_id(1).to(tl.int64) * parts * outputs
    seen = n < outputs
    total = tl.zeros((OUTPUTS,), tl.float32)
    for begin in range(0, parts, PARTS):
        p = begin + part
        at = p.to(tl.int64)[:, None] * outputs + n[None, :]
        total += tl.sum(tl.load(sums + at, mask=(p < parts)[:, None] & seen[None, :], other=0.0), 0)
    if bias is not None:
        total += tl.load(bias + n, mask=seen, other=0.0).to(tl.float32)
    tl.store(y + tl.program_id(1).to(tl.int64) * outputs + n, total, mask=seen)


@triton.jit(do_not_specialize=["words", "per_group", "bits"])
def _signs_kernel(
    x, planes, alpha, offset, bias, y, outputs, words, per_group, bits,
    PLANES: tl.constexpr, OUTPUTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """y = x Ŵᵀ + b without tables, in one go, for a small matrix: inputs are added with the sign of their bit."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    plane, seen = tl.arange(0, PLANES), n < outputs
    real = (plane < bits)[None, :, None] & seen[None, None, :]
    x += tl.program_id(1).to(tl.int64) * words * WORD
    total = tl.zeros((WORDS, PLANES, OUTPUTS), tl.float32)
    shift = tl.zeros((WORDS, OUTPUTS), tl.float32)
    for begin in range(0, words, WORDS):
        number = begin + tl.arange(0, WORDS)
        w, there = tl.minimum(number, words - 1), number < words
        group = (w // per_group).to(tl.int64)
        row = plane[None, :, None] * outputs + n[None, None, :]
        word = tl.load(planes + w.to(tl.int64)[:, None, None] * (bits * outputs) + row, mask=real, other=0)
        product = tl.zeros((WORDS, PLANES, OUTPUTS), tl.float32)
        inputs = tl.zeros((WORDS,), tl.float32)
        for t in tl.static_range(WORD):
            value = tl.load(x + w * WORD + t, mask=there, other=0.0).to(tl.float32)
            flip = ~(word << (31 - t)) & -(2**31)
            product += (value.to(tl.int32, bitcast=True)[:, None, None] ^ flip).to(tl.float32, bitcast=True)
            inputs += value
        a = tl.load(alpha + group[:, None, None] * (bits * outputs) + row, mask=real, other=0.0)
        total += a.to(tl.float32) * product
        if offset is not None:
            z = tl.load(offset + group[:, None] * outputs + n[None, :], mask=seen[None, :], other=0.0)
            shift += z.to(tl.float32) * inputs[:, None]
    result = tl.sum(tl.sum(total, 0), 0)
    if offset is not None:
        result += tl.sum(shift, 0)
    if bias is not None:
        result += tl.load(bias + n, mask=seen, other=0.0).to(tl.float32)
    tl.store(y + tl.program_id(1).to(tl.int64) * outputs + n, result.to(y.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["per_group"])
def _dequantize_kernel(
    planes, alpha, offset, dense, outputs, size, per_group, BITS: tl.constexpr, OUTPUTS: tl.constexpr
):
    """dense (channels, outputs): Σ ±α + z₀ of a group and some outputs, in the order of `BinaryCoded.dequantize`."""
    group, n, t = tl.program_id(0), tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, WORD)
    seen, rows = n < outputs, outputs * BITS
    for w in range(per_group):
        total = tl.zeros((WORD, OUTPUTS), tl.float32)
        for i in tl.static_range(BITS):
            word = tl.load(planes + (group * per_group + w).to(tl.int64) * rows + i * outputs + n, mask=seen, other=0)
            a = tl.load(alpha + group.to(tl.int64) * rows + i * outputs + n, mask=seen, other=0.0).to(tl.float32)
            flip = ~(word[None, :] << (31 - t)[:, None]) & -(2**31)
            total += (a.to(tl.int32, bitcast=True)[None, :] ^ flip).to(tl.float32, bitcast=True)
        if offset is not None:
            z = tl.load(offset + group.to(tl.int64) * outputs + n, mask=seen, other=0.0)
            total += z.to(tl.float32)[None, :]
        own = w * WORD + t
        at = (group * size + own).to(tl.int64)[:, None] * outputs + n[None, :]
        tl.store(dense + at, total.to(dense.dtype.element_ty), mask=(own < size)[:, None] & seen[None, :])


# launch ---------------------------------------------------------------------------------------------------------------


@cache
def plan_for(bits: int, outputs: int, words: int, groups: int, device: torch.device) -> Plan | Signs:
    """For a small matrix one kernel without tables; else splits that give every multiprocessor as much to do, and
    several programs at a time, since a program waits for its tables."""
    if bits * outputs * words <= SMALL:
        return Signs(8, 64) if words > 32 else Signs(16, 32)
    gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if gpu else PROCESSORS
    tiles, chunks = -(-bits * outputs // ROWS), groups * -(-words // groups // LONGEST)

    def longest(per_split: int) -> int:  # what the busiest multiprocessor has to do, in chunks; a start is one more
        return -(-tiles * -(-chunks // per_split) // processors) * (per_split + 1)

    most = max(1, tiles * chunks // (AT_ONCE * processors))  # chunks of a split that leave enough programs
    per_split = min(range(most, 0, -1), key=longest)
    return Plan(ROWS, splits=-(-chunks // per_split))


def product(
    x: Tensor,
    planes: Tensor,
    alpha: Tensor,
    offset: Tensor | None,
    bias: Tensor | None = None,
    plan: Plan | Signs | None = None,
) -> Tensor:
    """x Ŵᵀ + b by tables: x (batch > 0, 32·words), zero where a group fills no word; the rest as in `BinaryCoded`."""
    words, bits, outputs = planes.shape
    batch = len(x)
    plan = plan or plan_for(bits, outputs, words, len(alpha), x.device)
    y = x.new_empty(batch, outputs)
    if isinstance(plan, Signs):
        cut = outputs, words, words // len(alpha), bits, triton.next_power_of_2(bits), plan.outputs, plan.words
        grid = (-(-outputs // plan.outputs), batch, 1)
        start(_signs_kernel, grid, (x.contiguous(), planes, alpha, offset, bias, y), cut, plan.warps)
        return y
    splits, numbers = _cut(words, bits * outputs, len(alpha), plan)
    sums = torch.empty(batch, splits, bits * outputs, device=x.device)
    grid = (-(-bits * outputs // plan.rows), splits, batch)
    start(_rows_kernel, grid, (x.contiguous(), planes, alpha, offset, sums), (outputs, *numbers), plan.warps)
    parts = splits * bits
    read = min(PARTS, triton.next_power_of_2(parts))
    start(_sum_kernel, (-(-outputs // 32), batch, 1), (sums, bias, y), (parts, outputs, read, 32), 4)
    return y


@cache
def _cut(words: int, rows: int, groups: int, plan: Plan) -> tuple[int, tuple[int, ...]]:
    """The number of splits, and the other numbers that `_rows_kernel` takes."""
    per_group = words // groups
    per_chunk = min(per_group, LONGEST)
    chunks = -(-per_group // per_chunk)
    per_split = -(-groups * chunks // plan.splits)
    inputs = triton.next_power_of_2(per_chunk * 32)
    numbers = rows, words, per_group, per_chunk, chunks, per_split, plan.rows, plan.inputs, inputs
    return -(-groups * chunks // per_split), numbers


def dequantized(
    planes: Tensor, alpha: Tensor, offset: Tensor | None, channels: int, size: int, dtype: torch.dtype
) -> Tensor:
    """Ŵ (out, channels), groups of `size` channels: what `BinaryCoded.dequantize` gives, a view of its transpose."""
    words, bits, outputs = planes.shape
    dense = torch.empty(channels, outputs, device=planes.device, dtype=dtype)
    numbers = outputs, size, words // len(alpha), bits, DENSE
    start(_dequantize_kernel, (len(alpha), -(-outputs // DENSE), 1), (planes, alpha, offset, dense), numbers, 4)
    return dense.T
