"""Tables on a real Slurm that the test starts: tasks that are killed, stopped, cancelled, a node that is drained."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm
from common import FOXES
from slurm import asked, until

from corpora.paths import outputs_dir
from eval.__main__ import main
from eval.cluster.states import job_of, note_of, read_jobs
from eval.cluster.tasks import read_tasks
from eval.tables.asked import Run
from eval.tables.ledger import answer_of
from eval.tables.noted import all_noted

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing() or "there is one")]

SCOPE = ("--window", "32", "--limit", "2", "--options", "--group-size 32", "--calibration-samples", "2",
         "--calibration-length", "32")  # fmt: skip
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Slurm, the only one that programs see."""
    with slurm.running(tmp_path_factory.mktemp("slurm")) as configuration, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(configuration))
        yield


@pytest.fixture
def table(cluster: None, intactkv_root: Path, checkpoint: Callable[..., Path]) -> Callable[..., list[str]]:
    """table(*words of --only, layers=3) -> the words behind `submit` or `reproduce` for a reduced table."""
    (intactkv_root / "cluster.env").write_text("GRES=gpu:1\nTIME=10\nCPUS=1\n")
    text = intactkv_root.parent / "text.txt"
    text.write_text(FOXES)

    def words(*only: str, layers: int = 3) -> list[str]:
        model = checkpoint(num_hidden_layers=layers)
        return ["intactkv-1", "--model", str(model), "--corpus", str(text), "--calibration", str(text), *SCOPE,
                "--only", *only]  # fmt: skip

    return words


def submitted(run_main: Main, *words: str) -> tuple[str, int]:
    """Submit: the name, and how many tasks."""
    code, out, err = run_main(main, "cluster", "submit", *words)
    assert code == 0, err
    found = re.fullmatch(r"(\S+): (\d+) of \d+ tasks submitted.*\n", out)
    assert found, out
    return found[1], int(found[2])


def start_soon(task: str) -> None:
    """Slurm lets what is queued again wait for two minutes; in the second of its end the node would refuse it."""
    asked("scontrol", "update", f"JobId={task}", "StartTime=now+2")


def states(run_main: Main, name: str) -> list[str]:
    code, out, err = run_main(main, "cluster", "status", name)
    assert (code, err) == (0, "")
    return [line.split()[1] for line in out.splitlines()[:-1]]


def job(name: str, index: int) -> str:
    """A task as Slurm calls it."""
    found = job_of(read_tasks(name)[index], read_jobs(name))
    assert found is not None
    return found[0]


def all_done(run_main: Main, name: str) -> bool:
    return set(states(run_main, name)) == {"done"}


def program_of(name: str, index: int) -> int:
    """The process of the program that a task has called; 0 if there is none yet."""
    note = note_of(name, index)
    if note is None:
        return 0
    children = Path(f"/proc/{note['pid']}/task/{note['pid']}/children")
    return int(next(iter(children.read_text().split()), "0")) if children.exists() else 0


def figures(run: Run) -> dict[str, Any]:
    """What a run has measured, and by which protocol; where, when and how long is left out."""
    record = answer_of(run)
    assert record is not None
    kept = ("task", "identity", "settings", "perplexity", "nll", "window_nll", "windows", "targets", "stream_tokens")
    return {key: record[key] for key in kept}


