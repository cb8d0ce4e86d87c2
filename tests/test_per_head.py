"""IntactKV's per-head dynamic KV quantization against its formula, written as a loop in float64."""

import itertools
import math

import pytest
import torch
from common import Rounds, every
from families import FAMILIES, plain_logits, random_ids
from torch import Tensor
from torch.testing import assert_close

from corpora.errors import UserError
from intactkv.attach import attach
from intactkv.cache import IntactCache
from intactkv.prefix import build_prefix
from quantization.grids.uniform import UniformGrid, fake_quantize
from quantization.kv_cache import KV_POLICIES, PerHead

IDS = torch.cat([torch.tensor([1]), random_ids(33)])
BITS = range(2, 9)


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loop(x: Tensor, bits: int) -> Tensor:
    """IntactKV's published rule: s = clamp((max − min)/(2^b − 1), 1e-5, 1e4), z = round(clamp(−min/s, ±1e4)),
    q = clamp(round(x/s) + z, 0, 2^b − 1), x̂ = (q − z)·s, for one vector of D numbers after another, in Python's floats
    (round-half-to-even, as torch)."""
    top, result = 2**bits - 1, torch.empty(x.shape, dtype=torch.float64)
    for place in [(b, h, t) for b in range(x.shape[0]) for h in range(x.shape[1]) for t in range(x.shape[2])]:
        vector = [float(value) for value in x[place]]
        scale = min(max((max(vector) - min(vector)) / top, 1e-5), 1e4)
        zero = round(min(max(-min(vector) / scale, -1e4), 1e4))
        codes = [min(max(round(value / scale) + zero, 0), top) for value in vector]
        result[place] = torch.tensor([(code - zero) * scale for code in codes], dtype=torch.float64)
    return result


@every("bits", BITS)
@every("shift", [0.0, 3.0, -3.0])
def test_keys_and_values_follow_the_formula(bits, shift):
    x = states(2, 3, 5, 16, seed=3) * torch.tensor([0.3, 1.0, 30.0]).view(1, 3, 1, 1) + shift
    expected = loop(x, bits).float()
    # No number of this seed lies within float32's precision of a rounding border, so all codes agree.
    assert_close(Rounds(PerHead(bits)).keys(x), expected, rtol=1e-5, atol=1e-6)
    assert_close(Rounds(PerHead(bits)).values(x), expected, rtol=1e-5, atol=1e-6)


@every("bits", BITS)
def test_no_number_moves_by_more_than_half_a_step(bits):
    x = states(2, 3, 50, 16)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1)
    error = (Rounds(PerHead(bits)).keys(x) - x).abs()
    # The zero point is rounded, too: the end of the range may lie half a step beyond the last level.
    assert (error <= step * (0.5 + 1e-5)).all()


@every("bits", BITS)
def test_a_vector_takes_at_most_two_to_the_bits_values_and_zero_is_exact(bits):
    x = states(1, 2, 4, 1024)
    x[..., 7] = 0
    quantized = Rounds(PerHead(bits)).values(x)
    assert torch.count_nonzero(quantized[..., 7]) == 0
    for vector in quantized.reshape(-1, 1024):
        assert len(vector.unique()) <= 2**bits
    assert max(len(vector.unique()) for vector in quantized.reshape(-1, 1024)) > 2 ** (bits - 1)


