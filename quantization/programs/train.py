"""The programs that train a prefix: `calibrate` its keys and values, `train-prefix` its embeddings.

Both read text, train what stands in front of a frozen model, and leave three things: the prefix with the lowest
held-out loss, its curve (FILE's stem + .curve.jsonl), and, until they end, the state that a killed run goes on from.
"""

import argparse
from typing import TYPE_CHECKING, Any

from corpora import values
from corpora.errors import UserError
from quantization.programs.options import add_plan_options, plan_of
from quantization.programs.training_files import check_training_out, keep, state_file, training_bar

if TYPE_CHECKING:
    from torch import Tensor

    from intactkv.prefix import Prefix
    from intactkv.trainable import TrainedPrefix
    from quantization.runs.plan import Plan

__all__ = ["CALIBRATE", "TRAIN_PREFIX", "add_calibrate_options", "add_train_options", "calibrate_prefix",
           "held_out_pieces", "train_prefix_file"]  # fmt: skip

CALIBRATE = """\
Train the keys and values of a prefix for a quantized model: the outputs of its decoder blocks on the assistant's tokens
come closer to those of the full-precision twin. Nothing else is trained. A killed run goes on where it stopped; the
state with the lowest loss on held-out conversations is kept.
"""
TRAIN_PREFIX = """\
Train the embeddings of a prefix on the full-precision model (on a recipe's transformed twin with --recipe), so that
attention behind it gives small, even outputs and the logits stay those behind [BOS]. Nothing else is trained. It starts
from the discrete prefix and is returned only if it is better on held-out text. The file is an ordinary prefix: every
program takes it as --prefix FILE. A killed run goes on where it stopped.
"""
RUN_OF_TOKENS = 32  # that two pieces share if they overlap in the text


# Keys and values ------------------------------------------------------------------------------------------------------


def add_calibrate_options(command: argparse.ArgumentParser) -> None:
    """The options of `calibrate`."""
    add_plan_options(command)
    text = command.add_argument_group("conversations")
    text.add_argument(
        "--conversations",
        choices=["sharegpt", "sample"],
        help="sharegpt: the published data; sample: made from the sample text by a rule (default: sharegpt, but sample "
        "for the embedded model)",
    )
    text.add_argument("--samples", type=values.count(), default=128, metavar="N", help="to train on (default: 128)")
    text.add_argument(
        "--held-out", type=values.count(), default=16, metavar="N", help="to choose the best state by (default: 16)"
    )
    text.add_argument(
        "--max-length", type=values.count(), default=1024, metavar="T", help="tokens of one (default: 1024)"
    )
    text.add_argument("--min-assistant", type=values.count(0), default=50, metavar="T",
                      help="assistant's tokens that one must have more than (default: 50)")  # fmt: skip
    training = command.add_argument_group("training")
    training.add_argument(
        "--steps", type=values.count(), default=160, metavar="N", help="optimizer steps (default: 160)"
    )
    training.add_argument(
        "--batch-size", type=values.count(), default=16, metavar="N", help="conversations of a step (default: 16)"
    )
    training.add_argument(
        "--learning-rate",
        type=values.number(above=0, like="2e-4"),
        default=2e-4,
        metavar="R",
        help="constant (default: 2e-4)",
    )
    training.add_argument("--evaluate-every", type=values.count(), default=8, metavar="N",
                          help="steps between held-out losses (default: 8)")  # fmt: skip
    training.add_argument(
        "--training-seed", type=values.seed, default=42, metavar="S", help="of data and order (default: 42)"
    )
    training.add_argument("--checkpointing", action="store_true",
                          help="compute blocks again for their gradients instead of keeping activations")  # fmt: skip
    command.add_argument(
        "--out", type=values.path, required=True, metavar="FILE", help="prefix file to write, *.safetensors"
    )


