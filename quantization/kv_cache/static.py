"""Static per-head KV-cache quantization (PrefixQuant, Chen et al. 2024, 2410.05265): a grid per KV head.

    s = (max − min)/(2^b − 1),   z = round(−min/s)      per layer, over the calibration text; keys after RoPE

Fixed grids only work if no token is an outlier: calibrate behind the prefix that holds the pivot tokens. Keys may be
rounded in a rotated basis, k → M k, and are turned back: q·k needs no rotation of q then (PrefixQuant rotates both).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corpora.errors import UserError
from intactkv.cache import LayerPolicy
from quantization.grids.straight_through import on_grid, straight
from quantization.grids.uniform import Fit, UniformGrid
from quantization.hadamard import apply, plan
from quantization.model.blocks import DecoderBlock

__all__ = ["Layers", "StaticHeads", "StaticPerHead", "kv_grid", "turned"]


def kv_grid(bits: int, convention: str) -> UniformGrid:
    """The grid of a head. Raises UserError for bits or a convention that a cache cannot have."""
    if not 2 <= bits <= 8:
        raise UserError(f"KV bits={bits} is not supported; use 2 to 8, or --kv none for a full-precision cache")
    grid = UniformGrid(bits, -1, convention)
    if grid.rule.zero_point == "real":
        raise UserError(
            f"kv_cache.convention={convention} has zero points that are no codes; choose intactkv-asym or gptq-sym"
        )
    return grid


def turned(keys: Tensor, rotate: bool, back: bool = False) -> Tensor:
    """Keys (…, D) behind the Hadamard rotation of a head, or from there back; as they are unless `rotate`."""
    return apply(keys, plan(keys.shape[-1]), transpose=back) if rotate else keys


@dataclass(frozen=True, eq=False)
class Layers:
    """The policies of a model's layers."""

    layers: tuple[LayerPolicy, ...]

    def at(self, layer: int) -> LayerPolicy:
        """The policy of one layer."""
        return self.layers[layer]


@dataclass(frozen=True)
class StaticPerHead:
    """Grids per KV head, 2 to 8 bits, from the text that the model was calibrated on.

    convention: of the grid (`grids.CONVENTIONS`); PrefixQuant's own is gptq-sym. rotate_keys: round keys behind a
    Hadamard rotation of each head.
    """

    bits: int
    convention: str = "intactkv-asym"
    rotate_keys: bool = False
    grid: UniformGrid = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", kv_grid(self.bits, self.convention))

    def fit_block(self, block: DecoderBlock) -> dict[str, Tensor]:
        """Scale and zero point of every KV head, (heads, 1, 1), for keys and values; min-max over the text."""
        ranges: dict[str, tuple[Tensor, Tensor]] = {}
        for keys, values in block.keys_and_values():
            for name, x in (("keys", turned(keys.float(), self.rotate_keys)), ("values", values.float())):
                low, high = x[0].amin((1, 2)), x[0].amax((1, 2))  # (heads,)
                before = ranges.get(name, (low, high))
                ranges[name] = torch.minimum(before[0], low), torch.maximum(before[1], high)
        tensors: dict[str, Tensor] = {}
        for name, (low, high) in ranges.items():
            scale, zero_point = self.grid.rule.fit(low, high, self.bits)
            tensors |= {f"{name}_scale": scale[:, None, None], f"{name}_zero_point": zero_point[:, None, None]}
        return tensors

    def learned(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those tensors of a block that training may move: scales, and zero points where the grid has free ones."""
        free = self.grid.rule.zero_point == "code"
        return {name: x for name, x in tensors.items() if free or not name.endswith("zero_point")}

    def of_block(self, tensors: Mapping[str, Tensor]) -> "StaticHeads":
        """The policy of one layer, by what `fit_block` found (or training made of it)."""
        return StaticHeads(self.grid, tensors, self.rotate_keys)

    def bound(self, layers: Sequence[Mapping[str, Tensor]]) -> Layers:
        """The policy of a model whose layers have these tensors."""
        return Layers(tuple(self.of_block(tensors) for tensors in layers))


@dataclass(frozen=True, eq=False)
class StaticHeads:
    """A layer's grids. tensors: see `StaticPerHead.fit_block`; gradients flow to them."""

    grid: UniformGrid
    tensors: Mapping[str, Tensor]
    rotate_keys: bool = False
    differentiable: bool = True

    def keys(self, states: Tensor) -> Tensor:
        """Round new keys (batch, KV heads, tokens, D), after RoPE. Same shape and dtype."""
        rounded = self._rounded(turned(states.float(), self.rotate_keys), "keys")
        return turned(rounded, self.rotate_keys, back=True).to(states.dtype)

    def values(self, states: Tensor) -> Tensor:
        """Round new values (batch, KV heads, tokens, D). Same shape and dtype."""
        return self._rounded(states.float(), "values").to(states.dtype)

    def _rounded(self, states: Tensor, name: str) -> Tensor:
        scale, zero_point = (self.tensors[f"{name}_{part}"].to(states.device) for part in ("scale", "zero_point"))
        code = straight(zero_point.round().clamp(0, self.grid.top), zero_point)
        return on_grid(states, Fit(scale, code), self.grid)
