"""Tables as one line: what is planned, what is run, what a failure and Ctrl-C leave."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from common import FOXES, ROOT

from corpora.errors import UserError
from corpora.paths import outputs_dir
from eval.__main__ import main as eval_main
from eval.execution import Failure, Outcome, Worker, execute, workers_of
from eval.programs.reproduce import _tell
from eval.tables import ledger
from eval.tables.asked import PLACE, Call, Run, calls_of, cells_of, measures_of, rows_of, runs_of
from eval.tables.declared import ALONE, BOS, Measure, Method, Paper, Row, Scope
from eval.tables.ledger import entry_of
from eval.tables.papers import PAPERS

Main = Callable[..., tuple[int, str, str]]
GPTQ = Method("GPTQ", "gptq", ("--bits", "3"), calibrates=True, quantizes=True)
RTN = Method("RTN", "rtn", ("--bits", "4"), quantizes=True)
COLUMNS = (Measure("C4", item="c4", options=("--protocol", "intactkv")), Measure("MMLU", "tasks", "mmlu"))
PAPER = Paper(
    "small", "none", "a table", "nowhere", "none", ("llama-2-7b",), COLUMNS,
    (Row("FP16", Method("FP16")), *(Row(m.name, m, arm) for m in (RTN, GPTQ) for arm in (ALONE, BOS))),
)  # fmt: skip
MODEL = Path("modelzoo/llama-2/llama-2-7b")


class Heard:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failures: list[Failure] = []

    def doing(self, calls: Sequence[tuple[Call, str]]) -> None:
        pass

    def made(self, call: Call, seconds: float) -> None:
        self.calls.append(call.first.program)

    def failed(self, failure: Failure) -> None:
        self.failures.append(failure)


def cells(**scope: object) -> set[tuple[str, str, str]]:
    found = cells_of(PAPER, MODEL, Scope(**scope))  # type: ignore[arg-type]
    return {(cell.row.method.name, cell.row.arm.label, cell.measure.head) for cell in found}


# What is asked --------------------------------------------------------------------------------------------------------


def test_only_takes_one_word_of_each_kind() -> None:
    assert len(cells()) == 10
    assert cells(only=("rtn", "gptq", "[b]", "c4")) == {("RTN", "[B]", "C4"), ("GPTQ", "[B]", "C4")}
    assert {method for method, _, _ in cells(only=("3-bit", "16-bit"))} == {"GPTQ", "FP16"}
    assert {arm for _, arm, _ in cells(only=("alone",))} == {""}
    assert cells(only=("rtn", "kivi")) == set()


def test_an_average_that_is_chosen_brings_what_it_is_the_mean_of() -> None:
    paper = PAPERS["gptq-accuracy"]
    asked = cells_of(paper, MODEL, Scope(only=("CSQA average", "alone", "16 bits")))
    assert [cell.measure.head for cell in asked] == [
        "BoolQ", "ARC-C", "ARC-E", "HellaSwag", "PIQA", "WinoGrande", "CSQA average",
    ]  # fmt: skip
    assert [cell.measure.head for cell in cells_of(paper, MODEL, Scope(only=("PIQA", "alone", "16 bits")))] == ["PIQA"]


def test_the_arms_of_a_table_are_chosen_one_by_one() -> None:
    """`BOS` computes what `[B]` keeps; of the three only alone is asked as the page asked, without [BOS]."""
    paper = PAPERS["gptq-accuracy"]
    words = {}
    for arm in ("alone", "bos", "[B]"):
        (cell,) = cells_of(paper, MODEL, Scope(only=("MMLU", "RTN, 4 bits", arm)))
        words[arm] = " ".join(cell.runs[0].words)
    assert [("--vanilla" in w, "--prefix bos" in w, "--bos never" in w) for w in words.values()] == [
        (False, False, True), (True, True, False), (False, True, False),
    ]  # fmt: skip
    labels = {cell.runs[0].label for cell in cells_of(paper, MODEL, Scope(only=("MMLU", "RTN, 4 bits")))}
    assert len(labels) == 3


def test_a_named_recipe_stands_behind_the_arms_of_its_table() -> None:
    def arms(table: str, recipe: str) -> list[str]:
        return [row.arm.label for row in rows_of(PAPERS[table], Scope(recipes=(recipe,)))]

    assert arms("gptq-llama", "gptq-w3") == ["", "BOS", "[B]"]
    assert arms("gptq-llama", "fp16") == ["", "BOS"]
    assert arms("intactkv-1", "gptq-w3") == ["", "[B]"]


def test_words_of_a_refusal_are_quoted_as_a_shell_takes_them(run_main: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run_main(eval_main, "reproduce", "gptq-accuracy", "--dry-run", "--only", "no such row")
    assert (code, "--only 'no such row'" in err, "'csqa average'" in err) == (2, True, True)


def test_other_corpora_and_tasks_take_the_place_of_the_tables() -> None:
    heads = [m.head for m in measures_of(PAPER, MODEL, Scope(corpora=("ptb", "c4"), tasks=("piqa", "mmlu")))]
    assert heads == ["ptb", "C4", "PIQA", "MMLU"]
    assert [m.head for m in measures_of(PAPER, MODEL, Scope(tasks=("none",)))] == ["C4"]
    assert [m.item for m in measures_of(PAPER, MODEL, Scope(tasks=("csqa",)))][1:] == [
        "boolq", "arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande",
    ]  # fmt: skip


def test_an_arm_that_is_calibrated_behind_is_added_where_a_method_calibrates() -> None:
    arms = [(row.method.name, row.arm.label) for row in rows_of(PAPER, Scope(behind=True))]
    assert arms == [("FP16", ""), ("RTN", ""), ("RTN", "[B]"), ("GPTQ", ""), ("GPTQ", "[B]"), ("GPTQ", "behind [B]")]


def test_rows_of_named_recipes_know_whether_they_calibrate() -> None:
    rows = rows_of(PAPER, Scope(recipes=("fp16", "rtn-w8a8"), options=("--set", "activations.static=true")))
    assert [(row.label, row.arm.label, row.method.calibrates) for row in rows] == [
        ("fp16", "", False), ("rtn-w8a8", "", True), ("rtn-w8a8", "[B]", True),
    ]  # fmt: skip
    (plain, _) = rows_of(PAPER, Scope(recipes=("rtn-w8a8",)))
    assert not plain.method.calibrates
    with pytest.raises(UserError, match="rtn-w9"):
        rows_of(PAPER, Scope(recipes=("rtn-w9",)))


def test_a_setting_of_one_method_reaches_no_other() -> None:
    scope = Scope(options=("--set", "gptq:weights.damp=0.1", "--group-size", "32", "--set", "weights.x=a:b"))
    assert scope.options_of(GPTQ) == (
        "--set", "weights.damp=0.1", "--group-size", "32", "--set", "weights.x=a:b",
    )  # fmt: skip
    assert scope.options_of(RTN) == ("--group-size", "32", "--set", "weights.x=a:b")
    assert scope.options_of(Method("FP16")) == ()


def test_a_checkpoint_is_asked_for_once_without_what_matters_only_when_it_runs() -> None:
    scope = Scope(options=("--dtype", "float16", "--kernel=lut"), seeds=(1, 2))
    runs = runs_of(cells_of(PAPER, MODEL, scope))
    made = [run for run in runs if run.program == "quantization"]
    assert [run.words for run in made] == [
        ("--recipe", "rtn", "--bits", "4"),
        ("--recipe", "gptq", "--bits", "3", "--seed", "1"),
        ("--recipe", "gptq", "--bits", "3", "--seed", "2"),
    ]
    scored = [run for run in runs if run.program == "ppl" and run.needs]
    assert all("--dtype float16 --kernel=lut" in " ".join(run.words) for run in scored)
    assert len(scored) == 2 + 4


def test_a_prefix_is_trained_on_the_text_that_is_given(run_main: Main, tmp_path: Path) -> None:
    paper, small = PAPERS["prefixquant-trainable-c4"], Path("modelzoo/mine/tiny")

    def texts(**scope: Any) -> set[str]:
        runs = runs_of(cells_of(paper, small, Scope(**scope)))
        return {run.option("--corpus") for run in runs if run.program == "train-prefix"}

    assert texts() == {"c4"}
    assert texts(calibration=("--calibration-samples", "4")) == {"c4"}
    assert texts(calibration=("--calibration", "mine.txt", "--calibration-samples", "4")) == {"mine.txt"}
    assert texts(calibration=("--calibration", "mine.txt"), training=("--corpus", "other.txt")) == {"other.txt"}
    given = ("--model", str(tmp_path / "tiny"), "--tasks", "none", "--corpus", "nosuch.txt", "--dry-run")
    code, out, _ = run_main(eval_main, "reproduce", paper.name, *given, "--training", "--corpus other.txt")
    assert code == 0
    assert "text other.txt for calibration" in out


def test_the_questions_of_a_judged_table_reach_who_answers(run_main: Main, tmp_path: Path) -> None:
    given = ("reproduce", "intactkv-4", "--model", str(tmp_path / "tiny"), "--judge-model", "local:.", "--dry-run")
    code, out, _ = run_main(eval_main, *given)
    assert code == 0
    assert "MT-bench's questions: mt_bench is missing" in out
    assert "--questions sample|FILE" in out
    assert "conversations of sharegpt for training: missing; bash scripts/prepare/data.sh sharegpt, or others: " in out
    code, out, _ = run_main(eval_main, *given, "--questions", "sample", "--training", "--conversations sample")
    assert code == 0
    assert "questions sample" in out
    assert "MT-bench's questions" not in out
    assert "sharegpt" not in out


@pytest.mark.parametrize(
    ("table", "more", "program"),
    [("intactkv-4", ("--options", "--questions sample"), "quantization"),
     ("intactkv-4", ("--training", "--conversations mine.json"), "intactkv calibrate"),
     ("intactkv-4", ("--judge-options", "--nonsense 3"), "eval judge"),
     ("prefixquant-trainable-c4", ("--training", "--prefix-len x"), "intactkv train-prefix")],
)  # fmt: skip
def test_words_that_a_program_does_not_take_are_refused_before_anything_runs(
    run_main: Main, tmp_path: Path, table: str, more: Sequence[str], program: str
) -> None:
    given = ("--model", str(tmp_path / "tiny"), "--judge-model", "local:.", "--dry-run")
    code, out, err = run_main(eval_main, "reproduce", table, *given, *more)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert f"python -m {program} --help" in err


def test_no_word_of_a_user_is_taken_for_a_file_that_a_run_needs() -> None:
    scope = Scope(recipes=("rtn-w4",), prefixes=("{x}", "{0}"))
    calls = [Call((run,)).command() for run in runs_of(cells_of(PAPER, MODEL, scope)) if run.program == "ppl"]
    assert [command[command.index("--prefix") + 1] for command in calls] == ["{x}", "{0}"]
    made = Run("calibrate", MODEL, "", ())
    command = Call((Run("ppl", MODEL, "c4", ("--prefix", f"{PLACE}0"), (made,)),)).command()
    assert command[command.index("--prefix") + 1] == str(made.file)
    assert Run("ppl", MODEL, "c4", ("--recipe", "rtn")).key == "c1adeac851c592fc"  # as entries that are kept have it


# What is run ----------------------------------------------------------------------------------------------------------

# A program in place of ours: it does what its --recipe says.
PROGRAM = """
import json, pathlib, signal, sys, time
words = sys.argv[1:]
what = words[words.index("--recipe") + 1]
place = pathlib.Path({root!r})
log = (place / "log").open("a"); log.write(" ".join(words) + "\\n"); log.close()
if what == "waits" and not (place / "go").exists():
    try:
        print("waiting", file=sys.stderr, flush=True); time.sleep(60)
    except KeyboardInterrupt:
        (place / "ended").touch(); sys.exit(130)
