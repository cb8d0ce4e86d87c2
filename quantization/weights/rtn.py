"""RTN, round to nearest: the baseline of every table.

    W ≈ s · (clamp(round(W / s) + z, 0, 2^b − 1) − z)      one s and z per group; affine grid: Jacob et al. 2018, Eq. 1

The grid's convention does all the work (`quantization.grids.uniform`). No data is needed, so nothing calibrates.
"""

from dataclasses import dataclass
from typing import ClassVar

from quantization.grids.uniform import QuantizedTensor, UniformGrid, quantize
from quantization.model.blocks import DecoderBlock
from quantization.weights.base import GridQuantizer

__all__ = ["RTN"]


@dataclass(frozen=True)
class RTN(GridQuantizer):
    """Round every weight to the nearest level of its group's grid."""

    grid: UniformGrid
    name: ClassVar[str] = "rtn"
    calibrates: ClassVar[bool] = False

    def quantize_block(self, block: DecoderBlock) -> dict[str, QuantizedTensor]:
        """Every linear of the block on its grid, by the linear's name within the block."""
        return {
            name: quantize(linear.weight.data, self.grid, f"{block.name}.{name}")
            for name, linear in block.linears().items()
        }
