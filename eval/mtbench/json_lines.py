"""Files of JSON lines that grow one result at a time and survive a kill.

Each line is on the disk before the next result is made. What a kill leaves, a last line without its end, is dropped and
made again; a finished file is sorted, each key once. Of several processes each writes a part of its own, and one joins
them. A file in which anything else stands is somebody else's: it is refused and stays as it is.
"""

import glob
import json
import os
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpora.errors import UserError
from corpora.json_files import parse_json
from corpora.json_lines import LONGEST, whole_characters
from corpora.writing import only_one, refuse_special, write_beside

__all__ = ["LineFile", "Lines", "only_writer", "part_of", "parts_of", "refuse_other_lines"]


@dataclass(frozen=True)
class Lines:
    """A kind of line. what: a file of them is called; form: of one (`corpora.json_files`); key: what it is about;
    beginning: of every line that is written here (the default is FastChat's, too)."""

    what: str
    form: Any
    key: Callable[[dict[str, Any]], Any]
    beginning: bytes = b'{"question_id": '


class LineFile:
    """Results by their key. Of two lines with one key the last one counts.

    Opening reads what is there; a last line that a kill broke is dropped from the file at once, so that the next line
    does not join it. Raises UserError for what is no file of such lines, which stays as it is.
    """

    def __init__(self, path: Path, lines: Lines) -> None:
        self.path, self.lines = path, lines
        kept, self.dropped, ended = _read(path, lines)  # dropped: lines that a kill broke
        self.rows: dict[Any, dict[str, Any]] = {lines.key(row): row for row in kept}
        if self.dropped or not ended:
            self._write(kept)

    def append(self, row: dict[str, Any]) -> None:
        """Add a result; it is on the disk when this returns. Nothing stays of one without room: the next line
        would join it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            end, left = file.tell(), _line(row).encode()
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(end)
                raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.rows[self.lines.key(row)] = row

    def join(self) -> None:
        """Take in what parts of the file hold, and remove them. A kill in between loses no result: a part that was
        taken in already is taken in again."""
        parts = parts_of(self.path)
        for part in parts:
            self.rows |= LineFile(part, self.lines).rows
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


def refuse_other_lines(path: Path, lines: Lines) -> None:
    """Raise UserError if something stands at a path that is no file of such lines."""
    _read(path, lines)


def _read(path: Path, lines: Lines) -> tuple[list[dict[str, Any]], int, bool]:
    """The rows of a file, how many lines a kill broke, and whether its last line has an end."""
    refuse_special(path, lines.what)
    if not path.exists():
        return [], 0, True
    if path.stat().st_size > LONGEST:
        raise UserError(f"{path} is too large to be {lines.what}; name another file")
    *whole, last = path.read_bytes().split(b"\n")
    if broken := _is_cut(last, lines.beginning):
        last = b""
    mend = f"if it is {lines.what}, mend the line; else name another file"
    rows = []
    for number, line in enumerate((*whole, last), 1):
        if not line.strip():
            continue
        what = f"{path}, line {number},"
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise UserError(f"{what} is no text in UTF-8; {mend}") from None
        rows.append(parse_json(whole_characters(text), what, lines.form, mend=mend))
    return rows, int(broken), not (broken or last)


def _is_cut(line: bytes, beginning: bytes) -> bool:
    """Whether a file's last piece is the beginning of a line, as a kill leaves it."""
    if not line or line[: len(beginning)] != beginning[: len(line)]:
        return False
    try:
        json.loads(line)
    except RecursionError:
        return False
    except ValueError:
        return True
    return False


def part_of(path: Path, index: int) -> Path:
    """A new file that one of several processes writes for a file; hidden, so that no pattern for such files finds it.
    No two share one: a process of a killed run may still live on another machine."""
    return path.with_name(f".{path.name}.part-{index}-{secrets.token_hex(4)}")


def parts_of(path: Path) -> list[Path]:
    """Parts of a file that were not joined yet."""
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.part-*"))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=True) + "\n"


def only_writer(path: Path) -> AbstractContextManager[None]:
    """Hold a file against other processes. Raises UserError if one of them writes it now."""
    return only_one(path, f"another process is writing {path}; wait until it has finished")
