"""Keys and values of every family: prefixes, padding, windows, KV policies and attention beside transformers' own."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from common import every
from families import ROWS, plain_cache, plain_logits, random_ids
from tiny import WINDOW, tiny_model
from torch import Tensor
from torch.testing import assert_close
from transformers import Gemma3nTextConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from corpora.errors import UserError
from eval.inside.analysis import position_share
from intactkv.architecture import architecture_of, heads_of
from intactkv.attach import attach
from intactkv.attention import ROWS as WITH_ROWS
from intactkv.attention import asks
from intactkv.cache import IntactCache
from intactkv.calibrate import Sample, sample_loss
from intactkv.discover import down_maxima
from intactkv.layout import lay_out
from intactkv.observe import Site, attention_mass, down_input, input_sites, inputs_of, observe
from intactkv.pivots import hidden_magnitudes
from intactkv.policy import Bound
from intactkv.prefix import Prefix, build_prefix
from intactkv.rope import Places, ropes_of
from quantization.grids.uniform import UniformGrid
from quantization.kv_cache import KIVI, KV_POLICIES, KVQuant, Policy
from quantization.model.attention import AttentionProducts
from quantization.model.blocks import DecoderBlock
from quantization.model.stream import CalibrationStream

pytestmark = pytest.mark.usefixtures("no_grad")

P = 5
TEXT = random_ids(40, seed=2)
TOKENWISE: dict[str, Policy] = {
    name: kind(bits=3) for name, kind in KV_POLICIES.items() if name not in ("kivi", "kvquant")
} | {"kvquant": KVQuant(bits=3, sinks=0, weighting="none")}
OWN_ATTENTION = {name for name, (kind, _) in ROWS.items() if kind in ("falcon", "bloom")}
CAPPED = {"layer_types": ["full_attention"] * 3}  # Gemma 2 without windows


@cache
def model_of(name: str) -> PreTrainedModel:
    """Laid out, and run through our attention from its first use on."""
    model_type, overrides = ROWS[name]
    return lay_out(tiny_model(model_type, **overrides))


@cache
def prefix_of(name: str) -> Prefix:
    return build_prefix(model_of(name), TEXT[:P])


def slides(config: PreTrainedConfig) -> bool:
    return IntactCache(config).smallest_window is not None


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ROWS)
def test_a_padded_batch_behind_a_prefix_is_every_row_alone(name):
    """Absolute places, biases by distance and RoPE in part: pads between prefix and text shift none of them."""
    model, lengths = model_of(name), (40, 31, 22)
    ids, mask = torch.zeros(3, 40, dtype=torch.long), torch.zeros(3, 40, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 40 - length :], mask[row, 40 - length :] = TEXT[:length], 1
    for prefix in (prefix_of(name), None):
        logits = attach(model, prefix).score(ids, mask)
        for row, length in enumerate(lengths):
            assert relative(logits[row, 40 - length :], plain_logits(model, TEXT[:length])) < 1e-5


@pytest.mark.parametrize("name", ROWS)
def test_generation_behind_a_prefix_is_that_without_one(name):
    """Three tokens a beam; RoPE of a kind that steps stays below its step."""
    model = model_of(name)
    intact = attach(model, prefix_of(name))
    for beams in (1, 3):
        options: Any = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
        plain = model.generate(TEXT[None], attention_mask=torch.ones_like(TEXT[None]), **options)  # type: ignore[operator]
        assert torch.equal(intact.generate(TEXT[None], **options), plain)


def test_layers_with_windows_forget_the_prefix_when_the_text_outgrows_them():
    text = random_ids(2 * WINDOW, seed=6)
    names = [name for name in ROWS if slides(model_of(name).config)]
    assert {ROWS[name][0] for name in names} >= {"gemma2", "gemma3_text", "cohere2", "ministral"}
    for name in names:
        model, intact = model_of(name), attach(model_of(name), prefix_of(name))
        assert relative(intact.score(text[None].index_copy(1, torch.arange(P), TEXT[None, :P]))[0],
                        plain_logits(model, torch.cat([TEXT[:P], text[P:]]))) < 1e-5, name  # fmt: skip
        mask = torch.ones(2, len(text), dtype=torch.long)
        mask[1, :3] = 0
        with pytest.raises(UserError, match=f"does not fit the model's sliding window of {WINDOW}"):
            intact.score(torch.stack([text, text]), mask)


@pytest.mark.parametrize("name", ROWS)
def test_every_policy_rounds_what_the_family_caches_and_leaves_the_prefix(name):
    """Of the first layer, whose states are those of a plain run. The truth: the policy's rounding of transformers' own
    keys and values. KVQuant rounds them before RoPE, which `test_rope` compares with the model's."""
    model, prefix = model_of(name), prefix_of(name)
    plain = plain_cache(model, TEXT[None]).layers[0]
    for word, policy in TOKENWISE.items():
        tensors = _fitted(model, policy)
        intact = attach(model, prefix, Bound(policy, {0: tensors}) if policy.calibrates else policy)
        held = intact.new_cache()
        intact.feed(TEXT[None, P:], cache=held)
        rope = ropes_of(model.config)[0] if policy.space == "pre_rope" else None
        places = Places(P, len(TEXT) - P, None, rope)
        for rounding, exact, ours in zip(
            policy.behind(P).roundings(tensors), (plain.keys, plain.values), held.intact_layers[0].held, strict=True
        ):
            assert relative(ours[:, :, :P], exact[:, :, :P]) < 1e-6, word
            expected = rounding.numbers(exact[:, :, P:].float(), places)
            # A state that is 1e-7 beside the middle of two numbers falls to the other.
            assert ((ours[:, :, P:] - expected).abs() > 1e-4).float().mean() < 0.01, word
            assert 0.01 < relative(ours[:, :, P:], exact[:, :, P:]) < 0.5, word
    assert heads_of(model.config) == (plain.keys.shape[1], plain.keys.shape[3])


