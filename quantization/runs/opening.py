"""Checkpoints as models where a run computes: dense, quantized, or dense and rescaled as a quantized one was."""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from corpora.errors import UserError, built
from corpora.storage import open_tensors
from intactkv.architecture import ARCHITECTURES, architecture_of
from quantization.model.blocks import DecoderBlock
from quantization.model.placement import memory_of_each, spread
from quantization.model.rescale import rescale_all
from quantization.runs.checkpoint import block_file, is_quantized, load_quantized, read_block, read_manifest
from quantization.runs.configuration import config_of, tokenizer_config_of
from quantization.runs.damage import check_dtype, check_finite, holds_zeros
from quantization.runs.dense import DenseCheckpoint, Weights, empty_model_of, read_config, read_generation_config
from quantization.runs.sums import check_beside

__all__ = ["is_rescaled", "load_model", "load_tokenizer", "rescaled"]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that stands beside the weights. Raises UserError if there is none, or if a special token of it is
    the empty text."""
    if is_quantized(directory):
        check_beside(directory)
    config_of(directory)  # transformers looks there, too
    tokenizer_config_of(directory)
    with built(
        f"{directory} holds no tokenizer that transformers can open",
        "copy tokenizer.json and tokenizer_config.json beside the weights",
    ):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    for name, token in tokenizer.special_tokens_map.items():
        if token == "":
            raise UserError(
                f"{directory / 'tokenizer_config.json'}: {name} is empty, which is no token; name one, or write null"
            )
    return tokenizer


def load_model(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    kernel: str | None = None,
    spread_over_gpus: bool = False,
    max_memory: int | None = None,
) -> PreTrainedModel:
    """A dense or quantized checkpoint as a model in evaluation mode.

    kernel: of quantized weights, which then stay packed (`load_quantized`). max_memory: bytes it may take of each GPU.
    """
    memory = None if max_memory is None else memory_of_each(max_memory)
    if not is_quantized(directory):
        return _load_dense(directory, dtype, device, spread_over_gpus, memory)
    place = torch.device("cpu") if spread_over_gpus else device
    model = load_quantized(directory, kernel=kernel, dtype=dtype, device=place, computes_on=device)
    return spread(model, memory) if spread_over_gpus else model


def _load_dense(
    directory: Path, dtype: torch.dtype, device: torch.device, spread_over_gpus: bool, memory: dict[Any, int] | None
) -> PreTrainedModel:
    """A dense checkpoint, of any type that transformers knows, as our own reader takes it.

    transformers builds it from the tensors that the reader chose: it knows how every type stores its parts, what stays
    in float32 and where each goes. Its rules of which files and names count have no part in it. Of types outside the
    architecture table the reader does not know the names; there it is transformers that tells what is missing.
    """
    checkpoint, config = DenseCheckpoint(directory), read_config(directory)
    empty = empty_model_of(config)
    if config.model_type in ARCHITECTURES and architecture_of(config).is_laid_out:
        return _finished(_load_laid_out(checkpoint, empty, dtype, device, spread_over_gpus, memory), directory)
    loader: Any = type(empty)
    weights: Weights | None = None
    if config.model_type in ARCHITECTURES:
        weights = checkpoint.weights(empty)
        names = weights.names
    else:
        checkpoint.refuse_layout()
        names = {name: name for name in checkpoint.names()}
    damaged: list[str] = []
    zeros = set[str]()
    # With a device map the weights go from the file to their GPU, and the whole model is never in main memory.
    scratch = tempfile.TemporaryDirectory() if spread_over_gpus else None  # for what no memory holds
    placed = {} if scratch is None else {"device_map": "auto", "max_memory": memory, "offload_folder": scratch.name}
    with ExitStack() as files, _no_report():
        views: dict[str, Any] = {}
        for file, stored in checkpoint.by_file(names.values()).items():
            tensors = files.enter_context(open_tensors(file))
            for name in stored:
                views[name] = _Stored(tensors.get_slice(name), name, directory, dtype, damaged, zeros)
        state = {name: views[stored] for name, stored in names.items()}
        model, found = loader.from_pretrained(
            None, config=empty.config, state_dict=state, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True, **placed,
        )  # fmt: skip
    if damaged:
        raise UserError(min(damaged))
    if weights is not None:
        weights.look_at_zeros(zeros)
    _check_found(checkpoint, model, names.keys(), found)
    if scratch is None:
        torch.nn.Module.to(model, device)
    else:
        model.__dict__["intactkv_scratch"] = scratch  # removed with the model
    return _finished(model, directory)


def _finished(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    model.name_or_path = model.config.name_or_path = str(directory)
    model.generation_config = read_generation_config(directory)
    return model.eval().requires_grad_(False)


def _load_laid_out(
    checkpoint: DenseCheckpoint,
    model: PreTrainedModel,
    dtype: torch.dtype,
    device: torch.device,
    spread_over_gpus: bool,
    memory: dict[Any, int] | None,
) -> PreTrainedModel:
    """The weights of a model that is laid out, whose parameters transformers does not know; read by our own reader.

    Spread over GPUs, it is in main memory first."""
    weights = checkpoint.weights(model)
    place = torch.device("cpu") if spread_over_gpus else device
    state: dict[str, torch.Tensor] = {}
    filled = set[str]()
    for name, stored in weights.names.items():
        tensor = weights.tensor(name)
        if not holds_zeros(tensor):
            filled.add(stored)
        check_finite(tensor, f"{checkpoint.directory}: the tensor {stored!r}", dtype)
        state[name] = tensor.to(place, dtype)
    weights.look_at_zeros(set(weights.names.values()) - filled)
    missing, _ = model.load_state_dict(state, strict=False, assign=True)
    if missing:  # the reader has refused all but a tied head
        model.tie_weights()
    model.config.dtype = dtype
    torch.nn.Module.to(model, place)  # buffers
    return spread(model, memory) if spread_over_gpus else model


class _Stored:
    """A stored tensor as transformers' loader takes it: read, and looked at, where it is indexed."""

    def __init__(self, view: Any, name: str, directory: Path, dtype: torch.dtype, damaged: list[str], zeros: set[str]):
        self.view, self.name, self.dtype, self.damaged, self.zeros = view, name, dtype, damaged, zeros
        self.what = f"{directory}: the tensor {name!r}"

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self.view[index]
        try:  # an error here would come out as one of transformers', in other words
            check_dtype(self.view.get_dtype(), self.what)
            check_finite(tensor, self.what, self.dtype)
            if list(tensor.shape) == list(self.view.get_shape()) and holds_zeros(tensor):
                self.zeros.add(self.name)
        except UserError as error:
            self.damaged.append(str(error))
        return tensor


