"""Per-head dynamic KV-cache quantization, as IntactKV evaluates it (Liu et al., ACL Findings 2024, 2403.01241).

    one group = the D values of one (sequence, head, token);   s = (max − min)/(2^b − 1),   z = round(−min/s)

Keys are quantized after RoPE, keys and values before attention reads them; the intact prefix is not touched.
"""

from dataclasses import dataclass, field

from torch import Tensor

from quantization.grids.uniform import UniformGrid, fake_quantize
from quantization.kv_cache.base import kv_grid

__all__ = ["PerHead"]


@dataclass(frozen=True)
class PerHead:
    """Asymmetric grid per token and head over the head dimension, 2 to 8 bits."""

    bits: int
    grid: UniformGrid = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", kv_grid(self.bits, "intactkv-asym"))

    def keys(self, states: Tensor) -> Tensor:
        """Quantize and dequantize new keys: (batch, heads, tokens, D), after RoPE. Same shape and dtype."""
        return fake_quantize(states, self.grid)

    def values(self, states: Tensor) -> Tensor:
        """Quantize and dequantize new values: (batch, heads, tokens, D). Same shape and dtype."""
        return fake_quantize(states, self.grid)
