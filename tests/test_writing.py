"""Writes that die leave nothing that the next one does not sweep; locks go with their holders."""

import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from corpora import writing
from corpora.errors import UserError
from corpora.writing import directory_beside, locked, sweep, write_beside


def hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that prints a line when it is where the test wants it."""
    command = [
        sys.executable,
        "-c",
        f"import sys, time\nfrom pathlib import Path\nfrom corpora.writing import *\n{code}",
    ]
    root = Path(__file__).parents[1]
    process = subprocess.Popen([*command, *map(str, arguments)], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    return process


WRITES = """
with write_beside(Path(sys.argv[1])) as beside:
    beside.write_text("half")
    (beside.parent / ".tmp-of-a-library").write_text("half")
    print("there", flush=True)
    time.sleep(600)
"""
MAKES = WRITES.replace("write_beside", "directory_beside").replace(
    'beside.write_text("half")', "(beside / 'a').touch()"
)


@pytest.mark.parametrize("code", [WRITES, MAKES])
def test_what_a_killed_writer_left_goes_with_the_next_write_in_that_place(tmp_path: Path, code: str) -> None:
    process = child(code, tmp_path / "a")
    assert len(hidden(tmp_path)) == 1
    with write_beside(tmp_path / "other") as beside:  # a living writer's is left alone
        beside.write_text("whole")
    assert len(hidden(tmp_path)) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    with write_beside(tmp_path / "other") as beside:
        beside.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_half_finished_checkpoints_are_not_swept(tmp_path: Path) -> None:
    for name in (".mine.partial", "mine.partial", ".mine.4711.partial", ".a-1-0123456.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "block").touch()
    before = sorted(tmp_path.rglob("*"))
    sweep(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError), write_beside(tmp_path / "a"):
        (tmp_path / "missing").read_text()
    assert (tmp_path / "a").read_text() == "old"
    assert hidden(tmp_path) == []


def make_link(path: Path) -> None:
    path.with_name("target").write_text("theirs")
    path.symlink_to("target")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, make_link])
def test_only_plain_files_are_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a")
    before = (tmp_path / "a").lstat()
    with pytest.raises(UserError, match="not a plain file"), write_beside(tmp_path / "a"):
        pytest.fail("it was opened")
    assert (tmp_path / "a").lstat() == before
    assert hidden(tmp_path) == []


def test_a_directory_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    with directory_beside(tmp_path / "d") as beside:
        (beside / "a").touch()
        assert not (tmp_path / "d").exists()
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["a"]
    assert hidden(tmp_path) == []


def test_a_lock_is_held_once_and_its_file_goes(tmp_path: Path) -> None:
    holder = child(
        'with locked(Path(sys.argv[1])):\n    print("there", flush=True)\n    time.sleep(600)', tmp_path / "a"
    )
    with pytest.raises(BlockingIOError), locked(tmp_path / "a", wait=False):
        pytest.fail("two hold it")
    assert hidden(tmp_path) == [".a.lock"]  # the holder's
    holder.kill()
    holder.wait()
    with locked(tmp_path / "a", wait=False):
        pass
    assert hidden(tmp_path) == []


def test_many_processes_take_turns(tmp_path: Path) -> None:
    """Each reads and writes a counter under the lock, whose file comes and goes meanwhile."""
    code = """
print("there", flush=True)
counter = Path(sys.argv[1]) / "counter"
for _ in range(100):
    with locked(counter):
        counter.write_text(str(int(counter.read_text()) + 1))
"""
    (tmp_path / "counter").write_text("0")
    processes = [child(code, tmp_path) for _ in range(4)]
    assert [process.wait(300) for process in processes] == [0] * 4
    assert (tmp_path / "counter").read_text() == "400"
    assert hidden(tmp_path) == []


# Names, modes and errors ----------------------------------------------------------------------------------------------

LONG = ("a" * 255, "ä" * 127, "漢" * 85, "😀" * 63, "two\nlines")


@pytest.mark.parametrize("name", LONG, ids=["ascii", "two bytes", "three bytes", "four bytes", "line end"])
def test_the_longest_names_are_written_and_swept(tmp_path: Path, name: str) -> None:
    with write_beside(tmp_path / name) as beside:
        beside.write_text("old")
    process = child(WRITES, tmp_path / name)
    process.kill()
    process.wait()
    assert len(hidden(tmp_path)) == 1
    with write_beside(tmp_path / name) as beside:
        beside.write_text("whole")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "whole")]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_of_the_umask_whatever_a_library_gives_them(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with write_beside(tmp_path / "a") as beside:
            beside.touch(mode=0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def refusing(number: int, *names: str) -> Callable[..., Any]:
    """A function of the system that refuses, with the name of the file that it is about."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number), *(os.fspath(arguments[0]) for name in names))

    return refuse


