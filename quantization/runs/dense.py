"""Dense checkpoints: the one reader of their files, and the empty model that their configuration describes.

Which files count, which tensor is which parameter, that none is missing and every one is finite and floating is decided
here, for the quantizer, the full-precision model and the prefix alike. A tensor is read when it is asked for.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from corpora.errors import UserError, built
from corpora.storage import MEND, open_tensors, weight_files
from intactkv.architecture import ARCHITECTURES, Architecture, architecture_of
from intactkv.layout import Part, lay_out, sources_of
from intactkv.peft import CONFIG as ADAPTER
from intactkv.peft import is_adapter
from quantization.model.stages import stage
from quantization.runs.configuration import (
    CONFIG,
    GENERATION,
    check_ropes,
    check_windows,
    config_of,
    generation_config_of,
)
from quantization.runs.damage import FLOATS, check_dtype, check_finite, dead, holds_zeros, of_blocks, warn_once

__all__ = [
    "DenseCheckpoint", "Weights", "empty_model", "empty_model_of", "read_config", "read_generation_config",
    "tied_names",
]  # fmt: skip

# First parts of names that old files leave out.
DECODERS = ("model", "transformer", "gpt_neox")
# What old files hold besides the weights, and every reader computes anew.
COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"(^|\.)masked_bias$")


class DenseCheckpoint:
    """The files of a dense Hugging Face checkpoint, by their headers.

    exported: the label of quantized weights that an export of ours wrote, None for any other checkpoint.
    Raises UserError if the directory, its configuration or its safetensors files are missing or truncated, or if two
    files hold the same tensor.
    """

    def __init__(self, directory: Path):
        if directory.is_file():
            raise UserError(
                f"{directory} is a file, not a model; give the directory that holds config.json and weights"
            )
        if not directory.is_dir():
            raise UserError(
                f"model directory {directory} is missing; `python -m corpora` lists the models and how to get them"
            )
        if is_adapter(directory):  # transformers would read it on top of the weights, other programs would not
            raise UserError(
                f"{directory} holds a PEFT adapter ({ADAPTER}), which is not read as part of a model; merge it "
                "(merge_and_unload, save_pretrained) and give the result, or move the adapter's files elsewhere"
            )
        if not (directory / CONFIG).is_file():
            raise UserError(f"{directory} holds no config.json; give the directory of a Hugging Face checkpoint")
        self.directory = directory
        self._config = config_of(directory)
        self.exported: str | None = self._config.get("intactkv", {}).get("label")
        self._file_of: dict[str, Path] = {}
        for file in weight_files(directory):
            with open_tensors(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    if name in self._file_of:
                        raise UserError(
                            f"{directory}: {self._file_of[name].name} and {file.name} both hold the tensor {name!r}; "
                            "remove the file that is not the model's"
                        )
                    self._file_of[name] = file

    def stored_name(self, name: str) -> str | None:
        """The name under which a parameter is stored, None if it is not; old files lack the leading `model.`, those of
        a model within another have it twice."""
        first, _, rest = name.partition(".")
        for candidate in (name, *([rest] if first in DECODERS else []), f"model.{name}"):
            if candidate in self._file_of:
                return candidate
        return None

    def check(self) -> None:
        """Raise UserError, by the headers alone, for what no model can be loaded from."""
        self.refuse_layout()
        if self._config.get("model_type") in ARCHITECTURES:
            self.weights(empty_model(self.directory))

    def refuse_layout(self) -> None:
        """Raise UserError for weights in the layout of another program, by its name."""
        for key in ("quantization_config", "compression_config"):
            if layout := self._config.get(key):
                method = layout.get("quant_method")
                give = "dense checkpoint that it was made from"
                if self.exported is not None:
                    give = "quantized checkpoint that it was exported from, or that one's dense model"
                raise UserError(
                    f"{self.directory} is quantized already, in the layout of {method or 'another program'} ({key} in "
                    f"its config.json), which is for other runtimes; give the {give}"
                )

    def weights(self, model: PreTrainedModel) -> "Weights":
        """The parameters of a model without weights, as they are stored; compared by name, shape and dtype.

        Those of a model that is laid out are read from what files fuse or stack.

        Only one of two tied matrices may be missing. What is left over is logged, unless it is known to be harmless.
        Raises UserError for the first parameter that does not fit, and for what only a quantized checkpoint has.
        """
        self.refuse_layout()
        architecture = architecture_of(model.config)
        names: dict[str, str] = {}
        parts: dict[str, Part] = {}
        expected = dict(model.state_dict())
        for head, embedding in tied_names(model).items():
            pair = [stored for stored in map(self.stored_name, (head, embedding)) if stored]
            if len(pair) == 1:
                del expected[head]
                names[embedding] = pair[0]
        for name in expected.keys() - names.keys():
            for part in sources_of(architecture, name):
                if stored := self.stored_name(part.name):
                    names[name] = stored
                    if part != Part(part.name):
                        parts[name] = part
                    break
        known = (*COMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))
        unused = self._file_of.keys() - set(names.values())
        left = sorted(name for name in unused if not any(re.search(pattern, name) for pattern in known))
        self.refuse_quantized(names.values(), left)
        for name in expected:
            if name not in names:
                raise self.lacks(name, left)
        self.refuse_blocks(model, left)
        headers = self.headers(names.values())
        for name, parameter in expected.items():
            shape, dtype = headers[names[name]]
            check_dtype(dtype, f"{self.directory}: the tensor {names[name]!r}")
            stack = 0 if architecture.experts is None else architecture.experts.count
            expected_shape = parts.get(name, Part(name)).stored_shape(tuple(parameter.shape), stack)
            self.check_shape(names[name] if name in parts else name, shape, expected_shape)
        self.refuse_surplus(model.config.model_type, of_blocks(architecture, names.values(), left))
        self.name_left_over(left)
        dtypes = [FLOATS[headers[stored][1]] for stored in names.values()]
        return Weights(self, architecture, names, reduce(torch.promote_types, dtypes), parts, tuple(left))

    def refuse_quantized(self, used: Iterable[str], left: Iterable[str]) -> None:
        """Raise UserError for a left over tensor that belongs to one weight, beside it or in its place."""
        used = set(used)
        for name in left:
            owner, _, part = name.rpartition(".")
            beside = owner in used or ("_" in part and f"{owner}.{part.partition('_')[0]}" in used)
            if beside or part == "qweight" or part.endswith("_packed"):
                raise UserError(
                    f"{self.directory} is quantized already, by another program: it holds {name!r}, without which its "
                    "weights are wrong and which nothing here reads; give the dense checkpoint"
                )

    def refuse_blocks(self, model: PreTrainedModel, left: Iterable[str]) -> None:
        """Raise UserError for a left over tensor of a block that the model does not have."""
        first, _, rest = architecture_of(model.config).blocks.partition(".")  # of which old files leave out the first
        for name in left:
            found = re.match(rf"({first}\.)?{re.escape(rest)}\.(\d+)\.", name)
            if found and int(found[2]) >= model.config.num_hidden_layers:
                raise UserError(
                    f"{self.directory} holds {name!r}, but its config.json says num_hidden_layers "
                    f"{model.config.num_hidden_layers}; the checkpoint and its configuration belong to different models"
                )

    def refuse_surplus(self, model_type: str, left: Iterable[str]) -> None:
        """Raise UserError for a left over parameter of a block that the model does have. left: of its blocks.

        Masks, which old files hold under such names, have four dimensions or are no floating point numbers. A bias of
        zeros says what its absence says.
        """
        for name, (shape, dtype) in self.headers(left).items():
            of_layer = dtype in FLOATS and 1 <= len(shape) <= 3 and 0 not in shape
            if of_layer and not (name.endswith(".bias") and self.is_zero(name)):
                raise UserError(
                    f"{self.directory} holds {name!r}, which a {model_type} of this config.json does not have; the "
                    "checkpoint and its configuration belong to different models"
                )

    def is_zero(self, name: str) -> bool:
        """Whether a stored tensor holds nothing but zeros."""
        with open_tensors(self._file_of[name]) as tensors:
            return holds_zeros(tensors.get_tensor(name))

    def lacks(self, name: str, left: Iterable[str] = ()) -> UserError:
        """The error for a parameter that is not there. left: tensors that are no parameter's."""
        strange = next(iter(left), None)
        reason = "the checkpoint is incomplete, fetch it again"
        if strange is not None:
            reason = f"it holds {strange!r}, which is no name of its model: save it again with its save_pretrained"
        elif "head" in name:
            reason = "it was saved without its head (AutoModel): save it with AutoModelForCausalLM, or fetch it again"
        return UserError(f"{self.directory} lacks the tensor {name!r}; {reason}")

    def check_shape(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        """Raise UserError for a parameter of another shape than its model's."""
        if shape != expected:
            raise UserError(
                f"{self.directory}: the tensor {name!r} has shape {shape}, config.json asks for {expected}; the "
                "checkpoint and its configuration belong to different models"
            )

    def name_left_over(self, names: Iterable[str]) -> None:
        """Log the tensors that no part of the model reads, once."""
        warn_once(self.directory, tuple(names), "tensors that its model does not read")

    def names(self) -> list[str]:
        """All stored names."""
        return list(self._file_of)

    def headers(self, names: Iterable[str]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of stored tensors."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for file, stored in self.by_file(names).items():
            with open_tensors(file) as tensors:
                views = {name: tensors.get_slice(name) for name in stored}
                found |= {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}
        return found

    def by_file(self, names: Iterable[str]) -> dict[Path, list[str]]:
        """Stored names by the file that holds them."""
        files: dict[Path, list[str]] = {}
        for name in names:
            files.setdefault(self._file_of[name], []).append(name)
        return files


@dataclass(frozen=True)
class Weights:
    """The parameters of a model in a dense checkpoint. names: where each is stored; a tied head that is not stored has
    none. parts: what of the stored tensor it is, where that is not all. left: stored tensors that no parameter reads.

    dtype: in which all are read: the narrowest that holds every stored value. A block whose norms are wider than its
    linears computes in the norms' dtype, whatever quantizes it.
    """

    checkpoint: DenseCheckpoint
    architecture: Architecture
    names: Mapping[str, str]
    dtype: torch.dtype
    parts: Mapping[str, Part] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    def tensor(self, name: str) -> Tensor:
        """One parameter, on the CPU. Raises UserError if a value of it is not finite, or if the file was not fetched
        whole (`dead`)."""
        stored = self.names[name]
        (file,) = self.checkpoint.by_file([stored])
        with open_tensors(file) as tensors:
            part = self.parts.get(name)
            tensor: Tensor = tensors.get_tensor(stored) if part is None else part.taken(tensors.get_slice(stored))
        check_finite(tensor, f"{self.checkpoint.directory}: the tensor {stored!r}")
        if holds_zeros(tensor):
            self.refuse_dead([name])
        return tensor.to(self.dtype)

    def check(self) -> None:
        """Raise UserError if a value of any parameter is not finite, or if a file was not fetched whole: before the
        work, and not at the block that has it.

        Reads every file once; of stacks one matrix at a time.
        """
        zeros = set[str]()  # by their stored names
        for file, names in self.checkpoint.by_file(dict.fromkeys(self.names.values())).items():
            with open_tensors(file) as tensors:
                for name in names:
                    view = tensors.get_slice(name)
                    shape = view.get_shape()
                    empty = True
                    for index in range(shape[0]) if len(shape) > 2 else (slice(None),):
                        tensor = view[index] if shape else tensors.get_tensor(name)
                        check_finite(tensor, f"{self.checkpoint.directory}: the tensor {name!r}")
                        empty = empty and holds_zeros(tensor)
                    if empty:
                        zeros.add(name)
        self.look_at_zeros(zeros)

    def look_at_zeros(self, stored: Collection[str]) -> None:
        """Raise UserError if stored tensors that hold nothing but zeros were not fetched whole; else log matrices of
        them, which may be meant, once."""
        zeros = [name for name, at in self.names.items() if at in stored]
        self.refuse_dead(zeros)
        usual = (".bias", "norm.weight") if self.architecture.gain_offset else (".bias",)
        names = tuple(sorted({self.names[name] for name in zeros if not name.endswith(usual)}))
        warn_once(self.checkpoint.directory, names, "tensors of nothing but zeros, which may be meant")

    def refuse_dead(self, zeros: Collection[str]) -> None:
        """Raise UserError if one of these parameters of zeros makes everything behind it zero."""
        for name in dead(self.architecture, zeros):
            raise UserError(
                f"{self.checkpoint.directory}: the tensor {self.names[name]!r} holds nothing but zeros, as in a file "
                "that was not fetched whole; fetch the checkpoint again"
            )

    def load_into(self, module: nn.Module, prefix: str, device: torch.device) -> None:
        """Give an empty module its parameters, named `prefix.…` in the model."""
        for _ in self.load_each([(module, prefix)], device):
            pass

    def load_each(self, modules: Sequence[tuple[nn.Module, str]], device: torch.device) -> Iterator[nn.Module]:
        """Give empty modules their parameters, one module after the other; the next is read when it is asked for.

        For a GPU the next one is read, into pinned memory, while the caller works with the one that it was given: the
        host's processor has nothing else to do then."""

        def read(module: nn.Module, prefix: str) -> dict[str, Tensor]:
            return {name: self.tensor(f"{prefix}.{name}") for name in module.state_dict()}

        def read_ahead(module: nn.Module, prefix: str) -> dict[str, Tensor]:
            return {name: tensor.pin_memory() for name, tensor in read(module, prefix).items()}

        with ThreadPoolExecutor(1) as reader:
            ahead: Future[dict[str, Tensor]] | None = None
            for i, (module, prefix) in enumerate(modules):
                with stage("read"):
                    state = read(module, prefix) if ahead is None else ahead.result()
                    state = {name: tensor.to(device, non_blocking=True) for name, tensor in state.items()}
                    module.load_state_dict(state, strict=True, assign=True)
                    del state
                following = modules[i + 1 : i + 2]
                ahead = reader.submit(read_ahead, *following[0]) if following and device.type == "cuda" else None
                yield module


def read_config(directory: Path) -> PreTrainedConfig:
    """A checkpoint's configuration. Raises UserError if transformers does not know it, or needs code of the directory
    for it, and for a value that it cannot take."""
    file = directory / CONFIG
    said = config_of(directory)
    for word in filter(None, (said.get("dtype"), said.get("torch_dtype"))):
        if isinstance(word, str) and not isinstance(getattr(torch, word.removeprefix("torch."), None), torch.dtype):
            raise UserError(f"{file}: dtype {word!r} is none of torch's; write float32, float16 or bfloat16")
    with built(f"{file} is not a configuration that transformers knows", MEND):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if config.model_type in ARCHITECTURES:
        check_ropes(config, file)
        check_windows(config, file)
    return config


def read_generation_config(directory: Path) -> GenerationConfig:
    """How a checkpoint's model generates: generation_config.json, or what an old config.json says of it.

    Raises UserError if the file is damaged."""
    there = (directory / GENERATION).is_file()
    if there:
        generation_config_of(directory)
    with built(
        f"{directory / (GENERATION if there else CONFIG)} does not say how to generate", "mend it, or remove it"
    ):
        if there:
            return GenerationConfig.from_pretrained(directory)
        return GenerationConfig.from_pretrained(directory, config_file_name=CONFIG, _from_model_config=True)


def empty_model(directory: Path) -> PreTrainedModel:
    """The model of a directory's configurations without weights (meta device); its buffers are real."""
    config = read_config(directory)
    architecture_of(config)  # refuses what is no supported causal language model
    model = empty_model_of(config)
    model.generation_config = read_generation_config(directory)
    return model


def empty_model_of(config: PreTrainedConfig) -> PreTrainedModel:
    """The same of a configuration of any causal language model that transformers knows; laid out, if it has a row.

    Raises UserError if it knows none."""
    what = f"transformers makes no causal language model of model_type {config.model_type!r}"
    with built(what, "mend its config.json"), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32, trust_remote_code=False)
    if config.model_type in ARCHITECTURES:
        lay_out(model)
    return model.eval().requires_grad_(False)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Heads that a checkpoint need not hold, and the input embeddings that they are; either stands for both."""
    config = model.config
    assert isinstance(config, PreTrainedConfig)
    if config.model_type not in ARCHITECTURES or not config.get_text_config(decoder=True).tie_word_embeddings:
        return {}
    names = architecture_of(config)
    return {f"{names.head}.weight": f"{names.embeddings[0]}.weight"}
