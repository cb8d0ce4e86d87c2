"""Statistics of experts: each sees the tokens that the router sends to it, and one that sees none takes the others'."""

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from quantization.model.blocks import DecoderBlock

__all__ = ["experts_said", "of_others", "report_experts", "sum_of", "with_unseen"]

log = logging.getLogger(__name__)

Statistic = TypeVar("Statistic")


def of_others(block: DecoderBlock, linear: str) -> list[str]:
    """The linears of a block's experts that are called like one of them."""
    experts, part = block.architecture.experts, linear.rpartition(".")[2]
    assert experts is not None, f"{block.name}.{linear} saw no token, and belongs to no expert"
    return [f"{experts.of(i)}.{part}" for i in range(experts.count)]


def with_unseen(
    block: DecoderBlock, found: dict[str, Statistic], joined: Callable[[list[Statistic]], Statistic]
) -> dict[str, Statistic]:
    """What was found of the inputs of a block's linears, by the first linear of every set that shares one; also for
    experts that saw no token: joined from the others of their block."""
    seen = dict(found)
    for first, *_ in block.architecture.linears:
        if first not in found:
            seen[first] = joined([found[name] for name in of_others(block, first) if name in found])
    return seen


def sum_of(tensors: list[Tensor]) -> Tensor:
    """Of tensors of one shape."""
    return torch.stack(tensors).sum(0)


def experts_said(figures: Mapping[str, float]) -> str | None:
    """What a checkpoint's figures say of its experts, in one line; None without any."""
    if "expert_blocks" not in figures:
        return None
    count, blocks = int(figures["experts"]), int(figures["expert_blocks"])
    unseen = int(figures["experts_unseen"])
    spread = f"{int(figures['expert_tokens_least'])} to {int(figures['expert_tokens_most'])} tokens each"
    whole = f"{count} ({blocks} block{'s' * (blocks > 1)} × {count // blocks})"
    if not unseen:
        return f"[experts] all {whole} saw calibration text, {spread}"
    return (
        f"[experts] {unseen} of {whole} saw no calibration text and took the others' statistics; the rest {spread}. "
        "More --calibration-samples reach more of them"
    )


def report_experts(block: DecoderBlock) -> None:
    """Add to a block's figures how many tokens its experts saw, and log it.

    A method that did not look at the experts' inputs leaves the counting to a pass of its own.
    """
    experts, stream = block.architecture.experts, block.stream
    if experts is None or stream is None:
        return
    if len(stream.sent) < experts.count:
        block.observe(lambda _name, _x: None, leave=True)
    tokens = [stream.sent[i] for i in range(experts.count)]
    unseen = [str(i) for i, count in enumerate(tokens) if not count]
    block.report(
        experts=experts.count,
        expert_blocks=1,
        experts_unseen=len(unseen),
        expert_tokens_least=min(count for count in tokens if count),  # every token goes to some
        expert_tokens_most=max(tokens),
    )
    say = log.warning if unseen else log.info
    say(
        "%s: its %d experts see %d to %d of %d tokens%s",
        block.name,
        experts.count,
        min(tokens),
        max(tokens),
        len(stream.hidden) * stream.tokens,
        f"; {len(unseen)} of them none ({', '.join(unseen[:8])}{', …' if len(unseen) > 8 else ''}), which take the "
        "statistics of the others" if unseen else "",
    )  # fmt: skip
