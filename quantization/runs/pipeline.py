"""Quantize a checkpoint one decoder block at a time: read, transform, quantize, pass the text on, write, forget.

Memory holds one block and the calibration text's hidden states, never the model. A finished block is a finished file:
a killed run starts again at the block where it died and ends with the same bits, because the text is first passed
through the blocks that are already done. The directory gets its final name last.
"""

import ctypes
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from corpora.errors import UserError
from corpora.files import sha256_of_file
from corpora.json_files import read_json, write_json
from corpora.machine import peak_memory_mb
from corpora.storage import checkpoint_fingerprint
from corpora.writing import locked, sweep
from intactkv.architecture import architecture_of
from intactkv.cache import KVPolicy
from intactkv.prefix import Prefix
from quantization.grids.stored import StoredWeight, restore
from quantization.model.activations import quantize_inputs
from quantization.model.blocks import CalibrationStream, DecoderBlock
from quantization.model.inputs import InputQuantizer, restore_paths
from quantization.model.rescale import Rescaling, rescale_all
from quantization.model.rounding import BlockRounding
from quantization.recipes.protocols import CalibratedKV
from quantization.recipes.recipe import Recipe, describe
from quantization.runs.checkpoint import (
    CHECKSUMS,
    FORMAT,
    MANIFEST,
    StoredBlock,
    block_file,
    copy_companions,
    is_quantized,
    read_block,
    read_manifest,
    write_block,
    write_ends,
)
from quantization.runs.dense import DenseCheckpoint, Weights, empty_model
from quantization.runs.identities import Artefact, by_tokens, identity_of_prefix

__all__ = ["check_makes_something", "check_recipe", "identity_at", "partial_of", "quantize_checkpoint"]

log = logging.getLogger(__name__)


def check_makes_something(source: Path, recipe: Recipe) -> None:
    """Raise UserError for a source that is quantized already, or a recipe that leaves it as it is."""
    if is_quantized(source):
        raise UserError(f"{source} is quantized already ({read_manifest(source)['label']}); give a dense checkpoint")
    dense = DenseCheckpoint(source)
    dense.refuse_layout()
    if dense.exported is not None:
        raise UserError(
            f"{source} is an export of ours: its numbers are those of quantized weights already; give the dense "
            "checkpoint that these were made from"
        )
    if not recipe.makes_checkpoint:
        raise UserError(
            "this recipe leaves the model as it is, so there is nothing to write; name one that quantizes weights or "
            "activations, for example --recipe rtn"
        )


def quantize_checkpoint(
    source: Path,
    recipe: Recipe,
    out: Path,
    *,
    segments: Tensor | None = None,
    behind: Tensor | Prefix | None = None,
    artefact: Artefact | None = None,
    device: str | torch.device = "cpu",
    fingerprint: str | None = None,
) -> Path:
    """Write the quantized form of a dense checkpoint to `out`; a finished or half-finished one is taken up.

    segments: (N, T) calibration ids, needed if the recipe calibrates. behind: (P,) ids, needed if it calibrates behind
    the prefix; or a trained prefix, in the basis that the recipe makes. artefact: what a plan calls the result; by
    default it is identified by its tokens. Returns `out`.
    Raises UserError if `out` holds something else, or the source is incomplete.
    """
    check_makes_something(source, recipe)
    dense = DenseCheckpoint(source)
    fingerprint = fingerprint or checkpoint_fingerprint(source)
    if recipe.calibrates and segments is None:
        raise UserError("this recipe calibrates; give it calibration text")
    if isinstance(behind, Prefix) and recipe.rescales and recipe.changes_kv:
        raise UserError(
            f"{recipe.label()} rescales keys and values while it calibrates, which a trained prefix cannot follow; "
            "calibrate behind tokens (--prefix bos or auto), and train it afterwards (python -m intactkv calibrate)"
        )
    behind = behind if recipe.calibrate_behind_prefix else None
    artefact = artefact or by_tokens(fingerprint, recipe, segments, behind)
    needed = {} if behind is None else identity_of_prefix(behind)
    manifest = {
        "format": FORMAT,
        "identity": artefact.identity,
        "label": recipe.label(),
        "made_of": artefact.made_of,
        "recipe": describe(recipe),
        "basis": artefact.basis,
        "source": {
            "name": Path(os.path.abspath(source)).name,
            "directory": os.path.relpath(source, out.parent),
            "fingerprint": fingerprint,
        },
        "needs_prefix": needed.get("prefix"),
        "needs_kv": needed.get("prefix_kv"),
    }
    with locked(out):
        if out.exists():
            _refuse_other(out, manifest)
            return out
        model = _empty_model_for(source, recipe)
        weights = dense.weights(model)
        partial = partial_of(out)
        if partial.exists() and identity_at(partial) != manifest["identity"]:
            sweep(partial)
            if not is_quantized(partial) and any(partial.iterdir()):
                raise UserError(
                    f"{partial} exists and is not a half-finished checkpoint of ours; the work would go there, so move "
                    "it away or choose another --out"
                )
            shutil.rmtree(partial)  # the leftover of another recipe: nothing in it can be used
        partial.mkdir(parents=True, exist_ok=True)
        sweep(partial)
        for left in partial.glob(".*.partial"):  # a killed run's of before; no other process is at work here
            left.unlink()
        write_json(partial / MANIFEST, manifest)  # first: it marks the directory as ours
        copy_companions(source, partial)
        if any(transform.unties for transform in recipe.transforms):
            config = read_json(partial / "config.json", "configuration")
            write_json(partial / "config.json", config | {"tie_word_embeddings": False})
        done = sum(block_file(partial, index).is_file() for index in range(model.config.num_hidden_layers))
        started = time.perf_counter()
        _work_off(weights, model, recipe, partial, segments, behind, torch.device(device))
        cost = {"seconds": time.perf_counter() - started, "blocks_found": done, "device": torch.device(device).type}
        cost["peak_memory_mb"] = peak_memory_mb(torch.device(device).type)
        sums = {file.name: sha256_of_file(file) for file in sorted(partial.glob("*.safetensors"))}
        write_json(partial / CHECKSUMS, cost | _sizes(partial, model) | {"sha256": sums})
        partial.rename(out)
    return out


