"""Per-head dynamic KV-cache quantization, as IntactKV evaluates it (Liu et al., ACL Findings 2024, 2403.01241).

    one group = the D values of one (sequence, head, token);   s = (max − min)/(2^b − 1),   z = round(−min/s)

The range is taken as it is: it need not contain 0, and z need not be a code.

Keys are quantized after RoPE, keys and values before attention reads them; the intact prefix is not touched.
"""

from dataclasses import dataclass

from torch import Tensor

from quantization.grids.uniform import UniformGrid, fake_quantize
from quantization.kv_cache.base import Grids, merge_heads, split_heads
from quantization.recipes.recipe import added

__all__ = ["PerHead"]


@dataclass(frozen=True)
class PerHead(Grids):
    """A grid per token and head, or as `Grids` says.

    Records that name no convention were made with intactkv-asym, whose ranges contain 0.
    """

    bits: int
    convention: str = added("minmax-asym", "intactkv-asym")

    def keys(self, states: Tensor) -> Tensor:
        """Quantize and dequantize new keys: (batch, heads, tokens, D), after RoPE. Same shape and dtype."""
        return self._rounded(states, self.grid)

    def values(self, states: Tensor) -> Tensor:
        """Quantize and dequantize new values: (batch, heads, tokens, D). Same shape and dtype."""
        return self._rounded(states, self.v_grid)

    def _rounded(self, states: Tensor, grid: UniformGrid) -> Tensor:
        return merge_heads(fake_quantize(split_heads(states, self.group_size), grid), states.shape[-1])
