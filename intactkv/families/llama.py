"""LLaMA and the families that differ from it in nothing but names, and OPT."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from intactkv.parts import PASSED, Architecture, Feed, Row, divided_heads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["LLAMA", "OPT", "QWEN3", "ROWS"]

LLAMA = Architecture(
    decoder="model",
    blocks="model.layers",
    head="lm_head",
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    feeds=(
        Feed("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
        Feed("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj"),
        Feed("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
        Feed("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
    ),
)
QWEN3 = replace(LLAMA, rope_query="self_attn.q_norm", rope_key="self_attn.k_norm")
OPT = Architecture(
    decoder="model.decoder",
    blocks="model.decoder.layers",
    head="lm_head",
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    feeds=(
        Feed("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
        Feed("self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj"),
        Feed("final_layer_norm", ("fc1",), "fc1"),
        Feed("fc1", ("fc2",), "fc2"),  # behind a ReLU, which passes scales, but no shift
    ),
    rotary=False,
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    final_norm="model.decoder.final_layer_norm",
    output="self_attn.out_proj",
    down="fc2",
    centred=True,
)


def _opt(config: "PreTrainedConfig") -> Architecture:
    """OPT-350m has norms behind attention and feed-forward, a projection behind its embeddings, no last norm. Galactica
    has no ReLU between its last linears."""
    divided_heads(config)
    unscaled = unrotated = None
    if not config.do_layer_norm_before:
        unscaled = unrotated = (
            "puts its norms behind attention and feed-forward (do_layer_norm_before=false), where nothing can be "
            "folded into or out of them"
        )
    elif config.word_embed_proj_dim != config.hidden_size:
        unrotated = (
            f"projects its embeddings (word_embed_proj_dim={config.word_embed_proj_dim}, "
            f"hidden_size={config.hidden_size}), which cannot be rotated"
        )
    elif config._remove_final_layer_norm:
        unrotated = "has no norm in front of its head (_remove_final_layer_norm=true), so it cannot be rotated"
    feeds = OPT.feeds if config.activation_function in PASSED else OPT.feeds[:-1]
    return replace(OPT, feeds=feeds, unscaled=unscaled, unrotated=unrotated)


ROWS: Mapping[str, Row] = {
    "llama": lambda _: LLAMA,  # LLaMA 1 to 3, Vicuna, SmolLM2
    "mistral": lambda _: LLAMA,
    "qwen2": lambda _: LLAMA,
    "qwen3": lambda _: QWEN3,
    "opt": _opt,
}
