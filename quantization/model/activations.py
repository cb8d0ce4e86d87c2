"""Activation quantization: how the inputs of a block's linears are rounded.

    dynamic   one grid per token, or per group of a token's channels, from its own range; a share of it may be cut off
    static    one grid per tensor, or per group of channels, from the range over the calibration text

RTN (W8A8), SmoothQuant, ZeroQuant, QuaRot and PrefixQuant differ in the grid's convention and in what comes before.
Linears that read the same tensor share a quantizer. The head's input is never quantized.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from corpora.errors import UserError
from quantization.grids.uniform import UniformGrid, split_groups
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import InputQuantizer, put_in_front
from quantization.model.routed import with_unseen

__all__ = ["Activations", "at_work", "input_ranges", "quantize_inputs"]


@dataclass(frozen=True)
class Activations:
    """The quantizer of all inputs of a block.

    grid: group_size −1 takes a whole token (dynamic) or tensor (static). static: fixed on calibration text.
    keep: share of a dynamic range, in (0, 1] (QuaRot 0.9; PrefixQuant learns from 0.95).
    """

    grid: UniformGrid
    static: bool = False
    keep: float = 1.0

    def __post_init__(self) -> None:
        if self.grid.clip_search:
            raise UserError("activations.grid.clip_search=true is for weights; set activations.keep instead")
        if not 0 < self.keep <= 1:
            raise UserError(f"activations.keep={self.keep:g} is not allowed; give a share in (0, 1], 1 cuts nothing")
        if self.static and self.keep != 1:
            raise UserError(
                f"activations.keep={self.keep:g} is for dynamic ranges; with activations.static=true leave it at 1"
            )

    @property
    def calibrates(self) -> bool:
        """Static ranges come from text."""
        return self.static

    @property
    def label(self) -> str:
        """`a8`, `a4static`, `a4g128`."""
        group = "" if self.grid.group_size == -1 else f"g{self.grid.group_size}"
        return f"a{self.grid.bits}{group}{'static' if self.static else ''}"

    def check(self, block: DecoderBlock) -> None:
        """Groups of channels must fill every input. Raises UserError, with the linear's name."""
        block.check_groups(self.grid.group_size, "--set activations.grid.group_size=")

    def fit_block(self, block: DecoderBlock) -> dict[tuple[str, ...], InputQuantizer]:
        """A quantizer for every set of linears that share an input; static ones see the calibration text pass through
        the block as it is now."""
        sets = block.architecture.linears
        if not self.static:
            return {names: InputQuantizer(self.grid, keep=self.keep) for names in sets}
        ranges = input_ranges(block)
        quantizers = {}
        for names in sets:
            low, high = (split_groups(x, self.grid.group_size) for x in ranges[names[0]])  # (groups, size)
            fitted = self.grid.rule.fit(low.amin(-1, keepdim=True), high.amax(-1, keepdim=True), self.grid.bits)
            quantizers[names] = InputQuantizer(self.grid, fitted)
        return quantizers


def input_ranges(block: DecoderBlock) -> dict[str, tuple[Tensor, Tensor]]:
    """Lowest and highest value of every input channel over the calibration text, (channels,) float32 each.

    By the first linear of every set that shares an input, and by router: what it reads is what all experts read.
    """
    wanted = {names[0] for names in block.architecture.linears} | {*block.architecture.routers}
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str, x: Tensor) -> None:
        if name in wanted:
            x = x.flatten(0, 1)
            low, high = x.amin(0).float(), x.amax(0).float()  # aminmax takes ten times as long on a CPU
            before = ranges.get(name, (low, high))
            ranges[name] = torch.minimum(before[0], low), torch.maximum(before[1], high)

    block.observe(look)
    return with_unseen(
        block,
        ranges,
        lambda others: (
            torch.stack([low for low, _ in others]).amin(0),
            torch.stack([high for _, high in others]).amax(0),
        ),
    )


def quantize_inputs(block: DecoderBlock, quantizers: Mapping[tuple[str, ...], InputQuantizer]) -> None:
    """Put the quantizers to work."""
    for names, quantizer in quantizers.items():
        put_in_front(block.module, names, quantizer=quantizer)


@contextmanager
def at_work(block: DecoderBlock, inputs: Mapping[tuple[str, ...], InputQuantizer]) -> Iterator[None]:
    """Let these quantizers of inputs round, for a while."""
    paths = [put_in_front(block.module, names, quantizer=quantizer) for names, quantizer in inputs.items()]
    try:
        yield
    finally:
        for path in paths:
            path.quantizer = None
