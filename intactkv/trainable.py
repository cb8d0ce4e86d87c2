"""A prefix whose tokens' embeddings are trained: PrefixQuant's prefix (arXiv 2410.05265) as `prefix_len` free vectors.

    minimize over P ∈ R^{L×d}, nothing else, everything in full precision, behind P at positions L, L + 1, …:

        mean over layers of  s(A_l | P) / s(A_l | no prefix)   +   w · KL(model behind [BOS] ‖ model behind P)

A_l is what layer l's attention returns on the real tokens; s is the mean of A² (`l2`) or its variance
over tokens and channels (`var`). At the end one pass over P writes keys, values and logits: an ordinary `Prefix`, in
the basis of the model that it was trained on.

The idea is not the paper's. It comes from a fork of its code (pbcong/PrefixQuant, branch dev/trainable-prefix), which
minimizes 0.4 × the standard deviation + 0.3 × (max − min) + 0.3 × the mean of the largest 5 % of |h|, averaged over the
hidden states h that the layers pass on, + 0.01 × the mean of P². It starts from noise, normalizes every vector, and in
the end takes the tokens whose embeddings are nearest to P. Ours minimizes what attention returns (`output="block"`:
what the layers do), relative to the model without a prefix, and stays near the model's logits; it starts from the
discrete prefix, and the trained vectors themselves are used. s alone (`normalization="none"`, `kd_weight=0`) rewards
shrinking.

    start       the discrete prefix's embeddings, repeated up to L with its last token ([BOS]) last
    optimizer   AdamW, lr 1e-3 falling as a cosine to a tenth, no weight decay, gradients clipped to norm 1
    choice      the state with the lowest held-out loss, if that is below the discrete prefix's own
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from corpora.errors import UserError
from corpora.storage import identity, sha256_of_tensor
from intactkv.architecture import blocks_of
from intactkv.observe import hooked, on_output
from intactkv.pivots import EPS
from intactkv.prefix import Prefix, build_prefix, identity_of, input_embeddings
from intactkv.training import Descent, Group, Report, Schedule, check_settings, every, masters, shuffled
from intactkv.vocabulary import known_ids

__all__ = ["Figures", "PrefixTraining", "TrainedPrefix", "starting_point", "statistics", "train_prefix"]

ATTENTION = "self_attn"  # within a block
NOISE = 0.02  # of the embeddings' standard deviation, around their mean
LAST_RATE = 0.1  # of the first
CHOICES = {"loss": ("l2", "var"), "normalization": ("baseline", "none"), "output": ("attention", "block")}


@dataclass(frozen=True)
class PrefixTraining:
    """How a prefix is trained. length: L. kd_weight: w above. output: whose output A is, the attention's or the whole
    block's. batch: texts of one optimizer step, run one by one."""

    length: int = 8
    learning_rate: float = 1e-3
    epochs: int = 20
    loss: str = "l2"
    normalization: str = "baseline"
    kd_weight: float = 1.0
    output: str = "attention"
    batch: int = 4
    clip: float = 1.0
    seed: int = 2

    def __post_init__(self) -> None:
        check_settings("prefix training", self, length=1, epochs=0, batch=1)
        if not 0 <= self.kd_weight < math.inf:
            raise UserError(f"prefix training kd_weight is {self.kd_weight}; give 0 or more")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"prefix training {name} {getattr(self, name)!r} is not known; choose "
                                f"{' or '.join(choices)}")  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """Means over held-out texts. outputs: mean over layers of s, relative to that without a prefix if it is normalized.
    divergence: KL in nats per token. loss: outputs + kd_weight · divergence."""

    loss: float
    outputs: float
    divergence: float


@dataclass(frozen=True, eq=False)
class TrainedPrefix:
    """prefix: what to use; embeddings: (P, d) float32, what the model read to write it. best_step: of the kept state,
    None if the discrete prefix was no worse and is what is returned. discrete, kept: their held-out figures.
    history: `step`, `loss`, `gradient`, `seconds`, and `held_out` after every epoch."""

    prefix: Prefix
    embeddings: Tensor
    best_step: int | None
    discrete: Figures
    kept: Figures
    history: list[dict[str, float]]


def train_prefix(
    model: PreTrainedModel,
    ids: Sequence[int],
    start: int,
    texts: Tensor,
    held_out: Tensor,
    training: PrefixTraining,
    *,
    attention: str = ATTENTION,
    state: Path | None = None,
    report: Report | None = None,
) -> TrainedPrefix:
    """Train a prefix on the full-precision model (or on the transformed twin) that will write it.

    ids: the discrete prefix that it starts from and is compared with, its sink ([BOS]) last. start: [BOS], which the
    model that is imitated has in front. texts, held_out: (N, T) each, without [BOS]. attention: dotted name within a
    block. state, report: as `Descent.run` has them. With epochs=0 the result is the discrete prefix.
    Raises UserError for a prefix that the model cannot hold, no text, or a loss that is no number: nothing is lost.
    """
    if not len(texts) or not len(held_out):
        raise UserError(f"{len(texts)} texts to train on and {len(held_out)} held out; at least one of each is needed")
    discrete = build_prefix(model, ids)
    table = input_embeddings(model)
    own = table[discrete.ids.to(table.device)].detach().float()
    named, first = starting_point(table, ids, training)
    build_prefix(model, named)  # refuses now what could not be written after the training
    objective = _Objective(model, start, training, attention)
    objective.normalize(texts)
    discrete_figures = objective.figures(own, held_out)
    made_of = {
        "texts": sha256_of_tensor(texts), "held_out": sha256_of_tensor(held_out), "ids": list(ids), "start": start,
        "first": sha256_of_tensor(first), "model": identity_of(model).stored(), "training": asdict(training),
    }  # fmt: skip
    learned = masters([first])
    embeddings = learned[0]
    number = math.ceil(training.epochs * len(texts) / training.batch)
    due = every(math.ceil(len(texts) / training.batch), number)
    schedule = Schedule(number, due, last_rate=LAST_RATE, clip=training.clip)
    descent = Descent([Group(learned, training.learning_rate)], schedule, "the prefix", made_of=identity(made_of, 16))

    def losses(step: int) -> Iterator[Tensor]:
        for index in shuffled(len(texts), training.batch, training.seed, step):
            yield objective.loss(embeddings, texts[index]) / training.batch

    if number:
        descent.run(losses, lambda: objective.figures(embeddings, held_out).loss, state=state, report=report)
        best = descent.best[0]
        figures = objective.figures(best, held_out)
        if figures.loss < discrete_figures.loss:
            trained = build_prefix(model, named, embeddings=best)
            return TrainedPrefix(trained, best.cpu(), descent.best_step, discrete_figures, figures, descent.history)
    return TrainedPrefix(discrete, own.cpu(), None, discrete_figures, discrete_figures, descent.history)


