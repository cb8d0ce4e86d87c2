"""What an intact prefix changes, row by row: ours beside the published change, for a small chart.

    perplexity: behind / alone − 1, in %        accuracy: behind − alone, in points

`eval.tables.compare.changes_of` takes them, as for the table on stdout: alone reads the same tokens. Each is the mean
over the columns of its kind that have a change; averages of columns count no second time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from eval.tables.asked import bases_of
from eval.tables.compare import Filled, RowPlace, changes_of, row_place
from eval.tables.render import Figure

__all__ = ["Chart", "Gain", "charts_of"]

KINDS = {"lower": ("perplexity", "%"), "higher": ("score", "points")}


@dataclass(frozen=True)
class Gain:
    """Of one row's method behind one arm, in the chart's unit: a perplexity falls, a score rises. None: not told."""

    label: str
    arm: str
    ours: float | None
    theirs: float | None


@dataclass(frozen=True)
class Chart:
    """Gains of one kind. reach: the largest of them, without sign: how far a bar can go."""

    title: str
    unit: str
    gains: tuple[Gain, ...]

    @property
    def reach(self) -> float:
        return max(abs(value) for gain in self.gains for value in (gain.ours, gain.theirs) if value is not None) or 1.0

    @property
    def published(self) -> bool:
        """Whether the paper has a gain beside one of ours."""
        return any(gain.theirs is not None for gain in self.gains)

    @property
    def mean(self) -> float:
        """Of our gains."""
        return fmean(gain.ours for gain in self.gains if gain.ours is not None)

    @property
    def zero(self) -> int:
        """Where it lies, in hundredths of the width: in the middle where some rise and others fall, else at an end."""
        signs = {value < 0 for gain in self.gains for value in (gain.ours, gain.theirs) if value}
        return 50 if len(signs) > 1 else 100 if True in signs else 0


def charts_of(filled: Sequence[Filled]) -> tuple[Chart, ...]:
    """A chart for every kind of measure that has a gain of ours; of published ones alone there is none."""
    charts = []
    for better, (title, unit) in KINDS.items():
        cells = [cell for cell in filled if cell.measure.better == better and not cell.measure.average_of]
        gains = tuple(_gains(cells))
        if any(gain.ours is not None for gain in gains):
            charts.append(Chart(title, unit, gains))
    return tuple(charts)


def _gains(cells: Sequence[Filled]) -> Iterable[Gain]:
    rows = {row_place(cell.row): cell.row for cell in cells}
    by_ours: list[Mapping[RowPlace, Figure | None]] = []
    by_theirs: list[Mapping[RowPlace, Figure | None]] = []
    for measure in dict.fromkeys(cell.measure for cell in cells):
        ones = {row_place(cell.row): cell for cell in cells if cell.measure == measure}
        by_ours.append(changes_of(
            measure, {place: one.values for place, one in ones.items()},
            {place: one.against for place, one in ones.items()},
        ))  # fmt: skip
        by_theirs.append(changes_of(
            measure, {place: (theirs(one),) for place, one in ones.items()},
            {place: bases_of(one.row, measure, rows.values()) for place, one in ones.items()},
        ))  # fmt: skip
    unit = 100.0 if cells and cells[0].measure.better == "lower" else 1.0  # a share in %
    for place in rows:
        gain = Gain(place[0], place[1].label, _mean(place, by_ours, unit), _mean(place, by_theirs, unit))
        if gain.ours is not None or gain.theirs is not None:
            yield gain


def _mean(place: RowPlace, changes: Iterable[Mapping[RowPlace, Figure | None]], unit: float) -> float | None:
    found = [unit * change.value for of_column in changes if (change := of_column.get(place)) is not None]
    return fmean(found) if found else None


def ours(cell: Filled) -> float | None:
    """Our figure as a number; None for words and for what was not run."""
    return cell.ours.value if isinstance(cell.ours, Figure) else None


def theirs(cell: Filled) -> float | None:
    """The published figure as a number."""
    return float(cell.theirs) if isinstance(cell.theirs, int | float) else None
