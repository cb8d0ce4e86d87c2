"""Reports over depth: errors in dB per block, what the pivots take. Each figure shows the rows of one report.

Exact values (SQNR +inf) have no place on an axis: they are left out, and the legend says where all of them are.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from eval.inside.reports import by, mean_sqnr
from eval.plots.canvas import BEHIND, GREY, INTACT, SERIES, VANILLA, Output, plt
from quantization.labels import kv_label

__all__ = ["draw"]

Row = dict[str, Any]
ARMS = {"vanilla": VANILLA, "intact": INTACT}
STYLES = ("-", "--", ":")  # of the linears that read one input, of groups of tokens


def draw(kind: str, figures: Row, stem: Path) -> list[Path]:
    """Draw the figures of a record of `python -m eval stats`, `STEM__figure` with the drawn numbers as CSV beside.
    Returns the files."""
    drawn, head, rows = FIGURES[kind](figures)
    settings = figures["settings"]
    kv = "" if settings["kv"] is None else f", KV {kv_label(settings['kv'])}"
    prefix = "" if settings["prefix"]["label"] == "none" else f", prefix {settings['prefix']['label']}"
    drawn.suptitle(
        f"{settings['model']}, weights {settings['weights']}{kv}{prefix}: {figures['windows']} × {settings['window']} "
        f"tokens of {settings['corpus']}",
        fontsize=9,
    )
    output = Output(stem)
    output.save(drawn, head, rows, "figure")
    return output.written


def _panels(titles: Sequence[str], what: str = "SQNR in dB", share: bool = True) -> tuple[Any, list[Any]]:
    """Axes side by side over the blocks."""
    figure, grid = plt.subplots(1, len(titles), figsize=(1.5 + 3.6 * len(titles), 3.9), sharey=share, squeeze=False)
    panels = list(grid[0])
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(what)
    return figure, panels


def _line(axes: Any, values: Sequence[float], label: str, colour: str, style: str = "-", marker: str = "o") -> None:
    """A curve over the blocks; what is not finite is a gap, and a curve of nothing else only a word in the legend."""
    if all(math.isnan(value) for value in values):
        return
    shown = [value if math.isfinite(value) else math.nan for value in values]
    exact = all(value == math.inf for value in values)
    axes.plot(shown, style, color=colour, marker=marker, markersize=2.5, linewidth=1.2,
              label=f"{label}: exact" if exact else label)  # fmt: skip


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    """One legend below all panels; a label that several panels share stands in it once."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries, ncols=min(len(entries), 4), loc="upper center", frameon=False, fontsize=8,
                  bbox_to_anchor=(0.5, 0.0))  # fmt: skip


def _linears(figures: Row) -> tuple[Any, Sequence[str], list[Sequence[Any]]]:
    figure, panels = _panels(("weight", "output, for the same input"))
    colours: dict[tuple[float, ...], tuple[str, int]] = {}
    for name, mine in by(figures["rows"], "linear").items():
        reads = tuple(row["mean_x"] for row in mine)  # linears of one input share a colour
        colour, count = colours.get(reads, (SERIES[len(colours) % len(SERIES)], 0))
        colours[reads] = colour, count + 1
        for axes, what in zip(panels, ("sqnr_w", "sqnr_o"), strict=True):
            label = name.rpartition(".")[2]
            _line(axes, [row[what] for row in mine], label, colour, STYLES[count % len(STYLES)])
    _legend(figure, panels[:1])
    return (
        figure,
        ("block", "linear", "sqnr_w", "sqnr_o"),
        [[row[key] for key in ("block", "linear", "sqnr_w", "sqnr_o")] for row in figures["rows"]],
    )


CURVES = {
    "own": "own error of the linears (mean)",
    "input": "accumulated error of their inputs (mean)",
    "output": "error of the block's output",
}


def _distance(figures: Row) -> tuple[Any, Sequence[str], list[Sequence[Any]]]:
    figure, panels = _panels(tuple(CURVES.values()))
    rows: list[Sequence[Any]] = []
    for (arm, curve), mine in by(figures["rows"], "arm", "curve").items():
        for what, style, marker, label in (
            ("sqnr", "-", "o", "all tokens"),
            ("median_token_sqnr", ":", "", "median token"),
        ):
            blocks = {block: mean_sqnr(row[what] for row in its) for block, its in by(mine, "block").items()}
            _line(panels[list(CURVES).index(curve)], list(blocks.values()), f"{arm}, {label}", ARMS[arm], style,
                  marker)  # fmt: skip
            rows += [(arm, curve, label, block, value) for block, value in blocks.items()]
    _legend(figure, panels)
    return figure, ("arm", "curve", "tokens", "block", "sqnr"), rows


def _kv(figures: Row) -> tuple[Any, Sequence[str], list[Sequence[Any]]]:
    titles = {"k_sqnr": "keys", "v_sqnr": "values", "attention_sqnr": "what attention returns"}
    figure, panels = _panels(tuple(titles.values()))
    styles = {"rest": "-", "pivots": "--", "prefix": ":"}
    for (arm, group), mine in by(figures["rows"], "arm", "group").items():
        for axes, what in zip(panels, titles, strict=True):
            _line(axes, [row[what] for row in mine], f"{arm}, {group}", ARMS[arm], styles[group])
    _legend(figure, panels)
    head = ("arm", "group", "block", *titles)
    return figure, head, [[row[key] for key in head] for row in figures["rows"]]


def _pivots(figures: Row) -> tuple[Any, Sequence[str], list[Sequence[Any]]]:
    rows = figures["rows"]
    titles = ("attention mass on the pivots", "their share of tr H, by input", "length of a pivot's vector / another's")
    figure, panels = _panels(titles, "share", share=False)
    _line(panels[0], [row["attention_mass"] for row in rows], "attention mass", GREY)
    panels[0].set_ylim(-0.02, 1.02)
    shares = [key for key in rows[0] if key.startswith("hessian_share_")]
    for key, colour in zip(shares, SERIES, strict=False):
        _line(panels[1], [row[key] for row in rows], f"input of {key.rpartition('.')[2]}", colour)
    for states, name, colour in (("k", "key", BEHIND), ("v", "value", VANILLA)):
        _line(panels[2], [row[f"{states}_pivots"] / row[f"{states}_rest"] for row in rows], name, colour)
    positions = figures["tokens"] + figures["windows"] * len(figures["settings"]["lead"])
    even = len(figures["pivots"]) / positions
    for axes, level, name in ((panels[1], even, "an even share"), (panels[2], 1.0, "alike")):
        if figures["pivots"]:
            axes.axhline(level, color=GREY, linewidth=0.8, linestyle="--", label=name)
            axes.set_yscale("log")
            axes.legend(frameon=False, fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure, tuple(rows[0]), [tuple(row.values()) for row in rows]


FIGURES: dict[str, Callable[[Row], tuple[Any, Sequence[str], list[Sequence[Any]]]]] = {
    "linears": _linears,
    "distance": _distance,
    "kv": _kv,
    "pivots": _pivots,
}