def _check_found(
    checkpoint: DenseCheckpoint, model: PreTrainedModel, stored: Iterable[str], found: Mapping[str, Any]
) -> None:
    """Raise UserError for what transformers did not find, and log what it did not need."""
    left = sorted(found["unexpected_keys"])
    checkpoint.refuse_quantized(set(stored) - set(left), left)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sorted(parameters & set(found["missing_keys"])):
        raise checkpoint.lacks(name, left)
    for name, shape, expected in sorted(found["mismatched_keys"]):
        checkpoint.check_shape(name, tuple(shape), tuple(expected))
    checkpoint.name_left_over(left)


@contextmanager
def _no_report() -> Iterator[None]:
    """transformers' table of what is missing or left over: the lines of our own reader say it."""
    logger = logging.getLogger("transformers.modeling_utils")

    def shown(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(shown)
    try:
        yield
    finally:
        logger.removeFilter(shown)


def is_rescaled(quantized: Path) -> bool:
    """Whether a quantized checkpoint's weights were rescaled before they were rounded."""
    return bool(read_block(block_file(quantized, 0)).rescalings)


def rescaled(model: PreTrainedModel, quantized: Path) -> PreTrainedModel:
    """A dense model, rescaled block by block as the quantized checkpoint was before it was rounded."""
    architecture = architecture_of(model.config)
    for index, module in enumerate(architecture.blocks_of(model)):
        block = DecoderBlock(index, module, architecture, model.config)
        rescale_all(module, read_block(block_file(quantized, index)).rescalings, block.head_size)
    manifest = read_manifest(quantized)
    model.__dict__["intactkv_source"] = (manifest["source"]["fingerprint"], manifest["basis"])
    return model
