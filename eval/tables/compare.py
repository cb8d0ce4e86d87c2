"""Ours beside theirs: the figures of a declared table, read from the ledger, and how far they are from the published.

A difference is taken only where nothing departs from what was published: model, text, amount of it, options. Its
verdict is a band, `BANDS`, in units of what such a figure scatters by: of accuracies the binomial standard error of
their questions, of perplexities one half percent, of grades and times what is said there.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from corpora.catalog import catalog_name
from eval.tables import render
from eval.tables.asked import Cell, bases_of, cells_of
from eval.tables.declared import PUBLISHED, Arm, Figure, Measure, Paper, Row, Scope
from eval.tables.departures import QUESTIONS, computed, departures
from eval.tables.ledger import answer_of
from eval.tables.render import change_of, in_percent, mean_of, plain, signed

__all__ = ["BANDS", "Filled", "RowPlace", "cache_of", "changes_of", "difference_of", "filled", "form_of", "row_place",
           "scatter", "value_of", "verdict_of"]  # fmt: skip

# A difference of so many scatters at most.
BANDS: Mapping[str, float] = {"agrees": 1, "near": 3}
# What a figure scatters by, as a share of it; accuracies have their own.
SHARES: Mapping[str, float] = {"ppl": 0.005, "latency": 0.1}
GRADE = 0.25  # points: 160 grades of 1 to 10 that spread by 3

RowPlace = tuple[str, Arm]  # what tells a row of a table from all others: its label and what stands in front


@dataclass(frozen=True)
class Filled:
    """A cell with what was run. records: of its runs, as far as they are there. ours: mean ± sd over seeds; theirs: as
    published; difference: ours less theirs, None unless the figures compare. departs: what is not as published. values:
    of each run, None for one that is not there. against: the arms that its change is taken against (`changes_of`)."""

    row: Row
    measure: Measure
    model: str
    records: tuple[dict[str, Any], ...] = ()
    ours: render.Figure | str | None = None
    theirs: Figure = None
    difference: float | None = None
    verdict: str = ""
    departs: tuple[str, ...] = ()
    values: tuple[float | None, ...] = ()
    against: tuple[Arm, ...] = ()

    @property
    def caches(self) -> tuple[tuple[float, float | None], ...]:
        """`cache_of` of each record with a KV policy."""
        found = (cache_of(record, self.measure) for record in self.records)
        return tuple(one for one in found if one is not None)

    @property
    def exact(self) -> bool:
        """Whether it has a KV policy, which rounded nothing: the text was no longer than what the policy keeps."""
        return bool(self.caches) and all(rounded == 0 for rounded, _ in self.caches)

    @property
    def unrounded(self) -> bool:
        """Whether nothing else was rounded either: it is a figure of the model as it is."""
        parts = ("weights", "activations", "attention")
        return self.exact and not any(
            record["settings"]["recipe"].get(part) for record in self.records for part in parts
        )


def cache_of(record: Mapping[str, Any], measure: Measure) -> tuple[float, float | None] | None:
    """What a KV policy really rounded: the share of what attention read behind the prefix, of a conversation that of
    what its cache holds at the end, in [0, 1]; and the bits of an element, None where a record does not say them. None
    for a full-precision cache, and where no record says it."""
    cache = record.get("kv_cache")
    if cache is not None:
        return float(cache["rounded"]), fmean(cache["bits_per_element"])
    if record["settings"].get("kv") is None:
        return None
    match measure.program:
        case "needle":
            bits = [fmean(result["bits_per_element"]) for result in record["results"] if result["bits_per_element"]]
            return float(record["quantized"]), fmean(bits) if bits else None
        case "chat":
            return float(record["answers"][-1]["quantized"]), None
    return None


def value_of(record: Mapping[str, Any], measure: Measure) -> float | str | None:
    """The number that stands in a cell, accuracies in percent; of a conversation its last answer. None if the record
    has no such figure."""
    match measure.program:
        case "ppl":
            return float(record["perplexity"])
        case "tasks":
            metric = measure.metric or _metric(record)
            value = record["metrics"].get(metric)
            return None if value is None else float(in_percent(metric, value))
        case "needle":
            answers = {result["key"]: str(result["answer"]) for result in record["results"]}
            return answers.get(measure.metric) if measure.metric else 100 * float(record["found"])
        case "judge":
            (grades,) = record["models"].values()
            return None if grades["score"] is None else float(grades["score"])
        case "chat":
            return str(record["answers"][-1]["answer"])
        case "latency":
            return _latency(record, measure.metric)


def _metric(record: Mapping[str, Any]) -> str:
    """The one that counts of a task that no table has: plain accuracy, or else the task's own first."""
    metrics = record["metrics"]
    return "acc" if "acc" in metrics else str(next(iter(metrics)))


