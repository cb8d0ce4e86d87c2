"""Quantize a checkpoint one decoder block at a time: read, transform, quantize, pass the text on, write, forget.

Memory holds one block and the calibration text's hidden states, never the model. A finished block is a finished file:
a killed run starts again at the block where it died and ends with the same bits, because the text is first passed
through the blocks that are already done. The directory gets its final name last.
"""

import ctypes
import fcntl
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from corpora.errors import UserError
from corpora.machine import peak_memory_mb
from corpora.storage import checkpoint_fingerprint, identity, sha256_of_file, sha256_of_tensor, write_json
from intactkv.prefix import PLAIN_BASIS
from quantization.architecture import architecture_of
from quantization.blocks import CalibrationStream, DecoderBlock
from quantization.checkpoint import (
    COST,
    FORMAT,
    MANIFEST,
    DenseCheckpoint,
    block_file,
    copy_companions,
    empty_model,
    is_quantized,
    read_block,
    read_manifest,
    write_block,
    write_ends,
)
from quantization.recipe import Recipe, describe
from quantization.rescale import rescale_all
from quantization.stored import StoredWeight, restore

__all__ = ["artefact_identity", "quantize_checkpoint"]

log = logging.getLogger(__name__)


def artefact_identity(
    fingerprint: str, recipe: Recipe, segments: Tensor | None = None, prefix_ids: Tensor | None = None
) -> dict[str, Any]:
    """Everything that decides the bits of a quantized checkpoint (and nothing else: no KV policy, no prefix that only
    the run time uses)."""
    made_of: dict[str, Any] = {"format": FORMAT, "source": fingerprint, **recipe.weights_identity()}
    if recipe.calibrates:
        assert segments is not None
        made_of["segments"] = sha256_of_tensor(segments)
        if recipe.calibrate_behind_prefix:
            assert prefix_ids is not None
            made_of["prefix"] = prefix_ids.tolist()
    return made_of


def basis_of(fingerprint: str, recipe: Recipe, segments: Tensor | None, prefix_ids: Tensor | None) -> str:
    """Name of the basis that a recipe puts K and V in: `plain` if nothing rewrites the full-precision weights."""
    if recipe.weights is not None and recipe.weights.rescales:
        return identity(artefact_identity(fingerprint, recipe, segments, prefix_ids))
    if not recipe.transforms:
        return PLAIN_BASIS
    return identity(artefact_identity(fingerprint, recipe.twin, segments, prefix_ids))


def quantize_checkpoint(
    source: Path,
    recipe: Recipe,
    out: Path,
    *,
    segments: Tensor | None = None,
    prefix_ids: Tensor | None = None,
    device: str | torch.device = "cpu",
    fingerprint: str | None = None,
) -> Path:
    """Write the quantized form of a dense checkpoint to `out`; a finished or half-finished one is taken up.

    segments: (N, T) calibration ids, needed if the recipe calibrates. prefix_ids: (P,), needed if it calibrates behind
    the prefix. Returns `out`. Raises UserError if `out` holds something else, or the source is incomplete.
    """
    if is_quantized(source):
        raise UserError(f"{source} is quantized already ({read_manifest(source)['label']}); give a dense checkpoint")
    dense = DenseCheckpoint(source)
    fingerprint = fingerprint or checkpoint_fingerprint(source)
    if not recipe.changes_weights:
        raise UserError(
            "this recipe leaves the weights as they are, so there is nothing to write; name a weight "
            "quantizer, for example --recipe rtn"
        )
    if recipe.calibrates and segments is None:
        raise UserError("this recipe calibrates; give it calibration text")
    made_of = artefact_identity(fingerprint, recipe, segments, prefix_ids)
    manifest = {
        "format": FORMAT,
        "identity": identity(made_of),
        "label": recipe.label(),
        "made_of": made_of,
        "recipe": describe(recipe),
        "basis": basis_of(fingerprint, recipe, segments, prefix_ids),
        "source": {
            "name": Path(os.path.abspath(source)).name,
            "directory": os.path.relpath(source, out.parent),
            "fingerprint": fingerprint,
        },
        "needs_prefix": made_of.get("prefix"),
    }
    with _locked(out):
        if out.exists():
            _refuse_other(out, manifest)
            return out
        model = _empty_model_for(dense, recipe)
        partial = out.with_name(f"{out.name}.partial")
        if partial.exists() and _identity_of(partial) != manifest["identity"]:
            if not is_quantized(partial) and any(partial.iterdir()):
                raise UserError(
                    f"{partial} exists and is not a half-finished checkpoint of ours; the work would go there, so move "
                    "it away or choose another --out"
                )
            shutil.rmtree(partial)  # the leftover of another recipe: nothing in it can be used
        partial.mkdir(parents=True, exist_ok=True)
        for half_written in partial.glob(".*.partial"):  # a killed run's; no other process is at work here
            half_written.unlink()
        write_json(partial / MANIFEST, manifest)  # first: it marks the directory as ours
        copy_companions(source, partial)
        done = sum(block_file(partial, index).is_file() for index in range(model.config.num_hidden_layers))
        started = time.perf_counter()
        _work_off(dense, model, recipe, partial, segments, prefix_ids, torch.device(device))
        cost = {"seconds": time.perf_counter() - started, "blocks_found": done, "device": torch.device(device).type}
        cost["peak_memory_mb"] = peak_memory_mb(torch.device(device).type)
        sums = {file.name: sha256_of_file(file) for file in sorted(partial.glob("*.safetensors"))}
        write_json(partial / COST, cost | _sizes(partial, model) | {"sha256": sums})
        partial.rename(out)
    return out


