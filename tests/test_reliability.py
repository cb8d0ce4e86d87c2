"""What docs/reliability.md promises about kills, several processes, full disks and other users, on whole programs.

`python -m tests.reliability` kills and starves them at every change that they make.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from disasters import Call, Warm, kind_of, lasting, refusal
from endpoint import Endpoint
from reliability import Scene, difference, make_scene, points

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user, or mount a small disk")


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """Programs and what they find, in a place that every user can read."""
    server = Endpoint()
    folder = Path(tempfile.mkdtemp(prefix="reliability-"))
    folder.chmod(0o755)
    try:
        with Warm() as warm:
            yield make_scene(warm, folder, server.url)
    finally:
        server.close()
        shutil.rmtree(folder)


# Kills ----------------------------------------------------------------------------------------------------------------

KILLED = ("quantize", "calibrating", "kv", "build", "adapter", "calibrate", "export", "ppl", "mtbench", "judge", "plot")


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_program_ends_with_the_same_bytes_and_no_stray_file(scene: Scene, name: str) -> None:
    """SIGKILL with the last file half written, with it whole but hidden, and where it only waits for its name."""
    expected, changes = scene.undisturbed(name)
    assert not [file for file in expected if Path(file).name.startswith(".")]
    last = {("half written" if how == "half" else kind_of(changes[at])): (how, at) for how, at in points(changes)}
    chosen = [last[kind] for kind in ("half written", "written, in the hidden directory")]
    if name in ("quantize", "ppl", "export"):
        chosen.append(last["hidden directory gone, not renamed"])
    for how, at in chosen:
        struck, again, left = scene.disturbed(name, how, at)
        assert struck.status == -9, struck.err
        assert again.status == 0, again.err
        assert difference(expected, left) == "", (how, changes[at])


def test_a_kill_between_manifest_and_blocks_and_before_the_directory_has_its_name(scene: Scene) -> None:
    expected, changes = scene.undisturbed("quantize")
    renames = [at for at, (event, path) in enumerate(changes) if event == "os.rename" and not path.endswith(".whole")]
    manifest, *_, directory = renames
    assert changes[manifest][1].endswith("/quantization.json")
    assert changes[directory][1].endswith("/quantized.partial")
    for at in (manifest, manifest + 5, directory, directory + 1):  # the last: its lock file is still there
        struck, again, left = scene.disturbed("quantize", "kill", at)
        assert (struck.status, again.status) == (-9, 0), again.err
        assert difference(expected, left) == "", changes[at]


# Several processes ----------------------------------------------------------------------------------------------------

RECORDS = """
import json, sys
from pathlib import Path
from eval.runs import record_of
base = json.loads(Path(sys.argv[1]).read_text())
figures = {name: value for name, value in base.items() if name not in
           ("format", "task", "identity", "settings", "started", "environment", "sha256")}
for i in range(100):
    settings = base["settings"] | {"text_sha256": f"{int(sys.argv[2]):032x}{i:032x}"}
    record_of("ppl", f"many-{sys.argv[2]}", settings, lambda: figures)
"""
READS = """
import logging, time
from eval.runs import all_records
logging.basicConfig(level="WARNING")
found, deadline = 0, time.monotonic() + 600
while found < 801 and time.monotonic() < deadline:
    before, left_out = found, []
    found = len(all_records("ppl", left_out))
    assert not left_out and found >= before, (left_out, before, found)
    time.sleep(0.5)
print(found)
"""


def test_eight_processes_write_a_hundred_records_each_and_two_read_them_meanwhile(scene: Scene) -> None:
    scene.fresh()
    (record,) = (scene.given / "root" / "outputs" / "runs").iterdir()
    writers = [Call(RECORDS, (str(record), str(i)), str(scene.root)) for i in range(8)]
    outcomes = scene.warm.together([*writers, *[Call(READS, (), str(scene.root))] * 2])
    assert [outcome.status for outcome in outcomes] == [0] * 10, [outcome.err for outcome in outcomes]
    assert [outcome.out for outcome in outcomes[8:]] == ["801\n"] * 2
    assert [outcome.err for outcome in outcomes[8:]] == ["", ""]
    names = [path.name for path in (scene.root / "outputs" / "runs").iterdir()]
    assert len(names) == 801
    assert not [name for name in names if name.startswith(".")]
    modes = {path.stat().st_mode & 0o444 for path in (scene.root / "outputs" / "runs").iterdir()}
    assert modes == {0o444}  # a colleague reads them


def test_eight_processes_quantize_once(scene: Scene) -> None:
    expected, _ = scene.undisturbed("quantize")
    scene.fresh()
    outcomes = scene.warm.together([scene.call("quantize")] * 8)
    assert [outcome.status for outcome in outcomes] == [0] * 8, [outcome.err for outcome in outcomes]
    named = [path for outcome in outcomes for event, path in outcome.changes if event == "os.rename"]
    assert sum(path.endswith("/quantized.partial") for path in named) == 1
    assert difference(expected, lasting(scene.root)) == ""


@pytest.mark.parametrize("name", ["build", "ppl"])
def test_several_processes_make_the_same_prefix_and_the_same_tokens(scene: Scene, name: str) -> None:
    expected, _ = scene.undisturbed(name)
    scene.fresh()
    outcomes = scene.warm.together([scene.call(name)] * 4)
    assert [outcome.status for outcome in outcomes] == [0] * 4, [outcome.err for outcome in outcomes]
    assert difference(expected, lasting(scene.root)) == ""


PREPARES = """
import os, sys, time
from pathlib import Path
from corpora.fetch import prepare_directory
target = Path(sys.argv[1]) / "prepared"
def build(directory):
    time.sleep(0.2)
    (directory / "data").write_text("whole")
    return {"kind": "a test"}
