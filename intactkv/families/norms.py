"""Families whose norms stand elsewhere, or compute something else, than LLaMA's; and scaled embeddings and logits."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from corpora.errors import UserError
from intactkv.families.llama import LLAMA
from intactkv.parts import NEIGHBOURS, Architecture, Feed, Row, divided_heads, turned_channels

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ROWS"]

# Norms behind attention and the feed-forward part, whose gains stand between a linear and the residual stream.
BEHIND = (
    "has norms with gains behind attention and feed-forward, where the residual stream cannot be rotated, because a "
    "rotation does not pass through a gain"
)

GEMMA = replace(LLAMA, gain_offset=1.0)
# Norms in front and behind; post_attention_layernorm is the one behind attention.
GEMMA2 = replace(
    GEMMA,
    feeds=tuple(
        replace(feed, producer="pre_feedforward_layernorm") if feed.producer == "post_attention_layernorm" else feed
        for feed in LLAMA.feeds
    ),
    unrotated=BEHIND,
)
# Attention and feed-forward read one norm, and both are added to what it read.
PARALLEL = replace(
    LLAMA,
    feeds=(
        Feed("input_layernorm", (*LLAMA.feeds[0].consumers, *LLAMA.feeds[2].consumers), ""),
        LLAMA.feeds[1],
        LLAMA.feeds[3],
    ),
)
COHERE = replace(PARALLEL, pairing=NEIGHBOURS, centred=True)
OLMO2 = replace(
    LLAMA,
    feeds=(LLAMA.feeds[1], LLAMA.feeds[3]),
    rope_query="self_attn.q_norm",
    rope_key="self_attn.k_norm",
    unrotated=BEHIND,
)


def _one_way(config: "PreTrainedConfig") -> None:
    """Raise UserError for a Gemma whose tokens see those behind them: keys and values of a prefix would depend on the
    text."""
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError(
            f"this {config.model_type} attends in both directions (use_bidirectional_attention=true), and only causal "
            "language models have a prefix or a cache; give one without it"
        )


def _gemma(config: "PreTrainedConfig") -> Architecture:
    """Embeddings are scaled where they are looked up, which a rotation commutes with."""
    _one_way(config)
    return GEMMA


def _gemma2(config: "PreTrainedConfig") -> Architecture:
    """Norms in front of attention and feed-forward, and behind them."""
    _one_way(config)
    return replace(GEMMA2, plain_logits=config.final_logit_softcapping is None)


def _gemma3(config: "PreTrainedConfig") -> Architecture:
    """Gemma 2 with norms of queries and keys."""
    return replace(_gemma2(config), rope_query="self_attn.q_norm", rope_key="self_attn.k_norm", heads_first=True)


def _cohere(config: "PreTrainedConfig") -> Architecture:
    """Command R, and R+, which has norms of queries and keys: each head has gains of its own."""
    row = replace(COHERE, plain_logits=config.logit_scale == 1)
    return replace(row, rope_query="self_attn.q_norm", rope_key="self_attn.k_norm") if config.use_qk_norm else row


def _cohere2(config: "PreTrainedConfig") -> Architecture:
    """Command R7B and A: only blocks with a window have RoPE."""
    unturned = frozenset(i for i, kind in enumerate(config.layer_types) if kind != "sliding_attention")
    return replace(COHERE, plain_logits=config.logit_scale == 1, unturned=unturned)


def _stablelm(config: "PreTrainedConfig") -> Architecture:
    """LayerNorms with shifts; a part of every head turns; attention and feed-forward may stand side by side."""
    size = divided_heads(config)
    row = PARALLEL if config.use_parallel_residual else LLAMA
    row = replace(row, centred=True, turned=turned_channels(config, size))
    if config.qk_layernorm:
        row = replace(row, rope_query="self_attn.q_layernorm", rope_key="self_attn.k_layernorm", heads_first=True)
    return row


def _granite(config: "PreTrainedConfig") -> Architecture:
    """Numbers scale the embeddings, what attention and feed-forward add, and the logits; none is in a weight."""
    return replace(LLAMA, plain_logits=config.logits_scaling == 1)


def _smollm3(config: "PreTrainedConfig") -> Architecture:
    """Some blocks have no RoPE."""
    return replace(LLAMA, unturned=frozenset(i for i, turns in enumerate(config.no_rope_layers) if not turns))


ROWS: Mapping[str, Row] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "olmo2": lambda _: OLMO2,
    "cohere": _cohere,
    "cohere2": _cohere2,
    "stablelm": _stablelm,
    "granite": _granite,
    "smollm3": _smollm3,
    "ministral": lambda _: LLAMA,  # windows in some blocks
    "ministral3": lambda _: LLAMA,  # queries grow with their position
}
