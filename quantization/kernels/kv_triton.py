"""The Triton kernel of `kv_attention.attend`: one query per sequence over [exact prefix | codes | exact tail].

Flash-decoding (Dao et al., 2023): the tokens are cut into splits, so that one sequence fills a GPU. A program takes a
split of one KV head, reads its codes once for all query heads that share it, and leaves a running maximum, a sum and a
weighted sum of values. A second kernel merges the splits. All sums are float32 and in a fixed order; nothing is added
atomically, so a call gives the same bits every time.

Codes become numbers in registers, in the dtype of the query, as a dequantized cache would hold them. Values that were
rounded in a rotated basis are summed apart from the exact ones, and their sum is turned back outside.
"""

# ruff: noqa: SIM102 — a condition on what is known when a kernel is compiled stands alone; it removes what is inside

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantization.kernels.kv_codes import Coded, Side
from quantization.kernels.kv_tiles import exact, per_block, per_token

__all__ = ["attend"]

TILE = 64  # tokens that a program looks at together, at most
REGISTERS = 2**14  # bytes of a tile of keys, as numbers: what a program holds without spilling
ROWS = 16  # the least number of rows that a matrix unit multiplies
WARPS = 4
STAGES = 3
SPLITS = 64  # at most; the merge holds all of them
WAVES = 2  # programs for each multiprocessor that splitting aims at
PROCESSORS = 132  # of an H100; where no GPU tells (the interpreter)
FLOOR = tl.constexpr(-1e30)  # of the running maximum: finite, so that a tile without any token seen gives zeros
BYTES = {2: (1, 4), 3: (3, 8), 4: (1, 2), 8: (1, 1)}  # bits: bytes and codes of the smallest whole piece
WORD = 32  # bits that are loaded at a time where pieces fill them: fewer loads, and ones that can be made in advance


# attention ------------------------------------------------------------------------------------------------------------


