"""One way through a block for methods that quantize it set after set, each on what the earlier ones pass on.

A linear may close a module: its output is what the module returns, as the last linear of attention does. What such a
linear read is kept, and later passes put `linear(kept)` in the module's place: what is in front of it is not computed
again, and the result is what a pass from the beginning gives. Families without such a linear in a place run from the
beginning there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intactkv.experts import alone
from intactkv.observe import after, hooked, on_input, on_output
from quantization.grids.stored import StoredWeight
from quantization.model.blocks import DecoderBlock
from quantization.model.finite import FiniteCheck
from quantization.model.stream import Reached
from quantization.model.text import Text, TextWriter, to_spare

__all__ = ["Walk"]


@dataclass
class _Kept:
    """A module that needs not run again. values: how many its tuple has, 0 if it returns a tensor.

    text: what the linear that closes it reads; from the first pass behind it on, when the linear has its last weights,
    what it returns.
    """

    module: nn.Module
    linear: nn.Module
    feeding: list[nn.Module]  # what only this module reads, such as the norm in front of it
    text: Text
    values: int
    flat: bool = False  # whether it is called with (tokens, channels)
    returned: bool = False
    writer: TextWriter | None = None  # in that first pass

    def output(self, start: int, stop: int) -> Any:
        """What the module returns for these samples."""
        output = self.text.batch(start, stop)
        if not self.returned:
            output = self.linear(output)
            if self.writer is not None:
                self.writer.add(output)
        output = output.flatten(0, 1) if self.flat else output
        return (output, *[None] * (self.values - 1)) if self.values else output


class Walk:
    """The text on its way through a block whose linears are quantized from the first to the last.

    Memory: what the linear that closes attention reads, later what it returns, which is one more copy of the text; and
    where the memory is large beside it (`text.to_spare`) what the one that closes the feed-forward part reads.
    """

    def __init__(self, block: DecoderBlock):
        assert block.stream is not None, "this quantizer calibrates, but no calibration text was given"
        self._block, self._stream = block, block.stream
        self._kept: list[_Kept] = []
        self._weights: dict[str, StoredWeight] = {}

    @classmethod
    def begin(cls, block: DecoderBlock) -> "Walk":
        """A walk that the block's stream knows, until it passes the text on."""
        walk = cls(block)
        walk._stream.walk = walk
        return walk

    def inputs(self, linear: str) -> Iterator[Tensor]:
        """The input of one linear for all samples, in batches (samples, tokens, channels), with the weights that the
        block has now; to be asked for in the order of computation.

        Of an expert's linears, which are parallel to those of the others, they are (1, tokens, channels), from the
        batches that send it any; nothing else is computed of the experts.
        Raises UserError at the end if one was not finite.
        """
        stream, finite, writer = self._stream, FiniteCheck(), None
        reader, module, values = self._block.module.get_submodule(linear), self._closed_by(linear), None
        new = [kept for kept in self._kept if not kept.returned]
        for kept in new:
            kept.writer = TextWriter(len(stream.hidden), stream.device, kept.text)
        names, sent = self._block.architecture, 0
        expert = names.expert_of(linear)
        for start, stop, batch in self._batches():
            given: list[Tensor] = []  # what is handed to the linear, in front of a rotation
            seen: list[Tensor] = []  # what it multiplies
            hooks = [on_input(reader, given.append, first=True), on_input(reader, seen.append)]
            if module is not None and start == 0:
                close = _Close()
                hooks += [on_output(reader, close.made), after(module, close.returned)]
            else:
                hooks.append(on_input(reader, _leave))
            with torch.no_grad(), self._standing_in(start, stop), self._only(linear), hooked(hooks), suppress(Reached):
                stream.forward(self._block, batch)
            if expert is not None:
                if given:
                    sent += len(given[0])
                    finite.add(self._block.in_front_of(linear), seen[0])
                    yield seen[0][None]
                continue
            if module is not None and start == 0 and (values := close.values) is not None:
                writer = TextWriter(len(stream.hidden), stream.device)
            if writer is not None:
                writer.add(stream.by_sample(given[0]))
            finite.add(self._block.in_front_of(linear), seen[0])
            yield stream.by_sample(seen[0])
        finite.check()
        if expert is not None:
            stream.sent[expert] = sent
        for kept in new:
            assert kept.writer is not None
            kept.text, kept.returned, kept.writer = kept.writer.text, True, None
        if writer is not None and module is not None and values is not None:
            flat = values == 0 and given[0].ndim == 2
            self._kept.append(_Kept(module, reader, self._feeding(linear), writer.text, values, flat))

    def _only(self, linear: str) -> AbstractContextManager[None]:
        """Let no expert compute but the one that a linear belongs to."""
        names = self._block.architecture
        index = names.expert_of(linear)
        if names.experts is None or index is None:
            return nullcontext()
        return alone(self._block.module.get_submodule(names.experts.module), index)

    def inputs_of_all(self, part: str) -> Iterator[Tensor]:
        """What the linears of this name read in all experts that tokens are sent to, (1, tokens, channels) each, with
        the weights that the block has now."""
        experts = self._block.architecture.experts
        assert experts is not None
        for start, stop, batch in self._batches():
            given: list[Tensor] = []
            readers = [self._block.module.get_submodule(f"{experts.of(i)}.{part}") for i in range(experts.count)]
            hooks = [on_input(reader, given.append) for reader in readers]
            with torch.no_grad(), self._standing_in(start, stop), hooked(hooks):
                self._stream.forward(self._block, batch)
            yield from (x[None] for x in given)

    def end(self, weights: Mapping[str, StoredWeight]) -> None:
        """All linears have these weights: let the text be passed on from here (`runs.one_block`)."""
        self._weights = dict(weights)

    def led_to(self, weights: Mapping[str, StoredWeight]) -> bool:
        """Whether these are the weights that it was walked with, the objects themselves: what was made of them, such as
        another coding, may differ in the last bit."""
        same = weights.keys() == self._weights.keys()
        return same and bool(weights) and all(weights[n] is w for n, w in self._weights.items())

    @torch.no_grad()
    def outputs(self) -> Sequence[Tensor]:
        """The block's output for all samples, with the weights that it has now. The last of a walk: what was kept first
        is given up for it."""

        def passed() -> Iterator[Tensor]:
            for start, stop, batch in self._batches():
                with self._standing_in(start, stop):
                    yield self._stream.forward(self._block, batch)

        into = self._kept[0].text if self._kept else None
        return Text.of(passed(), len(self._stream.hidden), self._stream.device, into)

    def _batches(self) -> Iterator[tuple[int, int, Tensor]]:
        start = 0
        for batch in self._stream.batches():
            yield start, start + len(batch), batch
            start += len(batch)

    def _closed_by(self, linear: str) -> nn.Module | None:
        """The module that a linear may close, if there is room for what the linear reads."""
        owner, closes = linear.rpartition(".")[0], (linear,) in self._block.architecture.linears
        if not owner or not closes or self._block.architecture.expert_of(linear) is not None:
            return None
        like = self._stream.hidden[0]
        width = int(self._block.linears()[linear].in_features)
        size = len(self._stream.hidden) * like.numel() // like.shape[-1] * width * like.element_size()
        if width > like.shape[-1] and not to_spare(size, like.device):
            return None
        return self._block.module.get_submodule(owner)

    def _feeding(self, linear: str) -> list[nn.Module]:
        """What stands in front of the module that a linear closes, for that module alone."""
        owner, block = linear.rpartition(".")[0], self._block
        feeds = () if block.architecture.unscaled is not None else block.architecture.feeds
        return [block.module.get_submodule(feed.producer) for feed in feeds if feed.inside == owner]

    @contextmanager
    def _standing_in(self, start: int, stop: int) -> Iterator[None]:
        """Let what was kept of these samples stand for the modules that it closes."""
        for kept in self._kept:
            kept.module.forward = lambda *_args, _kept=kept, **_keywords: _kept.output(start, stop)
            for module in kept.feeding:
                module.forward = lambda x: x  # nobody looks at it
        try:
            yield
        finally:
            for module in (module for kept in self._kept for module in (kept.module, *kept.feeding)):
                del module.forward  # the class's own forward shows again


class _Close:
    """Whether a linear closes a module, seen in one pass through both, which ends there."""

    def __init__(self) -> None:
        self._made: Tensor | None = None
        self.values: int | None = None  # see `_Kept`; None if it does not

    def made(self, output: Tensor) -> None:
        """The linear's output."""
        self._made = output

    def returned(self, _args: tuple[Any, ...], _keywords: dict[str, Any], output: Any) -> None:
        """The module's output."""
        if (output[0] if isinstance(output, tuple) else output) is self._made:
            self.values = len(output) if isinstance(output, tuple) else 0
        raise Reached


def _leave(_x: Tensor) -> None:
    raise Reached
