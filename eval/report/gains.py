"""What an intact prefix changes, row by row: ours beside the published change, for a small chart.

    perplexity: 1 − behind / alone        accuracy: behind − alone, in points

Each is the mean over the columns of its kind where both arms have a figure; averages of columns count no second time.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from eval.tables.compare import Filled
from eval.tables.declared import Measure, Row
from eval.tables.render import Figure

__all__ = ["Chart", "Gain", "charts_of"]

KINDS = {"lower": ("perplexity", "%"), "higher": ("score", "points")}


@dataclass(frozen=True)
class Gain:
    """Of one row's method behind one arm, in the chart's unit; positive is better. None: not run, or not published."""

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
    def falls(self) -> bool:
        """Whether something is worse behind the prefix."""
        return any(value < 0 for gain in self.gains for value in (gain.ours, gain.theirs) if value is not None)


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
    alone = {(cell.row.label, cell.measure): cell for cell in cells if _is_alone(cell.row)}
    for label, arm in dict.fromkeys((cell.row.label, cell.row.arm) for cell in cells if not _is_alone(cell.row)):
        behind = [cell for cell in cells if (cell.row.label, cell.row.arm) == (label, arm)]
        pairs = [(cell, alone[label, cell.measure]) for cell in behind if (label, cell.measure) in alone]
        gain = Gain(label, arm.label, _mean(pairs, ours), _mean(pairs, theirs))
        if gain.ours is not None or gain.theirs is not None:
            yield gain


def _is_alone(row: Row) -> bool:
    return row.arm.prefix == "none"


def ours(cell: Filled) -> float | None:
    """Our figure as a number; None for words and for what was not run."""
    return cell.ours.value if isinstance(cell.ours, Figure) else None


def theirs(cell: Filled) -> float | None:
    """The published figure as a number."""
    return float(cell.theirs) if isinstance(cell.theirs, int | float) else None


def _mean(pairs: Sequence[tuple[Filled, Filled]], side: Callable[[Filled], float | None]) -> float | None:
    found = [_gain(cell.measure, base, value) for cell, alone in pairs
             if (base := side(alone)) is not None and (value := side(cell)) is not None]  # fmt: skip
    return fmean(found) if found else None


def _gain(measure: Measure, alone: float, behind: float) -> float:
    return 100 * (1 - behind / alone) if measure.better == "lower" else behind - alone
