"""Run records: one JSON file per run in outputs/runs/, written once, found again by the identity of the run.

The identity covers everything that can change the figures. A finished run is read back, not run again. A record is read
here alone: its settings must have the identity that it says, its figures the sum, and all of it the form of its task.
"""

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from corpora.errors import UserError, one_line
from corpora.files import name_part
from corpora.json_files import fitted, identity, read_json, with_sum, without_sum, write_json
from corpora.machine import environment
from corpora.paths import outputs_dir
from corpora.writing import refuse_special, refuse_unwritable
from eval.record_forms import Head, disagreement, form_of

__all__ = ["all_records", "identity_of", "record_at", "record_of"]

log = logging.getLogger(__name__)

FORMAT = 2
MEND = "delete the file (or use --force) and run again"


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
    Raises UserError for a record that cannot be read, a figure that is no number, or, with the record on stdout, if the
    disk refuses it in the end; OSError, before the run, for a place where nothing can be written.
    """
    key = identity_of(task, settings)
    path = outputs_dir() / "runs" / f"{task}-{name_part(name)}-{key}.json"
    if path.is_file() and not force:
        return _read(path, task)
    if write:
        refuse_special(path, "the run record")
        refuse_unwritable(path.parent)
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
    record = with_sum(json.loads(json.dumps(record)))  # as it will be read back
    if write:
        try:
            write_json(path, record)
        except OSError as error:  # a full disk must not take hours of work with it
            print(json.dumps(record, indent=2))
            raise UserError(
                f"the run record {path} could not be written ({error.strerror or error}); stdout has it: save that as "
                "this file, and the run need not be made again"
            ) from None
    return record | {"path": str(path)}


def all_records(task: str, left_out: list[str] | None = None) -> list[dict[str, Any]]:
    """Every finished run of a task, oldest first, but for records that cannot be read.

    left_out: gets a line for each of those; without it the log does.
    """
    records = []
    for path in sorted((outputs_dir() / "runs").glob(f"{task}-*.json")):
        try:
            records.append(_read(path, task))
        except (UserError, OSError) as error:
            line = f"left out: {one_line(str(error))}"
            if left_out is None:
                log.warning(line)
            else:
                left_out.append(line)
    return sorted(records, key=lambda record: record["started"])


def record_at(path: Path) -> dict[str, Any]:
    """A record by its file, whose name begins with its task. Raises UserError as for every damaged one, and for a file
    that is not there."""
    return _read(path, path.name.partition("-")[0])


def _read(path: Path, task: str) -> dict[str, Any]:
    """A record, with its own path. Raises UserError for one that is damaged, changed, or of another form."""
    what = f"run record {path}"
    record = read_json(path, "run record", Head, mend=MEND)
    if record["format"] != FORMAT:
        raise UserError(f"{what} has the format {record['format']!r}, which is not read ({FORMAT} is); {MEND}")
    if record["task"] != task or not path.name.endswith(f"-{record['identity']}.json"):
        raise UserError(
            f"{what} is another run's: it says task {record['task']!r}, identity {record['identity']!r}; {MEND}"
        )
    if (found := identity_of(task, record["settings"])) != record["identity"]:
        raise UserError(f"{what} was changed: its settings have the identity {found}; {MEND}")
    without_sum(record, what, mend=MEND)
    fitted(record, form_of(task), what, mend=MEND)
    if reason := disagreement(task, record):
        raise UserError(f"{what} is damaged: {reason}; {MEND}")
    return record | {"path": str(path)}


def identity_of(task: str, settings: dict[str, Any]) -> str:
    """The identity of a run, of the eight digits in its record's name."""
    return identity({"format": FORMAT, "task": task, **settings})
