"""KVQuant's calibration of one layer: thresholds of key channels, and one set of levels each for keys and values.

    ŷ = (y − z)/r,  z = (u + l)/2,  r = (u − l)/2,   levels = argmin Σ F · (ŷ − c)²  over all inliers of the layer

keys: l, u are quantiles of a channel over the calibration tokens. values: l, u are the range of a token's inliers, as
when the model runs (KVQuant's code takes the quantiles here and the range there).

F: weights of the distance. `none`: 1. `fisher`: the squared gradient of the loss by y, as in KVQuant's code.
`fisher_range`: F·r², since the distance is taken in units of r, and the gradient is not.

Q-Norm: decoded levels are scaled and shifted, so that mean and spread of what is decoded are those of ŷ.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from quantization.grids.nonuniform import cluster, even_levels, nearest, normal_float
from quantization.kv_cache.dense_sparse import outliers_per_side, thresholds, value_split

__all__ = ["LEVELS", "WEIGHTINGS", "centred", "centred16", "fit_keys", "fit_levels", "fit_values", "q_norm"]

LEVELS = ("nuq", "uniform", "nf")
WEIGHTINGS = ("none", "fisher", "fisher_range")
TOKENS = 4096  # looked at together
TINY = torch.finfo(torch.float32).tiny
LEAST, MOST = 2.0**-24, torch.finfo(torch.float16).max  # of float16

Points = Iterable[tuple[Tensor, Tensor | None]]  # in [−1, 1], with their weights


def centred(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Middle z and half width r > 0 of ranges, float32."""
    return (high + low) / 2, ((high - low) / 2).clamp_min(TINY)


def centred16(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float16, as they are stored with a token; r is at least 2^−24."""
    middle, half = centred(low, high)
    return middle.clamp(-MOST, MOST).half(), half.clamp(LEAST, MOST).half()


def fit_keys(
    y: Tensor, weights: Tensor | None, *, bits: int, share: float, levels: str, ranged: bool, qnorm: bool
) -> dict[str, Tensor]:
    """`keys_low`, `keys_high` (C,), and what `fit_levels` finds.

    y: keys before RoPE of all tokens, (N, C). weights: F of the same shape. ranged: weigh with F·r².
    """
    low, high = thresholds(y, share)
    middle, half = centred(low, high)

    def points() -> Iterator[tuple[Tensor, Tensor | None]]:
        for some, weight in _chunks(y, weights):
            kept = (some >= low) & (some <= high)
            yield _kept((some - middle) / half, kept, _weight(weight, half, ranged))

    found = {"low": low, "high": high} | fit_levels(points, bits, levels, qnorm)
    return {f"keys_{name}": tensor for name, tensor in found.items()}


def fit_values(
    y: Tensor, weights: Tensor | None, *, bits: int, share: float, levels: str, ranged: bool, qnorm: bool
) -> dict[str, Tensor]:
    """What `fit_levels` finds for values (N, C); arguments as in `fit_keys`."""
    per_side = outliers_per_side(y.shape[-1], share)

    def points() -> Iterator[tuple[Tensor, Tensor | None]]:
        for some, weight in _chunks(y, weights):
            split = value_split(some, per_side)
            middle, half = (part.float() for part in centred16(split.low, split.high))
            kept = torch.ones_like(some, dtype=torch.bool).scatter(-1, split.channels, False)
            yield _kept((some - middle) / half, kept, _weight(weight, half, ranged))

    return {f"values_{name}": tensor for name, tensor in fit_levels(points, bits, levels, qnorm).items()}


def _chunks(y: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(y), TOKENS):
        rows = slice(start, start + TOKENS)
        yield y[rows].float(), None if weights is None else weights[rows].float()


def _weight(weight: Tensor | None, half: Tensor, ranged: bool) -> Tensor | None:
    return weight if weight is None or not ranged else weight * half.square()


def _kept(points: Tensor, kept: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    # Rounding may carry an end of the range a little beyond it.
    return points[kept].clamp(-1, 1), None if weight is None else weight[kept]


def fit_levels(points: Callable[[], Points], bits: int, kind: str, qnorm: bool) -> dict[str, Tensor]:
    """`levels` (2^bits,), sorted, and `qnorm` (2,) if asked, both float32 on the CPU.

    points: gives all of them, as often as it is called. kind: of `LEVELS`; only nuq looks at the points.
    """
    levels = {"uniform": even_levels, "nf": normal_float}[kind](bits) if kind != "nuq" else cluster(points(), bits)
    return {"levels": levels} | ({"qnorm": q_norm(points(), levels)} if qnorm else {})


def q_norm(points: Points, levels: Tensor) -> Tensor:
    """Scale s₁/s₂ and offset m₁ − m₂·s₁/s₂, (2,) float32: mean m and spread s of points (1) and of their levels (2)."""
    first, second, total = torch.zeros(2).double(), torch.zeros(2).double(), 0
    for some, _ in points:
        both = torch.stack([some.double(), levels.to(some.device)[nearest(some, levels.to(some.device))].double()])
        first, second = first + both.sum(-1).cpu(), second + both.square().sum(-1).cpu()
        total += some.numel()
    mean = first / max(total, 1)
    spread = (second / max(total, 1) - mean**2).clamp_min(0).sqrt()
    scale = spread[0] / spread[1] if spread[1] > 0 else torch.ones(()).double()
    return torch.stack([scale, mean[0] - mean[1] * scale]).float()
