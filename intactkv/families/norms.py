"""Families whose norms stand elsewhere, or compute something else, than LLaMA's; and scaled embeddings and logits."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from corpora.errors import UserError
from intactkv.families.llama import LLAMA
from intactkv.parts import Architecture, Row

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ROWS"]

GEMMA = replace(LLAMA, gain_offset=1.0)


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


def _granite(config: "PreTrainedConfig") -> Architecture:
    """Numbers scale the embeddings, what attention and feed-forward add, and the logits; none is in a weight."""
    return replace(LLAMA, plain_logits=config.logits_scaling == 1)


def _smollm3(config: "PreTrainedConfig") -> Architecture:
    """Some blocks have no RoPE."""
    return replace(LLAMA, unturned=frozenset(i for i, turns in enumerate(config.no_rope_layers) if not turns))


ROWS: Mapping[str, Row] = {
    "gemma": _gemma,
    "granite": _granite,
    "smollm3": _smollm3,
    "ministral": lambda _: LLAMA,  # windows in some blocks
    "ministral3": lambda _: LLAMA,  # queries grow with their position
}
