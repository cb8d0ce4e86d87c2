"""What most weight quantizers have in common: no files, no rescaling, groups that must fit the channels."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from intactkv.architecture import Feed
from quantization.grids.stored import Grid
from quantization.model.blocks import DecoderBlock

__all__ = ["GridQuantizer", "cut_label"]


def cut_label(grid: Grid) -> str:
    """How a grid cuts a matrix: `row`, `g128`."""
    return "row" if grid.group_size == -1 else f"g{grid.group_size}"


class GridQuantizer:
    """Defaults of `quantization.recipes.protocols.WeightQuantizer` for a method with a `grid`."""

    name: ClassVar[str]
    grid: Grid
    reads: ClassVar[Literal["quantized", "full", "both"]] = "quantized"
    calibrates: ClassVar[bool] = True
    rescales: ClassVar[bool] = False
    sees_rounding: ClassVar[bool] = False
    keeps: ClassVar[int] = 0  # copies of the calibration text, beside those in front of a block and behind it

    @property
    def label(self) -> str:
        """`gptq-w3g128`."""
        return f"{self.name}-w{self.grid.bits}{cut_label(self.grid)}"

    @property
    def files(self) -> tuple[Path, ...]:
        """No files."""
        return ()

    def check(self, block: DecoderBlock) -> None:
        """Groups of channels must fill every row. Raises UserError, with the linear's name."""
        block.check_groups(self.grid.group_size)

    def rescaled_feeds(self, block: DecoderBlock) -> Sequence[Feed]:
        """None."""
        return ()
