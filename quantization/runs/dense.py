"""Dense checkpoints: read lazily, tensor by tensor, and the empty model that their configuration describes."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from corpora.errors import UserError
from corpora.storage import weight_files
from intactkv.architecture import architecture_of

__all__ = ["DenseCheckpoint", "empty_model", "open_tensors", "read_config", "tied_names"]


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
            with open_tensors(file) as tensors:
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
        with open_tensors(file) as tensors:
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
            with open_tensors(file) as tensors:
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


def open_tensors(file: Path) -> Any:
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
    head = architecture_of(config).head
    return {f"{head}.weight"} if config.get_text_config(decoder=True).tie_word_embeddings else set()