if what.startswith("meets"):  # another one that runs at the same time
    (place / what).touch()
    for _ in range(600):
        if len(list(place.glob("meets*"))) == 2: break
        time.sleep(0.05)
    else: sys.exit("alone")
if what.startswith("alone"):
    (place / "inside").mkdir(); time.sleep(0.2); (place / "inside").rmdir()
if what == "wrong":
    print("error: it is wrong; mend it", file=sys.stderr); sys.exit(2)
if what == "breaks":
    raise KeyError("ours")
if what == "asks" and "bad" in words:
    print("error: bad is no corpus", file=sys.stderr); sys.exit(2)
items = [words[i + 1] for i, word in enumerate(words) if word == "--corpus"] or [""]
records = [dict(task="ppl", path=f"runs/ppl-{{what}}-{{item}}.json") for item in items]
if "quantization" in words:
    made = place / what; made.mkdir(exist_ok=True)
    records = [dict(directory=str(made))]
print("a library's line\\n[2026-11-27] [INFO] another\\n{{a third")
print(json.dumps(records[0] if len(records) == 1 else records))
"""


@pytest.fixture
def programs(intactkv_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root, with programs that only say what they were asked. Their records need no form here."""
    script = intactkv_root / "program.py"
    script.write_text(PROGRAM.format(root=str(intactkv_root)))
    command = Call.command
    monkeypatch.setattr(Call, "command", lambda self, device: [sys.executable, str(script), *command(self, device)[2:]])
    monkeypatch.setattr(ledger, "is_done", lambda run: entry_of(run) is not None)
    return intactkv_root


