"""Checkpoints on disk: dense ones read lazily, quantized ones written block by block and loaded whole.

A quantized checkpoint is a directory: the dense one's configuration and tokenizer files, `quantization.json` (what made
it), `block-000.safetensors`, … (one per decoder block; its header names the grid of every linear) and
`ends.safetensors` (embeddings, final norm, head: untouched). Packed codes, scales and zero points; no pickle.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from corpora.errors import UserError
from corpora.storage import read_json, weight_files, write_tensors
from quantization.architecture import architecture_of
from quantization.grids import QuantizedTensor, UniformGrid
from quantization.linear import QuantLinear, stored_tensors, unpack_weight

__all__ = [
    "MANIFEST",
    "DenseCheckpoint",
    "copy_companions",
    "empty_model",
    "is_quantized",
    "load_quantized",
    "read_block",
    "read_config",
    "read_manifest",
    "write_block",
    "write_ends",
]

FORMAT = 1
MANIFEST = "quantization.json"
MANIFEST_KEYS = {"identity", "label", "made_of", "recipe", "basis", "source", "needs_prefix"}
ENDS = "ends.safetensors"


class DenseCheckpoint:
    """Lazy reader of a dense Hugging Face checkpoint: a tensor is read when asked for, never the whole file.

    Raises UserError if the directory, its configuration or its safetensors files are missing or truncated.
    """

    def __init__(self, directory: Path):
        if not directory.is_dir():
            raise UserError(
                f"model directory {directory} is missing; `python -m corpora` lists the models and how to get them"
            )
        if not (directory / "config.json").is_file():
            raise UserError(f"{directory} holds no config.json; give the directory of a Hugging Face checkpoint")
        self.directory = directory
        self._file_of: dict[str, Path] = {}
        for file in weight_files(directory):
            with _open(file) as tensors:
                self._file_of.update(dict.fromkeys(tensors.keys(), file))

    def stored_name(self, name: str) -> str | None:
        """The name under which a parameter is stored, None if it is not; old files lack the leading `model.`."""
        for candidate in (name, name.removeprefix("model.")):
            if candidate in self._file_of:
                return candidate
        return None

    def tensor(self, name: str) -> Tensor:
        """One parameter, in its stored dtype, on the CPU. Raises UserError if the checkpoint lacks it."""
        stored, file = self._located(name)
        with _open(file) as tensors:
            return tensors.get_tensor(stored)

    def _located(self, name: str) -> tuple[str, Path]:
        stored = self.stored_name(name)
        if stored is None:
            raise UserError(f"{self.directory} lacks the tensor {name!r}; the checkpoint is incomplete, fetch it again")
        return stored, self._file_of[stored]

    def check(self, model: nn.Module) -> None:
        """Compare names and shapes with an empty model's, from the files' headers. Raises UserError for the first that
        does not fit; only a tied head may be missing."""
        for name, parameter in model.state_dict().items():
            if name in tied_names(model) and self.stored_name(name) is None:
                continue
            stored, file = self._located(name)
            with _open(file) as tensors:
                shape = tuple(tensors.get_slice(stored).get_shape())
            if shape != tuple(parameter.shape):
                raise UserError(
                    f"{self.directory}: the tensor {name!r} has shape {shape}, config.json asks for "
                    f"{tuple(parameter.shape)}; the checkpoint and its configuration belong to different models"
                )

    def load_into(self, module: nn.Module, prefix: str, device: torch.device) -> None:
        """Give an empty module its parameters, named `prefix.…` in the checkpoint."""
        state = {name: self.tensor(f"{prefix}.{name}").to(device) for name in module.state_dict()}
        module.load_state_dict(state, strict=True, assign=True)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}); fetch or prepare it again") from None


def read_config(directory: Path) -> PreTrainedConfig:
    """A checkpoint's configuration. Raises UserError if transformers does not know it."""
    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"{directory / 'config.json'} is not a configuration that transformers knows ({str(error).splitlines()[0]})"
        ) from None


def empty_model(directory: Path) -> PreTrainedModel:
    """The model of a directory's configuration without weights (meta device); its buffers are real."""
    config = read_config(directory)
    architecture_of(config)  # refuses what is no supported causal language model
    with init_empty_weights(include_buffers=False):
        return (
            AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32).eval().requires_grad_(False)
        )


def tied_names(model: nn.Module) -> set[str]:
    """Parameters that a checkpoint need not hold, because they are the input embeddings."""
    config = model.config
    assert isinstance(config, PreTrainedConfig)
    return {"lm_head.weight"} if config.get_text_config(decoder=True).tie_word_embeddings else set()


def is_quantized(directory: Path) -> bool:
    """Whether a directory is a quantized checkpoint of this project."""
    return (directory / MANIFEST).is_file()


