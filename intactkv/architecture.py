"""Where each model family keeps its parts: the only file that knows.

The key is the configuration's `model_type`. A new family is a row; it gets no fork of its modeling code. torch is
imported late: command lines take words from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from corpora.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "ARCHITECTURES",
    "DOWN_PROJ",
    "LM_HEAD",
    "Architecture",
    "Feed",
    "architecture_of",
    "decoder_of",
    "heads_of",
    "pads_shift",
]

# The published programs' word for the last linear of the feed-forward part, whatever a family calls it.
DOWN_PROJ = "down_proj"
# A field of GPTQ's published configuration, whatever a family calls its head.
LM_HEAD = "lm_head"


@dataclass(frozen=True)
class Feed:
    """A module and the linears that read its output and nothing else, within a block.

    inside: the smallest module that holds the consumers and all that is computed from them alone.
    """

    producer: str
    consumers: tuple[str, ...]
    inside: str


@dataclass(frozen=True)
class Architecture:
    """Dotted names within the model.

    decoder: everything but the head; returns the hidden states that the head reads.
    blocks: the list of decoder blocks. head: the vocabulary projection.
    linears: within a block, in the order of computation; linears of one inner tuple read the same input.
    feeds: within a block, in the order of computation: what scales can be moved through.
    attention: within a block. rope_query, rope_key: the last modules in front of RoPE (the norms of models that have
    them, else the linears), which a query ↔ key pair scales. rotary: whether positions rotate pairs (i, i + D/2) of a
    head's channels.
    embeddings: the tables whose rows are added up to what enters the first block. final_norm: in front of the head.
    value, output, down: linears within a block; the last two write to the residual stream.
    centred: whether norms take the mean off (LayerNorm) or not (RMSNorm).
    """

    decoder: str
    blocks: str
    head: str
    linears: tuple[tuple[str, ...], ...]
    feeds: tuple[Feed, ...]
    attention: str = "self_attn"
    rope_query: str = "self_attn.q_proj"
    rope_key: str = "self_attn.k_proj"
    rotary: bool = True
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    final_norm: str = "model.norm"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    centred: bool = False

    def block_name(self, index: int) -> str:
        """Dotted name of a block, as in the checkpoint: `model.layers.3`."""
        return f"{self.blocks}.{index}"

    def blocks_of(self, model: "nn.Module") -> "list[nn.Module]":
        """The decoder blocks, first to last."""
        return list(model.get_submodule(self.blocks).children())

    def feeds_of(self, config: "PreTrainedConfig") -> tuple[Feed, ...]:
        """The block's feeds. Raises UserError for a variant whose norms stand behind what they should feed."""
        if getattr(config, "do_layer_norm_before", True) is False:
            raise UserError(
                f"this {config.model_type} puts its norms behind attention and feed-forward (do_layer_norm_before="
                "false), where nothing can be folded into or out of them; use a method without scales or rotations, "
                "such as gptq or rtn"
            )
        return self.feeds

    def linears_of(self, block: "nn.Module", name: str) -> "dict[str, nn.Linear]":
        """The block's linears in the order of computation, by their name within the block.

        Raises UserError if the block holds other linears than this table says: then the row is wrong for this model.
        """
        from torch import nn

        known = [linear for group in self.linears for linear in group]
        found = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        if set(found) != set(known):
            raise UserError(
                f"{name} holds the linears {sorted(found)}, the architecture table expects "
                f"{sorted(known)}; this variant of the model type is not supported"
            )
        return {linear: found[linear] for linear in known}


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
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": LLAMA,  # LLaMA 1 to 3, Vicuna, SmolLM2
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "opt": OPT,
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
    """The row of a model's type. Raises UserError, with the types there are, for an unknown one."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"model_type {config.model_type!r} is not in the architecture table; quantization supports "
            f"{', '.join(ARCHITECTURES)}. A new type is a row in intactkv/architecture.py"
        )
    return ARCHITECTURES[config.model_type]


def heads_of(config: "PreTrainedConfig") -> tuple[int, int]:
    """KV heads, and the channels of a head: of any model type, in the table or not."""
    config = config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads, size


def decoder_of(model: "PreTrainedModel") -> Any:
    """The part of a causal language model that runs its blocks, `.layers`, without the head; of any model
    type, in the table or not."""
    return model.base_model.decoder if hasattr(model.base_model, "decoder") else model.base_model
