"""Configurations as published files spell them: a row makes the model that transformers makes, in logits and RoPE."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from common import every
from conftest import _tiny_tokenizer
from tiny import random_model
from transformers import AutoConfig, AutoModelForCausalLM

from corpora.errors import UserError
from intactkv.rope import ropes_of
from quantization.runs.dense import read_config
from quantization.runs.opening import load_model

TEXT = torch.randint(4, 101, (1, 24), generator=torch.Generator().manual_seed(2))
COMMON = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}
USUAL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LONG = {"original_max_position_embeddings": 64, "max_position_embeddings": 256, "rope_theta": 10000.0}


def longrope(pairs: int) -> dict[str, Any]:
    return {"type": "longrope", "short_factor": [1.0 + i / 9 for i in range(pairs)], "long_factor": [4.0] * pairs}


# The words are those of the published config.json; the sizes are small.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Phi-4-mini": {"model_type": "phi3", **USUAL, **LONG, "num_key_value_heads": 2, "partial_rotary_factor": 0.75,
                   "rope_scaling": longrope(6), "sliding_window": 262144, "tie_word_embeddings": True},
    "Gemma 3": {"model_type": "gemma3_text", **USUAL, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 8,
                "query_pre_attn_scalar": 32, "rope_theta": 1000000, "rope_local_base_freq": 10000,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2},
    "Pythia": {"model_type": "gpt_neox", **USUAL, "rotary_emb_base": 5000, "rotary_pct": 0.5,
               "use_parallel_residual": True, "tie_word_embeddings": False},
    "GLM-4": {"model_type": "glm4", **USUAL, "head_dim": 24, "num_key_value_heads": 2, "partial_rotary_factor": 0.5,
              "rope_theta": 20000.0},
    "StableLM 2": {"model_type": "stablelm", **USUAL, "num_key_value_heads": 4, "partial_rotary_factor": 0.5,
                   "rope_theta": 20000, "norm_eps": 1e-5, "use_qkv_bias": True},
    "Falcon 11B": {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_kv_heads": 2, "ff_factor": 4, "ffn_hidden_size": 96, "new_decoder_architecture": True,
                   "num_ln_in_parallel_attn": 1, "parallel_attn": True, "rope_theta": 500042.0, "rope_scaling": None},
    "GPT-2": {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256, "n_ctx": 256},
    "BLOOM": {"model_type": "bloom", "n_embed": 64, "num_attention_heads": 4, "n_layer": 2, "n_inner": None,
              "offset_alibi": 100, "masked_softmax_fusion": True, "pretraining_tp": 4},
}  # fmt: skip


def written(config: dict[str, Any], directory: Path) -> Path:
    """A checkpoint whose config.json is spelled like that."""
    _tiny_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({**COMMON, **config}))
    random_model(AutoConfig.from_pretrained(directory)).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({**COMMON, **config}))
    return directory


@every("name", list(PUBLISHED))
@torch.no_grad()
def test_a_published_spelling_is_the_model_that_transformers_makes_of_it(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = written(PUBLISHED[name], tmp_path_factory.mktemp("old"))
    own = AutoModelForCausalLM.from_pretrained(directory).eval()
    ours = load_model(directory, torch.float32, torch.device("cpu"))
    expected = own(TEXT, use_cache=False).logits
    found = ours(TEXT, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    turns = next((module for module in own.modules() if hasattr(module, "inv_freq")), None)
    if turns is not None:
        assert all(torch.equal(rope.frequencies, turns.inv_freq) for rope in ropes_of(read_config(directory)) if rope)


def test_factors_for_all_channels_of_a_head_are_refused_where_a_part_turns(tmp_path: Path) -> None:
    config = {**COMMON, **PUBLISHED["Phi-4-mini"], "rope_scaling": longrope(8)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json.*length 6, got 8"):
        read_config(tmp_path)
