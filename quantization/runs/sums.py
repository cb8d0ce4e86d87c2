"""The sums of a quantized checkpoint's files: who reads one of them compares its bytes before anything is parsed.

`checksums.json` is there from the first finished block on: a resumed run trusts no block that changed meanwhile.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError
from corpora.files import plain_file, sha256_of_file
from corpora.json_files import Count, FileName, Hash, read_json, with_sum, without_sum, write_json

__all__ = [
    "CHECKSUMS",
    "EARLIER_CHECKSUMS",
    "add_sum",
    "checked",
    "drop_changed",
    "known_sums",
    "read_cost",
    "write_sums",
]

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"  # of the files, and what the run took that finished them
EARLIER_CHECKSUMS = "cost.json"  # the same, of checkpoints that were written before it had this name
SUM = "sum"  # its key: the sums of the files are "sha256"
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
    device_name: NotRequired[str]
    calibration_batch: NotRequired[Count | None]  # samples at once: their number changes the order of sums


def read_cost(directory: Path) -> dict[str, Any]:
    """What it took to make a quantized checkpoint, and its files' sums. Raises UserError if the file is missing or
    damaged."""
    return _read(directory, _Cost)


def _sums_of(directory: Path) -> dict[str, str]:
    """The sums of a finished or half-finished checkpoint's files. Raises UserError if they are missing or damaged."""
    sums: dict[str, str] = _read(directory, _Sums)["sha256"]
    return sums


def _read(directory: Path, form: Any) -> dict[str, Any]:
    file = directory / CHECKSUMS
    earlier = directory / EARLIER_CHECKSUMS
    there = file if file.is_file() or not earlier.is_file() else earlier
    if not there.is_file():
        raise UserError(f"{directory} has no {CHECKSUMS}, so nothing tells whether its files are whole; {AGAIN}")
    what = "the list of the checkpoint's sums"
    return without_sum(read_json(there, what, form, mend=AGAIN), f"{what} {there}", key=SUM, mend=AGAIN)


def write_sums(directory: Path, files: Iterable[Path], cost: Mapping[str, Any]) -> None:
    """Keep the sums of files, and what it took to make them."""
    _write(directory, {**cost, "sha256": {file.name: sha256_of_file(file) for file in files}})


def _write(directory: Path, content: Mapping[str, Any]) -> None:
    write_json(directory / CHECKSUMS, with_sum(content, SUM))


def checked(file: Path) -> Path:
    """A file of a quantized checkpoint, whose bytes have the sum that was kept when they were written.

    Raises UserError if they have another, none was kept, or the file is missing.
    """
    if not file.exists():
        raise UserError(
            f"{file} is missing; the quantized checkpoint is incomplete, delete the directory and quantize again"
        )
    plain_file(file)
    expected = _sums_of(file.parent).get(file.name)
    if expected is None:
        raise UserError(f"{file} has no sum in {CHECKSUMS}, so nothing tells whether it is whole; {AGAIN}")
    if sha256_of_file(file) != expected:
        raise UserError(f"{file} has changed since it was written; {AGAIN}")
    return file


def check_beside(directory: Path) -> None:
    """Compare what stands beside the weights (tokenizer, templates, how to generate) with its sums, as far as there are
    any: checkpoints of earlier versions have none of these. Raises UserError for what changed or is missing."""
    for name in _sums_of(directory):
        if not name.endswith(".safetensors"):
            checked(directory / name)


def add_sum(file: Path) -> None:
    """Keep the sum of a file that was just written into a half-finished checkpoint."""
    _write(file.parent, {"sha256": known_sums(file.parent) | {file.name: sha256_of_file(file)}})


def drop_changed(directory: Path, files: Iterable[Path]) -> None:
    """Remove those of a half-finished checkpoint's files that have no sum or another one: they are made again."""
    sums = known_sums(directory)
    if not sums:
        (directory / CHECKSUMS).unlink(missing_ok=True)  # whatever stands there
    for file in files:
        if file.is_file() and sums.get(file.name) != sha256_of_file(file):
            why = "has changed since it was written" if file.name in sums else "has no sum"
            log.warning("%s %s; it is made again", file, why)
            file.unlink()


def known_sums(directory: Path) -> dict[str, str]:
    """The sums that are there; none if their file is missing or damaged, which is for the reader of a block to say."""
    try:
        return _sums_of(directory)
    except UserError:
        return {}
