"""A published table with ours beside it, as text: columns of figures, what a prefix changes, and notes."""

from collections.abc import Iterable, Mapping, Sequence

from corpora.catalog import FAMILIES, catalog_name
from eval.tables import render
from eval.tables.asked import bases_of
from eval.tables.compare import BANDS, Filled, RowPlace, changes_of, difference_of, form_of, row_place
from eval.tables.declared import ALONE, Figure, Measure, Paper, Words
from eval.tables.render import Table

__all__ = ["notes_of", "paper_table"]

# Models without an original to fetch: a package holds them in fewer bits.
PACKAGED = [
    f"{name}-{size}" for name, family in FAMILIES.items() for size, hub_id in family.sizes.items() if not hub_id
]
ANSWER = 80  # characters of an answer that a cell shows


def paper_table(paper: Paper, cells: Sequence[Filled], whole: bool = False, called: Words = ()) -> list[Table]:
    """Ours beside theirs: the published figures of the models that were run, ours, and the difference where one is
    taken. Below a row behind an intact prefix stands what that changes.

    A model that the paper does not have is a table of its own, which fits a terminal, and below stand the published
    figures of one model. whole: all models, and all that are published, in one table: to compute with. called: the size
    of ours in the caption (`Scope.called`), which tells two tables of one model apart.
    """
    models = list(dict.fromkeys(one.model for one in cells))
    others = [name for name in models if paper.models and catalog_name(name) not in paper.models]
    inside = [one for one in cells if one.model not in others]
    known = [name for name in paper.models if name in map(catalog_name, models)]
    caption = f"{paper.title} ({paper.source}); {paper.protocol}"
    own = ", ".join((paper.name, *called))
    if whole or not others:
        return [_table(paper, f"{own}: {caption}", cells, known or paper.models, (*_notes(cells), *paper.notes))]
    tables = []
    for name in others:
        mine = [one for one in cells if one.model == name]
        tables.append(_table(paper, f"{', '.join((paper.name, name, *called))}: {caption}", mine, (), _notes(mine)))
    if inside:
        return [*tables, _table(paper, f"{own}: {caption}", inside, known, (*_notes(inside), *paper.notes))]
    first, *more = paper.models
    beside = (f"published of {', '.join(more)}, too: --format csv has all",) if more else ()
    published = _table(paper, f"{paper.name}, as published of {first}", (), (first,), (*beside, *paper.notes))
    return [*tables, *([published] if published.rows else [])]


def _table(
    paper: Paper, caption: str, cells: Sequence[Filled], published: Sequence[str], notes: Sequence[str]
) -> Table:
    """One table of some cells and the published figures of some models; without cells it has the rows that have any."""
    models = list(dict.fromkeys(one.model for one in cells))
    names = list(dict.fromkeys([*published, *map(catalog_name, models)]))
    two = bool(cells) and (bool(published) or not paper.models)  # kinds of figures, which heads must tell apart
    rows = {row_place(row): row for row in ([one.row for one in cells] or paper.rows)}
    columns: dict[str, tuple[list[render.Cell], list[render.Cell]]] = {}  # a cell for every row, and what it changes

    def add(
        head: str, values: Mapping[RowPlace, render.Cell], changes: Mapping[RowPlace, render.Cell], always: bool = False
    ) -> None:
        if always or any(value is not None for value in values.values()):
            columns[head] = ([values.get(place) for place in rows], [changes.get(place) for place in rows])

    for name in names:
        mine = [one for one in cells if catalog_name(one.model) == name]
        for measure in list(dict.fromkeys(one.measure for one in mine)) or list(paper.measures):
            head = " ".join([measure.head, *([name] if len(names) > 1 else [])])
            if name in published or not paper.models:
                theirs = {place: paper.value(row, name, measure) for place, row in rows.items()}
                numbers = {place: (x,) for place, x in theirs.items() if isinstance(x, float)}
                against = {place: bases_of(row, measure, rows.values()) for place, row in rows.items()}
                shown = {place: _published(measure, figure) for place, figure in theirs.items()}
                add(f"{head}: published" if two else head, shown, changes_of(measure, numbers, against))
            ones = {row_place(one.row): one for one in mine if one.measure == measure}
            if ones:
                ours = {place: _short(one.ours) for place, one in ones.items()}
                values = {place: one.values for place, one in ones.items()}
                changes = changes_of(measure, values, {place: one.against for place, one in ones.items()})
                add(f"{head}: ours" if two else head, ours, changes, always=len(models) == 1)
                add(f"{head}: difference", {place: difference_of(one) for place, one in ones.items()}, {})
                add(f"{head}: verdict", {place: one.verdict or None for place, one in ones.items()}, {})
    lines: list[tuple[render.Cell, ...]] = []
    for i, row in enumerate(rows.values()):
        line = [values[i] for values, _ in columns.values()]
        if cells or any(line):
            lines.append((row.label, row.arm.label or "alone", *line))
        changed = [changes[i] for _, changes in columns.values()]
        if any(changed):
            lines.append((row.label, f"{row.arm.label}: change", *changed))
    return Table(caption, ("method", "prefix", *columns), tuple(lines), 2, tuple(notes))


