"""Checkpoints on disk: dense ones read lazily, quantized ones written block by block and loaded whole.

A quantized checkpoint is a directory: the dense one's configuration and tokenizer files, `quantization.json` (what made
it), `block-000.safetensors`, … (one per decoder block; its header names the kind and grid of every linear, and what
stands in front of it), `ends.safetensors` (embeddings, final norm, head) and `checksums.json` (the files' sums, and
what the run took). Packed codes, scales and zero points, the rescalings that the weights went through before they were
rounded, ranges of inputs and KV cache; no pickle.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from corpora.errors import UserError
from corpora.files import plain_name
from corpora.storage import checkpoint_fingerprint, open_tensors, write_tensors
from intactkv.architecture import architecture_of
from quantization.grids.stored import StoredWeight, restore
from quantization.kernels.linear import QuantLinear, name_products
from quantization.kernels.products import check_kernel
from quantization.kernels.protocols import Stored
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import PATH, restore_paths, stored_paths
from quantization.model.rescale import Rescaling
from quantization.recipes.protocols import restored
from quantization.runs.configuration import CONFIG
from quantization.runs.damage import check_finite
from quantization.runs.dense import DenseCheckpoint, empty_model, tied_names
from quantization.runs.manifest import FORMAT, MANIFEST, PARTS, is_quantized, read_manifest
from quantization.runs.sums import CHECKSUMS, EARLIER_CHECKSUMS, checked, read_cost

__all__ = [
    "CHECKSUMS",
    "ENDS",
    "FORMAT",
    "MANIFEST",
    "PARTS",
    "Checkpoint",
    "StoredBlock",
    "block_file",
    "block_state",
    "cast",
    "copy_companions",
    "dense_directory",
    "empty_quantized",
    "find_checkpoint",
    "is_quantized",
    "load_quantized",
    "model_name",
    "read_block",
    "read_cost",
    "read_manifest",
    "write_block",
    "write_ends",
]

ENDS = "ends.safetensors"
RESCALING = "rescaling."  # in front of the number of a rescaling, in a block's file
KV = "kv."  # in front of a calibrated KV policy's tensors


@dataclass(frozen=True)
class Checkpoint:
    """A model directory and what it is. manifest: of a quantized checkpoint, None for a dense one. exported: the label
    of the quantized weights whose plain numbers a dense one holds."""

    directory: Path
    name: str
    fingerprint: str  # of the dense checkpoint, also for a quantized one
    manifest: dict[str, Any] | None
    exported: str | None = None

    @property
    def family_name(self) -> str:
        """The dense model's name, whose defaults apply: `smollm2-135m`."""
        return self.manifest["source"]["name"] if self.manifest else self.name


def find_checkpoint(directory: Path) -> Checkpoint:
    """Look at a model directory. Raises UserError if it is missing, truncated or no checkpoint."""
    if directory.is_dir() and is_quantized(directory):
        manifest = read_manifest(directory)
        name = f"{manifest['source']['name']}/{directory.name}"
        return Checkpoint(directory, name, manifest["source"]["fingerprint"], manifest)
    exported = DenseCheckpoint(directory).exported
    return Checkpoint(directory, model_name(directory), checkpoint_fingerprint(directory), None, exported)


def model_name(directory: Path) -> str:
    """What a dense model is called: as its directory. Artefacts are kept in directories of that name.

    Raises UserError for a name that is not `plain_name`.
    """
    name = Path(os.path.abspath(directory)).name
    try:
        return plain_name(name)
    except ValueError as error:
        raise UserError(f"the name of the model directory {directory} {error}; rename it") from None


BUILT_THERE = (
    "do it where that model is, or give a prefix that was built there (python -m intactkv build or discover): --prefix "
    "FILE.safetensors"
)


def dense_directory(checkpoint: Checkpoint, why: str, way_out: str = BUILT_THERE) -> Path:
    """The dense checkpoint itself, or the one that a quantized checkpoint was made from.

    why, way_out: for the error: what it is needed for, and what can be done. Raises UserError if it is not at hand.
    """
    directory, manifest = checkpoint.directory, checkpoint.manifest
    if manifest is None:
        if checkpoint.exported is None:
            DenseCheckpoint(directory).refuse_layout()
            return directory
    else:
        dense = directory.parent / manifest["source"]["directory"]
        known = all(transform["kind"] in PARTS for transform in manifest["recipe"]["transforms"])
        stored = checkpoint.fingerprint
        if known and (dense / CONFIG).is_file() and checkpoint_fingerprint(dense, stored) == stored:
            return dense
    raise UserError(f"the dense full-precision model of {directory} is not at hand, but {why}; {way_out}")