def calibrate_prefix(options: argparse.Namespace) -> None:
    """Train; write FILE (the best state) and FILE's stem + .curve.jsonl; drop the state of the run; print what the
    training changed on held-out conversations, and what it took."""
    check_training_out(options)
    plan = plan_of(options, needs_prefix="calibrate trains an intact prefix")

    from dataclasses import asdict

    import torch

    from corpora.catalog import model_defaults
    from corpora.conversations import conversations
    from corpora.machine import peak_memory_mb
    from corpora.tokens import start_token_id
    from intactkv.calibrate import Sample, Training, calibrate, check_samples, mean_losses

    if options.max_length <= len(plan.choice.ids):
        raise UserError(
            f"--max-length {options.max_length} leaves no token behind the prefix of {len(plan.choice.ids)}"
        )
    plan.check_fits("--max-length", options.max_length, options.max_length)
    training = Training(
        steps=options.steps,
        batch=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.training_seed,
        evaluate_every=options.evaluate_every,
        checkpointing=options.checkpointing,
    )
    source = options.conversations or model_defaults(plan.checkpoint.family_name).default_conversations
    chats, others = conversations(
        plan.tokenizer,
        source,
        samples=options.samples,
        held_out=options.held_out,
        max_length=options.max_length,
        min_assistant=options.min_assistant,
        seed=options.training_seed,
    )
    train, unseen = ([Sample(chat.ids, chat.assistant) for chat in part] for part in (chats, others))
    check_samples(train, unseen, torch.tensor(plan.choice.ids))  # before anything is quantized
    model = plan.load()
    if model.prefix is None:
        raise AssertionError("a plan with a prefix that is not vanilla attaches it")
    twin, untrained = plan.twin(), model.prefix
    with training_bar("calibrating", training.steps, options.out) as report:
        outcome = calibrate(
            model.model, twin, untrained, train, unseen, training, kv=model.kv, state=state_file(options.out),
            models=plan.describe(), report=report,
        )  # fmt: skip
    memory = round(peak_memory_mb(plan.device.type), 1)
    held_out = [row["held_out"] for row in outcome.history if "held_out" in row]
    # On the same tokens: the prefix before it was trained, its [BOS] alone, and no prefix at all.
    arms: dict[str, Prefix | None] = {"vanilla": None}
    if len(untrained) > 1 and int(untrained.ids[0]) == start_token_id(plan.tokenizer):
        arms["bos"] = untrained.first(1)
    losses = dict(zip(arms, mean_losses(model.model, twin, list(arms.values()), unseen, model.kv), strict=True))
    losses |= {"before": held_out[0], "best": min(held_out), "last": held_out[-1]}
    made_of = {
        "for": plan.describe(),
        "training": asdict(training),
        "conversations": {"source": source, "samples": len(train), "held_out": len(unseen),
                          "max_length": options.max_length},
        "best_step": outcome.best_step,
        "held_out": losses,
    }  # fmt: skip
    outcome.history[-1]["peak_memory_mb"] = memory
    curve = keep(options.out, outcome.best, outcome.history, made_of)
    label = plan.choice.label
    names = {
        "vanilla": "vanilla",
        "bos": "[B] intact",
        "before": f"{label} before training",
        "best": f"{label} trained, step {outcome.best_step} (kept)",
        "last": f"{label} trained, step {training.steps}",
    }
    print(f"held-out loss, sum over {len(untrained.keys)} blocks of ½ · mean square, {len(unseen)} conversations")
    for arm, loss in losses.items():
        print(f"  {names[arm]:<32} {loss:10.5g}")
    print(f"{_cost(outcome.history, training.batch, memory)}\n{options.out}  {curve}")


def _cost(history: list[dict[str, float]], batch: int, memory: float) -> str:
    """Seconds of the steps, also of those before a kill, and the peak memory of this process in MB."""
    from statistics import median

    seconds = [row["seconds"] for row in history if "seconds" in row]
    return (
        f"{median(seconds):.3g} s a step of {batch} conversations (median of {len(seconds)}), {sum(seconds):.4g} s in "
        f"all, peak memory {memory:.0f} MB"
    )


# Embeddings -----------------------------------------------------------------------------------------------------------


def add_train_options(command: argparse.ArgumentParser) -> None:
    """The options of `train-prefix`."""
    add_plan_options(command, run=False)
    text = command.add_argument_group("text")
    text.add_argument(
        "--corpus",
        type=values.name,
        metavar="NAME|FILE",
        help="random pieces of which text (default: the model's own, or pile)",
    )
    text.add_argument(
        "--samples", type=values.count(), metavar="N", help="pieces to train on (default: the model's own, or 512)"
    )
    text.add_argument(
        "--held-out",
        type=values.count(),
        metavar="N",
        help="to choose the best state by (default: an eighth, at least 4)",
    )
    text.add_argument(
        "--length", type=values.count(), metavar="T", help="tokens of a piece (default: the model's own, or 1024)"
    )
    group = command.add_argument_group("training")
    group.add_argument(
        "--prefix-len", type=values.count(), default=8, metavar="L", help="trained positions (default: 8)"
    )
    group.add_argument("--prefix-lr", type=values.number(above=0, like="1e-3"), default=1e-3, metavar="R",
                       help="learning rate, falling to a tenth (default: 1e-3)")  # fmt: skip
    group.add_argument(
        "--prefix-epochs", type=values.count(), default=20, metavar="N", help="over the pieces (default: 20)"
    )
    group.add_argument("--prefix-loss-type", choices=["l2", "var"], default="l2",
                       help="of the attention outputs: mean square or variance (default: l2)")  # fmt: skip
    group.add_argument("--prefix-loss-norm", choices=["baseline", "none"], default="baseline",
                       help="divide each layer's by that without a prefix, or not (default: baseline)")  # fmt: skip
    group.add_argument("--prefix-kd-weight", type=values.number(least=0), default=1.0, metavar="W",
                       help="of KL(model behind [BOS] ‖ model behind the prefix); 0 leaves it out (default: 1)",
                       )  # fmt: skip
    group.add_argument("--prefix-output", choices=["attention", "block"], default="attention",
                       help="whose outputs (default: attention)")  # fmt: skip
    group.add_argument(
        "--batch-size", type=values.count(), default=4, metavar="N", help="pieces of a step (default: 4)"
    )
    group.add_argument(
        "--training-seed", type=values.seed, default=2, metavar="S", help="of pieces and order (default: 2)"
    )
    command.add_argument(
        "--out", type=values.path, required=True, metavar="FILE", help="prefix file to write, *.safetensors"
    )


