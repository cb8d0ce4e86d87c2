"""ZeroQuant (Yao et al., NeurIPS 2022, arXiv:2206.01861): symmetric groups, fewer bits in the MLP than in attention.

    s = max|w| / 2^(b−1),   q = clamp(round(w / s), −2^(b−1), 2^(b−1) − 1),   ŵ = s · q     one s per group; section 4.1

"W4/8" is 4 bits in the MLP and 8 in attention. Activations are rounded by the same rule, one group per token
(`quantization.model.activations`); the paper's layer-by-layer distillation is `quantization.tuning.distill`.

Departs from the published code (DeepSpeed): groups are runs of a row; its own, G equal runs of the flattened matrix
that may cross rows, are `groups`. Arithmetic is float32 (there: the weights' bfloat16, which moves 7 % of the 8-bit
codes). A group of zeros keeps its zeros (there: NaN). 2 bits, where it turns to a ternary rule, are refused.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from corpora.errors import UserError
from quantization.grids.flat import quantize_flat, split_runs
from quantization.grids.stored import StoredWeight
from quantization.grids.uniform import UniformGrid, check_bits, quantize
from quantization.model.blocks import DecoderBlock
from quantization.weights.base import GridQuantizer, cut_label

__all__ = ["ZeroQuant"]


@dataclass(frozen=True)
class ZeroQuant(GridQuantizer):
    """Round to nearest with a width for the MLP and one for attention.

    grid: of the MLP. attention_bits: of the same grid in attention. groups: equal runs of each flattened matrix
    (published: 4096), in place of the grid's groups of a row; 0 keeps those.
    """

    grid: UniformGrid
    attention_bits: int = 8
    groups: int = 0
    name: ClassVar[str] = "zeroquant"
    calibrates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field, bits in (("grid.bits", self.grid.bits), ("attention_bits", self.attention_bits)):
            check_bits(f"weights.{field}", bits, "quantize with rtn: ZeroQuant has no other widths", lowest=3)
        if self.groups < 0:
            raise UserError(f"weights.groups={self.groups} is not allowed; give a number of runs, or 0 for none")
        if self.groups and self.grid.group_size != -1:
            raise UserError(
                f"weights.groups={self.groups} and weights.grid.group_size={self.grid.group_size} both say how a "
                "matrix is cut; leave one of them out (groups=0 or group_size=-1)"
            )

    @property
    def label(self) -> str:
        """`zeroquant-w4-8row`: 4 bits in the MLP, 8 in attention; `…x4096` for that many runs of a matrix."""
        attention = "" if self.attention_bits == self.grid.bits else f"-{self.attention_bits}"
        cut = f"x{self.groups}" if self.groups else cut_label(self.grid)
        return f"{self.name}-w{self.grid.bits}{attention}{cut}"

    def check(self, block: DecoderBlock) -> None:
        """Groups must fill every row, or the matrix. Raises UserError, with the linear's name."""
        if not self.groups:
            super().check(block)
            return
        for name, linear in block.linears().items():
            split_runs(linear.weight, self.groups, f"{block.name}.{name}")

    def quantize_block(self, block: DecoderBlock) -> dict[str, StoredWeight]:
        """Every linear of the block on its grid, by the linear's name within the block."""
        attention = replace(self.grid, bits=self.attention_bits)
        quantized: dict[str, StoredWeight] = {}
        for name, linear in block.linears().items():
            grid = attention if name.startswith(f"{block.architecture.attention}.") else self.grid
            weight, full_name = linear.weight.data, f"{block.name}.{name}"
            if self.groups:
                quantized[name] = quantize_flat(weight, self.groups, grid, full_name)
            else:
                quantized[name] = quantize(weight, grid, full_name)
        return quantized
