"""Documents and records from local files, whatever format they came in: one small reader, no hub, no loading scripts.

    .parquet                            one column of it
    .arrow, save_to_disk folders        one column of them
    .json                               a list of records, one record a line (as the hub's C4 files are), or any
                                        number of records that go over several lines
    .jsonl, .ndjson                     one record a line, or as .json
    anything else                       plain text: the whole file, or one document a line

JSON and plain text may be packed (.gz, .zst). How text files are opened: `corpora.files`.
A damaged file ends in a UserError that names it: a corpus that is silently shorter would give another number.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError
from corpora.files import TABLES, damaged, open_text, plain_file, refuse_half_characters, suffix_of
from corpora.json_files import FileName, check_values, read_json

__all__ = ["folder_files", "is_plain_text", "read_documents", "read_records", "read_rows"]

JSON = (".json", ".jsonl", ".ndjson")
SPACE = re.compile(r"\s*")
CELLS = (".csv", ".tsv")  # read as plain text, their commas and quotes would be part of it


def read_documents(
    paths: Path | Iterable[Path], field: str = "text", *, line: Callable[[str], str] | None = None
) -> Iterator[str]:
    """Documents of one or several files, in order, lazily.

    field: the column or key that holds the text. line: for plain text files only; None takes a file as one document,
    a function makes one document of every line (which it gets with its line end).
    Raises UserError if a file is missing, damaged, or has no such field.
    """
    for path in [paths] if isinstance(paths, Path) else paths:
        if path.is_dir() or path.suffix.lower() in TABLES:
            yield from _column(path, field)
        elif suffix_of(path) in JSON:
            for number, record in enumerate(read_records(path), start=1):
                text = record.get(field) if isinstance(record, dict) else None
                if not isinstance(text, str):
                    has = ", ".join(record)[:200] if isinstance(record, dict) else type(record).__name__
                    raise UserError(f"{path}: record {number} has no text in the field {field!r}; it has: {has}")
                refuse_half_characters(text, f"{path}: the text of record {number}")
                yield text
        elif suffix_of(path) in CELLS:
            raise UserError(
                f"{path} is a table of cells, which is not read as text; give plain text, or .jsonl or .parquet with "
                f"the field {field!r}"
            )
        else:
            yield from _plain_text(path, line)


def is_plain_text(path: Path) -> bool:
    """Whether a file is read as plain text, by its name."""
    return not path.is_dir() and path.suffix.lower() not in TABLES and suffix_of(path) not in JSON


def read_rows(paths: Path | Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Whole records of one or several parquet, arrow or JSON files, in order, lazily.

    Raises UserError if a file is missing, damaged, of another format, or holds something else than records.
    """
    for path in [paths] if isinstance(paths, Path) else paths:
        if path.is_dir() or path.suffix.lower() in TABLES:
            for file, columns in _tables(path):
                yield from _values_of(file, columns)
        elif suffix_of(path) in JSON:
            for number, record in enumerate(read_records(path), start=1):
                if not isinstance(record, dict):
                    raise UserError(f"{path}: record {number} is a {type(record).__name__}, not an object with fields")
                check_values(record, f"{path}: record {number}", "mend it, or take it out")
                yield record
        else:
            raise UserError(f"{path} is of no format that holds records; give .parquet, .arrow, .json or .jsonl")


def read_records(path: Path) -> Iterator[Any]:
    """Records of a .json or .jsonl file, packed or not: the items of its one list, or its values, lazily if each has a
    line of its own.

    Raises UserError, naming the file and the line, if it is missing or damaged.
    """
    with open_text(path) as file:
        first = True
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value, error = json.loads(line), None
            except (ValueError, RecursionError) as found:
                value, error = None, found
            if first and (error or isinstance(value, list)):
                # One list, or values that go over several lines: all of it, behind as many line ends as were read.
                yield from _values(path, "\n" * (number - 1) + line + file.read())
                return
            if error:
                raise _no_json(path, error, number)
            first = False
            yield value


