"""Families whose matrices hold several linears: `intactkv.layout` takes them apart."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from corpora.errors import UserError
from intactkv.families.llama import LLAMA
from intactkv.parts import (
    NEIGHBOURS,
    PASSED,
    Architecture,
    Feed,
    Fused,
    Row,
    attention_heads,
    divided_heads,
    turned_channels,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ROWS", "with_fused"]

QKV = ("q_proj", "k_proj", "v_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")  # GPT-NeoX's


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
    qkv = Fused("self_attn.qkv_proj", QKV, (queries, heads * size, heads * size))
    return replace(with_fused(LLAMA, qkv, _gate_up(config)), turned=turned_channels(config, size))


def _gate_up(config: "PreTrainedConfig") -> Fused:
    return Fused("mlp.gate_up_proj", ("gate_proj", "up_proj"), (config.intermediate_size,) * 2)


def _glm4(config: "PreTrainedConfig") -> Architecture:
    """GLM-4: gate and up in one matrix, a norm behind attention and one behind the feed-forward part."""
    size = attention_heads(config)[1]
    return replace(
        with_fused(LLAMA, _gate_up(config)),
        pairing=NEIGHBOURS,
        turned=turned_channels(config, size),
        unrotated="has norms behind attention and feed-forward (post_self_attn_layernorm, post_mlp_layernorm), whose "
        "gains no rotation passes",
    )


def _joined_heads(attention: str, passes: bool, norms: tuple[str, str] = NORMS, adds: bool = False) -> Architecture:
    """GPT-NeoX's linears. norms: in front of attention and of the feed-forward part; they may be the same one.

    passes: whether positive scales pass the activation. adds: whether attention adds the residual stream.
    """
    fc1, fc2 = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
    qkv = tuple(f"{attention}.{part}" for part in QKV)
    value, output = qkv[-1], f"{attention}.dense"
    if norms[0] == norms[1]:
        feeds = [Feed(norms[0], (*qkv, fc1), ""), Feed(value, (output,), output)]
    else:
        inside = "" if adds else attention
        feeds = [Feed(norms[0], qkv, inside), Feed(value, (output,), output), Feed(norms[1], (fc1,), fc1)]
    if passes:
        feeds.append(Feed(fc1, (fc2,), fc2))
    return replace(
        LLAMA,
        linears=(qkv, (output,), (fc1,), (fc2,)),
        feeds=tuple(feeds),
        attention=attention,
        rope_query=qkv[0],
        rope_key=qkv[1],
        query=qkv[0],
        key=qkv[1],
        value=value,
        output=output,
        down=fc2,
        centred=True,
        cache="layer_past",
    )


def _gpt_neox(config: "PreTrainedConfig") -> Architecture:
    """GPT-NeoX and Pythia: every head's rows of q, k and v follow each other; attention and the feed-forward part, each
    behind a norm of its own, may read the same stream. Older files call the head `embed_out`."""
    heads, size = config.num_attention_heads, divided_heads(config)
    row = _joined_heads("attention", config.hidden_act in PASSED)
    return replace(
        with_fused(row, Fused("attention.query_key_value", QKV, (size,) * 3, heads)),
        decoder="gpt_neox",
        blocks="gpt_neox.layers",
        turned=turned_channels(config, size),
        embeddings=("gpt_neox.embed_in",),
        final_norm="gpt_neox.final_layer_norm",
        stored=({"lm_head.": "embed_out."},),
    )


def _bloom(config: "PreTrainedConfig") -> Architecture:
    """BLOOM: heads' rows follow each other as in GPT-NeoX; biases by distance in place of RoPE; attention adds the
    residual stream itself."""
    heads, size = config.num_attention_heads, divided_heads(config)
    if config.slow_but_exact and config.pretraining_tp > 1:
        raise UserError(
            f"this bloom has slow_but_exact=true and pretraining_tp={config.pretraining_tp}, so it reads its matrices "
            "in slices; set slow_but_exact to false in its config.json"
        )
    row = _joined_heads("self_attention", passes=False, adds=True)
    unscaled = None
    unrotated: str | None = (
        "has a norm behind its embeddings (word_embeddings_layernorm), whose gain no rotation passes"
    )
    if config.apply_residual_connection_post_layernorm:
        unscaled = unrotated = (
            "adds what its norms put out to the residual stream (apply_residual_connection_post_layernorm=true), so "
            "nothing can be folded into or out of them"
        )
    return replace(
        with_fused(row, Fused("self_attention.query_key_value", QKV, (size,) * 3, heads)),
        decoder="transformer",
        blocks="transformer.h",
        rotary=False,
        embeddings=("transformer.word_embeddings",),
        final_norm="transformer.ln_f",
        unscaled=unscaled,
        unrotated=unrotated,
    )


def _falcon(config: "PreTrainedConfig") -> Architecture:
    """Falcon: one key and value for all heads (7B), for each run of them (40B, 11B), or for every head (RW); attention
    and feed-forward side by side, behind one norm or two, or one after the other."""
    size, heads = divided_heads(config), config.num_attention_heads
    new = config.new_decoder_architecture
    if new and not config.parallel_attn:
        raise UserError(
            "this falcon has new_decoder_architecture=true and parallel_attn=false, which transformers cannot run; set "
            "parallel_attn to true in its config.json"
        )
    if not new and not config.multi_query and config.num_kv_heads != heads:
        raise UserError(
            f"this falcon has multi_query=false and num_kv_heads={config.num_kv_heads}, which transformers cannot run; "
            f"its config.json must say num_kv_heads {heads}, one for every head"
        )
    if new and (not config.num_kv_heads or heads % config.num_kv_heads):
        raise UserError(
            f"this falcon has num_kv_heads={config.num_kv_heads}, which its {heads} heads cannot share; its "
            f"config.json must say a divisor of {heads}"
        )
    told = config.num_ln_in_parallel_attn
    if config.parallel_attn and (told not in (None, 1, 2) if new else told == 2):
        raise UserError(
            f"this falcon has new_decoder_architecture={str(bool(new)).lower()} and num_ln_in_parallel_attn={told}, "
            f"which transformers cannot run; its config.json must say {'1 or 2' if new else '1'}, or leave "
            "num_ln_in_parallel_attn out"
        )
    groups = config.num_kv_heads if new else 1 if config.multi_query else heads
    norms = (NORMS[0], NORMS[0])
    if new and told in (None, 2):
        norms = ("ln_attn", "ln_mlp")
    elif not config.parallel_attn:
        norms = ("input_layernorm", "post_attention_layernorm")
    row = _joined_heads("self_attention", config.activation in PASSED, norms)
    qkv = Fused("self_attention.query_key_value", QKV, (heads // groups * size, size, size), groups)
    return replace(
        with_fused(row, qkv),
        decoder="transformer",
        blocks="transformer.h",
        rotary=not config.alibi,
        held_heads=heads if new else groups,  # newer ones repeat keys and values before they keep them
        embeddings=("transformer.word_embeddings",),
        final_norm="transformer.ln_f",
    )


def _gpt2(config: "PreTrainedConfig") -> Architecture:
    """GPT-2: matrices are stored as (in, out); positions are rows of a table."""
    divided_heads(config)
    if config.add_cross_attention:
        raise UserError(
            "this gpt2 has add_cross_attention=true, so it is the decoder of another model; give a language model"
        )
    qkv = Fused("attn.c_attn", QKV, (config.hidden_size,) * 3, transposed=True)
    others = tuple(Fused(name, transposed=True) for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    output, fc1, fc2 = (fused.module for fused in others)
    query, key, value = (f"attn.{part}" for part in QKV)
    feeds = [
        Feed("ln_1", (query, key, value), "attn"),
        Feed(value, (output,), output),
        Feed("ln_2", (fc1,), fc1),
    ]
    if config.activation_function in PASSED:
        feeds.append(Feed(fc1, (fc2,), fc2))
    row = replace(
        LLAMA,
        decoder="transformer",
        blocks="transformer.h",
        linears=((query, key, value), (output,), (fc1,), (fc2,)),
        feeds=tuple(feeds),
        attention="attn",
        rope_query=query,
        rope_key=key,
        rotary=False,
        embeddings=("transformer.wte", "transformer.wpe"),
        final_norm="transformer.ln_f",
        query=query,
        key=key,
        value=value,
        output=output,
        down=fc2,
        centred=True,
    )
    return with_fused(row, qkv, *others)


ROWS: Mapping[str, Row] = {
    "phi3": _phi3,
    "gpt_neox": _gpt_neox,
    "glm4": _glm4,
    "gpt2": _gpt2,
    "bloom": _bloom,
    "falcon": _falcon,
}
