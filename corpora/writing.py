"""Files that are never half written: made beside their place, renamed into it, and nothing stays of a write that died.

A file or directory grows in a hidden directory beside its final name, and its writer holds a lock in there. The system
lets the lock go when the writer ends, however it ends, so the next write into the same place knows what is left of a
killed one and sweeps it. What is whole is moved out of the hidden directory, is locked itself, and gets its name when
that is gone: the last step of a write is the one that finishes it, and nothing lies beside what is finished. Host,
process and a random part in the name keep machines apart that share a disk. Where a file system knows no locks, work
goes on without them, and nothing is swept.
"""

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO
from weakref import WeakSet

from corpora.errors import UserError

__all__ = [
    "directory_beside",
    "drop_dead_lock",
    "locked",
    "only_one",
    "refuse_special",
    "refuse_unwritable",
    "sweep",
    "write_all",
    "write_beside",
]

log = logging.getLogger(__name__)

LOCK = "lock"  # within the hidden directory
WHOLE = ".whole"  # the end of the name of what only waits for its own
TAGGED = re.compile(r"\..*-\d+-[0-9a-f]{8}\.(partial|whole)", re.DOTALL)  # names of this file, and no others
LONGEST = 100  # bytes of the file's name in the hidden directory's; the system takes 255 with all that follows
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of a file system without them
NO_LOCK_HERE = errno.EBADF  # NFS locks no directory
_held: WeakSet[IO[str]] = WeakSet()  # the files of the locks that this process has


def _let_go() -> None:
    """A child would keep the locks of its parent for as long as it lives, also those of a killed one."""
    for file in list(_held):
        file.close()


