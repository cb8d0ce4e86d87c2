"""What every figure shares: a headless canvas, colours, and the atomic pair of picture and numbers."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from corpora.storage import write_beside

__all__ = ["BEHIND", "INTACT", "SERIES", "VANILLA", "plt", "save"]

# Okabe and Ito's vermilion, blue and green: told apart with any colour vision.
VANILLA = "#d55e00"
INTACT = "#0072b2"
BEHIND = "#009e73"
SERIES = (INTACT, "#e69f00", BEHIND, VANILLA)


def save(figure: Any, path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write `path` (PNG) and the numbers in it as CSV under the same name, both atomically; closes the figure."""
    with write_beside(path) as beside:
        figure.savefig(beside, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    with write_beside(path.with_suffix(".csv")) as beside:
        beside.write_text(text.getvalue(), encoding="utf-8")