@pytest.mark.parametrize("function", ["mkdir", "open", "rename", "replace", "fsync"])
@pytest.mark.parametrize("write", [write_beside, directory_beside])
def test_a_disk_that_refuses_any_step_is_named_by_the_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, write: Callable[..., Any]
) -> None:
    """fsync tells of errors that a disk, a server or a quota reports late; it names no file."""
    if write is write_beside:
        (tmp_path / "a").write_text("old")

    def attempt() -> None:
        with write(tmp_path / "a") as beside:
            (beside / "b" if beside.is_dir() else beside).write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, refusing(errno.EDQUOT, *(["it"] if function != "fsync" else [])))
        with pytest.raises(OSError, match="quota") as caught:
            attempt()
    assert caught.value.filename == str(tmp_path / "a")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")] * (write is write_beside)
    attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_error_within_a_directory_names_its_place_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="full") as caught, directory_beside(tmp_path / "d") as beside:
        raise OSError(errno.ENOSPC, "full", str(beside / "weights" / "a"))
    assert caught.value.filename == str(tmp_path / "d" / "weights" / "a")
    with pytest.raises(FileNotFoundError) as caught, write_beside(tmp_path / "a"):
        (tmp_path / "missing").read_text()
    assert caught.value.filename == str(tmp_path / "missing")  # somebody else's


def test_several_files_get_their_names_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (named.append(target), replace(source, target)))
    contents = {tmp_path / name: name.encode() for name in ("a.png", "a.pdf", "a.csv")}
    writing.write_all(contents)
    assert named == list(contents)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == contents


# What another user may have laid there --------------------------------------------------------------------------------


def test_a_sweep_follows_no_link_and_waits_for_no_pipe(tmp_path: Path) -> None:
    theirs, place = tmp_path / "theirs", tmp_path / "place"
    theirs.mkdir()
    (theirs / "thesis").write_text("years of work")
    place.mkdir()
    for i, kind in enumerate(("partial", "whole")):
        (place / f".a-1-0000000{i}.{kind}").symlink_to(theirs)
    for i, lay in enumerate((lambda lock: lock.symlink_to(theirs / "made"), os.mkfifo)):
        left = place / f".b-1-0000000{i}.partial"
        left.mkdir()
        lay(left / "lock")
    os.mkfifo(place / ".c-1-00000000.whole")
    with write_beside(place / "a") as beside:
        beside.write_text("whole")
    assert [path.name for path in theirs.iterdir()] == ["thesis"]
    (tmp_path / ".a.lock").symlink_to(theirs / "made")
    with pytest.raises(OSError, match="symbolic"), locked(tmp_path / "a"):
        pytest.fail("a lock behind a link")
    assert [path.name for path in theirs.iterdir()] == ["thesis"]


def test_a_place_that_cannot_be_listed_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", refusing(errno.EACCES, "it"))
    with write_beside(tmp_path / "a") as beside:
        beside.write_text("whole")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# Locks ----------------------------------------------------------------------------------------------------------------

FORKS = """
import os
with write_beside(Path(sys.argv[1]) / "a") as beside, locked(Path(sys.argv[1]) / "b"):
    beside.write_text("half")
    if os.fork() == 0:  # as a DataLoader's worker
        time.sleep(600)
    print("there", flush=True)
    time.sleep(600)
"""


