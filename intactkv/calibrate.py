"""IntactKV as trainable parameters (Liu et al. 2024, arXiv 2403.01241, section 3.3).

    minimize over the prefix's K and V, nothing else:
        mean over samples of  Σ_l ½ · mean over (loss positions × d) of (A_l(quantized) − A_l(full precision))²

A_l is the output of decoder block l. The quantized model reads its tokens behind the trainable prefix; the
full-precision twin reads the whole text with no prefix trick. Loss positions are the assistant's tokens.

    optimizer   AdamW, lr 2e-4 constant, betas 0.9 and 0.999, eps 1e-8, no weight decay, gradients clipped to norm 0.3
    steps       160 of 16 samples (20 epochs of 128)

Departs from the published code: parameters and moments are float32 and cast where they are read (in float16 a step of
2e-4 rounds away on elements above 0.5); targets are computed when they are needed, one sample at a time (theirs take up
to 34 GB); the state with the lowest loss on held-out samples is kept beside the last one; a killed run goes on.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from corpora.errors import UserError
from corpora.storage import identity, write_tensors
from intactkv.attach import IntactModel
from intactkv.attention import prefix_attention
from intactkv.cache import IntactCache, KVPolicy
from intactkv.pivots import decoder_of
from intactkv.prefix import Prefix, input_embeddings

__all__ = ["Outcome", "Sample", "Training", "block_losses", "block_targets", "calibrate", "mean_losses", "sample_loss"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sample:
    """A text, (T,) ids that start with the prefix's, and where the loss is taken, (T,) bool."""

    ids: Tensor
    counted: Tensor


@dataclass(frozen=True)
class Training:
    """How long and how fast. batch: samples of one optimizer step, run one by one. checkpointing: compute every block
    again for its gradient instead of keeping its activations. evaluate_every: steps between held-out losses."""

    steps: int = 160
    batch: int = 16
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 0.3  # norm of all gradients together
    seed: int = 42
    evaluate_every: int = 8
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise UserError(f"training {name} is {getattr(self, name)}; give 1 or more")
        if not self.learning_rate > 0:
            raise UserError(f"training learning_rate is {self.learning_rate}; give a number above 0")


@dataclass(frozen=True, eq=False)
class Outcome:
    """The prefix with the lowest held-out loss, the last one, and a row of figures per step.

    history: `step`, `loss` (mean over the batch), `gradient` (norm before clipping), `seconds` (of the step alone),
    `held_out` where it was taken.
    """

    best: Prefix
    last: Prefix
    best_step: int
    history: list[dict[str, float]]


def calibrate(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    prefix: Prefix,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    training: Training,
    *,
    kv: KVPolicy | None = None,
    state: Path | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
) -> Outcome:
    """Train a prefix for a quantized model.

    twin: its full-precision twin, on the same device. kv: policy of the cache behind the prefix; its rounding passes
    gradients straight through. state: file that a killed run goes on from, written with every held-out loss and removed
    by whoever has kept the outcome. report: called with every step's row of the history.
    Raises UserError for samples that do not start with the prefix, have nothing to learn from, or a loss that is no
    number; nothing is lost then.
    """
    for sample in (*samples, *held_out):
        _check(sample, prefix)
    if not samples or not held_out:
        raise UserError(
            f"{len(samples)} samples to train on and {len(held_out)} held out; at least one of each is needed"
        )
    device = input_embeddings(model).device
    tensors = [x.detach().to(device, torch.float32).clone() for x in (*prefix.keys, *prefix.values)]
    parameters = [nn.Parameter(x) for x in tensors]
    optimizer = torch.optim.AdamW(
        parameters, lr=training.learning_rate, betas=training.betas, eps=training.eps, weight_decay=0.0
    )
    run = _Run(parameters, optimizer, _identity(prefix, samples, held_out, training))
    if state is not None:
        run.resume(state)

    def evaluate() -> float:
        return mean_losses(model, twin, [run.prefix(prefix)], held_out, kv)[0]

    if not run.history:
        run.keep({"step": 0, "held_out": evaluate()}, report)
    while run.step < training.steps:
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for index in _batch(len(samples), training, run.step):
            loss = sample_loss(model, twin, run.prefix(prefix), samples[index], kv, training.checkpointing)
            (loss / training.batch).backward()
            total += float(loss.detach()) / training.batch
        norm = float(nn.utils.clip_grad_norm_(parameters, training.clip))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise UserError(
                f"step {run.step + 1}: the loss is {total} and the gradient's norm {norm}; use a smaller learning rate "
                "or another dtype" + (f" (the state of step {run.saved} is kept in {state})" if state else "")
            )
        optimizer.step()
        run.step += 1
        row = {"step": run.step, "loss": total, "gradient": norm, "seconds": time.perf_counter() - started}
        due = run.step % training.evaluate_every == 0 or run.step == training.steps
        run.keep(row | ({"held_out": evaluate()} if due else {}), report)
        if due and state is not None:
            run.save(state)
    return Outcome(run.prefix(prefix, run.best, prefix.dtype), run.prefix(prefix, dtype=prefix.dtype), run.best_step,
                   run.history)  # fmt: skip


def sample_loss(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    prefix: Prefix,
    sample: Sample,
    kv: KVPolicy | None = None,
    checkpointing: bool = False,
) -> Tensor:
    """The sum of `block_losses`: a float32 scalar with a gradient for the prefix's tensors."""
    losses = block_losses(model, prefix, sample, block_targets(twin, sample), kv, checkpointing)
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


