"""QuaRot's KV cache (Ashkboos et al., NeurIPS 2024, arXiv:2404.00456): keys are rounded in a rotated basis.

    k̂ = Hᵀ Q(H k),   v̂ = Q(v)      Q: one asymmetric grid per (token, head) over the D channels; 5 % of the range is cut

H spreads the few large channels of a key over its head, so that the others keep levels (R3). The reference rotates q
and k and leaves the cache in the rotated basis; H is orthonormal, so rotating back here gives the same scores, and the
cache and its prefix stay in the plain basis. Values are rotated by the model itself, if it is
(`quantization.transforms.rotate`).

Departs from the reference: where D has no Hadamard matrix, the Hartley matrix stands in; a head whose values are all
the same is exact (reference: 0/0).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantization.grids.uniform import TINY, Fit, UniformGrid, encode
from quantization.kv_cache.base import check_keep, kv_grid, turned

__all__ = ["Rotated"]


@dataclass(frozen=True)
class Rotated:
    """Grids per token and head, 2 to 8 bits. keep: the share of a range that is kept, in (0, 1]; 0.95 as published."""

    bits: int
    keep: float = 0.95
    grid: UniformGrid = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        object.__setattr__(self, "grid", kv_grid(self.bits, "gptq-asym"))

    def keys(self, states: Tensor) -> Tensor:
        """New keys (batch, KV heads, tokens, D), after RoPE, rounded in the rotated basis; the range contains 0."""
        x = turned(states.float())
        low, high = x.aminmax(dim=-1, keepdim=True)
        rounded = self._rounded(x, self.grid.rule.fit(low * self.keep, high * self.keep, self.bits))
        return turned(rounded, back=True).to(states.dtype)

    def values(self, states: Tensor) -> Tensor:
        """New values (batch, KV heads, tokens, D), rounded over the range as it is."""
        x = states.float()
        return self._rounded(x, self._observed(*x.aminmax(dim=-1, keepdim=True))).to(states.dtype)

    def _observed(self, low: Tensor, high: Tensor) -> Fit:
        """s = p(hi − lo)/(2^b − 1), z = round(−p lo/s), p = `keep`; 0 need not be in the range, so z may be no code."""
        spread = (high - low) * self.keep
        # All values the same: one level must hit them, so the scale is the value itself (1 for zeros).
        scale = torch.where(spread < TINY, torch.where(low == 0, 1.0, low.abs()), spread / self.grid.top)
        return Fit(scale, torch.round(-low * self.keep / scale))

    def _rounded(self, x: Tensor, fitted: Fit) -> Tensor:
        return (encode(x, fitted, self.grid) - fitted.zero_point) * fitted.scale
