"""Perplexity per setting, with and without the intact prefix: two bars each, on a logarithmic axis."""

from pathlib import Path

from corpora.errors import UserError
from eval.plots.canvas import INTACT, VANILLA, plt, save
from eval.tables import HEAD, Row

__all__ = ["draw"]


def draw(rows: list[Row], path: Path) -> None:
    """Draw rows of one protocol. Raises UserError if the rows mix protocols, models or corpora."""
    for what in ("caption", "model", "corpus"):
        found = sorted({str(getattr(row, what)) for row in rows})
        if len(found) > 1:
            raise UserError(
                f"one figure shows one {what}, but the runs have {len(found)}: {'; '.join(found)}; narrow "
                "them down with --window and --limit"
            )
    rows = [row for row in rows if row.vanilla is not None or row.intact is not None]
    figure, axes = plt.subplots(figsize=(max(6.0, 1.1 * len(rows) + 1.5), 4.2))
    for shift, colour, label, values in (
        (-0.2, VANILLA, "vanilla", [row.vanilla for row in rows]),
        (0.2, INTACT, "IntactKV", [row.intact for row in rows]),
    ):
        places = [i + shift for i, value in enumerate(values) if value is not None]
        heights = [value for value in values if value is not None]
        bars = axes.bar(places, heights, width=0.38, color=colour, label=label)
        axes.bar_label(bars, [f"{h:.1f}" if h < 100 else f"{h:.0f}" for h in heights], fontsize=7.5, padding=2)
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [_label(row) for row in rows], fontsize=9)
    lowest = min(v for row in rows for v in (row.vanilla, row.intact) if v is not None)
    highest = max(v for row in rows for v in (row.vanilla, row.intact) if v is not None)
    axes.set_ylim(lowest / 1.6, highest * 1.8)
    axes.set_ylabel(f"perplexity on {rows[0].corpus} (log scale)")
    axes.set_title(f"{rows[0].model}: {rows[0].caption}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    save(
        figure,
        path,
        HEAD,
        [(r.model, r.weights, r.kv, r.corpus, r.prefix, r.vanilla, r.intact, r.change, r.error) for r in rows],
    )


def _label(row: Row) -> str:
    """The setting in two short lines: weights over KV cache, with the prefix where it is not [BOS]."""
    kv = "" if row.kv == "16" else f"\nKV {row.kv.split()[0]} bits"
    prefix = "" if row.prefix == "[B]" else f"\n{row.prefix}"
    return f"{row.weights}{kv}{prefix}"