def asked(*recipes: str, program: str = "ppl", item: str = "x", needs: tuple[Run, ...] = ()) -> list[Run]:
    return [Run(program, Path("model"), item, ("--recipe", recipe), needs) for recipe in recipes]


def test_what_others_need_is_made_once_and_first_and_nothing_is_made_again(programs: Path) -> None:
    (made,) = asked("made", program="quantization", item="")
    runs = [made, *asked("a", "b", needs=(made,)), *asked("a", item="y", needs=(made,))]
    for again, expected in ((False, 3), (False, 0), (True, 3)):
        heard = Heard()
        outcome = execute(calls_of(runs), [Worker("cpu")] * 3, again=again, watcher=heard)
        assert (len(heard.calls), len(outcome.made)) == (expected, 4 if expected else 0)
        assert len(outcome.finished) == 4 - len(outcome.made)
        assert heard.calls[:1] == ["quantization"] * bool(expected)
    entry = entry_of(made)
    assert entry is not None
    assert (entry["made"], entry["program"]) == ("made", "quantization")
    (one,) = asked("a", item="y", needs=(made,))
    assert (entry_of(one) or {})["record"] == "ppl-a-y.json"


def test_a_run_that_fails_stops_only_what_needs_it_and_is_asked_again(programs: Path) -> None:
    wrong, broken = asked("wrong", "breaks", program="quantization", item="")
    (after,) = asked("after", needs=(wrong,))
    runs = [wrong, broken, after, *asked("fine")]
    for _ in range(2):
        heard = Heard()
        outcome = execute(calls_of(runs), [Worker("cpu")], watcher=heard)
        said = {failure.run.key: failure.said for failure in outcome.failed}
        assert said[wrong.key] == "it is wrong; mend it"
        assert said[broken.key].startswith("exit code 1: KeyError: 'ours' (all of it: ")
        assert "Traceback" in Path(said[broken.key].split("all of it: ")[1].rstrip(")")).read_text()
        assert [(failure.run, "wrong" in failure.said) for failure in outcome.left_out] == [(after, True)]
        assert len(heard.failures) == 3
    assert [run.words[1] for run in outcome.finished] == ["fine"]


