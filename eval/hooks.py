"""Run a model and look inside: hooks that are always taken off again, eager attention, the decoder without its head."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from intactkv.architecture import architecture_of
from intactkv.attach import IntactModel
from intactkv.cache import IntactCache
from intactkv.prefix import input_embeddings
from quantization.model.attention import NAME

__all__ = ["eager_attention", "hooked", "run_decoder", "tensor_of"]


@contextmanager
def hooked(handles: list[Any]) -> Iterator[list[Any]]:
    """Remove these hooks, and those that are added to the list meanwhile, at the end, also after an error."""
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def tensor_of(output: Any) -> Tensor:
    """The hidden states among what a module returns: transformers' blocks return a tensor, or a tuple led by it."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model compute its attention weights explicitly for the time of the block; one that rounds them does."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if before != NAME else NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def run_decoder(model: IntactModel, ids: Tensor, cache: IntactCache | None = None) -> Tensor:
    """One pass over (B, T) ids behind the model's prefix: what the head would read, (B, T, hidden size).

    cache: one made by `new_cache`, to look at afterwards; by default nothing is kept.
    """
    decoder = model.model.get_submodule(architecture_of(model.model.config).decoder)
    device = input_embeddings(model.model).device
    return model.feed(ids.to(device), through=decoder, cache=cache).last_hidden_state
