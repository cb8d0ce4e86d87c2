"""Per-head dynamic KV-cache quantization, as IntactKV evaluates it (Liu et al., ACL Findings 2024, 2403.01241).

    one group = the D values of one (sequence, head, token);   s = (max − min)/(2^b − 1),   z = round(−min/s)

The range is taken as it is: it need not contain 0, and z need not be a code.

Keys are quantized after RoPE, keys and values before attention reads them; the intact prefix is not touched.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from intactkv.store import Rounding
from quantization.grids.uniform import Fit, fit
from quantization.kv_cache.base import Grids, OnGrids
from quantization.recipes.recipe import added

__all__ = ["PerHead"]


class WholeRange(OnGrids):
    """A grid over the whole range of every group."""

    def fit(self, groups: Tensor) -> Fit:
        """By the grid's rule."""
        return fit(groups, self.grid)


@dataclass(frozen=True)
class PerHead(Grids):
    """A grid per token and head, or as `Grids` says.

    Records that name no convention were made with intactkv-asym, whose ranges contain 0.
    """

    bits: int
    convention: str = added("minmax-asym", "intactkv-asym")

    def roundings(self, tensors: Mapping[str, Tensor] | None = None) -> tuple[Rounding, Rounding]:
        """Keys and values alike."""
        return WholeRange(self, self.grid), WholeRange(self, self.v_grid)
