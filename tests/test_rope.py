"""The rotation of keys undone: what comes back is what the model's own RoPE received."""

from typing import Any

import pytest
import torch
from common import every
from families import FAMILIES, LONG, ROWS, random_ids
from tiny import tiny_config, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.layout import lay_out
from intactkv.observe import observe, output_sites, outputs_of
from intactkv.prefix import build_prefix
from intactkv.rope import Places, check_turns, ropes_of

TEXT = random_ids(60, seed=8)
ROPE: dict[str, Any] = {"rope_theta": 10000.0}
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"factor": 2.0},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = (
    ROWS | FAMILIES
    | {name: ("llama", {"rope_parameters": {"rope_type": name, **ROPE, **more}}) for name, more in SCALED.items()}
)  # fmt: skip
POSITIONS = {"opt", "gpt2", "bloom", "falcon-alibi"}  # of another kind


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def laid_out(name: str) -> PreTrainedModel:
    model_type, overrides = CASES[name]
    return lay_out(tiny_model(model_type, **overrides))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_keys_are_recovered_from_before_their_rotation_and_go_back(name, dtype, limit):
    """A model in bfloat16 rounds cosine, sine and products, each to 2^-9."""
    model = laid_out(name).to(dtype)
    architecture, ropes = architecture_of(model.config), ropes_of(model.config)
    cache = attach(model, None).new_cache()
    modules = [block.get_submodule(architecture.rope_key) for block in architecture.blocks_of(model)]
    with outputs_of(modules) as received:
        model(TEXT[None], past_key_values=cache)
    assert (ropes == [None] * len(modules)) == (name in POSITIONS)
    for rope, layer, keys in zip(ropes, cache.intact_layers, received, strict=True):
        places = Places(0, len(TEXT), None, rope)
        assert places.positions(torch.device("cpu")).tolist() == [list(range(60))]
        held = layer.held[0].float()
        kept, size = held.shape[2:]  # the newest, of a sliding window
        behind = Places(len(TEXT) - kept, kept, None, rope)
        expected = keys.float()
        if not architecture.heads_first:
            expected = expected.reshape(1, len(TEXT), -1, size).transpose(1, 2)
        expected = expected[:, :, -kept:]
        # Falcon's newer models repeat keys for the query heads of a group before they keep them.
        expected = expected.repeat_interleave(held.shape[1] // expected.shape[1], dim=1)
        assert relative(behind.unturned(held), expected) < limit
        assert relative(behind.turned(expected), held) < limit
        assert relative(behind.turned(behind.unturned(held)), held) < 1e-6
        assert relative(behind.unturned(behind.turned(expected).bfloat16().float()), expected) < 4e-3


@pytest.mark.parametrize("name", CASES)
def test_keys_and_values_that_figures_show_are_those_of_the_cache(name, monkeypatch):
    """Keys and values, behind a prefix: the truth is what the cache holds of the same pass."""
    model = laid_out(name)
    intact, architecture = attach(model, build_prefix(model, TEXT[:3])), architecture_of(model.config)
    seen: dict[tuple[str, int], Tensor] = {}

    def look(site: Any, layer: int, _row: int, x: Tensor) -> None:
        seen[site.name, layer] = x[0]

    cache = intact.new_cache()
    monkeypatch.setattr(type(intact), "new_cache", lambda *_, **__: cache)
    observe(intact, TEXT[None, 3:40], output_sites(architecture, pre_rope=False), look)
    for layer, kept in enumerate(cache.intact_layers):
        for side, site in enumerate(("key", "value")):
            held = kept.held[side][0, :, -37:].transpose(0, 1)  # (T, KV heads, D)
            found = seen[site, layer].reshape(37, -1, held.shape[2])
            assert relative(found.repeat_interleave(held.shape[1] // found.shape[1], dim=1), held) < 1e-6


def test_positions_leave_out_the_pads_of_a_row():
    places = Places(5, 4, torch.tensor([0, 2]))  # behind a prefix of 3: the slots 5 to 8
    assert places.positions(torch.device("cpu")).tolist() == [[5, 6, 7, 8], [3, 4, 5, 6]]


def test_a_kind_of_rotation_that_nothing_undoes_is_refused():
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": "proportional", "rope_theta": 10000.0}
    with pytest.raises(UserError, match="is of the kind 'proportional', which no KV policy before RoPE undoes"):
        ropes_of(config)


@every(("model_type", "overrides", "limit"), [
    ("phi3", LONG, 64),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", **ROPE, "factor": 2.0}, "max_position_embeddings": 64}, 64),
])  # fmt: skip
def test_texts_that_turn_keys_otherwise_than_the_prefix_were_turned_are_refused(model_type, overrides, limit):
    """Without the refusal the logits behind the prefix are others than those of a plain run, and no error tells."""
    model, text = tiny_model(model_type, **overrides), random_ids(limit + 1, seed=3)
    intact = attach(model, build_prefix(model, text[:4]))
    with torch.no_grad():
        plain = model(text[None, :limit], use_cache=False).logits
        assert relative(intact.score(text[None, :limit]), plain) < 1e-6
        for refused in (
            lambda: intact.score(text[None]),
            lambda: intact.generate(text[None, : limit - 3], max_new_tokens=4),
            lambda: undone(model, limit + 1),
        ):
            with pytest.raises(UserError, match=f"by other frequencies in texts of more than {limit} tokens"):
                refused()
        assert intact.generate(text[None, : limit - 4], max_new_tokens=4).shape == (1, limit)
        longer = attach(model, None).score(text[None])
        assert relative(longer, model(text[None], use_cache=False).logits) < 1e-6
    check_turns(model.config, limit)


def undone(model: PreTrainedModel, count: int) -> Tensor:
    return Places(0, count, None, ropes_of(model.config)[0]).unturned(torch.zeros(1, 1, count, 16))
