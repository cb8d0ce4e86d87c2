"""Runs of tables as Slurm arrays, with a Slurm that only says what a test wants: lists, scripts, queues, states."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from common import ROOT, every

from corpora.errors import UserError
from corpora.paths import outputs_dir
from eval.__main__ import main
from eval.cluster import slurm, tasks
from eval.cluster.scripts import RESTARTS, indices, script_of
from eval.cluster.site import Site, read_site
from eval.cluster.slurm import Queued
from eval.cluster.states import Job, keep_note, last_line, log_of, note_of, read_jobs, states_of, write_jobs
from eval.cluster.submitting import lines_of, parts_of, submit, wanted, write_scripts
from eval.cluster.task import _unfinished, run_task
from eval.cluster.tasks import arrays_of, read_tasks, submission_name, tasks_of, write_tasks
from eval.tables.asked import Run
from eval.tables.ledger import Entry, keep

MODEL = Path("modelzoo/m")
HOSTILE = "a 'b' \"c\" $(touch x) `d` \\ #e\nf"


def quantized(recipe: str) -> Run:
    return Run("quantization", MODEL, "", ("--recipe", recipe))


def measured(recipe: str, item: str, *needs: Run) -> Run:
    return Run("ppl", MODEL, item, ("--recipe", recipe), needs)


def some_runs() -> list[Run]:
    """Two checkpoints, a prefix trained on one of them, and what is measured on each and on none."""
    one, other = quantized("gptq"), quantized("awq")
    trained = Run("train-prefix", MODEL, "", ("--recipe", "gptq"), (one,))
    return [measured("fp16", "sample"), one, measured("gptq", "sample", one), measured("gptq", "c4", one), other,
            measured("awq", "sample", other), trained, measured("gptq", "sample", one, trained)]  # fmt: skip


def done(run: Run) -> None:
    """Let the ledger have a run."""
    made = f"made/{run.key}"
    (outputs_dir().parent / made).mkdir(parents=True)
    entry: Entry = {"program": run.program, "model": "m", "item": run.item, "command": [], "made": made, "seconds": 1.0,
                    "finished": "2026"}  # fmt: skip
    keep(run, entry)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """fake(command, script) puts a command of a test in front of the PATH; returns the file of all its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(command: str, script: str = "") -> Path:
        calls = tmp_path / f"{command}.calls"
        calls.touch()
        (folder / command).write_text(f"#!/bin/bash\necho \"$*\" >> '{calls}'\n{script}\n")
        (folder / command).chmod(0o755)
        return calls

    return put


# The list -------------------------------------------------------------------------------------------------------------


def test_tasks_of_an_array_need_the_same_and_stand_behind_it() -> None:
    listed = tasks_of(some_runs())
    assert [task.index for task in listed] == list(range(len(listed)))
    assert sorted(run.key for task in listed for run in task.call.runs) == sorted(run.key for run in some_runs())
    maker = {run.key: task.index for task in listed for run in task.call.runs}
    for task in listed:
        assert set(task.needs) == {maker[run.key] for run in task.call.needs}
        assert all(other < task.index for other in task.needs)
    for array in arrays_of(listed):
        assert len({task.needs for task in array.tasks}) == 1
        assert [task.index for task in array.tasks] == list(range(array.first, array.first + len(array.tasks)))
    # Checkpoints first, what trains on one then, and a measurement waits for nothing that it does not read.
    programs = [(task.call.first.program, task.needs) for task in listed]
    assert programs == [("quantization", ()), ("quantization", ()), ("train-prefix", (0,)), ("ppl", ()), ("ppl", (0,)),
                        ("ppl", (0, 2)), ("ppl", (1,))]  # fmt: skip


def test_an_array_is_no_larger_than_slurm_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "LARGEST_ARRAY", 3)
    listed = tasks_of([measured(f"r{i}", "sample") for i in range(7)])
    assert [len(array.tasks) for array in arrays_of(listed)] == [3, 3, 1]