def copy_companions(source: Path, target: Path) -> None:
    """Copy what stands beside the weights: configuration, tokenizer, chat template."""
    for file in source.iterdir():
        if (
            file.is_file()
            and file.suffix in (".json", ".txt", ".model", ".jinja")
            and not file.name.startswith(".")
            and "index" not in file.name
            and file.name not in ("prepared.json", MANIFEST, CHECKSUMS, EARLIER_CHECKSUMS)
        ):
            shutil.copyfile(file, target / file.name)


def block_file(directory: Path, index: int) -> Path:
    """Where a block's tensors lie."""
    return directory / f"block-{index:03d}.safetensors"


@dataclass(frozen=True)
class StoredBlock:
    """A finished block as its file holds it.

    parameters: what is not quantized, by name. linears: (kind, packed parts, header) by name; names are the model's.
    rescalings: applied before rounding, named within the block; the first `by_transforms` by transforms. paths: what
    stands in front of linears, as `inputs.stored_paths` gives it. kv: a calibrated KV policy's tensors. figures: what
    the quantizer reported.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    linears: dict[str, tuple[str, dict[str, Tensor], dict[str, Any]]] = field(default_factory=dict)
    rescalings: list[Rescaling] = field(default_factory=list)
    by_transforms: int = 0
    paths: list[dict[str, Any]] = field(default_factory=list)
    kv: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def within(self, name: str) -> dict[str, Tensor]:
        """The parameters by their names within the block of that name."""
        return {key.removeprefix(f"{name}."): tensor for key, tensor in self.parameters.items()}


def write_block(
    directory: Path, block: DecoderBlock, quantized: Mapping[str, StoredWeight], by_transforms: int = 0
) -> None:
    """Write a finished block, atomically: quantized linears packed, everything else as it is.

    by_transforms: how many of its rescalings are those of transforms.
    """
    tensors: dict[str, Tensor] = {}
    name = block.name
    for key, tensor in block.module.state_dict().items():
        if key.removesuffix(".weight") not in quantized:
            tensors[f"{name}.{key}"] = tensor
    linears = {}
    for linear, weight in quantized.items():
        tensors |= {f"{name}.{linear}.{part}": value for part, value in weight.tensors().items()}
        linears[f"{name}.{linear}"] = {"kind": weight.kind, **weight.header()}
    for i, step in enumerate(block.rescalings):
        tensors |= {f"{RESCALING}{i}.{part}": value for part, value in step.tensors().items()}
    tensors |= {f"{KV}{part}": value for part, value in block.kv.items()}
    header = {
        "linears": linears,
        "rescalings": [step.header() for step in block.rescalings],
        "by_transforms": by_transforms,
        "paths": stored_paths(block.module, block.architecture.linears),
        "figures": block.figures,
    }
    # One metadata key only: safetensors writes several in an order that changes from run to run.
    write_tensors(block_file(directory, block.index), tensors, {"block": json.dumps(header, sort_keys=True)})


def write_ends(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write embeddings, final norm and head (a tied head is not among them)."""
    write_tensors(directory / ENDS, tensors)


def read_block(file: Path) -> StoredBlock:
    """Everything in a block's file, or in that of the ends: the only way to them.

    Raises UserError if it is missing, or is not what was written there (`checked`).
    """
    with open_tensors(checked(file)) as tensors:
        header = json.loads((tensors.metadata() or {}).get("block", "{}"))
        kinds: dict[str, dict[str, Any]] = header.get("linears", {})
        parts: dict[str, dict[str, Tensor]] = {linear: {} for linear in kinds}
        steps: list[dict[str, Tensor]] = [{} for _ in header.get("rescalings", [])]
        block = StoredBlock(
            by_transforms=header.get("by_transforms", 0),
            paths=header.get("paths", []),
            figures=header.get("figures", {}),
        )
        for key in tensors.keys():  # noqa: SIM118 (not a mapping)
            owner, _, part = key.rpartition(".")
            if owner.startswith(RESCALING):
                steps[int(owner.removeprefix(RESCALING))][part] = tensors.get_tensor(key)
            elif key.startswith(KV):
                block.kv[part] = tensors.get_tensor(key)
            elif owner in kinds and part != "bias":
                parts[owner][part] = tensors.get_tensor(key)
            else:
                block.parameters[key] = tensors.get_tensor(key)
    for linear, fields in kinds.items():
        block.linears[linear] = (fields.pop("kind"), parts[linear], fields)
    block.rescalings.extend(Rescaling.restore(t, h) for t, h in zip(steps, header.get("rescalings", []), strict=True))
    return block


