"""Run records: one JSON file per run in outputs/runs/, written once, found again by the identity of the run.

The identity covers everything that can change the figures. A finished run is read back, not run again.
"""

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from corpora.errors import UserError
from corpora.paths import outputs_dir
from corpora.storage import identity, read_json, write_json

__all__ = ["all_records", "environment", "peak_memory_mb", "record_of"]

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
    Raises UserError for a record that cannot be read.
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


def environment() -> dict[str, Any]:
    """What a figure was made with: versions, commit, machine."""
    from importlib.metadata import version

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors", "accelerate")}
    return packages | {
        "python": platform.python_version(),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
    }


def _commit() -> str:
    """Commit of the code, with `+changes` if the work tree differs; `unknown` outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "-C", here, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip()[:12] + ("+changes" if changes.stdout.strip() else "")


def _processor() -> str:
    """The processor's name."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_mb(device_type: str) -> float:
    """Peak memory of this process so far in MB: GPU memory on a GPU, resident memory on a CPU."""
    import torch

    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes * 1024 / 1e6
