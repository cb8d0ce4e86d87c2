"""Reports of statistics: rows in full precision for CSV and record, compact tables for the screen.

A row is a dictionary; figures without a value are nan (nothing was counted) or None (not known).
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from corpora.writing import write_beside
from eval.inside.distances import COLUMNS
from eval.inside.kv_report import GROUPS
from eval.tables.render import Cell, Figure, Table

__all__ = ["TABLES", "Row", "by", "compact", "decoded", "encoded", "mean_sqnr", "means_of", "write_csv"]

Row = dict[str, Any]
NON_FINITE = ("inf", "-inf", "nan")  # JSON has no numbers for these: records spell them out
SMALLEST_PLAIN = 1e-4  # below, and from LARGEST_PLAIN, figures are printed in scientific form
LARGEST_PLAIN = 1e6
WORST = 10  # linears that a summary names


def compact(value: float) -> str:
    """A figure in four significant digits; |value| < 1e-4 in scientific form."""
    if isinstance(value, int) or math.isinf(value):
        return str(value)
    if value and not SMALLEST_PLAIN <= abs(value) < LARGEST_PLAIN:
        return f"{value:.2e}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def table(caption: str, rows: Sequence[Row]) -> Table:
    """Rows of the same keys as a table for the screen; the leading columns of words stand to the left."""
    words = next((i for i, value in enumerate(rows[0].values()) if not isinstance(value, str)), len(rows[0]))
    return Table(caption, tuple(rows[0]), tuple(tuple(_cell(value) for value in row.values()) for row in rows), words)


def _cell(value: Any) -> Cell:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return value if isinstance(value, str) else Figure(value, compact)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of the same keys, in full precision, atomically; an empty cell for None, inf and nan by name."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with write_beside(path) as beside:
        beside.write_text(text.getvalue(), encoding="utf-8")


def encoded(value: Any) -> Any:
    """Figures as a record holds them: inf and nan as words."""
    if isinstance(value, dict):
        return {key: encoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [encoded(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def decoded(value: Any) -> Any:
    """Undo `encoded`."""
    if isinstance(value, dict):
        return {key: decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decoded(item) for item in value]
    return float(value) if isinstance(value, str) and value in NON_FINITE else value


def mean_sqnr(values: Iterable[float]) -> float:
    """Mean of the finite values in dB; +inf if all are, nan if there are none. A single exact layer (the first one
    reads the same embeddings) would otherwise hide all others."""
    values = [value for value in values if not math.isnan(value)]
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        return sum(finite) / len(finite)
    return max(values, default=math.nan)


def by(rows: Sequence[Row], *keys: str) -> dict[Any, list[Row]]:
    """Rows grouped by the values of one key, or of several as a tuple, in order of appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys), []).append(row)
    return groups