def _empty_model_for(source: Path, recipe: Recipe) -> PreTrainedModel:
    """The model without weights, after everything that the recipe refuses without reading them."""
    model = empty_model(source)
    check_recipe(model, recipe)
    return model


def check_recipe(model: PreTrainedModel, recipe: Recipe) -> None:
    """Raise UserError for a recipe that a model's blocks, which need no weights, cannot take."""
    architecture = architecture_of(model.config)
    for index, module in enumerate(architecture.blocks_of(model)):
        block = DecoderBlock(index, module, architecture, model.config)
        rotated = {name for step in recipe.transforms for name in step.rotated_inputs(block)}
        for part in (*recipe.transforms, recipe.weights):
            if part is not None:
                part.check(block)
                for feed in part.rescaled_feeds(block):  # parts that rescale stand behind those that rotate
                    block.check_scales(feed.producer, [name for name in feed.consumers if name in rotated])
        if recipe.activations is not None:
            recipe.activations.check(block)


def _work_off(
    weights: Weights,
    model: PreTrainedModel,
    recipe: Recipe,
    partial: Path,
    segments: Tensor | None,
    behind: Tensor | Prefix | None,
    device: torch.device,
) -> None:
    """Process every block that has no file yet, then the ends. model: without weights."""
    architecture = architecture_of(model.config)
    blocks = architecture.blocks_of(model)
    count = len(blocks)
    ends = [name for name in model.state_dict() if not name.startswith(f"{architecture.blocks}.")]
    stream = None
    if recipe.calibrates:
        assert segments is not None
        for name, tensor in _ends(weights, ends, recipe, model).items():
            owner, _, parameter = name.rpartition(".")
            setattr(model.get_submodule(owner), parameter, nn.Parameter(tensor.to(device), False))
        stream = CalibrationStream(model, architecture, segments, behind)
    method = recipe.label()
    for index in tqdm(range(count), desc=f"quantize {method}", unit="block"):
        block = DecoderBlock(index, blocks[index], architecture, model.config, stream)
        if stream is None and block_file(partial, index).is_file():
            continue
        started = time.perf_counter()
        weights.load_into(block.module, block.name, device)
        error = _process_block(block, recipe, partial)
        log.info(
            "block %2d/%d  %s  weight error %.2e of the weights' norm  %.1f s",
            index + 1,
            count,
            method,
            error,
            time.perf_counter() - started,
        )
        block.module.to_empty(device="meta")
        _return_memory()
    write_ends(partial, _ends(weights, ends, recipe, model))


def _ends(weights: Weights, names: list[str], recipe: Recipe, model: PreTrainedModel) -> dict[str, Tensor]:
    """Embeddings, final norm and head, transformed; without a head that is tied."""
    ends = {name: weights.tensor(name) for name in names if name in weights.names}
    for transform in recipe.transforms:
        ends = transform.transform_ends(ends, model.config)
    return ends