def _latency(record: Mapping[str, Any], metric: str) -> float | None:
    """A product's milliseconds or its speed-up, of n inputs and k outputs; metric: `LUT4 ms`, `LUT4 speedup`."""
    ((n, k),) = record["settings"]["shapes"]
    name, _, unit = metric.partition(" ")
    found = next(one["products"] for one in record["products"] if (one["out"], one["channels"]) == (k, n)).get(name)
    return None if found is None else float(found["us"] / 1e3 if unit == "ms" else found["speedup"])


def filled(paper: Paper, model: Path, scope: Scope = PUBLISHED, left_out: list[str] | None = None) -> list[Filled]:
    """The cells of a table for one model, with what the ledger has of them. model: its directory, which need not be
    there. left_out: gets a line for every record that cannot be read."""
    found: list[Filled] = []
    by_row: dict[RowPlace, dict[str, Filled]] = {}
    cells = cells_of(paper, model, scope)
    rows = list({row_place(cell.row): cell.row for cell in cells}.values())
    for cell in cells:
        one = _filled(paper, model.name, cell, scope, [answer_of(run, left_out) for run in cell.runs])
        one = replace(one, against=bases_of(cell.row, cell.measure, rows, scope))
        found.append(one)
        by_row.setdefault(row_place(cell.row), {})[cell.measure.head] = one
    return _named([
        _average(one, [by_row[row_place(one.row)].get(head) for head in one.measure.average_of])
        if one.measure.average_of
        else one
        for one in (_paired(one, by_row) for one in found)
    ])  # fmt: skip


def _paired(one: Filled, by_row: Mapping[RowPlace, Mapping[str, Filled]]) -> Filled:
    """The same, whose change is taken only against runs in the same format on the same kind of device, and only where
    something was rounded."""

    def columns(arm: Arm) -> list[Filled]:
        there = by_row.get((one.row.label, arm), {})
        return [there[head] for head in (one.measure.average_of or (one.measure.head,)) if head in there]

    def kinds(arm: Arm) -> set[str]:
        return {computed(record) for column in columns(arm) for record in column.records}

    mine, own = kinds(one.row.arm), columns(one.row.arm)
    if own and all(column.unrounded for column in own):
        return replace(one, against=())
    return replace(one, against=tuple(arm for arm in one.against if not kinds(arm) or kinds(arm) == mine))


def _named(cells: Sequence[Filled]) -> list[Filled]:
    """The same; a column of a task that no table has is called by its metric, too, as far as a record says it."""
    named: dict[Measure, Measure] = {}
    for one in cells:
        if one.measure.program == "tasks" and one.measure.item and not one.measure.metric and one.records:
            metric, head = _metric(one.records[0]), one.measure.head
            better: Literal["lower", "higher"] = "lower" if "perplexity" in metric or "bits" in metric else "higher"
            head = head if metric == "acc" else f"{head}, {metric}"
            named.setdefault(one.measure, replace(one.measure, head=head, metric=metric, better=better))
    return [replace(one, measure=named.get(one.measure, one.measure)) for one in cells]


def row_place(row: Row) -> RowPlace:
    """What tells a row of a table from all others."""
    return row.label, row.arm


def _filled(paper: Paper, model: str, cell: Cell, scope: Scope, answers: Sequence[dict[str, Any] | None]) -> Filled:
    measure = cell.measure
    records = [record for record in answers if record is not None]
    values = [None if record is None else value_of(record, measure) for record in answers]
    numbers = tuple(value if isinstance(value, float) else None for value in values)
    words = next((value for value in values if isinstance(value, str)), None)
    apart, departs = _apart(records), departures(paper, model, cell, scope, answers)
    one = Filled(
        cell.row,
        measure,
        model,
        tuple(records),
        apart or _figure(measure, numbers) or words,
        paper.value(cell.row, catalog_name(model), measure),
        departs=(*departs, apart) if apart else departs,
        values=numbers,
    )
    return _compared(one, scatter(measure, one.theirs, [record.get("samples", 0) for record in records]))


def _apart(records: Iterable[Mapping[str, Any]]) -> str:
    """Why there is no mean of some records: not all were computed in one format on one kind of device."""
    kinds = sorted({computed(record) for record in records} - {""})
    return f"no mean of {' and '.join(kinds)}" if len(kinds) > 1 else ""


