"""The one cache: transformers' own without a prefix, and with one its slots are never touched."""

import itertools

import pytest
import torch
from families import FAMILIES, SLIDING, plain_cache, plain_logits, random_ids
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, DynamicCache, PreTrainedConfig

from corpora.errors import UserError
from intactkv.attach import attach
from intactkv.cache import IntactCache
from intactkv.prefix import build_prefix
from quantization.kv_cache import PerHead

IDS = torch.cat([torch.tensor([1]), random_ids(33)])
P = 3


@pytest.fixture(params=FAMILIES)
def model(request, tiny_model):
    model_type, overrides = FAMILIES[request.param]
    return tiny_model(model_type, **overrides)


@pytest.fixture
def prefix(model):
    return build_prefix(model, IDS[:P])


@torch.no_grad()
def run(model, cache, ids: Tensor) -> Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def batch(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return random_ids(rows * tokens, seed).view(rows, tokens)


def contents(cache: IntactCache) -> list[Tensor]:
    return [tensor.clone() for layer in cache.intact_layers for tensor in layer.held]


def assert_prefix_intact(cache: IntactCache, prefix, rows: int) -> None:
    for layer, keys, values in zip(cache.intact_layers, prefix.keys, prefix.values, strict=True):
        held_keys, held_values = layer.held
        assert held_keys.shape[0] == rows
        for row in range(rows):
            assert torch.equal(held_keys[row, :, :P], keys[0])
            assert torch.equal(held_values[row, :, :P], values[0])


# Without a prefix and a policy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("window", [8, 48])
def test_without_prefix_and_policy_it_is_transformers_dynamic_cache_bit_for_bit(name, window, tiny_model):
    model_type, overrides = FAMILIES[name]
    if name in SLIDING:
        overrides = {**overrides, "sliding_window": window}
    model = tiny_model(model_type, **overrides)
    ours, theirs = IntactCache(model.config), DynamicCache(config=model.config)
    assert ours.is_sliding == theirs.is_sliding
    assert ours.is_croppable == theirs.is_croppable
    assert ours.is_compileable == theirs.is_compileable
    for chunk in (batch(2, 6), batch(2, 1, seed=1), batch(2, 5, seed=2)):
        for layer in range(3):
            assert ours.get_mask_sizes(4, layer) == theirs.get_mask_sizes(4, layer)
        assert torch.equal(run(model, ours, chunk), run(model, theirs, chunk))
        assert ours.get_seq_length() == theirs.get_seq_length()
        for mine, other in zip(ours.intact_layers, theirs.layers, strict=True):
            assert torch.equal(mine.held[0], other.keys)
            assert torch.equal(mine.held[1], other.values)


@pytest.mark.parametrize("window", [8, 48])
@pytest.mark.parametrize("name", SLIDING)
def test_mask_sizes_behind_a_prefix_are_those_of_a_cache_that_read_it(name, window, tiny_model):
    model_type, overrides = FAMILIES[name]
    model = tiny_model(model_type, **{**overrides, "sliding_window": window})
    ours, theirs = build_prefix(model, IDS[:P]).cache(model.config), plain_cache(model, IDS[None, :P])
    for chunk in (batch(1, 4), batch(1, 1), batch(1, 6)):
        for layer, queries in itertools.product(range(3), (1, 4)):
            assert ours.get_mask_sizes(queries, layer) == theirs.get_mask_sizes(queries, layer)
            assert ours.get_seq_length(layer) == theirs.get_seq_length(layer)
        assert_close(run(model, ours, chunk), run(model, theirs, chunk), atol=1e-4, rtol=1e-4)


# The prefix -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, PerHead(2)], ids=["full", "kv2"])
def test_prefix_slots_stay_bit_identical_through_all_that_a_cache_goes_through(model, prefix, policy):
    cache = prefix.cache(model.config, policy)
    run(model, cache, batch(2, 7))  # prefill
    run(model, cache, batch(2, 1))  # decode
    assert_prefix_intact(cache, prefix, 2)
    cache.batch_repeat_interleave(3)
    assert_prefix_intact(cache, prefix, 6)
    cache.reorder_cache(torch.tensor([5, 0, 0, 3, 2, 1]))
    run(model, cache, batch(6, 1))
    cache.crop(-4)
    assert_prefix_intact(cache, prefix, 6)
    cache.batch_select_indices(torch.tensor([4, 1]))
    run(model, cache, batch(2, 5))
    assert_prefix_intact(cache, prefix, 2)
    cache.crop(-10)
    assert cache.get_seq_length() == P
    assert_prefix_intact(cache, prefix, 2)


@pytest.mark.parametrize("policy", [None, PerHead(2)], ids=["full", "kv2"])
def test_prefix_slots_stay_bit_identical_through_generation_with_beams(model, prefix, policy):
    prompt = torch.cat([IDS[:P], random_ids(6)])[None]
    output = attach(model, prefix, policy).generate(
        prompt, max_new_tokens=8, num_beams=3, do_sample=False, return_dict_in_generate=True
    )
    assert_prefix_intact(output.past_key_values, prefix, 3)


def test_a_fresh_cache_counts_its_prefix_and_holds_no_copy_of_it(model, prefix):
    cache = prefix.cache(model.config)
    assert cache.get_seq_length() == cache.prefix_length == P
    assert all(layer.prefix[0] is key for layer, key in zip(cache.intact_layers, prefix.keys, strict=True))


def test_two_caches_of_one_prefix_do_not_know_each_other(model, prefix):
    first, second = prefix.cache(model.config), prefix.cache(model.config)
    expected = run(model, prefix.cache(model.config), batch(1, 5))
    run(model, first, batch(2, 9, seed=1))
    assert torch.equal(run(model, second, batch(1, 5)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_full_precision_prefix_is_rounded_to_the_models_dtype(model, prefix, dtype):
    half = model.to(dtype)
    cache = prefix.cache(half.config)
    run(half, cache, batch(2, 4))
    for layer, keys in zip(cache.intact_layers, prefix.keys, strict=True):
        assert layer.held[0].dtype == dtype
        assert torch.equal(layer.held[0][1, :, :P], keys[0].to(dtype))


# Editing --------------------------------------------------------------------------------------------------------------


def test_what_was_cropped_leaves_no_trace(model, prefix):
    cache, untouched = prefix.cache(model.config), prefix.cache(model.config)
    run(model, untouched, batch(2, 5))
    run(model, cache, batch(2, 5))
    before = contents(cache)
    run(model, cache, batch(2, 4, seed=1))
    cache.crop(-4)
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), before, strict=True))
    assert torch.equal(run(model, cache, batch(2, 3)), run(model, untouched, batch(2, 3)))


