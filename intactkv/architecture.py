"""Where each model family keeps its parts: nothing but the rows in `intactkv.families` knows, and `layout`.

The key is the configuration's `model_type`; a row makes the names of one configuration from it, and refuses a variant
that it does not know. A new family is a row; it gets no fork of its modeling code. torch is imported late: command
lines take words from here.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from corpora.errors import UserError
from intactkv.families import experts, fused, llama, norms
from intactkv.parts import Architecture, Experts, Feed, Fused, Row, attention_heads

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


ARCHITECTURES: Mapping[str, Row] = {**llama.ROWS, **fused.ROWS, **norms.ROWS, **experts.ROWS}


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
    """The names of a model's parts. Raises UserError, with what is near, for a type without a row, and for a variant
    that its row does not know."""
    if config.model_type not in ARCHITECTURES:
        from intactkv.nearest import nearest  # builds the model without weights

        raise UserError(
            f"model_type {config.model_type!r} is not in the architecture table. {nearest(config, ARCHITECTURES)} "
            f"docs/models.md lists the {len(ARCHITECTURES)} families, docs/extending.md (A model family) what a new "
            "row needs; prefixes, evaluation, and KV policies that calibrate on no text need none"
        )
    return ARCHITECTURES[config.model_type](config)


def heads_of(config: "PreTrainedConfig") -> tuple[int, int]:
    """KV heads that the cache holds, and the channels of a head: of any model type, in the table or not."""
    config = config.get_text_config(decoder=True)
    heads, size = attention_heads(config)
    held = architecture_of(config).held_heads if config.model_type in ARCHITECTURES else None
    return heads if held is None else held, size


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
        "intactkv/families/ (docs/extending.md, A model family)"
    )
