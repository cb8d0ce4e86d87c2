"""Dynamic per-head KV-cache quantization with a learned clip (PrefixQuant, Chen et al. 2024, 2410.05265).

    one group = the D values of one (sequence, head, token);   its range is [low · min, high · max]

Keys keep their whole range, values the shares of it that training or a search found for the layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corpora.errors import UserError
from quantization.grids.straight_through import on_grid
from quantization.grids.uniform import UniformGrid, fit
from quantization.kv_cache.static import Layers, kv_grid, turned
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import fit_shares

__all__ = ["ClippedHeads", "ClippedPerHead"]


@dataclass(frozen=True)
class ClippedPerHead:
    """A grid per token and head, 2 to 8 bits; a share of the values' range, found for every layer.

    keep: the share that a search or training starts from. Otherwise as `StaticPerHead`.
    """

    bits: int
    convention: str = "gptq-sym"
    rotate_keys: bool = False
    keep: float = 0.95
    grid: UniformGrid = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UserError(f"kv_cache.keep={self.keep:g} is not allowed; give a share in (0, 1], 1 cuts nothing")
        object.__setattr__(self, "grid", kv_grid(self.bits, self.convention))

    def fit_block(self, block: DecoderBlock) -> dict[str, Tensor]:
        """The shares of the values' range, both `keep`, scalars."""
        device = next(block.module.parameters()).device
        return {f"values_{end}": torch.tensor(self.keep, device=device) for end in ("low", "high")}

    def learned(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those tensors of a block that training may move: both shares, or one of a symmetric grid."""
        one = self.grid.rule.zero_point == "constant"
        return {name: x for name, x in tensors.items() if not (one and name.endswith("low"))}

    def of_block(self, tensors: Mapping[str, Tensor]) -> "ClippedHeads":
        """The policy of one layer with these shares."""
        return ClippedHeads(self.grid, tensors, self.rotate_keys)

    def bound(self, layers: Sequence[Mapping[str, Tensor]]) -> Layers:
        """The policy of a model whose layers have these shares."""
        return Layers(tuple(self.of_block(tensors) for tensors in layers))


@dataclass(frozen=True, eq=False)
class ClippedHeads:
    """A layer's policy. tensors: `values_low` and `values_high`, scalars; gradients flow to them."""

    grid: UniformGrid
    tensors: Mapping[str, Tensor]
    rotate_keys: bool = False
    differentiable: bool = True

    def keys(self, states: Tensor) -> Tensor:
        """Round new keys (batch, KV heads, tokens, D), after RoPE. Same shape and dtype."""
        exact = turned(states.float(), self.rotate_keys)
        rounded = on_grid(exact, fit(exact, self.grid), self.grid)
        return turned(rounded, self.rotate_keys, back=True).to(states.dtype)

    def values(self, states: Tensor) -> Tensor:
        """Round new values (batch, KV heads, tokens, D). Same shape and dtype."""
        exact = states.float()
        low, high = (self.tensors[f"values_{end}"].to(states.device) for end in ("low", "high"))
        return on_grid(exact, fit_shares(exact, low, high, self.grid), self.grid).to(states.dtype)
