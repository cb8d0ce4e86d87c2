"""Levels of one-dimensional clusters against scikit-learn and brute force, and NormalFloat against its definition."""

import itertools
from statistics import NormalDist

import numpy as np
import pytest
import torch
from common import every
from sklearn.cluster import KMeans
from torch import Tensor
from torch.testing import assert_close

from quantization.grids.nonuniform import cluster, even_levels, nearest, normal_float

BITS = [2, 3, 4]


def points(kind: str, count: int = 20_000) -> tuple[Tensor, Tensor]:
    """Points in [−1, 1] and weights of a skewed kind."""
    random = np.random.default_rng(0)
    x = {
        "normal": random.normal(0, 0.3, count),
        "far outliers": np.where(
            random.random(count) < 0.001, random.choice([-1, 1], count), random.normal(0, 0.01, count)
        ),
        "two humps": random.choice([-0.6, 0.5], count) + random.normal(0, 0.1, count),
        "uniform": random.uniform(-1, 1, count),
    }[kind]
    return torch.tensor(x.clip(-1, 1)), torch.tensor(random.lognormal(0, 2, count))


def inertia(x: Tensor, weights: Tensor, levels: Tensor) -> float:
    return float((weights * (x[:, None] - levels.double()).square().amin(1)).sum())


@every("kind", ["normal", "far outliers", "two humps", "uniform"])
@every("bits", BITS)
@every("weighted", [False, True])
def test_the_weighted_distance_is_at_most_one_percent_above_scikit_learn(kind, bits, weighted):
    x, weights = points(kind)
    weights = weights if weighted else torch.ones_like(weights)
    theirs = KMeans(2**bits, n_init=3, random_state=0).fit(x[:, None].numpy(), sample_weight=weights.numpy())
    levels = cluster([(x, weights if weighted else None)], bits)
    assert len(levels) == 2**bits
    assert (levels.diff() > 0).all()
    assert levels.abs().max() <= 1
    best = inertia(x, weights, torch.from_numpy(theirs.cluster_centers_.ravel()))
    assert inertia(x, weights, levels) <= 1.01 * best


def test_few_points_are_cut_in_the_best_of_all_ways():
    random = torch.Generator().manual_seed(1)
    x = (torch.rand(14, generator=random) * 2 - 1).sort().values.double()
    weights = torch.rand(14, generator=random).double() ** 3

    def cost(cuts: tuple[int, ...]) -> float:
        runs = [slice(*run) for run in itertools.pairwise((0, *cuts, 14))]
        return sum(inertia(x[r], weights[r], ((weights[r] * x[r]).sum() / weights[r].sum())[None]) for r in runs)

    best = min(map(cost, itertools.combinations(range(1, 14), 3)))
    assert inertia(x, weights, cluster([(x, weights)], 2)) == pytest.approx(best, rel=1e-3)  # bins are 3e-5 wide


@every("bits", BITS)
def test_levels_of_uniform_points_are_evenly_spaced(bits):
    x = torch.linspace(-1, 1, 2**18)
    expected = (torch.arange(2**bits) * 2 + 1) / 2**bits - 1
    assert_close(cluster([(x, None)], bits), expected, rtol=0, atol=2e-3)  # cells of the exact cut are 4e-3 wide


@every("place", [-0.77, 0.031, 0.9])
def test_a_level_lies_where_nearly_all_weight_is(place):
    x, _ = points("uniform")
    x[7] = place
    weights = torch.ones_like(x)
    weights[7] = 1e6
    assert (cluster([(x, weights)], 3) - place).abs().min() < 1e-4


def test_the_order_of_points_and_how_they_come_in_pieces_change_nothing():
    x, weights = points("two humps")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    levels = cluster([(x, weights)], 3)
    assert torch.equal(cluster([(x[order], weights[order])], 3), levels)
    pieces = zip(x.view(10, 50, 40), weights.view(10, 50, 40), strict=True)
    assert torch.equal(cluster(pieces, 3), levels)


@every("held", [0, 1, 2, 3, 4, 5, 8])
def test_fewer_places_than_levels_are_levels_themselves(held):
    x = torch.tensor([-0.9, -0.5, 0.1, 0.7, 0.2, 0.6, 0.95, -0.1])[:held]
    levels = cluster([(x, None)] * 5, 3)
    assert levels.shape == (8,)
    assert (levels.diff() >= 0).all()
    for point in x:
        assert (levels - point).abs().min() < 2e-5


def test_a_point_goes_to_the_nearest_level():
    levels, x = cluster([points("normal")], 4), torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    assert torch.equal(nearest(x, levels), (x[:, None] - levels).abs().argmin(1))


@every("bits", BITS)
def test_normal_float_levels_are_quantiles_of_the_normal_distribution(bits):
    outermost, half = (1 / 32 + 1 / 30) / 2, 2 ** (bits - 1)
    icdf = NormalDist().inv_cdf
    below = [icdf(outermost + (0.5 - outermost) * i / (half - 1)) for i in range(half - 1)]
    above = [icdf(0.5 + (0.5 - outermost) * i / half) for i in range(1, half + 1)]
    expected = [x / -below[0] for x in below] + [0.0] + [x / above[-1] for x in above]
    assert_close(normal_float(bits), torch.tensor(expected), rtol=1e-6, atol=1e-7)
    assert len(expected) == 2**bits


def test_even_levels_are_those_of_a_uniform_grid_from_end_to_end():
    assert_close(even_levels(2), torch.tensor([-1, -1 / 3, 1 / 3, 1]))
