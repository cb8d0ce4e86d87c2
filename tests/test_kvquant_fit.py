"""KVQuant's calibration of a layer against the paper's steps in NumPy and scikit-learn."""

import numpy as np
import pytest
import torch
from common import every
from sklearn.cluster import KMeans
from torch import Tensor
from torch.testing import assert_close

from quantization.grids.nonuniform import even_levels, normal_float
from quantization.kv_cache.dense_sparse import outliers_per_side
from quantization.kv_cache.kvquant_fit import centred16, fit_keys, fit_values, q_norm

SETTINGS = {"bits": 3, "share": 0.02, "levels": "nuq", "ranged": False, "qnorm": False}


def layer(tokens: int = 3000, channels: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Numbers with ranges that differ by channel, and weights that differ by much."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1.5, channels)
    y = torch.randn(tokens, channels, generator=random) * scale + scale.roll(3)
    return y, torch.rand(tokens, channels, generator=random) ** 8


def inertia(points: "np.ndarray", weights: "np.ndarray", levels: "np.ndarray") -> float:
    return float((weights * ((points[:, None] - levels) ** 2).min(1)).sum())


def key_points(y: Tensor, share: float) -> tuple["np.ndarray", "np.ndarray", "np.ndarray"]:
    """Normalized keys, where they are inliers, and half the range of every channel."""
    x = y.double().numpy()
    t = 100 * (1 - share / 2)
    high, low = np.percentile(x, t, axis=0), np.percentile(x, 100 - t, axis=0)
    points = (x - (high + low) / 2) / ((high - low) / 2)
    return points, np.abs(points) <= 1, (high - low) / 2


def value_points(y: Tensor, share: float) -> tuple["np.ndarray", "np.ndarray", "np.ndarray"]:
    x = y.double().numpy()
    high, low = (np.quantile(x, q, axis=1, keepdims=True) for q in (1 - share / 2, share / 2))
    kept = (x < high) & (x > low) if share else np.ones_like(x, dtype=bool)
    top = np.where(kept, x, -np.inf).max(1, keepdims=True)
    bottom = np.where(kept, x, np.inf).min(1, keepdims=True)
    return (x - (top + bottom) / 2) / ((top - bottom) / 2), kept, (top - bottom) / 2


@every(("fit", "reference", "name"), [(fit_keys, key_points, "keys"), (fit_values, value_points, "values")])
@every("weighting", ["none", "fisher", "fisher_range"])
@every("share", [0.0, 0.05])
def test_levels_are_the_clusters_of_the_inliers_under_their_weights(fit, reference, name, weighting, share):
    y, fisher = layer()
    points, kept, half = reference(y, share)
    weights = {"none": np.ones_like(points), "fisher": fisher.double().numpy(),
               "fisher_range": fisher.double().numpy() * half**2}[weighting]  # fmt: skip
    x, w = points[kept], weights[kept]
    theirs = KMeans(8, n_init=1, random_state=0, max_iter=50).fit(x[:, None], sample_weight=w)
    found = fit(y, None if weighting == "none" else fisher,
                **SETTINGS | {"share": share, "ranged": weighting == "fisher_range"})  # fmt: skip
    levels = found[f"{name}_levels"].double().numpy()
    assert len(levels) == 8
    assert (np.diff(levels) > 0).all()
    assert np.abs(levels).max() <= 1
    assert inertia(x, w, levels) <= 1.01 * inertia(x, w, theirs.cluster_centers_.ravel())
    if name == "keys":
        assert_close((found["keys_high"] - found["keys_low"]).double() / 2, torch.tensor(half), rtol=1e-5, atol=1e-6)


def test_fisher_weights_in_units_of_the_range_are_another_thing_than_without():
    y, fisher = layer()
    plain, ranged = (fit_keys(y, fisher, **SETTINGS | {"ranged": on})["keys_levels"] for on in (False, True))
    assert (plain - ranged).abs().max() > 1e-3


@every("fit", [fit_keys, fit_values])
def test_the_order_of_tokens_changes_no_level(fit):
    y, fisher = layer(5000)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(2))
    for name, tensor in fit(y, fisher, **SETTINGS).items():
        assert torch.equal(fit(y[order], fisher[order], **SETTINGS)[name], tensor)


@every(("kind", "levels"), [("uniform", even_levels(3)), ("nf", normal_float(3))])
def test_uniform_and_normal_float_levels_do_not_depend_on_the_text(kind, levels):
    y, _ = layer(50)
    assert torch.equal(fit_keys(y, None, **SETTINGS | {"levels": kind})["keys_levels"], levels)
    assert torch.equal(fit_values(y, None, **SETTINGS | {"levels": kind})["values_levels"], levels)


@every("kind", ["nuq", "uniform", "nf"])
def test_behind_q_norm_mean_and_spread_are_those_of_the_exact_numbers(kind):
    y, _ = layer(6000)
    found = fit_keys(y, None, **SETTINGS | {"levels": kind, "bits": 2, "qnorm": True})
    points, kept, _ = key_points(y, SETTINGS["share"])
    levels, (scale, offset) = found["keys_levels"].double().numpy(), found["keys_qnorm"].double().numpy()
    x = points[kept]
    decoded = levels[np.abs(x[:, None] - levels).argmin(1)] * scale + offset
    assert decoded.mean() == pytest.approx(x.mean(), abs=1e-4)
    assert decoded.std() == pytest.approx(x.std(), rel=1e-4)


def test_q_norm_of_points_that_all_take_one_level_only_shifts_them():
    assert q_norm([(torch.tensor([0.1, 0.3]), None)], torch.tensor([-1.0, 0.0])).tolist() == pytest.approx([1.0, 0.2])


def test_ranges_are_stored_in_sixteen_bits_and_never_empty():
    middle, half = centred16(torch.tensor([1.0, -1e9, 3.0]), torch.tensor([1.0, 1e9, 4.0]))
    assert half.tolist() == [2.0**-24, 65504.0, 0.5]
    assert middle.tolist() == [1.0, 0.0, 3.5]
    assert middle.dtype == half.dtype == torch.float16


def test_the_weights_of_outliers_count_for_nothing():
    y, fisher = layer(200, 101)
    per_side = outliers_per_side(101, SETTINGS["share"])
    order = y.argsort(-1)
    outer = torch.cat([order[:, :per_side], order[:, -per_side:]], -1)
    heavy = fisher.scatter(-1, outer, 1e6)
    assert torch.equal(
        fit_values(y, heavy, **SETTINGS)["values_levels"], fit_values(y, fisher, **SETTINGS)["values_levels"]
    )