def _figure(measure: Measure, values: Iterable[float | None]) -> render.Figure | None:
    """The mean over the runs that are there, and how many were asked for."""
    values = tuple(values)
    figure = mean_of([value for value in values if value is not None], form_of(measure))
    return None if figure is None else replace(figure, asked=len(values))


def form_of(measure: Measure) -> Callable[[float], str]:
    """How a figure of a column is printed."""
    if measure.digits == 2:
        return plain
    return lambda value: plain(value) if abs(value) >= 1000 else f"{value:.{measure.digits}f}"


def difference_of(one: Filled) -> render.Figure | None:
    """A cell's difference with as many digits as its column has, None where none is taken."""
    if one.difference is None:
        return None
    digits = one.measure.digits
    return render.Figure(one.difference, signed if digits == 2 else lambda value: f"{value:+.{digits}f}")


def _average(one: Filled, columns: Sequence[Filled | None]) -> Filled:
    """The mean of some columns, run by run: only of runs that all of them have."""
    parts = [column for column in columns if column is not None]
    if not parts or len(parts) < len(columns) or len({len(part.values) for part in parts}) != 1:
        return one
    runs = list(zip(*(part.values for part in parts), strict=True))
    values = tuple(None if None in run else fmean(value for value in run if value is not None) for run in runs)
    departs = tuple(dict.fromkeys(word for part in parts for word in part.departs))
    errors = [scatter(p.measure, _number(p), [record.get("samples", 0) for record in p.records]) for p in parts]
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(parts) if len(known) == len(parts) else None
    apart = _apart([record for part in parts for record in part.records])
    departs = tuple(dict.fromkeys((*departs, *([apart] if apart else []))))
    whole = replace(one, ours=apart or _figure(one.measure, values), departs=departs, values=values)
    return _compared(whole, error)


def _number(one: Filled) -> Figure:
    """The published figure, or ours where none is."""
    return one.ours.value if one.theirs is None and isinstance(one.ours, render.Figure) else one.theirs


def _compared(one: Filled, error: float | None) -> Filled:
    """With the difference and its verdict, where the figures compare. error: what such a figure scatters by."""
    if one.departs or not isinstance(one.ours, render.Figure) or not isinstance(one.theirs, float):
        return one
    difference = one.ours.value - one.theirs
    return replace(one, difference=difference, verdict=verdict_of(difference, error))


def scatter(measure: Measure, theirs: Figure, samples: Sequence[int]) -> float | None:
    """What a figure scatters by, in its own unit; None where nothing is known.

    Of an accuracy p in % of n questions: 100 √(p (1 − p) / n), p in shares. Of others see `SHARES` and `GRADE`.
    """
    if not isinstance(theirs, float):
        return None
    if measure.program in SHARES:
        return theirs * SHARES[measure.program]
    if measure.program == "judge":
        return GRADE
    questions = min(samples, default=0) or QUESTIONS.get(measure.item, 0)
    share = theirs / 100
    return 100 * math.sqrt(share * (1 - share) / questions) if questions and 0 <= share <= 1 else None


def verdict_of(difference: float, error: float | None) -> str:
    """agrees, near or off: by `BANDS`; nothing where it is not known what the figure scatters by."""
    if error is None:
        return ""
    return next((word for word, many in BANDS.items() if abs(difference) <= many * error + 1e-9), "off")


def changes_of(
    measure: Measure, values: Mapping[RowPlace, Sequence[float | None]], against: Mapping[RowPlace, Sequence[Arm]]
) -> dict[RowPlace, render.Figure | None]:
    """What an intact prefix changes in the rows of a column, over the runs that both have: perplexities by a share,
    others by a difference, negative where the figure is lower behind it.

    values: of each run, by row and arm. against: the arms of the same row that read the same tokens in front
    (`eval.tables.asked.bases_of`); the first that has a run counts. None where none has.
    """

    def runs(place: RowPlace) -> dict[int | None, float]:
        return {i: value for i, value in enumerate(values.get(place, ())) if value is not None}

    found: dict[RowPlace, render.Figure | None] = {}
    for (label, arm), bases in against.items():
        mine = runs((label, arm))
        all_of_it = (change_of(runs((label, base)), mine, relative=measure.program == "ppl") for base in bases)
        found[label, arm] = next((change for change in all_of_it if change is not None), None)
    return found
