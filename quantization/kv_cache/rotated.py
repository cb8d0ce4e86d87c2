"""QuaRot's KV cache (Ashkboos et al., NeurIPS 2024, arXiv:2404.00456): keys are rounded in a rotated basis.

    k̂ = Hᵀ Q(H k),   v̂ = Q(v)      Q: one asymmetric grid per (token, head) over the D channels; 5 % of the range is cut

H spreads the few large channels of a key over its head, so that the others keep levels (R3). The reference rotates q
and k and leaves the cache in the rotated basis; H is orthonormal, so rotating back here gives the same scores, and the
cache and its prefix stay in the plain basis. Values are rotated by the model itself, if it is
(`quantization.transforms.rotate`).

Departs from the reference: where D has no Hadamard matrix, the Hartley matrix stands in; a head whose values are all
the same is exact (reference: 0/0).
"""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from quantization.grids.uniform import TINY, Fit, UniformGrid, encode
from quantization.kv_cache.base import Grids, check_keep, merge_heads, split_heads, turned
from quantization.recipes.recipe import added

__all__ = ["Rotated"]


@dataclass(frozen=True)
class Rotated(Grids):
    """Grids per token and head, or as `Grids` says. keep: the share of a range that is kept, in (0, 1]; 0.95 as
    published. convention: of keys; ranges of values are taken as they are where it is asymmetric."""

    bits: int
    keep: float = 0.95
    _: KW_ONLY
    convention: str = added("gptq-asym")

    def __post_init__(self) -> None:
        check_keep(self.keep)
        super().__post_init__()

    def keys(self, states: Tensor) -> Tensor:
        """New keys (batch, KV heads, tokens, D), after RoPE, rounded in the rotated basis; the range contains 0."""
        x = split_heads(turned(states.float()), self.group_size)
        low, high = x.aminmax(dim=-1, keepdim=True)
        fitted = self.grid.rule.fit(low * self.keep, high * self.keep, self.bits)
        rounded = self._rounded(x, fitted, self.grid, states.shape[-1])
        return turned(rounded, back=True).to(states.dtype)

    def values(self, states: Tensor) -> Tensor:
        """New values (batch, KV heads, tokens, D), rounded over the range as it is."""
        x = split_heads(states.float(), self.group_size)
        low, high = x.aminmax(dim=-1, keepdim=True)
        if self.v_grid.rule.zero_point == "constant":
            fitted = self.v_grid.rule.fit(low * self.keep, high * self.keep, self.v_grid.bits)
        else:
            fitted = self._observed(low, high)
        return self._rounded(x, fitted, self.v_grid, states.shape[-1]).to(states.dtype)

    def _observed(self, low: Tensor, high: Tensor) -> Fit:
        """s = p(hi − lo)/(2^b − 1), z = round(−p lo/s), p = `keep`; 0 need not be in the range, so z may be no code."""
        # Not minmax-asym: by its least scale a vector of one value c, whose range is cut to p·c, would become p·c.
        spread = (high - low) * self.keep
        # All values the same: one level must hit them, so the scale is the value itself (1 for zeros).
        scale = torch.where(spread < TINY, torch.where(low == 0, 1.0, low.abs()), spread / self.v_grid.top)
        return Fit(scale, torch.round(-low * self.keep / scale))

    def _rounded(self, x: Tensor, fitted: Fit, grid: UniformGrid, head_size: int) -> Tensor:
        return merge_heads((encode(x, fitted, grid) - fitted.zero_point) * fitted.scale, head_size)
