"""Which record answers a run: one small file per run in outputs/asked/, named by the run's key.

The record holds the figures; an entry says only that this is what was asked. A record is found by identity and read as
every other; an entry whose record is gone or damaged counts as nothing. The entry's stamp covers the files of the model
and of the text that is scored: another model of the same name is another run.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.catalog import CORPORA, corpus_files
from corpora.errors import UserError, one_line
from corpora.json_files import read_json, write_json
from corpora.paths import outputs_dir, root
from eval.runs import record_at
from eval.tables.asked import Run

__all__ = ["Entry", "all_entries", "answer_of", "entry_of", "is_done", "keep", "stamp_of"]

PLACES, BYTES = 16, 4096  # of a large file that a stamp looks at
MEND = "delete the file; `python -m eval reproduce` asks again"


class Entry(TypedDict):
    """What a run left behind: a record in outputs/runs/, or a file or directory. command: what was called."""

    program: str
    model: str
    item: str
    command: list[str]
    record: NotRequired[str]  # name in outputs/runs/
    made: NotRequired[str]  # below the root
    seconds: float
    finished: str


def stamp_of(run: Run) -> str:
    """Of the files that a run reads: the model's, and the text or questions that it scores; empty where the model is
    not at hand.

    A file counts by its name, its size and 4 KiB at 16 places, so that it takes milliseconds whatever its size.
    """
    files = sorted(run.model.glob("*.safetensors")) + sorted(run.model.glob("*.bin"))
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in (run.model / "config.json", *files, *_scored(run)):
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            for part in _parts(file):
                digest.update(part)
    return digest.hexdigest()[:8]


def _scored(run: Run) -> list[Path]:
    """The files of the text that a run of perplexity scores."""
    if run.program != "ppl":
        return []
    name = "c4" if run.item == "c4-old" else run.item
    return corpus_files(name, "evaluation") if name in CORPORA else [Path(run.item)]


def _parts(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= PLACES * BYTES:
            yield opened.read()
            return
        for i in range(PLACES):
            opened.seek(i * (size - BYTES) // (PLACES - 1))
            yield opened.read(BYTES)


def _file(run: Run, stamp: str) -> Path:
    return outputs_dir() / "asked" / f"{run.key}-{stamp}.json"


def keep(run: Run, entry: Entry) -> None:
    """Say what a run left behind."""
    write_json(_file(run, stamp_of(run)), entry)
    _by_key.cache_clear()


def entry_of(run: Run) -> Entry | None:
    """What a run left behind; None if it was never finished. Where the model is not at hand any of its name counts,
    the newest first. Raises UserError for a damaged entry."""
    stamp = stamp_of(run)
    files = [_file(run, stamp)] if stamp else _of_any_stamp(run.key)
    entries: list[Entry] = [read_json(file, "what was asked", Entry, mend=MEND) for file in files if file.is_file()]
    return max(entries, key=lambda entry: entry["finished"], default=None)


def _of_any_stamp(key: str) -> list[Path]:
    folder = outputs_dir() / "asked"
    return _by_key(folder, folder.stat().st_mtime_ns).get(key, []) if folder.is_dir() else []


@lru_cache(maxsize=4)
def _by_key(folder: Path, changed: int) -> Mapping[str, list[Path]]:
    """The files of a folder by the key in their names. changed: when the folder was, so that it is read once as long
    as it stays as it is."""
    found: dict[str, list[Path]] = {}
    for file in folder.glob("*-*.json"):
        found.setdefault(file.name.partition("-")[0], []).append(file)
    return found


def all_entries(left_out: list[str] | None = None) -> list[Entry]:
    """All that was ever kept. left_out: gets a line for what cannot be read."""
    found: list[Entry] = []
    for file in sorted((outputs_dir() / "asked").glob("*.json")):
        try:
            found.append(read_json(file, "what was asked", Entry, mend=MEND))
        except (UserError, OSError) as error:
            if left_out is not None:
                left_out.append(f"left out: {one_line(str(error))}")
    return found


def answer_of(run: Run, left_out: list[str] | None = None) -> dict[str, Any] | None:
    """The record of a run; None if there is none that can be read. With `path`, where it lies. left_out: gets a line
    for one that cannot be read."""
    entry = entry_of(run)
    if entry is None or "record" not in entry:
        return None
    try:
        return record_at(outputs_dir() / "runs" / entry["record"])
    except (UserError, OSError) as error:
        if left_out is not None:
            left_out.append(f"left out: {one_line(str(error))}")
        return None


def is_done(run: Run) -> bool:
    """Whether a run need not be made again: its record can be read, or what it made lies there."""
    entry = entry_of(run)
    if entry is None:
        return False
    there = "made" not in entry or (root() / entry["made"]).exists()
    return there and ("record" not in entry or answer_of(run) is not None)
