"""How a prefix was trained: loss of every step and held-out losses, from the curves of `intactkv calibrate` (Σ over
blocks of ½ · mean square) and `intactkv train-prefix` (attention outputs over those without a prefix, plus KL)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError
from corpora.json_files import Count
from corpora.json_lines import read_lines
from eval.plots.canvas import SERIES, Output, literal, plt

__all__ = ["draw_calibration", "read_curve"]


Loss = Annotated[float, Field(ge=0, lt=1e300)]


class _Row(TypedDict):
    step: Count
    loss: NotRequired[Loss]
    held_out: NotRequired[Loss]
    gradient: NotRequired[Loss]
    seconds: NotRequired[Loss]


def read_curve(path: Path) -> list[dict[str, float]]:
    """The rows of a .curve.jsonl file. Raises UserError if it is missing or something else."""
    whose = "name a .curve.jsonl that `python -m intactkv calibrate` or train-prefix wrote beside its prefix"
    if path.suffix != ".jsonl":
        raise UserError(f"{path} is no curve of a calibration; {whose}")
    rows: list[dict[str, float]] = read_lines(path, "the curve", _Row, mend=whose)
    if not all("loss" in row or "held_out" in row for row in rows):
        raise UserError(f"{path} is no curve of a calibration: it has no losses; {whose}")
    return rows


def draw_calibration(curves: Sequence[Path], output: Output) -> None:
    """One line a file: held-out losses relative to those before training, and the steps' own losses, faint."""
    names = [path.name.removesuffix(".curve.jsonl") for path in curves]
    if len(set(names)) < len(names):  # in two folders, or one file twice
        names = [str(path) for path in dict.fromkeys(curves)]
    found = dict(zip(names, map(read_curve, dict.fromkeys(curves)), strict=True))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.0, 4.0))
    table: list[tuple[Any, ...]] = []
    for index, (name, rows) in enumerate(found.items()):
        colour = SERIES[index % len(SERIES)]
        steps = [row for row in rows if "loss" in row]
        held_out = [row for row in rows if "held_out" in row]
        left.plot([r["step"] for r in steps], [r["loss"] for r in steps], color=colour, linewidth=1.2)
        first = next((r["held_out"] for r in held_out), 0.0) or math.nan  # to a loss of 0 nothing is relative
        changes = [100 * (r["held_out"] / first - 1) for r in held_out]
        right.plot([r["step"] for r in held_out], changes, color=colour, marker="o", markersize=4, label=literal(name))
        fields = ("step", "loss", "gradient", "seconds", "held_out")
        table += [(name, *(row.get(field, "") for field in fields)) for row in rows]
    left.set_ylabel("loss of the step's texts")
    right.set_ylabel("held-out loss, change in %")
    right.axhline(0, color="0.5", linewidth=0.8, linestyle="--")
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=8)  # of both: on the left the lines leave no room
    figure.tight_layout()
    output.save(figure, ("curve", "step", "loss", "gradient norm", "seconds", "held-out loss"), table)