def test_a_list_is_read_back_and_a_name_means_one_list(intactkv_root: Path) -> None:
    listed = tasks_of(some_runs())
    name = submission_name(["intactkv-1"], [MODEL], listed)
    write_tasks(name, listed)
    assert read_tasks(name) == listed
    write_tasks(name, listed)
    with pytest.raises(UserError, match="holds another list of tasks; give another --name"):
        write_tasks(name, listed[:-1])
    assert submission_name(["intactkv-1"], [MODEL], listed[:-1]) != name


@pytest.mark.parametrize(("old", "new"), [('"gptq"', '"awq"'), ('"task": 1', '"task": 2'), ('"quantization"', '"rm"'),
                                          ('"needs": [0]', '"needs": [5]'), ("{", "")])  # fmt: skip
def test_a_list_that_was_changed_is_refused(intactkv_root: Path, old: str, new: str) -> None:
    write_tasks("n", tasks_of(some_runs()))
    file = outputs_dir() / "cluster" / "n" / "tasks.jsonl"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=r"the list of tasks .*; delete its folder"):
        read_tasks("n")


def test_what_was_submitted_and_what_a_task_said_is_read_whole_or_refused(intactkv_root: Path) -> None:
    folder = outputs_dir() / "cluster" / "n"
    assert note_of("n", 3) is None
    keep_note("n", 3, {"state": "failed", "job": "7_0", "host": "h", "pid": 1, "started": "", "said": "why"})
    write_jobs("n", [{"job": "7", "array": 0, "first": 0, "tasks": [0], "submitted": ""}])
    for file, read in (
        (folder / "status" / "3.json", lambda: note_of("n", 3)),
        (folder / "jobs.json", lambda: read_jobs("n")),
    ):
        assert read()
        text = file.read_text()
        for changed in (text.replace("7", "8", 1), text[:-9], ""):
            file.write_text(changed)
            with pytest.raises(UserError, match="delete the file; what is finished stays"):
                read()


def test_what_is_left_is_what_nobody_has_and_what_that_needs(intactkv_root: Path) -> None:
    runs = some_runs()
    listed = tasks_of(runs)
    assert wanted(listed) == set(range(7))
    for run in listed[6].call.runs:  # on the checkpoint of task 1, which nothing else needs
        done(run)
    assert wanted(listed) == {0, 2, 3, 4, 5}
    done(listed[0].call.first)
    assert wanted(listed) == {2, 3, 4, 5}


# Scripts --------------------------------------------------------------------------------------------------------------


def test_numbers_of_tasks_as_slurm_writes_them() -> None:
    assert indices([0]) == "0"
    assert indices([4, 0, 1, 2, 7, 8], 3) == "0-2,4,7-8%3"


def script(site: Site | None = None, at_once: int | None = None) -> str:
    listed = tasks_of(some_runs())
    return script_of("n", arrays_of(listed)[0], site or Site(), at_once, "auto")


def test_a_script_says_what_it_does_and_no_site_s_accounts(intactkv_root: Path) -> None:
    asked = {"SBATCH_ACCOUNT": "secret-account", "SBATCH_PARTITION": "secret-partition"}
    text = script(Site(asked=asked, setup=("module load cuda",), launch=("apptainer", "exec", "x y.sif")), at_once=2)
    assert text == script(Site(asked=asked, setup=("module load cuda",), launch=("apptainer", "exec", "x y.sif")), 2)
    assert "secret" not in text
    for line in ("#SBATCH --array=0-1%2", "#SBATCH --output=logs/%x_%A_%a.out", "#SBATCH --signal=B:USR1@120",
                 "#SBATCH --requeue", "#SBATCH --kill-on-invalid-dep=yes", "module load cuda",
                 f"PROJECT_ROOT={ROOT} # where Slurm puts its copy of this script tells nothing"):  # fmt: skip
        assert line in text.splitlines()
    assert f"apptainer exec 'x y.sif' {sys.executable} -m eval cluster run --device auto n" in text
    assert "CUDA_VISIBLE_DEVICES" not in text


