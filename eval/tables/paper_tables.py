"""IntactKV's Tables 1 to 5 with our finished runs beside them.

Of a model that the paper has, ours stands beside the published figure, with the difference where text, amount of text
and group size are the paper's, too; any other model stands beside the published columns. One column per model: the
finished setting that is nearest to the paper's; notes name the others, and what our run of a method does otherwise than
its recipe. Runs that differ only in the calibration seed are one figure, mean ± standard deviation (n).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from corpora.catalog import FAMILIES
from corpora.errors import UserError
from eval.tables.judged_runs import grade_notes, judged_columns
from eval.tables.paper_runs import RECORDS, Column, Scores, columns_of, departures, one_per_model, what_fits
from eval.tables.published import FULL, TABLES, PublishedTable, paper_name
from eval.tables.render import Cell, Figure, Table, change_of, mean_of, signed, signed_percent
from eval.tables.tasks import MEAN_ACC, QA_AVERAGE
from quantization.named import named_recipe

__all__ = ["paper_tables"]

Values = Mapping[tuple[str, str], Mapping[int | None, Scores]]  # by method and arm: scores by seed
# Models without an original of theirs to fetch: a package holds them in fewer bits.
PACKAGED = [
    f"{name}-{size}" for name, family in FAMILIES.items() for size, hub_id in family.sizes.items() if not hub_id
]
Cells = dict[tuple[str, str, bool], Cell]  # by method, arm, and whether it is the change against the method alone


def paper_tables(
    number: int, records: Iterable[dict[str, Any]] = (), models: Sequence[str] = (), filters: str = ""
) -> list[Table]:
    """One of `TABLES`, once for every setting of ours; published figures alone where nothing was run.

    records: oldest first, filtered already; of Table 4 those of answers and of judges. models: only these, and of the
    paper's only those among them (all if none is). filters: what else was asked for, as the user wrote it.
    Raises UserError if nothing fits what was asked for.
    """
    table = TABLES[number]
    wanted = list(dict.fromkeys(paper_name(model) for model in models))
    if number in RECORDS:
        found = columns_of(table, records)
    else:
        found = [column for column in judged_columns(table, records) if not wanted or column.model in wanted]
    columns, others = one_per_model(table, found)
    not_run = [model for model in wanted if model not in [column.model for column in columns]]
    unknown = [model for model in not_run if model not in table.models]
    if number in RECORDS and (unknown or (filters and not columns)):
        asked = " ".join([*(f"--model {model}" for model in unknown or models), filters]).strip()
        raise UserError(
            f"no finished run has a place in table {number} and fits {asked}; the table takes {what_fits(table)} "
            "(`python -m eval table` and `python -m eval table tasks` show all runs)"
        )
    published = [model for model in table.models if model in wanted] or list(table.models)
    tables = []
    for i, setting in enumerate(dict.fromkeys(column.setting for column in columns) or [""]):
        mine = [column for column in columns if column.setting == setting]
        left_out = [column for column in others if column.model in [c.model for c in mine]]
        tables.append(_table(table, setting, published, mine, not_run if i == 0 else [], left_out))
    return tables


def _table(
    table: PublishedTable,
    setting: str,
    published: Sequence[str],
    columns: Sequence[Column],
    not_run: Sequence[str],
    left_out: Sequence[Column],
) -> Table:
    """Published columns, each with ours and the difference where ours was asked for or run, then other models."""
    heads: list[str] = []
    by_column: list[Cells] = []
    for model in dict.fromkeys([*published, *(column.model for column in columns), *not_run]):
        column = next((column for column in columns if column.model == model), None)
        paper = _cells(table, _published(table, model), "")
        if model in published:
            heads.append(f"published {model}")
            by_column.append(paper)
        if column is None and model not in not_run:
            continue
        for measure in (QA_AVERAGE, MEAN_ACC) if table.number == 3 else ("",):
            name = f", {measure}" if measure else ""
            ours = _cells(table, _ours(column), measure)
            heads.append(f"ours: {column.head if column else model}{name}")
            by_column.append(ours)
            if model in published and (column is None or not column.unlike):
                heads.append(f"difference {model}{name}")
                by_column.append({key: _difference(cell, paper.get(key)) for key, cell in ours.items()})
    keys = [(FULL, "", False)]
    for method in table.figures:
        keys += [(method, arm, change) for arm in table.arms for change in ((False, True) if arm else (False,))]
    rows = tuple((_label(table, *key), *(cells.get(key) for cells in by_column)) for key in keys)
    caption = (
        f"Table {table.number} of IntactKV (arXiv:2403.01241): {table.title}, {table.better} is better; "
        f"{table.quantized}; ours: {setting or 'not run'}"
    )
    return Table(caption, ("method", *heads), rows, 1, tuple(_notes(table, columns, left_out)))


def _published(table: PublishedTable, model: str) -> Values:
    places = [(FULL, ""), *((method, arm) for method in table.figures for arm in table.arms)]
    values = {place: table.value(model, *place) for place in places}
    return {place: {None: {"": value}} for place, value in values.items() if value is not None}


def _ours(column: Column | None) -> Values:
    if column is None:
        return {}
    return {
        (method, arm): runs for method, variants in column.methods.items() for arm, runs in variants[0].arms.items()
    }


def _cells(table: PublishedTable, values: Values, measure: str) -> Cells:
    """Figures of one column, and every arm's change against the method alone over the seeds that both have."""
    cells: Cells = {}
    columns = {place: {seed: scores[measure] for seed, scores in runs.items()} for place, runs in values.items()}
    for (method, arm), column in columns.items():
        cells[method, arm, False] = mean_of(list(column.values()))
        if arm:
            alone = columns.get((method, ""), {})
            cells[method, arm, True] = change_of(alone, column, relative=RECORDS.get(table.number) == "ppl")
    return cells


