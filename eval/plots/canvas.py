"""What every figure shares: a headless canvas, colours, and where pictures and their numbers are written."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator

from corpora.errors import UserError
from corpora.files import name_part
from corpora.targets import MARK, check_ours
from corpora.writing import write_all

__all__ = [
    "BEHIND",
    "FORMATS",
    "GREY",
    "INTACT",
    "ORANGE",
    "SERIES",
    "VANILLA",
    "Output",
    "file_name",
    "literal",
    "output_for",
    "plt",
]

# Okabe and Ito's vermilion, blue, green and orange: told apart with any colour vision.
VANILLA = "#d55e00"
INTACT = "#0072b2"
BEHIND = "#009e73"
ORANGE = "#e69f00"
SERIES = (INTACT, ORANGE, BEHIND, VANILLA)
GREY = "0.35"

# Without the time of writing the same numbers give the same file.
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"Software": MARK},
    "pdf": {"Creator": MARK, "CreationDate": None},
    "svg": {"Creator": MARK, "Date": None},
}


@dataclass(frozen=True)
class Output:
    """Where a command's figures go. stem: path without a suffix; the parts of a command that draws several figures are
    added to it. written: the files so far, in the order of writing."""

    stem: Path
    formats: tuple[str, ...] = ("png", "pdf")
    dpi: int = 200
    written: list[Path] = field(default_factory=list)

    def path(self, part: str, suffix: str) -> Path:
        """The file of a part ("" for the command's only or combined figure) in one format."""
        return self.stem.with_name(f"{self.stem.name}{f'__{part}' if part else ''}.{suffix}")

    def save(self, figure: Any, head: Sequence[str], rows: Iterable[Sequence[Any]], part: str = "") -> None:
        """Write a figure in every format and its numbers as CSV under the same name, all or none; closes the figure."""
        paths = {suffix: self.path(part, suffix) for suffix in (*self.formats, "csv")}
        contents: dict[Path, bytes] = {}
        try:
            for path in paths.values():  # of a part, whose name is only known now
                check_ours(path)
            _draw_words(figure)
            for suffix in self.formats:
                # In memory: what matplotlib's writers raise at a full disk depends on the format.
                drawn = io.BytesIO()
                figure.savefig(drawn, format=suffix, dpi=self.dpi, bbox_inches="tight", metadata=FORMATS[suffix])
                contents[paths[suffix]] = drawn.getvalue()
        finally:
            plt.close(figure)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)
        contents[paths["csv"]] = text.getvalue().encode(errors="replace")
        write_all(contents)
        self.written.extend(contents)


def _draw_words(figure: Any) -> None:
    """Let matplotlib draw words as they are: a dollar in a model's name starts no formula. The figures along an axis
    may be formulas: powers of ten are."""
    axes = [axis for one in figure.axes for axis in (one.xaxis, one.yaxis, getattr(one, "zaxis", one.xaxis))]
    numbers = [axis for axis in axes if not isinstance(axis.get_major_locator(), FixedLocator)]
    formulas = {id(label) for axis in numbers for label in axis.get_ticklabels(which="both")}
    for text in figure.findobj(Text):
        text.set_parse_math(id(text) in formulas)
        text.set_text(literal(text.get_text()))


def literal(text: str) -> str:
    """Words as they can be drawn: lines of what can be printed. A label that starts with _ would be in no legend."""
    plain = "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)
    return f" {plain}" if plain.startswith("_") else plain


def file_name(*parts: str) -> str:
    """The parts that are not empty as `a__b__c`, with a dash for whatever has no place in the name of a file."""
    return name_part("__".join(re.sub(r"[^\w.+=-]+", "-", part) for part in parts if part))


def output_for(out: Path, name: str, formats: str, dpi: int) -> Output:
    """Where a command writes, as its options say.

    out: a directory, whose files are called `name`, or a file in one of the formats, whose name replaces `name` and
    whose format is added to the others. formats: a comma list. Raises UserError for what cannot be written.
    """
    chosen = [word.strip() for word in formats.split(",")]
    if unknown := [word for word in chosen if word not in FORMATS]:
        raise UserError(f"--format {formats}: {unknown[0]!r} is not known; give a comma list of {', '.join(FORMATS)}")
    stem = out / name
    if out.suffix and not out.is_dir():
        if out.suffix[1:] not in FORMATS:
            raise UserError(
                f"--out {out}: figures are written as {', '.join(FORMATS)}; give a file with one of these endings, "
                "or a directory (one whose name has a dot must exist)"
            )
        chosen.insert(0, out.suffix[1:])
        stem = out.with_suffix("")
    elif out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file without an ending; give a directory, or a file ending in .png")
    return Output(stem, tuple(dict.fromkeys(chosen)), dpi)
