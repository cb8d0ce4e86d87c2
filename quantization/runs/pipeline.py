"""Quantize a checkpoint one decoder block at a time: read, transform, quantize, pass the text on, write, forget.

Memory holds one block and the calibration text's hidden states, never the model. A finished block is a finished file:
a killed run starts again at the block where it died and ends with the same bits, because the text is first passed
through the blocks that are already done. The directory gets its final name last.
"""

import ctypes
import functools
import logging
import operator
import os
import re
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from corpora.errors import UserError
from corpora.json_files import write_json
from corpora.machine import device_name, peak_memory_mb
from corpora.storage import checkpoint_fingerprint
from corpora.writing import drop_dead_lock, locked, sweep
from intactkv.architecture import architecture_of
from intactkv.prefix import Prefix
from quantization.model.blocks import DecoderBlock
from quantization.model.stages import stages_are_counted
from quantization.model.stream import CalibrationStream
from quantization.model.text import said_when_full
from quantization.recipes.recipe import Recipe, describe
from quantization.runs.background import Background
from quantization.runs.checkpoint import (
    FORMAT,
    MANIFEST,
    block_file,
    copy_companions,
    is_quantized,
    model_name,
    read_block,
    read_manifest,
    write_ends,
)
from quantization.runs.configuration import CONFIG, GENERATION, config_of
from quantization.runs.dense import DenseCheckpoint, Weights, empty_model
from quantization.runs.identities import Artefact, by_tokens, identity_of_prefix
from quantization.runs.one_block import process_block
from quantization.runs.sums import CHECKSUMS, drop_changed, write_sums

__all__ = [
    "check_makes_something",
    "check_recipe",
    "identity_at",
    "partial_of",
    "quantize_checkpoint",
    "return_memory",
]

log = logging.getLogger(__name__)


def check_makes_something(source: Path, recipe: Recipe) -> None:
    """Raise UserError for a source that is quantized already, or a recipe that leaves it as it is."""
    if is_quantized(source):
        raise UserError(f"{source} is quantized already ({read_manifest(source)['label']}); give a dense checkpoint")
    if DenseCheckpoint(source).exported is not None:
        raise UserError(
            f"{source} is an export of ours: its numbers are those of quantized weights already; give the dense "
            "checkpoint that these were made from"
        )
    if not recipe.makes_checkpoint:
        raise UserError(
            "this recipe leaves the model as it is, so there is nothing to write; name one that quantizes weights or "
            "activations, for example --recipe rtn (python -m quantization kv calibrates a KV cache)"
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
    whole, recipe = recipe, recipe.checkpoint_part
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
        "recipe": describe(whole),
        "basis": artefact.basis,
        "source": {
            "name": model_name(source),
            "directory": os.path.relpath(source, out.parent),
            "fingerprint": fingerprint,
        },
        "needs_prefix": needed.get("prefix"),
        "needs_kv": needed.get("prefix_kv"),
    }
    if out.exists():  # finished ones need no right to write
        drop_dead_lock(out)
        _refuse_other(out, manifest)
        return out
    model = _empty_model_for(source, recipe)
    weights = dense.weights(model)
    if identity_at(partial_of(out)) != artefact.identity:  # a run that goes on has looked, and reads what is left
        weights.check()
    with locked(out):
        if out.exists():
            _refuse_other(out, manifest)
            return out
        partial = partial_of(out)
        _clear(partial, manifest["identity"])
        write_json(partial / MANIFEST, manifest)  # first: it marks the directory as ours
        copy_companions(source, partial)
        if any(transform.unties for transform in recipe.transforms):
            write_json(partial / CONFIG, config_of(partial) | {"tie_word_embeddings": False})
        blocks = [block_file(partial, index) for index in range(model.config.num_hidden_layers)]
        drop_changed(partial, blocks)
        done = sum(block.is_file() for block in blocks)
        started = time.perf_counter()
        try:
            batch = _work_off(weights, model, recipe, partial, segments, behind, torch.device(device))
        except UserError:
            if not any(block.is_file() for block in blocks):  # there is nothing to go on with
                shutil.rmtree(partial)
            raise
        kind = torch.device(device).type
        cost: dict[str, Any] = {"seconds": time.perf_counter() - started, "blocks_found": done, "device": kind}
        cost |= {"device_name": device_name(str(device)), "calibration_batch": batch}
        cost["peak_memory_mb"] = peak_memory_mb(kind)
        # How a model chats and samples may be edited, and is part of what is made with it.
        left_out = (CHECKSUMS, GENERATION, "chat_template.jinja")
        files = [file for file in partial.iterdir() if not file.name.startswith(".") and file.name not in left_out]
        write_sums(partial, sorted(files), cost | _sizes(partial, model))
        partial.rename(out)
    return out


def _clear(partial: Path, identity: str) -> None:
    """Make the directory of a half-finished checkpoint, or take out of it what a run of this identity has no use for.

    Raises UserError if it holds what no run of ours left.
    """
    partial.mkdir(parents=True, exist_ok=True)
    sweep(partial)
    for left in partial.glob(".*.partial"):  # a killed run's of before; no other process is at work here
        if re.fullmatch(r"\..+\.\d+\.partial", left.name) and not left.is_dir():
            left.unlink()
    if identity_at(partial) == identity:
        return
    if not is_quantized(partial) and any(partial.iterdir()):
        raise UserError(
            f"{partial} exists and is not a half-finished checkpoint of ours; the work would go there, so move "
            "it away or choose another --out"
        )
    if is_quantized(partial):
        log.warning("%s is of another run, or of an earlier version, and is begun anew", partial)
    shutil.rmtree(partial)  # the leftover of another recipe: nothing in it can be used
    partial.mkdir()