def test_a_table_with_a_killed_task_and_a_drained_node_ends_as_the_local_one(
    table: Callable[..., list[str]], run_main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = asked("sinfo", "--noheader", "--format=%n")
    asked("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    name, count = submitted(run_main, *table("rtn", "gptq", "alone"))
    assert count == len(read_tasks(name)) == 4
    assert states(run_main, name) == ["pending"] * 4
    assert submitted(run_main, *table("rtn", "gptq", "alone")) == (name, 0)  # nothing twice
    asked("scontrol", "update", f"NodeName={node}", "State=RESUME")

    until(lambda: program_of(name, 0), "the first task runs")
    program = program_of(name, 0)
    assert program, "it ended before it was killed"  # 0 would be all processes of this test
    os.kill(program, signal.SIGKILL)
    until(lambda: states(run_main, name)[0] == "requeued", "the killed task is queued again")
    assert "pending" in states(run_main, name)  # what needs it still waits
    start_soon(job(name, 0))
    until(lambda: all_done(run_main, name), "all is done")
    assert submitted(run_main, *table("rtn", "gptq", "alone")) == (name, 0)
    (log,) = outputs_dir().glob(f"cluster/{name}/logs/*_{job(name, 0)}.out")
    lines = log.read_text().splitlines()
    assert lines[0].startswith("command: ")
    assert [line.partition(":")[0] for line in lines[:6]] == ["command", "commit", "versions", "gpu", "runs", "task"]
    assert sum(line.startswith("failed: quantization ") for line in lines) == 1
    assert sum("queued again" in line for line in lines) == 2  # both runs are in one log
    assert Path(lines[-1]).is_dir()

    runs = [run for task in read_tasks(name)[2:] for run in task.call.runs]  # behind the two checkpoints
    on_the_cluster = [figures(run) for run in runs]
    assert len(on_the_cluster) == 2
    assert [noted.table for noted in all_noted([])] == ["intactkv-1"]  # for the report
    (tmp_path / "local").mkdir()
    monkeypatch.setenv("INTACTKV_ROOT", str(tmp_path / "local"))
    code, _, err = run_main(main, "reproduce", *table("rtn", "gptq", "alone"))
    assert code == 0, err
    assert [figures(run) for run in runs] == on_the_cluster


def test_a_task_that_is_told_to_stop_goes_on_where_it_was(table: Callable[..., list[str]], run_main: Main) -> None:
    name, _ = submitted(run_main, *table("gptq", "alone", layers=48))
    first = "quantized/*/*.partial/block-000.safetensors"
    until(lambda: list((outputs_dir().parent / "modelzoo").glob(first)), "the first block is quantized")
    asked("scancel", "--signal=USR1", "--batch", job(name, 0))
    until(lambda: states(run_main, name)[0] == "requeued", "the task is queued again")
    (block,) = (outputs_dir().parent / "modelzoo").glob(first)
    made = len(list(block.parent.glob("block-*.safetensors")))
    assert 0 < made < 48
    before = block.stat()
    start_soon(job(name, 0))
    until(lambda: all_done(run_main, name), "all is done")
    (block,) = (outputs_dir().parent / "modelzoo").glob("quantized/*/*/block-000.safetensors")
    assert (block.stat().st_ino, block.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_failed_is_tried_again_and_what_is_cancelled_stays_away(
    table: Callable[..., list[str]], run_main: Main
) -> None:
    name, count = submitted(run_main, *table("rtn"))
    assert count == 3
    until(lambda: program_of(name, 0), "the first task runs")
    asked("scancel", "--signal=KILL", "--full", job(name, 0))  # script and all, as a node that goes
    until(lambda: not asked("squeue", "--noheader"), "the others are taken out of the queue")
    assert states(run_main, name) == ["failed"] * 3
    _, out, _ = run_main(main, "cluster", "status", name)
    assert out.count("it needs task 0, which failed") == 2
    assert re.search("it left the queue without a word|it was told to stop and did not come back", out)
    _, out, _ = run_main(main, "cluster", "retry", name, "--time", "20")
    assert "3 of 3 tasks submitted" in out
    assert "TimeLimit=00:20:00" in asked("scontrol", "show", "job", job(name, 0))
    until(lambda: all_done(run_main, name), "all is done")

    other, count = submitted(run_main, *table("rtn"), "--at-once", "1", "--window", "48")
    assert count == 2  # the checkpoint is there
    until(lambda: program_of(other, 1) or program_of(other, 2), "one of them runs")
    until(lambda: sorted(states(run_main, other)) == ["done", "pending", "running"], "the other one waits")
    _, out, _ = run_main(main, "cluster", "cancel", other)
    assert "2 tasks cancelled" in out
    until(lambda: not asked("squeue", "--noheader"), "nothing is left, and nothing comes back")
    assert sorted(states(run_main, other)) == ["cancelled", "cancelled", "done"]
    status = [json.loads(file.read_text())["state"] for file in outputs_dir().glob(f"cluster/{other}/status/*.json")]
    assert "stopped" in status  # the one that ran, before another try of it can say that it runs
    assert submitted(run_main, *table("rtn"), "--window", "48") == (other, 2)
    run_main(main, "cluster", "cancel", other)
    until(lambda: not asked("squeue", "--noheader"), "nothing is left for the next test")
