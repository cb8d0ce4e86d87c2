"""Writes that die leave nothing that the next one does not sweep; locks go with their holders."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

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
    time.sleep(60)
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
        'with locked(Path(sys.argv[1])):\n    print("there", flush=True)\n    time.sleep(60)', tmp_path / "a"
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
    started = time.monotonic()
    assert [process.wait(60) for process in processes] == [0] * 4, time.monotonic() - started
    assert (tmp_path / "counter").read_text() == "400"
    assert hidden(tmp_path) == []