def _sizes(directory: Path, model: PreTrainedModel) -> dict[str, Any]:
    """Bits per quantized weight, from the bytes in the files, and what the quantizer reported, summed over blocks."""
    weights, size, figures = 0, 0, Counter[str]()
    for index in range(model.config.num_hidden_layers):
        block = read_block(block_file(directory, index))
        for name, (_, parts, _) in block.linears.items():
            weights += model.get_parameter(f"{name}.weight").numel()
            size += sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
        figures.update(block.figures)
    return {"bits_per_weight": 8 * size / weights if weights else None, "figures": dict(figures)}


def _return_memory() -> None:
    """Hand freed pages back to the system. glibc keeps buffers of a few MB on its heap, where every block leaves holes:
    without this, memory grows by about one block per block."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _process_block(block: DecoderBlock, recipe: Recipe, partial: Path) -> float:
    """Transform, quantize and write one block, and pass the text on. Returns the relative weight error.

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
            stream.full = stream.full or list(stream.hidden)  # the same in front of the first block
            stream.targets = list(stream.outputs(block, stream.full))
    inputs: Mapping[tuple[str, ...], InputQuantizer] = {}
    quantized: Mapping[str, StoredWeight] = {}
    if stored is not None:
        _rescale_as(block, stored.rescalings[by_transforms:])
    elif tuning is None and recipe.weights is not None:
        quantized = recipe.weights.quantize_block(_with_rounding(block, recipe))
    if stream is not None and len(block.rescalings) > by_transforms:  # keys and values may be in another basis now
        stream.seed(block)
    if stored is not None:  # behind the last `seed`, which rounds nothing
        quantized = _read_back(block, stored, passes_rounded)
    else:  # ranges are those of the full-precision block, rescaled as its weights were
        if recipe.activations is not None:
            inputs = recipe.activations.fit_block(block)
        if isinstance(recipe.kv_cache, CalibratedKV):
            block.kv.update(recipe.kv_cache.fit_block(block))
        if tuning is not None:
            quantized = tuning.tune_block(block, recipe.weights, inputs, recipe.kv_cache)
    error = _relative_error(block, quantized)
    _set_weights(block.linears(), quantized)
    # Without training, text is passed on in full precision but for the weights, as GPTQ's own code does with QuaRot.
    if passes_rounded:
        quantize_inputs(block, inputs)
    if stream is not None:
        policy = _policy_of(block, recipe) if passes_rounded else None
        products = recipe.attention if recipe.trains_rounded else None
        with nullcontext() if products is None else products.at_work(block):
            stream.advance(block, stream.targets if reads == "full" else None, policy)
        if reads != "quantized":
            stream.full, stream.targets = stream.targets, []
    if stored is None:
        quantize_inputs(block, inputs)
        write_block(partial, block, quantized, by_transforms)
    return error


def _policy_of(block: DecoderBlock, recipe: Recipe) -> KVPolicy | None:
    """What a trained block's text meets in the cache."""
    kv = recipe.kv_cache
    return kv.of_block(block.kv) if isinstance(kv, CalibratedKV) else kv


def _with_rounding(block: DecoderBlock, recipe: Recipe) -> DecoderBlock:
    """The block with what a quantizer of weights may train with at work; a KV policy with ranges comes only later."""
    if not recipe.trains_rounded or recipe.activations is None:
        return block
    kv = None if isinstance(recipe.kv_cache, CalibratedKV) else recipe.kv_cache
    return replace(block, rounding=BlockRounding(recipe.activations.fit_block(block), recipe.attention, kv))


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
    linears, error, norm = block.linears(), 0.0, 0.0
    for name, weight in quantized.items():
        exact, rounded = linears[name].weight.float(), weight.dequantize()
        if bool(exact.any()) and not bool(rounded.any()):
            raise UserError(
                f"{block.name}.{name}: all of its weights become 0: the smallest scale of the grid is too large for "
                f"values up to {float(exact.abs().max()):.1e}; use --set weights.grid.convention=gptq-asym with "
                "weights.grid.scale_dtype=float32"
            )
        error += float((rounded - exact).square().sum())
        norm += float(exact.square().sum())
    return (error / norm) ** 0.5 if norm else 0.0


def partial_of(out: Path) -> Path:
    """Where a checkpoint lies until it is finished."""
    return out.with_name(f"{out.name}.partial")


def identity_at(directory: Path) -> str | None:
    """The identity that a directory claims; None if it has no readable manifest."""
    try:
        return read_manifest(directory)["identity"]
    except (UserError, OSError):  # OSError: a file stands where the directory should be
        return None


def _refuse_other(out: Path, manifest: dict[str, Any]) -> None:
    found = identity_at(out)
    if found != manifest["identity"]:
        what = f"the quantized checkpoint {found}" if found else "something else"
        raise UserError(
            f"{out} already holds {what}, not {manifest['identity']} ({manifest['label']}); choose another "
            "--out or remove the directory"
        )
