"""What rounds in a block while PrefixQuant searches and trains its grids, and the error that it makes.

Ŵ = s · (clamp(round(W/s) + z, 0, top) − z)      inputs, keys and values by quantizers of their own
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from intactkv.policy import KVPolicy
from quantization.grids.straight_through import on_grid, straight
from quantization.grids.uniform import (
    Fit,
    QuantizedTensor,
    UniformGrid,
    encode,
    finite,
    fit_finite,
    merge_groups,
    split_groups,
)
from quantization.kv_cache import ClippedPerHead, StaticPerHead
from quantization.model.activations import at_work
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import InputQuantizer
from quantization.model.stream import CalibrationStream

__all__ = ["Quantizers", "at_work", "first_samples", "joint_error", "min_max", "output_error", "stream_of"]


@dataclass(frozen=True)
class Quantizers:
    """Everything in a block that rounds.

    fits: grids of the linears, (out, groups, 1), none if weights keep full precision. kv: the recipe's policy; the
    tensors of a calibrated one are in `block.kv`.
    """

    grid: UniformGrid | None
    fits: dict[str, Fit]
    inputs: Mapping[tuple[str, ...], InputQuantizer]
    kv: KVPolicy | None

    def rounded(self, name: str, weight: Tensor) -> Tensor:
        """Ŵ of a linear, float32, with gradients for the weight, its scales and its zero points."""
        assert self.grid is not None
        groups = split_groups(weight.float(), self.grid.group_size)
        return merge_groups(on_grid(groups, self._fit(name), self.grid))

    def stored(self, name: str, weight: Tensor) -> QuantizedTensor:
        """The same in its stored form: `dequantize` gives the same bits."""
        assert self.grid is not None
        fitted = self._fit(name)
        codes = merge_groups(encode(split_groups(weight.float(), self.grid.group_size), fitted, self.grid))
        return QuantizedTensor(codes.to(torch.uint8), fitted.scale[..., 0], fitted.zero_point[..., 0], self.grid)

    def _fit(self, name: str) -> Fit:
        assert self.grid is not None
        scale, zero_point = self.fits[name]
        return Fit(scale, straight(zero_point.round().clamp(0, self.grid.top), zero_point))

    def learned(self, block: DecoderBlock) -> tuple[list[Tensor], list[Tensor]]:
        """Scales and shares of ranges, which must stay positive, and zero points."""
        free = self.grid is not None and self.grid.rule.zero_point == "code"
        positive = [fitted.scale for fitted in self.fits.values()]
        others = [fitted.zero_point for fitted in self.fits.values() if free]
        for quantizer in self.inputs.values():
            positive += quantizer.learned[:1] if quantizer.static else quantizer.learned
            others += quantizer.learned[1:] if quantizer.static else []
        if isinstance(self.kv, StaticPerHead | ClippedPerHead):
            for name, tensor in self.kv.learned(block.kv).items():
                (others if name.endswith("zero_point") else positive).append(tensor)
        return positive, others


def stream_of(block: DecoderBlock) -> CalibrationStream:
    assert block.stream is not None, "prefixquant calibrates, but no calibration text was given"
    return block.stream


def first_samples(block: DecoderBlock, count: int) -> DecoderBlock:
    """The same block with only the first samples of its text."""
    stream = copy(stream_of(block))
    stream.hidden = stream.hidden[:count]
    return replace(block, stream=stream)


def min_max(block: DecoderBlock, grid: UniformGrid) -> dict[str, Fit]:
    fits = {}
    for name, linear in block.linears().items():
        weight = finite(linear.weight.data, f"{block.name}.{name}").float()
        fits[name] = fit_finite(split_groups(weight, grid.group_size), grid, f"{block.name}.{name}")
    return fits


def output_error(
    block: DecoderBlock,
    targets: Sequence[Tensor],
    policy: KVPolicy | None = None,
    weights: dict[str, Tensor] | None = None,
) -> float:
    """Mean squared distance of the block's output from its targets, over all samples, as it is now.

    policy: of new keys and values. weights: stand in for the block's own parameters.
    """
    stream, errors = stream_of(block), []
    with torch.no_grad():
        for hidden, target in zip(stream.hidden, targets, strict=True):
            output = stream.forward(block, hidden, weights, stream.new_cache(block, policy))
            errors.append((output.float() - target.float()).square().mean())
    return float(torch.stack(errors).mean())


def joint_error(block: DecoderBlock, quantizers: Quantizers, targets: Sequence[Tensor]) -> float:
    """`output_error` with all quantizers at work."""
    rounded = {
        f"{name}.weight": quantizers.rounded(name, linear.weight.data).to(linear.weight.dtype)
        for name, linear in block.linears().items()
        if name in quantizers.fits
    }
    with at_work(block, quantizers.inputs):
        return output_error(block, targets, quantizers.kv, rounded)