built = prepare_directory(target, build, lambda note: note["kind"] == "a test")
print(built, (target / "data").read_text())
"""


def test_several_processes_prepare_a_directory_once(scene: Scene) -> None:
    scene.fresh()
    outcomes = scene.warm.together([Call(PREPARES, (str(scene.root),), str(scene.root))] * 4)
    assert sorted(outcome.out for outcome in outcomes) == ["False whole\n"] * 3 + ["True whole\n"], outcomes
    assert [path.name for path in scene.root.iterdir() if "prepared" in path.name] == ["prepared"]


def test_who_waits_for_a_killed_process_goes_on_with_its_work(scene: Scene) -> None:
    expected, changes = scene.undisturbed("quantize")
    scene.fresh()
    call = scene.call("quantize")
    at = next(at for at, (event, path) in enumerate(changes) if path.endswith("block-001.safetensors"))
    outcomes = scene.warm.together([replace(call, strike=("half", at)), call])
    assert outcomes[1].status == 0, outcomes[1].err
    assert difference(expected, lasting(scene.root)) == ""


NO_LOCKS = """
import errno, fcntl, os
def flock(descriptor, operation):
    raise OSError(errno.{}, os.strerror(errno.{}))
fcntl.flock = flock
"""


@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_programs_work_on_a_disk_without_locks_and_warn_once(scene: Scene, number: str) -> None:
    expected, _ = scene.undisturbed("quantize")
    scene.fresh()
    outcome = scene.warm.run(replace(scene.call("quantize"), hooks=NO_LOCKS.replace("{}", number)))
    assert outcome.status == 0, outcome.err
    assert outcome.err.count("knows no locks") == 1
    assert difference(expected, lasting(scene.root)) == ""


# Full and failing disks -----------------------------------------------------------------------------------------------


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A disk of 20 MB over a folder."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> Path:
    """Fill a disk. Returns the file that does."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
    return filler


FULL = ("quantize", "build", "export", "plot", "judge", "mtbench", "calibrate", "ppl")
REWRITTEN = ("build", "plot", "calibrate", "table")
FULL_SAYS = r"No space left|os error 28|File too large|os error 27|Disk quota exceeded"


def refused(scene: Scene, name: str, **how: Any) -> str:
    """A program in want of a disk: one line, all that was there as it was, and nothing half-written."""
    before = lasting(scene.root)
    line = refusal(scene.warm.run(replace(scene.call(name), **how)))
    after = lasting(scene.root)
    assert re.search(FULL_SAYS, line), line
    assert {file: after.get(file) for file in before} == before
    assert not [file for file in after if re.search(r"/\.[^/]*\.(partial|whole|lock)", f"/{file}")]
    return line


def ends(scene: Scene, name: str) -> None:
    """The same command, when there is space."""
    outcome = scene.warm.run(scene.call(name))
    assert outcome.status == 0, outcome.err
    assert difference(scene.seen[name][0], lasting(scene.root)) == ""


@as_root
@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_line_and_the_same_command_ends_when_there_is_space(scene: Scene, name: str) -> None:
    with small_disk(scene.root):
        scene.undisturbed(name)
        filler = fill(scene.root)
        try:
            refused(scene, name)
        finally:
            filler.unlink()
        ends(scene, name)


@as_root
@pytest.mark.parametrize("name", REWRITTEN)
def test_what_is_written_again_on_a_full_disk_keeps_its_old_bytes(scene: Scene, name: str) -> None:
    with small_disk(scene.root):
        scene.finish(name)
        filler = fill(scene.root)
        try:
            refused(scene, name)
        finally:
            filler.unlink()


@pytest.mark.parametrize("name", ["quantize", "export", "plot"])
def test_a_limit_on_the_size_of_files_is_an_error_and_no_death(scene: Scene, name: str) -> None:
    """SIGXFSZ ends a process that does not ignore it."""
    scene.undisturbed(name)
    refused(scene, name, limit=200)
    ends(scene, name)


@pytest.mark.parametrize(
    ("name", "how"),
    [("quantize", "EIO"), ("build", "EROFS"), ("export", "ENOSPC"), ("plot", "EDQUOT"), ("mtbench", "EIO")],
)
def test_an_error_of_the_disk_is_one_line_and_the_same_command_ends(scene: Scene, name: str, how: str) -> None:
    """The last file of the program does not get its name."""
    expected, changes = scene.undisturbed(name)
    at = max(at for at, change in enumerate(changes) if kind_of(change) == "hidden directory gone, not renamed")
    struck, again, left = scene.disturbed(name, how, at)
    assert os.strerror(getattr(errno, how)) in refusal(struck)
    assert again.status == 0, again.err
    assert difference(expected, left) == ""