def test_cropping_nothing_does_nothing(model, prefix):
    cache = prefix.cache(model.config)
    cache.crop(0)
    assert cache.get_seq_length() == P
    run(model, cache, batch(1, 5))
    before = contents(cache)
    cache.crop(0)
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), before, strict=True))


def test_cropping_into_the_prefix_is_refused_and_changes_nothing(model, prefix):
    cache = prefix.cache(model.config)
    with pytest.raises(ValueError, match="cut into the intact prefix: only 0 tokens"):
        cache.crop(-1)
    run(model, cache, batch(1, 5))
    before = contents(cache)
    with pytest.raises(ValueError, match="cut into the intact prefix: only 5 tokens"):
        cache.crop(-6)
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), before, strict=True))
    cache.crop(-5)
    assert cache.get_seq_length() == P


def test_a_positive_count_is_refused_as_by_transformers(model, prefix):
    cache = prefix.cache(model.config)
    for _ in range(2):
        with pytest.raises(ValueError, match="positive"):
            cache.crop(2)
        run(model, cache, batch(1, 5))


def test_reordering_and_back_is_the_identity(model, prefix):
    cache = prefix.cache(model.config)
    run(model, cache, batch(4, 5))
    before, order = contents(cache), torch.tensor([2, 0, 3, 1])
    cache.reorder_cache(order)
    assert not torch.equal(contents(cache)[0], before[0])
    assert torch.equal(contents(cache)[0], before[0][order])
    cache.reorder_cache(order.argsort())
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), before, strict=True))


def test_repeating_and_selecting_sequences_is_indexing_the_batch(model, prefix):
    cache = prefix.cache(model.config)
    run(model, cache, batch(2, 5))
    before = contents(cache)
    cache.batch_repeat_interleave(3)
    assert all(torch.equal(a, b[[0, 0, 0, 1, 1, 1]]) for a, b in zip(contents(cache), before, strict=True))
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert all(torch.equal(a, b[[1, 0]]) for a, b in zip(contents(cache), before, strict=True))