def _empty_model_for(source: Path, recipe: Recipe) -> PreTrainedModel:
    """The model without weights, after everything that the recipe refuses without reading them."""
    model = empty_model(source)
    check_recipe(model, recipe)
    return model


def check_recipe(model: PreTrainedModel, recipe: Recipe, only: Collection[int] | None = None) -> None:
    """Raise UserError for a recipe that a model's blocks, which need no weights, cannot take. only: blocks to look at,
    where the others are like them; None for all."""
    architecture = architecture_of(model.config)
    for index, module in enumerate(architecture.blocks_of(model)):
        if only is not None and index not in only:
            continue
        block = DecoderBlock(index, module, architecture, model.config)
        rotated = {name for step in recipe.transforms for name in step.rotated_inputs(block)}
        for part in (*recipe.transforms, recipe.weights):
            if part is not None:
                part.check(block)
                for feed in part.rescaled_feeds(block):  # parts that rescale stand behind those that rotate
                    block.check_scales(feed.producer, [name for name in feed.consumers if name in rotated])
        if recipe.activations is not None:
            recipe.activations.check(block)
    if recipe.attention is not None:
        recipe.attention.check(type(model))
    if recipe.tuning is not None:
        recipe.tuning.check_model(type(model), recipe.kv_cache)


def _work_off(
    weights: Weights,
    model: PreTrainedModel,
    recipe: Recipe,
    partial: Path,
    segments: Tensor | None,
    behind: Tensor | Prefix | None,
    device: torch.device,
) -> int | None:
    """Process every block that has no file yet, then the ends. model: without weights.

    Returns how many calibration samples went through a block at once, None if nothing calibrates.
    """
    architecture = architecture_of(model.config)
    blocks = architecture.blocks_of(model)
    count = len(blocks)
    ends = [name for name in model.state_dict() if not name.startswith(f"{architecture.blocks}.")]
    stream = None
    if recipe.calibrates:
        assert segments is not None
        front = {n: x for n, x in _ends(weights, ends, recipe, model).items() if n != f"{architecture.head}.weight"}
        with said_when_full(device):
            _place(model, front, device)
            stream = CalibrationStream(model, architecture, segments, behind)
            _place(model, front, torch.device("meta"))  # the text is past them
        del front
    method = recipe.label()
    batch = stream.batch if stream is not None else None
    todo = [i for i in range(count) if stream is not None or not block_file(partial, i).is_file()]
    loaded = weights.load_each([(blocks[i], architecture.block_name(i)) for i in todo], device)
    with Background(device, on=device.type == "cuda" and not stages_are_counted()) as writing:
        for index in tqdm(todo, desc=f"quantize {method}", unit="block", initial=count - len(todo), total=count):
            block = DecoderBlock(index, blocks[index], architecture, model.config, stream)
            started = time.perf_counter()
            with said_when_full(device, batch):
                next(loaded)
                error, write = process_block(block, recipe, partial)
                writing.do(functools.partial(_finish, block, write))
            log.info(
                "block %2d/%d  %s  weight error %.2e of the weights' norm  %.1f s",
                index + 1,
                count,
                method,
                error,
                time.perf_counter() - started,
            )
            del block, write
    write_ends(partial, _ends(weights, ends, recipe, model))
    return batch


def _place(model: PreTrainedModel, tensors: dict[str, Tensor], device: torch.device) -> None:
    for name, tensor in tensors.items():
        owner, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(owner), parameter, nn.Parameter(tensor.to(device), False))


def _finish(block: DecoderBlock, write: Callable[[], None]) -> None:
    """Write a block and forget it."""
    write()
    block.module.to_empty(device="meta")
    return_memory()


def _ends(weights: Weights, names: list[str], recipe: Recipe, model: PreTrainedModel) -> dict[str, Tensor]:
    """Embeddings, final norm and head, transformed; without a head that is tied."""
    ends = {name: weights.tensor(name) for name in names if name in weights.names}
    for transform in recipe.transforms:
        ends = transform.transform_ends(ends, model.config)
    return ends


def _sizes(directory: Path, model: PreTrainedModel) -> dict[str, Any]:
    """Bits per quantized weight, from the bytes in the files, and what the quantizer reported, summed over blocks."""
    weights, size, figures = 0, 0, dict[str, float]()
    for index in range(model.config.num_hidden_layers):
        block = read_block(block_file(directory, index))
        for name, (_, parts, _) in block.linears.items():
            weights += model.get_parameter(f"{name}.weight").numel()
            size += sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
        for name, value in block.figures.items():
            figures[name] = _joining(name)(figures[name], value) if name in figures else value
    return {"bits_per_weight": 8 * size / weights if weights else None, "figures": figures}


def _joining(figure: str) -> Callable[[float, float], float]:
    """What becomes of a figure of two blocks, by the end of its name: most are summed."""
    return {"least": min, "most": max}.get(figure.rpartition("_")[2], operator.add)


def return_memory() -> None:
    """Hand freed pages back to the system. glibc keeps buffers of a few MB on its heap, where every block leaves holes:
    without this, memory grows by about one block per block."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def partial_of(out: Path) -> Path:
    """Where a checkpoint lies until it is finished."""
    return out.with_name(f"{out.name}.partial")


def identity_at(directory: Path) -> str | None:
    """The identity that a directory claims; None if it has no readable manifest."""
    try:
        return read_manifest(directory)["identity"]
    except UserError:
        return None


def _refuse_other(out: Path, manifest: dict[str, Any]) -> None:
    there = identity_at(out)
    if there != manifest["identity"]:
        what = f"the quantized checkpoint {there}" if there else "something else"
        raise UserError(
            f"{out} already holds {what}, not {manifest['identity']} ({manifest['label']}); choose another "
            "--out or remove the directory"
        )
