"""Which record answers a run: a small file per run in outputs/asked/, named by the run's key.

The record holds the figures; an entry says only that this is what was asked, and which files were read for it. A record
is found by identity and read as every other. An entry counts as nothing where its record is gone or damaged, where it
is damaged itself, and where the run would read another file today (`eval.tables.stamps`). Where the model is not at
hand, the entries of one model count: of all that have its name, the one that was run last.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError, one_line
from corpora.json_files import identity, read_json, write_json
from corpora.paths import outputs_dir, root
from eval.runs import record_at
from eval.tables.asked import Run
from eval.tables.stamps import (
    GPU,
    Stamp,
    Versions,
    corpora_of,
    files_of,
    gpu_names,
    has_model,
    same,
    stamps_of,
    told_by_checkpoint,
    versions_of,
)

__all__ = ["Entry", "all_entries", "answer_of", "entry_of", "is_done", "keep", "open_runs", "read_before"]

log = logging.getLogger(__name__)

MEND = "delete the file; `python -m eval reproduce` asks again"


class Entry(TypedDict):
    """What a run left behind: a record in outputs/runs/, or a file or directory. command: what was called. read: the
    stamps of what it read. source: of the model, as its record says it."""

    program: str
    model: str
    item: str
    command: list[str]
    record: NotRequired[str]  # name in outputs/runs/
    made: NotRequired[str]  # below the root
    seconds: float
    finished: str
    read: NotRequired[dict[str, Stamp]]
    source: NotRequired[str]


def read_before(run: Run) -> Versions:
    """What a run is about to read, for `keep`, which is told of it once the run has ended."""
    return versions_of(run, _made_for(run))


def _made_for(run: Run) -> list[Path]:
    """What the runs that it needs have left behind and is there, theirs included."""
    found: list[Path] = []
    for needed in run.needs:
        found += _made_for(needed)
        entries = [entry for file in _files_of(needed.key) if (entry := _read(file, [])) is not None]
        newest = max(entries, key=lambda entry: entry["finished"], default=None)
        if newest is not None and "made" in newest and (made := root() / newest["made"]).exists():
            found.append(made)
    return found


def keep(run: Run, entry: Entry, before: Versions | None = None) -> None:
    """Say what a run left behind. before: what `read_before` gave when it began; without it, the files of now count."""
    told = _told(entry)
    read = stamps_of({**corpora_of(told), **files_of(run, _made_for(run))}, before)
    if run.program == "latency":
        read[GPU] = Stamp(size=0, changed=0, sha256=gpu_names())
    kept: Entry = {**entry, "read": read}
    made_of = told.get("settings", {}).get("made_of") if isinstance(told, dict) else None
    if isinstance(made_of, dict) and "source" in made_of:
        kept["source"] = made_of["source"]
    folder = outputs_dir() / "asked"
    for file in _files_of(run.key):  # a damaged one would be told of for ever
        if _read(file) is None:
            file.unlink(missing_ok=True)
    content = {name: (one["size"], one["sha256"] or one["changed"]) for name, one in read.items()}
    write_json(folder / f"{run.key}-{identity({'read': content})}.json", kept)
    _by_key.cache_clear()


def _told(entry: Entry) -> Any:
    """What a program says of what it read: its record, or the description of its checkpoint."""
    if "record" in entry:
        try:
            return record_at(outputs_dir() / "runs" / entry["record"])
        except (UserError, OSError):
            return {}
    return told_by_checkpoint(root() / entry["made"]) if "made" in entry else {}


def entry_of(run: Run, left_out: list[str] | None = None) -> Entry | None:
    """What a run left behind; None if it was never finished, or would read another file now. left_out: gets a line for
    an entry that cannot be read, and for those of another model where the model is not at hand; without it the log
    does."""
    files = _files_of(run.key)
    if not files:
        return None
    entries = [entry for file in files if (entry := _read(file, left_out)) is not None]
    if run.program == "latency":
        gpus = gpu_names()
        entries = [entry for entry in entries if not gpus or _gpus(entry) == gpus]
    elif not has_model(run):
        entries = _of_one_model(run, entries, left_out)
    if entries:
        now = files_of(run, _made_for(run))
        entries = [entry for entry in entries if same(entry.get("read", {}), now)]
    return max(entries, key=lambda entry: entry["finished"], default=None)


def _gpus(entry: Entry) -> str:
    kept = entry.get("read", {}).get(GPU)
    return "" if kept is None else kept["sha256"]


def _of_one_model(run: Run, entries: Sequence[Entry], left_out: list[str] | None) -> list[Entry]:
    """Those of the model of this name that was run last."""
    folder = outputs_dir() / "asked"
    newest = _newest_sources(folder, folder.stat().st_mtime_ns).get(run.model.name)
    found = [entry for entry in entries if entry.get("source", newest) == newest]
    if len(found) < len(entries):
        _say(
            f"left out: runs of another model that is called {run.model.name}, too; shown is the one that was run last "
            f"(source {newest})",
            left_out,
        )
    return found


@lru_cache(maxsize=4)
def _newest_sources(folder: Path, changed: int) -> Mapping[str, str]:
    """The source of the newest entry by the model's name. changed: when the folder was."""
    newest: dict[str, tuple[str, str]] = {}
    for file in folder.glob("*.json"):
        entry = _read(file, [])  # who asks for the run itself is told
        if entry is not None and "source" in entry:
            newest[entry["model"]] = max(newest.get(entry["model"], ("", "")), (entry["finished"], entry["source"]))
    return {model: source for model, (_, source) in newest.items()}


def _read(file: Path, left_out: list[str] | None = None) -> Entry | None:
    """An entry; None, and a line for `left_out` or the log, for one that is damaged."""
    try:
        return _content(file, *_version(file))
    except (UserError, OSError) as error:
        _say(f"left out: {one_line(str(error))}", left_out)
        return None


def _version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=100_000)
def _content(file: Path, size: int, changed: int) -> Entry:
    entry: Entry = read_json(file, "what was asked", Entry, mend=MEND)
    return entry


def _say(line: str, left_out: list[str] | None) -> None:
    if left_out is None:
        _warn(line)
    elif line not in left_out:
        left_out.append(line)


@lru_cache(maxsize=1000)
def _warn(line: str) -> None:
    """Say it once."""
    log.warning(line)


def _files_of(key: str) -> list[Path]:
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
    entry = entry_of(run, left_out)
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


def open_runs(runs: Iterable[Run]) -> set[str]:
    """Keys of the runs that are left to make: those that nobody needs and are not finished, and of what they need all
    that is not there. What only finished runs need, such as a checkpoint that was deleted, is not made again."""
    every = list(runs)
    needed = {part.key for run in every for part in run.needs}
    found: set[str] = set()

    def add(run: Run) -> None:
        if run.key not in found and not is_done(run):
            found.add(run.key)
            for part in run.needs:
                add(part)

    for run in every:
        if run.key not in needed:
            add(run)
    return found
