"""Triton kernels of LUT-GEMM's product with binary-coded weights; `quantization.kernels.lut` is what they compute.

The sign planes of a word are q·out neighbouring words, and all of them look into the same tables. So the planes are
rows of their own here: P_r = Σ_groups α_r · Σ_tables T[bits_r], and a second kernel adds the q planes of every output.
A program takes a tile of these rows and a run of words. It leaves its sums in a buffer; the second kernel adds the runs
in their order, nothing is added atomically, so a call gives the same bits every time. All sums are float32.

A table lies in shared memory (`tl.gather` puts it there). 32 lanes that read 256 entries at random meet in the same
bank, about 3.4 at a time. A table of 16 entries (4 inputs) is small enough to be there once for every lane: twice the
look-ups, none of which waits.
"""

# ruff: noqa: SIM102 — a condition on what is known when a kernel is compiled stands alone; it removes what is inside

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Plan", "dequantized", "plan_for", "product", "tables"]

WORD = tl.constexpr(32)  # inputs of a word
LONGEST = 16  # words that α is multiplied with at a time, at most
PROCESSORS = 132  # of an H100; where no GPU tells (the interpreter)


@dataclass(frozen=True)
class Plan:
    """How the table product is cut up.

    rows: of a tile. inputs: of a table, 4 or 8; 5: tables of 5, 5 and 6; 0 flips signs instead of looking up. copies:
    of every table, 1 or 32. together: tables that are written before anything is looked up, 1, 2 or 4. warps: of a
    program. splits: runs of words. ready: a kernel makes the tables once; without, every program adds up those that it
    needs.
    """

    rows: int
    inputs: int = 4
    copies: int = 32
    together: int = 4
    warps: int = 8
    splits: int = 1
    ready: bool = True


@triton.jit
def _index(word, table: tl.constexpr, slot: tl.constexpr, column, INPUTS: tl.constexpr, COPIES: tl.constexpr):
    """Where the entries that table number `table` of a word has for some rows lie, being the slot-th in memory."""
    entries: tl.constexpr = 2**INPUTS
    return ((word >> (table * INPUTS)) & (entries - 1)) * COPIES + (column + slot * entries * COPIES)


@triton.jit
def _looked_up(src, word, FIRST: tl.constexpr, column, ROWS: tl.constexpr, INPUTS: tl.constexpr, COPIES: tl.constexpr,
               TOGETHER: tl.constexpr):  # fmt: skip
    """Σ T[bits] over TOGETHER tables of a word from table FIRST on: (ROWS,)."""
    first = _index(word, FIRST, 0, column, INPUTS, COPIES)
    if TOGETHER == 1:
        found = tl.gather(src, first, 0)
    else:
        pair = tl.join(first, _index(word, FIRST + 1, 1, column, INPUTS, COPIES))
        if TOGETHER == 2:
            even, odd = tl.split(tl.reshape(tl.gather(src, tl.reshape(pair, 2 * ROWS), 0), ROWS, 2))
        else:
            third = _index(word, FIRST + 2, 2, column, INPUTS, COPIES)
            four = tl.join(pair, tl.join(third, _index(word, FIRST + 3, 3, column, INPUTS, COPIES)))
            even, odd = tl.split(tl.reshape(tl.gather(src, tl.reshape(four, 4 * ROWS), 0), ROWS, 2, 2))
            even, odd = tl.split(even + odd)
        found = even + odd
    return found


