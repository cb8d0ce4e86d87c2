"""Static per-head KV-cache quantization (PrefixQuant, Chen et al. 2024, 2410.05265): a grid per KV head.

    s = (max − min)/(2^b − 1),   z = round(−min/s)      per layer, over the calibration text; keys after RoPE

A group is a KV head, or as `base` says.

Fixed grids only work if no token is an outlier: calibrate behind the prefix that holds the pivot tokens. Keys may be
rounded in a rotated basis (`base`).

Departs from PrefixQuant: its search for better scales belongs to its recipes (`quantization.tuning.search`); by itself
the policy takes min-max ranges.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from intactkv.store import Rounding
from quantization.grids.straight_through import straight
from quantization.grids.uniform import Fit
from quantization.kv_cache.base import Grids, OnGrids, channels_of, split_heads, turned
from quantization.model.blocks import DecoderBlock

__all__ = ["StaticPerHead"]


@dataclass(frozen=True, eq=False)
class Fixed(OnGrids):
    """Keys or values on the grids of a layer. scale, zero_point: (groups, 1, 1)."""

    scale: Tensor
    zero_point: Tensor
    differentiable = True

    def fit(self, groups: Tensor) -> Fit:
        """The same for every token: (groups, 1)."""
        scale, zero_point = (x.to(groups.device).view(-1, 1) for x in (self.scale, self.zero_point))
        return Fit(scale, straight(zero_point.round().clamp(0, self.grid.top), zero_point))


@dataclass(frozen=True)
class StaticPerHead(Grids):
    """Grids per KV head, 2 to 8 bits, from the text that the model was calibrated on; PrefixQuant's own convention is
    gptq-sym. rotate_keys: round keys behind a Hadamard rotation of each head."""

    bits: int
    convention: str = "intactkv-asym"
    rotate_keys: bool = False
    calibrates: ClassVar[bool] = True
    stores_grids: ClassVar[bool] = True

    def roundings(self, tensors: Mapping[str, Tensor] | None = None) -> tuple[Rounding, Rounding]:
        """Both by what `fit_block` found, or training made of it."""
        assert tensors is not None
        keys, values = (
            tuple(tensors[f"{name}_{part}"] for part in ("scale", "zero_point")) for name in ("keys", "values")
        )
        return Fixed(self, self.grid, *keys, rotate=self.rotate_keys), Fixed(self, self.v_grid, *values)

    def fit_block(self, block: DecoderBlock) -> dict[str, Tensor]:
        """Scale and zero point of every group, (groups, 1, 1), for keys and values; min-max over the text."""
        ranges: dict[str, tuple[Tensor, Tensor]] = {}
        for keys, values in block.keys_and_values():
            for name, x in (("keys", turned(keys.float(), self.rotate_keys)), ("values", values.float())):
                groups = split_heads(x, self.group_size)[0]
                low, high = groups.amin((0, 2)), groups.amax((0, 2))  # (groups,)
                before = ranges.get(name, (low, high))
                ranges[name] = torch.minimum(before[0], low), torch.maximum(before[1], high)
        tensors: dict[str, Tensor] = {}
        for name, (low, high) in ranges.items():
            grid = self.grid if name == "keys" else self.v_grid
            scale, zero_point = grid.rule.fit(low, high, grid.bits)
            tensors |= {f"{name}_scale": scale[:, None, None], f"{name}_zero_point": zero_point[:, None, None]}
        return tensors

    def shapes(self, head_size: int, heads: int, names: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """See `Policy.shapes`."""
        groups = head_size * heads // channels_of(self.group_size, head_size, heads)
        return {f"{side}_{part}": (groups, 1, 1) for side in ("keys", "values") for part in ("scale", "zero_point")}

    def learned(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those tensors of a block that training may move: scales, and zero points where the grid has free ones."""
        free = self.grid.rule.zero_point == "code"
        return {name: x for name, x in tensors.items() if free or not name.endswith("zero_point")}