def means_of(kind: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Figures of the whole model for the record: means over the layers (see `mean_sqnr`), extremes of
    extremes."""
    if kind == "linears":
        return {
            name.rpartition(".")[2]: {key: _mean(key, mine) for key in COLUMNS}
            for name, mine in by(rows, "linear").items()
        } | {"all": {key: _mean(key, rows) for key in COLUMNS}}
    if kind == "distance":
        return {
            arm: {
                f"{curve}_{figure}": mean_sqnr(row[figure] for row in its)
                for curve, its in by(mine, "curve").items()
                for figure in ("sqnr", "median_token_sqnr")
            }
            for arm, mine in by(rows, "arm").items()
        }
    if kind == "kv":
        keys = ("k_sqnr", "v_sqnr", "attention_sqnr", "quantized_fraction", "bits_per_element")
        return {
            arm: {group: {key: _mean(key, its) for key in keys} for group, its in by(mine, "group").items()}
            for arm, mine in by(rows, "arm").items()
        }
    return {key: _mean(key, rows) for key in rows[0] if key != "block"}


def _mean(key: str, rows: Sequence[Row]) -> float | None:
    values = [row[key] for row in rows]
    if None in values:
        return None
    if key.startswith(("max_", "min_")):
        return max(values) if key.startswith("max_") else min(values)
    return mean_sqnr(values) if "sqnr" in key else sum(values) / len(values)


def _linears(figures: Row, full: bool) -> list[Table]:
    if full:
        return [table("Every linear", figures["rows"])]
    shown = [key for key in COLUMNS if key not in ("sqnr_x", "mse_x")]
    worst = sorted(figures["rows"], key=lambda row: row["sqnr_o"])[:WORST]
    means = [{"linear": name, **{key: mean[key] for key in shown}} for name, mean in figures["means"].items()]
    named = [{key: row[key] for key in ("linear", "block", *shown)} for row in worst]
    return [
        table(
            "Means over the blocks; largest max, smallest min (inputs are not quantized: sqnr_x is inf, mse_x 0)", means
        ),
        table(f"The {len(worst)} linears with the largest own error", named),
    ]


def _distance(figures: Row, full: bool) -> list[Table]:
    blocks = []
    for block, mine in by(figures["rows"], "block").items():
        row: Row = {"block": block}
        for (curve, arm), its in sorted(by(mine, "curve", "arm").items(), key=lambda item: CURVES.index(item[0][0])):
            row[f"{curve}, {arm}"] = mean_sqnr(r["sqnr"] for r in its)
            if curve == "output":
                row[f"median token, {arm}"] = its[0]["median_token_sqnr"]
        blocks.append(row)
    whole = [{"arm": arm, **figures["means"][arm], **logits} for arm, logits in figures["logits"].items()]
    tables = [
        table(
            "SQNR in dB per block: own and input error (means over its linears), its output, the median token of it",
            blocks,
        )
    ]
    if full:
        tables.append(table("Every linear and block output", figures["rows"]))
    return [*tables, table("The model: mean SQNR in dB, KL(full ‖ quantized) in nats", whole)]


CURVES = ("own", "input", "output")


def _kv(figures: Row, full: bool) -> list[Table]:
    layers = []
    for block, mine in by(figures["rows"], "block").items():
        row: Row = {"block": block}
        for what, short in (("k", "K"), ("v", "V"), ("attention", "attention")):
            for r in sorted(mine, key=lambda r: (GROUPS.index(r["group"]), r["arm"] != "vanilla")):
                row[f"{short} {r['group']}, {r['arm']}"] = r[f"{what}_sqnr"]
        layers.append(row)
    whole = [
        {"arm": arm, "group": group, "tokens": _tokens(figures["rows"], arm, group), **mean, **logits[group]}
        for (arm, means), logits in zip(figures["means"].items(), figures["logits"].values(), strict=True)
        for group, mean in means.items()
    ]
    per_layer = table("Every layer", figures["rows"]) if full else table("SQNR in dB per block", layers)
    return [per_layer, table("The model: mean SQNR in dB over layers; logits at the group's positions", whole)]


def _tokens(rows: Sequence[Row], arm: str, group: str) -> int:
    return next(row["tokens"] for row in rows if (row["arm"], row["group"]) == (arm, group))


def _pivots(figures: Row, full: bool) -> list[Table]:
    words = ("text", "layers", "channels")
    tokens = [
        {key: _ranges(row[key]) if isinstance(row[key], list) else row[key] for key in (*words, *row)}
        for row in figures["pivots"]
    ]
    found = (
        [table("Pivot tokens (layer l is the hidden state behind l blocks, 0 the embeddings)", tokens)]
        if tokens
        else []
    )
    return [*found, table("What the pivots take, per block", figures["rows"])]


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending integers, runs as from-to: 3-29, 31."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


# kind -> (figures of the record, whether every row is wanted) -> tables for the screen, by title.
TABLES: dict[str, Callable[[Row, bool], list[Table]]] = {
    "linears": _linears,
    "distance": _distance,
    "kv": _kv,
    "pivots": _pivots,
}
