"""QuaRot's KV policy against its formula, written as a loop in Python's floats, and the laws of a rotated basis."""

import pytest
import torch
from common import Rounds, every
from families import random_ids
from torch import Tensor
from torch.testing import assert_close

from corpora.errors import UserError
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from quantization.hadamard import matrix, plan
from quantization.kv_cache import PerHead, Rotated
from quantization.named import kv_policy

BITS = range(2, 9)


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loop(x: Tensor, bits: int, keep: float, with_zero: bool) -> Tensor:
    """s = p(max − min)/(2^b − 1), z = round(−p min/s), x̂ = s(clamp(round(x/s) + z, 0, 2^b − 1) − z), vector by vector;
    with_zero: for a range that is extended to 0."""
    top, rows = 2**bits - 1, []
    for vector in x.flatten(0, -2).tolist():
        low, high = keep * min(vector), keep * max(vector)
        if with_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / top
        zero = round(-low / scale)
        rows.append([scale * (min(max(round(value / scale) + zero, 0), top) - zero) for value in vector])
    return torch.tensor(rows, dtype=torch.float64).view(x.shape)


@every("bits", BITS)
@every("keep", [1.0, 0.95, 0.7])
@every("shift", [0.0, 6.0, -6.0])
def test_keys_and_values_follow_the_formula(bits, keep, shift):
    x = states(2, 3, 5, 16, seed=1) * torch.tensor([0.01, 1.0, 30.0]).view(1, 3, 1, 1) + shift
    # Keys are given in the basis in which they are rounded, so that the loop starts from the same numbers.
    h = matrix(plan(16))
    keys = (x.double() @ h).float()
    policy = Rotated(bits, keep)
    largest = float(x.abs().max())
    off = (Rounds(policy).keys(keys).double() - loop(x, bits, keep, with_zero=True) @ h).abs()
    # A number next to a rounding border may fall to either side: the rotation of float32 moves it by 1e-6.
    assert float((off > 1e-5 * largest).double().mean()) < 0.02
    off = (Rounds(policy).values(x).double() - loop(x, bits, keep, with_zero=False)).abs()
    assert float((off > 1e-5 * largest).double().mean()) < 0.02


@every("size", [16, 24, 64, 128, 14, 18])  # the last two have no Hadamard matrix
@every("bits", BITS)
def test_in_the_rotated_basis_no_number_of_a_key_moves_by_more_than_half_a_step(size, bits):
    keys = states(2, 3, 40, size)
    h = matrix(plan(size)).float()
    before, after = keys @ h.T, Rounds(Rotated(bits, keep=1.0)).keys(keys) @ h.T
    step = (before.amax(-1, keepdim=True).clamp_min(0) - before.amin(-1, keepdim=True).clamp_max(0)) / (2**bits - 1)
    # The zero point is rounded, too: the end of the range may lie half a step beyond the last level.
    assert ((after - before).abs() <= step * (0.5 + 1e-3)).all()
    assert ((after - before).abs().amax(-1, keepdim=True) > step * 0.2).all()  # and it was rounded there
    # H keeps lengths, so the key itself moves by at most √D half steps.
    moved = (Rounds(Rotated(bits, keep=1.0)).keys(keys) - keys).norm(dim=-1, keepdim=True)
    assert (moved <= step * (0.5 + 1e-3) * size**0.5).all()


def test_scores_are_those_of_the_reference_that_rotates_queries_and_keys():
    q, k = states(1, 2, 5, 16, seed=2), states(1, 2, 7, 16, seed=3)
    h = matrix(plan(16)).float()
    reference = (q @ h.T) @ loop(k.double() @ matrix(plan(16)).T, 4, 0.95, with_zero=True).float().transpose(2, 3)
    assert_close(q @ Rounds(Rotated(4)).keys(k).transpose(2, 3), reference, rtol=0, atol=1e-4)


