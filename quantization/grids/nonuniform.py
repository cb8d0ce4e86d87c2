"""Levels that are not evenly spaced: 2^b numbers in [−1, 1] for what was normalized to that range.

    levels = argmin over c of Σ F_i · min_j (y_i − c_j)²       KVQuant (Hooper et al., NeurIPS 2024, 2401.18079), Eq. 3

The points go into a weighted histogram first, so that memory does not grow with their number and their order does not
matter. On it the problem is solved twice: exactly, by dynamic programming over a few hundred cells, and then by Lloyd's
steps over all bins, which start from there. No random numbers are drawn. KVQuant draws its start (k-means++) and may
end in a worse optimum.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributions import Normal

__all__ = ["cluster", "even_levels", "nearest", "normal_float"]

BINS = 2**16  # over [−1, 1]; a point is at most 1.6e-5 from the middle of its bin
CELLS = 512  # of the exact solution: it costs 2^b · CELLS² steps
SMALLEST = 1e-12  # of all weight: what a bin must hold; sums in float64 would lose less
STEPS = 200  # of Lloyd, at most; it mostly stands still after ten


def cluster(points: Iterable[tuple[Tensor, Tensor | None]], bits: int) -> Tensor:
    """The 2^bits levels of least weighted squared distance, float32, sorted, within [−1, 1], on the CPU.

    points: in [−1, 1], of any shape, each with weights ≥ 0 of its shape, or with None for weight 1. Levels repeat where
    fewer than 2^bits bins hold anything.
    """
    counts = torch.zeros(BINS, dtype=torch.float64)
    for some, weights in points:
        places = ((some.flatten() + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
        more = torch.bincount(places, None if weights is None else weights.flatten().double(), BINS)
        counts = counts.to(more.device) + more
    place = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 / BINS) - 1  # the middles of bins
    # In float32 the sums no longer tell in which order float64 added them up.
    weight = (counts / counts.sum().clamp_min(torch.finfo(torch.float64).tiny)).float().double().cpu()
    held = weight > SMALLEST
    if not held.any():
        return even_levels(bits)
    weight, place = weight[held] / weight.sum(), place[held]
    if len(place) <= 2**bits:
        return torch.cat([place, place[-1:].expand(2**bits - len(place))]).float()
    moments = [torch.cat([torch.zeros(1).double(), (weight * place**power).cumsum(0)]) for power in range(3)]
    ends = _ends(weight, place, 2**bits, moments)
    for _ in range(STEPS):
        mass, first = (sums[ends].diff() for sums in moments[:2])
        levels = first / mass
        before, ends = ends, torch.bucketize((levels[1:] + levels[:-1]) / 2, place, right=True)
        ends = torch.cat([before[:1], ends, before[-1:]])
        if torch.equal(ends, before) or not (ends.diff() > 0).all():
            break
    return levels.float()


def _ends(weight: Tensor, place: Tensor, count: int, moments: list[Tensor]) -> Tensor:
    """The first bin of every one of `count` clusters, and the end: the best cut into runs of whole cells.

    Cells hold equal shares of the weight and of the range together: small where much lies, and nowhere wide. A bin with
    much weight is a cell of its own.
    """
    share = (moments[0][1:] - weight / 2 + (place + 1) / 2) / 2  # in (0, 1), rising
    cell = (share * CELLS).long()
    starts = torch.cat([torch.ones(1, dtype=torch.bool), cell.diff() > 0]).nonzero().flatten()
    if len(starts) < count:  # less than a cell each
        starts = torch.linspace(0, len(place), count + 1)[:-1].long()
    edges = torch.cat([starts, torch.tensor([len(place)])])  # (cells + 1,)
    zeroth, first, second = (sums[edges] for sums in moments)
    mass, mean = zeroth[None] - zeroth[:, None], first[None] - first[:, None]  # (start, end)
    cost = (second[None] - second[:, None] - mean**2 / mass).clamp_min(0)
    cost[~(torch.arange(len(edges))[:, None] < torch.arange(len(edges)))] = torch.inf  # no empty cluster
    best, froms = cost[0], []
    for _ in range(count - 1):
        best, start = (best[:, None] + cost).min(0)
        froms.append(start)
    path = [len(edges) - 1]
    for start in reversed(froms):
        path.append(int(start[path[-1]]))
    return edges[[0, *reversed(path)]]


def even_levels(bits: int) -> Tensor:
    """2^bits evenly spaced levels from −1 to 1, float32."""
    return torch.linspace(-1, 1, 2**bits)


def normal_float(bits: int) -> Tensor:
    """NormalFloat levels: quantiles of a normal distribution, each half of them scaled to reach ∓1, and 0, float32.

    2^(b−1) probabilities from p₀ = (1/32 + 1/30)/2 to 1/2 and 2^(b−1) + 1 from there to 1 − p₀; 0 occurs once.
    """
    outermost = (1 / 32 + 1 / 30) / 2
    below = torch.linspace(outermost, 0.5, 2 ** (bits - 1), dtype=torch.float64)
    above = torch.linspace(0.5, 1 - outermost, 2 ** (bits - 1) + 1, dtype=torch.float64)
    low, high = (Normal(0.0, 1.0).icdf(probabilities) for probabilities in (below, above))
    return torch.cat([low[:-1] / -low[0], torch.zeros(1).double(), high[1:] / high[-1]]).float()


def nearest(points: Tensor, levels: Tensor) -> Tensor:
    """The number of the nearest of sorted levels for every point, int64; halfway between two it is the lower one."""
    return torch.bucketize(points, (levels[1:] + levels[:-1]) / 2)
