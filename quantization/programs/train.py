"""The program that trains a prefix's embeddings in full precision: text in, a prefix file and its curve out."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora.errors import UserError
from quantization.programs.options import (
    add_calibration_options,
    add_dtype_option,
    add_model_options,
    add_prefix_option,
    add_recipe_options,
)

if TYPE_CHECKING:
    from torch import Tensor

    from intactkv.trainable import TrainedPrefix
    from quantization.runs.plan import Plan

__all__ = ["DESCRIPTION", "add_options", "held_out_pieces", "train_prefix_file"]

DESCRIPTION = """\
Train the embeddings of a prefix on the full-precision model (on a recipe's transformed twin with --recipe), so that
attention behind it gives small, even outputs and the logits stay those behind [BOS]. Nothing else is trained. It starts
from the discrete prefix and is returned only if it is better on held-out text. The file is an ordinary prefix: every
program takes it as --prefix FILE. A killed run goes on where it stopped.
"""
RUN_OF_TOKENS = 32  # that two pieces share if they overlap in the text


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of `train-prefix`."""
    add_model_options(command)
    add_recipe_options(command)
    add_calibration_options(command)
    add_prefix_option(command)
    add_dtype_option(command)
    text = command.add_argument_group("text")
    text.add_argument(
        "--corpus", metavar="NAME|FILE", help="random pieces of which text (default: the model's own, or pile)"
    )
    text.add_argument("--samples", type=int, metavar="N", help="pieces to train on (default: the model's own, or 512)")
    text.add_argument(
        "--held-out", type=int, metavar="N", help="to choose the best state by (default: an eighth, at least 4)"
    )
    text.add_argument("--length", type=int, metavar="T", help="tokens of a piece (default: the model's own, or 1024)")
    group = command.add_argument_group("training")
    group.add_argument("--prefix-len", type=int, default=8, metavar="L", help="trained positions (default: 8)")
    group.add_argument("--prefix-lr", type=float, default=1e-3, metavar="R",
                       help="learning rate, falling to a tenth (default: 1e-3)")  # fmt: skip
    group.add_argument("--prefix-epochs", type=int, default=20, metavar="N", help="over the pieces (default: 20)")
    group.add_argument("--prefix-loss-type", choices=["l2", "var"], default="l2",
                       help="of the attention outputs: mean square or variance (default: l2)")  # fmt: skip
    group.add_argument("--prefix-loss-norm", choices=["baseline", "none"], default="baseline",
                       help="divide each layer's by that without a prefix, or not (default: baseline)")  # fmt: skip
    group.add_argument("--prefix-kd-weight", type=float, default=1.0, metavar="W",
                       help="of KL(model behind [BOS] ‖ model behind the prefix); 0 is the published idea (default: 1)",
                       )  # fmt: skip
    group.add_argument("--prefix-output", choices=["attention", "block"], default="attention",
                       help="whose outputs (default: attention)")  # fmt: skip
    group.add_argument("--batch-size", type=int, default=4, metavar="N", help="pieces of a step (default: 4)")
    group.add_argument("--training-seed", type=int, default=2, metavar="S", help="of pieces and order (default: 2)")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="prefix file to write, *.safetensors")