def test_with_fewer_bits_the_error_grows_and_with_eight_it_is_small():
    x = states(4, 4, 64, 64)
    errors = [float((Rounds(PerHead(bits)).keys(x) - x).norm() / x.norm()) for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    # Uniform noise of one step: a range of about 5 standard deviations / 255 / sqrt(12).
    assert errors[-1] < 0.01
    assert all(better < 0.7 * worse for worse, better in itertools.pairwise(errors))


@every("bits", BITS)
@every("value", [0.0, 1.0, -3.7, 1000.0, 1e-3, 1 / 3])
def test_a_constant_vector_stays_to_half_the_smallest_step(bits, value):
    x = torch.full((1, 2, 3, 16), value)
    assert_close(Rounds(PerHead(bits)).keys(x), x, rtol=1e-6, atol=5e-6)


def test_a_vector_of_one_sign_keeps_all_its_levels():
    """Its range is taken as it is. One that is stretched to 0 has steps of 3/15 here, and errs 100 times as much."""
    x = 3 + 0.1 * states(2, 3, 50, 16).tanh()
    error = (Rounds(PerHead(4)).keys(x) - x).square().mean()
    step = (x.amax(-1) - x.amin(-1)) / 15
    assert error < (step.square() / 12).mean() * 1.5  # uniform noise of one step; the rounded zero point adds a little
    assert (Rounds(PerHead(4, "intactkv-asym")).keys(x) - x).square().mean() > 50 * error


@every("bits", BITS)
def test_quantizing_twice_is_quantizing_once_where_both_ends_of_the_range_are_in_use(bits):
    once = Rounds(PerHead(bits)).keys(states(2, 3, 20, 16))
    # The second range is that of the levels in use, of which rounding the zero point may have left one out at an end.
    twice = Rounds(PerHead(bits)).keys(once)
    spread = once.amax(-1) - once.amin(-1)
    full = torch.isclose(spread, (2**bits - 1) * smallest_step(once), rtol=1e-3)
    assert full.any()
    assert_close(twice[full], once[full], rtol=1e-5, atol=1e-6)


def smallest_step(levels: Tensor) -> Tensor:
    gaps = levels.sort(dim=-1).values.diff(dim=-1)
    return torch.where(gaps > 1e-5, gaps, torch.inf).amin(-1)


def test_a_token_does_not_see_its_neighbours():
    x, policy = states(2, 3, 6, 16), PerHead(3)
    changed = x.clone()
    changed[1, 2, 4] *= 100
    others = torch.ones(2, 3, 6, dtype=torch.bool)
    others[1, 2, 4] = False
    assert torch.equal(Rounds(policy).keys(changed)[others], Rounds(policy).keys(x)[others])
    assert not torch.equal(Rounds(policy).keys(changed)[1, 2, 4], Rounds(policy).keys(x)[1, 2, 4])


@pytest.mark.parametrize("chunk", [1, 3, 17])
def test_chunking_does_not_change_a_stored_bit(chunk, tiny_config):
    # Fed with identical states: inside a model a chunk's states differ by 1e-7, and that can flip a code.
    config, keys, values = tiny_config("llama"), states(2, 2, 40, 16), states(2, 2, 40, 16, seed=1)
    prefix = [states(1, 2, 3, 16, seed=9) for _ in range(3)]
    whole, parts = (IntactCache(config, prefix, prefix, PerHead(3)) for _ in range(2))
    whole.update(keys, values, 0)
    for k, v in zip(keys.split(chunk, dim=2), values.split(chunk, dim=2), strict=True):
        read = parts.update(k, v, 0)
    for ours, theirs in zip(read, whole.intact_layers[0].held, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(read[0][1, :, :3], prefix[0][0])
    assert torch.equal(read[0][:, :, 3:], Rounds(PerHead(3)).keys(keys))


def test_attention_reads_the_quantized_states_of_the_current_tokens(tiny_config):
    cache, x = IntactCache(tiny_config("llama"), policy=PerHead(2)), states(1, 2, 5, 16)
    keys, values = cache.update(x, 2 * x, 1)
    assert_close(keys, loop(x, 2).float(), rtol=1e-5, atol=1e-6)
    assert_close(values, loop(2 * x, 2).float(), rtol=1e-5, atol=1e-6)


@every("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_quantized_in_float32_and_come_back_in_their_dtype(dtype):
    x = states(2, 3, 5, 16).to(dtype)
    quantized = Rounds(PerHead(4)).keys(x)
    assert quantized.dtype == dtype
    assert torch.equal(quantized, loop(x, 4).float().to(dtype))
    huge = torch.full((1, 1, 1, 16), 60000.0, dtype=torch.float16)
    huge[..., 0] = -60000.0  # a range of 120,000 overflows in half precision
    assert_close(Rounds(PerHead(4)).keys(huge), huge, rtol=0.08, atol=0.0)


@every("bits", [-1, 0, 1, 9, 16])
def test_bits_outside_2_to_8_are_refused(bits):
    with pytest.raises(UserError, match=f"KV bits={bits} is not supported; use 2 to 8"):
        PerHead(bits)


def test_the_policy_has_a_name_and_compares_by_its_bits():
    assert KV_POLICIES["per_head"] is PerHead
    assert PerHead(4) == PerHead(4) != PerHead(3)


# In a model -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def model(request, tiny_model):
    model_type, overrides = FAMILIES[request.param]
    return tiny_model(model_type, **overrides)


def test_eight_bits_hardly_move_the_logits_and_fewer_bits_move_them_more(model):
    prefix, text = build_prefix(model, IDS[:3]), torch.cat([IDS[:3], random_ids(30, seed=1)])
    truth = plain_logits(model, text)
    errors = [
        float((attach(model, prefix, PerHead(bits)).score(text[None])[0] - truth)[3:].norm() / truth[3:].norm())
        for bits in (8, 5, 3, 2)
    ]
    assert errors[0] < 0.05
    assert errors == sorted(errors)
    assert errors[-1] > 0.05


def test_padded_rows_are_quantized_as_they_are_alone(model):
    # 8 bits: a code that a sum in another order flips moves the logits by little, a wrong token by much.
    prefix, rows = build_prefix(model, IDS[:3]), [random_ids(4, seed=4), random_ids(9, seed=9)]
    behind = attach(model, prefix, PerHead(8))
    ids, mask = torch.zeros(2, 9).long(), torch.zeros(2, 9).long()
    for i, row in enumerate(rows):
        ids[i, 9 - len(row) :], mask[i, 9 - len(row) :] = row, 1
    for logits, keep, row in zip(behind.score(ids, mask), mask.bool(), rows, strict=True):
        alone = behind.score(row[None])[0]
        assert (logits[keep] - alone).norm() < 0.02 * alone.norm()


def test_the_prefix_is_exact_under_any_number_of_bits(model):
    prefix = build_prefix(model, IDS[:3])
    behind = attach(model, prefix, PerHead(2))
    cache = behind.new_cache()
    behind.feed(random_ids(9)[None], cache=cache)
    assert cache.rounded_share == 1
    for layer, keys, values in zip(cache.intact_layers, prefix.keys, prefix.values, strict=True):
        assert torch.equal(layer.held[0][:, :, :3], keys)
        assert torch.equal(layer.held[1][:, :, :3], values)
        for vector in layer.held[0][:, :, 3:].flatten(0, 2):
            assert len(vector.unique()) <= 4


def test_the_stored_prefix_logits_stay_full_precision(model):
    prefix, text = build_prefix(model, IDS[:3]), torch.cat([IDS[:3], random_ids(6)])
    assert torch.equal(attach(model, prefix, PerHead(2)).score(text[None])[0, :3], prefix.logits)


def test_it_composes_with_quantized_weights(tiny_model):
    model, text = tiny_model("llama"), torch.cat([IDS[:3], random_ids(30, seed=1)])
    prefix, truth = build_prefix(model, IDS[:3]), plain_logits(model, text)
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.copy_(fake_quantize(weight, UniformGrid(4, 16)))
    weights_only = attach(model, prefix).score(text[None])[0]
    both = attach(model, prefix, PerHead(3)).score(text[None])[0]
    assert torch.isfinite(both).all()
    assert not torch.equal(both, weights_only)
    # A second source of error, larger than the first, adds to it.
    error = [float((x - truth)[3:].norm()) for x in (weights_only, both)]
    assert error[0] < error[1] < math.inf


def test_generation_with_a_quantized_cache_is_step_by_step_scoring(model):
    model.generation_config.eos_token_id = None
    prefix, prompt = build_prefix(model, IDS[:3]), torch.cat([IDS[:3], random_ids(6)])[None]
    behind = attach(model, prefix, PerHead(4))
    output = behind.generate(prompt, max_new_tokens=6, do_sample=False)
    cache, expected = behind.new_cache(), []
    feed = prompt[:, 3:]
    for _ in range(6):
        feed = behind.feed(feed, cache=cache).logits[:, -1:].argmax(-1)
        expected.append(int(feed))
    assert output[0, 9:].tolist() == expected