def test_one_item_that_fails_leaves_the_others_of_its_call(programs: Path) -> None:
    runs = [run for item in ("good", "bad", "well") for run in asked("asks", item=item)]
    (call,) = calls_of(runs)
    outcome = execute([call], [Worker("cpu")], watcher=Heard())
    assert [run.item for run in outcome.made] == ["good", "well"]
    assert [(failure.run.item, failure.said) for failure in outcome.failed] == [("bad", "bad is no corpus")]


def test_workers_run_at_the_same_time_each_on_its_own_gpu(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5a")
    assert [worker.visible for worker in workers_of("auto")] == ["3", "GPU-5a"]
    assert [worker.visible for worker in workers_of("cuda", 3)] == ["3", "GPU-5a", "3"]
    assert [worker.visible for worker in workers_of("cuda:1")] == ["GPU-5a"]
    assert workers_of("cuda:all", max_memory=2**30) == [Worker("cuda:all", max_memory=2**30)]
    assert workers_of("cuda:1")[0].environment()["CUDA_VISIBLE_DEVICES"] == "GPU-5a"
    with pytest.raises(UserError, match="cuda:2: this machine shows 2 CUDA GPUs"):
        workers_of("cuda:2")
    with pytest.raises(UserError, match="leave --workers out"):
        workers_of("cuda:all", 2)
    outcome = execute(calls_of(asked("meets1", "meets2")), [Worker("cpu")] * 2, watcher=Heard())
    assert (len(outcome.made), outcome.failed) == (2, [])


def test_of_runs_that_make_the_same_thing_on_the_way_one_goes_ahead(programs: Path) -> None:
    """As KVQuant's levels, for perplexity and for tasks."""
    kvquant = replace(GPTQ, recipe="fp16", options=(), kv=("--kv", "kvquant", "--kv-bits", "2"), quantizes=False)
    paper = replace(PAPER, rows=(Row("KVQuant", kvquant), Row("KVQuant", kvquant, BOS), Row("RTN", RTN)))
    made = {run.program: run.on_the_way for run in runs_of(cells_of(paper, MODEL, Scope(only=("kvquant", "alone"))))}
    assert made["ppl"] == made["tasks"] != ""
    assert len({run.on_the_way for run in runs_of(cells_of(paper, MODEL))}) == 3  # two arms, and nothing
    runs = [replace(run, on_the_way="levels") for run in asked("alone1", "alone2", "alone3")]
    outcome = execute(calls_of(runs), [Worker("cpu")] * 3, watcher=Heard())
    assert (len(outcome.made), outcome.failed) == (3, [])


def test_on_a_cpu_there_is_one_worker_and_several_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert workers_of("auto") == [Worker("cpu")]
    assert "OMP_NUM_THREADS" not in workers_of("cpu")[0].environment()
    assert [worker.environment()["OMP_NUM_THREADS"] for worker in workers_of("cpu", 4)] == ["2"] * 4
    with pytest.raises(UserError, match="no CUDA GPUs"):
        workers_of("cuda")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_ends_every_process_cleanly_and_the_next_call_goes_on(programs: Path, number: int) -> None:
    (fine,) = asked("fine")
    (slow,) = asked("waits")
    heard = Heard()

    def interrupt() -> None:
        while not heard.calls or not (programs / "log").read_text().count("waits"):
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            execute(calls_of([fine, slow]), [Worker("cpu")] * 2, watcher=heard)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (programs / "ended").exists()
    assert [entry_of(run) is not None for run in (fine, slow)] == [True, False]
    (programs / "go").touch()
    outcome = execute(calls_of([fine, slow]), [Worker("cpu")], watcher=Heard())
    assert (outcome.finished, outcome.made) == ([fine], [slow])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends what a killed process has started")
def test_what_runs_ends_with_a_parent_that_is_killed(programs: Path) -> None:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1]); from eval.execution import _Process\n"
        "p = _Process([sys.executable, '-c', sys.argv[2]], dict(os.environ))\n"
        "print(p._process.stdout.readline().decode(), flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent, str(ROOT), child], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    number = int(process.stdout.readline())
    process.kill()
    process.wait()
    for _ in range(100):
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(number, signal.SIGKILL)
    pytest.fail("it lives on")


