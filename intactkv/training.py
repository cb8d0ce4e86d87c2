"""The one training loop: of a prefix, of a block's weights, of the ranges of grids.

    AdamW on float32 tensors; the gradients of a step's terms are added up one graph at a time and clipped together;
    learning rates stay constant or fall as a cosine

The state with the lowest held-out loss is kept, the start included. Nothing here is random. A long run keeps a state
file (parameters, moments, best state, history): killed, it goes on from there and ends with the same bits. A block-wise
method needs none: its block begins anew, from the same numbers. What is trained, and on what loss, is told by
`intactkv.calibrate` (keys and values), `intactkv.trainable` (embeddings), `quantization.tuning` (weights and grids) and
`quantization.weights.omniquant` (clipping).
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError
from corpora.json_files import Count
from corpora.storage import read_artefact, write_artefact
from corpora.values import LARGEST_SEED, MANY

__all__ = [
    "Descent",
    "Group",
    "Report",
    "Schedule",
    "check_settings",
    "every",
    "in_order",
    "masters",
    "matrices_decay",
    "mean_loss",
    "read_state",
    "repeatable",
    "shuffled",
    "split_samples",
    "spread",
    "train",
]

Report = Callable[[dict[str, float]], None]  # is shown every row of a history

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Group:
    """Tensors with a learning rate and a weight decay of their own: float32 leaves, moved in place."""

    tensors: Sequence[Tensor]
    rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    steps: of the optimizer. due: the steps, counted from 1, behind which the held-out loss is taken (`every`,
    `spread`). last_rate: the share of the learning rates that a cosine over all steps ends at; 1 keeps them constant.
    clip: norm of all gradients together, infinite for none.
    """

    steps: int
    due: frozenset[int]
    last_rate: float = 1.0
    clip: float = math.inf
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def share(self, step: int) -> float:
        """The share of the learning rates at a step counted from 0."""
        return self.last_rate + (1 - self.last_rate) * (1 + math.cos(math.pi * step / self.steps)) / 2


def check_settings(what: str, settings: Any, **least: int) -> None:
    """Raise UserError for counts below these or above `MANY`, a seed that no generator takes, or a learning rate that
    is none. what: the settings, for messages."""
    for name, count in least.items():
        if not count <= getattr(settings, name) <= MANY:
            raise UserError(f"{what} {name} is {getattr(settings, name)}; give {count} to {MANY:,}")
    if not abs(settings.seed) <= LARGEST_SEED:
        raise UserError(f"{what} seed is {settings.seed}; give a number up to {LARGEST_SEED} (2^63 - 1)")
    if not 0 < settings.learning_rate < math.inf:
        raise UserError(f"{what} learning_rate is {settings.learning_rate}; give a number above 0")


def every(count: int, steps: int) -> frozenset[int]:
    """Every so many steps, and behind the last one."""
    return frozenset({*range(count, steps, count), steps})


def spread(count: int, steps: int) -> frozenset[int]:
    """So many times, spread over the steps, the last time behind the last one."""
    return frozenset(round((i + 1) * steps / count) for i in range(count))


def matrices_decay(tensors: Sequence[Tensor], rate: float, weight_decay: float) -> list[Group]:
    """One learning rate; matrices decay, norms and biases do not."""
    matrices, others = ([x for x in tensors if (x.ndim > 1) == wanted] for wanted in (True, False))
    return [Group(matrices, rate, weight_decay), Group(others, rate)]


