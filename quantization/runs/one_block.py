"""One decoder block on its way through a recipe: transformed, quantized, written, and the text passed on."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from corpora.errors import UserError
from quantization.grids.stored import StoredWeight, restore
from quantization.model.activations import quantize_inputs
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import InputQuantizer, restore_paths
from quantization.model.rescale import Rescaling, rescale_all
from quantization.model.rounding import BlockRounding
from quantization.model.routed import report_experts
from quantization.model.stages import stage
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import StoredBlock, block_file, read_block, write_block
from quantization.runs.sums import add_sum

__all__ = ["process_block"]


def process_block(block: DecoderBlock, recipe: Recipe, partial: Path) -> tuple[float, Callable[[], None]]:
    """Transform and quantize one block, and pass the text on. Returns the relative weight error, and what writes the
    block.

    A block that an earlier run finished is transformed again (the prefix needs the transformed full-precision block),
    but its codes, rescalings and ranges are read back: choosing them is the expensive part.
    """
    stream, tuning = block.stream, recipe.tuning
    passes_rounded = tuning is not None or recipe.trains_rounded
    method = tuning or recipe.weights
    reads = "quantized" if method is None else method.reads
    finished = block_file(partial, block.index).is_file()
    stored = read_block(block_file(partial, block.index)) if finished else None
    for transform in recipe.transforms:
        if stored is not None and transform.rescales:
            continue  # what it found is in the file
        if stream is not None and transform.calibrates:
            stream.seed(block)
        transform.transform_block(block)
    if stored is not None:
        _rescale_as(block, stored.rescalings[: stored.by_transforms])
    by_transforms = len(block.rescalings)
    if stream is not None:
        stream.seed(block)
        if reads != "quantized":
            stream.full = stream.full or stream.hidden  # the same in front of the first block
            stream.targets = stream.passed(block, stream.full)
    inputs: Mapping[tuple[str, ...], InputQuantizer] = {}
    quantized: Mapping[str, StoredWeight] = {}
    if stored is not None:
        _rescale_as(block, stored.rescalings[by_transforms:])
    elif tuning is None and recipe.weights is not None:
        quantized = recipe.weights.quantize_block(_with_rounding(block, recipe))
    if stored is None:
        report_experts(block)
    if stream is not None and len(block.rescalings) > by_transforms:  # keys and values may be in another basis now
        stream.seed(block)
    if stored is not None:  # behind the last `seed`, which rounds nothing
        quantized = _read_back(block, stored, passes_rounded)
    else:  # ranges are those of the full-precision block, rescaled as its weights were
        if recipe.activations is not None:
            inputs = recipe.activations.fit_block(block)
        if recipe.kv_cache is not None and recipe.kv_calibrates:
            block.kv.update(recipe.kv_cache.fit_block(block))
        if tuning is not None:
            quantized = tuning.tune_block(block, recipe.weights, inputs, recipe.kv_cache)
    with stage("error"):
        error = _relative_error(block, quantized)
    _set_weights(block.linears(), quantized)
    # Without training, text is passed on in full precision but for the weights, as GPTQ's own code does with QuaRot.
    if passes_rounded:
        quantize_inputs(block, inputs)
    if stream is not None:
        policy = recipe.kv_cache if passes_rounded else None
        products = recipe.attention if recipe.trains_rounded else None
        following = stream.targets if reads == "full" else None
        if stream.walk is not None and stream.walk.led_to(quantized) and not passes_rounded:
            following = stream.walk.outputs()
        with nullcontext() if products is None else products.at_work(block):
            stream.advance(block, following, policy)
        if reads != "quantized":
            stream.full, stream.targets = stream.targets, ()
    if stored is None:
        quantize_inputs(block, inputs)

    def write() -> None:
        if stored is None:
            with stage("write"):
                write_block(partial, block, quantized, by_transforms)
                add_sum(block_file(partial, block.index))

    return error, write


def _with_rounding(block: DecoderBlock, recipe: Recipe) -> DecoderBlock:
    """The block with what a quantizer of weights may train with at work; a KV policy with ranges comes only later."""
    if not recipe.trains_rounded or recipe.activations is None:
        return block
    rounding = BlockRounding(recipe.activations.fit_block(block), recipe.attention, recipe.kv_cache)
    return replace(block, rounding=rounding)


def _rescale_as(block: DecoderBlock, steps: Sequence[Rescaling]) -> None:
    """Rescale a block as an earlier run did."""
    rescale_all(block.module, steps, block.head_size)
    block.rescalings.extend(steps)


def _read_back(block: DecoderBlock, stored: StoredBlock, inputs: bool) -> dict[str, StoredWeight]:
    """Put what a finished block's file holds into the block; returns its quantized linears.

    inputs: also the quantizers in front of the linears.
    """
    block.kv.update(stored.kv)
    device = next(block.module.parameters()).device
    own = {name: tensor.to(device) for name, tensor in stored.within(block.name).items()}
    if inputs:
        restore_paths(block.module, stored.paths, own)
    parameters = dict(block.module.named_parameters())
    for name, tensor in own.items():
        if name in parameters:  # norms and biases, which training may have moved; ranges are no parameters
            parameters[name].data = tensor.to(parameters[name])
    return {n.removeprefix(f"{block.name}."): restore(*parts) for n, parts in stored.linears.items()}


def _set_weights(linears: dict[str, nn.Linear], quantized: Mapping[str, StoredWeight]) -> None:
    for name, weight in quantized.items():
        linear = linears[name]
        linear.weight.data = weight.dequantize(linear.weight.dtype).to(linear.weight.device)


def _relative_error(block: DecoderBlock, quantized: Mapping[str, StoredWeight]) -> float:
    """‖Ŵ − W‖ / ‖W‖ over all linears of a block. Raises UserError for a linear that became nothing but zeros."""
    linears, squares = block.linears(), []
    for name, weight in quantized.items():
        exact, rounded = linears[name].weight.float(), weight.dequantize()
        largest = [torch.linalg.vector_norm(x, torch.inf) for x in (exact, rounded)]
        squares.append(torch.stack([*largest, exact.square().sum(), (rounded - exact).square().sum()]))
    if not squares:
        return 0.0
    sums = torch.stack(squares).double().cpu()  # waits for the device once
    for name, (largest, of_rounded, *_) in zip(quantized, sums.tolist(), strict=True):
        if largest and not of_rounded:
            raise UserError(
                f"{block.name}.{name}: all of its weights become 0: the smallest scale of the grid is too large for "
                f"values up to {largest:.1e}; use --set weights.grid.convention=gptq-asym with "
                "weights.grid.scale_dtype=float32"
            )
    norm, error = sums[:, 2:].sum(0).tolist()
    return (error / norm) ** 0.5 if norm else 0.0