def _empty_model_for(dense: DenseCheckpoint, recipe: Recipe) -> PreTrainedModel:
    """The model without weights, after everything that can be refused without reading them."""
    model = empty_model(dense.directory)
    architecture = architecture_of(model.config)
    dense.check(model)
    for index, module in enumerate(architecture.blocks_of(model)):
        block = DecoderBlock(index, module, architecture, model.config)
        if recipe.weights is not None:
            recipe.weights.check(block)
    return model


def _work_off(
    dense: DenseCheckpoint,
    model: PreTrainedModel,
    recipe: Recipe,
    partial: Path,
    segments: Tensor | None,
    prefix_ids: Tensor | None,
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
        _load_ends(model, dense, ends, device)
        behind = prefix_ids if recipe.calibrate_behind_prefix else None
        stream = CalibrationStream(model, architecture, segments, behind)
    method = recipe.label()
    for index in tqdm(range(count), desc=f"quantize {method}", unit="block"):
        block = DecoderBlock(index, blocks[index], architecture, model.config, stream)
        if stream is None and block_file(partial, index).is_file():
            continue
        started = time.perf_counter()
        dense.load_into(block.module, block.name, device)
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
    write_ends(partial, dense, ends)


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
    but its codes and rescalings are read back: choosing them is the expensive part.
    """
    stream, reads = block.stream, "quantized" if recipe.weights is None else recipe.weights.reads
    if stream is not None:
        stream.seed(block)
    for transform in recipe.transforms:
        transform.transform_block(block)
        if stream is not None:  # the keys and values may be in another basis now
            stream.seed(block)
    if stream is not None and reads != "quantized":
        stream.full = stream.full or list(stream.hidden)  # the same in front of the first block
        stream.targets = list(stream.outputs(block, stream.full))
    finished = block_file(partial, block.index).is_file()
    quantized: Mapping[str, StoredWeight] = {}
    if finished:
        stored = read_block(block_file(partial, block.index))
        rescale_all(block.module, stored.rescalings, block.head_size)
        block.rescalings.extend(stored.rescalings)
        quantized = {n.removeprefix(f"{block.name}."): restore(*parts) for n, parts in stored.linears.items()}
    elif recipe.weights is not None:
        quantized = recipe.weights.quantize_block(block)
    if stream is not None and block.rescalings:
        stream.seed(block)
    error = _relative_error(block.linears(), quantized)
    _set_weights(block.linears(), quantized)
    if stream is not None:
        stream.advance(block, stream.targets if reads == "full" else None)
        if reads != "quantized":
            stream.full, stream.targets = stream.targets, []
    if not finished:
        write_block(partial, block.index, block.name, block.module, quantized, block.rescalings, block.figures)
    return error


def _set_weights(linears: dict[str, nn.Linear], quantized: Mapping[str, StoredWeight]) -> None:
    for name, weight in quantized.items():
        linear = linears[name]
        linear.weight.data = weight.dequantize(linear.weight.dtype).to(linear.weight.device)


def _relative_error(linears: dict[str, nn.Linear], quantized: Mapping[str, StoredWeight]) -> float:
    """‖Ŵ − W‖ / ‖W‖ over all linears of a block."""
    error = sum(
        float((weight.dequantize() - linears[name].weight.float()).square().sum()) for name, weight in quantized.items()
    )
    norm = sum(float(linears[name].weight.float().square().sum()) for name in quantized)
    return (error / norm) ** 0.5 if norm else 0.0


def _load_ends(model: PreTrainedModel, dense: DenseCheckpoint, ends: list[str], device: torch.device) -> None:
    """Give the embeddings (and what else is outside the blocks) their weights, for the calibration text."""
    for name in ends:
        if dense.stored_name(name) is None:
            continue  # a tied head
        owner, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(owner), parameter, nn.Parameter(dense.tensor(name).to(device), False))


def _identity_of(directory: Path) -> str | None:
    """The identity that a directory claims; None if it has no readable manifest."""
    try:
        return read_manifest(directory)["identity"]
    except (UserError, OSError):  # OSError: a file stands where the directory should be
        return None


def _refuse_other(out: Path, manifest: dict[str, Any]) -> None:
    found = _identity_of(out)
    if found != manifest["identity"]:
        what = f"the quantized checkpoint {found}" if found else "something else"
        raise UserError(
            f"{out} already holds {what}, not {manifest['identity']} ({manifest['label']}); choose another "
            "--out or remove the directory"
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One process at a time works on a directory; a second waits and then finds the result."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f".{out.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