def train_prefix_file(options: argparse.Namespace) -> None:
    """Train, then write FILE, FILE's stem + .curve.jsonl and .embeddings.safetensors, and drop the state of the run."""
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out {options.out}: a prefix file ends in .safetensors")
    from dataclasses import asdict, replace

    from tqdm import tqdm

    from corpora.machine import peak_memory_mb
    from corpora.storage import write_beside, write_tensors
    from corpora.text import start_token_id
    from intactkv.architecture import architecture_of
    from intactkv.discover import down_maxima, largest_ratios
    from intactkv.prefix import Prefix, build_prefix
    from intactkv.trainable import PrefixTraining, train_prefix
    from quantization.programs.options import chosen_device, chosen_dtype, chosen_recipe, show_log
    from quantization.runs.plan import find_checkpoint, plan_run

    show_log()
    if options.out.exists():
        Prefix.load(options.out)  # replaces an older prefix, and refuses to replace anything else
    training = PrefixTraining(
        length=options.prefix_len,
        learning_rate=options.prefix_lr,
        epochs=options.prefix_epochs,
        loss=options.prefix_loss_type,
        normalization=options.prefix_loss_norm,
        kd_weight=options.prefix_kd_weight,
        output=options.prefix_output,
        batch=options.batch_size,
        seed=options.training_seed,
    )
    options.prefix = options.prefix or "auto"
    plan = plan_run(
        options.model,
        chosen_recipe(options, find_checkpoint(options.model)),
        device=chosen_device(options.device),
        dtype=chosen_dtype(options.dtype),
    )
    if not plan.choice.ids:
        raise UserError("--prefix none: a trained prefix starts from a discrete one; leave it out (auto), or name bos")
    texts, held_out, drawn = _texts(options, plan)
    model = plan.twin()
    architecture = architecture_of(model.config)
    state = options.out.with_suffix(".state.safetensors")
    rows = -(-training.epochs * len(texts) // training.batch)
    with tqdm(total=rows, desc="training the prefix", unit="step") as bar:

        def report(row: dict[str, float]) -> None:
            bar.update(int(row["step"]) - bar.n)
            shown.update({key: f"{row[key]:.4g}" for key in ("loss", "held_out") if key in row})
            bar.set_postfix(shown)

        shown: dict[str, Any] = {}
        outcome = train_prefix(
            model,
            plan.choice.ids,
            start_token_id(plan.tokenizer),
            texts,
            held_out,
            training,
            attention=architecture.attention,
            state=state,
            report=report,
        )
    down = architecture.linears[-1][-1]
    ratios = [
        max(largest_ratios(down_maxima(model, held_out, prefix, linear=down)))
        for prefix in (None, build_prefix(model, plan.choice.ids), outcome.prefix)
    ]
    made_of = {
        "for": plan.describe(),
        "embeddings": asdict(training),
        "text": drawn,
        "best_step": outcome.best_step,
        "held_out": {"discrete": asdict(outcome.discrete), "kept": asdict(outcome.kept)},
        "largest_ratio": dict(zip(("none", "discrete", "kept"), ratios, strict=True)),
    }
    replace(outcome.prefix, calibrated=made_of).save(options.out)
    write_tensors(options.out.with_suffix(".embeddings.safetensors"), {"embeddings": outcome.embeddings})
    curve = options.out.with_suffix(".curve.jsonl")
    with write_beside(curve) as beside:
        beside.write_text("".join(json.dumps(row) + "\n" for row in outcome.history), encoding="utf-8")
    state.unlink(missing_ok=True)
    print(_table(plan, outcome, ratios))
    print(f"peak memory {peak_memory_mb(plan.device.type):.0f} MB\n{options.out}  {curve}")


def _texts(options: argparse.Namespace, plan: "Plan") -> tuple["Tensor", "Tensor", dict[str, Any]]:
    """Pieces to train on and held-out ones, and where they come from. Raises UserError for what does not fit."""
    from corpora.catalog import CalibrationText, model_defaults
    from corpora.storage import sha256_of_tensor
    from corpora.text import calibration_segments

    # PrefixQuant fine-tunes on 512 × 1024 tokens of the Pile, with an eighth of that to validate.
    own = model_defaults(plan.checkpoint.family_name).default_calibration or CalibrationText("pile", 512, 1024)
    corpus = options.corpus or own.corpus
    samples = own.samples if options.samples is None else options.samples
    length = own.length if options.length is None else options.length
    others = max(4, samples // 8) if options.held_out is None else options.held_out
    if others < 1:
        raise UserError(f"--held-out {others}: the best state needs 1 piece or more")
    if plan.context is not None and options.prefix_len + length > plan.context:
        raise UserError(
            f"--length {length}: {options.prefix_len + length} tokens with the prefix do not fit the {plan.context} "
            f"positions of {plan.checkpoint.name}; use fewer"
        )

    draws = calibration_segments(
        plan.tokenizer, corpus, samples=max(samples, 0) + 8 * others, length=length, seed=options.training_seed
    )
    texts = draws[: max(samples, 0)]
    held_out = held_out_pieces(texts, draws[len(texts) :], others)
    drawn = {"corpus": Path(corpus).name if Path(corpus).exists() else corpus, "samples": samples, "held_out": others,
             "length": length, "seed": options.training_seed, "sha256": sha256_of_tensor(texts)}  # fmt: skip
    return texts, held_out, drawn


def held_out_pieces(texts: "Tensor", candidates: "Tensor", count: int) -> "Tensor":
    """The first `count` candidates (…, T) that share no run of tokens with the texts (N, T): random pieces overlap.

    Raises UserError if there are not so many.
    """
    size = min(RUN_OF_TOKENS, texts.shape[1])

    def runs(piece: "Tensor") -> set[tuple[int, ...]]:
        return {tuple(run) for run in piece.unfold(0, size, 1).tolist()}

    seen = set().union(*(runs(piece) for piece in texts))
    kept = [piece for piece in candidates if not runs(piece) & seen][:count]
    if len(kept) < count:
        raise UserError(
            f"only {len(kept)} of {len(candidates)} more pieces overlap none of the {len(texts)} to train on, but "
            f"{count} are to be held out; give a longer text, or fewer or shorter pieces"
        )
    import torch

    return torch.stack(kept)


def _table(plan: "Plan", outcome: "TrainedPrefix", ratios: list[float]) -> str:
    """Discrete and kept prefix, on the held-out pieces."""
    kept = f"trained, step {outcome.best_step}" if outcome.best_step is not None else "the same"
    rows = [("none", None, None, ratios[0]),
            (f"discrete {plan.choice.label}", plan.choice.ids, outcome.discrete, ratios[1]),
            (kept, outcome.prefix.ids.tolist(), outcome.kept, ratios[2])]  # fmt: skip
    lines = [f"{'held out':<20}  {'tokens':>6}  {'loss':>8}  {'outputs':>8}  {'KL':>8}  {'largest ratio':>13}"]
    for name, ids, figures, ratio in rows:
        cells = ["n/a"] * 3 if figures is None else [
            f"{x:.4f}" for x in (figures.loss, figures.outputs, figures.divergence)
        ]  # fmt: skip
        lines.append(f"{name:<20}  {len(ids or ()):>6}  {'  '.join(f'{cell:>8}' for cell in cells)}  {ratio:>13.1f}")
    if outcome.best_step is None:
        lines.append("training found nothing better on the held-out pieces than the discrete prefix, which is written")
    return "\n".join(lines)