LATE = """
import errno, os
def fsync(descriptor):
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
os.fsync = fsync
"""


@pytest.mark.parametrize("name", ["build", "plot", "table"])
def test_what_a_server_says_only_in_the_end_is_heard_before_the_old_file_goes(scene: Scene, name: str) -> None:
    scene.finish(name)
    assert str(scene.root) in refused(scene, name, hooks=LATE)
    scene.undisturbed(name)
    assert str(scene.root) in refused(scene, name, hooks=LATE)
    ends(scene, name)


# Another user ---------------------------------------------------------------------------------------------------------


def their_place() -> Path:
    """A directory of the other user's."""
    place = Path(tempfile.mkdtemp(prefix="their-"))
    os.chown(place, NOBODY, NOBODY)
    return place


@as_root
def test_another_user_reads_what_the_first_one_finished(scene: Scene, tmp_path: Path) -> None:
    """Nothing that the first user's runs left can be written by the second; everything can be used."""
    scene.finish("ppl")
    build = scene.call("build")
    assert scene.warm.run(build).status == 0
    before = lasting(scene.root)
    ppl = scene.call("ppl")
    outcome = scene.warm.run(replace(ppl, user=NOBODY, arguments=(*ppl.arguments, "--json")))
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["settings"]["prefix"]["label"] == "[B]"
    (checkpoint,) = (scene.root / "modelzoo" / "quantized" / "model").iterdir()
    (prefix,) = (scene.root / "modelzoo" / "prefixes" / "model").iterdir()
    loads = "\n".join([
        "import sys", "from pathlib import Path", "from intactkv.prefix import Prefix",
        "from quantization.runs.checkpoint import load_quantized",
        "load_quantized(Path(sys.argv[1])), Prefix.load(sys.argv[2])",
    ])  # fmt: skip
    outcome = scene.warm.run(Call(loads, (str(checkpoint), str(prefix)), str(scene.root), user=NOBODY))
    assert outcome.status == 0, outcome.err
    outcome = scene.warm.run(Call("eval", ("table", "--format", "csv"), str(scene.root), user=NOBODY))
    assert (outcome.status, outcome.out.count("\n")) == (0, 3), outcome.err
    place = their_place()
    try:
        export = ("--model", str(checkpoint), "--out", str(place / "exported"))
        outcome = scene.warm.run(Call("quantization.export", export, str(scene.root), user=NOBODY))
        assert outcome.status == 0, outcome.err
        own = (*build.arguments[:-1], str(place / "bos.safetensors"))
        assert scene.warm.run(replace(build, arguments=own, user=NOBODY)).status == 0
    finally:
        shutil.rmtree(place)
    assert difference(before, lasting(scene.root)) == ""


@as_root
@pytest.mark.parametrize("name", ["quantize", "build", "ppl", "plot", "mtbench", "table", "adapter", "export"])
def test_another_user_is_told_in_one_line_where_nothing_can_be_written(scene: Scene, name: str) -> None:
    scene.fresh()
    before = lasting(scene.root)
    line = refusal(scene.warm.run(replace(scene.call(name), user=NOBODY)))
    assert re.search("Permission denied|nothing can be written", line)
    assert str(scene.root) in line
    assert difference(before, lasting(scene.root)) == ""


@as_root
def test_what_may_not_be_read_is_not_called_damaged(scene: Scene) -> None:
    scene.finish("ppl")
    assert scene.warm.run(scene.call("build")).status == 0
    (checkpoint,) = (scene.root / "modelzoo" / "quantized" / "model").iterdir()
    given = {path.name for path in (scene.given / "root" / "outputs" / "runs").iterdir()}
    (record,) = [path for path in (scene.root / "outputs" / "runs").iterdir() if path.name not in given]
    ppl, place = scene.call("ppl"), their_place()
    calls = {
        checkpoint / "block-001.safetensors": ("quantization.export", "--model", checkpoint, "--out", place / "x"),
        checkpoint / "quantization.json": ("quantization.export", "--model", checkpoint, "--out", place / "x"),
        scene.root / "bos.safetensors": (ppl.program, *ppl.arguments[:-1], scene.root / "bos.safetensors"),
        scene.given / "model" / "model.safetensors": (ppl.program, *ppl.arguments),
        scene.given / "model" / "config.json": (ppl.program, *ppl.arguments),
        record: (ppl.program, *ppl.arguments),
    }
    for file, (program, *arguments) in calls.items():
        file.chmod(0o600)
        try:
            outcome = scene.warm.run(Call(program, tuple(map(str, arguments)), str(scene.root), user=NOBODY))
            line = refusal(outcome)
            assert "Permission denied" in line, (file, line)
            assert str(file) in line, (file, line)
        finally:
            file.chmod(0o644)
    shutil.rmtree(place)
