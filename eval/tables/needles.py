"""Grids of needles as tables: found share and log-probability by length and depth, and one row a run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeVar

from eval.tables.render import Cell, Figure, Table, percent, signed
from quantization.labels import kv_label, told

__all__ = ["arm_of", "bits_of", "grid_of", "grid_tables", "in_order", "run_table"]

_Record = TypeVar("_Record", bound=Mapping[str, Any])

NOTHING = "none of what attention read was rounded: these are figures of full precision"


def grid_of(record: Mapping[str, Any]) -> dict[tuple[int, int], tuple[float, float]]:
    """Share of found keys and mean log p of a key, in nats, by (length, depth)."""
    cells: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in record["results"]:
        cells.setdefault((row["length"], row["depth"]), []).append(row)
    return {
        at: (fmean(row["found"] for row in rows), fmean(row["log_likelihood"] for row in rows))
        for at, rows in cells.items()
    }


def arm_of(settings: Mapping[str, Any]) -> str:
    """What ran, in words: weights, cache, what stands in front."""
    kv, prefix = settings["kv"], settings["prefix"]
    parts = [told(settings["weights"], settings["recipe"])]
    if kv is not None:
        parts.append(f"KV {kv_label(kv)}")
    if prefix["intact"]:
        parts.append(f"IntactKV {prefix['label']}")
    elif prefix["label"] != "none":
        parts.append(f"{prefix['label']} in front, vanilla")
    return ", ".join(parts)


def bits_of(record: Mapping[str, Any]) -> dict[int, float]:
    """Bits of an element of the cache by length, mean of keys and values; nothing for full precision."""
    return {row["length"]: fmean(bits) for row in record["results"] if (bits := row["bits_per_element"]) is not None}


def in_order(records: Iterable[_Record]) -> list[_Record]:
    """By model, arm and grid, whatever ran first."""
    return sorted(records, key=lambda r: (r["settings"]["model"], arm_of(r["settings"]), r["settings"]["lengths"]))


def grid_tables(record: Mapping[str, Any]) -> list[Table]:
    """Rows are lengths, columns depths: one table of shares, one of log-probabilities; of the published keys each."""
    settings, grid = record["settings"], grid_of(record)
    lengths, depths, keys = sorted(settings["lengths"]), settings["depths"], settings["keys"]
    name = f"{settings['model']} {arm_of(settings)}"
    head = ("tokens", *(f"depth {depth} %" for depth in depths))
    notes = [f"found in all: {percent(record['found'])} of {len(record['results'])}"]
    if settings["kv"] is not None:
        share, bits = record["quantized"], bits_of(record)
        notes.append(f"rounded of what attention read behind the prefix: {percent(share)}" if share else NOTHING)
        told = ", ".join(f"{bits[length]:.2f} at {length} tokens" for length in sorted({lengths[0], lengths[-1]}))
        notes.append(f"bits per element of the cache: {told}")

    def cells(which: int, form: Callable[[float], str]) -> tuple[tuple[Cell, ...], ...]:
        return tuple(
            (str(length), *(Figure(grid[length, depth][which], form) for depth in depths)) for length in lengths
        )

    tables = [
        Table(f"Needles found by {name}, {len(keys)} keys a cell", head, cells(0, percent), notes=tuple(notes)),
        Table("Mean log-probability of a key, in nats", head, cells(1, signed)),
    ]
    if settings["lines"] is not None:
        rows = tuple(
            (row["key"], "yes" if row["found"] else "no", repr(row["answer"]), Figure(row["log_likelihood"], signed))
            for row in record["results"]
        )
        tables.append(Table("Answers", ("key", "found", "answer", "log-probability"), rows, words=3))
    return tables


def run_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """One row a run; bits are those at its longest prompt."""
    head = ("model", "arm", "tokens", "depths", "keys", "found", "log-probability", "KV bits an element", "KV rounded")
    rows = []
    for record in in_order(records):
        settings = record["settings"]
        keys = f"{len(settings['keys'])}" + " published" * (settings["lines"] is not None)
        shown = (_ends(settings["lengths"]), _ends(settings["depths"]), keys)
        figures = Figure(record["found"], percent), Figure(record["log_likelihood"], signed)
        cache: tuple[Cell, Cell] = None, None
        if bits := bits_of(record):
            cache = Figure(bits[max(bits)]), Figure(record["quantized"], percent)
        rows.append((settings["model"], arm_of(settings), *shown, *figures, *cache))
    return Table("Needles: keys found, and mean log-probability of a key in nats", head, tuple(rows), words=5)


def _ends(values: Sequence[int]) -> str:
    return f"{min(values)}–{max(values)}" if len(values) > 1 else str(values[0])