os.register_at_fork(after_in_child=_let_go)


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
    """Raise OSError, with the directory's name, if no small file can be written into it, or where it would be made:
    before hours of work, not behind them. Nothing is made: the work may be refused."""
    while not os.path.lexists(directory):
        directory = directory.parent
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(directory)) from None


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` on success, delete it on any failure.

    The file is on the disk before it has its name, so that no error of a full or failing disk comes when the old one is
    gone. Colleagues may read it as the umask says, even if a library writes for the owner alone.
    Raises UserError if something other than a plain file stands there, and OSError, with the name of `path`.
    """
    refuse_special(path)
    with _growing(path) as beside:
        yield beside


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write several files, or none of them if the disk refuses one; they get their names in their order, so that a
    figure is there before its numbers, which are known by it. Raises as `write_beside`."""
    with ExitStack() as stack:
        for path, content in reversed(list(contents.items())):  # the last to be entered is the first to end
            stack.enter_context(write_beside(path)).write_bytes(content)


@contextmanager
def directory_beside(directory: Path) -> Iterator[Path]:
    """The same for a new directory: it has its name only when it is whole."""
    with _growing(directory) as beside:
        beside.mkdir()
        yield beside


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the right to write `path` against other processes and machines. The lock file goes with its last holder.

    wait: until another one has finished; otherwise it raises BlockingIOError if there is one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(path)
    while True:
        file = _open(lock)
        try:
            try:
                _lock(file.fileno(), wait=False)
            except BlockingIOError:
                if not wait:
                    raise
                log.warning(f"waiting for another process, which is at work on {path}")
                _lock(file.fileno(), wait=True)
        except BaseException:
            file.close()
            raise
        if _is_at(file, lock):
            break
        file.close()  # its holder removed it while this process waited
    try:
        yield
    finally:
        if not file.closed:  # as in a child that ends within the block of its parent
            lock.unlink(missing_ok=True)  # before it is let go: who waits for this one looks again
            file.close()


@contextmanager
def only_one(path: Path, refusal: str) -> Iterator[None]:
    """Hold the right to write `path`, or raise UserError(refusal) if another process has it. What the work within meets
    itself, a pipe or lock that would block, too, is none of that."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, wait=False))
        except BlockingIOError:
            raise UserError(refusal) from None
        yield


def drop_dead_lock(path: Path) -> None:
    """Remove the lock file that a killed holder left, if the system lets it: for who finds `path` finished."""
    with suppress(OSError):  # another user's, or held
        if _lock_of(path).exists():
            with locked(path, wait=False):
                pass


def sweep(directory: Path) -> None:
    """Remove what killed writers left in a directory, if the system lets it; what living ones have there stays."""
    try:
        names = [name for name in os.listdir(directory) if name.startswith(".") and TAGGED.fullmatch(name)]
    except OSError:  # a directory may let itself be written, but not listed
        return
    for left in map(directory.joinpath, names):
        with suppress(OSError):  # held by a living writer, gone meanwhile, or another user's
            if left.suffix == WHOLE:
                with _whole(left) as is_locked:
                    if is_locked:
                        _delete(left)
            elif not left.is_symlink():
                with _open(left / LOCK) as file:
                    if _lock(file.fileno(), wait=False):
                        _remove(left, file)


@contextmanager
def _growing(path: Path) -> Iterator[Path]:
    """A name for `path` in a locked hidden directory beside it; what is there in the end gets the name of `path`.

    OSErrors name `path`, not what is hidden.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    with _named(path, path.parent):
        hidden, lock = _hidden(path)
    writer = os.getpid()
    beside, whole = hidden / path.name, hidden.with_suffix(WHOLE)
    try:
        with _named(path, hidden):
            yield beside
            with _whole(beside, usual=stat.S_IMODE(os.fstat(lock.fileno()).st_mode)):
                os.rename(beside, whole)
                _remove(hidden, lock)
                os.replace(whole, path)
    except BaseException:
        if os.getpid() == writer:  # and no child that ends within the block of its parent
            _remove(hidden, lock)
            _delete(whole)
        raise


@contextmanager
def _whole(path: Path, usual: int | None = None) -> Iterator[bool]:
    """Lock a finished file or directory itself, if its file system knows locks. Raises BlockingIOError if it is locked.

    usual: the mode that a file is to have; it is on the disk then, too.
    """
    descriptor = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_NOFOLLOW)
    try:
        is_locked = _lock(descriptor, wait=False)
        if usual is not None:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode) and stat.S_IMODE(mode) != usual:  # disks of other systems know one mode only
                os.fchmod(descriptor, usual)
            os.fsync(descriptor)
        yield is_locked
    finally:
        os.close(descriptor)


def _hidden(path: Path) -> tuple[Path, IO[str]]:
    """A new hidden directory for `path`, and the file of its lock."""
    short = os.fsencode(path.name)[:LONGEST].decode(errors="ignore")
    while True:
        host = re.sub(r"[^\w.-]", "-", socket.gethostname())[:20]  # a container may have any name
        tag = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        hidden = path.with_name(f".{short}.{tag}.partial")
        hidden.mkdir()
        try:
            lock = _open(hidden / LOCK)
        except FileNotFoundError:  # swept in between by another process
            continue
        except OSError:
            hidden.rmdir()
            raise
        try:
            _lock(lock.fileno(), wait=False)
        except BlockingIOError:  # it is swept now
            lock.close()
            continue
        if _is_at(lock, hidden / LOCK):
            return hidden, lock
        lock.close()


def _remove(hidden: Path, lock: IO[str]) -> None:
    """Remove a hidden directory and let its lock go. NFS keeps a file that is removed while it is open, and so the
    directory: it goes afterwards."""
    shutil.rmtree(hidden, ignore_errors=True)
    lock.close()
    with suppress(OSError):
        hidden.rmdir()


def _delete(path: Path) -> None:
    """Remove a file or directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _named(path: Path, hidden: Path) -> Iterator[None]:
    """Let errors of the system that name something in `hidden`, or nothing, name what the user knows of."""
    try:
        yield
    except OSError as error:
        name, inner, tagged = str(error.filename or hidden), f"{hidden / path.name}/", os.path.splitext(hidden)[0]
        if name.startswith(inner):
            error.filename = str(path / name.removeprefix(inner))
        elif name.startswith(tagged):
            error.filename = str(path)
        raise


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _open(path: Path) -> IO[str]:
    """A lock's file, made if need be; neither a link nor a pipe that another user laid there."""
    file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), "a")
    _held.add(file)
    return file


def _lock(descriptor: int, wait: bool) -> bool:
    """Lock an open file. Returns whether its file system knows locks. Raises BlockingIOError if another one has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in NO_LOCKS:
            _warn_of_no_locks()
        elif error.errno != NO_LOCK_HERE:
            raise
        return False
    return True


@cache
def _warn_of_no_locks() -> None:
    log.warning(
        "the file system of the outputs knows no locks: start no two runs with the same output at once, and delete "
        "what killed ones leave (.*.partial) by hand"
    )


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