def _difference(ours: Cell, paper: Cell) -> Cell:
    """Ours less the published figure; a spread over seeds stays ours."""
    if not isinstance(ours, Figure) or not isinstance(paper, Figure):
        return None
    form = signed_percent if ours.form is signed_percent else signed
    return replace(ours, value=ours.value - paper.value, form=form)


def _label(table: PublishedTable, method: str, arm: str, change: bool) -> str:
    if not change:
        return f"{method} {arm}".strip()
    unit = ", points" if "%" in table.title else ""
    return f"{method}: change by {arm.removeprefix('+ IntactKV_')}{unit}"


def _notes(table: PublishedTable, columns: Sequence[Column], left_out: Sequence[Column]) -> list[str]:
    """What a reader must know to compare: what is published, what ours does otherwise, what else was run."""
    notes = []
    for column in columns:
        if column.unlike:
            notes.append(
                f"{column.model}: {', '.join(column.unlike)} other than the paper's; compare how much IntactKV changes "
                "a figure, not the figures"
            )
        if column.model in PACKAGED:
            notes.append(
                f"FP16 of {column.model}: its package's weights, dequantized; they compare only with themselves"
            )
        notes += [f"ours, {column.model}, {method}: {'; '.join(words)}" for method, words in _methods(table, column)]
        if table.number not in RECORDS:
            notes += grade_notes(column)
    if columns and table.number in RECORDS:
        perplexities = RECORDS[table.number] == "ppl"
        command = "changes: `python -m eval table`" if perplexities else "accuracies: `python -m eval table tasks`"
        notes.append(f"standard errors of our {command}")
    notes.append(f"published: {table.protocol}; {table.grids}; as printed in the paper, not run again")
    if not columns and table.number not in RECORDS:
        notes.append("ours: no judged run has a place; `python -m eval mtbench`, then `python -m eval judge`")
    if table.number == 3:
        notes.append(
            f"{QA_AVERAGE}: acc_norm where a task defines it, else acc; that the paper averages so is inferred, "
            f"hence the {MEAN_ACC} beside it"
        )
    for column in left_out:
        count = f"{column.figures} figure{'' if column.figures == 1 else 's'}"
        notes.append(f"also finished, filters choose it: {column.head}, {column.setting} ({count})")
    return notes


def _methods(table: PublishedTable, column: Column) -> list[tuple[str, list[str]]]:
    """What our run of a method does otherwise than its named recipe."""
    notes = []
    for method, recipe in table.recipes.items():
        variants = column.methods.get(method)
        if not variants:
            continue
        words = departures(variants[0].settings)
        settings, named = variants[0].settings, named_recipe(recipe).calibration
        text = settings["recipe"]["calibration"]
        if "calibration" in settings["made_of"] and (text["corpus"], text["samples"], text["length"]) != (
            named.corpus,
            named.samples,
            named.length,
        ):
            words.append(
                f"calibrated on {text['samples']} × {text['length']} tokens of {text['corpus']} "
                f"(recipe: {named.samples} × {named.length} of {named.corpus})"
            )
        if len(variants) > 1:
            words.append(f"{len(variants) - 1} more, with other settings, left out (`python -m eval table` shows them)")
        if words:
            notes.append((method, words))
    return notes
