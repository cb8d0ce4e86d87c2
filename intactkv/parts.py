"""What a row of the architecture table says of a model family: names, and what stands in the way of a method.

Names are those of the model as it is laid out (`intactkv.layout`): every matrix that a method rounds is a linear of its
own there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corpora.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

__all__ = [
    "HALVES",
    "NEIGHBOURS",
    "PASSED",
    "Architecture",
    "Experts",
    "Feed",
    "Fused",
    "Row",
    "attention_heads",
    "divided_heads",
    "turned_channels",
]

# Which channels of a head RoPE turns together: i and i + n/2 of the first n, or 2i and 2i + 1.
HALVES, NEIGHBOURS = "halves", "neighbours"
PASSED = ("relu",)  # activations that positive scales pass


@dataclass(frozen=True)
class Feed:
    """A module and the linears that read its output and nothing else, within a block.

    A scale of the output may pass an activation on the way to the consumers only where every positive scale does:
    ReLU, or the product with a gate; not GELU.
    inside: the smallest module that holds the consumers and all that is computed from them alone; "" is the block.
    routers: what else reads it and takes over its scales: weights (experts, channels) that nobody quantizes.
    """

    producer: str
    consumers: tuple[str, ...]
    inside: str
    routers: tuple[str, ...] = ()

    @property
    def readers(self) -> tuple[str, ...]:
        """All whose columns are scaled with it."""
        return (*self.consumers, *self.routers)

    @property
    def witness(self) -> str:
        """A module that reads all that the producer puts out: the router, where consumers see the tokens that it sends
        them."""
        return (*self.routers, *self.consumers)[0]


@dataclass(frozen=True)
class Fused:
    """A matrix that holds several linears, or none of torch's own.

    module: within a block, as transformers has it. parts: names of the linears within it; none for a module that
    becomes one linear. rows: how many of every part follow each other, in each of `groups` runs. transposed: stored as
    (in, out).
    """

    module: str
    parts: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False


@dataclass(frozen=True)
class Experts:
    """Feed-forward parts of which a router chooses some for every token; transformers stacks their matrices.

    module: of all, within a block; `count` of them, `width` channels between the linears of one, `chosen` for every
    token. inputs, output: linears of one, its gated pair and its last. stacked: parameters of the module, (count, rows
    of both inputs, in) and (count, out, in).
    """

    module: str
    count: int
    router: str
    width: int
    chosen: int
    inputs: tuple[str, str] = ("gate_proj", "up_proj")
    output: str = "down_proj"
    stacked: tuple[str, str] = ("gate_up_proj", "down_proj")

    def of(self, index: int) -> str:
        """The name of one expert within a block."""
        return f"{self.module}.{index}"

    def index_of(self, name: str) -> int | None:
        """Which expert a module within a block belongs to; None for all others."""
        index = name.removeprefix(f"{self.module}.").partition(".")[0]
        return int(index) if name.startswith(f"{self.module}.") and index.isdecimal() else None


@dataclass(frozen=True)
class Architecture:
    """Dotted names within the model, for one configuration.

    decoder: everything but the head; returns the hidden states that the head reads.
    blocks: the list of decoder blocks. head: the vocabulary projection.
    linears: within a block, in the order of computation; linears of one inner tuple read the same input.
    feeds: within a block, in the order of computation: what scales can be moved through.
    attention: within a block. rope_query, rope_key: the last modules in front of RoPE (the norms of models that have
    them, else the linears), which a query ↔ key pair scales; heads_first: they return (B, heads, T, channels), not
    (B, T, …). held_heads: KV heads in the cache, where the configuration's are others.
    rotary: whether positions rotate pairs of a head's channels; pairing, turned: which, and how many of a head (None:
    all). unturned: blocks where they do not.
    embeddings: the tables whose rows are added up to what enters the first block. final_norm: in front of the head.
    query, key, value, output: linears of attention; down: the last of the feed-forward part; "" where each expert has
    one and no token sees all of them. `output` and `down` write to the residual stream.
    centred: whether norms take the mean off (LayerNorm) or not (RMSNorm). gain_offset: what a norm adds to its weight:
    1 where it multiplies by 1 + w.
    fused, experts: what `intactkv.layout` takes apart. stored: other names that files have for parts of a parameter's
    name, old to new, tried together. exported: the same, for files that are written, where transformers reads a
    parameter under no other; None for the model's own names.
    cache: the argument by which a block takes its keys and values. plain_logits: whether they are the head's output,
    not scaled or capped.
    unscaled, unrotated: why no scales can be moved (SmoothQuant, AWQ, OmniQuant's pairs), or no rotation put in; None
    if they can.
    """

    decoder: str
    blocks: str
    head: str
    linears: tuple[tuple[str, ...], ...]
    feeds: tuple[Feed, ...]
    attention: str = "self_attn"
    rope_query: str = "self_attn.q_proj"
    rope_key: str = "self_attn.k_proj"
    heads_first: bool = False
    held_heads: int | None = None
    rotary: bool = True
    pairing: str = HALVES
    turned: int | None = None
    unturned: frozenset[int] = frozenset()
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    final_norm: str = "model.norm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    centred: bool = False
    gain_offset: float = 0.0
    fused: tuple[Fused, ...] = ()
    experts: Experts | None = None
    stored: tuple[Mapping[str, str], ...] = ()
    exported: Mapping[str, str] | None = None
    cache: str = "past_key_values"
    plain_logits: bool = True
    unscaled: str | None = None
    unrotated: str | None = None

    def block_name(self, index: int) -> str:
        """Dotted name of a block, as in the checkpoint: `model.layers.3`."""
        return f"{self.blocks}.{index}"

    def blocks_of(self, model: "nn.Module") -> "list[nn.Module]":
        """The decoder blocks, first to last."""
        return list(model.get_submodule(self.blocks).children())

    @property
    def downs(self) -> tuple[str, ...]:
        """The last linears of the feed-forward part: one, or one of every expert."""
        common = (self.down,) if self.down else ()
        if self.experts is None:
            return common
        return (*common, *(f"{self.experts.of(i)}.{self.experts.output}" for i in range(self.experts.count)))

    @property
    def everywhere(self) -> tuple[tuple[str, ...], ...]:
        """The sets of linears that every token reaches: all but the experts'."""
        return tuple(names for names in self.linears if self.expert_of(names[0]) is None)

    @property
    def of_one_token(self) -> tuple[str, ...]:
        """The linears that one token passes through; experts are alike, so the first ones stand for those it is sent
        to."""
        chosen = 1 if self.experts is None else self.experts.chosen
        return tuple(name for names in self.linears for name in names if (self.expert_of(name) or 0) < chosen)

    @property
    def routers(self) -> tuple[str, ...]:
        """What reads along with the linears and is never rounded; a linear, too, in some families."""
        return tuple(dict.fromkeys(name for feed in self.feeds for name in feed.routers))

    def expert_of(self, name: str) -> int | None:
        """Which expert a linear belongs to; None where every token reaches it."""
        return None if self.experts is None else self.experts.index_of(name)

    @property
    def entered(self) -> dict[str, int]:
        """The first linear of every expert, and which expert it is."""
        if self.experts is None:
            return {}
        return {f"{self.experts.of(i)}.{self.experts.inputs[0]}": i for i in range(self.experts.count)}

    @property
    def is_laid_out(self) -> bool:
        """Whether the model differs from transformers' own."""
        return bool(self.fused) or self.experts is not None

    def pairs_of(self, block: int, size: int) -> tuple[int, ...]:
        """For every channel of a head of so many: the number of what positions turn it with, in a block. Channels of
        one number must be scaled alike, or queries and keys meet otherwise at every distance."""
        turned = 0 if not self.rotary or block in self.unturned else size if self.turned is None else self.turned
        half = turned // 2
        pairs = [i // 2 if self.pairing == NEIGHBOURS else i % half for i in range(turned)]
        return (*pairs, *range(half, half + size - turned))

    def linears_of(self, block: "nn.Module", name: str) -> "dict[str, nn.Linear]":
        """The block's linears in the order of computation, by their name within the block.

        Raises UserError if the block holds other linears than this table says: then the row is wrong for this model.
        """
        from torch import nn

        known, routers = [linear for group in self.linears for linear in group], self.routers
        found = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and n not in routers}
        if set(found) != set(known):
            raise UserError(
                f"{name} holds the linears {sorted(found)}, the architecture table expects "
                f"{sorted(known)}; this variant of the model type is not supported"
            )
        return {linear: found[linear] for linear in known}


# What makes the names of one configuration of a model type.
Row = Callable[["PreTrainedConfig"], Architecture]


def divided_heads(config: "PreTrainedConfig") -> int:
    """Channels of a head, of a family that divides the hidden size among its heads.

    Raises UserError for a head_dim that says another number: transformers passes over it, or breaks."""
    size = int(config.hidden_size // config.num_attention_heads)
    told = getattr(config, "head_dim", None)
    if told not in (None, size):
        raise UserError(
            f"this {config.model_type} has head_dim={told}, but its heads have {size} channels (hidden_size "
            f"{config.hidden_size} / num_attention_heads {config.num_attention_heads}); take head_dim out of its "
            "config.json"
        )
    return size


def attention_heads(config: "PreTrainedConfig") -> tuple[int, int]:
    """KV heads and the channels of a head, as most text models' configurations say them (else `held_heads`)."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads, size


def turned_channels(config: "PreTrainedConfig", size: int) -> int | None:
    """Channels of a head of so many that RoPE turns; None for all.

    Raises UserError for an odd number: transformers turns one more, by other frequencies, or breaks."""
    factor = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    turned = int(size * factor)
    if turned % 2:
        raise UserError(
            f"this {config.model_type} turns {turned} of the {size} channels of a head (partial_rotary_factor "
            f"{factor:g}), and RoPE turns pairs; its config.json must say a partial_rotary_factor that makes an even "
            "number"
        )
    return turned if turned < size else None
