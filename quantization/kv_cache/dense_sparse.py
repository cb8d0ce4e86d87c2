"""KVQuant's dense-and-sparse split: a few numbers of every vector are kept, the others get codes (2401.18079, 3.4).

    keys:   y is an outlier if y < l_c or y > u_c, with fixed thresholds l, u of its channel c
    values: y is an outlier if it is at most the (τ/2) quantile of its token, or at least the (1 − τ/2) quantile

A vector is all C = H·D channels of a token. τ is the share of outliers. Quantiles are interpolated linearly, so a token
of distinct values has the same number of outliers on both sides: 6 + 6 of 1024, 21 + 21 of 4096.

An outlier is a value and the number of its channel, 16 bits each (32 for a number above 32767). A token has a fixed
number of slots for them; an empty slot holds the number C. Keys of one token may have more outliers than slots: those
that lie farthest outside, in units of their channel's range, are kept. KVQuant's scores keep all, its kernels 21 on
either side.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Sparse", "Split", "index_bits", "key_outliers", "outliers_per_side", "put_back", "take_out", "thresholds",
           "value_split"]  # fmt: skip

LARGEST = torch.finfo(torch.float16).max
TINY = torch.finfo(torch.float32).tiny


class Sparse(NamedTuple):
    """Outliers of tokens. channels: int16 or int32 (…, slots), C where a slot is empty. values: float16."""

    channels: Tensor
    values: Tensor


class Split(NamedTuple):
    """Values of tokens. channels: of their outliers, int64 (…, slots). low, high: range of the rest, (…, 1)."""

    channels: Tensor
    low: Tensor
    high: Tensor


def outliers_per_side(channels: int, share: float) -> int:
    """How many of a token's distinct values are at least as large as their 1 − share/2 quantile; 0 for share 0.

    At least one value is always left over.
    """
    if share == 0:
        return 0
    # Rounded, so that a place that is an integer is not missed by the last digit of a float.
    count = channels - math.ceil(round((channels - 1) * (1 - share / 2), 9))
    return min(count, (channels - 1) // 2)


def thresholds(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The share/2 and 1 − share/2 quantiles of every column of (N, C), interpolated linearly, each (C,) float32.

    share 0: lowest and highest.
    """
    place = round((len(x) - 1) * (1 - share / 2), 9)  # among the sorted numbers
    below = math.floor(place)
    ends = []
    for sign in (-1, 1):
        largest = (sign * x.float()).topk(len(x) - below, dim=0).values  # from the top down to that below the place
        lower, upper = largest[-1], largest[-2 if len(largest) > 1 else -1]
        ends.append(sign * torch.lerp(lower, upper, place - below))
    return ends[0], ends[1]


def key_outliers(y: Tensor, low: Tensor, high: Tensor, slots: int) -> Tensor:
    """Channels of the outliers of (…, C) keys, int64 (…, slots); low, high: thresholds of the channels, (C,)."""
    outside = torch.maximum(y - high, low - y) / ((high - low) / 2).clamp_min(TINY)
    farthest, index = outside.topk(slots, dim=-1)
    return index.masked_fill(~(farthest > 0), y.shape[-1])


def value_split(y: Tensor, per_side: int) -> Split:
    """The outliers of (…, C) values, and the range of what is left of each token.

    With equal values at a threshold, the first ones in the order of channels go to the lower side.
    """
    ordered, order = y.sort(dim=-1, stable=True)
    last = y.shape[-1] - per_side
    index = torch.cat([order[..., :per_side], order[..., last:]], -1)
    return Split(index, ordered[..., per_side : per_side + 1], ordered[..., last - 1 : last])


def index_bits(channels: int) -> int:
    """Bits of a channel's number, of which one more than there are channels must be written."""
    return 16 if channels < 2**15 else 32


def take_out(y: Tensor, channels: Tensor) -> Sparse:
    """The numbers of (…, C) at these channels, as they are stored."""
    padded = torch.nn.functional.pad(y, (0, 1))
    values = padded.gather(-1, channels).clamp(-LARGEST, LARGEST).half()
    return Sparse(channels.to(torch.int16 if index_bits(y.shape[-1]) == 16 else torch.int32), values)


def put_back(dense: Tensor, sparse: Sparse) -> Tensor:
    """(…, C) float32 with the outliers in their places."""
    padded = torch.nn.functional.pad(dense, (0, 1))  # the last column takes what empty slots hold
    return padded.scatter(-1, sparse.channels.long(), sparse.values.to(dense.dtype))[..., :-1]
