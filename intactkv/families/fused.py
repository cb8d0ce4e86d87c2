"""Families whose matrices hold several linears: `intactkv.layout` takes them apart."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from intactkv.families.llama import LLAMA
from intactkv.parts import Architecture, Feed, Fused, Row, attention_heads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ROWS", "with_fused"]


def with_fused(row: Architecture, *fused: Fused) -> Architecture:
    """A row whose linears, called as their parts, stand within fused modules: `self_attn.qkv_proj.q_proj`."""
    inner: dict[str, str] = {}
    for one in fused:
        owner = one.module.rpartition(".")[0]
        inner |= {f"{owner}.{part}": f"{one.module}.{part}" for part in one.parts}

    def named(name: str) -> str:
        return inner.get(name, name)

    def feed_of(feed: Feed) -> Feed:
        consumers = tuple(map(named, feed.consumers))
        return replace(feed, producer=named(feed.producer), consumers=consumers, inside=named(feed.inside))

    fields = ("rope_query", "rope_key", "query", "key", "value", "output", "down")
    renamed: dict[str, Any] = {field: named(getattr(row, field)) for field in fields}
    linears = tuple(tuple(map(named, names)) for names in row.linears)
    return replace(row, linears=linears, feeds=tuple(map(feed_of, row.feeds)), fused=fused, **renamed)


def _phi3(config: "PreTrainedConfig") -> Architecture:
    """Phi-3 and Phi-4: q, k, v in one matrix, gate and up in another; a part of every head may turn."""
    heads, size = attention_heads(config)
    queries = config.num_attention_heads * size
    qkv = Fused("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), (queries, heads * size, heads * size))
    gate_up = Fused("mlp.gate_up_proj", ("gate_proj", "up_proj"), (config.intermediate_size,) * 2)
    turned = int(size * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))
    return replace(with_fused(LLAMA, qkv, gate_up), turned=turned if turned < size else None)


ROWS: Mapping[str, Row] = {"phi3": _phi3}
