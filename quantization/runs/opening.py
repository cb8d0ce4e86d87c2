"""Checkpoints as models where a run computes: dense, quantized, or dense and rescaled as a quantized one was."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from corpora.errors import UserError
from intactkv.architecture import architecture_of
from quantization.model.blocks import DecoderBlock
from quantization.model.placement import memory_of_each, spread
from quantization.model.rescale import rescale_all
from quantization.runs.checkpoint import block_file, is_quantized, load_quantized, read_block, read_manifest

__all__ = ["is_rescaled", "load_model", "load_tokenizer", "rescaled"]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that stands beside the weights. Raises UserError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} holds no tokenizer that transformers can open ({str(error).splitlines()[0]}); "
            "copy tokenizer.json and tokenizer_config.json beside the weights"
        ) from None


def load_model(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool = False,
    spread_over_gpus: bool = False,
    max_memory: int | None = None,
) -> PreTrainedModel:
    """A dense or quantized checkpoint as a model in evaluation mode. max_memory: bytes it may take of each GPU."""
    memory = None if max_memory is None else memory_of_each(max_memory)
    if is_quantized(directory):
        model = load_quantized(directory, packed=packed, dtype=dtype, device="cpu" if spread_over_gpus else device)
        return spread(model, memory) if spread_over_gpus else model
    # With a device map the weights go from the file to their GPU, and the whole model is never in main memory.
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map="auto" if spread_over_gpus else None, max_memory=memory
    )
    if not spread_over_gpus:
        torch.nn.Module.to(model, device)
    return model.eval().requires_grad_(False)


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