def test_before_the_first_tokens_the_shared_prefix_fits_any_batch(model, prefix):
    expected = run(model, prefix.cache(model.config), batch(3, 5))
    cache = prefix.cache(model.config)
    cache.batch_repeat_interleave(4)
    cache.reorder_cache(torch.tensor([3, 1, 0, 2]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert cache.get_seq_length() == P
    assert torch.equal(run(model, cache, batch(3, 5)), expected)


@pytest.mark.parametrize("policy", [None, PerHead(3)], ids=["full", "kv3"])
def test_after_a_reset_only_the_prefix_is_left(model, prefix, policy):
    expected = run(model, prefix.cache(model.config, policy), batch(2, 5))
    cache = prefix.cache(model.config, policy)
    run(model, cache, batch(4, 9, seed=1))
    cache.reset()
    assert cache.get_seq_length() == P
    assert cache.rounded_share == 0
    assert torch.equal(run(model, cache, batch(2, 5)), expected)
    assert cache.rounded_share == (0 if policy is None else 1)


def test_sequences_of_a_batch_do_not_read_each_other(model, prefix):
    alone, together = prefix.cache(model.config), prefix.cache(model.config)
    ids = batch(3, 6)
    for row, logits in zip(ids, run(model, together, ids), strict=True):
        assert_close(logits, plain_logits(model, torch.cat([IDS[:P], row]))[P:], atol=1e-4, rtol=1e-4)
    assert_close(run(model, alone, ids[1:2])[0], run(model, prefix.cache(model.config), ids)[1], atol=1e-4, rtol=1e-4)


# What it says about itself --------------------------------------------------------------------------------------------


def test_the_rounded_share_counts_the_tokens_that_the_policy_saw(model, prefix):
    full, quantized = prefix.cache(model.config), prefix.cache(model.config, PerHead(4))
    assert quantized.rounded_share == 0  # nothing seen yet: the prefix does not count
    for chunk in (batch(1, 5), batch(1, 1)):
        run(model, full, chunk)
        run(model, quantized, chunk)
        assert (full.rounded_share, quantized.rounded_share) == (0, 1)
    quantized.crop(-2)
    assert quantized.rounded_share == 1
    run(model, quantized, batch(1, 3))
    assert quantized.rounded_share == 1
    quantized.crop(-7)
    assert quantized.rounded_share == 0


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_smallest_window_is_the_configurations(name, tiny_config):
    model_type, overrides = FAMILIES[name]
    expected = 48 if name in SLIDING else None
    assert IntactCache(tiny_config(model_type, **overrides)).smallest_window == expected


def test_caches_are_of_one_kind_if_prefix_and_policy_agree(tiny_model):
    model = tiny_model("llama")
    one, other = build_prefix(model, IDS[:P]), build_prefix(model, [1, 50, 51])
    assert one.cache(model.config).same_kind(build_prefix(model, IDS[:P]).cache(model.config))
    assert one.cache(model.config, PerHead(4)).same_kind(one.cache(model.config, PerHead(4)))
    assert not one.cache(model.config).same_kind(other.cache(model.config))
    assert not one.cache(model.config).same_kind(one.first(2).cache(model.config))
    assert not one.cache(model.config).same_kind(IntactCache(model.config))
    assert not one.cache(model.config, PerHead(4)).same_kind(one.cache(model.config, PerHead(3)))


def linear_attention() -> PreTrainedConfig:
    return AutoConfig.for_model(
        "qwen3_next", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], num_experts=2
    )


def state_space() -> PreTrainedConfig:
    return AutoConfig.for_model("falcon_h1", num_hidden_layers=2)


@pytest.mark.parametrize("config", [linear_attention, state_space])
def test_layers_that_keep_no_keys_and_values_are_refused_by_name(config):
    with pytest.raises(UserError, match=r"layer 0 of this \w+ model keeps a LinearAttention\w*Layer"):
        IntactCache(config())


def test_a_prefix_is_brought_to_the_model_once(tiny_model):
    model = tiny_model("llama")
    prefix = build_prefix(model, IDS[:P])
    intact = attach(model.to(torch.float64).requires_grad_(), prefix)
    with torch.inference_mode():
        first = intact.feed(IDS[None, P:]).logits
    made = [tensor for pair in prefix.copies._made.values() for tensor in pair]
    assert len(made) == 2 * len(prefix.keys)
    assert not any(tensor.is_inference() for tensor in made)
    intact.feed(IDS[None, P:]).logits.sum().backward()  # behind the same copies
    assert all(x is y for x, y in zip(made, (t for pair in prefix.copies._made.values() for t in pair), strict=True))
    assert_close(first, intact.feed(IDS[None, P:]).logits)
    assert torch.equal(prefix.first(2).keys[0], prefix.keys[0][:, :, :2])
    assert not prefix.first(2).copies._made


def test_copies_of_a_trained_prefix_keep_its_gradient(tiny_model):
    model = tiny_model("llama")
    prefix = build_prefix(model, IDS[:P])
    keys = [x.clone().requires_grad_() for x in prefix.keys]
    cache = IntactCache(model.to(torch.float64).config, keys, prefix.values)
    model(input_ids=IDS[None, P:], past_key_values=cache, use_cache=True).logits.sum().backward()
    assert all(x.grad is not None and bool(x.grad.any()) for x in keys)
