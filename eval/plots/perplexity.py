"""Perplexity per setting: without the intact prefix, with it, and calibrated behind it; bars on a logarithmic axis."""

from matplotlib.ticker import FuncFormatter

from corpora.errors import UserError
from eval.plots.canvas import BEHIND, INTACT, VANILLA, Output, literal, plt
from eval.tables.perplexities import ARMS, BEHIND_COLUMNS, HEAD, Row, behind_of, figures_of

__all__ = ["draw"]

FEW = 8  # settings whose names fit side by side


def draw(rows: list[Row], output: Output) -> None:
    """Draw rows of one protocol. Raises UserError if the rows mix protocols, models or corpora."""
    for what in ("caption", "model", "corpus"):
        found = sorted({str(getattr(row, what)) for row in rows})
        if len(found) > 1:
            raise UserError(
                f"one figure shows one {what}, but the runs have {len(found)}: {'; '.join(found)}; narrow "
                "them down with --window and --limit"
            )
    arms: list[tuple[str, str, list[float | None]]] = [
        (VANILLA, "vanilla", [row.vanilla.perplexity for row in rows]),
        (INTACT, "IntactKV", [row.intact.perplexity for row in rows]),
        (BEHIND, "IntactKV, calibrated behind the prefix", [row.behind.perplexity for row in rows]),
    ]
    arms = [arm for arm in arms if any(value is not None for value in arm[2])]
    many = len(rows) > FEW
    figure, axes = plt.subplots(figsize=(max(6.0, (0.36 if many else 0.55) * len(arms) * len(rows) + 1.5), 4.2))
    width = 0.8 / len(arms)
    for number, (colour, label, values) in enumerate(arms):
        places = [i + (number - (len(arms) - 1) / 2) * width for i, value in enumerate(values) if value is not None]
        heights = [value for value in values if value is not None]
        bars = axes.bar(places, heights, width=0.95 * width, color=colour, label=label)
        axes.bar_label(bars, [f"{h:.1f}" if h < 100 else f"{h:.0f}" for h in heights], fontsize=7, padding=2)
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [_label(row) for row in rows], fontsize=9, rotation=30 if many else 0,
                    ha="right" if many else "center")  # fmt: skip
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        # 70, 80 and 90 stand too close to 100
        axis_formatter(FuncFormatter(lambda perplexity, _: "" if f"{perplexity:g}"[0] in "789" else f"{perplexity:g}"))
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.set_xlim(-0.7, len(rows) - 0.3)
    shown = [value for _, _, values in arms for value in values if value is not None]
    lowest, highest = min(shown), max(shown)
    axes.set_ylim(lowest / 1.6, highest * 1.4)
    axes.set_ylabel(f"perplexity on {rows[0].corpus} (log scale)")
    axes.set_title(f"{rows[0].model}: {rows[0].caption}", fontsize=9, pad=24)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=len(arms), loc="lower center", bbox_to_anchor=(0.5, 0.99))
    head = (*HEAD, *ARMS, *(f"behind: {name}" for name in BEHIND_COLUMNS))
    output.save(figure, head, [(*row.visible[1:], *figures_of(row), *behind_of(row)) for row in rows])


def _label(row: Row) -> str:
    """The setting in two short lines: weights over KV cache, with the prefix where it is not [BOS]."""
    kv = "" if row.kv == "16" else f"\nKV {row.kv.split()[0]} bits"
    prefix = "" if row.prefix == "[B]" else f"\n{row.prefix}"
    return literal(f"{row.weights}{kv}{prefix}")