def test_shellcheck_finds_nothing_in_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    place = tmp_path / HOSTILE
    place.mkdir()
    monkeypatch.setenv("INTACTKV_ROOT", str(place))
    monkeypatch.chdir(place)
    checked = subprocess.run(
        ["shellcheck", "--exclude=SC2016", "-"], input=script(), capture_output=True, text=True, check=False
    )
    assert checked.stdout == ""  # SC2016: a $ in single quotes is a part of this name


def ran(text: str, where: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script, run as Slurm runs it."""
    environment = {
        **os.environ,
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_JOB_ID": "9",
        **variables,
    }
    return subprocess.run(["bash"], input=text, cwd=where, env=environment, capture_output=True, text=True, check=False)


def test_a_script_finds_its_places_whatever_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Callable[..., Path]
) -> None:
    place = tmp_path / HOSTILE
    place.mkdir()
    monkeypatch.setenv("INTACTKV_ROOT", str(place))
    monkeypatch.chdir(place)
    fake("interpreter", 'printf "%s|" "$PWD" "$INTACTKV_ROOT" "$HF_HUB_OFFLINE" "${PYTHONPATH%%:*}" "$@"')
    done = ran(script(Site(python="interpreter")), tmp_path)
    assert done.stdout.split("|") == [
        str(place),
        str(place),
        "1",
        str(ROOT),
        *("-m", "eval", "cluster", "run", "--device", "auto", "n", "1", ""),
    ]
    assert done.returncode == 0
    assert list(place.iterdir()) == []


@every(
    ("code", "restarts", "state", "again"),
    [
        (0, 0, "RUNNING", False),
        (1, 0, "RUNNING", False),  # the program's own failure
        (2, 0, "RUNNING", False),  # a user's mistake
        (75, 0, "RUNNING", True),  # told to stop
        (75, RESTARTS - 1, "RUNNING", True),
        (75, RESTARTS, "RUNNING", False),
        (137, 0, "RUNNING", True),  # killed, which may be the machine's fault once
        (137, 1, "RUNNING", False),
        (75, 0, "COMPLETING", False),  # somebody has cancelled the job
    ],
)
def test_a_task_is_queued_again_if_it_was_stopped_or_killed_once(
    tmp_path: Path, fake: Callable[..., Path], code: int, restarts: int, state: str, again: bool
) -> None:
    fake("interpreter", f"exit {code}")
    fake("squeue", f"echo {state}")
    calls = fake("scontrol")
    calls.write_text("")
    done = ran(script(Site(python="interpreter")), tmp_path, SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == code
    assert calls.read_text() == ("requeue 7_1\n" if again else "")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_program_which_ends_in_its_own_time(
    tmp_path: Path, fake: Callable[..., Path], number: signal.Signals
) -> None:
    name = number.name.removeprefix("SIG")
    fake(
        "interpreter", f"trap 'sleep 0.3; echo told {name}; exit 75' {name}\necho started\nwhile :; do sleep 0.05; done"
    )
    fake("squeue", "echo RUNNING")
    calls = fake("scontrol")
    environment = {**os.environ, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    (tmp_path / "script").write_text(script(Site(python="interpreter")))
    process = subprocess.Popen(["bash", "script"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert (out, process.returncode, calls.read_text()) == (f"told {name}\n", 75, "requeue 7_1\n")


# cluster.env ----------------------------------------------------------------------------------------------------------


def test_the_example_is_read_and_names_no_site(intactkv_root: Path) -> None:
    shutil.copy(ROOT / "scripts" / "cluster" / "cluster.env.example", intactkv_root / "cluster.env")
    site = read_site()
    assert site.asked == {"SBATCH_GRES": "gpu:1", "SBATCH_TIMELIMIT": "4:00:00", "SBATCH_MEM_PER_NODE": "64G"}
    assert (site.cpus, site.setup, site.launch, site.python) == (8, (), (), sys.executable)


def test_every_key_reaches_slurm_or_the_script(intactkv_root: Path) -> None:
    (intactkv_root / "cluster.env").write_text(
        "# ours\nPARTITION=a\nACCOUNT = b=c\nSETUP=module load x\nSETUP=. e\n"
        "LAUNCH=run 'it now'\nPYTHON=python3\nQOS=\n"
    )
    site = read_site()
    assert site.asked == {"SBATCH_PARTITION": "a", "SBATCH_ACCOUNT": "b=c"}
    assert (site.setup, site.launch, site.python) == (("module load x", ". e"), ("run", "it now"), "python3")


@every(
    ("text", "said"),
    [
        ("PARTITON=a", "line 1: PARTITON is not known; choose from PARTITION, ACCOUNT"),
        ("\nTIME=4h", "line 2: TIME=4h is not allowed; give minutes, hours:minutes:seconds or days-hours"),
        ("TIME=0", "TIME=0 is not allowed"),
        ("MEM=64 GB", "MEM='64 GB' is not allowed; give a memory such as 64G"),
        ("CPUS=all", "CPUS=all is not allowed; give a whole number"),
        ("ACCOUNT=a b", "ACCOUNT='a b' is not allowed; give one word"),
        ("LAUNCH=run 'it", "close every quote"),
        ("QOS=a\nQOS=b", "line 2: QOS stands there twice"),
        ("module load x", "is not known; choose from"),
    ],
)
def test_a_wrong_line_is_named(intactkv_root: Path, text: str, said: str) -> None:
    (intactkv_root / "cluster.env").write_text(text)
    with pytest.raises(UserError) as caught:
        read_site()
    assert said in str(caught.value)
    assert str(intactkv_root / "cluster.env") in str(caught.value)


def test_without_the_file_the_way_out_is_said(intactkv_root: Path) -> None:
    with pytest.raises(UserError, match=r"cluster\.env is missing; copy scripts/cluster/cluster\.env\.example to it"):
        read_site()


# Slurm's words --------------------------------------------------------------------------------------------------------


def test_the_queue_is_read_task_by_task(fake: Callable[..., Path]) -> None:
    fake("squeue", "printf '7_0|RUNNING|None\\n7_1|PENDING|Dependency\\n12_N/A|PENDING|(a|b)\\n'")
    found = slurm.queue()
    assert found["7_0"] == Queued("RUNNING")
    assert found["7_1"] == Queued("PENDING", "Dependency")
    assert [queued.waits for queued in found.values()] == [False, True, True]


def test_how_tasks_ended_is_asked_of_sacct_and_not_missed_without_it(fake: Callable[..., Path]) -> None:
    calls = fake("sacct", "printf '7_0|OUT_OF_MEMORY\\n7_1|CANCELLED by 0\\n7_2|\\n'")
    assert slurm.ended(["7_0", "7_1", "10_0"]) == {"7_0": "OUT_OF_MEMORY", "7_1": "CANCELLED"}
    assert "--jobs=7,10" in calls.read_text()
    fake("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert slurm.ended(["7_0"]) == {}


def test_what_slurm_refuses_is_one_line(fake: Callable[..., Path], tmp_path: Path) -> None:
    fake("sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(UserError, match=r"sbatch refused: .*invalid partition specified: x; mend cluster\.env"):
        slurm.submit(tmp_path / "00.sbatch", [], {})
    fake("sbatch", "echo hello")
    with pytest.raises(UserError, match="sbatch printed 'hello' in place of a job id"):
        slurm.submit(tmp_path / "00.sbatch", [], {})


# States ---------------------------------------------------------------------------------------------------------------


def test_a_task_is_what_the_ledger_the_queue_and_its_own_note_say(intactkv_root: Path) -> None:
    listed = tasks_of([measured(f"r{i}", "sample") for i in range(9)])
    write_tasks("n", listed)
    jobs: list[Job] = [
        {"job": "5", "array": 0, "first": 0, "tasks": list(range(8)), "submitted": ""},
        {"job": "6", "array": 0, "first": 0, "tasks": [4, 5], "submitted": ""},
    ]
    note: Any = {"host": "h", "pid": 1, "started": "", "said": "why"}
    done(listed[0].call.first)
    keep_note("n", 2, {**note, "job": "5_2", "state": "stopped"})
    keep_note("n", 3, {**note, "job": "5_3", "state": "failed"})
    keep_note("n", 4, {**note, "job": "5_4", "state": "failed"})  # of the job before
    keep_note("n", 5, {**note, "job": "6_5", "state": "running"})
    queue = {"5_0": Queued("COMPLETING"), "5_1": Queued("RUNNING"), "5_2": Queued("PENDING", "BeginTime"),
             "6_4": Queued("PENDING", "Priority")}  # fmt: skip
    found = states_of("n", listed, jobs, queue, {"5_6": "OUT_OF_MEMORY"})
    words = ["done", "running", "requeued", "failed", "pending", "failed", "failed", "failed", "open"]
    assert [state.word for state in found] == words
    assert [state.why for state in found[2:5]] == ["BeginTime", "why", "Priority"]
    assert found[6].why == "Slurm says OUT_OF_MEMORY"
    assert "left the queue without a word" in found[7].why
    assert [state.job for state in found[3:6]] == ["5_3", "6_4", "6_5"]
    unknown = states_of("n", listed, jobs, None, {})
    assert [state.word for state in unknown] == ["done", "unknown", "unknown", "failed", *["unknown"] * 4, "open"]
    jobs[0]["cancelled"] = True
    assert states_of("n", listed, jobs, {}, {})[7].word == "cancelled"


def test_what_needs_a_failed_task_has_failed_too_and_says_so(intactkv_root: Path) -> None:
    listed = tasks_of(some_runs())
    jobs: list[Job] = [{"job": str(a.number), "array": a.number, "first": a.first, "tasks": [t.index for t in a.tasks],
                        "submitted": ""} for a in arrays_of(listed)]  # fmt: skip
    done(listed[1].call.first)
    found = states_of("n", listed, jobs, {}, {})
    assert "it needs task 0, which failed" in (found[2].why, found[4].why)
    assert "without a word" in found[6].why  # its checkpoint is there


def test_the_last_line_of_a_log_is_the_last_that_says_something(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 9999 + b"\nfirst\n 10%\r 20%\r\n\n")
    assert last_line(tmp_path / "log") == "20%"
    assert last_line(tmp_path / "none") == ""


# Submitting -----------------------------------------------------------------------------------------------------------

SBATCH = 'n=$(cat n 2>/dev/null || echo 100); echo $((n + 1)) > n; echo "$SBATCH_ACCOUNT" >> accounts; echo $((n + 1))'


def test_an_array_waits_for_what_it_needs_alone_and_nothing_is_submitted_twice(
    intactkv_root: Path, fake: Callable[..., Path]
) -> None:
    calls, queue = fake("sbatch", SBATCH), fake("squeue")
    assert queue.exists()
    listed = tasks_of(some_runs())
    done(listed[0].call.first)  # the checkpoint of tasks 2, 4 and 5
    site = Site(asked={"SBATCH_ACCOUNT": "ours"}, cpus=3)
    submit("n", listed, site, at_once=2)
    assert [line.split() for line in calls.read_text().splitlines()] == [
        ["--parsable", "--array=1%2", "--cpus-per-task=3", "00.sbatch"],
        ["--parsable", "--array=0%2", "--cpus-per-task=3", "01.sbatch"],
        ["--parsable", "--array=0%2", "--cpus-per-task=3", "02.sbatch"],
        ["--parsable", "--array=0%2", "--cpus-per-task=3", "03.sbatch"],
        ["--parsable", "--array=0%2", "--dependency=afterok:102_0", "--cpus-per-task=3", "04.sbatch"],
        ["--parsable", "--array=0%2", "--dependency=afterok:101_1", "--cpus-per-task=3", "05.sbatch"],
    ]
    folder = outputs_dir() / "cluster" / "n"
    assert set((folder / "accounts").read_text().split()) == {"ours"}
    assert all("ours" not in file.read_text() for file in folder.glob("*.sbatch"))

    fake("squeue", "printf '101_1|RUNNING|None\\n102_0|PENDING|Priority\\n103_0|PENDING|x\\n104_0|PENDING|x\\n'")
    calls.write_text("")
    parts = submit("n", listed, site)  # two arrays have left the queue without a result
    assert [task.index for part in parts for task in part.tasks] == [5, 6]
    calls.write_text("")
    parts = submit("other", [replace(task) for task in listed], site)  # the same runs under another name
    assert [task.index for part in parts for task in part.elsewhere] == [1, 2, 3, 4]
    assert [line.split()[1:3] for line in calls.read_text().splitlines()] == [
        ["--array=0", "--dependency=afterok:102_0"], ["--array=0", "--dependency=afterok:101_1"],
    ]  # fmt: skip


def test_only_what_failed_is_tried_again(intactkv_root: Path, fake: Callable[..., Path]) -> None:
    calls = fake("sbatch", SBATCH)
    fake("squeue", "echo '1_0|RUNNING|None'")
    fake("sacct")
    listed = tasks_of([measured(f"r{i}", "sample") for i in range(4)])
    write_tasks("n", listed)
    write_jobs("n", [{"job": "1", "array": 0, "first": 0, "tasks": [0, 1, 2], "submitted": ""}])
    done(listed[1].call.first)
    submit("n", listed, Site(), failed_alone=True)  # 0 runs, 1 is done, 3 was never submitted
    assert calls.read_text() == "--parsable --array=2 00.sbatch\n"


# The program ----------------------------------------------------------------------------------------------------------

PPL = ("cluster", "submit", "intactkv-1", "--model", "modelzoo/m", "--window", "32")


def test_a_dry_run_needs_no_slurm_no_model_and_no_site(
    intactkv_root: Path, run_main: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, out, err = run_main(main, *PPL, "--dry-run", "--name", "n")
    assert code == 0
    assert "cluster.env is missing" in err
    (folder,) = (outputs_dir() / "cluster").iterdir()
    listed = [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]
    assert out.splitlines()[-1] == (
        f"n: {len(listed)} tasks, 0 need not run, {len(listed)} to submit; nothing was submitted"
    )
    assert f"cd {folder}" in out
    submitted = [line.partition(")")[0].split()[-1] for line in out.splitlines() if line.startswith("JOB")]
    assert submitted == sorted(file.name for file in folder.glob("*.sbatch"))
    assert len(list(folder.glob("*.sbatch"))) == len({line["array"] for line in listed})
    assert all(line["command"].startswith("python -m ") for line in listed)
    assert read_jobs("n") == []
    assert "lacking: text c4 for calibration" in err
    code, _, err = run_main(main, "cluster", "status")  # a plan is no submission
    assert (code, "nothing was submitted yet" in err) == (2, True)


def test_the_lines_of_a_plan_submit_what_the_program_would(intactkv_root: Path, fake: Callable[..., Path]) -> None:
    calls, _ = fake("sbatch", SBATCH), fake("squeue")
    listed, site = tasks_of(some_runs()), Site(asked={"SBATCH_ACCOUNT": "ours it is"}, cpus=3)
    write_scripts("n", listed, site, 2, "auto")
    lines = lines_of("n", listed, parts_of(listed, wanted(listed), {}), site, 2)
    subprocess.run(["bash", "-eu"], input="\n".join(lines), text=True, check=True)
    by_hand = calls.read_text()
    calls.write_text("")
    (outputs_dir() / "cluster" / "n" / "n").unlink()  # where the stand-in counts its jobs
    submit("n", listed, site, at_once=2)
    assert by_hand.count("afterok") == calls.read_text().count("afterok") > 0
    assert by_hand == calls.read_text()
    assert "ours it is" in (outputs_dir() / "cluster" / "n" / "accounts").read_text()


@every(
    ("words", "said"),
    [
        (("submit", "no-such-table"), "unknown table no-such-table"),
        (("submit", "intactkv-1", "--name", "../x", "--dry-run", "--model", "m"), "--name ../x is not allowed"),
        (("status",), "nothing was submitted yet"),
        (("status", "n"), "no submission has that name"),
        (("retry", "n"), "no submission has that name"),
        (("cancel", "n"), "no submission has that name"),
        (("run", "n", "0"), "no submission has that name"),
        (("run", "n", "x"), "x is not allowed; give a whole number"),
        (("status", "../../x"), "../../x is not allowed"),
    ],
)
def test_a_mistake_is_one_line(
    intactkv_root: Path, run_main: Callable[..., tuple[int, str, str]], words: tuple[str, ...], said: str
) -> None:
    code, out, err = run_main(main, "cluster", *words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert said in err


def test_status_knows_what_is_finished_without_a_slurm(
    intactkv_root: Path, run_main: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tasks_of([measured(f"r{i}", "sample") for i in range(2)])
    write_scripts("n", listed, Site(), None, "auto")
    done(listed[0].call.first)
    write_jobs("n", [{"job": "1", "array": 0, "first": 0, "tasks": [0, 1], "submitted": ""}])
    log_of("n", listed[0], "1_0").write_text("command: x\n/the/result.json\n")
    monkeypatch.setenv("PATH", "/nowhere")
    code, out, err = run_main(main, "cluster", "status", "n")
    assert code == 0
    assert "squeue is not on this machine's PATH" in err
    first, second, last = out.splitlines()
    assert first.split()[:3] == ["0", "done", "1_0"]
    assert first.endswith("/the/result.json")
    assert second.split()[:3] == ["1", "unknown", "1_1"]
    assert last == "n: 1 done, 1 unknown"


def test_a_task_of_slurm_looks_again_for_what_another_node_has_just_made(
    intactkv_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tasks_of(some_runs())
    for name in ("JOB", "TASK"):
        monkeypatch.setenv(f"SLURM_ARRAY_{name}_ID", "1")
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            done(listed[0].call.first)

    monkeypatch.setattr("eval.cluster.task.time.sleep", wait)
    assert _unfinished(listed[:1]) == []
    assert len(waits) == 2
    monkeypatch.setattr("eval.cluster.task.SEEN", 0.0)
    assert _unfinished(listed[:2]) == [listed[1]]
    assert len(waits) == 2


def test_a_task_by_hand_says_what_it_is_and_where_the_result_lies(
    intactkv_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tasks_of(some_runs())
    write_tasks("n", listed)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert run_task("n", 4) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "failed: it needs task 0, which is not done"
    done(listed[0].call.first)
    before = signal.getsignal(signal.SIGTERM)
    assert run_task("n", 0) == 0
    assert signal.getsignal(signal.SIGTERM) == before
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:6]] == ["command", "commit", "versions", "gpu", "runs", "task"]
    assert "quantization --model modelzoo/m --recipe gptq --device auto" in lines[0]
    assert "(CUDA_VISIBLE_DEVICES=3)" in lines[3]
    assert lines[-1] == str(outputs_dir().parent / "made" / listed[0].call.first.key)
    with pytest.raises(UserError, match="n has no task 99; choose from 0 to 6"):
        run_task("n", 99)