def _short(ours: render.Figure | str | None) -> render.Cell:
    """A figure as it is; of an answer what fits into a cell, on one line: its record has the whole."""
    if not isinstance(ours, str):
        return ours
    line = " ".join(ours.split())
    return line if len(line) <= ANSWER else f"{line[:ANSWER].rstrip()}…"


def _published(measure: Measure, figure: Figure) -> render.Cell:
    return render.Figure(figure, form_of(measure)) if isinstance(figure, float) else figure


def _grades(cells: Iterable[Filled], model: str) -> list[str]:
    """What a reader of scores must know of the judge."""
    records = [record for one in cells if one.measure.program == "judge" for record in one.records]
    grades = [grade for record in records for grade in record["models"].values()]
    if not grades:
        return []
    lost = sum(sum(grade["unscored"].values()) for grade in grades)
    whole = sum(grade["judgements"] for grade in grades)
    notes = [f"{model}: {lost} of our {whole} judgements hold no grade and count nowhere"]
    if any(record["settings"]["judge"].startswith("local-") for record in records):
        notes.append("a local judge shows the flow; a small model's grades say nothing about quality")
    return notes


def _unlike(ran: Sequence[Filled], model: str) -> list[str]:
    """Why no change stands behind a prefix that was run, as its method alone was."""
    there = {(row_place(one.row), one.measure) for one in ran}
    heads = [
        one.measure.head
        for one in ran
        if one.measure.better != "words" and one.row.arm.prefix != ALONE.prefix and not one.row.arm.vanilla
        if not one.unrounded
        if ((one.row.label, ALONE), one.measure) in there
        and not any(((one.row.label, base), one.measure) in there for base in one.against)
    ]
    if not heads:
        return []
    return [
        f"{model}, {', '.join(dict.fromkeys(heads))}: alone, a text does not open with the prefix's tokens, which by "
        "themselves change a figure; so what keeping them intact changes is not told. Run the rows BOS, if the table "
        "has them, or perplexity with --protocol intactkv"
    ]


def _caches(ran: Sequence[Filled], model: str) -> list[str]:
    """How much of the KV cache a policy really rounded in every row, over its columns, arms and seeds."""
    notes = []
    for of, programs in (("attention read", ("ppl", "tasks", "needle")), ("the cache held at the end", ("chat",))):
        found: dict[str, list[tuple[float, float | None]]] = {}
        for one in ran:
            if one.caches and one.measure.program in programs:
                found.setdefault(one.row.label, []).extend(one.caches)
        rows = []
        for label, caches in found.items():
            shares = _span([f"{100 * share:.1f}" for share in sorted(share for share, _ in caches)])
            bits = _span([f"{number:.2f}" for number in sorted(bits for _, bits in caches if bits is not None)])
            rows.append(f"{label} {shares} %{f' ({bits} bits an element)' if bits else ''}")
        if rows:
            notes.append(f"{model}, KV cache, rounded of what {of}: {'; '.join(rows)}")
    exact: dict[str, dict[str, None]] = {}
    for one in ran:
        if one.exact:
            exact.setdefault(one.row.label, {})[one.measure.head] = None
    if exact:
        rows = [f"{label} ({', '.join(heads)})" for label, heads in exact.items()]
        taken = "; what a prefix changes is not told of them" if any(one.unrounded for one in ran) else ""
        notes.append(
            f"{model}: nothing of the cache was rounded in {', '.join(rows)}, because no text was longer than what the "
            f"policy keeps exact; these are figures of a full-precision cache{taken}"
        )
    return notes


def _span(numbers: Sequence[str]) -> str:
    """The first to the last, or the one that there is."""
    return " to ".join(dict.fromkeys((*numbers[:1], *numbers[-1:])))


def notes_of(cells: Sequence[Filled], model: str) -> list[str]:
    """What a reader must know of the figures of one model, but for what is not as published."""
    ran = [one for one in cells if one.model == model and one.ours is not None]
    notes = [*_grades(ran, model), *_unlike(ran, model), *_caches(ran, model)]
    if ran and model in PACKAGED:
        notes.append(f"16 bits of {model}: its package's weights, dequantized; they compare only with themselves")
    return notes


def _notes(cells: Sequence[Filled]) -> list[str]:
    """Why figures do not compare, and what verdicts mean."""
    notes = []
    for model in dict.fromkeys(one.model for one in cells):
        words = dict.fromkeys(
            word for one in cells if one.model == model and one.ours is not None for word in one.departs
        )
        notes += notes_of(cells, model)
        if words:
            notes.append(
                f"{model}: not as published ({'; '.join(words)}), so no difference is taken; compare how much a method "
                "or a prefix changes a figure, not the figures"
            )
    if any(one.verdict for one in cells):
        bands = ", ".join(f"{word}: within {many:g}" for word, many in BANDS.items())
        notes.append(
            f"verdict, in standard errors of the questions or half percents of a perplexity: {bands}, else off"
        )
    return notes
