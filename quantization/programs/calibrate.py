"""The program that trains a prefix for a quantized model: conversations in, a prefix file and its curve out."""

import argparse
import json
from pathlib import Path
from typing import Any

from corpora.errors import UserError
from quantization.programs.options import (
    add_calibration_options,
    add_model_options,
    add_recipe_options,
    add_run_options,
)

__all__ = ["add_options", "calibrate_prefix"]

DESCRIPTION = """\
Train the keys and values of a prefix for a quantized model: the outputs of its decoder blocks on the assistant's tokens
come closer to those of the full-precision twin. Nothing else is trained. A killed run goes on where it stopped; the
state with the lowest loss on held-out conversations is kept.
"""


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of `calibrate`."""
    add_model_options(command)
    add_recipe_options(command)
    add_calibration_options(command)
    add_run_options(command)
    text = command.add_argument_group("conversations")
    text.add_argument(
        "--conversations",
        choices=["sharegpt", "sample"],
        help="sharegpt: the published data; sample: made from the sample text by a rule (default: sharegpt, but sample "
        "for the embedded model)",
    )
    text.add_argument("--samples", type=int, default=128, metavar="N", help="to train on (default: 128)")
    text.add_argument("--held-out", type=int, default=16, metavar="N", help="to choose the best state by (default: 16)")
    text.add_argument("--max-length", type=int, default=1024, metavar="T", help="tokens of one (default: 1024)")
    text.add_argument("--min-assistant", type=int, default=50, metavar="T",
                      help="assistant's tokens that one must have more than (default: 50)")  # fmt: skip
    training = command.add_argument_group("training")
    training.add_argument("--steps", type=int, default=160, metavar="N", help="optimizer steps (default: 160)")
    training.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="conversations of a step (default: 16)"
    )
    training.add_argument("--learning-rate", type=float, default=2e-4, metavar="R", help="constant (default: 2e-4)")
    training.add_argument("--evaluate-every", type=int, default=8, metavar="N",
                          help="steps between held-out losses (default: 8)")  # fmt: skip
    training.add_argument("--training-seed", type=int, default=42, metavar="S", help="of data and order (default: 42)")
    training.add_argument("--checkpointing", action="store_true",
                          help="compute blocks again for their gradients instead of keeping activations")  # fmt: skip
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="prefix file to write, *.safetensors")


def calibrate_prefix(options: argparse.Namespace) -> None:
    """Train; write FILE (the best state) and FILE's stem + .curve.jsonl; drop the state of the run; print what the
    training changed on held-out conversations, and what it took."""
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out {options.out}: a prefix file ends in .safetensors")
    from dataclasses import asdict, replace

    from tqdm import tqdm

    from corpora.catalog import model_defaults
    from corpora.conversations import conversations
    from corpora.machine import peak_memory_mb
    from corpora.storage import write_beside
    from corpora.tokens import start_token_id
    from intactkv.calibrate import Sample, Training, calibrate, mean_losses
    from intactkv.prefix import Prefix
    from quantization.programs.options import chosen_device, chosen_dtype, chosen_recipe, show_log
    from quantization.runs.plan import find_checkpoint, plan_run

    show_log()
    if options.out.exists():
        Prefix.load(options.out)  # replaces an older prefix, and refuses to replace anything else
    plan = plan_run(
        options.model,
        chosen_recipe(options, find_checkpoint(options.model)),
        device=chosen_device(options.device),
        dtype=chosen_dtype(options.dtype),
        packed=options.packed,
    )
    if not plan.choice.ids or options.vanilla:
        raise UserError("calibrate trains an intact prefix; name one, for example --prefix prompt, without --vanilla")
    if options.max_length <= len(plan.choice.ids):
        raise UserError(
            f"--max-length {options.max_length} leaves no token behind the prefix of {len(plan.choice.ids)}"
        )
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
    model = plan.load()
    if model.prefix is None:
        raise AssertionError("a plan with a prefix that is not vanilla attaches it")
    twin, untrained = plan.twin(), model.prefix
    train, unseen = ([Sample(chat.ids, chat.assistant) for chat in part] for part in (chats, others))
    state = options.out.with_suffix(".state.safetensors")
    with tqdm(total=training.steps, desc="calibrating", unit="step") as bar:

        def report(row: dict[str, float]) -> None:
            bar.update(int(row["step"]) - bar.n)
            figures: dict[str, Any] = {key: f"{row[key]:.4g}" for key in ("loss", "held_out") if key in row}
            bar.set_postfix(figures | {key: value for key, value in shown.items() if key not in figures})
            shown.update(figures)

        shown: dict[str, Any] = {}
        outcome = calibrate(
            model.model, twin, untrained, train, unseen, training, kv=model.kv, state=state, models=plan.describe(),
            report=report,
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
    replace(outcome.best, calibrated=made_of).save(options.out)
    curve = options.out.with_suffix(".curve.jsonl")
    with write_beside(curve) as beside:
        outcome.history[-1]["peak_memory_mb"] = memory
        beside.write_text("".join(json.dumps(row) + "\n" for row in outcome.history), encoding="utf-8")
    state.unlink(missing_ok=True)
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
