"""Static per-head KV-cache quantization (PrefixQuant, Chen et al. 2024, 2410.05265): a grid per KV head.

    s = (max − min)/(2^b − 1),   z = round(−min/s)      per layer, over the calibration text; keys after RoPE

Fixed grids only work if no token is an outlier: calibrate behind the prefix that holds the pivot tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corpora.errors import UserError
from quantization.blocks import DecoderBlock
from quantization.grids import Fit, UniformGrid
from quantization.straight_through import on_grid, straight

__all__ = ["StaticPerHead"]


@dataclass(frozen=True)
class StaticPerHead:
    """Grids per KV head, 2 to 8 bits, from the text that the model was calibrated on."""

    bits: int
    grid: UniformGrid = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UserError(
                f"KV bits={self.bits} is not supported; use 2 to 8, or --kv none for a full-precision cache"
            )
        object.__setattr__(self, "grid", UniformGrid(self.bits, -1, "intactkv-asym"))

    def fit_block(self, block: DecoderBlock) -> dict[str, Tensor]:
        """Scale and zero point of every KV head, (heads, 1, 1), for keys and values; min-max over the text."""
        ranges: dict[str, tuple[Tensor, Tensor]] = {}
        for states in block.keys_and_values():
            for name, x in zip(("keys", "values"), states, strict=True):
                low, high = x[0].float().amin((1, 2)), x[0].float().amax((1, 2))  # (heads,)
                before = ranges.get(name, (low, high))
                ranges[name] = torch.minimum(before[0], low), torch.maximum(before[1], high)
        tensors: dict[str, Tensor] = {}
        for name, (low, high) in ranges.items():
            scale, zero_point = self.grid.rule.fit(low, high, self.bits)
            tensors |= {f"{name}_scale": scale[:, None, None], f"{name}_zero_point": zero_point[:, None, None]}
        return tensors

    def of_block(self, tensors: Mapping[str, Tensor]) -> "StaticHeads":
        """The policy of one layer, by what `fit_block` found (or training made of it)."""
        return StaticHeads(self.grid, tensors)

    def bound(self, layers: Sequence[Mapping[str, Tensor]]) -> "StaticLayers":
        """The policy of a model whose layers have these tensors."""
        return StaticLayers(tuple(self.of_block(tensors) for tensors in layers))


@dataclass(frozen=True, eq=False)
class StaticHeads:
    """A layer's grids. tensors: see `StaticPerHead.fit_block`; gradients flow to them."""

    grid: UniformGrid
    tensors: Mapping[str, Tensor]

    def keys(self, states: Tensor) -> Tensor:
        """Round new keys (batch, KV heads, tokens, D), after RoPE. Same shape and dtype."""
        return self._rounded(states, "keys")

    def values(self, states: Tensor) -> Tensor:
        """Round new values (batch, KV heads, tokens, D). Same shape and dtype."""
        return self._rounded(states, "values")

    def _rounded(self, states: Tensor, name: str) -> Tensor:
        scale, zero_point = (self.tensors[f"{name}_{part}"].to(states.device) for part in ("scale", "zero_point"))
        code = straight(zero_point.round().clamp(0, self.grid.top), zero_point)
        return on_grid(states, Fit(scale, code), self.grid).to(states.dtype)


@dataclass(frozen=True, eq=False)
class StaticLayers:
    """The policies of a model's layers."""

    layers: tuple[StaticHeads, ...]

    def at(self, layer: int) -> StaticHeads:
        """The policy of one layer."""
        return self.layers[layer]
