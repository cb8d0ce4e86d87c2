"""What the report's page holds, as plain data for the template: chapters of tables, cells, runs and where they link.

    Report: chapters (a published table each) × sections (a model each) × rows × cells ──▶ cards of runs

Figures are those of `eval.tables.compare.filled`, as they are. All texts may come from a stranger's record.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.report.cards import Card, Pairs, Place, commands_of, facts_of
from eval.report.gains import Chart, charts_of, ours, theirs
from eval.report.pictures import Picture, pictures_of
from eval.tables.asked import cells_of, runs_of
from eval.tables.beside import notes_of
from eval.tables.compare import Filled, difference_of, filled, form_of
from eval.tables.declared import PUBLISHED, Measure, Paper, Row, Scope, Words

__all__ = ["Chapter", "Report", "Section", "Shown", "report_of"]

BETTER = {"lower": ("↓", "lower is better"), "higher": ("↑", "higher is better"), "words": ("", "text")}


@dataclass(frozen=True)
class Shown:
    """What is asked of the report: a table for a model, whose directory need not be there, at a size. words: the size
    as options of `reproduce`. always: also where nothing was run."""

    paper: Paper
    model: Path
    scope: Scope = PUBLISHED
    words: Words = ()
    always: bool = True


@dataclass(frozen=True)
class Cell:
    """A figure of ours beside the published one, as words. href: of ours, where it is explained. sort: what its column
    is sorted by. marks: of what departs in this cell alone."""

    ours: str
    theirs: str
    anchor: str = ""
    href: str = ""
    difference: str = ""
    verdict: str = ""
    sort: str = ""
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Head:
    """A column. arrow, better: which way is better, as a sign and in words. texts: it holds answers, not figures."""

    words: str
    arrow: str
    better: str
    texts: bool


@dataclass(frozen=True)
class Line:
    """A row. behind: its prefix as the table writes it; nothing for a method alone."""

    label: str
    behind: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Several:
    """A figure that is the mean of several others. of: those, each with its place."""

    anchor: str
    figure: str
    place: Place
    how: str
    of: tuple[Place, ...]


@dataclass(frozen=True)
class Section:
    """One published table for one model. size: what is run of it (`Scope.called`). counts: cells, run, agrees, near,
    off. departs: of all cells that were run; marked: of some, by their marks. notes: what else a reader must know of
    the figures. command: what runs the rest."""

    anchor: str
    model: str
    size: str
    heads: tuple[Head, ...]
    lines: tuple[Line, ...]
    charts: tuple[Chart, ...]
    facts: Pairs
    counts: Mapping[str, int]
    departs: tuple[str, ...]
    marked: Pairs
    notes: tuple[str, ...]
    command: str

    @property
    def figures(self) -> tuple[int, ...]:
        """Places of the columns that hold numbers."""
        return tuple(i for i, head in enumerate(self.heads) if not head.texts)

    @property
    def texts(self) -> tuple[int, ...]:
        """Places of the columns that hold answers, which stand side by side."""
        return tuple(i for i, head in enumerate(self.heads) if head.texts)


@dataclass(frozen=True)
class Chapter:
    """A published table with its sections."""

    anchor: str
    paper: Paper
    sections: tuple[Section, ...]


@dataclass
class Report:
    """The whole page. left_out: what could not be read, in words. elsewhere: finished runs that no cell shows."""

    chapters: list[Chapter] = field(default_factory=list)
    cards: dict[str, Card] = field(default_factory=dict)  # by the name of the record's file
    several: list[Several] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    elsewhere: int = 0
    anchors: Counter[str] = field(default_factory=Counter)

    @property
    def sections(self) -> list[tuple[Chapter, Section]]:
        return [(chapter, section) for chapter in self.chapters for section in chapter.sections]

    def anchor(self, *words: str) -> str:
        """A name for a place in the page that no other has."""
        name = "-".join(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-") for word in words)
        self.anchors[name] += 1
        return name if self.anchors[name] == 1 else self.anchor(name, str(self.anchors[name]))


def report_of(shown: Iterable[Shown]) -> Report:
    """The report of some tables; those of one paper stand together, in the order of the first of each."""
    report = Report()
    sections: dict[str, list[Section]] = {}
    papers: dict[str, Paper] = {}
    for one in shown:
        cells = filled(one.paper, one.model, one.scope, report.left_out)
        if cells and (one.always or any(cell.ours is not None for cell in cells)):
            papers[one.paper.name] = one.paper
            sections.setdefault(one.paper.name, []).append(_section(report, one, cells))
    for name, paper in papers.items():
        report.chapters.append(Chapter(report.anchor("table", name), paper, tuple(sections[name])))
    report.left_out = list(dict.fromkeys(report.left_out))
    report.pictures = pictures_of(section.model for _, section in report.sections)
    return report


def _section(report: Report, shown: Shown, cells: Sequence[Filled]) -> Section:
    paper, model, scope = shown.paper, shown.model, shown.scope
    ran = [cell for cell in cells if cell.ours is not None]
    everywhere, marks = _departures(ran)
    if ran:
        _add_cards(report, commands_of(runs_of(cells_of(paper, model, scope))), ran)
    size = ", ".join(scope.called)
    where = ", ".join(word for word in (paper.name, model.name if paper.models else "", size) if word)
    anchors = {
        _place(cell.row, cell.measure): report.anchor(paper.name, model.name, cell.row.label, cell.row.arm.label,
                                                      cell.measure.head)
        for cell in ran
    }  # fmt: skip
    measures = list(dict.fromkeys(cell.measure for cell in cells))
    by_place = {_place(cell.row, cell.measure): cell for cell in cells}
    rows = {(cell.row.label, cell.row.arm): cell.row for cell in cells}
    lines = tuple(
        Line(row.label, row.arm.label, tuple(
            _cell(report, by_place.get(_place(row, measure)), anchors, marks, where) for measure in measures
        ))
        for row in rows.values()
    )  # fmt: skip
    records = {record["path"]: record for cell in ran for record in cell.records}
    cards = [report.cards[Path(path).name] for path in records]
    counts = Counter(cell.verdict for cell in ran)
    given = ["--model", str(model)] if paper.models else []
    return Section(
        anchor=report.anchor("table", paper.name, model.name),
        model=model.name if paper.models else "without a model",
        size=size,
        heads=tuple(Head(m.head, *BETTER[m.better], texts=m.better == "words") for m in measures),
        lines=lines,
        charts=charts_of(cells),
        facts=facts_of(list(records.values()), sum(card.seconds or 0 for card in cards)),
        counts={"cells": len(cells), "run": len(ran)} | {word: counts[word] for word in ("agrees", "near", "off")},
        departs=everywhere,
        marked=tuple((mark, word) for word, mark in marks.items()),
        notes=tuple(notes_of(ran, model.name)),
        command=shlex.join(["python", "-m", "eval", "reproduce", paper.name, *given, *shown.words]),
    )


def _place(row: Row, measure: Measure) -> tuple[Any, ...]:
    return row.label, row.arm, measure


def _departures(ran: Sequence[Filled]) -> tuple[tuple[str, ...], dict[str, str]]:
    """What all cells depart in, and a mark for each thing that only some do."""
    words = dict.fromkeys(word for cell in ran for word in cell.departs)
    everywhere = tuple(word for word in words if all(word in cell.departs for cell in ran))
    return everywhere, {word: _letter(i) for i, word in enumerate(w for w in words if w not in everywhere)}


def _letter(i: int) -> str:
    """a … z, aa, ab …"""
    return (_letter(i // 26 - 1) if i >= 26 else "") + chr(ord("a") + i % 26)


def _add_cards(report: Report, commands: Mapping[str, tuple[tuple[str, ...], float]], ran: Sequence[Filled]) -> None:
    for cell in ran:
        for record in cell.records:
            name = Path(record["path"]).name
            if name not in report.cards:
                lines, seconds = commands.get(name, ((), None))
                report.cards[name] = Card.of(record, lines, seconds)


def _cell(
    report: Report, cell: Filled | None, anchors: Mapping[tuple[Any, ...], str], marks: Mapping[str, str], where: str
) -> Cell:
    """A cell as it is shown; a figure of one run links to its card, one of several to a list of those."""
    if cell is None:
        return Cell("", "")
    number, published = ours(cell), theirs(cell)
    sort = number if number is not None else published
    words = form_of(cell.measure)(published) if published is not None else cell.theirs or ""
    beside = Cell("", str(words), sort="" if sort is None else repr(sort))
    if cell.ours is None:
        return beside
    anchor = anchors[_place(cell.row, cell.measure)]
    row = " ".join(word for word in (cell.row.label, cell.row.arm.label) if word)
    place = Place(anchor, f"{where}: {row}, {cell.measure.head}")
    cards = [report.cards[Path(record["path"]).name] for record in cell.records]
    parts = [Place(other, head) for head in cell.measure.average_of
             for (label, arm, measure), other in anchors.items()
             if (label, arm, measure.head) == (cell.row.label, cell.row.arm, head)]  # fmt: skip
    if parts:
        href = _several(report, place, str(cell.ours), "mean of the columns", parts)
    elif len(cards) == 1:
        href = cards[0].anchor
    else:
        links = [Place(card.anchor, card.file) for card in cards]
        href = _several(report, place, str(cell.ours), "mean ± standard deviation (number) of the runs", links)
    for card in cards:
        card.places.append(place)
    return Cell(
        ours=str(cell.ours),
        theirs=beside.theirs,
        anchor=anchor,
        href=href,
        difference=str(difference_of(cell) or ""),
        verdict=cell.verdict,
        sort=beside.sort,
        marks=() if parts else tuple(marks[word] for word in cell.departs if word in marks),
    )


def _several(report: Report, place: Place, figure: str, how: str, of: Sequence[Place]) -> str:
    anchor = report.anchor("of", place.anchor)
    report.several.append(Several(anchor, figure, place, how, tuple(of)))
    return anchor