def _fitted(model: PreTrainedModel, policy: Policy) -> dict[str, Tensor] | None:
    """What the first layer is calibrated to."""
    if not policy.calibrates:
        return None
    architecture = architecture_of(model.config)
    stream = CalibrationStream(model, architecture, random_ids(60).view(2, 30))
    return policy.fit_block(DecoderBlock(0, architecture.blocks_of(model)[0], architecture, model.config, stream))


@pytest.mark.parametrize("name", ROWS)
def test_a_window_of_exact_tokens_longer_than_the_text_is_full_precision_or_is_refused(name):
    """KIVI runs through our own products, which must cap, scale and mask as the model's attention does."""
    model, policy = model_of(name), KIVI(bits=2, group_size=8, residual=64)
    if name in OWN_ATTENTION:
        with pytest.raises(UserError, match="computes attention in code of its own, which a KV policy"):
            attach(model, prefix_of(name), policy)
    elif slides(model.config):
        with pytest.raises(UserError, match="attends to a window of 48 tokens, where a KV policy must round every"):
            attach(model, prefix_of(name), policy)
    else:
        ours, shorter = (
            attach(model, prefix_of(name), KIVI(bits=2, group_size=8, residual=r)).score(TEXT[None])[0] for r in (64, 8)
        )
        assert relative(ours, plain_logits(model, TEXT)) < 1e-5
        assert relative(shorter, plain_logits(model, TEXT)) > 1e-3
    assert asks(type(model)) == (name not in OWN_ATTENTION)


@pytest.mark.parametrize("name", sorted(OWN_ATTENTION))
def test_codes_are_decoded_for_attention_in_code_of_its_own(name):
    """Token by token: where codes could be attended to as they are, if the model asked for our function."""
    model, policy = model_of(name), TOKENWISE["per_head"]
    logits = []
    for packed in (False, True):
        intact = attach(model, prefix_of(name), Bound(policy, packed=packed))
        held = intact.new_cache()
        logits.append(torch.cat([intact.feed(x, cache=held).logits for x in TEXT[None, P:20].split(1, dim=1)], dim=1))
        assert bool(held.intact_layers[0].store.keys.codes) == packed
    assert relative(logits[1], logits[0]) < 1e-5


@every(("model_type", "overrides"), [
    ("gemma2", CAPPED),
    ("gpt_oss", CAPPED | {"sliding_window": 4}),
    ("granite", {}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
])  # fmt: skip
def test_our_products_compute_what_the_models_own_eager_attention_does(model_type, overrides):
    """Caps, sinks and scales of their own; against transformers' eager function, padded and behind a cache."""
    model = tiny_model(model_type, **overrides)
    ids = torch.stack([TEXT, TEXT.flip(0)])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    found = []
    for implementation in ("eager", WITH_ROWS, "intact"):
        model.set_attn_implementation(implementation)
        own = plain_cache(model, ids[:1, :P])
        behind = model(ids[:1, P:], past_key_values=own).logits
        found.append((model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], behind))
    for ours in found[1:]:
        for x, expected in zip(ours, found[0], strict=True):
            assert relative(x, expected) < 1e-6