@torch.no_grad()
def mean_losses(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    prefixes: Sequence[Prefix | None],
    samples: Sequence[Sample],
    kv: KVPolicy | None = None,
) -> list[float]:
    """The mean over samples of the sum of `block_losses`, for each prefix, None being the vanilla model.

    All are scored on the same tokens, so no prefix may be longer than what lies in front of the first of them.
    """
    totals = [0.0] * len(prefixes)
    for sample in samples:
        targets = block_targets(twin, sample)
        for i, prefix in enumerate(prefixes):
            totals[i] += sum(float(loss) for loss in block_losses(model, prefix, sample, targets, kv))
    return [total / len(samples) for total in totals]


@torch.no_grad()
def block_targets(twin: PreTrainedModel, sample: Sample) -> list[Tensor]:
    """What the full-precision twin's decoder blocks return at the loss positions: (positions, d) each."""
    device = input_embeddings(twin).device
    with _block_outputs(twin) as outputs:
        decoder_of(twin)(input_ids=sample.ids[None].to(device), use_cache=False)
    return [output[0, sample.counted.to(output.device)] for output in outputs]


def block_losses(
    model: PreTrainedModel,
    prefix: Prefix | None,
    sample: Sample,
    targets: Sequence[Tensor],
    kv: KVPolicy | None = None,
    checkpointing: bool = False,
) -> list[Tensor]:
    """½ · mean over (loss positions × d) of the squared difference to the targets, block by block: float32 scalars.

    prefix: None lets the quantized model compute every token itself. Loss positions lie behind the prefix.
    """
    intact = IntactModel(model, prefix, kv)
    skipped = intact.prefix_length
    ids = sample.ids[None, skipped:].to(input_embeddings(model).device)
    cache = intact.new_cache(single_pass=True)
    with _block_outputs(model) as outputs, _recomputed(model, cache) if checkpointing else nullcontext():
        intact.feed(ids, through=decoder_of(model), cache=cache)
    behind = sample.counted[skipped:]
    return [
        (ours[0, behind.to(ours.device)].float() - theirs.float().to(ours.device)).square().mean() / 2
        for ours, theirs in zip(outputs, targets, strict=True)
    ]


def _check(sample: Sample, prefix: Prefix) -> None:
    length = len(prefix)
    if not torch.equal(sample.ids[:length], prefix.ids):
        raise UserError(
            f"a calibration text starts with the tokens {sample.ids[:length].tolist()[:8]}, not with the prefix's "
            f"{prefix.ids.tolist()[:8]}; the prefix must open every conversation"
        )
    if bool(sample.counted[:length].any()) or not bool(sample.counted[length:].any()):
        raise UserError("a calibration text has no token to take the loss at behind the prefix; use longer ones")


def _batch(count: int, training: Training, step: int) -> list[int]:
    """Samples of a step: epochs of all samples, each in an order of its own, that depends on nothing but the seed."""
    chosen = []
    for place in range(step * training.batch, (step + 1) * training.batch):
        epoch, index = divmod(place, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(training.seed + epoch))
        chosen.append(int(order[index]))
    return chosen


def _identity(prefix: Prefix, samples: Sequence[Sample], held_out: Sequence[Sample], training: Training) -> str:
    """What a state must have been made with to be gone on from."""
    texts = [[s.ids.tolist(), s.counted.tolist()] for s in (*samples, *held_out)]
    start = [float(x.double().sum()) for x in (*prefix.keys, *prefix.values)]
    return identity({"texts": texts, "split": len(samples), "start": start, "training": asdict(training)}, 16)


class _Run:
    """Everything that changes while a prefix is trained, and the file that holds it."""

    def __init__(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, made_of: str):
        self.parameters, self.optimizer, self.made_of = parameters, optimizer, made_of
        self.step = self.saved = self.best_step = 0
        self.best = [p.detach().clone() for p in parameters]
        self.history: list[dict[str, float]] = []

    def prefix(self, like: Prefix, tensors: Sequence[Tensor] | None = None, dtype: torch.dtype | None = None) -> Prefix:
        """The prefix that these tensors (by default the parameters) make; with a dtype on the CPU, without gradient."""
        tensors = self.parameters if tensors is None else tensors
        if dtype is not None:
            tensors = [x.detach().to("cpu", dtype, copy=True) for x in tensors]
        half = len(tensors) // 2
        return replace(like, keys=tuple(tensors[:half]), values=tuple(tensors[half:]))

    def keep(self, row: dict[str, float], report: Callable[[dict[str, float]], None] | None) -> None:
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
        write_tensors(path, {name: x.cpu().contiguous() for name, x in tensors.items()}, {"run": json.dumps(header)})
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


@contextmanager
def _block_outputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The output of every decoder block of the pass made inside, each (1, T, d), in order."""
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in decoder_of(model).layers
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recomputed(model: PreTrainedModel, cache: IntactCache) -> Iterator[None]:
    """Let every decoder block of the pass made inside be computed again when its gradient is asked for.

    Its layer of the cache is back at the prefix before each time, else it would hold the tokens twice.
    """
    blocks: Any = decoder_of(model).layers
    plain = [block.forward for block in blocks]

    def again(index: int) -> Callable[..., Any]:
        def forward(*arguments: Any, **options: Any) -> Any:
            cache.intact_layers[index].reset()
            with prefix_attention(model):  # the second time, the pass that chose it is over
                return plain[index](*arguments, **options)

        return lambda *arguments, **options: checkpoint(forward, *arguments, use_reentrant=False, **options)

    try:
        for index, block in enumerate(blocks):
            block.forward = again(index)
        yield
    finally:
        for block in blocks:
            del block.forward