def test_a_token_is_rounded_alone():
    x = states(3, 2, 11, 16)
    policy, order = Rotated(4), torch.randperm(11, generator=torch.Generator().manual_seed(0))
    for rounded in (Rounds(policy).keys, Rounds(policy).values):
        whole = rounded(x)
        assert torch.equal(rounded(x[:, :, order]), whole[:, :, order])
        assert torch.equal(rounded(x[1:2, :, 4:5]), whole[1:2, :, 4:5])
        other = x.clone()
        other[:, :, 5] *= 100
        rest = torch.arange(11) != 5
        assert torch.equal(rounded(other)[:, :, rest], whole[:, :, rest])


@every("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_without_clipping_are_nearly_exact(dtype):
    x = states(2, 3, 40, 64).to(dtype)
    for rounded in (Rounds(Rotated(8, keep=1.0)).keys(x), Rounds(Rotated(8, keep=1.0)).values(x)):
        assert rounded.dtype == dtype
        assert float((rounded - x).float().norm() / x.float().norm()) < 0.012


def test_cutting_five_per_cent_of_the_range_moves_the_ends_only():
    x = torch.linspace(-1, 1, 16).view(1, 1, 1, 16)
    moved = (Rounds(Rotated(8)).values(x) - x).abs().flatten()
    assert float(moved[0]) == pytest.approx(0.05, abs=0.005)
    assert float(moved[1:-1].max()) < 0.005


def test_a_channel_that_dwarfs_the_others_costs_the_other_keys_less():
    keys = states(2, 3, 40, 64)
    keys[..., 7] *= 40  # as RoPE models have them
    error = {policy: float((Rounds(policy).keys(keys) - keys).norm()) for policy in (Rotated(4), PerHead(4))}
    assert error[Rotated(4)] < 0.6 * error[PerHead(4)]
    assert (Rounds(PerHead(4)).keys(keys)[..., :7] == 0).float().mean() > 0.5  # what is lost without rotation
    assert (Rounds(Rotated(4)).keys(keys)[..., :7] == 0).float().mean() < 0.01


def test_a_range_far_from_zero_keeps_its_levels_for_values():
    values = 50 + states(2, 3, 40, 64)
    error = float((Rounds(Rotated(8, keep=1.0)).values(values) - values).abs().max())
    assert error < 0.02  # a step of 8/255 at most; a range that contains 0 would have steps of 0.2


@every("value", [0.0, 3.0, -0.02])
def test_heads_whose_values_are_all_the_same_are_exact(value):
    x = torch.full((1, 2, 3, 16), value)
    assert_close(Rounds(Rotated(4)).values(x), x, rtol=1e-6, atol=0)
    assert torch.equal(Rounds(Rotated(4)).keys(torch.zeros(1, 2, 3, 16)), torch.zeros(1, 2, 3, 16))


def test_the_prefix_in_the_cache_is_not_touched(tiny_model):
    model = tiny_model("llama")
    prefix = build_prefix(model, torch.tensor([1, 40]))
    behind = attach(model, prefix, Rotated(3))
    cache = behind.new_cache()
    with torch.no_grad():
        behind.feed(random_ids(9)[None], cache=cache)
    for layer, keys, values in zip(cache.intact_layers, prefix.keys, prefix.values, strict=True):
        held = layer.held
        assert torch.equal(held[0][:, :, :2], keys)
        assert torch.equal(held[1][:, :, :2], values)
        assert held[0].shape[2] == 11
    assert cache.rounded_share == 1


def test_it_is_chosen_by_name():
    assert kv_policy("rotated", 4) == Rotated(4)


@every(
    ("arguments", "named"),
    [((1,), "KV bits=1"), ((9,), "KV bits=9"), ((4, 0.0), "kv_cache.keep=0"), ((4, 1.1), "kv_cache.keep=1.1")],
)
def test_what_no_grid_can_be_is_refused(arguments, named):
    with pytest.raises(UserError, match=named):
        Rotated(*arguments)