def read_manifest(directory: Path) -> dict[str, Any]:
    """What made a quantized checkpoint. Raises UserError if its manifest is missing, damaged or of another version."""
    manifest = read_json(directory / MANIFEST, "quantization manifest")
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT or not manifest.keys() >= MANIFEST_KEYS:
        raise UserError(
            f"{directory / MANIFEST} is not a whole manifest of format {FORMAT} (its format: {version}); delete the "
            "directory and quantize again"
        )
    return manifest


def copy_companions(source: Path, target: Path) -> None:
    """Copy what stands beside the weights: configuration, tokenizer, chat template."""
    for file in source.iterdir():
        if (
            file.is_file()
            and file.suffix in (".json", ".txt", ".model", ".jinja")
            and "index" not in file.name
            and file.name != "prepared.json"
        ):
            shutil.copyfile(file, target / file.name)


def block_file(directory: Path, index: int) -> Path:
    """Where a block's tensors lie."""
    return directory / f"block-{index:03d}.safetensors"


def write_block(
    directory: Path, index: int, name: str, module: nn.Module, quantized: dict[str, QuantizedTensor]
) -> None:
    """Write a finished block, atomically: quantized linears packed, everything else as it is."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        if key.removesuffix(".weight") not in quantized:
            tensors[f"{name}.{key}"] = tensor
    for linear, weight in quantized.items():
        tensors |= {f"{name}.{linear}.{part}": value for part, value in stored_tensors(weight).items()}
    grids = {
        f"{name}.{linear}": asdict(weight.grid) | {"channels": weight.codes.shape[1]}
        for linear, weight in quantized.items()
    }
    # One metadata key only: safetensors writes several in an order that changes from run to run.
    write_tensors(block_file(directory, index), tensors, {"grids": json.dumps(grids, sort_keys=True)})


def write_ends(directory: Path, dense: DenseCheckpoint, names: list[str]) -> None:
    """Write embeddings, final norm and head as the dense checkpoint has them (a tied head is not stored)."""
    write_tensors(directory / ENDS, {name: dense.tensor(name) for name in names if dense.stored_name(name)})


def read_block(file: Path) -> Iterator[tuple[str, Tensor | tuple[dict[str, Tensor], UniformGrid, int]]]:
    """Everything in a block's file: (parameter name, tensor), or (linear name, (packed parts, grid, channels)).

    Raises UserError if the file is missing or truncated.
    """
    if not file.is_file():
        raise UserError(
            f"{file} is missing; the quantized checkpoint is incomplete, delete the directory and quantize again"
        )
    with _open(file) as tensors:
        grids = json.loads((tensors.metadata() or {}).get("grids", "{}"))
        parts: dict[str, dict[str, Tensor]] = {linear: {} for linear in grids}
        for key in tensors.keys():  # noqa: SIM118 (not a mapping)
            linear, _, part = key.rpartition(".")
            if linear in grids and part != "bias":
                parts[linear][part] = tensors.get_tensor(key)
            else:
                yield key, tensors.get_tensor(key)
        for linear, grid in grids.items():
            channels = grid.pop("channels")
            yield linear, (parts[linear], UniformGrid(**grid), channels)


def load_quantized(
    directory: Path, *, packed: bool = False, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a quantized checkpoint as an ordinary model.

    packed: keep the weights packed in `QuantLinear` modules; otherwise they are dequantized into plain linears. Both
    compute the same bits. dtype: of the computation; the checkpoint's by default.
    """
    manifest = read_manifest(directory)
    model = empty_model(directory)
    dtype = dtype or model.dtype
    state: dict[str, Tensor] = {}
    files = [block_file(directory, i) for i in range(model.config.num_hidden_layers)]
    for file in (*files, directory / ENDS):
        for name, value in read_block(file):
            if isinstance(value, Tensor):
                state[name] = value.to(device, dtype if value.is_floating_point() else None)
                continue
            parts, grid, channels = value
            parts = {part: tensor.to(device) for part, tensor in parts.items()}
            if packed:
                old = model.get_submodule(name)
                model.set_submodule(name, QuantLinear(parts, grid, channels, getattr(old, "bias", None)))
                state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            else:
                state[f"{name}.weight"] = unpack_weight(parts, grid, channels).dequantize(dtype)
    if "lm_head.weight" in _fill(model, state, directory):
        model.tie_weights()
    nn.Module.to(model, device)  # buffers without a place in checkpoints, such as RoPE frequencies
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    model.__dict__["intactkv_needs_prefix"] = manifest["needs_prefix"]
    model.__dict__["intactkv_source"] = (manifest["source"]["fingerprint"], manifest["basis"])
    return model


def _fill(model: PreTrainedModel, state: dict[str, Tensor], directory: Path) -> list[str]:
    """Assign a state to an empty model; only a tied head may be missing. Returns what is missing."""
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise UserError(f"{directory} does not fit its config.json ({error})") from None
    lost = sorted(set(missing) - tied_names(model))
    if unexpected or lost:
        raise UserError(
            f"{directory} is damaged: missing {lost[:3]}, unexpected {sorted(unexpected)[:3]}; delete the "
            "directory and quantize again"
        )
    return missing
