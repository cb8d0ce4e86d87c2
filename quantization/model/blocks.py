"""One decoder block and the calibration text that flows through it.

A block-wise quantizer sees a block, its linears, and what calibration feeds them. The text may flow *behind* a prefix:
then every block's cache starts with the keys and values that the full-precision block wrote for the prefix tokens, the
text takes positions P, P + 1, …, and no statistic ever contains a pivot token.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import Architecture, Feed, heads_of
from intactkv.cache import IntactCache
from intactkv.observe import hooked, on_input
from intactkv.policy import Bound, KVPolicy
from intactkv.prefix import Prefix, input_embeddings
from intactkv.vocabulary import known_ids
from quantization.model.finite import FiniteCheck
from quantization.model.inputs import path_of
from quantization.model.rescale import Rescaling, held, rescale
from quantization.model.stages import stage
from quantization.model.text import Text, batch_of, samples_at_once

__all__ = ["CalibrationStream", "DecoderBlock", "Reached", "Rounding"]


class Rounding(Protocol):
    """What rounds beside the weights when the model runs (`quantization.model.rounding`)."""

    @property
    def kv(self) -> KVPolicy | None:
        """Of new keys and values; a cache has it."""
        ...

    def at_work(self, block: "DecoderBlock") -> AbstractContextManager[None]:
        """Let everything else of the block be rounded, for a while."""
        ...


@dataclass(frozen=True)
class DecoderBlock:
    """A block in full precision, with the calibration stream in front of it (None if nothing calibrates).

    rescalings: what `rescale` applied so far; the checkpoint keeps them. kv: tensors of a KV policy with ranges of its
    own for every block; the checkpoint keeps them, too. figures: what a quantizer has to report of
    this block (outliers, repaired Hessians); numbers of the same name are summed over blocks. rounding: what rounds
    beside the weights when the model runs, for quantizers that train with it at work (`WeightQuantizer.sees_rounding`).
    squared_gradients: of the mean loss of the calibration text, `keys` (as RoPE received them) and `values`, each
    (samples, KV heads, tokens, D) float32, for KV policies that ask (`Policy.needs_gradients`).
    """

    index: int
    module: nn.Module
    architecture: Architecture
    config: PreTrainedConfig
    stream: "CalibrationStream | None" = None
    rescalings: list[Rescaling] = field(default_factory=list)
    kv: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    rounding: Rounding | None = None
    squared_gradients: Mapping[str, Tensor] | None = None

    @property
    def name(self) -> str:
        """Dotted name in the checkpoint."""
        return self.architecture.block_name(self.index)

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return heads_of(self.config)[1]

    def linears(self) -> dict[str, nn.Linear]:
        """The block's linears, in the order of computation."""
        return self.architecture.linears_of(self.module, self.name)

    def check_groups(self, group_size: int) -> None:
        """Groups of input channels must fill the rows of every linear. Raises UserError, with a linear's name."""
        channels = {name: linear.weight.shape[-1] for name, linear in self.linears().items()}
        for name, count in channels.items():
            if group_size != -1 and count % group_size:
                raise UserError(
                    f"{self.name}.{name}: group_size={group_size} does not divide its {count} input channels; use a "
                    f"divisor of {math.gcd(*channels.values())}, as the block's linears have "
                    f"{' and '.join(str(x) for x in sorted(set(channels.values())))}, or -1 for one group per row"
                )

    def feeds(self) -> tuple[Feed, ...]:
        """What scales can be moved through, in the order of computation. Raises UserError if there is a part without
        weights to move them to."""
        if self.architecture.unscaled is not None:
            raise UserError(
                f"this {self.config.model_type} {self.architecture.unscaled}; use a method without scales or rotations"
                ", such as gptq or rtn"
            )
        feeds = self.architecture.feeds
        for feed in feeds:
            if getattr(self.module.get_submodule(feed.producer), "weight", None) is None:
                raise UserError(
                    f"{self.name}.{feed.producer} has no weights (as with layer_norm_elementwise_affine=false), so no "
                    "scales can move to it; use a method without scales, such as gptq or rtn"
                )
        return feeds

    def of_family(self, step: Rescaling) -> Rescaling:
        """The same as this family's norms take it, where a norm is the producer."""
        offset = self.architecture.gain_offset
        if not offset or step.producer in self.linears():
            return step
        step = replace(step, offset=offset)
        return step if step.rows else held(self.module.get_parameter(f"{step.producer}.weight"), step)

    def rescale(self, step: Rescaling) -> Rescaling:
        """Apply an equivalent rescaling to the weights, as `of_family`, and remember it; what was applied.

        Raises UserError if an online rotation stands between the two: their scales cannot move through it.
        """
        paths = {name: path_of(self.module.get_submodule(name)) for name in step.consumers}
        self.check_scales(step.producer, [n for n, path in paths.items() if path is not None and path.rotation])
        step = self.of_family(step)
        rescale(self.module, step, self.head_size)
        self.rescalings.append(step)
        return step

    def check_scales(self, producer: str, rotated: Collection[str]) -> None:
        """Raise UserError for scales that would have to move from a producer to linears whose input is rotated."""
        if rotated:
            raise UserError(
                f"{self.name}: scales of {producer} cannot move to {next(iter(rotated))}, because a rotation stands "
                "between them; rescale without that pair, or rotate without it (--set transforms.rotate.head_mix=none, "
                "--set transforms.rotate.online_down=false)"
            )

    def report(self, **figures: float) -> None:
        """Add to the figures of this block."""
        for name, value in figures.items():
            self.figures[name] = self.figures.get(name, 0.0) + float(value)

    def observe(self, look: Callable[[str, Tensor], None], leave: bool = False) -> None:
        """Run the calibration text through the block once; `look(linear name, input)` sees every linear's input.

        Inputs are (samples, tokens, channels), one call per batch and linear, never containing a prefix token. leave:
        the block at its last linear, whose product only matters to other hooks.
        Raises UserError at the end, with the linear's name, if an input was not finite.
        """
        stream, finite = self._stream, FiniteCheck()
        first = {names[0] for names in self.architecture.linears}  # the others read the same

        def shown(name: str, x: Tensor) -> None:
            if name in first:
                finite.add(self.in_front_of(name), x)
            look(name, stream.by_sample(x))
            if leave and name == last:
                raise Reached

        linears = self.linears()
        *_, last = linears
        with torch.no_grad(), hooked(on_input(linear, partial(shown, name)) for name, linear in linears.items()):
            for batch in stream.batches():
                with suppress(Reached):
                    stream.forward(self, batch)
        finite.check()

    def in_front_of(self, linear: str) -> str:
        """What the values are that one linear reads, for `FiniteCheck`."""
        return f"values that are not finite in front of {self.name}.{linear}"

    def keys_and_values(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys (after RoPE) and values of every sample, each (1, KV heads, tokens, D), without the prefix's.

        Raises UserError at the end if one was not finite."""
        stream, finite = self._stream, FiniteCheck()
        for hidden in stream.hidden:
            cache = stream.new_cache(self)
            with torch.no_grad():
                stream.forward(self, hidden, cache=cache)
            keys, values = cache.intact_layers[self.index].held
            for states in (keys, values):
                finite.add(f"keys or values that are not finite in {self.name}", states)
            yield keys[:, :, stream.prefix_length :], values[:, :, stream.prefix_length :]
        finite.check()

    @property
    def _stream(self) -> "CalibrationStream":
        assert self.stream is not None, "this quantizer calibrates, but no calibration text was given"
        return self.stream


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
        linears = [self._blocks[0].get_submodule(name) for names in architecture.linears for name in names]
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
        # A `quantization.model.walk.Walk` through the current block, by a method that went set after set.
        self.walk: Any = None

    @torch.no_grad()
    def seed(self, block: DecoderBlock) -> None:
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

    def seeded(self, block: DecoderBlock) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix in a block that was seeded, each (1, KV heads, P, D)."""
        return self._keys[block.index], self._values[block.index]

    def new_cache(
        self, block: DecoderBlock, kv: KVPolicy | None = None, seeded: tuple[Tensor, Tensor] | None = None
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
        block: DecoderBlock,
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
        self, block: DecoderBlock, hidden: Sequence[Tensor] | None = None, kv: KVPolicy | None = None
    ) -> Iterator[Tensor]:
        """The block's output for every sample, (1, T, hidden size), with the weights that it has now.

        hidden: other inputs than the stream's own, such as `full`. kv: policy of the new keys and values.
        """
        for batch in self._outputs(block, hidden, kv):
            yield from batch.split(1)

    def passed(
        self, block: DecoderBlock, hidden: Sequence[Tensor] | None = None, kv: KVPolicy | None = None
    ) -> Sequence[Tensor]:
        """All of `outputs`, to be kept."""
        return Text.of(self._outputs(block, hidden, kv), len(self.hidden if hidden is None else hidden), self.device)

    @torch.no_grad()
    def _outputs(self, block: DecoderBlock, hidden: Sequence[Tensor] | None, kv: KVPolicy | None) -> Iterator[Tensor]:
        for batch in self.batches(hidden):
            yield self.forward(block, batch, cache=self.new_cache(block, kv))

    def advance(
        self, block: DecoderBlock, following: Sequence[Tensor] | None = None, kv: KVPolicy | None = None
    ) -> None:
        """Pass the text on, through the block as it is now, or as the given outputs; the prefix went through the
        full-precision block in `seed`."""
        self.hidden = self.passed(block, kv=kv) if following is None else following
        self.walk = None
        if self._prefix is not None:
            self._prefix = self._prefix_output

    def _call(
        self,
        block: DecoderBlock,
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