@triton.jit
def _entries(x, tables, first, COPIES: tl.constexpr, INPUTS: tl.constexpr, TOGETHER: tl.constexpr):
    """TOGETHER tables of x from number `first` on, every entry COPIES times: as ready ones have them, or added up."""
    entry = tl.arange(0, TOGETHER * 2**INPUTS * COPIES) // COPIES
    if tables is not None:
        return tl.load(tables + first * 2**INPUTS + entry)
    else:
        x += (first + entry // 2**INPUTS) * INPUTS
        total = tl.zeros(entry.shape, tl.float32)
        for s in tl.static_range(INPUTS):
            value = tl.load(x + s).to(tl.float32)
            total += tl.where(((entry >> s) & 1) == 1, value, -value)
        return total


@triton.jit
def _signed(x, word):
    """Σ ±x over the inputs of a word, + where its bit is 1: the sign bit of x, flipped."""
    total = tl.zeros(word.shape, tl.float32)
    for t in tl.static_range(WORD):
        value = tl.load(x + t).to(tl.float32).to(tl.int32, bitcast=True)
        total += (value ^ (~(word << (31 - t)) & -(2**31))).to(tl.float32, bitcast=True)
    return total


@triton.jit
def _halves(tables, word, w, column, TABLE: tl.constexpr, ROWS: tl.constexpr, COPIES: tl.constexpr):
    """Σ T[bits] over the table of one number of both halves of a word, of 5, 5 and 6 inputs: (ROWS,)."""
    WIDTH: tl.constexpr = 5 + TABLE // 2
    entry = tl.arange(0, 2 * 2**WIDTH * COPIES) // COPIES
    src = tl.load(tables + (2 * w + entry // 2**WIDTH) * 128 + TABLE * 32 + entry % 2**WIDTH)
    low = ((word >> (5 * TABLE)) & (2**WIDTH - 1)) * COPIES + column
    high = ((word >> (16 + 5 * TABLE)) & (2**WIDTH - 1)) * COPIES + (column + 2**WIDTH * COPIES)
    found = tl.gather(src, tl.reshape(tl.join(low, high), 2 * ROWS), 0)
    even, odd = tl.split(tl.reshape(found, ROWS, 2))
    return even + odd


@triton.jit
def _tables_kernel(x, tables, count, INPUTS: tl.constexpr, UNIT: tl.constexpr, ENTRIES: tl.constexpr,
                   UNITS: tl.constexpr):  # fmt: skip
    """All signed sums of every UNIT inputs, INPUTS at a time, or 5, 5 and 6: tables (count, ENTRIES) float32."""
    unit, entry = tl.program_id(0) * UNITS + tl.arange(0, UNITS), tl.arange(0, ENTRIES)
    table = tl.minimum(entry // 2**INPUTS, UNIT // INPUTS - 1)
    code, width = entry - table * 2**INPUTS, tl.where(table == UNIT // INPUTS - 1, UNIT - UNIT // INPUTS * INPUTS, 0)
    there = (unit < count)[:, None]
    total = tl.zeros((UNITS, ENTRIES), tl.float32)
    for s in tl.static_range(INPUTS + UNIT % INPUTS):
        seen = there & (s < INPUTS + width)[None, :]
        value = tl.load(x + unit[:, None] * UNIT + (table * INPUTS + s)[None, :], mask=seen, other=0.0).to(tl.float32)
        total += tl.where(((code >> s) & 1)[None, :] == 1, value, -value)
    tl.store(tables + unit.to(tl.int64)[:, None] * ENTRIES + entry[None, :], total, mask=there)


@triton.jit(do_not_specialize=["words", "per_group", "per_chunk", "chunks", "per_split"])
def _rows_kernel(
    x,  # (batch, 32·words)
    tables,  # (batch, 32·words/INPUTS, 2^INPUTS) float32, or none
    planes,  # (words, rows) int32
    alpha,  # (groups, rows)
    offset,  # (groups, outputs), or none
    sums,  # (batch, splits, rows) float32
    rows,
    outputs,
    words,
    per_group,  # words of a group
    per_chunk,  # words of a chunk; the last of a group may have fewer
    chunks,  # of a group
    per_split,  # chunks of a split
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    COPIES: tl.constexpr,
    TOGETHER: tl.constexpr,
    NEIGHBOURS: tl.constexpr,  # rows that a thread holds side by side
    CHUNK: tl.constexpr,  # inputs of a chunk, or the next power of two
):
    """One run of words for one tile of rows and one row of x."""
    tile, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tile * ROWS + tl.arange(0, ROWS)
    there = row < rows
    column = (row // NEIGHBOURS) % COPIES
    x += batch.to(tl.int64) * words * WORD
    if tables is not None:
        tables += batch.to(tl.int64) * words * (256 if INPUTS == 5 else WORD // INPUTS * 2**INPUTS)
    result = tl.zeros((ROWS,), tl.float32)
    first = split * per_split
    last = tl.minimum(first + per_split, words // per_group * chunks)
    start = first // chunks * per_group + first % chunks * per_chunk
    ahead = tl.load(planes + start.to(tl.int64) * rows + row, mask=there, other=0)
    for chunk in range(first, last):
        group = chunk // chunks
        begin = group * per_group + chunk % chunks * per_chunk
        end = tl.minimum(begin + per_chunk, (group + 1) * per_group)
        scale = tl.load(alpha + group.to(tl.int64) * rows + row, mask=there, other=0.0)
        total = tl.zeros((ROWS,), tl.float32)
        for w in range(begin, end):
            word = ahead
            following = tl.minimum(w + 1, words - 1).to(tl.int64)
            ahead = tl.load(planes + following * rows + row, mask=there, other=0)
            if INPUTS == 5:
                for t in tl.static_range(3):
                    total += _halves(tables, word, w, column, t, ROWS, COPIES)
            elif INPUTS:
                for j in tl.static_range(WORD // INPUTS // TOGETHER):
                    src = _entries(x, tables, w * (WORD // INPUTS) + j * TOGETHER, COPIES, INPUTS, TOGETHER)
                    total += _looked_up(src, word, j * TOGETHER, column, ROWS, INPUTS, COPIES, TOGETHER)
            else:
                total += _signed(x + w * WORD, word)
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
    for start in range(0, parts, PARTS):
        p = start + part
        at = p.to(tl.int64)[:, None] * outputs + n[None, :]
        total += tl.sum(tl.load(sums + at, mask=(p < parts)[:, None] & seen[None, :], other=0.0), 0)
    if bias is not None:
        total += tl.load(bias + n, mask=seen, other=0.0).to(tl.float32)
    tl.store(y + tl.program_id(1).to(tl.int64) * outputs + n, total, mask=seen)


@triton.jit(do_not_specialize=["per_group"])
def _dequantize_kernel(
    planes, alpha, offset, weight, outputs, channels, size, per_group, BITS: tl.constexpr, OUTPUTS: tl.constexpr
):
    """Σ ±α + z₀ of the words of a group for some outputs, added in the order of `BinaryCoded.dequantize`."""
    n, t = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, WORD)
    seen, group = n < outputs, tl.program_id(0)
    rows = outputs * BITS
    for w in range(per_group):
        total = tl.zeros((OUTPUTS, WORD), tl.float32)
        for i in tl.static_range(BITS):
            word = tl.load(planes + (group * per_group + w).to(tl.int64) * rows + i * outputs + n, mask=seen, other=0)
            a = tl.load(alpha + group.to(tl.int64) * rows + i * outputs + n, mask=seen, other=0.0).to(tl.float32)
            flip = ~(word[:, None] << (31 - t)[None, :]) & -(2**31)
            total += (a.to(tl.int32, bitcast=True)[:, None] ^ flip).to(tl.float32, bitcast=True)
        if offset is not None:
            z = tl.load(offset + group.to(tl.int64) * outputs + n, mask=seen, other=0.0)
            total += z.to(tl.float32)[:, None]
        own = w * WORD + t
        at = n.to(tl.int64)[:, None] * channels + (group * size + own)[None, :]
        tl.store(weight + at, total, mask=seen[:, None] & (own < size)[None, :])


# launch ---------------------------------------------------------------------------------------------------------------


@cache
def plan_for(rows: int, words: int, device: torch.device) -> Plan:
    """A plan that fills the GPU: tiles as large as that allows, since every program writes the tables for itself."""
    gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if gpu else PROCESSORS
    tile = 4096
    while tile > 512 and -(-rows // tile) * (words // 4) < processors:
        tile //= 2
    tiles = -(-rows // tile)
    return Plan(tile, warps=max(4, tile // 512), splits=max(1, min(words // 4, 2 * processors // tiles)))


def tables(x: Tensor, inputs: int) -> Tensor:
    """All signed sums of every `inputs` neighbours: (..., n·inputs) to (..., n, 2^inputs), float32.

    Bit s of an entry's number is 1 where the s-th neighbour is added. inputs = 5: of 5, 5 and 6 of every 16, one table
    after the other: (..., 16·n) to (..., n, 128).
    """
    unit, entries = (16, 128) if inputs == 5 else (inputs, 2**inputs)
    found = torch.empty(*x.shape[:-1], x.shape[-1] // unit, entries, device=x.device)
    count, some = x.numel() // unit, max(1, 2048 // entries)
    _tables_kernel[(-(-count // some),)](x, found, count, INPUTS=inputs, UNIT=unit, ENTRIES=entries, UNITS=some)
    return found


def product(
    x: Tensor,
    planes: Tensor,
    alpha: Tensor,
    offset: Tensor | None,
    bias: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """x Ŵᵀ + b by tables: x (batch, 32·words), zero where a group fills no word; the rest as in `BinaryCoded`."""
    words, bits, outputs = planes.shape
    groups, batch, rows = len(alpha), len(x), bits * outputs
    plan = plan or plan_for(rows, words, x.device)
    per_group = words // groups
    per_chunk = min(per_group, LONGEST)
    chunks = -(-per_group // per_chunk)
    per_split = -(-groups * chunks // plan.splits)
    splits = -(-groups * chunks // per_split)
    sums = torch.empty(batch, splits, rows, device=x.device)
    y = x.new_empty(batch, outputs)
    if not y.numel():
        return y
    with torch.cuda.device_of(x):  # Triton starts kernels on the current device
        x = x.contiguous()
        _rows_kernel[(-(-rows // plan.rows), splits, batch)](
            x,
            tables(x, plan.inputs) if plan.inputs and plan.ready else None,
            planes,
            alpha,
            offset,
            sums,
            rows,
            outputs,
            words,
            per_group,
            per_chunk,
            chunks,
            per_split,
            ROWS=plan.rows,
            INPUTS=plan.inputs,
            COPIES=plan.copies,
            TOGETHER=plan.together,
            NEIGHBOURS=16 // alpha.element_size(),
            CHUNK=triton.next_power_of_2(per_chunk * 32),
            num_warps=plan.warps,
        )
        _sum_kernel[(-(-outputs // 64), batch)](sums, bias, y, splits * bits, outputs, PARTS=16, OUTPUTS=64)
    return y


def dequantized(
    planes: Tensor, alpha: Tensor, offset: Tensor | None, channels: int, size: int, dtype: torch.dtype
) -> Tensor:
    """Ŵ (out, channels) in the given dtype, groups of `size` channels: the numbers of `BinaryCoded.dequantize`."""
    words, bits, outputs = planes.shape
    weight = torch.empty(outputs, channels, device=planes.device, dtype=dtype)
    with torch.cuda.device_of(planes):
        _dequantize_kernel[(len(alpha), -(-outputs // 64))](
            planes, alpha, offset, weight, outputs, channels, size, words // len(alpha), BITS=bits, OUTPUTS=64
        )
    return weight