@triton.jit
def _code_scores(q, side, sequence, head, first, count, D: tl.constexpr, CHANNELS: tl.constexpr, LAYOUT: tl.constexpr,
                 TILE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """q·k̂ of the TILE tokens from `first` on: (rows, tokens); zeros beyond `count`."""
    if LAYOUT[4] > 1:
        k = per_block(side, sequence, head, first, count, D, CHANNELS, LAYOUT[0], LAYOUT[1], LAYOUT[2], LAYOUT[4], TILE)
    else:
        token = first + tl.arange(0, TILE)
        k = tl.trans(
            per_token(
                side, sequence, head, token, token < count, D, CHANNELS, LAYOUT[0], LAYOUT[1], LAYOUT[2], LAYOUT[3]
            )
        )
    return tl.dot(q, k.to(q.dtype), input_precision=PRECISION)


@triton.jit
def _code_sums(p, side, sequence, head, first, count, D: tl.constexpr, CHANNELS: tl.constexpr, LAYOUT: tl.constexpr,
               TILE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Σ p_j v̂_j of the TILE tokens from `first` on: (rows, channels), none from beyond `count`."""
    token = first + tl.arange(0, TILE)
    v = per_token(side, sequence, head, token, token < count, D, CHANNELS, LAYOUT[0], LAYOUT[1], LAYOUT[2], LAYOUT[3])
    return tl.dot(p, v.to(p.dtype), input_precision=PRECISION)


@triton.jit
def _added(mask, sequence, token, seen):
    """What is added to the scores of some tokens, counted from the first of the prefix."""
    at = mask[0] + sequence.to(tl.int64) * mask[1] + token * mask[2]
    return tl.load(at, mask=seen, other=0.0).to(tl.float32)


@triton.jit
def _softmax_step(s, high, low):
    """Weights of new scores (rows, tokens), and by what earlier sums shrink: p, shrink, maximum, sum."""
    higher = tl.maximum(high, tl.max(s, 1))
    shrink = tl.exp(high - higher)
    p = tl.exp(s - higher[:, None])
    return p, shrink, higher, low * shrink + tl.sum(p, 1)


@triton.jit(do_not_specialize=["prefix", "coded_keys", "coded_values", "behind", "tiles"])
def _split_kernel(
    query,  # (pointer, strides of sequence, head)
    turned_query,  # the same in the basis of the coded keys, or none
    mask,  # (pointer, strides of sequence, token) or none: added to the scores
    key_codes,  # (codes, scale, minimum, zero point, levels), each (pointer, strides) or none; or none
    key_prefix,
    key_tail,
    value_codes,
    value_prefix,
    value_tail,
    largest,  # of a split: maximum and sum of exponentials (sequence, query head, split), and weighted sums of values
    total,
    exact_sum,  # (sequence, query head, split, D); of coded values apart where their basis is another one
    coded_sum,
    prefix,  # tokens of the prefix, coded ones of keys and of values, all behind the prefix, tiles of a split
    coded_keys,
    coded_values,
    behind,
    tiles,
    scaling,
    HEADS: tl.constexpr,  # KV heads
    SHARE: tl.constexpr,  # query heads of each
    D: tl.constexpr,
    CHANNELS: tl.constexpr,  # D, or the next power of two
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,  # (bits, loads and codes of a piece, channels of a group, tokens of a block); no bits: no codes
    VALUES: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of float32 numbers
):
    """One split of one KV head. Tiles go over the tokens behind the prefix, then over the prefix."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    sequence, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    row, channel = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    real = (row < SHARE)[:, None] & (channel < D)[None, :]
    own = (head * SHARE + row)[:, None]
    place = sequence.to(tl.int64) * query[1] + own * query[2] + channel[None, :]
    q = tl.load(query[0] + place, mask=real, other=0.0)
    turned = q if turned_query is None else tl.load(turned_query + place, mask=real, other=0.0)

    high = tl.full((ROWS,), FLOOR, tl.float32)
    low = tl.zeros((ROWS,), tl.float32)
    coded = tl.zeros((ROWS, CHANNELS), tl.float32)
    body = tl.cdiv(behind, TILE)
    full = 0  # tiles of codes alone, of keys and of values: most of them, in a loop without branches
    if KEYS[0]:
        if VALUES[0]:
            full = tl.minimum(coded_keys, coded_values) // TILE
            for tile in range(split * tiles, tl.minimum((split + 1) * tiles, full)):
                first = tile * TILE
                s = _code_scores(
                    turned, key_codes, sequence, head, first, coded_keys, D, CHANNELS, KEYS, TILE, PRECISION
                )
                s *= scaling
                if mask is not None:
                    s += _added(mask, sequence, prefix + first + tl.arange(0, TILE), True)[None, :]
                p, shrink, high, low = _softmax_step(s, high, low)
                coded = coded * shrink[:, None] + _code_sums(
                    p.to(q.dtype), value_codes, sequence, head, first, coded_values, D, CHANNELS, VALUES, TILE,
                    PRECISION,
                )  # fmt: skip

    plain = tl.zeros((ROWS, CHANNELS), tl.float32)
    last = tl.minimum((split + 1) * tiles, body + tl.cdiv(prefix, TILE))
    for tile in range(tl.maximum(split * tiles, full), last):
        behind_prefix = tile < body
        first = tile * TILE
        token = first + tl.arange(0, TILE)
        of_prefix = token - body * TILE
        seen = tl.where(behind_prefix, token < behind, of_prefix < prefix)

        s = tl.zeros((ROWS, TILE), tl.float32)
        if KEYS[0]:
            if first < coded_keys:
                s += _code_scores(
                    turned, key_codes, sequence, head, first, coded_keys, D, CHANNELS, KEYS, TILE, PRECISION
                )
        if key_tail is not None:
            if behind_prefix & (first + TILE > coded_keys):
                there = (token >= coded_keys) & (token < behind)
                k = exact(key_tail, sequence, head, token - coded_keys, there, D, CHANNELS)
                s += tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if key_prefix is not None:
            if tile >= body:
                k = exact(key_prefix, sequence, head, of_prefix, seen, D, CHANNELS)
                s += tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)

        s *= scaling
        if mask is not None:
            s += _added(mask, sequence, tl.where(behind_prefix, prefix + token, of_prefix), seen)[None, :]
        p, shrink, high, low = _softmax_step(tl.where(seen[None, :], s, float("-inf")), high, low)
        plain *= shrink[:, None]
        coded *= shrink[:, None]
        p = p.to(q.dtype)

        if VALUES[0]:
            if first < coded_values:
                coded += _code_sums(
                    p, value_codes, sequence, head, first, coded_values, D, CHANNELS, VALUES, TILE, PRECISION
                )
        if value_tail is not None:
            if behind_prefix & (first + TILE > coded_values):
                there = (token >= coded_values) & (token < behind)
                v = exact(value_tail, sequence, head, token - coded_values, there, D, CHANNELS)
                plain += tl.dot(p, v.to(q.dtype), input_precision=PRECISION)
        if value_prefix is not None:
            if tile >= body:
                v = exact(value_prefix, sequence, head, of_prefix, seen, D, CHANNELS)
                plain += tl.dot(p, v.to(q.dtype), input_precision=PRECISION)

    part = (sequence.to(tl.int64) * HEADS * SHARE + head * SHARE + row) * splits + split
    tl.store(largest + part, high, mask=row < SHARE)
    tl.store(total + part, low, mask=row < SHARE)
    at = part[:, None] * D + channel[None, :]
    if coded_sum is None:
        tl.store(exact_sum + at, plain + coded, mask=real)
    else:
        tl.store(exact_sum + at, plain, mask=real)
        tl.store(coded_sum + at, coded, mask=real)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(largest, total, sums, result, splits, D: tl.constexpr, CHANNELS: tl.constexpr, SPLITS: tl.constexpr):
    """The splits of one query head, weighted by e^(own maximum − common maximum): result (sequence, query head, D)."""
    head = tl.program_id(0).to(tl.int64)
    split, channel = tl.arange(0, SPLITS), tl.arange(0, CHANNELS)
    there = split < splits
    high = tl.load(largest + head * splits + split, mask=there, other=FLOOR)
    weight = tl.where(there, tl.exp(high - tl.max(high, 0)), 0.0)
    low = tl.sum(weight * tl.load(total + head * splits + split, mask=there, other=0.0), 0)
    at = (head * splits + split)[:, None] * D + channel[None, :]
    x = tl.load(sums + at, mask=there[:, None] & (channel < D)[None, :], other=0.0)
    tl.store(result + head * D + channel, tl.sum(x * weight[:, None], 0) / low, mask=channel < D)


# launch ---------------------------------------------------------------------------------------------------------------


def attend(query: Tensor, keys: Side, values: Side, scaling: float, mask: Tensor | None = None) -> Tensor:
    """`kv_attention.attend` by the kernels; the layout must be one that `known` accepts."""
    with torch.cuda.device_of(query):  # Triton starts kernels on the current device
        return _launched(query, keys, values, scaling, mask)


def _launched(query: Tensor, keys: Side, values: Side, scaling: float, mask: Tensor | None) -> Tensor:
    batch, query_heads, _, channels = query.shape
    coded_keys, coded_values = _coded(keys), _coded(values)
    some = next(x for x in (keys.tail, keys.prefix, None if coded_keys is None else coded_keys.codes) if x is not None)
    heads = some.shape[1]
    query = query.contiguous()
    turned = None if coded_keys is None or coded_keys.turn is None else coded_keys.turned(query).contiguous()
    prefix, tail = _tokens(keys.prefix), _tokens(keys.tail)
    behind = (len(coded_keys) if coded_keys is not None else 0) + tail
    wide = triton.next_power_of_2(max(ROWS, channels))
    tile = min(TILE, max(ROWS, REGISTERS // (wide * query.element_size())))
    tiles = -(-prefix // tile) + -(-behind // tile)
    wanted = -(-WAVES * _processors(query.device) // (batch * heads))
    per_split = -(-tiles // max(1, min(wanted, SPLITS, tiles)))
    splits = -(-tiles // per_split)

    largest, total = (query.new_empty(batch, query_heads, splits, dtype=torch.float32) for _ in range(2))
    apart = coded_values is not None and coded_values.turn is not None
    sums = [query.new_empty(batch, query_heads, splits, channels, dtype=torch.float32) for _ in range(1 + apart)]
    key_codes, key_layout = _pieces(coded_keys, query, heads)
    value_codes, value_layout = _pieces(coded_values, query, heads)
    _split_kernel[(batch * heads, splits)](
        _strided(query, 2),
        turned,
        None if mask is None else _strided_mask(mask, batch),
        key_codes,
        _exact_side(keys.prefix, batch),
        _exact_side(keys.tail, batch),
        value_codes,
        _exact_side(values.prefix, batch),
        _exact_side(values.tail, batch),
        largest,
        total,
        sums[0],
        sums[1] if apart else None,
        prefix,
        0 if coded_keys is None else len(coded_keys),
        0 if coded_values is None else len(coded_values),
        behind,
        per_split,
        scaling,
        HEADS=heads,
        SHARE=query_heads // heads,
        D=channels,
        CHANNELS=wide,
        ROWS=max(ROWS, triton.next_power_of_2(query_heads // heads)),
        TILE=tile,
        KEYS=key_layout,
        VALUES=value_layout,
        PRECISION="ieee" if torch.version.hip else "tf32x3",
        num_warps=WARPS,
        # Loads in advance take shared memory, float32 tables of levels as much as a small GPU has.
        num_stages=1 if query.dtype == torch.float32 else STAGES,
    )
    results = []
    for part in sums:
        results.append(query.new_empty(query.shape, dtype=torch.float32 if apart else query.dtype))
        _merge_kernel[(batch * query_heads,)](
            largest, total, part, results[-1], splits, D=channels, CHANNELS=wide, SPLITS=triton.next_power_of_2(splits),
            num_warps=WARPS,
        )  # fmt: skip
    if apart:
        assert coded_values is not None
        results[0] += coded_values.turned(results[1], back=True)
    return results[0].to(query.dtype)


def _coded(side: Side) -> Coded | None:
    return side.codes if side.codes is not None and len(side.codes) else None


def _tokens(x: Tensor | None) -> int:
    return 0 if x is None else x.shape[2]


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def _strided(x: Tensor, axes: int) -> tuple[Any, ...]:
    """A tensor and its first strides."""
    return (x, *x.stride()[:axes])


def _exact_side(x: Tensor | None, batch: int) -> tuple[Any, ...] | None:
    """Exact keys or values for the kernel; a prefix of batch 1 stands for all sequences."""
    return None if x is None or x.shape[2] == 0 else _strided(x.expand(batch, -1, -1, -1), 4)


def _strided_mask(mask: Tensor, batch: int) -> tuple[Any, ...]:
    """A mask (B or 1, 1, 1, tokens) as what is added, with the strides of sequence and token."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
    mask = mask.expand(batch, -1, -1, -1)
    return mask, mask.stride(0), mask.stride(3)


def _pieces(codes: Coded | None, query: Tensor, heads: int) -> tuple[tuple[Any, ...] | None, tuple[int, ...]]:
    """Codes and what belongs to them for the kernel, and their constants: bits, loads and codes of a piece, channels of
    a group, tokens of a block."""
    batch, channels = query.shape[0], query.shape[-1]
    if codes is None:
        return None, (0, 1, 1, 1, 1)
    packed = codes.codes if codes.codes.stride(-1) == 1 else codes.codes.contiguous()
    piece = BYTES[codes.bits]
    words = WORD // codes.bits
    starts = (packed.data_ptr(), packed.shape[-1], *packed.stride()[:-1])
    if piece[0] == 1 and not any(x % (WORD // 8) for x in starts) and (codes.block == 1 or codes.block % words == 0):
        packed, piece = packed.view(torch.int32), (1, words)
    grids = codes.groups if codes.block == 1 else channels
    parts = (
        None if part is None else _strided(part.expand(batch, heads, packed.shape[2], grids), 4)
        for part in (codes.scale, codes.minimum, codes.zero_point)
    )
    levels = codes.levels
    if levels is not None and query.dtype != torch.float32:
        levels = levels.half()  # 11 bits, as many as the products take
    group = channels // codes.groups if codes.groups > 1 else triton.next_power_of_2(max(ROWS, channels))
    return (_strided(packed, 4), *parts, levels), (codes.bits, *piece, group, codes.block)
