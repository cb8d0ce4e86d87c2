"""What KV policies share: their grids and groups, the rotation of keys, the parts of a policy with tensors per layer.

    keys: k → Mᵀ Q(M k) where they are rotated, M the Hadamard rotation of a head; values: Q(v)
    one group = the D channels of a (sequence, token, KV head); `group_size` of them; or, with −1, the H·D of a token

q·k needs no rotation of q then (PrefixQuant rotates both).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from torch import Tensor

from corpora.errors import UserError
from intactkv.cache import LayerPolicy
from quantization.grids.uniform import UniformGrid, check_bits
from quantization.hadamard import apply, plan
from quantization.recipes.recipe import added

__all__ = ["CalibratedPerHead", "Grids", "Heads", "Layers", "check_keep", "merge_heads", "split_heads", "turned"]

SCALE_BITS = 16.0  # of a stored scale, and of a zero point, which may be any integer


def check_keep(keep: float) -> None:
    """Raise UserError for what is no share of a range."""
    if not 0 < keep <= 1:
        raise UserError(f"kv_cache.keep={keep:g} is not allowed; give a share in (0, 1], 1 cuts nothing")


def turned(keys: Tensor, rotate: bool = True, back: bool = False) -> Tensor:
    """Keys (…, D) behind the Hadamard rotation of a head, or from there back; as they are unless `rotate`."""
    return apply(keys, plan(keys.shape[-1]), transpose=back) if rotate else keys


def split_heads(states: Tensor, group_size: int | None) -> Tensor:
    """(batch, KV heads, tokens, D) as (batch, tokens, groups, channels of a group)."""
    heads, size = states.shape[1], states.shape[-1]
    return states.transpose(1, 2).flatten(2).unflatten(-1, (-1, channels_of(group_size, size, heads)))


def merge_heads(groups: Tensor, head_size: int) -> Tensor:
    """Undo `split_heads`."""
    return groups.flatten(2).unflatten(-1, (-1, head_size)).transpose(1, 2)


def channels_of(group_size: int | None, head_size: int, heads: int) -> int:
    """Channels that share a grid, of one token."""
    return {None: head_size, -1: heads * head_size}.get(group_size) or group_size or head_size


@dataclass(frozen=True, kw_only=True)
class Grids:
    """What every policy can be told. bits: of keys, and of values unless `v_bits` says otherwise; 2 to 8.

    convention: of both grids (`grids.CONVENTIONS`). group_size: channels of a head that share a grid; none: all of a
    head; −1: those of all KV heads.
    """

    bits: int
    convention: str
    v_bits: int | None = added(None)
    group_size: int | None = added(None)
    grid: UniformGrid = field(init=False, repr=False)  # of keys
    v_grid: UniformGrid = field(init=False, repr=False)
    stores_grids: ClassVar[bool] = False  # with a model, and not with every token

    def __post_init__(self) -> None:
        for name, bits in (("grid", self.bits), ("v_grid", self.bits if self.v_bits is None else self.v_bits)):
            check_bits("KV bits", bits, "--kv none (16 in a script) for a full-precision cache")
            object.__setattr__(self, name, UniformGrid(bits, -1, self.convention))
        if self.stores_grids and self.grid.rule.zero_point == "real":
            raise UserError(
                f"kv_cache.convention={self.convention} has zero points that are no codes, which fixed ranges need; "
                "choose intactkv-asym or gptq-sym"
            )
        if self.group_size is not None and self.group_size != -1 and self.group_size < 1:
            raise UserError(
                f"kv_cache.group_size={self.group_size} is not allowed; give a divisor of a head's channels, -1 for "
                "one group over all heads of a token, or none for a head"
            )

    def in_heads(self, head_size: int) -> Self:
        """The policy for heads of that many channels, each thing said in one way: a group of as many is a head, and
        bits of values that are those of keys are not said apart. Raises UserError if groups do not fill a head."""
        if self.group_size not in (None, -1) and head_size % (self.group_size or 1):
            raise UserError(
                f"kv_cache.group_size={self.group_size} does not divide the {head_size} channels of a head; use a "
                f"divisor of {head_size}, -1 for one group over all heads of a token, or none for a head"
            )
        return replace(
            self,
            group_size=None if self.group_size == head_size else self.group_size,
            v_bits=None if self.v_bits == self.bits else self.v_bits,
        )

    def bits_per_element(self, head_size: int, heads: int) -> tuple[float, float]:
        """Bits of a stored element of keys and of values, with its share of what is stored for its group."""
        per_group = SCALE_BITS * (1 if self.grid.rule.zero_point == "constant" else 2)
        more = 0.0 if self.stores_grids else per_group / channels_of(self.group_size, head_size, heads)
        return self.grid.bits + more, self.v_grid.bits + more


@dataclass(frozen=True, eq=False)
class Heads(ABC):
    """The policy of one layer. tensors: what its block was calibrated or trained to; gradients flow to them."""

    policy: "CalibratedPerHead"
    tensors: Mapping[str, Tensor]
    differentiable: bool = True

    def keys(self, states: Tensor) -> Tensor:
        """Round new keys (batch, KV heads, tokens, D), after RoPE. Same shape and dtype."""
        groups = split_heads(turned(states.float(), self.policy.rotate_keys), self.policy.group_size)
        rounded = merge_heads(self.rounded_keys(groups), states.shape[-1])
        return turned(rounded, self.policy.rotate_keys, back=True).to(states.dtype)

    def values(self, states: Tensor) -> Tensor:
        """Round new values (batch, KV heads, tokens, D). Same shape and dtype."""
        groups = split_heads(states.float(), self.policy.group_size)
        return merge_heads(self.rounded_values(groups), states.shape[-1]).to(states.dtype)

    @abstractmethod
    def rounded_keys(self, keys: Tensor) -> Tensor:
        """Round groups of keys (see `split_heads`) in the basis that they are rounded in, float32."""

    @abstractmethod
    def rounded_values(self, values: Tensor) -> Tensor:
        """Round groups of values, float32."""


@dataclass(frozen=True, eq=False)
class Layers:
    """The policies of a model's layers, and the one that they are made of."""

    policy: "CalibratedPerHead"
    layers: tuple[LayerPolicy, ...]

    def at(self, layer: int) -> LayerPolicy:
        """The policy of one layer."""
        return self.layers[layer]


@dataclass(frozen=True)
class CalibratedPerHead(Grids):
    """A policy with tensors of its own for every layer. rotate_keys: round keys behind a Hadamard rotation of each
    head."""

    bits: int
    convention: str = "intactkv-asym"
    rotate_keys: bool = False
    heads: ClassVar[type[Heads]]

    def of_block(self, tensors: Mapping[str, Tensor]) -> LayerPolicy:
        """The policy of one layer, by what `fit_block` found (or training made of it)."""
        return self.heads(self, tensors)

    def bound(self, layers: Sequence[Mapping[str, Tensor]]) -> Layers:
        """The policy of a model whose layers have these tensors."""
        return Layers(self, tuple(self.of_block(tensors) for tensors in layers))
