"""Where each model family keeps its parts: the only file that knows, beside `layout`.

The key is the configuration's `model_type`; a row makes the names of one configuration from it, and refuses a variant
that it does not know. A new family is a row; it gets no fork of its modeling code. torch is imported late: command
lines take words from here.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from corpora.errors import UserError
from intactkv.parts import Architecture, Experts, Feed, Fused

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "ARCHITECTURES",
    "DOWN_PROJ",
    "LM_HEAD",
    "Architecture",
    "Experts",
    "Feed",
    "Fused",
    "architecture_of",
    "blocks_of",
    "decoder_of",
    "heads_of",
    "pads_shift",
]

# The published programs' word for the last linear of the feed-forward part, whatever a family calls it.
DOWN_PROJ = "down_proj"
# A field of GPTQ's published configuration, whatever a family calls its head.
LM_HEAD = "lm_head"


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
        Feed("fc1", ("fc2",), "fc2"),  # ReLU lets positive scales pass, but no shift
    ),
    rotary=False,
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    final_norm="model.decoder.final_layer_norm",
    output="self_attn.out_proj",
    down="fc2",
    centred=True,
)


def _opt(config: "PreTrainedConfig") -> Architecture:
    """OPT-350m has norms behind attention and feed-forward, a projection behind its embeddings, no last norm."""
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
    return replace(OPT, unscaled=unscaled, unrotated=unrotated)


def _phi3(config: "PreTrainedConfig") -> Architecture:
    """Phi-3 and Phi-4: q, k, v in one matrix, gate and up in another; a part of every head may turn."""
    heads, size = heads_of(config)
    queries = config.num_attention_heads * size
    qkv = Fused("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), (queries, heads * size, heads * size))
    gate_up = Fused("mlp.gate_up_proj", ("gate_proj", "up_proj"), (config.intermediate_size,) * 2)
    turned = int(size * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))
    return replace(with_fused(LLAMA, qkv, gate_up), turned=turned if turned < size else None)


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


Row = Callable[["PreTrainedConfig"], Architecture]
ARCHITECTURES: Mapping[str, Row] = {
    "llama": lambda _: LLAMA,  # LLaMA 1 to 3, Vicuna, SmolLM2
    "mistral": lambda _: LLAMA,
    "qwen2": lambda _: LLAMA,
    "qwen3": lambda _: QWEN3,
    "opt": _opt,
    "phi3": _phi3,
}


# Model types that place a token by its slot in the batch, whatever position it is given; so pads shift it. Found by
# running a small model of every causal type of transformers that takes a prefix, padded and alone. Tables of absolute
# places go wrong behind any pad; distances (MPT's biases, GPT-Neo's windows) only where pads stand between two texts.
ABSOLUTE_SLOTS = frozenset(
    {
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
        *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "trocr", "xlm-roberta", "xlm-roberta-xl"),
    }
)
RELATIVE_SLOTS = frozenset({"gpt_neo", "mpt", "roformer"})


def pads_shift(config: "PreTrainedConfig", behind_prefix: bool) -> bool:
    """Whether pads on the left would change what a model says about a row; its rows are run without them."""
    kind = config.get_text_config(decoder=True).model_type
    return kind in ABSOLUTE_SLOTS or (behind_prefix and kind in RELATIVE_SLOTS)


def architecture_of(config: "PreTrainedConfig") -> Architecture:
    """The names of a model's parts. Raises UserError, with the types there are, for a type without a row, and for a
    variant that its row does not know."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"model_type {config.model_type!r} is not in the architecture table; quantization supports "
            f"{', '.join(ARCHITECTURES)}. A new type is a row in intactkv/architecture.py"
        )
    return ARCHITECTURES[config.model_type](config)


def heads_of(config: "PreTrainedConfig") -> tuple[int, int]:
    """KV heads, and the channels of a head: of any model type, in the table or not."""
    config = config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads, size


def decoder_of(model: "PreTrainedModel") -> Any:
    """The part of a causal language model that runs its blocks, without the head; of any model type, in the table or
    not."""
    return model.base_model.decoder if hasattr(model.base_model, "decoder") else model.base_model


def blocks_of(model: "PreTrainedModel") -> "list[nn.Module]":
    """The blocks of a causal language model, first to last; of any model type, in the table or not."""
    if model.config.model_type in ARCHITECTURES:
        return architecture_of(model.config).blocks_of(model)
    decoder = decoder_of(model)
    for name in ("layers", "h", "blocks"):
        if hasattr(decoder, name):
            return list(getattr(decoder, name))
    raise UserError(
        f"the blocks of this {model.config.model_type} are called neither layers nor h nor blocks; add its row to "
        "intactkv/architecture.py"
    )