def masters(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Float32 copies, to be trained in the place of tensors that stay as they are."""
    return [x.detach().to(torch.float32, copy=True) for x in tensors]


PARTS = ("now", "best", "first", "second")  # of a parameter in a state file: values, best values, moments
FROM_THE_START = "delete it to train from the start"


class _State(TypedDict):
    """A state file's header."""

    made_of: str
    step: Count
    best_step: Count
    history: list[dict[str, float]]


def read_state(path: Path) -> tuple[_State, dict[str, Tensor]] | None:
    """A state file's header and tensors; None if there is none. Raises UserError for one that is damaged or changed."""
    return read_artefact(path, "run", _State, "state of a training", FROM_THE_START) if path.exists() else None


class Descent:
    """Everything that changes while tensors are trained, and the file that may hold it.

    name: of what is trained, for messages; way_out: what its user can do if a loss is no number. made_of: identity of
    all that a state must have been made with to be gone on from.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        schedule: Schedule,
        name: str,
        *,
        way_out: str = "use a smaller learning rate, other text or another dtype",
        made_of: str = "",
    ):
        groups = [group for group in groups if group.tensors]
        self.parameters = [x for group in groups for x in group.tensors]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(g.tensors), "lr": g.rate, "weight_decay": g.weight_decay} for g in groups],
            betas=schedule.betas,
            eps=schedule.eps,
        )
        self.schedule, self.made_of = schedule, made_of
        self.step = self.saved = self.best_step = 0
        self.best = [x.detach().clone() for x in self.parameters]
        self.history: list[dict[str, float]] = []
        self._rates = [group.rate for group in groups]
        self._name, self._way_out = name, way_out

    @property
    def held_out(self) -> list[float]:
        """Every held-out loss so far, that of the start first."""
        return [row["held_out"] for row in self.history if "held_out" in row]

    def run(
        self,
        losses: Callable[[int], Iterable[Tensor]],
        evaluate: Callable[[], float],
        *,
        state: Path | None = None,
        report: Report | None = None,
    ) -> None:
        """Take the steps that are left; the tensors then hold the last state.

        losses: the terms whose sum is a step's loss (steps count from 0), one graph at a time. evaluate: the held-out
        loss of the tensors as they are. state: file that a killed run goes on from, written with every held-out loss.
        report: called with every row of the history: `step`, `loss`, `gradient` (norm before clipping), `seconds` (of
        the step alone) and `held_out` where it was taken.
        Raises UserError for a loss that is no number; nothing is lost then.
        """
        if state is not None:
            self.resume(state)
        try:
            if not self.history:
                self._keep({"step": 0}, evaluate, report)
            while self.step < self.schedule.steps:
                row = self._descend(losses, state)
                due = self.step in self.schedule.due
                self._keep(row, evaluate if due else None, report)
                if due and state is not None:
                    self.save(state)
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(False).grad = None

    def restore(self) -> None:
        """Let the tensors hold the best state."""
        for parameter, best in zip(self.parameters, self.best, strict=True):
            parameter.data.copy_(best)

    def _descend(self, losses: Callable[[int], Iterable[Tensor]], state: Path | None) -> dict[str, float]:
        """One step and its row of the history."""
        started = time.perf_counter()
        for parameter in self.parameters:
            parameter.requires_grad_(True).grad = None
        terms = []
        with torch.enable_grad():
            for loss in losses(self.step):
                torch.autograd.backward(loss, inputs=self.parameters)  # and nothing else gets a gradient
                terms.append(loss.detach())
        total = sum(torch.stack(terms).tolist())
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise UserError(
                f"{self._name}, step {self.step + 1}: the loss is {total:g} and the gradient's norm {norm:g}; "
                f"{self._way_out}"
                + (f" (the state of step {self.saved} is kept in {state})" if state and self.saved else "")
            )
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.schedule.share(self.step)
        self.optimizer.step()
        self.step += 1
        return {"step": self.step, "loss": total, "gradient": norm, "seconds": time.perf_counter() - started}

    def _keep(self, row: dict[str, float], evaluate: Callable[[], float] | None, report: Report | None) -> None:
        """Add a row to the history, with a held-out loss if it is time; remember the tensors if nothing was better."""
        if evaluate is not None:
            with torch.no_grad():
                loss = evaluate()
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of {self._name} is {loss:g} on the samples that choose its state, behind step "
                    f"{self.step}; {self._way_out}"
                )
            if not self.held_out or loss < min(self.held_out):
                self.best, self.best_step = [x.detach().clone() for x in self.parameters], self.step
            row = row | {"held_out": loss}
            log.debug("%s  step %d/%d  held-out loss %.4e", self._name, self.step, self.schedule.steps, loss)
        self.history.append(row)
        if report is not None:
            report(row)

    def save(self, path: Path) -> None:
        """Write parameters, moments, best parameters and history with their sum, atomically."""
        tensors: dict[str, Tensor] = {}
        for i, (parameter, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            moments = self.optimizer.state[parameter]
            parts = (parameter.detach(), best, moments["exp_avg"], moments["exp_avg_sq"])
            tensors |= {f"{i}.{part}": tensor for part, tensor in zip(PARTS, parts, strict=True)}
        header = {"made_of": self.made_of, "step": self.step, "best_step": self.best_step, "history": self.history}
        write_artefact(path, "run", header, tensors)
        self.saved = self.step

    def resume(self, path: Path) -> None:
        """Go on from a state file, if there is one that was made with the same texts, start and settings."""
        if (found := read_state(path)) is None:
            return
        header, tensors = found
        if header["made_of"] != self.made_of:
            raise UserError(
                f"{path} belongs to a run with other texts, another prefix or other settings; {FROM_THE_START}, or "
                "write to another file"
            )
        self._check(path, header, tensors)
        self.step = self.saved = header["step"]
        self.best_step, self.history = header["best_step"], header["history"]
        for i, parameter in enumerate(self.parameters):
            now, best, first, second = (tensors[f"{i}.{part}"].to(parameter) for part in PARTS)
            parameter.data.copy_(now)
            self.best[i] = best
            step = torch.tensor(float(self.step))
            self.optimizer.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        log.info("going on from step %d of %s", self.step, path)

    def _check(self, path: Path, header: _State, tensors: dict[str, Tensor]) -> None:
        """Raise UserError unless a state file's content can be one of this descent."""
        shapes = {f"{i}.{part}": x.shape for i, x in enumerate(self.parameters) for part in PARTS}
        found = {name: x.shape for name, x in tensors.items() if x.dtype == torch.float32}
        steps, last = [row.get("step") for row in header["history"]], header["step"]
        best = [row.get("step") for row in header["history"] if "held_out" in row]
        if (
            shapes != found
            or last not in self.schedule.due
            or steps != list(range(last + 1))
            or header["best_step"] not in best
        ):
            raise UserError(
                f"state of a training {path} does not fit the {len(self.parameters)} tensors and "
                f"{self.schedule.steps} steps that it should be of; {FROM_THE_START}"
            )


def train(
    groups: Sequence[Group],
    schedule: Schedule,
    losses: Callable[[int], Iterable[Tensor]],
    evaluate: Callable[[], float],
    name: str,
    **options: str,
) -> Descent:
    """A whole descent without a state file; the tensors then hold the best state, also after an error. options: of
    `Descent`."""
    descent = Descent(groups, schedule, name, **options)
    try:
        descent.run(losses, evaluate)
    finally:
        descent.restore()
    return descent


def in_order(loss: Callable[[int], Tensor], samples: Sequence[int], batch: int) -> Callable[[int], Iterator[Tensor]]:
    """A step's terms: `batch` samples, run one by one; an epoch takes them in their order."""

    def terms(step: int) -> Iterator[Tensor]:
        for place in range(step * batch, (step + 1) * batch):
            yield loss(samples[place % len(samples)]) / batch

    return terms


def mean_loss(loss: Callable[[int], Tensor], samples: Sequence[int]) -> float:
    """The mean of a loss over the samples."""
    return float(torch.stack([loss(i) for i in samples]).mean())


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


def shuffled(count: int, batch: int, seed: int, step: int) -> list[int]:
    """Samples of a step: epochs of all samples, each in an order of its own, that depends on nothing but the seed."""
    chosen = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(place, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
        chosen.append(int(order[index]))
    return chosen