@pytest.mark.parametrize("name", ["gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "falcon-alibi", "bloom"])
def test_fine_grids_in_attentions_products_change_little_or_are_refused(name):
    model_type, overrides = ROWS[name]
    model, products = lay_out(tiny_model(model_type, **overrides)), AttentionProducts(UniformGrid(8))
    if name in OWN_ATTENTION:
        with pytest.raises(UserError, match=r"computes attention in code of its own.* leave it out with --set"):
            products.check(type(model))
        return
    products.check(type(model))
    plain = plain_logits(model, TEXT)
    products.install(model)
    assert 1e-4 < relative(plain_logits(model, TEXT), plain) < 0.1


@pytest.mark.parametrize("name", ROWS)
def test_attention_that_figures_show_is_softmax_and_ends_with_the_figure(name):
    model = model_of(name)
    intact, heads = attach(model, prefix_of(name)), model.config.num_attention_heads
    before = model.config._attn_implementation
    mass = attention_mass(intact, TEXT[None, P:30], [0, 2])
    for of_layer in mass.values():
        assert of_layer.shape == (25, 30)
        assert_close(of_layer.sum(dim=1), torch.full((25,), float(heads)))
        assert not of_layer.triu(P + 1).any()
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ROWS)
def test_the_last_magnitudes_are_those_in_front_of_the_final_norm(name):
    model = model_of(name)
    with inputs_of([model.get_submodule(architecture_of(model.config).final_norm)]) as seen:
        found = hidden_magnitudes(model, TEXT)
    assert found.largest.shape == (4, len(TEXT))
    assert_close(found.largest[-1], seen[-1][0].abs().amax(dim=-1))


@pytest.mark.parametrize("name", ["bloom", "falcon-alibi", "gpt_neox", "gpt2", "gemma2", "mixtral"])
def test_a_prefix_is_trained_through_every_block_whether_they_are_computed_again_or_not(name):
    """Blocks that take `layer_past` or return tuples; the truth is the gradient without recomputing."""
    model, prefix = model_of(name), prefix_of(name)
    counted = torch.arange(len(TEXT)) >= P
    gradients = []
    for again in (False, True):
        with torch.enable_grad():
            learned = [x.clone().requires_grad_() for x in (*prefix.keys, *prefix.values)]
            keys, values = ([1.1 * x for x in learned[side : side + 3]] for side in (0, 3))
            behind = replace(prefix, keys=tuple(keys), values=tuple(values))
            loss = sample_loss(model, model, behind, Sample(TEXT, counted), checkpointing=again)
            gradients.append(torch.autograd.grad(loss, learned))
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert_close(recomputed, plain)


def test_layers_that_read_the_keys_and_values_of_others_are_refused():
    full = ["full_attention"] * 4
    config = Gemma3nTextConfig(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=full)
    with pytest.raises(
        UserError, match=r"layer 2 of this gemma3n_text model keeps a .* with keys and values of their own"
    ):
        IntactCache(config)


def test_figures_show_every_token_what_its_own_experts_read():
    """An expert's inputs are fewer rows than the text has; those of all experts that a token is sent to are its row."""
    model = model_of("mixtral")
    architecture = architecture_of(model.config)
    shapes: dict[str, torch.Size] = {}

    def look(site: Site, _layer: int, _row: int, x: Tensor) -> None:
        shapes[site.name] = x.shape

    observe(attach(model, None), TEXT[None], input_sites(architecture), look)
    widths = {"q_proj": 64, "o_proj": 64, "experts": 64, "experts_down_proj": 2 * 96}
    assert shapes == {name: torch.Size([1, len(TEXT), width]) for name, width in widths.items()}
    shares = position_share(model, TEXT[None], [range(len(TEXT))])
    assert_close(torch.stack(list(shares.values())), torch.ones(2, 3))
    assert down_maxima(model, TEXT[None]).shape == (3, 1, len(TEXT))
    assert down_input(architecture).part == "down_proj"


def test_biases_by_position_are_added_in_front_of_the_mask():
    """As some models ask for; the truth is a plain formula in float64."""
    random = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 4, count, 8, generator=random) for count in (5, 9, 9))
    bias = torch.randn(1, 4, 1, 9, generator=random)
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)[None, None]
    scores = query.double() @ key.double().transpose(2, 3) * 0.3 + bias.double()
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.double()
    for given in (mask, None):
        found, _ = ALL_ATTENTION_FUNCTIONS["intact"](
            torch.nn.Module(), query, key, value, given, scaling=0.3, position_bias=bias
        )
        assert relative(found.transpose(1, 2).double(), expected) < 1e-6
