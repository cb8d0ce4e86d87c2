"""The program `python -m eval mtbench`: its files and records, what a kill leaves, what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from chats import CONTEXT, QUESTIONS, TEMPLATE, turns_of, write_questions
from common import ROOT, free_ports, refusals

from corpora.json_lines import read_lines
from eval.__main__ import main
from eval.mtbench.answers import question_file
from eval.mtbench.json_lines import part_of, parts_of


@pytest.fixture
def model(intactkv_root: Path, tiny_checkpoint, tiny_tokenizer) -> Path:
    """A tiny checkpoint with a chat template in its own zoo."""
    directory = tiny_checkpoint(intactkv_root / "modelzoo", "llama", max_position_embeddings=CONTEXT)
    tiny_tokenizer(chat_template=TEMPLATE).save_pretrained(directory)
    return directory


@pytest.fixture
def questions(tmp_path) -> Path:
    return write_questions(tmp_path / "mine.jsonl")


@pytest.fixture
def program(run_main):
    """program(arguments…) -> (exit code, stdout, stderr) of `eval mtbench`, run in this process."""
    return partial(run_main, main, "mtbench")


def test_a_run_leaves_fastchats_lines_its_settings_and_a_record(program, model, questions, intactkv_root):
    common = ("--model", model, "--questions", questions, "--max-new-tokens", 8, "--answer-seed", 43)
    code, out, err = program(*common, "--recipe", "rtn", "--bits", 3, "--group-size", 32, "--prefix", "prompt",
                             "--kv-bits", 4)  # fmt: skip
    assert code == 0, err
    path = intactkv_root / "outputs/mt_bench/model_answer/tiny-llama-rtn-w3g32-kv4-intactkv-mine-seed_43.jsonl"
    assert str(path) in out
    lines = read_lines(path, "the answers")
    assert [line["question_id"] for line in lines] == [question.id for question in QUESTIONS]
    for line in lines:
        assert isinstance(line["answer_id"], str)
        assert line["model_id"] == path.stem
        assert isinstance(line["tstamp"], float)
        (choice,) = line["choices"]
        assert choice["index"] == 0
        assert [type(turn) for turn in choice["turns"]] == [str, str]
    assert len({line["answer_id"] for line in lines}) == len(lines)
    settings = json.loads(path.with_suffix(".run.json").read_text())
    assert (settings["seed"], settings["max_new_tokens"], settings["prefix"]["intact"]) == (43, 8, True)
    (record,) = (intactkv_root / "outputs/runs").glob("mtbench-*.json")
    record = json.loads(record.read_text())
    assert (record["samples"], record["answers"]) == (8, str(path))
    assert sum(record["stopped"].values()) == 16
    assert record["arm"] == "[P]"


def test_recipes_of_one_short_label_have_files_of_their_own(program, model, questions, intactkv_root):
    for convention in ("gptq-asym", "gptq-sym"):
        code, _, err = program("--model", model, "--questions", questions, "--max-new-tokens", 2, "--limit", 1,
                               "--recipe", "rtn-w3", "--group-size", 32, "--set",
                               f"weights.grid.convention={convention}")  # fmt: skip
        assert code == 0, err
    names = {path.name for path in (intactkv_root / "outputs/mt_bench/model_answer").glob("*.jsonl")}
    assert names == {f"tiny-llama-rtn-w3g32-{more}mine-seed_42.jsonl" for more in ("", "gptq-sym-")}


def test_full_precision_answers_alike_with_and_without_its_own_prefix(program, model, questions, intactkv_root):
    folder = intactkv_root / "outputs/mt_bench/model_answer"
    for prefix in ("none", "prompt", "bos"):
        code, _, err = program("--model", model, "--questions", questions, "--max-new-tokens", 8, "--prefix", prefix)
        assert code == 0, err
    names = [f"tiny-llama-full-{arm}mine-seed_42.jsonl" for arm in ("", "intactkv-", "intactkv-B-")]
    plain, intact, bos = (turns_of(folder / name) for name in names)
    assert plain == intact == bos
    # The vanilla arm of a prefix reads the same prompts as no prefix at all: it is the same run.
    code, out, err = program("--model", model, "--questions", questions, "--max-new-tokens", 8, "--prefix", "prompt",
                             "--vanilla", "--json")  # fmt: skip
    assert code == 0, err
    assert Path(json.loads(out)["answers"]).name == names[0]


def test_a_finished_run_is_read_back_and_more_questions_go_on_with_it(program, model, questions, intactkv_root):
    common = ("--model", model, "--questions", questions, "--max-new-tokens", 4, "--json")
    first = json.loads(program(*common, "--limit", 3)[1])
    assert (first["answered_now"], json.loads(program(*common, "--limit", 3)[1])) == (3, first)
    path = Path(first["answers"])
    before = path.read_text().splitlines()
    more = json.loads(program(*common, "--batch-size", 1)[1])
    assert (more["samples"], more["answered_now"]) == (8, 5)
    assert path.read_text().splitlines()[:3] == before
    path.unlink()
    assert json.loads(program(*common, "--batch-size", 1)[1])["answered_now"] == 8
    assert json.loads(program(*common, "--batch-size", 1, "--force")[1])["answered_now"] == 8
    assert len(read_lines(path, "the answers")) == 8


def test_answers_of_other_settings_are_never_mixed(program, model, questions, intactkv_root, tmp_path):
    common = ("--model", model, "--questions", questions, "--limit", 2)
    assert program(*common, "--max-new-tokens", 4)[0] == 0
    code, _, err = program(*common, "--max-new-tokens", 5)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "another max_new_tokens" in line
    assert "--force" in line
    assert program(*common, "--max-new-tokens", 5, "--out", tmp_path / "five.jsonl")[0] == 0
    assert program(*common, "--max-new-tokens", 5, "--force")[0] == 0
    # Other questions under the same name.
    write_questions(questions, QUESTIONS[::-1][:5])
    assert "another questions_sha256" in program(*common, "--max-new-tokens", 5)[2]


def test_a_prefix_that_no_dialogue_starts_with_is_put_in_front_on_request(program, model, questions, intactkv_root):
    """Full precision reads the same text in both arms; it is another text than without the prefix."""
    common = ("--model", model, "--questions", questions, "--max-new-tokens", 8, "--json")
    records = {}
    for arm, words in (("none", ()), ("vanilla", ("--prefix", "A fox.", "--prepend", "--vanilla")),
                       ("intactkv", ("--prefix", "A fox.", "--prepend"))):  # fmt: skip
        code, out, err = program(*common, *words)
        assert code == 0, err
        records[arm] = json.loads(out)
    answers = {arm: turns_of(Path(record["answers"])) for arm, record in records.items()}
    assert answers["vanilla"] == answers["intactkv"] != answers["none"]
    for arm in ("vanilla", "intactkv"):
        assert Path(records[arm]["answers"]).stem == f"tiny-llama-full-{arm}-T-mine-seed_42"
        assert records[arm]["settings"]["prepended"] is True
    # Where every dialogue starts with the prefix anyway it is the same run as without the option.
    first = json.loads(program(*common, "--prefix", "prompt")[1])
    assert json.loads(program(*common, "--prefix", "prompt", "--prepend")[1]) == first


BAD_INPUT = {
    "no questions of the publishers": (["--questions", "mt_bench"], "scripts/prepare/mtbench.sh"),
    "no such file": (["--questions", "none.jsonl"], "there is no such file"),
    "no question": (["--limit", "0"], "--limit: 0 is not allowed; give a whole number from 1"),
    "no tokens": (["--max-new-tokens", "0"], "--max-new-tokens: 0 is not allowed"),
    "not a file of lines": (["--out", "a.json"], "ends in .jsonl"),
    "a prefix that no dialogue starts with": (["--prefix", "A fox."], "does not start with the prefix's tokens"),
    "nothing to put in front": (["--prepend"], "--prepend puts a prefix in front, but none was named"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_a_mistake_is_one_line(case, program, model, questions, monkeypatch, tmp_path):
    arguments, named = BAD_INPUT[case]
    if "--questions" not in arguments:
        arguments = [*arguments, "--questions", questions]
    monkeypatch.setattr("eval.mtbench.answers.data_folder", lambda name: tmp_path / name)
    code, out, err = program("--model", model, *arguments)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert named in line
    assert "Traceback" not in err


def test_a_model_without_chat_template_is_refused_in_one_line(program, model, questions, tiny_tokenizer):
    tiny_tokenizer(chat_template=TEMPLATE).save_pretrained(model)
    (model / "chat_template.jinja").unlink()
    code, _, err = program("--model", model, "--questions", questions)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "tiny-llama has no chat template" in line
    assert (
        program("--model", model, "--questions", questions, "--template", "vicuna_v1.1", "--max-new-tokens", 2)[0] == 0
    )


# other processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["mtbench", "judge"])
def test_help_does_not_wait_for_torch(command):
    code = (f"import runpy, sys; sys.argv = ['eval', '{command}', '--help']\n"
            "try:\n    runpy.run_module('eval', run_name='__main__')\n"
            "except SystemExit:\n    pass\n"
            "assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys()")  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "examples:" in result.stdout


# The program, but what happens behind a number of answers of this process is the test's.
BEHIND_ANSWERS = """
import os, runpy, signal, time
from eval.mtbench.json_lines import LineFile
append = LineFile.append
def counted(self, row):
    append(self, row)
    if len(self.rows) == {count}: {then}
