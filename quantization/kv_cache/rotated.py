"""QuaRot's KV cache (Ashkboos et al., NeurIPS 2024, arXiv:2404.00456): keys are rounded in a rotated basis.

    k̂ = Hᵀ Q(H k),   v̂ = Q(v)      Q: one asymmetric grid per (token, head) over the D channels; 5 % of the range is cut

H spreads the few large channels of a key over its head, so that the others keep levels (R3). The reference rotates q
and k and leaves the cache in the rotated basis; H is orthonormal, so rotating back here gives the same scores, and the
cache and its prefix stay in the plain basis. Values are rotated by the model itself, if it is
(`quantization.transforms.rotate`).

Departs from the reference: where D has no Hadamard matrix, the Hartley matrix stands in; a head whose values are all
the same is exact (reference: 0/0).
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from intactkv.store import Rounding
from quantization.grids.uniform import TINY, Fit, UniformGrid
from quantization.kv_cache.base import Grids, OnGrids, check_keep
from quantization.recipes.recipe import added

__all__ = ["Rotated"]


@dataclass(frozen=True, eq=False)
class CutRange(OnGrids):
    """A grid over a share of every group's range, which contains 0."""

    keep: float

    def fit(self, groups: Tensor) -> Fit:
        """By the grid's rule, from both ends times `keep`."""
        low, high = groups.aminmax(dim=-1, keepdim=True)
        return self.grid.rule.fit(low * self.keep, high * self.keep, self.grid.bits)


class ObservedRange(CutRange):
    """A grid over a share of every group's range as it is."""

    def fit(self, groups: Tensor) -> Fit:
        """s = p(hi − lo)/(2^b − 1), z = round(−p lo/s), p = `keep`; 0 need not be in the range, so z may be no code."""
        if self.grid.rule.zero_point == "constant":
            return super().fit(groups)
        low, high = groups.aminmax(dim=-1, keepdim=True)
        # Not minmax-asym: by its least scale a vector of one value c, whose range is cut to p·c, would become p·c.
        spread = (high - low) * self.keep
        # All values the same: one level must hit them, so the scale is the value itself (1 for zeros).
        scale = torch.where(spread < TINY, torch.where(low == 0, 1.0, low.abs()), spread / self.grid.top)
        return Fit(scale, torch.round(-low * self.keep / scale))


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

    def roundings(self, tensors: Mapping[str, Tensor] | None = None) -> tuple[Rounding, Rounding]:
        """Keys in the rotated basis, values as they are."""
        return CutRange(self, self.grid, rotate=True, keep=self.keep), ObservedRange(self, self.v_grid, keep=self.keep)

    def zero_dtype(self, grid: UniformGrid) -> torch.dtype | None:
        """Zero points of values are no codes where they do not follow from the bits."""
        asymmetric = grid is self.v_grid and grid.rule.zero_point == "code"
        return (
            (torch.float32 if self.scale_dtype == "float32" else torch.int16)
            if asymmetric
            else super().zero_dtype(grid)
        )
