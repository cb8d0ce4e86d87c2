"""The rotation of keys undone: what comes back is what the model's own RoPE received."""

from typing import Any

import pytest
import torch
from common import every
from families import FAMILIES, random_ids
from torch import Tensor

from corpora.errors import UserError
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.observe import outputs_of
from intactkv.rope import Places, ropes_of

TEXT = random_ids(60, seed=8)
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = FAMILIES | {
    name: ("llama", {"rope_parameters": {"rope_type": name, "rope_theta": 10000.0} | more})
    for name, more in SCALED.items()
}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_keys_are_recovered_from_before_their_rotation_and_go_back(name, dtype, limit, tiny_model):
    """A model in bfloat16 rounds cosine, sine and products, each to 2^-9."""
    model_type, overrides = CASES[name]
    model = tiny_model(model_type, **overrides).to(dtype)
    architecture, rope, cache = architecture_of(model.config), rope_of(model.config), attach(model, None).new_cache()
    modules = [block.get_submodule(architecture.rope_key) for block in architecture.blocks_of(model)]
    with outputs_of(modules) as received:
        model(TEXT[None], past_key_values=cache)
    assert (rope is None) == (model_type == "opt")
    places = Places(0, len(TEXT), None, rope)
    assert places.positions(torch.device("cpu")).tolist() == [list(range(60))]
    for layer, keys in zip(cache.intact_layers, received, strict=True):
        held = layer.held[0].float()
        kept = held.shape[2]  # the newest, of a sliding window
        behind = Places(len(TEXT) - kept, kept, None, rope)
        expected = keys.float().reshape(1, len(TEXT), held.shape[1], -1).transpose(1, 2)[:, :, -kept:]
        assert relative(behind.unturned(held), expected) < limit
        assert relative(behind.turned(expected), held) < limit
        assert relative(behind.turned(behind.unturned(held)), held) < 1e-6
        assert relative(behind.unturned(behind.turned(expected).bfloat16().float()), expected) < 4e-3


def test_positions_leave_out_the_pads_of_a_row():
    places = Places(5, 4, torch.tensor([0, 2]))  # behind a prefix of 3: the slots 5 to 8
    assert places.positions(torch.device("cpu")).tolist() == [[5, 6, 7, 8], [3, 4, 5, 6]]


@every("kind", ["dynamic", "longrope"])
def test_a_rotation_that_depends_on_the_length_of_the_text_is_refused(kind, tiny_config):
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UserError, match=f"is of the kind '{kind}', which no KV policy before RoPE undoes"):
        rope_of(config)
