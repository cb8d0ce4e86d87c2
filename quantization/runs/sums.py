"""The sums of a quantized checkpoint's files: who reads one of them compares its bytes before anything is parsed.

`checksums.json` is there from the first finished block on: a resumed run trusts no block that changed meanwhile.
"""

import logging
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError
from corpora.files import plain_file, sha256_of_file
from corpora.json_files import Count, FileName, Hash, read_json, write_json
from corpora.storage import identity

__all__ = [
    "CHECKSUMS",
    "EARLIER_CHECKSUMS",
    "add_sum",
    "checked",
    "drop_changed",
    "known_sums",
    "read_cost",
    "sum_of",
    "sums_of",
]

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"  # of the files, and what the run took that finished them
EARLIER_CHECKSUMS = "cost.json"  # the same, of checkpoints that were written before it had this name
AGAIN = "copy it again, or delete the directory and quantize again"


class _Sums(TypedDict):
    sha256: dict[FileName, Hash]
    sum: NotRequired[Hash]  # of all the rest


class _Cost(_Sums):
    seconds: float
    peak_memory_mb: float
    bits_per_weight: float | None
    figures: dict[str, float]
    blocks_found: Count
    device: str


def read_cost(directory: Path) -> dict[str, Any]:
    """What it took to make a quantized checkpoint, and its files' sums. Raises UserError if the file is missing or
    damaged."""
    return _read(directory, _Cost)


def sums_of(directory: Path) -> dict[str, str]:
    """The sums of a finished or half-finished checkpoint's files. Raises UserError if they are missing or damaged."""
    sums: dict[str, str] = _read(directory, _Sums)["sha256"]
    return sums


def _read(directory: Path, form: Any) -> dict[str, Any]:
    file = directory / CHECKSUMS
    earlier = directory / EARLIER_CHECKSUMS
    there = file if file.is_file() or not earlier.is_file() else earlier
    if not there.is_file():
        raise UserError(f"{directory} has no {CHECKSUMS}, so nothing tells whether its files are whole; {AGAIN}")
    found: dict[str, Any] = read_json(there, "the list of the checkpoint's sums", form, mend=AGAIN)
    told = found.pop("sum", None)
    if told is not None and told != identity(found, 64):
        raise UserError(f"{there} has changed since it was written; {AGAIN}")
    return found


def write_sums(directory: Path, files: Iterable[Path], cost: Mapping[str, Any]) -> None:
    """Keep the sums of files, and what it took to make them."""
    _write(directory, {**cost, "sha256": {file.name: sum_of(file) for file in files}})


def _write(directory: Path, content: Mapping[str, Any]) -> None:
    write_json(directory / CHECKSUMS, {**content, "sum": identity(content, 64)})


def check_files(directory: Path) -> None:
    """Raise UserError unless every file of a finished checkpoint is what was written: before other work begins."""
    for name in sums_of(directory):
        checked(directory / name)


def checked(file: Path) -> Path:
    """A file of a quantized checkpoint, whose bytes have the sum that was kept when they were written.

    Raises UserError if they have another, or none was kept.
    """
    plain_file(file)
    expected = sums_of(file.parent).get(file.name)
    if expected is None:
        raise UserError(f"{file} has no sum in {CHECKSUMS}, so nothing tells whether it is whole; {AGAIN}")
    if sum_of(file) != expected:
        raise UserError(f"{file} has changed since it was written; {AGAIN}")
    return file


def sum_of(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; a file that a process asks for again is read again if it changed."""
    stat = file.stat()
    return _sum_of(file, (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


@lru_cache(maxsize=10_000)
def _sum_of(file: Path, version: tuple[int, ...]) -> str:
    return sha256_of_file(file)


def add_sum(file: Path) -> None:
    """Keep the sum of a file that was just written into a half-finished checkpoint."""
    _write(file.parent, {"sha256": known_sums(file.parent) | {file.name: sum_of(file)}})


def drop_changed(directory: Path, files: Iterable[Path]) -> None:
    """Remove those of a half-finished checkpoint's files that have no sum or another one: they are made again."""
    sums = known_sums(directory)
    if not sums:
        (directory / CHECKSUMS).unlink(missing_ok=True)  # whatever stands there
    for file in files:
        if file.is_file() and sums.get(file.name) != sum_of(file):
            why = "has changed since it was written" if file.name in sums else "has no sum"
            log.warning("%s %s; it is made again", file, why)
            file.unlink()


def known_sums(directory: Path) -> dict[str, str]:
    """The sums that are there; none if their file is missing or damaged, which is for the reader of a block to say."""
    try:
        return sums_of(directory)
    except UserError:
        return {}