def test_a_killed_writers_children_do_not_hold_its_locks(tmp_path: Path) -> None:
    process = child("import os; os.setsid()" + FORKS, tmp_path)
    try:
        process.kill()
        process.wait()
        until = time.monotonic() + 300  # the child lets go as soon as it runs, which on a busy machine is later
        while list(tmp_path.iterdir()) and time.monotonic() < until:
            sweep(tmp_path)
            with suppress(BlockingIOError), locked(tmp_path / "b", wait=False):
                pass
            time.sleep(0.05)
        assert list(tmp_path.iterdir()) == []
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_child_that_ends_within_the_block_leaves_the_parents_work_alone(tmp_path: Path) -> None:
    code = """
import os
with write_beside(Path(sys.argv[1]) / "a") as beside, locked(Path(sys.argv[1]) / "b"):
    beside.write_text("whole")
    if os.fork() == 0:
        sys.exit()
    os.wait()
    assert (Path(sys.argv[1]) / ".b.lock").exists()
print("there", flush=True)
"""
    assert child(code, tmp_path).wait() == 0
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "whole")]


def test_a_child_that_ends_in_the_last_step_leaves_the_finished_file_alone(tmp_path: Path) -> None:
    code = """
import os
last_step = os.replace
def replace(source, target):
    if os.fork() == 0:
        sys.exit()
    os.wait()
    last_step(source, target)
os.replace = replace
with write_beside(Path(sys.argv[1]) / "a") as beside:
    beside.write_text("whole")
print("there", flush=True)
"""
    assert child(code, tmp_path).wait() == 0
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "whole")]


def test_a_host_of_any_name_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "rack 1/node\0 7")
    with write_beside(tmp_path / "a") as beside:
        beside.write_text("whole")
        assert beside.parent.parent == tmp_path
        assert writing.TAGGED.fullmatch(beside.parent.name)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_only_waits_for_its_name_is_swept_with_its_writer_and_not_before(tmp_path: Path) -> None:
    waits = """
import os
def replace(source, target):
    print("there", flush=True)
    time.sleep(600)
os.replace = replace
"""
    for code in (WRITES, MAKES):
        process = child(waits + code.replace('    print("there", flush=True)\n    time.sleep(600)', ""), tmp_path / "a")
        assert [Path(name).suffix for name in hidden(tmp_path)] == [".whole"]
        sweep(tmp_path)
        assert [Path(name).suffix for name in hidden(tmp_path)] == [".whole"]
        process.kill()
        process.wait()
        sweep(tmp_path)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_work_goes_on_with_one_warning_and_nothing_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    writing._warn_of_no_locks.cache_clear()
    process = child(WRITES, tmp_path / "a")
    process.kill()
    process.wait()
    (left,) = hidden(tmp_path)
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    with locked(tmp_path / "a"), write_beside(tmp_path / "a") as beside:
        beside.write_text("whole")
    with directory_beside(tmp_path / "d") as beside:
        (beside / "b").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([left, "a", "d"])
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "the file system of the outputs knows no locks"
    ]
    writing._warn_of_no_locks.cache_clear()


def test_the_hidden_directory_goes_where_open_files_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS renames a file that is removed while it is open, so that its directory is not empty until it is closed."""
    remove = shutil.rmtree

    def silly(directory: Path, **options: Any) -> None:
        remove(directory, **options)
        Path(directory).mkdir()

    monkeypatch.setattr(shutil, "rmtree", silly)
    with write_beside(tmp_path / "a") as beside:
        beside.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_two_machines_of_one_name_and_process_id_share_a_place(tmp_path: Path) -> None:
    """Two containers: both are process 1 on the host "box". Each sweeps whenever the other writes."""
    code = """
import os, socket
os.getpid, socket.gethostname = lambda: 1, lambda: "box"
print("there", flush=True)
for i in range(150):
    for name in ("shared", f"{sys.argv[2]}-{i}"):
        with write_beside(Path(sys.argv[1]) / name) as beside:
            beside.write_text(name * 1000)
"""
    processes = [child(code, tmp_path, name) for name in ("one", "two")]
    assert [process.wait(300) for process in processes] == [0, 0]
    names = {"shared", *(f"{name}-{i}" for name in ("one", "two") for i in range(150))}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all((tmp_path / name).read_text() == name * 1000 for name in names)


def test_who_waits_for_another_process_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with locked(tmp_path / "a"):
        pass
    assert not caplog.records
    with ThreadPoolExecutor(1) as threads:
        with locked(tmp_path / "a"):
            other = threads.submit(lambda: locked(tmp_path / "a").__enter__())
            for _ in range(6000):
                if caplog.records:
                    break
                time.sleep(0.05)
        other.result(300)
    (record,) = caplog.records
    assert record.getMessage() == f"waiting for another process, which is at work on {tmp_path / 'a'}"
