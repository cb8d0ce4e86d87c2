"""Tables as text: Markdown to read, CSV to compute with, LaTeX (booktabs) for a paper; one model of a table for all.

A figure over several seeds prints as `mean ± sd (n)`: sd is the sample standard deviation, n the number of runs.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

__all__ = ["STYLES", "Cell", "Figure", "Table", "change_of", "in_percent", "mean_of", "percent", "plain", "render",
           "signed", "signed_percent"]  # fmt: skip

STYLES = ("markdown", "csv", "latex")
ABSENT = "n/a"


def plain(value: float) -> str:
    """Two decimals, three digits from 1000 on: perplexities, accuracies in percent."""
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.3g}"


def signed(value: float) -> str:
    """The same with its sign: differences."""
    return f"{value:+.2f}" if abs(value) < 1000 else f"{value:+.3g}"


def percent(value: float) -> str:
    """A fraction as percent."""
    return f"{value:.1%}"


def signed_percent(value: float) -> str:
    """A relative change as percent, with its sign."""
    return f"{value:+.1%}"


def in_percent(metric: str, value: float) -> float:
    """A metric as it is printed: fractions of the questions in percent, others (perplexity, BLEU) as they are."""
    name = metric.partition(",")[0]  # lm-eval's filter may stand behind
    return 100 * value if name in ("acc", "acc_norm", "exact_match") or name.endswith("_acc") else value


@dataclass(frozen=True)
class Figure:
    """A number of a table. value, and over `runs` > 1 runs their mean with the sample standard deviation `deviation`.

    form: how the number is printed; CSV holds the number itself. asked: for how many runs, where some may be missing.
    """

    value: float
    form: Callable[[float], str] = plain
    deviation: float | None = None
    runs: int = 1
    asked: int = 1

    def __str__(self) -> str:
        number = self.form(self.value)
        if self.deviation is not None:
            number = f"{number} ± {self.form(self.deviation).lstrip('+')}"
        if self.asked > self.runs:
            return f"{number} ({self.runs} of {self.asked} seeds)"
        return number if self.deviation is None else f"{number} ({self.runs})"


Cell = str | Figure | None  # words, a number, or nothing: not run


def mean_of(values: Sequence[float], form: Callable[[float], str] = plain) -> Figure | None:
    """One figure of several runs: their mean and spread, the figure alone for one run, None for none."""
    if not values:
        return None
    deviation = stdev(values) if len(values) > 1 else None
    return Figure(fmean(values), form, deviation, len(values))


def change_of(
    alone: Mapping[int | None, float], other: Mapping[int | None, float], relative: bool = False
) -> Figure | None:
    """One figure of how other runs differ from those alone, over the seeds that both have; None if they share none.

    alone, other: values by seed. relative: as a fraction of the value alone, not as a difference.
    """
    both = [(alone[seed], value) for seed, value in other.items() if seed in alone]
    if relative:
        return mean_of([value / base - 1 for base, value in both], signed_percent)
    return mean_of([value - base for base, value in both], signed)


@dataclass(frozen=True)
class Table:
    """A head and rows of as many cells; the first `words` columns are words. caption, notes: what a reader must know.

    Heads name the columns of CSV, too: no head twice in a table that is written so, and tables share columns by them.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: int = 1
    notes: tuple[str, ...] = ()


def render(tables: Sequence[Table], style: str) -> str:
    """Tables as text in one of `STYLES`; it ends with a line feed."""
    if style == "csv":
        return _csv(tables)
    one = {"markdown": _markdown, "latex": _latex}[style]
    return "\n\n".join(one(table) for table in tables) + "\n"


def _words(cell: Cell) -> str:
    """A cell as text of one line, whatever a stranger's record calls its model: what cannot be printed is spelled."""
    text = ABSENT if cell is None else str(cell)
    return text if text.isprintable() else "".join(s if s.isprintable() else repr(s)[1:-1] for s in text)


def _markdown(table: Table) -> str:
    """A Markdown table whose source is aligned, too: words to the left, figures to the right."""
    lines = [tuple(_words(cell).replace("|", r"\|") for cell in row) for row in (table.head, *table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    right = [i >= table.words for i in range(len(widths))]
    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    text = [
        "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)) + " |"
        for line in lines
    ]
    notes = ["", *(f"- {_words(note)}" for note in table.notes)] if table.notes else []
    return "\n".join([_words(table.caption), "", text[0], rule, *text[1:], *notes])


def _csv(tables: Sequence[Table]) -> str:
    """All tables as one, a column for every head there is; captions become the column `table`.

    Numbers have six digits. A column with a spread is followed by its standard deviation (` sd`) and count (` runs`);
    what was not run is empty. Notes are for readers and stay out.
    """
    heads = list(dict.fromkeys(head for table in tables for head in table.head))
    lines = [(table.caption, dict(zip(table.head, row, strict=True))) for table in tables for row in table.rows]
    captions = any(table.caption for table in tables)
    spread = {
        head
        for _, line in lines
        for head, cell in line.items()
        if isinstance(cell, Figure) and cell.deviation is not None
    }
    first = ["table"] if captions else []
    for head in heads:
        first += [head, f"{head} sd", f"{head} runs"] if head in spread else [head]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(first)
    for caption, line in lines:
        fields = [_words(" ".join(caption.split()))] if captions else []
        for head in heads:
            fields += _csv_fields(line.get(head), head in spread)
        writer.writerow(fields)
    return out.getvalue()


def _csv_fields(cell: Cell, spread: bool) -> list[str]:
    """A cell as one field, or as three where its column has a spread."""
    if not isinstance(cell, Figure):
        return [_words(cell) if cell else "", *(["", ""] if spread else [])]
    deviation = "" if cell.deviation is None else f"{cell.deviation:.6g}"
    return [f"{cell.value:.6g}", *([deviation, str(cell.runs)] if spread else [])]


LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "→": r"$\to$",
    "<": "$<$",
    ">": "$>$",
    "`": r"\textasciigrave{}",
    "[": "{[}",  # behind a line's end LaTeX would read [ and * as options of it
    "*": "{*}",
} | {sign: f"\\{sign}" for sign in "&%$#_"}


def _escaped(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in text)


def _latex_cell(cell: Cell) -> str:
    text = _escaped(_words(cell))
    return f"$-${text[1:]}" if isinstance(cell, Figure) and text.startswith("-") else text


def _latex(table: Table) -> str:
    """A table environment; needs \\usepackage{booktabs}. Notes stand below it in small print."""
    columns = "l" * table.words + "r" * (len(table.head) - table.words)
    lines = [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in (table.head, *table.rows)]
    notes = [rf"\par\footnotesize {_escaped(_words(note))}" for note in table.notes]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(_words(' '.join(table.caption.split())))}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            *notes,
            r"\end{table}",
        ]
    )
