"""The Hessians of GPTQ and what derives from it: H = 2/n · Σ x xᵀ of the inputs of linears that read the same.

They come one at a time where a block's linears are quantized one set after the other, and always for experts, so that
no more than one of them is in memory. An expert that sees no token gets the Hessian of the others of its block.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from quantization.model.blocks import DecoderBlock
from quantization.model.stages import stage
from quantization.model.walk import Walk

__all__ = ["Hessian", "panels", "shared_hessians"]

TOKENS = 1024  # of one product of a Hessian: on tensor cores a share of 2⁻¹⁸ is lost (H200; 2⁻¹⁴ with 16384 tokens)
PANEL = 192  # rows that are computed at a time where a triangle is asked for; changes the speed only
PANELS = {"cuda": 2048}  # where it is another: large products fill a GPU


class Hessian:
    """H of a linear's inputs, in float32: (channels, channels). Samples may come one at a time, or several."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None  # of x xᵀ, in panels of rows that end with their diagonal
        self._samples = 0

    def add(self, x: Tensor) -> None:
        """Take the inputs of one sample, (tokens, channels), or of several, (samples, tokens, channels).

        On CUDA half-precision inputs are multiplied as they are, on tensor cores: products are exact in float32. Their
        sums are not rounded but cut, so what is lost grows with their length: `TOKENS` bounds it.
        """
        self._samples += len(x) if x.ndim == 3 else 1
        x = x.flatten(0, -2)
        channels = x.shape[1]
        if self._sum is None:
            self._sum = torch.zeros(channels, channels, device=x.device)
        if not (x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)):
            x = x.float()
        for part in x.split(TOKENS):
            for first, last in panels(channels, x.device):
                _add_product(self._sum[first:last, :last], part[:, first:last].T, part[:, :last])

    @property
    def has_samples(self) -> bool:
        """Whether any was added."""
        return self._samples > 0

    def take(self) -> Tensor:
        """H, with n counting samples; the memory is the caller's from then on."""
        assert self._sum is not None, "no sample was added"
        h, self._sum = self._sum.mul_(2 / self._samples), None
        for first, last in panels(len(h), h.device):
            h[:first, first:last] = h[first:last, :first].T
        return h


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a product of matrices of one dtype to float32 sums."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out_dtype=torch.float32)


def panels(channels: int, device: torch.device) -> list[tuple[int, int]]:
    """First and last row of the panels that a matrix is computed in, where only a triangle of it is asked for."""
    width = PANELS.get(device.type, PANEL)
    return [(first, min(first + width, channels)) for first in range(0, channels, width)]


def shared_hessians(block: DecoderBlock, true_sequential: bool) -> Iterable[tuple[tuple[str, ...], Tensor]]:
    """Every set of linears that read one input, with its Hessian; sets in the order of computation, but for those of
    experts that see no token, which come last.

    true_sequential: a Hessian is taken after the earlier sets were given their quantized weights, one at a time;
    otherwise all of the full-precision block: in one pass, or in one for each set where there are experts.
    """
    sets, experts = block.architecture.linears, block.architecture.experts
    if true_sequential or experts is not None:
        walk, unseen = Walk.begin(block) if true_sequential else Walk(block), []
        for names in sets:
            hessian = Hessian()
            for x in walk.inputs(names[0]):
                with stage("Hessians"):
                    hessian.add(x)
            if hessian.has_samples:
                yield names, hessian.take()
            else:
                unseen.append(names)
        yield from _of_others(block, walk, unseen)
        return
    hessians = {names[0]: Hessian() for names in sets}

    def look(name: str, x: Tensor) -> None:
        if name in hessians:
            with stage("Hessians"):
                hessians[name].add(x)

    block.observe(look, leave=True)
    for names in sets:
        yield names, hessians.pop(names[0]).take()


def _of_others(
    block: DecoderBlock, walk: Walk, unseen: Sequence[tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Sets of linears whose expert sees no token, with the mean of the other experts' Hessians, every token counted
    once for each expert that it is sent to. Those experts have full precision by then, all in front of them has not."""
    alike: dict[str, list[tuple[str, ...]]] = {}
    for names in unseen:
        alike.setdefault(names[0].rpartition(".")[2], []).append(names)
    for part, sets in alike.items():
        hessian = Hessian()
        for x in walk.inputs_of_all(part):
            with stage("Hessians"):
                hessian.add(x)
        shared = hessian.take()
        for i, names in enumerate(sets):
            yield names, shared.clone() if i + 1 < len(sets) else shared
