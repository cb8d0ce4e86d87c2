"""What KV policies share: their grid, the rotation of keys, and the parts of a policy with tensors for every layer.

    keys: k → Mᵀ Q(M k) where they are rotated, M the Hadamard rotation of a head; values: Q(v)

q·k needs no rotation of q then (PrefixQuant rotates both).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from corpora.errors import UserError
from intactkv.cache import LayerPolicy
from quantization.grids.uniform import UniformGrid, check_bits
from quantization.hadamard import apply, plan

__all__ = ["CalibratedPerHead", "Heads", "Layers", "check_keep", "kv_grid", "turned"]


def kv_grid(bits: int, convention: str) -> UniformGrid:
    """The grid of a head. Raises UserError for bits or a convention that a cache cannot have."""
    check_bits("KV bits", bits, "--kv none (16 in a script) for a full-precision cache")
    grid = UniformGrid(bits, -1, convention)
    if grid.rule.zero_point == "real":
        raise UserError(
            f"kv_cache.convention={convention} has zero points that are no codes; choose intactkv-asym or gptq-sym"
        )
    return grid


def check_keep(keep: float) -> None:
    """Raise UserError for what is no share of a range."""
    if not 0 < keep <= 1:
        raise UserError(f"kv_cache.keep={keep:g} is not allowed; give a share in (0, 1], 1 cuts nothing")


def turned(keys: Tensor, rotate: bool = True, back: bool = False) -> Tensor:
    """Keys (…, D) behind the Hadamard rotation of a head, or from there back; as they are unless `rotate`."""
    return apply(keys, plan(keys.shape[-1]), transpose=back) if rotate else keys


@dataclass(frozen=True, eq=False)
class Heads(ABC):
    """The policy of one layer. tensors: what its block was calibrated or trained to; gradients flow to them."""

    grid: UniformGrid
    tensors: Mapping[str, Tensor]
    rotate_keys: bool = False
    differentiable: bool = True

    def keys(self, states: Tensor) -> Tensor:
        """Round new keys (batch, KV heads, tokens, D), after RoPE. Same shape and dtype."""
        rounded = self.rounded_keys(turned(states.float(), self.rotate_keys))
        return turned(rounded, self.rotate_keys, back=True).to(states.dtype)

    def values(self, states: Tensor) -> Tensor:
        """Round new values (batch, KV heads, tokens, D). Same shape and dtype."""
        return self.rounded_values(states.float()).to(states.dtype)

    @abstractmethod
    def rounded_keys(self, keys: Tensor) -> Tensor:
        """Round keys in the basis that they are rounded in, float32."""

    @abstractmethod
    def rounded_values(self, values: Tensor) -> Tensor:
        """Round values, float32."""


@dataclass(frozen=True, eq=False)
class Layers:
    """The policies of a model's layers."""

    layers: tuple[LayerPolicy, ...]

    def at(self, layer: int) -> LayerPolicy:
        """The policy of one layer."""
        return self.layers[layer]


@dataclass(frozen=True)
class CalibratedPerHead:
    """A policy with tensors of its own for every layer, 2 to 8 bits.

    convention: of the grid (`grids.CONVENTIONS`). rotate_keys: round keys behind a Hadamard rotation of each head.
    """

    bits: int
    convention: str = "intactkv-asym"
    rotate_keys: bool = False
    grid: UniformGrid = field(init=False, repr=False)
    heads: ClassVar[type[Heads]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", kv_grid(self.bits, self.convention))

    def of_block(self, tensors: Mapping[str, Tensor]) -> LayerPolicy:
        """The policy of one layer, by what `fit_block` found (or training made of it)."""
        return self.heads(self.grid, tensors, self.rotate_keys)

    def bound(self, layers: Sequence[Mapping[str, Tensor]]) -> Layers:
        """The policy of a model whose layers have these tensors."""
        return Layers(tuple(self.of_block(tensors) for tensors in layers))
