"""Files that are never half written: made beside their place, renamed into it, and nothing stays of a write that died.

A file or directory grows in a hidden directory beside its final name, and its writer holds a lock in there. The system
lets the lock go when the writer ends, however it ends, so the next write into the same place knows what is left of a
killed one and sweeps it. Host, process and a random part in the name keep machines apart that share a disk.
"""

import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from corpora.errors import UserError

__all__ = ["directory_beside", "locked", "refuse_special", "refuse_unwritable", "sweep", "write_all", "write_beside"]

LOCK = "lock"  # within the hidden directory
TAGGED = re.compile(r"\..*-\d+-[0-9a-f]{8}\.partial")  # the hidden directory's name, and no other's


def refuse_special(path: Path, what: str = "") -> None:
    """Raise UserError for what is there but is no regular file: a directory, device, pipe or socket, or a link, whose
    target a new file would not reach. what: it should be, for the message."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link to another file", stat.S_IFIFO: "a pipe"}
    kind = kinds.get(stat.S_IFMT(mode), "a device or socket")
    raise UserError(f"{what} {path} is {kind}, not a plain file; name another file".lstrip())


def refuse_unwritable(directory: Path) -> None:
    """Raise OSError, with the directory's name, if no small file can be written into it: before hours of work, not
    behind them. Makes the directory."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(directory)) from None


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` on success, delete it on any failure.

    Raises UserError if something other than a plain file stands there.
    """
    refuse_special(path)
    with _growing(path) as beside:
        yield beside
        os.replace(beside, path)


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write several files, or none of them if the disk refuses one. Raises as `write_beside`."""
    with ExitStack() as stack:
        for path, content in contents.items():
            stack.enter_context(write_beside(path)).write_bytes(content)


@contextmanager
def directory_beside(directory: Path) -> Iterator[Path]:
    """The same for a new directory: it has its name only when it is whole."""
    with _growing(directory) as beside:
        beside.mkdir()
        yield beside
        beside.rename(directory)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the right to write `path` against other processes and machines. The lock file goes with its last holder.

    wait: until another one has finished; otherwise it raises BlockingIOError if there is one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        file = lock.open("a")
        try:
            _lock(file, wait)
        except BaseException:
            file.close()
            raise
        if _is_at(file, lock):
            break
        file.close()  # its holder removed it while this process waited
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is let go: who waits for this one looks again
        file.close()


def sweep(directory: Path) -> None:
    """Remove what killed writers left in a directory; what living ones have there stays."""
    for left in directory.iterdir():
        if not TAGGED.fullmatch(left.name):
            continue
        try:
            with (left / LOCK).open("a") as file:
                _lock(file, wait=False)
                shutil.rmtree(left, ignore_errors=True)
        except OSError:  # held by a living writer, gone meanwhile, or another user's
            continue


@contextmanager
def _growing(path: Path) -> Iterator[Path]:
    """A name for `path` in a locked hidden directory beside it, which is removed in the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    while True:
        tag = f"{socket.gethostname()[:20]}-{os.getpid()}-{secrets.token_hex(4)}"
        hidden = path.with_name(f".{os.fsencode(path.name)[:100].decode(errors='ignore')}.{tag}.partial")
        hidden.mkdir()
        try:
            lock = (hidden / LOCK).open("a")
        except FileNotFoundError:  # swept in between by another process
            continue
        try:
            _lock(lock, wait=False)
        except BlockingIOError:
            lock.close()
            continue
        if _is_at(lock, hidden / LOCK):
            break
        lock.close()
    try:
        yield hidden / path.name
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        lock.close()


def _lock(file: IO[str], wait: bool) -> None:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
