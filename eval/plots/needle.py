"""Heat maps of needles: the share of keys found by length of the prompt and depth of the needle, a panel a run."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np

from eval.plots.canvas import Output, plt
from eval.tables.needles import arm_of, bits_of, grid_of, in_order

__all__ = ["draw_needles"]

A_ROW = 4  # panels
WIDTH = 38  # characters of a title's line


def draw_needles(records: Sequence[Mapping[str, Any]], output: Output) -> None:
    """Draw finished runs of one model. A cell says the share found in per cent, and below
    it the mean log-probability of a key."""
    records = in_order(records)
    columns = min(A_ROW, len(records))
    rows = -(-len(records) // columns)
    tallest = max(len(record["settings"]["depths"]) for record in records)
    size = (3.6 * columns + 0.9, rows * (1.7 + 0.45 * tallest))
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    panels = grid.flatten()
    for axes, record in zip(panels, records, strict=False):
        image = _draw_grid(axes, record)
    for axes in panels[len(records) :]:
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=list(panels), shrink=0.85)
    bar.set_label("share of keys found", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    told = "per cent of keys found, mean log-probability of a key in nats"
    figure.suptitle(f"{records[0]['settings']['model']}: needle in a haystack; {told}", fontsize=10)
    head = ("run", "arm", "tokens", "depth", "found", "log-probability")
    output.save(figure, head, [line for record in records for line in _lines(record)])


def _draw_grid(axes: Any, record: Mapping[str, Any]) -> Any:
    """One panel: lengths from left to right, depths from top to bottom."""
    settings, cells = record["settings"], grid_of(record)
    lengths, depths = sorted(settings["lengths"]), sorted(settings["depths"])
    shares = np.array([[cells[length, depth][0] for length in lengths] for depth in depths])
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for y, depth in enumerate(depths):
        for x, length in enumerate(lengths):
            share, likelihood = cells[length, depth]
            axes.text(x, y, f"{100 * share:.0f}\n{likelihood:.1f}", ha="center", va="center", fontsize=7,
                      color="black" if share > 0.5 else "white")  # fmt: skip
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths], fontsize=8)
    axes.set_xlabel("tokens of the prompt", fontsize=8)
    axes.set_ylabel("depth of the needle", fontsize=8)
    keys = len(settings["keys"])
    told = f"{100 * record['found']:.0f} % of {len(record['results'])} found, {keys} key{'s' * (keys > 1)} a cell"
    if settings["kv"] is not None:
        bits = bits_of(record)
        told += f"\n{100 * record['quantized']:.0f} % rounded of what was read, {bits[max(bits)]:.2f} bits an element"
    axes.set_title(f"{fill(arm_of(settings), WIDTH)}\n{told}", fontsize=8)
    return image


def _lines(record: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The numbers of a panel."""
    arm = arm_of(record["settings"])
    return [
        (record["identity"], arm, length, depth, f"{share:.6g}", f"{likelihood:.6g}")
        for (length, depth), (share, likelihood) in sorted(grid_of(record).items())
    ]
