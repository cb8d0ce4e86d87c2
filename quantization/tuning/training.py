"""The training loop of block-wise methods: AdamW on float32 tensors, the best state by held-out samples restored.

    minimize mean over samples of loss(sample);  lr constant, or cosine from lr to lr / final over all steps

ZeroQuant's distillation and PrefixQuant's fine-tuning differ in what is trained and in the loss. A killed run starts
the block anew, from the same numbers: nothing here is random.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from corpora.errors import UserError

__all__ = ["Outcome", "Schedule", "repeatable", "split_samples", "train"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; learning rates belong to the groups of tensors.

    steps: of the optimizer. batch: samples of a step, run one by one. evaluations: of the held-out loss, spread over
    the steps, the last one behind the last step. final: the cosine ends at 1/final of the rate; None keeps it constant.
    clip: norm of all gradients together; None clips nothing. weight_decay: of matrices alone.
    """

    steps: int
    batch: int = 4
    evaluations: int = 10
    final: float | None = None
    clip: float | None = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Held-out loss before training and of the state that was kept, the step of that state, and all evaluations."""

    before: float
    after: float
    best_step: int
    curve: list[tuple[int, float]]


def repeatable(device: torch.device) -> AbstractContextManager[object]:
    """Attention whose gradients are the same bits in every run: the fused kernels of GPUs add them up as they come."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def split_samples(count: int, held_out: int, name: str) -> tuple[range, range]:
    """Indices to train on and held-out ones, the last of the text. Raises UserError if nothing is left to train on."""
    if not 0 < held_out < count:
        raise UserError(
            f"{name}: {held_out} of {count} samples held out leaves nothing to learn from; give more samples "
            "(--calibration-samples) or hold out fewer"
        )
    return range(count - held_out), range(count - held_out, count)


def train(
    groups: Sequence[tuple[Sequence[Tensor], float]],
    loss: Callable[[int], Tensor],
    training: Sequence[int],
    held_out: Sequence[int],
    schedule: Schedule,
    name: str,
) -> Outcome:
    """Move the tensors to the lowest held-out loss that was seen, the start included; they are leaves, float32.

    groups: tensors and their learning rate. loss: of one sample, a scalar with gradients for the tensors. training,
    held_out: samples; an epoch takes them in their order. name: of the block, for messages.
    Raises UserError if a loss or a gradient is not finite; the tensors then hold their best state.
    """
    tensors = [tensor for group, _ in groups for tensor in group]
    parted = [  # matrices decay, norms and biases do not
        ([tensor for tensor in group if (tensor.ndim > 1) == decays], rate, schedule.weight_decay if decays else 0.0)
        for group, rate in groups
        for decays in (True, False)
    ]
    parted = [part for part in parted if part[0]]
    optimizer = torch.optim.AdamW(
        [{"params": part, "lr": rate, "weight_decay": decay} for part, rate, decay in parted],
        betas=schedule.betas,
        eps=schedule.eps,
    )
    rates = [rate for _, rate, _ in parted]
    best = [tensor.detach().clone() for tensor in tensors]
    lowest = first = _mean(loss, held_out, name)
    curve, best_step = [(0, first)], 0
    due = {round((i + 1) * schedule.steps / schedule.evaluations) for i in range(schedule.evaluations)}
    try:
        for step in range(1, schedule.steps + 1):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _share(step - 1, schedule)
            for tensor in tensors:
                tensor.requires_grad_(True).grad = None
            for place in range((step - 1) * schedule.batch, step * schedule.batch):
                with torch.enable_grad():
                    value = loss(training[place % len(training)])
                    (value / schedule.batch).backward()
            norm = nn.utils.clip_grad_norm_(tensors, math.inf if schedule.clip is None else schedule.clip)
            if not torch.isfinite(norm):
                raise UserError(
                    f"{name}: step {step} has a loss of {float(value):g} and a gradient of norm {float(norm):g}; use a "
                    "smaller learning rate, or other text"
                )
            optimizer.step()
            if step in due:
                now = _mean(loss, held_out, name)
                curve.append((step, now))
                log.debug(
                    "%s  step %d/%d  held-out loss %.4e (at the start %.4e)", name, step, schedule.steps, now, first
                )
                if now < lowest:
                    lowest, best_step = now, step
                    best = [tensor.detach().clone() for tensor in tensors]
    finally:
        for tensor, value in zip(tensors, best, strict=True):
            tensor.requires_grad_(False).copy_(value)
            tensor.grad = None
    return Outcome(first, lowest, best_step, curve)


def _share(step: int, schedule: Schedule) -> float:
    """Of the learning rate, at a step counted from 0."""
    if schedule.final is None:
        return 1.0
    lowest = 1 / schedule.final
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * step / schedule.steps)) / 2


@torch.no_grad()
def _mean(loss: Callable[[int], Tensor], samples: Sequence[int], name: str) -> float:
    """Over the samples. Raises UserError if it is not finite."""
    mean = float(torch.stack([loss(i) for i in samples]).mean())
    if not math.isfinite(mean):
        raise UserError(f"the loss of {name} on held-out text is {mean}; use a smaller learning rate, or other text")
    return mean
