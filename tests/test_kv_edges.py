"""KV policies where a cache is used again, a model is half as wide, or something is asked that cannot be."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import random_ids
from test_store import calibrated, fed
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from corpora.errors import UserError
from intactkv.attach import attach
from intactkv.policy import Bound
from intactkv.prefix import build_prefix
from quantization.kv_cache import KIVI, KVQuant, PerHead, StaticPerHead
from quantization.recipes.recipe import Recipe
from quantization.runs.plan import plan_run

IDS = random_ids(40, seed=2)[None]


@pytest.fixture
def llama(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model("llama")


@torch.no_grad()
@pytest.mark.parametrize("again", ["reset", "crop"])
def test_pads_of_an_earlier_text_are_forgotten_with_it(again: str, llama: PreTrainedModel) -> None:
    policy = KVQuant(3, weighting="none", sinks=1)
    intact = attach(llama, None, Bound(policy, calibrated(llama, policy)))
    expected, cache, mask = intact.feed(IDS).logits, intact.new_cache(), torch.ones_like(IDS)
    mask[0, :9] = 0
    intact.feed(IDS, mask, cache=cache)
    cache.reset() if again == "reset" else cache.crop(-40)
    assert torch.equal(intact.feed(IDS, cache=cache).logits, expected)


@torch.no_grad()
def test_pads_of_an_earlier_call_stay_masked(llama: PreTrainedModel) -> None:
    intact, mask = attach(llama, build_prefix(llama, [1, 5]), PerHead(4)), torch.ones_like(IDS)
    mask[0, :9] = 0
    cache = intact.new_cache()
    intact.feed(IDS[:, :30], mask[:, :30], cache=cache)
    after = intact.feed(IDS[:, 30:], cache=cache).logits
    assert_close(after, intact.feed(IDS[:, 9:]).logits[:, -10:], atol=0.3, rtol=0.1)  # codes may flip by 1e-7
    assert torch.equal(after, fed_again(intact, IDS, mask))


def fed_again(intact: Any, ids: Tensor, mask: Tensor) -> Tensor:
    cache = intact.new_cache()
    intact.feed(ids[:, :30], mask[:, :30], cache=cache)
    return intact.feed(ids[:, 30:], mask, cache=cache).logits


def test_packed_storage_has_no_gradients_and_says_so(llama: PreTrainedModel) -> None:
    embedded = llama.get_input_embeddings()(IDS).detach().requires_grad_(True)
    for policy in (PerHead(4), KIVI(2, group_size=8, residual=8)):
        intact = attach(llama, None, Bound(policy, {}, packed=True))
        with pytest.raises(UserError, match="passes no gradients; train with --kv-storage fake"):
            llama(inputs_embeds=embedded, past_key_values=intact.new_cache(), use_cache=True)


def test_tokens_in_parts_have_the_gradients_of_one_pass(llama: PreTrainedModel) -> None:
    """Also where only queries are trained, so that no key asks for a gradient in the first block."""
    weight = llama.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    intact, found = attach(llama, None, KIVI(4, group_size=8, residual=8)), []
    for chunk in (40, 7):
        logits, _ = fed(intact, IDS, chunk)
        (gradient,) = torch.autograd.grad(logits.square().mean(), weight)
        found.append(gradient)
    assert_close(found[1], found[0], rtol=0, atol=0.1 * float(found[0].abs().max()))  # codes may flip by 1e-7


@torch.no_grad()
def test_scores_beyond_float16_are_scaled_before_they_are_stored(tiny_model: Any) -> None:
    model = tiny_model("qwen2")
    for block in model.model.layers:
        block.self_attn.k_proj.bias.add_(150)
        block.self_attn.q_proj.bias.add_(60)
    half = model.half()
    exact = attach(half, None).score(IDS)
    intact = attach(half, None, KIVI(8, group_size=8, residual=8))
    moved = float((intact.score(IDS) - exact).norm() / exact.norm())
    assert moved < 0.1


@torch.no_grad()
def test_sinks_are_exact_and_counted_so(llama: PreTrainedModel) -> None:
    policy = KVQuant(2, weighting="none", sinks=30)
    tensors = calibrated(llama, KVQuant(2, weighting="none", sinks=0))
    intact = attach(llama, None, Bound(policy, tensors))
    _, cache = fed(intact, IDS[:, :30], 30)
    assert cache.rounded_share == 0
    assert cache.memory()["keys"].rounded_elements == 0  # type: ignore[union-attr]
    intact.count(cache)  # no token was rounded, and none should have been
    _, cache = fed(intact, IDS, 40)
    assert cache.rounded_share == pytest.approx(sum(range(1, 11)) / (40 * 41 / 2))


@torch.no_grad()
def test_what_attention_read_is_counted_once_whatever_is_cropped(llama: PreTrainedModel) -> None:
    intact = attach(llama, None, PerHead(4))
    _, cache = fed(intact, IDS, 40)
    whole = cache.reads()
    assert whole == (2 * 3 * 820, 2 * 3 * 820)  # keys and values, layers, pairs
    cache.crop(-20)
    assert cache.reads() == (0, 0)
    intact.feed(IDS[:, 20:], cache=cache)
    assert cache.reads() == (2 * 3 * (820 - 210), 2 * 3 * (820 - 210))
    cache.reset()
    intact.feed(IDS[:, :5], cache=cache)
    assert cache.reads() == (2 * 3 * 15, 2 * 3 * 15)


@torch.no_grad()
def test_a_copy_of_a_cache_goes_on_as_the_cache_does(llama: PreTrainedModel) -> None:
    policy = StaticPerHead(4)
    intact = attach(llama, None, Bound(policy, calibrated(llama, policy)))
    first = intact.generate(IDS[:, :9], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, IDS[:, 9:14]], dim=1)
    held = copy.deepcopy(first.past_key_values)
    ours = intact.generate(longer, past_key_values=held, max_new_tokens=4, do_sample=False)
    assert torch.equal(ours, intact.generate(longer, past_key_values=first.past_key_values, max_new_tokens=4,
                                             do_sample=False))  # fmt: skip


@torch.no_grad()
def test_another_attention_function_is_noticed_in_one_pass(llama: PreTrainedModel) -> None:
    intact = attach(llama, None, KIVI(2, group_size=8, residual=8))
    llama.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="needs the attention function of"):
        intact.score(IDS)


@torch.no_grad()
def test_assisted_decoding_is_refused_where_it_could_not_take_back(llama: PreTrainedModel) -> None:
    intact = attach(llama, None, KIVI(2, group_size=8, residual=8))
    with pytest.raises(UserError, match="prompt_lookup_num_tokens cannot be combined with a KV policy that keeps"):
        intact.generate(IDS, prompt_lookup_num_tokens=3, max_new_tokens=30)
    per_head = attach(llama, None, PerHead(4)).generate(IDS, prompt_lookup_num_tokens=3, max_new_tokens=12,
                                                        do_sample=False)  # fmt: skip
    assert per_head.shape[1] <= 52


@torch.no_grad()
def test_heads_whose_codes_do_not_fill_bytes_are_refused_packed_and_run_in_numbers(tiny_model: Any) -> None:
    model = tiny_model("llama", head_dim=12)
    assert attach(model, None, PerHead(4)).score(IDS).isfinite().all()
    with pytest.raises(UserError, match="heads have 12; use --kv-storage fake"):
        attach(model, None, Bound(PerHead(4), {}, packed=True)).score(IDS)


def test_packed_storage_of_full_precision_is_refused(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "llama")
    with pytest.raises(UserError, match="--kv-storage packed has nothing to act on"):
        plan_run(source, Recipe(), device=torch.device("cpu"), packed_kv=True)


@torch.no_grad()
def test_sinks_that_leave_no_text_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="sinks=20 leaves nothing of the calibration text"):
        calibrated(llama, KVQuant(3, weighting="none", sinks=20))
