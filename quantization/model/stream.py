"""The calibration text on its way from block to block, behind a prefix or alone."""

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv.architecture import Architecture, heads_of
from intactkv.cache import IntactCache
from intactkv.policy import Bound, KVPolicy
from intactkv.prefix import Prefix, input_embeddings
from intactkv.vocabulary import known_ids
from quantization.model.stages import stage
from quantization.model.text import Text, batch_of, samples_at_once

__all__ = ["CalibrationStream", "Reached"]


class Block(Protocol):
    """What the text flows through: a `quantization.model.blocks.DecoderBlock`."""

    @property
    def index(self) -> int:
        """Its place among the blocks."""
        ...

    @property
    def module(self) -> nn.Module:
        """The model's own."""
        ...

    @property
    def architecture(self) -> Architecture:
        """The names of the model's parts."""
        ...

    @property
    def kv(self) -> Mapping[str, Tensor]:
        """Tensors of a KV policy."""
        ...


class Reached(Exception):
    """Raised by the capturing hook to leave the model's forward early."""


class CalibrationStream:
    """Hidden states of the calibration samples in front of the current block.

    segments: (N, T) token ids. behind: (P,), or None, or a trained prefix, whose keys and values nobody computes
    from its tokens. `model` needs its embeddings loaded, its blocks may be empty
    (on the meta device). Memory: N·T·hidden values, plus what one batch of samples (`batch` of them) leaves in a block.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        segments: Tensor,
        behind: Tensor | Prefix | None = None,
    ):
        self._config = model.config
        self._blocks = architecture.blocks_of(model)
        self._cache = architecture.cache
        self._prefix: Tensor | None = None  # hidden states of the prefix tokens, always in full precision
        self._prefix_output: Tensor | None = None
        self._prefix_arguments: list[dict[str, Any]] = []
        # K and V of the prefix in each block, (1, KV heads, P, D): known from the time the stream reaches the block.
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        if isinstance(behind, Prefix):
            like = input_embeddings(model)
            self._keys = [x.to(like) for x in behind.keys]
            self._values = [x.to(like) for x in behind.values]
        elif behind is not None:
            self._prefix, self._prefix_arguments = self._enter(model, behind[None], IntactCache(model.config))
            heads, size = heads_of(model.config)
            # Masks and positions need only the prefix's length; its values come when a block is seeded.
            blank = self._prefix.new_zeros(1, heads, behind.numel(), size)
            self._keys = self._values = [blank] * len(self._blocks)
        like = input_embeddings(model)
        self.device, self.tokens = like.device, segments.shape[1]
        linears = [self._blocks[0].get_submodule(name) for name in architecture.of_one_token]
        widths = [(int(linear.in_features), int(linear.out_features)) for linear in linears]  # type: ignore[arg-type]
        self.batch = samples_at_once(widths, self.tokens, like.dtype, self.device)
        self._arguments: list[dict[str, Any]] = []  # of one sample; they hold for all

        def entering() -> Iterator[Tensor]:
            for segment in segments:
                cache = IntactCache(model.config, self._keys, self._values)
                hidden, self._arguments = self._enter(model, segment[None], cache)
                yield hidden

        self.hidden: Sequence[Tensor] = Text.of(entering(), len(segments), self.device)  # N × (1, T, hidden size)
        # What full-precision blocks would have passed on, and what the current one makes of it: kept only for methods
        # that ask (`WeightQuantizer.reads`).
        self.full: Sequence[Tensor] = ()
        self.targets: Sequence[Tensor] = ()
        # Tokens that the current block's router sends to each of its experts, where a pass has looked.
        self.sent: dict[int, int] = {}
        # A `quantization.model.walk.Walk` through the current block, by a method that went set after set.
        self.walk: Any = None

    @torch.no_grad()
    def seed(self, block: Block) -> None:
        """Let the full-precision block write its keys and values of the prefix; call it again after a transform."""
        if self._prefix is not None:
            cache = IntactCache(self._config)
            self._prefix_output = self._call(block, self._prefix, self._prefix_arguments, cache)
            keys, values = cache.intact_layers[block.index].held
            self._keys = [*self._keys[: block.index], keys, *self._keys[block.index + 1 :]]
            self._values = [*self._values[: block.index], values, *self._values[block.index + 1 :]]

    @property
    def prefix_length(self) -> int:
        """Tokens of the prefix that the text runs behind."""
        return self._keys[0].shape[2] if self._keys else 0

    def seeded(self, block: Block) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix in a block that was seeded, each (1, KV heads, P, D)."""
        return self._keys[block.index], self._values[block.index]

    def new_cache(
        self, block: Block, kv: KVPolicy | None = None, seeded: tuple[Tensor, Tensor] | None = None
    ) -> IntactCache:
        """The cache that samples meet in a block: the prefix's keys and values, then what a policy leaves of the
        new ones, by the tensors in `block.kv` if it has any. seeded: other keys and values of the prefix than the
        block was seeded with."""
        keys, values = self._keys, self._values
        if seeded is not None:
            keys = [*keys[: block.index], seeded[0], *keys[block.index + 1 :]]
            values = [*values[: block.index], seeded[1], *values[block.index + 1 :]]
        if kv is not None and kv.calibrates:
            kv = Bound(kv, {block.index: block.kv} if block.kv else {})
        return IntactCache(self._config, keys, values, kv)

    def forward(
        self,
        block: Block,
        hidden: Tensor,
        weights: dict[str, Tensor] | None = None,
        cache: IntactCache | None = None,
    ) -> Tensor:
        """The block's output for some samples' hidden states (B, T, hidden size), with gradients where they are on.

        weights: stand in for the block's own parameters of the same names. cache: one of `new_cache`; by default one
        without a policy.
        """
        cache = self.new_cache(block) if cache is None else cache
        return self._call(block, hidden, self._arguments, cache, weights)

    def by_sample(self, x: Tensor) -> Tensor:
        """What a linear reads or writes, as (samples, tokens, channels): OPT flattens the tokens in front of its
        feed-forward linears."""
        return x.reshape(-1, self.tokens, x.shape[-1])

    def batches(self, hidden: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """The text in front of the block, or another, a batch at a time: (B, T, hidden size)."""
        hidden = self.hidden if hidden is None else hidden
        for start in range(0, len(hidden), self.batch):
            yield batch_of(hidden, start, start + self.batch)

    def outputs(
        self, block: Block, hidden: Sequence[Tensor] | None = None, kv: KVPolicy | None = None
    ) -> Iterator[Tensor]:
        """The block's output for every sample, (1, T, hidden size), with the weights that it has now.

        hidden: other inputs than the stream's own, such as `full`. kv: policy of the new keys and values.
        """
        for batch in self._outputs(block, hidden, kv):
            yield from batch.split(1)

    def passed(
        self, block: Block, hidden: Sequence[Tensor] | None = None, kv: KVPolicy | None = None
    ) -> Sequence[Tensor]:
        """All of `outputs`, to be kept."""
        return Text.of(self._outputs(block, hidden, kv), len(self.hidden if hidden is None else hidden), self.device)

    @torch.no_grad()
    def _outputs(self, block: Block, hidden: Sequence[Tensor] | None, kv: KVPolicy | None) -> Iterator[Tensor]:
        for batch in self.batches(hidden):
            yield self.forward(block, batch, cache=self.new_cache(block, kv))

    def advance(self, block: Block, following: Sequence[Tensor] | None = None, kv: KVPolicy | None = None) -> None:
        """Pass the text on, through the block as it is now, or as the given outputs; the prefix went through the
        full-precision block in `seed`."""
        self.hidden = self.passed(block, kv=kv) if following is None else following
        self.walk, self.sent = None, {}
        if self._prefix is not None:
            self._prefix = self._prefix_output

    def _call(
        self,
        block: Block,
        hidden: Tensor,
        arguments: list[dict[str, Any]],
        cache: IntactCache,
        weights: dict[str, Tensor] | None = None,
    ) -> Tensor:
        keywords = {name: _for_samples(x, len(hidden)) for name, x in arguments[block.index].items()}
        keywords[block.architecture.cache] = cache
        with stage("passes"):
            if weights is None:
                output = block.module(hidden, **keywords)
            else:
                output = torch.func.functional_call(block.module, weights, (hidden,), keywords)
        return output[0] if isinstance(output, tuple) else output  # some return what attention gave them, too

    @torch.no_grad()
    def _enter(self, model: PreTrainedModel, ids: Tensor, cache: IntactCache) -> tuple[Tensor, list[dict[str, Any]]]:
        """Embed (1, T) ids; return the first block's input and every block's keyword arguments (mask, positions, …).

        The model's own forward computes them, with each block replaced by the identity.
        """
        first: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        names = list(signature(type(self._blocks[0]).forward).parameters)[2:]  # behind `self` and the hidden states

        def skip(hidden: Tensor, *positional: Any, **keywords: Any) -> Tensor:
            first.append(hidden)
            keywords |= dict(zip(names, positional, strict=False))
            arguments.append({k: v for k, v in keywords.items() if k != self._cache})
            if len(arguments) == len(self._blocks):
                raise Reached
            return hidden

        for module in self._blocks:
            module.forward = skip
        try:
            ids = known_ids(ids, model).to(input_embeddings(model).device)
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        except Reached:
            pass
        finally:
            for module in self._blocks:
                del module.forward  # the class's own forward shows again
        return first[0], arguments


def _for_samples(argument: Any, samples: int) -> Any:
    """A block's argument for one sample, as it is for several. Most have one row for all of them; BLOOM's biases by
    distance, (samples · heads, 1, keys), have rows for each."""
    if isinstance(argument, Tensor) and argument.ndim == 3 and len(argument) > 1:
        return argument.repeat(samples, 1, 1)
    return argument