LineFile.append = counted
"""
RUNS = 'runpy.run_module("eval", run_name="__main__", alter_sys=True)\n'


def test_a_killed_run_goes_on_without_a_lost_or_doubled_answer(program, model, questions, intactkv_root, tmp_path):
    """SIGKILL after the second answer, and half a line more, as if the kill had met it while writing."""
    path = tmp_path / "killed.jsonl"
    call = ["--model", model, "--questions", questions, "--max-new-tokens", 100, "--batch-size", 1, "--device", "cpu"]
    code = BEHIND_ANSWERS.format(count=2, then="os.kill(os.getpid(), signal.SIGKILL)") + RUNS
    killed = subprocess.run(
        [str(word) for word in [sys.executable, "-c", code, "mtbench", *call, "--out", path]],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = path.read_text().splitlines()
    assert len(kept) == 2
    with path.open("a") as file:
        file.write('{"question_id": 88, "answer_id": "hal')
    code, out, err = program(*call, "--out", path, "--json")
    assert code == 0, err
    assert json.loads(out)["answered_now"] == 8 - len(kept)
    assert path.read_text().splitlines()[: len(kept)] == kept
    whole = tmp_path / "whole.jsonl"
    assert program(*call, "--out", whole)[0] == 0
    assert turns_of(path) == turns_of(whole)
    assert [line["question_id"] for line in read_lines(path, "it")] == [question.id for question in QUESTIONS]


TWO_PROCESSES = """\
import runpy
from functools import partial

