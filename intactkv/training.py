"""Training a few tensors in front of a frozen model: a run that can be killed and then ends with the same bits.

AdamW without weight decay on float32 masters, gradients clipped together, a held-out loss every few steps. The state
with the lowest one is kept beside the last; parameters, moments, best state and history lie in one file. What is
trained, and on what loss, is `intactkv.calibrate`'s (keys and values) and `intactkv.trainable`'s (embeddings).
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from corpora.errors import UserError
from corpora.storage import write_tensors

__all__ = ["Report", "Run", "Steps", "shuffled"]

Report = Callable[[dict[str, float]], None]  # is shown every row of a history

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Steps:
    """number: of optimizer steps. evaluate_every: steps between held-out losses. clip: norm of all gradients together.
    rate: the learning rate of a step, counted from 0."""

    number: int
    evaluate_every: int
    clip: float
    rate: Callable[[int], float]


class Run:
    """Everything that changes while tensors are trained, and the file that holds it.

    start: the tensors to begin with; the parameters are float32 copies. made_of: identity of all that a state must have
    been made with to be gone on from.
    """

    def __init__(
        self, start: Sequence[Tensor], made_of: str, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ):
        self.parameters = [nn.Parameter(x.detach().to(torch.float32, copy=True)) for x in start]
        self.optimizer = torch.optim.AdamW(self.parameters, betas=betas, eps=eps, weight_decay=0.0)
        self.made_of = made_of
        self.step = self.saved = self.best_step = 0
        self.best = [p.detach().clone() for p in self.parameters]
        self.history: list[dict[str, float]] = []

    def descend(
        self,
        steps: Steps,
        losses: Callable[[int], Iterable[Tensor]],
        evaluate: Callable[[], float],
        *,
        state: Path | None = None,
        report: Report | None = None,
    ) -> None:
        """Take the steps that are left.

        losses: the terms whose sum is a step's loss, one graph at a time. evaluate: the held-out loss of the parameters
        as they are. state: file that a killed run goes on from, written with every held-out loss. report: called with
        every row of the history: `step`, `loss`, `gradient` (norm before clipping), `seconds` (of the step alone) and
        `held_out` where it was taken.
        Raises UserError for a loss that is no number; nothing is lost then.
        """
        if state is not None:
            self.resume(state)
        if not self.history:
            self.keep({"step": 0, "held_out": evaluate()}, report)
        while self.step < steps.number:
            started = time.perf_counter()
            self.optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for loss in losses(self.step):
                torch.autograd.backward(loss, inputs=self.parameters)  # and nothing else gets a gradient
                total += float(loss.detach())
            norm = float(nn.utils.clip_grad_norm_(self.parameters, steps.clip))
            if not (math.isfinite(total) and math.isfinite(norm)):
                raise UserError(
                    f"step {self.step + 1}: the loss is {total} and the gradient's norm {norm}; use a smaller learning "
                    "rate or another dtype"
                    + (f" (the state of step {self.saved} is kept in {state})" if state and self.saved else "")
                )
            for group in self.optimizer.param_groups:
                group["lr"] = steps.rate(self.step)
            self.optimizer.step()
            self.step += 1
            row = {"step": self.step, "loss": total, "gradient": norm, "seconds": time.perf_counter() - started}
            due = self.step % steps.evaluate_every == 0 or self.step == steps.number
            self.keep(row | ({"held_out": evaluate()} if due else {}), report)
            if due and state is not None:
                self.save(state)

    def keep(self, row: dict[str, float], report: Report | None) -> None:
        """Add a row to the history; remember the parameters if nothing was better on the held-out samples."""
        earlier = [r["held_out"] for r in self.history if "held_out" in r]
        self.history.append(row)
        if "held_out" in row and (not earlier or row["held_out"] < min(earlier)):
            self.best, self.best_step = [p.detach().clone() for p in self.parameters], int(row["step"])
        if report is not None:
            report(row)

    def save(self, path: Path) -> None:
        """Write parameters, moments, best parameters and history, atomically."""
        tensors: dict[str, Tensor] = {}
        for i, (parameter, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            moments = self.optimizer.state[parameter]
            tensors |= {f"{i}.now": parameter.detach(), f"{i}.best": best, f"{i}.first": moments["exp_avg"],
                        f"{i}.second": moments["exp_avg_sq"]}  # fmt: skip
        header = {"made_of": self.made_of, "step": self.step, "best_step": self.best_step, "history": self.history}
        write_tensors(path, tensors, {"run": json.dumps(header)})
        self.saved = self.step

    def resume(self, path: Path) -> None:
        """Go on from a state file, if there is one that was made with the same texts, start and settings."""
        if not path.is_file():
            return
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it to train from the start") from None
        if header["made_of"] != self.made_of:
            raise UserError(
                f"{path} belongs to a run with other texts, another prefix or other settings; delete it to train from "
                "the start, or write to another file"
            )
        self.step = self.saved = header["step"]
        self.best_step, self.history = header["best_step"], header["history"]
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors[f"{i}.now"])
            self.best[i] = tensors[f"{i}.best"].to(parameter)
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors[f"{i}.first"].to(parameter),
                "exp_avg_sq": tensors[f"{i}.second"].to(parameter),
            }
        log.info("going on from step %d of %s", self.step, path)


def shuffled(count: int, batch: int, seed: int, step: int) -> list[int]:
    """Samples of a step: epochs of all samples, each in an order of its own, that depends on nothing but the seed."""
    chosen = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(place, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
        chosen.append(int(order[index]))
    return chosen
