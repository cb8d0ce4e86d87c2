"""SmoothQuant (Xiao et al., ICML 2023, arXiv:2211.10438): move activation outliers into the weights.

    Y = (X diag(s)⁻¹) (diag(s) W),    s_j = max|X_j|^α / max|W_j|^(1 − α)      Eq. 3, 4

Eq. 4 is `smoothing_scale`; `Smooth` folds 1/s into the norm in front of each set of linears, s into their columns. What
rounds afterwards is plain RTN. Maxima are per channel, over the calibration text and over all rows of all consumers.

Departs from the reference: float32 arithmetic, so that the weights are rounded once; calibration text behind a prefix
never holds its pivot tokens (the reference's maxima are [BOS]'s in the outlier channels); an input that is always 0
counts as 1e-5, as a weight does; v → o and up → down (fc1 → fc2) on request, which the paper leaves alone; blocks in
front have rounded weights already.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corpora.errors import UserError
from intactkv.architecture import Feed
from quantization.model.activations import input_ranges
from quantization.model.blocks import DecoderBlock
from quantization.model.rescale import Rescaling
from quantization.transforms.base import BlockTransform

__all__ = ["Smooth", "input_maxima", "of_producer", "smoothing_scale"]

SMALLEST = 1e-5  # of a maximum or a scale; the reference's floor


def input_maxima(block: DecoderBlock) -> dict[str, Tensor]:
    """max|X_j| over the calibration text, (channels,) float32, by the first linear of every set that shares X, and by
    router."""
    return {name: torch.maximum(high, -low) for name, (low, high) in input_ranges(block).items()}


def smoothing_scale(block: DecoderBlock, feed: Feed, inputs: Mapping[str, Tensor], alpha: float) -> Tensor:
    """s of Eq. 4 for every channel that the feed's producer puts out: (channels,) float32, at least 1e-5.

    inputs: of `input_maxima`. Columns that one channel feeds (a KV head's, read by several query heads) share the
    largest of their maxima.
    """
    linears = block.linears()
    channels = block.module.get_parameter(f"{feed.producer}.weight").shape[0]
    columns = torch.stack([linears[name].weight.float().abs().amax(dim=0) for name in feed.consumers]).amax(dim=0)
    activation, weight = (of_producer(x, channels, block.head_size) for x in (inputs[feed.witness], columns))
    scale = activation.clamp_min(SMALLEST) ** alpha / weight.clamp_min(SMALLEST) ** (1 - alpha)
    return scale.clamp_min(SMALLEST)


def of_producer(values: Tensor, channels: int, head_size: int) -> Tensor:
    """The largest of the values per column that one channel of the producer, of `channels`, feeds: undoes
    `rescale.per_column`."""
    if values.numel() == channels:
        return values.clone()
    return values.view(channels // head_size, -1, head_size).amax(dim=1).flatten()


@dataclass(frozen=True)
class Smooth(BlockTransform):
    """Divide what norms put out by s, multiply the columns that read it by s.

    alpha: share of the range that moves into the weights. values, down: also smooth what the last linears
    of attention and of the feed-forward part read, by the rows of the linears in front of them. power_of_two: round s
    to one, which makes the transform exact in every floating-point format.
    """

    alpha: float = 0.5
    values: bool = False
    down: bool = False
    power_of_two: bool = False
    name: ClassVar[str] = "smooth"
    calibrates: ClassVar[bool] = True
    rescales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(
                f"transforms.smooth.alpha={self.alpha:g} is not allowed; give 0 (all ranges stay in the activations) "
                "to 1, published are 0.5 to 0.9"
            )

    @property
    def changes_kv(self) -> bool:
        """Keys and values stay as they are, unless v → o is smoothed."""
        return self.values

    def check(self, block: DecoderBlock) -> None:
        """Norms must stand in front of what they feed. Raises UserError."""
        if not self.rescaled_feeds(block):
            raise UserError(
                f"this {block.config.model_type} has no norm in front of its linears, so there is nothing to smooth; "
                "smooth what linears feed (--set transforms.smooth.values=true --set transforms.smooth.down=true), or "
                "use a recipe without smooth"
            )

    def transform_block(self, block: DecoderBlock) -> None:
        """Smooth every feed, the last first: those of linears' rows change the columns' maxima that the
        norms in front of them are weighed against."""
        inputs = input_maxima(block)
        for feed in reversed(self.rescaled_feeds(block)):
            scale = smoothing_scale(block, feed, inputs, self.alpha)
            if self.power_of_two:
                scale = torch.ldexp(torch.ones_like(scale), scale.log2().round())
            block.rescale(Rescaling(feed.producer, feed.readers, scale))

    def rescaled_feeds(self, block: DecoderBlock) -> list[Feed]:
        """norm → linears; linear → linear where the fields ask for it."""
        linears, attention = block.linears(), f"{block.architecture.attention}."

        def wanted(producer: str) -> bool:
            if producer not in linears:
                return True
            return self.values if producer.startswith(attention) else self.down

        return [feed for feed in block.feeds() if wanted(feed.producer)]