def load_quantized(
    directory: Path,
    *,
    kernel: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    computes_on: torch.device | None = None,
) -> PreTrainedModel:
    """Load a quantized checkpoint as an ordinary model.

    kernel: keep the weights packed in `QuantLinear` modules, and multiply by the product of that name, or by the first
    that takes a weight (`auto`); `unpack` computes the same bits as none, where they are dequantized into plain
    linears. dtype: of the computation; the checkpoint's by default. computes_on: where the model will compute, if it is
    to be moved there.
    Raises UserError if a product that is named takes none of the weights.
    """
    if kernel is not None:
        check_kernel(kernel)
    manifest, model = empty_quantized(directory)
    recipe, dtype = manifest["recipe"], dtype or model.dtype
    state: dict[str, Tensor] = {}
    kv: list[dict[str, Tensor]] = []
    architecture = architecture_of(model.config)
    blocks = architecture.blocks_of(model)
    files = [*(block_file(directory, index) for index in range(len(blocks))), directory / ENDS]
    stored = _read_ahead(files)
    for index in range(len(blocks)):
        block = next(stored)
        state |= block_state(model, index, block, dtype, device, kernel, computes_on)
        kv.append({part: tensor.to(device) for part, tensor in block.kv.items()})
    state |= cast(next(stored).parameters, dtype, device)
    if kernel is not None:
        name_products(model, kernel, computes_on or torch.device(device))
    if f"{architecture.head}.weight" in _fill(model, state, directory):
        model.tie_weights()
    nn.Module.to(model, device)  # buffers without a place in checkpoints, such as RoPE frequencies
    if recipe.get("attention") is not None:
        restored(recipe["attention"], PARTS).install(model)
    model.__dict__["intactkv_needs_prefix"] = manifest["needs_prefix"]
    model.__dict__["intactkv_needs_kv"] = manifest.get("needs_kv")
    model.__dict__["intactkv_kv"] = kv
    model.__dict__["intactkv_source"] = (manifest["source"]["fingerprint"], manifest["basis"])
    return model


def empty_quantized(directory: Path) -> tuple[dict[str, Any], PreTrainedModel]:
    """A quantized checkpoint's manifest, and its model without weights, with what transforms put into it."""
    manifest, model = read_manifest(directory), empty_model(directory)
    for transform in manifest["recipe"]["transforms"]:
        if transform["kind"] in PARTS:  # those that only rewrite numbers are not
            restored(transform, PARTS).restructure(model)
    return manifest, model


def block_state(
    model: PreTrainedModel,
    index: int,
    block: StoredBlock,
    dtype: torch.dtype,
    device: torch.device | str,
    kernel: str | None = None,
    computes_on: torch.device | None = None,
) -> dict[str, Tensor]:
    """Prepare a block of an empty model for what its file holds; returns its parameters, by the model's names."""
    state: dict[str, Tensor] = {}
    for name, (kind, parts, header) in block.linears.items():
        parts = {part: tensor.to(device) for part, tensor in parts.items()}
        if kernel is not None:
            old, shape = model.get_submodule(name), model.get_parameter(f"{name}.weight").shape
            bias, stored = getattr(old, "bias", None), Stored(kind, parts, header)
            linear = QuantLinear(stored, shape, bias, kernel, computes_on)
            model.set_submodule(name, linear)
            state |= {f"{name}.{part}": tensor for part, tensor in linear.named_buffers()}
        else:
            state[f"{name}.weight"] = restore(kind, parts, header).dequantize(dtype)
    architecture = architecture_of(model.config)
    name, module = architecture.block_name(index), architecture.blocks_of(model)[index]
    restore_paths(module, block.paths, block.within(name))
    return state | cast(block.parameters, dtype, device)


def _read_ahead(files: Sequence[Path]) -> Iterator[StoredBlock]:
    """What is in blocks' files, one after the other; their sums are taken ahead of the loading, several at once."""
    with ThreadPoolExecutor(8) as hashing:
        try:
            for file in hashing.map(checked, files):
                yield read_block(file)
        finally:
            hashing.shutdown(cancel_futures=True)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors where and in what dtype the model computes; ranges of inputs stay in float32."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() and f".{PATH}." not in name else None)
        for name, tensor in tensors.items()
    }


def _fill(model: PreTrainedModel, state: dict[str, Tensor], directory: Path) -> list[str]:
    """Assign a state to an empty model; only a tied head may be missing. Returns what is missing."""
    for name, tensor in state.items():
        check_finite(tensor, f"{directory}: the tensor {name!r}, in {str(tensor.dtype).removeprefix('torch.')},")
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise UserError(f"{directory} does not fit its config.json ({error})") from None
    lost = sorted(set(missing) - tied_names(model).keys())
    if unexpected or lost:
        raise UserError(
            f"{directory} is damaged: missing {lost[:3]}, unexpected {sorted(unexpected)[:3]}; delete the "
            "directory and quantize again"
        )
    return missing
