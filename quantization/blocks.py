"""One decoder block and the calibration text that flows through it.

A block-wise quantizer sees a block, its linears, and what calibration feeds them. The text may flow *behind* a prefix:
then every block's cache starts with the keys and values that the full-precision block wrote for the prefix tokens, the
text takes positions P, P + 1, …, and no statistic ever contains a pivot token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv.cache import IntactCache
from intactkv.prefix import input_embeddings
from quantization.architecture import Architecture

__all__ = ["CalibrationStream", "DecoderBlock"]


@dataclass(frozen=True)
class DecoderBlock:
    """A block in full precision, with the calibration stream in front of it (None if nothing calibrates)."""

    index: int
    module: nn.Module
    architecture: Architecture
    stream: "CalibrationStream | None" = None

    @property
    def name(self) -> str:
        """Dotted name in the checkpoint."""
        return self.architecture.block_name(self.index)

    def linears(self) -> dict[str, nn.Linear]:
        """The block's linears, in the order of computation."""
        return self.architecture.linears_of(self.module, self.name)

    def observe(self, look: Callable[[str, Tensor], None]) -> None:
        """Run the calibration text through the block once; `look(linear name, input)` sees every linear's input.

        Inputs are (1, tokens, channels), one call per sample and linear, never containing a prefix token.
        """
        assert self.stream is not None, "this quantizer calibrates, but no calibration text was given"
        handles = [
            # OPT flattens the tokens in front of its feed-forward linears.
            linear.register_forward_pre_hook(lambda _module, args, name=name: look(name, args[0].flatten(0, -2)[None]))
            for name, linear in self.linears().items()
        ]
        try:
            for _ in self.stream.outputs(self):
                pass
        finally:
            for handle in handles:
                handle.remove()


class _Reached(Exception):
    """Raised by the capturing hook to leave the model's forward early."""


class CalibrationStream:
    """Hidden states of the calibration samples in front of the current block.

    segments: (N, T) token ids. prefix_ids: (P,) or None. `model` needs its embeddings loaded, its blocks may be empty
    (on the meta device). Memory: N·T·hidden values, plus one block's cache of one sample.
    """

    def __init__(
        self, model: PreTrainedModel, architecture: Architecture, segments: Tensor, prefix_ids: Tensor | None = None
    ):
        self._config = model.config
        self._blocks = architecture.blocks_of(model)
        self._prefix: Tensor | None = None  # hidden states of the prefix tokens, always in full precision
        self._prefix_output: Tensor | None = None
        self._arguments: list[dict[str, Any]] = []
        self._prefix_arguments: list[dict[str, Any]] = []
        # K and V of the prefix in each block, (1, KV heads, P, D): known from the time the stream reaches the block.
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        if prefix_ids is not None:
            self._prefix, self._prefix_arguments = self._enter(model, prefix_ids[None], IntactCache(model.config))
            text = model.config.get_text_config(decoder=True)
            heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            # Masks and positions need only the prefix's length; its values come when a block is seeded.
            blank = self._prefix.new_zeros(1, heads, prefix_ids.numel(), size)
            self._keys = self._values = [blank] * len(self._blocks)
        entered = [self._enter(model, segment[None], self._cache()) for segment in segments]
        self.hidden: list[Tensor] = [hidden for hidden, _ in entered]  # N × (1, T, hidden size)
        self._arguments = entered[0][1]

    def seed(self, block: DecoderBlock) -> None:
        """Let the full-precision block write its keys and values of the prefix; call it again after a transform."""
        if self._prefix is not None:
            cache = IntactCache(self._config)
            self._prefix_output = self._call(block, self._prefix, self._prefix_arguments, cache)
            keys, values = cache.intact_layers[block.index].held
            self._keys = [*self._keys[: block.index], keys, *self._keys[block.index + 1 :]]
            self._values = [*self._values[: block.index], values, *self._values[block.index + 1 :]]

    def outputs(self, block: DecoderBlock) -> Iterator[Tensor]:
        """The block's output for every sample, (1, T, hidden size), with the weights that it has now."""
        for hidden in self.hidden:
            yield self._call(block, hidden, self._arguments, self._cache())

    def advance(self, block: DecoderBlock) -> None:
        """Pass the text on through the quantized block; the prefix went through the full-precision one in `seed`."""
        self.hidden = list(self.outputs(block))
        if self._prefix is not None:
            self._prefix = self._prefix_output

    def _cache(self) -> IntactCache:
        return IntactCache(self._config, self._keys, self._values)

    @torch.no_grad()
    def _call(self, block: DecoderBlock, hidden: Tensor, arguments: list[dict[str, Any]], cache: IntactCache) -> Tensor:
        return block.module(hidden, **{**arguments[block.index], "past_key_values": cache})

    @torch.no_grad()
    def _enter(self, model: PreTrainedModel, ids: Tensor, cache: IntactCache) -> tuple[Tensor, list[dict[str, Any]]]:
        """Embed (1, T) ids; return the first block's input and every block's keyword arguments (mask, positions, …).

        The model's own forward computes them, with each block replaced by the identity.
        """
        first: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        def skip(hidden: Tensor, **keywords: Any) -> Tensor:
            first.append(hidden)
            arguments.append({k: v for k, v in keywords.items() if k != "past_key_values"})
            if len(arguments) == len(self._blocks):
                raise _Reached
            return hidden

        for module in self._blocks:
            module.forward = skip
        try:
            model(input_ids=ids.to(input_embeddings(model).device), past_key_values=cache, use_cache=True)
        except _Reached:
            pass
        finally:
            for module in self._blocks:
                del module.forward  # the class's own forward shows again
        return first[0], arguments
