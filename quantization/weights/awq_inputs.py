"""What AWQ's searches keep of the inputs of a block's linears."""

from collections.abc import Collection
from functools import cached_property

import torch
from torch import Tensor

from intactkv.architecture import Feed
from quantization.model.blocks import DecoderBlock
from quantization.model.walk import Walk
from quantization.weights.hessians import Hessian

__all__ = ["Inputs", "inputs_of_block", "with_moment"]

CLIP_TOKENS = 512  # at least, where there are as many: every k-th one


class Inputs:
    """What the searches need of the input of linears that read the same: no tokens but every `stride`-th one, and all
    of a short text where a linear is measured alone."""

    def __init__(self, stride: int, alone: bool):
        self.stride = stride
        self._alone = alone
        self.count = 0
        self.magnitude = torch.zeros(())  # Σ|x|, (channels,)
        self.tokens: list[Tensor] = []
        self._all: list[Tensor] = []  # while they are fewer than the channels …
        self._hessian, self._parts = Hessian(), 0  # … then 2/parts · Σ x xᵀ, (channels, channels)

    def add(self, x: Tensor) -> None:
        """Take the inputs of some tokens, (tokens, channels)."""
        self.tokens.append(x[-self.count % self.stride :: self.stride].clone())
        self.count += len(x)
        self.magnitude = self.magnitude.to(x.device) + x.abs().sum(0, dtype=torch.float32)
        if self._alone:
            self._all.append(x)
            if self.count >= x.shape[1]:
                for seen in self._all:
                    self._hessian.add(seen)
                self._parts += len(self._all)
                self._all.clear()

    @cached_property
    def _moment(self) -> Tensor:
        return self._hessian.take().mul_(self._parts / 2)

    def squared_error(self, delta: Tensor) -> Tensor:
        """Σ_t ‖ΔW x_t‖², of weights that are off by ΔW (out, channels); no tokens can be added any more."""
        if self._all:
            return torch.stack([(x.float() @ delta.T).square_().sum() for x in self._all]).sum()
        return (delta @ self._moment).mul_(delta).sum()


def inputs_of_block(block: DecoderBlock, alone: Collection[str]) -> dict[str, Inputs]:
    """Run the text through the block once: the inputs of every linear, and of routers. alone: linears that are measured
    by themselves; those of experts get their second moments later, one at a time (`with_moment`).

    An expert that sees no token gets what the router reads in front of its first linears.
    """
    stream, names = block.stream, block.architecture
    assert stream is not None, "AWQ without a file calibrates, but no calibration text was given"
    tokens = len(stream.hidden) * stream.tokens

    def inputs(first: str) -> Inputs:
        if names.experts is None or names.expert_of(first) is None:
            return Inputs(max(1, tokens // CLIP_TOKENS), first in alone)
        return Inputs(max(1, tokens * names.experts.chosen // names.experts.count // CLIP_TOKENS), False)

    kept = {first: inputs(first) for first in (*(of_set[0] for of_set in names.linears), *names.routers)}
    block.observe(lambda name, x: kept[name].add(x.flatten(0, 1)) if name in kept else None)
    for first in names.entered:
        if not kept[first].count:
            kept[first] = kept[next(feed.witness for feed in names.feeds if first in feed.consumers)]
    of_linears = {name: kept[of_set[0]] for of_set in names.linears for name in of_set}
    return of_linears | {name: kept[name] for name in names.routers}


def with_moment(block: DecoderBlock, feed: Feed, inputs: dict[str, Inputs]) -> Inputs:
    """The inputs by which a feed is measured. Those of an expert's last linear are looked at in a pass of their own,
    so that no more than one second moment is in memory; if it sees no token, those of the others stand in."""
    names, seen = block.architecture, inputs[feed.witness]
    if feed.inside not in feed.consumers or names.experts is None or names.expert_of(feed.inside) is None:
        return seen
    walk = Walk(block)
    again = Inputs(seen.stride if seen.count else seen.stride * names.experts.count, True)
    part = feed.inside.rpartition(".")[2]
    for x in walk.inputs(feed.inside) if seen.count else walk.inputs_of_all(part):
        again.add(x.flatten(0, 1))
    if not seen.count:
        seen.tokens.extend(again.tokens)
    return again
