"""What a program may write to: the file or directory of an --out, looked at before the work.

- A regular file or a directory, as the program says; never a device, a pipe, a socket or a link (`os.replace` would put
  a file in its place), and never what the program reads.
- Missing parents are made; what is there of them must be a directory that can be written to.
- A file that is there is replaced only if this project wrote it, and as a file of the same kind: figures and tables
  carry `MARK`, a CSV lies beside the figure of its name or has a table's head, and those in outputs/figures and
  outputs/stats are the project's in any case. A report carries `REPORT`. Other kinds are recognised by their readers.

Only the standard library is imported here.
"""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from corpora.errors import UserError
from corpora.paths import outputs_dir
from corpora.writing import refuse_special

__all__ = ["MARK", "REPORT", "check_ours", "check_report", "check_target", "check_written", "inputs_of"]

MARK = "made by IntactKV"
REPORT = "report by IntactKV"  # within the first part of a report
TABLES = (b"protocol,model,weights,", b"table,")  # how a table of ours begins as CSV
FIGURES = (".png", ".pdf", ".svg")
LONGEST_NAME = 180  # bytes; what lies beside a file (its lock, parts, figures) has a longer name than the file


def check_target(path: Path, *, directory: bool = False, reads: Iterable[Path] = (), option: str = "--out") -> bool:
    """Refuse what cannot be, or must not be written to; says whether something is there already.

    directory: a directory is written, not a file. reads: what the program reads. Raises UserError.
    """
    what = "a directory" if directory else "a file"
    try:
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise UserError(f"{option} {path}: the name is too long; give one of up to {LONGEST_NAME} bytes")
        if not directory:
            refuse_special(path, option)
        elif os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
            raise UserError(f"{option} {path} is there and no directory; name another")
        there = os.path.lexists(path)
        for read in reads:
            if os.path.exists(read) and (path.resolve() == read.resolve() or (there and path.samefile(read))):
                raise UserError(f"{option} {path} is what the program reads; name {what} of its own")
        _check_parent(path, option)
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written ({error.strerror}); name {what} elsewhere") from None
    return there


def _check_parent(path: Path, option: str) -> None:
    """Refuse a place where nothing can be made."""
    parent = path.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{option} {path}: {parent} is no directory; name a place elsewhere")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: nothing can be written in {parent}; name a place elsewhere")


def check_ours(path: Path, option: str = "--out") -> None:
    """Refuse to replace a figure, its numbers or a table that this project did not write. Raises UserError."""
    if not os.path.lexists(path) or (path.suffix in (*FIGURES, ".csv") and _is_drawn(path.resolve())):
        return
    marked = [path]
    if path.suffix == ".csv":  # which has no place for a mark
        marked = [beside for ending in FIGURES for beside in path.parent.glob(f"{glob.escape(path.stem)}*{ending}")]
    if not path.read_bytes().startswith(TABLES) and not any(_is_marked(file) for file in marked):
        raise UserError(
            f"{option} {path} is there and was not written by this program; remove it, or name another file"
        )


def check_written(files: Iterable[Path], reads: Iterable[Path] = (), option: str = "--out") -> None:
    """Both, for figures, their numbers and tables. Raises UserError."""
    reads = list(reads)
    for file in files:
        if check_target(file, reads=reads, option=option):
            check_ours(file, option)


def check_report(path: Path, option: str = "--out") -> None:
    """Refuse what cannot be written, is called otherwise than a page, or is there and no report. Raises UserError."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{option} {path}: a report is a page for a browser; give a file ending in .html")
    if check_target(path, option=option):
        with path.open("rb") as file:
            if REPORT.encode() not in file.read(2000):
                raise UserError(
                    f"{option} {path} is there and no report of this program; remove it, or name another file"
                )


def _is_marked(file: Path) -> bool:
    return file.is_file() and MARK.encode() in file.read_bytes()


def _is_drawn(path: Path) -> bool:
    """Whether it lies where figures and their numbers go without --out; those of before carry no mark."""
    return any(path.is_relative_to((outputs_dir() / name).resolve()) for name in ("figures", "stats"))


def inputs_of(options: Iterable[object]) -> list[Path]:
    """Those of the values of a program's options that name something that is there: what it may read."""
    words = [word for value in options for word in (value if isinstance(value, list | tuple) else [value])]
    return [Path(word) for word in words if isinstance(word, str | Path) and os.path.lexists(word)]
