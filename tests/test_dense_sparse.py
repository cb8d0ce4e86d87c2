"""KVQuant's split of vectors into outliers and the rest, against NumPy's percentiles and the rules of the paper."""

import numpy as np
import torch
from common import every
from torch import Tensor
from torch.testing import assert_close

from quantization.kv_cache.dense_sparse import (
    index_bits,
    key_outliers,
    outliers_per_side,
    put_back,
    take_out,
    thresholds,
    value_split,
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@every("share", [0.0, 0.01, 0.02, 0.1, 1 / 7])
@every("tokens", [1, 2, 7, 201, 1000])
def test_thresholds_are_percentiles_with_linear_interpolation(share, tokens):
    x = numbers(tokens, 5)
    low, high = thresholds(x, share)
    t = 100 * (1 - share / 2)
    assert_close(high.double(), torch.tensor(np.percentile(x.double(), t, axis=0)), rtol=1e-5, atol=1e-6)
    assert_close(low.double(), torch.tensor(np.percentile(x.double(), 100 - t, axis=0)), rtol=1e-5, atol=1e-6)


@every("channels", [3, 64, 192, 201, 1024, 4096, 8192])
@every("share", [0.0, 0.01, 0.001, 0.1])
def test_the_outliers_of_a_token_are_those_at_or_beyond_its_quantiles(channels, share):
    y = numbers(channels, seed=channels).double()
    t = 1 - share / 2
    high, low = np.quantile(y, [t, 1 - t])
    expected = {i for i, value in enumerate(y.tolist()) if share and (value <= low or value >= high)}
    per_side = outliers_per_side(channels, share)
    assert set(value_split(y, per_side).channels.tolist()) == expected
    assert 2 * per_side == len(expected)


@every(("channels", "count"), [(1024, 12), (4096, 42)])
def test_one_percent_are_twelve_of_1024_and_42_of_4096(channels, count):
    assert 2 * outliers_per_side(channels, 0.01) == count


@every("channels", [1, 2, 3, 4])
def test_one_value_at_least_is_left_over(channels):
    per_side = outliers_per_side(channels, 0.9)
    split = value_split(numbers(5, channels), per_side)
    assert channels - split.channels.shape[-1] >= 1
    assert (split.low <= split.high).all()


def test_the_range_of_a_token_is_that_of_its_inliers_and_six_planted_values_a_side_do_not_move_it():
    y = numbers(8, 1024)
    per_side = outliers_per_side(1024, 0.01)
    split = value_split(y, per_side)
    outliers = torch.zeros_like(y, dtype=torch.bool).scatter(-1, split.channels, True)
    middle = torch.where(outliers, y.median(-1, keepdim=True).values, y)  # the paper's rule
    assert torch.equal(split.low, middle.amin(-1, keepdim=True))
    assert torch.equal(split.high, middle.amax(-1, keepdim=True))
    planted = y.scatter(-1, split.channels, torch.cat([torch.full((8, 6), -1e4), torch.full((8, 6), 1e4)], -1))
    assert torch.equal(value_split(planted, per_side).low, split.low)
    assert torch.equal(value_split(planted, per_side).high, split.high)
    dense = value_split(y, 0)
    assert torch.equal(torch.cat([dense.low, dense.high], -1), torch.stack(y.aminmax(dim=-1), -1))


def test_a_key_on_its_threshold_is_no_outlier():
    y = torch.tensor([[-1.0, 1.0, 1.0001, 0.0, -1.0001]])
    index = key_outliers(y, -torch.ones(5), torch.ones(5), 4)
    assert sorted(index[0].tolist()) == [2, 4, 5, 5]  # two slots are empty


def test_keys_with_too_many_outliers_keep_those_farthest_outside_in_units_of_their_range():
    low, high = torch.tensor([-1.0, -10, -1, -1]), torch.tensor([1.0, 10, 1, 1])
    y = torch.tensor([[1.5, 14.0, 0.0, -3.0], [0.0, 0.0, 0.0, 0.0]])
    assert key_outliers(y, low, high, 2).tolist() == [[3, 0], [4, 4]]  # 10 is 0.4 ranges outside, 1.5 is 0.5
    assert key_outliers(y, low, high, 0).shape == (2, 0)


def test_a_channel_without_any_range_has_outliers_where_it_differs():
    y = torch.tensor([[3.0, 3.5]])
    assert key_outliers(y, torch.full((2,), 3.0), torch.full((2,), 3.0), 2).tolist() == [[1, 2]]


@every("channels", [16, 40_000])
def test_what_was_taken_out_comes_back_and_nothing_else_moves(channels):
    y = numbers(2, 3, channels).half().float()
    index = value_split(y, 3).channels
    index[0, 0, 1] = channels  # an empty slot
    sparse = take_out(y, index)
    dense = numbers(2, 3, channels, seed=1)
    back = put_back(dense, sparse)
    outliers = torch.zeros(2, 3, channels + 1, dtype=torch.bool).scatter(-1, index, True)[..., :-1]
    assert torch.equal(back, torch.where(outliers, y, dense))
    assert sparse.channels.element_size() * 8 == index_bits(channels)
    assert sparse.values.dtype == torch.float16


def test_an_outlier_beyond_sixteen_bits_is_the_largest_of_them():
    y = torch.tensor([[1e9, 0.0, -1e9]])
    assert put_back(y, take_out(y, torch.tensor([[0, 2]]))).tolist() == [[65504.0, 0.0, -65504.0]]
