"""Files of JSON lines that grow one result at a time and survive a kill.

Each line is on the disk before the next result is made. What a kill leaves, a last line without its end, is dropped and
made again; a finished file is sorted, each key once. Of several processes each writes a part of its own, and one joins
them.
"""

import fcntl
import glob
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corpora.errors import UserError
from corpora.files import open_text
from corpora.writing import write_beside

__all__ = ["LineFile", "only_writer", "part_of", "parts_of", "read_lines"]


def read_lines(path: Path, what: str, fields: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The objects of a file that is expected to be whole. Raises UserError for one that is not, naming `what` it is."""
    rows = []
    with open_text(path, what) as file:
        text = file.read()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = _parsed(line)
        if row is None:
            raise UserError(f"{what} {path}, line {number}, is no JSON object; mend the line or fetch the file again")
        if missing := [field for field in fields if field not in row]:
            raise UserError(
                f"{what} {path}, line {number}, has no {missing[0]!r}; every line needs {', '.join(fields)}"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{what} {path} is empty")
    return rows


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


class LineFile:
    """Results by their key. Of two lines with one key the last one counts.

    key: of a line; None for a line that is no result. Opening reads what is there; lines that a kill broke are dropped
    from the file at once, so that the next line does not join them.
    """

    def __init__(self, path: Path, key: Callable[[dict[str, Any]], Any]) -> None:
        self.path, self.key = path, key
        self.rows: dict[Any, dict[str, Any]] = {}
        text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
        lines = [line for line in text.split("\n") if line.strip()]
        kept = [row for line in lines if (row := _parsed(line)) is not None and key(row) is not None]
        for row in kept:
            self.rows[key(row)] = row
        self.dropped = len(lines) - len(kept)  # lines that were no results
        if self.dropped or not text.endswith("\n"):
            self._write(kept)

    def append(self, row: dict[str, Any]) -> None:
        """Add a result; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())
        self.rows[self.key(row)] = row

    def join(self) -> None:
        """Take in what parts of the file hold, and remove them. A kill in between loses no result: a part that was
        taken in already is taken in again."""
        parts = parts_of(self.path)
        for part in parts:
            self.rows |= LineFile(part, self.key).rows
        if parts:
            self._write(list(self.rows.values()))
        for part in parts:
            part.unlink()

    def finish(self, order: Callable[[dict[str, Any]], Any]) -> None:
        """Sort the file and keep the last line of each key."""
        if self.rows:
            self._write(sorted(self.rows.values(), key=order))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if not rows and not self.path.exists():
            return
        with write_beside(self.path) as beside:
            beside.write_text("".join(_line(row) for row in rows), encoding="utf-8")


def part_of(path: Path, index: int) -> Path:
    """The file that one of several processes writes for a file; hidden, so that no pattern for such files finds it."""
    return path.with_name(f".{path.name}.part-{index}")


def parts_of(path: Path) -> list[Path]:
    """Parts of a file that were not joined yet."""
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.part-*"))


def _line(row: dict[str, Any]) -> str:
    # Answers may hold a lone surrogate, which no UTF-8 file can: ASCII escapes can.
    return json.dumps(row, ensure_ascii=True) + "\n"


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold a file against other processes. Raises UserError if one of them writes it now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {path}; wait until it has finished") from None
        yield