def train_prefix_file(options: argparse.Namespace) -> None:
    """Train, then write FILE, FILE's stem + .curve.jsonl and .embeddings.safetensors, and drop the state of the run."""
    check_training_out(options, embeddings=True)

    from dataclasses import asdict, replace

    from corpora.machine import peak_memory_mb
    from corpora.text import start_token_id
    from intactkv.architecture import architecture_of
    from intactkv.discover import down_maxima, largest_ratios
    from intactkv.prefix import build_prefix
    from intactkv.trainable import PrefixTraining, train_prefix
    from quantization.runs.prefixes import searched_in

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
    if options.corpus is not None:
        options.prefix = searched_in(options.prefix, options.corpus)
    plan = plan_of(options, needs_prefix="a trained prefix starts from a discrete one", makes="twin")
    texts, held_out, drawn = _texts(options, plan)
    model = plan.twin()
    architecture = architecture_of(model.config)
    steps = -(-training.epochs * len(texts) // training.batch)
    with training_bar("training the prefix", steps, options.out) as report:
        outcome = train_prefix(
            model,
            plan.choice.ids,
            start_token_id(plan.tokenizer),
            texts,
            held_out,
            training,
            attention=architecture.attention,
            state=state_file(options.out),
            report=report,
        )
    ratios = [
        max(largest_ratios(down_maxima(model, held_out, prefix)))
        for prefix in (None, build_prefix(model, plan.choice.ids), outcome.prefix)
    ]
    made_of = {
        "for": replace(plan, recipe=plan.recipe.twin).describe(),
        "discrete": list(plan.choice.ids),
        "embeddings": asdict(training),
        "text": drawn,
        "best_step": outcome.best_step,
        "held_out": {"discrete": asdict(outcome.discrete), "kept": asdict(outcome.kept)},
        "largest_ratio": dict(zip(("none", "discrete", "kept"), ratios, strict=True)),
    }
    curve = keep(options.out, outcome.prefix, outcome.history, made_of, outcome.embeddings)
    print(_table(plan, outcome, ratios))
    print(f"peak memory {peak_memory_mb(plan.device.type):.0f} MB\n{options.out}  {curve}")


def _texts(options: argparse.Namespace, plan: "Plan") -> tuple["Tensor", "Tensor", dict[str, Any]]:
    """Pieces to train on and held-out ones, and where they come from. Raises UserError for what does not fit."""
    from corpora.catalog import CalibrationText, model_defaults
    from corpora.storage import sha256_of_tensor
    from corpora.text import calibration_segments, corpus_label

    # PrefixQuant fine-tunes on 512 × 1024 tokens of the Pile, with an eighth of that to validate.
    own = model_defaults(plan.checkpoint.family_name).default_calibration or CalibrationText("pile", 512, 1024)
    corpus = options.corpus or own.corpus
    samples = own.samples if options.samples is None else options.samples
    length = own.length if options.length is None else options.length
    others = max(4, samples // 8) if options.held_out is None else options.held_out
    plan.check_fits("--length", options.prefix_len + length, length)
    draws = calibration_segments(
        plan.tokenizer, corpus, samples=samples + 8 * others, length=length, seed=options.training_seed
    )
    plan.check_fits("--length", len(plan.choice.ids) + length, length)  # the discrete prefix is compared with
    texts = draws[:samples]
    held_out = held_out_pieces(texts, draws[len(texts) :], others)
    drawn = {"corpus": corpus_label(corpus), "samples": samples, "held_out": others,
             "length": length, "seed": options.training_seed, "sha256": sha256_of_tensor(texts)}  # fmt: skip
    return texts, held_out, drawn


def held_out_pieces(texts: "Tensor", candidates: "Tensor", count: int) -> "Tensor":
    """The first `count` candidates (…, T) that share no run of tokens with the texts (N, T): random pieces overlap.

    Raises UserError if there are not so many.
    """
    if count < 1:
        raise UserError(f"{count} pieces to hold out; give 1 or more")
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