import accelerate

accelerate.PartialState = partial(accelerate.PartialState, cpu=True)  # accelerate's own choice would be one GPU each
"""


def start_two(code: str, *arguments: object) -> list[subprocess.Popen[str]]:
    """Two processes of one evaluation, as a launcher starts them."""
    (port,) = free_ports(1)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
              "PYTHONPATH": str(ROOT)}  # fmt: skip
    return [
        subprocess.Popen([sys.executable, "-c", code, "mtbench", *map(str, arguments)], cwd=ROOT, text=True,
                         env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(2)
    ]  # fmt: skip


def test_processes_share_the_questions_and_a_kill_of_all_loses_nothing(model, questions, program, tmp_path):
    """SIGKILL to two processes that have answered something, half a line more; two others go on with it."""
    path = tmp_path / "shared.jsonl"
    call = ["--model", model, "--questions", questions, "--max-new-tokens", 100, "--batch-size", 1, "--device", "cpu"]
    waits = BEHIND_ANSWERS.format(count=1, then="time.sleep(900)")
    running = start_two(TWO_PROCESSES + waits + RUNS, *call, "--out", path)
    deadline = time.monotonic() + 600
    while sum(part.read_bytes().count(b"\n") for part in parts_of(path)) < 2:
        assert all(process.poll() is None for process in running)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in running:
        process.kill()
    for process in running:
        process.communicate()
    kept = [line for part in parts_of(path) for line in part.read_text().splitlines(keepends=True) if line[-1] == "\n"]
    assert len(kept) == 2
    with part_of(path, 1).open("a") as file:
        file.write('{"question_id": 88, "answer_id": "hal')
    running = start_two(TWO_PROCESSES + RUNS, *call, "--out", path, "--json")
    said = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert said[1][0] == ""
    record = json.loads(said[0][0])
    assert (record["samples"], record["answered_now"]) == (8, 8 - len(kept))
    lines = path.read_text().splitlines(keepends=True)
    assert set(kept) <= set(lines)
    assert [json.loads(line)["question_id"] for line in lines] == [question.id for question in QUESTIONS]
    assert parts_of(path) == []
    whole = tmp_path / "whole.jsonl"
    assert program(*call, "--out", whole)[0] == 0
    assert turns_of(path) == turns_of(whole)


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("eval/gen_mtbench_answer", ("smollm2", "135m", "rtn", "3"), "got 4 of 5"),
        ("eval/gen_mtbench_answer", ("no-such", "7b", "rtn", "3", "cpu"), "no-such-7b"),
        ("eval/gen_mtbench_answer", ("smollm2", "135m", "rtn", "3", "gpu"), "device 'gpu'"),
        ("eval/judge", ("gpt-4",), "got 1 of at least 2"),
        ("eval/judge", ("gpt-4", "no-such-file.jsonl"), "no-such-file.jsonl is missing"),
        ("prepare/mtbench", ("more",), "got 1 of 0"),
    ],
)
def test_a_mistake_in_a_script_is_one_line(script, arguments, named):
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("scripts/setup.sh has not made .venv")
    done = subprocess.run(["bash", f"scripts/{script}.sh", *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"INTACTKV_ROOT": str(ROOT)}, check=False)  # fmt: skip
    assert (done.returncode, len(refusals(done.stderr))) == (2, 1), done.stderr
    assert named in done.stderr


@pytest.mark.slow
def test_the_real_model_answers_the_sample_with_its_prompt_intact(smollm2, program, intactkv_root):
    common = ("--model", smollm2, "--limit", 2, "--max-new-tokens", 16, "--device", "cpu")
    for prefix in ("none", "prompt"):
        code, out, err = program(*common, "--prefix", prefix)
        assert code == 0, err
        assert "sample" in out.splitlines()[0]
    folder = intactkv_root / "outputs/mt_bench/model_answer"
    plain, intact = (turns_of(folder / f"smollm2-135m-full-{arm}sample-seed_42.jsonl") for arm in ("", "intactkv-"))
    assert plain == intact  # full precision with its own prefix is the same function
    assert all(len(turn) > 10 for turns in plain.values() for turn in turns)
    assert question_file("sample").is_file()