def _values(path: Path, text: str) -> list[Any]:
    """The values of a JSON text, one after the other; of a single list its items."""
    decoder, values, at = json.JSONDecoder(), [], 0
    while (at := SPACE.match(text, at).end()) < len(text):  # type: ignore[union-attr]  # it matches everywhere
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _no_json(path, error) from None
        values.append(value)
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _no_json(path: Path, error: Exception, line: int = 0) -> UserError:
    """The error for a text that is no JSON. line: of the file, where the error counts only its own."""
    if isinstance(error, json.JSONDecodeError):
        return damaged(path, f"line {line or error.lineno}: {error.msg}")
    return damaged(path, f"line {line}: {error}" if line else error)


def _plain_text(path: Path, line: Callable[[str], str] | None) -> Iterator[str]:
    with open_text(path) as file:
        for text in [file.read()] if line is None else file:
            if "\0" in text:
                raise UserError(f"{path} holds NUL characters, so it is no text in UTF-8; save it as UTF-8")
            yield text if line is None else line(text)


def _column(path: Path, field: str) -> Iterator[str]:
    """One column of a parquet file, an arrow file, or all arrow files of a save_to_disk folder."""
    for file, columns in _tables(path):
        if field not in columns.schema.names:
            raise UserError(f"{file} has no column {field!r}; it has: {', '.join(columns.schema.names)[:200]}")
        for row, text in enumerate(_values_of(file, columns.column(field))):
            if not isinstance(text, str):
                raise UserError(f"{file}: row {row} of column {field!r} holds {repr(text)[:100]}, not text")
            yield text


def _tables(path: Path) -> Iterator[tuple[Path, Any]]:
    """File and record batch, for every batch of a parquet file, an arrow file, or a save_to_disk folder."""
    for file in folder_files(path) if path.is_dir() else [path]:
        plain_file(file)
        with file.open("rb"):  # a missing permission is no damage, but pyarrow reports both as OSError
            pass
        batches = _batches(file)
        while True:
            with _readable(file):
                columns = next(batches, None)
            if columns is None:
                break
            if len(set(columns.schema.names)) < len(columns.schema.names):
                raise UserError(
                    f"{file} has two columns of one name ({', '.join(columns.schema.names)[:200]}); rename one"
                )
            yield file, columns


def _values_of(file: Path, cells: Any) -> list[Any]:
    """The cells of a column, or the rows of a record batch, as Python's values."""
    with _readable(file):
        return list(cells.to_pylist())


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises at a damaged file, or at a value that Python does not have, into a UserError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, EOFError, ValueError, OverflowError) as error:
        raise damaged(file, " ".join(str(error).split())[:200]) from None


def _batches(file: Path) -> Iterator[Any]:
    """Record batches of one parquet or arrow file; arrow comes as a stream (datasets) or as a file with a footer."""
    import pyarrow
    import pyarrow.parquet

    if file.suffix.lower() == ".parquet":
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from table.iter_batches()
        return
    with pyarrow.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            source.seek(0)
            batches = iter(pyarrow.ipc.open_stream(source))
        for columns in batches:
            columns.validate(full=True)  # arrow takes the offsets of texts from the file as they are
            yield columns


class _DataFile(TypedDict):
    filename: FileName


class _State(TypedDict):
    _data_files: list[_DataFile]


def folder_files(folder: Path) -> list[Path]:
    """Arrow files of a folder that datasets.save_to_disk wrote, in their order. Raises UserError for another folder."""
    state = folder / "state.json"
    if not state.is_file():
        raise UserError(
            f"{folder} is a folder, but not one that datasets.save_to_disk wrote for a single split (no state.json); "
            "name a file, or the folder of one split"
        )
    found = read_json(state, "the list of a data set's files", _State, mend="mend it, or save the data set again")
    return [folder / entry["filename"] for entry in found["_data_files"]]
