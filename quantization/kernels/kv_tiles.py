"""Tiles of keys and values for the Triton kernel of `kv_triton`: packed codes, and exact numbers, as float numbers."""

import triton
import triton.language as tl

__all__ = ["exact", "per_block", "per_token"]


@triton.jit
def _head_of(tensor, sequence, head):
    """Where the tokens of a head start. tensor: (pointer, strides of sequence, head, token, channel)."""
    return tensor[0] + sequence.to(tl.int64) * tensor[1] + head.to(tl.int64) * tensor[2]


@triton.jit
def exact(tensor, sequence, head, token, seen, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Exact keys or values of some tokens: (tokens, channels); zeros for those not seen."""
    channel = tl.arange(0, CHANNELS)
    at = _head_of(tensor, sequence, head) + token.to(tl.int64)[:, None] * tensor[3] + channel[None, :] * tensor[4]
    return tl.load(at, mask=seen[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def _unpacked(at, seen, BITS: tl.constexpr, LOADS: tl.constexpr, CODES: tl.constexpr):
    """Codes of pieces, a word or LOADS bytes each, at (a, b): (a, b, CODES) int32, little-endian."""
    word = tl.load(at, mask=seen, other=0).to(tl.int32)
    for i in tl.static_range(1, LOADS):
        word |= tl.load(at + i, mask=seen, other=0).to(tl.int32) << (8 * i)
    shift = tl.arange(0, CODES) * BITS
    return (word[:, :, None] >> shift[None, None, :]) & (2**BITS - 1)


@triton.jit
def per_token(
    side,
    sequence,
    head,
    token,
    seen,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    BITS: tl.constexpr,
    LOADS: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """x̂ of tokens whose codes are packed along channels: (tokens, channels) float32; zeros for those not seen."""
    codes, scale, minimum, zero_point, levels = side
    tokens: tl.constexpr = token.shape[0]
    index = token.to(tl.int64)[:, None]
    piece = tl.arange(0, CHANNELS // CODES)
    at = _head_of(codes, sequence, head) + index * codes[3] + piece[None, :] * LOADS
    x = _unpacked(at, seen[:, None] & (piece * CODES < D)[None, :], BITS, LOADS, CODES)
    x = tl.reshape(x, (tokens, CHANNELS // GROUP, GROUP))
    x = x.to(tl.float32) if levels is None else tl.load(levels + x).to(tl.float32)
    group = tl.arange(0, CHANNELS // GROUP)
    there = seen[:, None] & (group * GROUP < D)[None, :]
    if zero_point is not None:
        at = _head_of(zero_point, sequence, head) + index * zero_point[3] + group[None, :] * zero_point[4]
        x -= tl.load(at, mask=there, other=0).to(tl.float32)[:, :, None]
    if scale is not None:
        at = _head_of(scale, sequence, head) + index * scale[3] + group[None, :] * scale[4]
        x *= tl.load(at, mask=there, other=0).to(tl.float32)[:, :, None]
    if minimum is not None:
        at = _head_of(minimum, sequence, head) + index * minimum[3] + group[None, :] * minimum[4]
        x += tl.load(at, mask=there, other=0).to(tl.float32)[:, :, None]
    channel = tl.arange(0, CHANNELS)
    return tl.where(seen[:, None] & (channel < D)[None, :], tl.reshape(x, (tokens, CHANNELS)), 0.0)


@triton.jit
def per_block(
    side,
    sequence,
    head,
    first,
    count,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    BITS: tl.constexpr,
    LOADS: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """x̂ of the TILE tokens from `first` on, of `count`, whose codes are packed along the tokens of a block:
    (channels, tokens) float32; zeros beyond `count`. A piece never lies in two blocks."""
    codes, scale, minimum, _, _ = side
    channel = tl.arange(0, CHANNELS)[:, None]
    token = (first + tl.arange(0, TILE // CODES) * CODES)[None, :]  # the first one of every piece
    there = (token < count) & (channel < D)
    block = (token // BLOCK).to(tl.int64)
    at = _head_of(codes, sequence, head) + block * codes[3] + channel * codes[4] + token % BLOCK // CODES * LOADS
    x = _unpacked(at, there, BITS, LOADS, CODES).to(tl.float32)
    at = _head_of(scale, sequence, head) + block * scale[3] + channel * scale[4]
    x *= tl.load(at, mask=there, other=0).to(tl.float32)[:, :, None]
    at = _head_of(minimum, sequence, head) + block * minimum[3] + channel * minimum[4]
    x += tl.load(at, mask=there, other=0).to(tl.float32)[:, :, None]
    return tl.reshape(x, (CHANNELS, TILE))
