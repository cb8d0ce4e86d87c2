"""Dynamic per-head KV-cache quantization with a learned clip (PrefixQuant, Chen et al. 2024, 2410.05265).

    one group = the D values of one (sequence, head, token), or as `base` says;   its range is [low · min, high · max]

Keys keep their whole range, values the shares of it that training or a search found for the layer.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from intactkv.store import Rounding
from quantization.grids.uniform import Fit
from quantization.kv_cache.base import Grids, OnGrids, check_keep
from quantization.kv_cache.per_head import WholeRange
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import fit_shares

__all__ = ["ClippedPerHead"]


@dataclass(frozen=True, eq=False)
class Shares(OnGrids):
    """Values on a grid over the learned shares of their range. low, high: scalars."""

    low: Tensor
    high: Tensor
    differentiable = True

    def fit(self, groups: Tensor) -> Fit:
        """See `fit_shares`."""
        return fit_shares(groups, self.low.to(groups.device), self.high.to(groups.device), self.grid)


class ClippedKeys(WholeRange):
    """Keys on a grid over their whole range, with gradients."""

    differentiable = True


@dataclass(frozen=True)
class ClippedPerHead(Grids):
    """A grid per token and head, 2 to 8 bits; a share of the values' range, of every layer. rotate_keys: round keys
    behind a Hadamard rotation of each head.

    keep: the share; PrefixQuant's search and training (`quantization.tuning`) start from it.
    """

    bits: int
    convention: str = "gptq-sym"
    rotate_keys: bool = False
    keep: float = 0.95
    calibrates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        super().__post_init__()

    def roundings(self, tensors: Mapping[str, Tensor] | None = None) -> tuple[Rounding, Rounding]:
        """Keys over their whole range, values over the shares in `values_low` and `values_high`."""
        assert tensors is not None
        keys = ClippedKeys(self, self.grid, rotate=self.rotate_keys)
        return keys, Shares(self, self.v_grid, low=tensors["values_low"], high=tensors["values_high"])

    def fit_block(self, block: DecoderBlock) -> dict[str, Tensor]:
        """The shares of the values' range, both `keep`, scalars."""
        device = next(block.module.parameters()).device
        return {f"values_{end}": torch.tensor(self.keep, device=device) for end in ("low", "high")}

    def shapes(self, head_size: int, heads: int, names: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """See `Policy.shapes`."""
        return {"values_low": (), "values_high": ()}

    def learned(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those tensors of a block that training may move: both shares, or one of a symmetric grid."""
        one = self.grid.rule.zero_point == "constant"
        return {name: x for name, x in tensors.items() if not (one and name.endswith("low"))}
