"""What the programs that train a prefix show and leave: a progress bar, the prefix with its curve, the state.

The prefix stands first: a curve or embeddings without it are somebody else's and stay.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora.targets import check_target
from quantization.programs.out_option import check_out

if TYPE_CHECKING:
    from torch import Tensor

    from intactkv.prefix import Prefix

__all__ = ["check_training_out", "keep", "state_file", "training_bar"]


@contextmanager
def training_bar(what: str, steps: int, out: Path) -> Iterator[Callable[[dict[str, float]], None]]:
    """A progress bar that shows every row of a history: the newest training and held-out loss. It begins with the first
    row, so that a state that is refused is all that is said.

    Raises UserError if another process trains the prefix of the same file: it writes the same state.
    """
    from tqdm import tqdm

    from corpora.writing import only_one

    shown: dict[str, Any] = {}
    bars: list[tqdm[Any]] = []

    def report(row: dict[str, float]) -> None:
        if not bars:
            bars.append(tqdm(total=steps, desc=what, unit="step"))
        bars[0].update(int(row["step"]) - bars[0].n)
        shown.update({key: f"{row[key]:.4g}" for key in ("loss", "held_out") if key in row})
        bars[0].set_postfix(shown)

    refusal = f"--out {out}: another process is training it; wait for that one, or name another"
    try:
        with only_one(state_file(out), refusal):
            yield report
    finally:
        for bar in bars:
            bar.close()


def state_file(out: Path) -> Path:
    """Where a training is kept until it ends."""
    return out.with_suffix(".state.safetensors")


def _curve(out: Path) -> Path:
    return out.with_suffix(".curve.jsonl")


def _embeddings(out: Path) -> Path:
    return out.with_suffix(".embeddings.safetensors")


def check_training_out(options: argparse.Namespace, *, embeddings: bool = False) -> None:
    """Refuse what a training could not write: the prefix, what is left beside it, and its state, which a killed one
    leaves without them; also one that is damaged. Raises UserError."""
    from intactkv.training import read_state

    check_out(options, "prefix", _curve(options.out), *([_embeddings(options.out)] if embeddings else []))
    check_target(state_file(options.out))
    read_state(state_file(options.out))


def keep(
    out: Path,
    prefix: "Prefix",
    history: list[dict[str, float]],
    made_of: dict[str, Any],
    embeddings: "Tensor | None" = None,
) -> Path:
    """Write what a training leaves, the prefix first: what lies beside belongs to it. Then drop the training's state.
    Returns the curve's file."""
    from dataclasses import replace

    from corpora.storage import write_artefact
    from corpora.writing import write_beside

    replace(prefix, calibrated=made_of).save(out)
    if embeddings is not None:
        write_artefact(_embeddings(out), "embeddings", made_of, {"embeddings": embeddings})
    curve = _curve(out)
    with write_beside(curve) as beside:
        beside.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in history), encoding="utf-8")
    state_file(out).unlink(missing_ok=True)
    return curve
