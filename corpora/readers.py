"""Documents and records from local files, whatever format they came in: one small reader, no hub, no loading scripts.

    .parquet                            one column of it
    .arrow, save_to_disk folders        one column of them
    .json                               a list of records, or one record a line (as the hub's C4 files are)
    .jsonl, and .json/.jsonl + .gz/.zst one record a line
    anything else                       plain text in UTF-8: the whole file, or one document a line

A damaged file ends in a UserError that names it: a corpus that is silently shorter would give another number.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from corpora.errors import UserError

__all__ = ["read_documents", "read_records", "read_rows"]


def read_documents(
    paths: Path | Iterable[Path], field: str = "text", *, line: Callable[[str], str] | None = None
) -> Iterator[str]:
    """Documents of one or several files, in order, lazily.

    field: the column or key that holds the text. line: for plain text files only; None takes a file as one document,
    a function makes one document of every line (which it gets with its line end).
    Raises UserError if a file is missing, damaged, or has no such field.
    """
    for path in [paths] if isinstance(paths, Path) else paths:
        if path.is_dir() or path.suffix in (".parquet", ".arrow"):
            yield from _column(path, field)
        elif _is_json(path):
            for number, record in enumerate(read_records(path), start=1):
                text = record.get(field) if isinstance(record, dict) else None
                if not isinstance(text, str):
                    has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                    raise UserError(f"{path}: record {number} has no text in the field {field!r}; it has: {has}")
                yield text
        else:
            yield from _plain_text(path, line)


def read_rows(paths: Path | Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Whole records of one or several parquet, arrow or JSON files, in order, lazily.

    Raises UserError if a file is missing, damaged, of another format, or holds something else than records.
    """
    for path in [paths] if isinstance(paths, Path) else paths:
        if path.is_dir() or path.suffix in (".parquet", ".arrow"):
            for _, columns in _tables(path):
                yield from columns.to_pylist()
        elif _is_json(path):
            for number, record in enumerate(read_records(path), start=1):
                if not isinstance(record, dict):
                    raise UserError(f"{path}: record {number} is a {type(record).__name__}, not an object with fields")
                yield record
        else:
            raise UserError(f"{path} is of no format that holds records; give .parquet, .arrow, .json or .jsonl")


def read_records(path: Path) -> Iterator[Any]:
    """Records of a .json, .jsonl, .json.gz or .json.zst file: the items of its one list, or one value a line.

    Raises UserError, naming the file and the line, if it is missing or damaged.
    """
    try:
        with _open_text(path) as file:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            if first == "[":
                yield from json.loads(first + file.read())
                return
            rest = first + file.readline()
            number = 1
            while rest:
                if rest.strip():
                    yield json.loads(rest)
                rest = file.readline()
                number += 1
    except json.JSONDecodeError as error:
        where = f"line {number}" if first != "[" else f"line {error.lineno}"
        raise _damaged(path, f"{where}: {error.msg}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None


def _is_json(path: Path) -> bool:
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")]
    return bool(suffixes) and suffixes[-1] in (".json", ".jsonl")


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        return io.TextIOWrapper(_zstd_stream(path), encoding="utf-8")
    return path.open(encoding="utf-8-sig")


def _zstd_stream(path: Path) -> IO[bytes]:
    import zstandard

    class WholeFrames(io.RawIOBase):
        """The unpacked bytes; a file that ends inside a frame is an error, as it is for gzip."""

        def __init__(self) -> None:
            self._file = path.open("rb")
            self._unpack = zstandard.ZstdDecompressor().decompressobj()
            self._ready = b""

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            while not self._ready:
                packed = self._unpack.unused_data or self._file.read(1 << 20)
                if self._unpack.eof:
                    if not packed:
                        return 0
                    self._unpack = zstandard.ZstdDecompressor().decompressobj()  # the next frame
                elif not packed:
                    raise EOFError("the file ends inside a zstd frame")
                try:
                    self._ready = self._unpack.decompress(packed)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from None
            size = min(len(buffer), len(self._ready))
            buffer[:size], self._ready = self._ready[:size], self._ready[size:]
            return size

        def close(self) -> None:
            self._file.close()
            super().close()

    return io.BufferedReader(WholeFrames())


def _plain_text(path: Path, line: Callable[[str], str] | None) -> Iterator[str]:
    try:
        if line is None:
            yield path.read_bytes().decode("utf-8-sig")  # not read_text: it would rewrite line ends
        else:
            with path.open(encoding="utf-8-sig") as file:
                yield from map(line, file)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not plain text in UTF-8 ({error.reason} at byte {error.start})") from None
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None


def _column(path: Path, field: str) -> Iterator[str]:
    """One column of a parquet file, an arrow file, or all arrow files of a save_to_disk folder."""
    for file, columns in _tables(path):
        if field not in columns.schema.names:
            raise UserError(f"{file} has no column {field!r}; it has: {', '.join(columns.schema.names)}")
        for row, text in enumerate(columns.column(field).to_pylist()):
            if not isinstance(text, str):
                raise UserError(f"{file}: row {row} of column {field!r} holds {text!r}, not text")
            yield text


def _tables(path: Path) -> Iterator[tuple[Path, Any]]:
    """File and record batch, for every batch of a parquet file, an arrow file, or a save_to_disk folder."""
    import pyarrow

    for file in _folder_files(path) if path.is_dir() else [path]:
        try:
            for columns in _batches(file):
                yield file, columns
        except FileNotFoundError:
            raise UserError(f"{file} is missing") from None
        except PermissionError:  # an OSError too, which is how pyarrow reports damage
            raise
        except (pyarrow.ArrowInvalid, pyarrow.ArrowIOError, EOFError) as error:
            raise _damaged(file, error) from None


def _batches(file: Path) -> Iterator[Any]:
    """Record batches of one parquet or arrow file; arrow comes as a stream (datasets) or as a file with a footer."""
    import pyarrow
    import pyarrow.parquet

    if file.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from table.iter_batches()
        return
    with pyarrow.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)


def _folder_files(folder: Path) -> list[Path]:
    """Arrow files of a folder that datasets.save_to_disk wrote, in their order."""
    state = folder / "state.json"
    if not state.is_file():
        raise UserError(
            f"{folder} is a folder, but not one that datasets.save_to_disk wrote for a single split (no state.json); "
            "name a file, or the folder of one split"
        )
    try:
        return [folder / entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise _damaged(state, error) from None


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(f"{path} is truncated or damaged ({reason}); delete it and fetch it again")
