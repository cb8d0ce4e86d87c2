"""Run records: one JSON file per run in outputs/runs/, written once, found again by the identity of the run.

The identity covers everything that can change the figures. A finished run is read back, not run again.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from corpora.errors import UserError
from corpora.json_files import read_json, write_json
from corpora.machine import environment
from corpora.paths import outputs_dir
from corpora.storage import identity

__all__ = ["all_records", "record_of"]

FORMAT = 2


def record_of(
    task: str,
    name: str,
    settings: dict[str, Any],
    run: Callable[[], dict[str, Any]],
    *,
    force: bool = False,
    write: bool = True,
) -> dict[str, Any]:
    """The record of a run: read back if it is there, otherwise run and written.

    settings: all that decides the figures. name: readable part of the file name. run: returns the figures under their
    plain names. force: run even if there is a record. write: of several processes only the first one writes.
    Raises UserError for a record that cannot be read, or a figure that is no number.
    """
    key = identity({"format": FORMAT, "task": task, **settings})
    path = outputs_dir() / "runs" / f"{task}-{name.replace('/', '-')}-{key}.json"
    if path.is_file() and not force:
        return _checked(path)
    started = datetime.now(UTC)
    figures = run()
    record = {
        "format": FORMAT,
        "task": task,
        "identity": key,
        **figures,
        "settings": settings,
        "started": started.isoformat(timespec="seconds"),
        "environment": environment(),
    }
    if write:
        write_json(path, record)
    return record | {"path": str(path)}


def all_records(task: str) -> list[dict[str, Any]]:
    """Every finished run of a task, oldest first. Raises UserError for a record that cannot be read."""
    records = [_checked(path) for path in sorted((outputs_dir() / "runs").glob(f"{task}-*.json"))]
    return sorted(records, key=lambda record: record["started"])


def _checked(path: Path) -> dict[str, Any]:
    record = read_json(path, "run record")
    whole = isinstance(record, dict) and {"settings", "identity", "started", "format"} <= record.keys()
    if not whole or record["format"] != FORMAT:
        raise UserError(f"run record {path} is damaged; delete the file (or use --force) and run again")
    return record | {"path": str(path)}