def starting_point(table: Tensor, ids: Sequence[int], training: PrefixTraining) -> tuple[list[int], Tensor]:
    """The tokens that L free vectors start from, and the vectors: (L, d) float32.

    table: (vocabulary, d) input embeddings. ids: the discrete prefix. All but its last token are repeated, or cut, to
    L − 1, and the last one stays last. Where it is the only one, it is followed by vectors near the mean embedding,
    which stand for no token and are named after it.
    """
    length, (*others, last) = training.length, ids
    if others or length == 1:
        named = [*(others[i % len(others)] for i in range(length - 1)), last]
        return named, table[torch.tensor(named, device=table.device)].detach().float()
    mean = table.mean(dim=0, dtype=torch.float32)
    square = torch.linalg.vector_norm(table, dtype=torch.float32) ** 2 / table.numel()
    deviation = (square - table.mean(dtype=torch.float32) ** 2).sqrt()
    noise = torch.randn(length - 1, len(mean), generator=torch.Generator().manual_seed(training.seed))
    free = mean + NOISE * deviation * noise.to(mean.device)
    return [last] * length, torch.cat([table[last : last + 1].float(), free]).detach()


def statistics(outputs: Sequence[Tensor], kind: str) -> Tensor:
    """s of every layer, (layers,) float32: mean square, or variance over tokens and channels; outputs: (T, d) each."""
    reduced = [x.float().square().mean() if kind == "l2" else x.float().var(correction=0) for x in outputs]
    return torch.stack([x.to(reduced[0].device) for x in reduced])


class _Objective:
    """The loss of a text behind embeddings. baseline: s of every layer without a prefix, (layers,)."""

    def __init__(self, model: PreTrainedModel, start: int, training: PrefixTraining, attention: str):
        self.model, self.start, self.training, self.attention = model, start, training, attention
        self.baseline: Tensor | None = None

    @torch.no_grad()
    def normalize(self, texts: Tensor) -> None:
        """Take the baseline from texts (N, T), if one is asked for."""
        if self.training.normalization == "baseline":
            empty = input_embeddings(self.model)[:0].float()
            self.baseline = torch.stack([statistics(self._run(empty, ids)[0], self.training.loss) for ids in texts])
            self.baseline = self.baseline.mean(dim=0).clamp_min(EPS)

    def loss(self, embeddings: Tensor, ids: Tensor) -> Tensor:
        """The loss of one text (T,) behind embeddings (L, d): a float32 scalar with a gradient for them."""
        outputs, divergence = self.terms(embeddings, ids)
        return outputs + self.training.kd_weight * divergence

    def terms(self, embeddings: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Both parts of the loss; the second is 0 where nobody asks for it."""
        outputs, logits = self._run(embeddings, ids)
        relative = statistics(outputs, self.training.loss)
        relative = relative if self.baseline is None else relative / self.baseline
        if not self.training.kd_weight:
            return relative.mean(), relative.new_zeros(())
        with torch.no_grad():
            begun = torch.cat([ids.new_tensor([self.start]), ids])[None].to(input_embeddings(self.model).device)
            truth = self.model(input_ids=begun, use_cache=False).logits[0, 1:].float().log_softmax(dim=-1)
        ours = logits.float().log_softmax(dim=-1)
        divergence = functional.kl_div(ours, truth, log_target=True, reduction="batchmean")
        return relative.mean(), divergence.to(relative.device)

    @torch.no_grad()
    def figures(self, embeddings: Tensor, texts: Tensor) -> Figures:
        """Means over texts (N, T)."""
        rows = [[float(x) for x in self.terms(embeddings, ids)] for ids in texts]
        outputs, divergence = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        return Figures(outputs + self.training.kd_weight * divergence, outputs, divergence)

    def _run(self, embeddings: Tensor, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """One pass over [embeddings | ids]: every layer's output, (T, d) each, and the ids' logits (T, vocabulary)."""
        read: torch.nn.Module = self.model.get_input_embeddings()
        table = input_embeddings(self.model)
        front = embeddings.to(table.device, table.dtype)
        whole = torch.cat([front, read(known_ids(ids, self.model).to(table.device))])[None]
        blocks = blocks_of(self.model)
        watched = [b.get_submodule(self.attention) for b in blocks] if self.training.output == "attention" else blocks
        outputs: list[Tensor] = []

        def keep(output: Tensor) -> None:  # of the real tokens
            outputs.append(output[0, len(embeddings) :])

        with hooked(on_output(module, keep) for module in watched):
            logits = self.model(inputs_embeds=whole, use_cache=False).logits[0, len(embeddings) :]
        return outputs, logits
