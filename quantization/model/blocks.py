"""One decoder block and the calibration text that flows through it.

A block-wise quantizer sees a block, its linears, and what calibration feeds them. The text may flow *behind* a prefix:
then every block's cache starts with the keys and values that the full-precision block wrote for the prefix tokens, the
text takes positions P, P + 1, …, and no statistic ever contains a pivot token.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from corpora.errors import UserError
from intactkv.architecture import Architecture, Feed, heads_of
from intactkv.observe import hooked, on_input
from intactkv.policy import KVPolicy
from quantization.model.finite import FiniteCheck
from quantization.model.inputs import path_of
from quantization.model.rescale import Rescaling, held, rescale
from quantization.model.stream import CalibrationStream, Reached

__all__ = ["DecoderBlock", "Rounding"]


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
        """Run the calibration text through the block once; `look(name, input)` sees the input of every linear, and of
        routers.

        Inputs are (samples, tokens, channels), one call per batch and linear, never containing a prefix token; those of
        an expert are `in_samples`, and there is no call for a batch that sends it no token. leave: the block at its
        last linear, whose product only matters to other hooks.
        Raises UserError at the end, with the linear's name, if an input was not finite.
        """
        stream, finite, entered = self._stream, FiniteCheck(), self.architecture.entered
        sent = dict.fromkeys(entered.values(), 0)
        first = {names[0] for names in self.architecture.linears}  # the others read the same

        def shown(name: str, x: Tensor) -> None:
            if name in first:
                finite.add(self.in_front_of(name), x)
                if (expert := entered.get(name)) is not None:
                    sent[expert] += len(x)
            look(name, self.in_samples(name, x))
            if leave and name == last:
                raise Reached

        linears: dict[str, nn.Module] = {**self.linears()}
        *_, last = linears
        linears |= {name: self.module.get_submodule(name) for name in self.architecture.routers}
        with torch.no_grad(), hooked(on_input(linear, partial(shown, name)) for name, linear in linears.items()):
            for batch in stream.batches():
                with suppress(Reached):
                    stream.forward(self, batch)
        finite.check()
        stream.sent.update(sent)

    def in_samples(self, name: str, x: Tensor) -> Tensor:
        """What a linear reads, as (samples, tokens, channels): of the linears of an expert (1, tokens, channels), all
        that the samples of a batch send to it."""
        return x[None] if self.architecture.expert_of(name) is not None else self._stream.by_sample(x)

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
