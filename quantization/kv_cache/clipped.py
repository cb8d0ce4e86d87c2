"""Dynamic per-head KV-cache quantization with a learned clip (PrefixQuant, Chen et al. 2024, 2410.05265).

    one group = the D values of one (sequence, head, token), or as `base` says;   its range is [low · min, high · max]

Keys keep their whole range, values the shares of it that training or a search found for the layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantization.grids.straight_through import on_grid
from quantization.grids.uniform import fit
from quantization.kv_cache.base import CalibratedPerHead, Heads, check_keep
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import fit_shares

__all__ = ["ClippedHeads", "ClippedPerHead"]


@dataclass(frozen=True, eq=False)
class ClippedHeads(Heads):
    """A layer's policy. tensors: `values_low` and `values_high`, scalars."""

    def rounded_keys(self, keys: Tensor) -> Tensor:
        """Keys on a grid over their whole range."""
        return on_grid(keys, fit(keys, self.policy.grid), self.policy.grid)

    def rounded_values(self, values: Tensor) -> Tensor:
        """Values on a grid over the learned shares of their range."""
        low, high = (self.tensors[f"values_{end}"].to(values.device) for end in ("low", "high"))
        return on_grid(values, fit_shares(values, low, high, self.policy.v_grid), self.policy.v_grid)


@dataclass(frozen=True)
class ClippedPerHead(CalibratedPerHead):
    """A grid per token and head, 2 to 8 bits; a share of the values' range, found for every layer.

    keep: the share that a search or training starts from.
    """

    convention: str = "gptq-sym"
    keep: float = 0.95
    heads: ClassVar[type[Heads]] = ClippedHeads

    def __post_init__(self) -> None:
        check_keep(self.keep)
        super().__post_init__()

    def fit_block(self, block: DecoderBlock) -> dict[str, Tensor]:
        """The shares of the values' range, both `keep`, scalars."""
        device = next(block.module.parameters()).device
        return {f"values_{end}": torch.tensor(self.keep, device=device) for end in ("low", "high")}

    def learned(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those tensors of a block that training may move: both shares, or one of a symmetric grid."""
        one = self.grid.rule.zero_point == "constant"
        return {name: x for name, x in tensors.items() if not (one and name.endswith("low"))}