def test_programs_take_what_is_theirs() -> None:
    made, scored = Run("quantization", MODEL, "", ()), Run("ppl", MODEL, "c4", ())
    everywhere = Worker("cuda:all", max_memory=65 * 2**30)
    assert everywhere.command(Call((made,)), force=True)[-3:] == ["--device", "cuda", "--json"]
    assert everywhere.command(Call((scored,)), force=True)[-6:] == [
        "--device", "cuda:all", "--json", "--max-memory", "65GiB", "--force",
    ]  # fmt: skip
    trained = Run("calibrate", MODEL, "", ())
    assert "--json" not in everywhere.command(Call((trained,)))


# The program ----------------------------------------------------------------------------------------------------------


def refused(run_main: Main, *words: str) -> str:
    code, out, err = run_main(eval_main, "reproduce", *words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err


def test_what_cannot_be_is_one_line(
    run_main: Main, intactkv_root: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    mine = str(checkpoint())
    assert "no table is named" in refused(run_main)
    assert "unknown table intactv-1; the nearest is intactkv-1," in refused(run_main, "intactv-1")
    assert refused(run_main, "1") == refused(run_main, "intactkv-1")  # IntactKV's numbers, as `table` has them
    said = refused(run_main, "intactkv-1")
    assert "none of the models of intactkv-1 is in modelzoo/ (llama-7b" in said
    assert "--model DIR" in said
    said = refused(run_main, "intactkv-1", "--model", mine, "--device", "cpu")
    for words in ("c4 for evaluation", "--corpus NAME|FILE", "for calibration", "--calibration NAME|FILE"):
        assert words in said
    assert "no model in " in refused(run_main, "intactkv-1", "--model", str(tmp_path / "no"), "--corpus", mine)
    assert "--only kivi leaves nothing of intactkv-1" in refused(
        run_main, "intactkv-1", "--model", mine, "--only", "kivi"
    )
    assert "need a judge; add --judge-model" in refused(run_main, "intactkv-4", "--model", mine)
    assert "need a judge; add --judge-model" in refused(run_main, "intactkv-4")  # before it looks for models
    assert "or fetch one: bash scripts/prepare/model.sh llama 7b" in refused(run_main, "intactkv-1")
    assert "--judge-model" in refused(run_main, "intactkv-4", "--judge-options", "--retries 1")
    assert "add it" in refused(run_main, "intactkv-1", "--commands")
    assert "--prefix is of rows" in refused(run_main, "intactkv-1", "--prefix", "bos")
    for more, words in (
        ("options", "--limit=3"),
        ("training", "--prefix bos"),
        ("options", "--corpus=c4"),
        ("judge-options", "--force"),
    ):
        said = refused(run_main, "intactkv-1", f"--{more}={words}", "--judge-model", "x")
        assert f"--{more} {words.split()[0]} would replace" in said
    said = refused(run_main, "intactkv-1", "--model", mine, "--set", "kivi:weights.damp=0.1")
    assert "--set kivi:… is of no method or recipe of intactkv-1; known are" in said
    other = tmp_path / "other" / Path(mine).name
    assert "have one name" in refused(run_main, "intactkv-1", "--model", mine, "--model", str(other))
    assert "close every quote" in refused(run_main, "intactkv-1", "--options", "--set 'a")
    assert not outputs_dir().exists()


def test_every_table_is_listed_with_where_it_is_from(run_main: Main) -> None:
    code, out, _ = run_main(eval_main, "reproduce", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(PAPERS)
    assert all(paper.source in line for line, paper in zip(out.splitlines(), PAPERS.values(), strict=True))


@pytest.mark.usefixtures("intactkv_root")  # where nothing is finished
def test_a_dry_run_says_what_a_smaller_model_changes_and_every_command(run_main: Main, smollm2: Path) -> None:
    words = ("intactkv-1", "--model", str(smollm2), "--limit", "2", "--dry-run", "--commands")
    code, out, _ = run_main(eval_main, "reproduce", *words)
    assert code == 0
    assert "groups of 64" in out
    assert "calibration on 16 × 512 tokens of sample" in out
    assert "not as published: limit 2" in out
    commands = [line for line in out.splitlines() if line.startswith("python -m ")]
    scored = [line for line in commands if " eval ppl " in line]
    assert (len(commands), len(scored)) == (4 + 9, 9)
    assert all("--limit 2" in line for line in scored)


@pytest.mark.slow
def test_a_table_of_a_users_own_model_is_run_and_killed_and_goes_on(
    intactkv_root: Path, checkpoint: Callable[..., Path]
) -> None:
    model = intactkv_root / "modelzoo" / "mine"
    shutil.copytree(checkpoint(), model)
    text = intactkv_root / "text.txt"
    text.write_text(FOXES * 20)
    words = [sys.executable, "-m", "eval", "reproduce", "intactkv-1", "--model", str(model), "--corpus", str(text),
             "--calibration", str(text), "--calibration-samples", "2", "--calibration-length", "16", "--window", "32",
             "--limit", "2", "--options", "--group-size 32", "--only", "fp16", "gptq", "--device", "cpu"]  # fmt: skip
    environment = os.environ | {"INTACTKV_ROOT": str(intactkv_root)}
    first = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert first.stderr is not None
    for line in first.stderr:
        if "1 of 4" in line:
            break
    first.kill()
    first.communicate()
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 runs made, 1 finished before, 0 failed" in done.stderr
    ours, _, published = done.stdout.partition("as published of")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ours.splitlines() if "|" in line][2:]
    rows = [row for row in rows if "change" not in row[1]]
    assert [(row[0], row[1]) for row in rows] == [("FP16", "alone"), ("GPTQ", "alone"), ("GPTQ", "[B]")]
    assert "OmniQuant" in published
    assert all(float(row[-1]) > 1 for row in rows)
    assert len(list((intactkv_root / "outputs" / "runs").glob("*.json"))) == 3


def test_failures_of_one_reason_are_told_once_and_the_rest_is_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [Run("quantization", MODEL, "", ("--recipe", name)) for name in ("rtn", "gptq", "awq")]
    failed = [Failure(run, f"no room (all of it: {i}.log)") for i, run in enumerate(runs[:2])]
    behind = [Failure(Run("ppl", MODEL, item, (), (runs[0],)), "it needs `x`, which failed") for item in ("c4", "ptb")]
    _tell(Outcome([runs[2]], [], failed, behind), 3.0)
    assert capsys.readouterr().err.splitlines() == [
        "1 run made, 0 finished before, 2 failed, 2 left out, 3 s",
        "failed: quantization llama-2-7b recipe rtn and 1 more: no room (all of it: 0.log)",
        "left out: 2 runs that need what failed",
    ]
