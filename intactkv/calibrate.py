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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from corpora.errors import UserError
from corpora.storage import identity
from intactkv.architecture import blocks_of, decoder_of
from intactkv.attach import IntactModel
from intactkv.cache import IntactCache
from intactkv.observe import outputs_of
from intactkv.policy import KVPolicy
from intactkv.prefix import Prefix, input_embeddings
from intactkv.training import Descent, Group, Report, Schedule, check_settings, every, masters, shuffled
from intactkv.vocabulary import known_ids

__all__ = ["Outcome", "Sample", "Training", "block_losses", "block_targets", "calibrate", "check_samples",
           "mean_losses", "sample_loss"]  # fmt: skip


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
        check_settings("training", self, steps=1, batch=1, evaluate_every=1)


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
    models: Any = None,
    report: Report | None = None,
) -> Outcome:
    """Train a prefix for a quantized model.

    twin: its full-precision twin, on the same device. kv: policy of the cache behind the prefix; its rounding passes
    gradients straight through. state: file that a killed run goes on from, written with every held-out loss and removed
    by whoever has kept the outcome. models: what both models and the policy are, as JSON: a state that was made with
    others is refused. report: called with every step's row of the history.
    Raises UserError for samples that do not start with the prefix, have nothing to learn from, or a loss that is no
    number; nothing is lost then.
    """
    check_samples(samples, held_out, prefix.ids)
    learned = masters(x.to(input_embeddings(model).device) for x in (*prefix.keys, *prefix.values))
    due = every(training.evaluate_every, training.steps)
    schedule = Schedule(training.steps, due, clip=training.clip, betas=training.betas, eps=training.eps)
    made_of = _identity(prefix, samples, held_out, training, models)
    descent = Descent([Group(learned, training.learning_rate)], schedule, "the prefix", made_of=made_of)

    def losses(step: int) -> Iterator[Tensor]:
        for index in shuffled(len(samples), training.batch, training.seed, step):
            behind = _with(prefix, learned)
            yield sample_loss(model, twin, behind, samples[index], kv, training.checkpointing) / training.batch

    def evaluate() -> float:
        return mean_losses(model, twin, [_with(prefix, learned)], held_out, kv)[0]

    descent.run(losses, evaluate, state=state, report=report)
    best, last = (
        _with(prefix, [x.detach().to("cpu", prefix.dtype, copy=True) for x in tensors])
        for tensors in (descent.best, learned)
    )
    return Outcome(best, last, descent.best_step, descent.history)


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
    with outputs_of(blocks_of(twin)) as outputs:
        decoder_of(twin)(input_ids=known_ids(sample.ids, twin)[None].to(device), use_cache=False)
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
    with outputs_of(blocks_of(model)) as outputs, _recomputed(model, cache) if checkpointing else nullcontext():
        intact.feed(ids, through=decoder_of(model), cache=cache)
    behind = sample.counted[skipped:]
    return [
        (ours[0, behind.to(ours.device)].float() - theirs.float().to(ours.device)).square().mean() / 2
        for ours, theirs in zip(outputs, targets, strict=True)
    ]


def check_samples(samples: Sequence[Sample], held_out: Sequence[Sample], ids: Tensor) -> None:
    """Raise UserError for samples that a prefix of these tokens, (P,), cannot be trained on."""
    for sample in (*samples, *held_out):
        if not torch.equal(sample.ids[: len(ids)], ids):
            raise UserError(
                f"a calibration text starts with the tokens {sample.ids[: len(ids)].tolist()[:8]}, not with the "
                f"prefix's {ids.tolist()[:8]}; the prefix must open every conversation"
            )
        if bool(sample.counted[: len(ids)].any()) or not bool(sample.counted[len(ids) :].any()):
            raise UserError("a calibration text has no token to take the loss at behind the prefix; use longer ones")
    if not samples or not held_out:
        raise UserError(
            f"{len(samples)} samples to train on and {len(held_out)} held out; at least one of each is needed"
        )


def _identity(
    prefix: Prefix, samples: Sequence[Sample], held_out: Sequence[Sample], training: Training, models: Any
) -> str:
    """What a state must have been made with to be gone on from."""
    texts = [[s.ids.tolist(), s.counted.tolist()] for s in (*samples, *held_out)]
    start = [float(x.double().sum()) for x in (*prefix.keys, *prefix.values)]
    made_of = {"texts": texts, "split": len(samples), "start": start, "training": asdict(training), "models": models}
    return identity(made_of, 16)


def _with(prefix: Prefix, tensors: Sequence[Tensor]) -> Prefix:
    """The prefix with these keys, then values, of all layers in the place of its own."""
    half = len(tensors) // 2
    return replace(prefix, keys=tuple(tensors[:half]), values=tuple(tensors[half:]))


@contextmanager
def _recomputed(model: PreTrainedModel, cache: IntactCache) -> Iterator[None]:
    """Let every decoder block of the pass made inside be computed again when its gradient is asked for.

    Its layer of the cache is back at the prefix before each time, else it would hold the tokens twice.
    """
    blocks: Any = blocks_of(model)
    plain = [block.forward for block in blocks]

    def again(index: int) -> Callable[..., Any]:
        def forward(*arguments: Any, **options: Any) -> Any:
            cache.intact_layers[index].reset()
            return plain[index](*arguments, **options)

        return lambda *arguments, **options: checkpoint(forward, *arguments, use_reentrant=False, **options)

    try:
        for index, block in enumerate(blocks):
            block.forward = again(index)
        yield
    finally:
        for block in blocks:
            del block.forward
