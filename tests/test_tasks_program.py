"""The program `python -m eval tasks`, from the outside: what it records, prints, shares among processes and refuses."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT
from families import plain_logits

from eval.__main__ import main

# `accelerate launch` starts one process where there is no GPU.
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LETTERS = "ABCD"
PIQA = [{"goal": f"Open jar {i}", "sol1": f"Turn it {i} times", "sol2": "Wait" * (i % 3 + 1), "label": i % 2}
        for i in range(7)]  # fmt: skip
LAMBADA = [{"text": f"He saw dog {i} and {i} cats and called the dog"} for i in range(5)]
GSM8K = [{"question": f"{i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(3)]
UNANSWERED = {"sentence": "Ann met Eve because _ was late.", "option1": "Ann", "option2": "Eve", "answer": ""}
SUBJECTS = {"anatomy": 4, "astronomy": 2}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def questions(name: str, count: int) -> list[list[str]]:
    return [[f"{name} {i}?", f"{i}", f"{i + 1}", "both", "none of it", LETTERS[i % 4]] for i in range(count)]


@pytest.fixture
def data(intactkv_root: Path) -> Path:
    """Small local data of four tasks, in the authors' forms."""
    folder = intactkv_root / "datasets"
    write_lines(folder / "lambada_openai/data/lambada_test_en.jsonl", LAMBADA)
    write_lines(folder / "gsm8k/test.jsonl", GSM8K)
    import datasets

    (folder / "piqa/plain_text").mkdir(parents=True)
    datasets.Dataset.from_list(PIQA).to_parquet(folder / "piqa/plain_text/validation-00000-of-00001.parquet")
    for part in ("dev", "test"):
        (folder / "mmlu/data" / part).mkdir(parents=True)
        for name, count in SUBJECTS.items():
            with (folder / "mmlu/data" / part / f"{name}_{part}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(questions(f"{name} {part}", 5 if part == "dev" else count))
    return folder


@pytest.fixture
def model(intactkv_root: Path, tiny_checkpoint) -> Path:
    """A tiny dense checkpoint in its own zoo, with room for five examples and an answer."""
    return tiny_checkpoint(intactkv_root / "modelzoo", "llama", max_position_embeddings=2048)


@pytest.fixture
def program(run_main):
    """program(arguments…) -> (exit code, stdout, stderr) of `eval tasks`, run in this process."""

    def call(*arguments: object, command: str = "tasks") -> tuple[int, str, str]:
        return run_main(main, command, *arguments)

    return call


def records(folder: Path) -> list[Path]:
    return sorted((folder / "outputs" / "runs").glob("tasks-*.json"))


# what is recorded -----------------------------------------------------------------------------------------------------


def likelihood(model: Any, tokenizer: Any, lead: list[int], context: str, continuation: str) -> tuple[float, bool]:
    """log p(continuation | lead, context) from one pass of the plain model over all tokens."""
    front = [*lead, *tokenizer.encode(context, add_special_tokens=False)]
    tokens = tokenizer.encode(continuation, add_special_tokens=False)
    logits = plain_logits(model, torch.tensor([*front, *tokens]))[len(front) - 1 : -1].double()
    picked = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
    return float(picked.sum()), logits.argmax(-1).tolist() == tokens


@pytest.mark.parametrize("prefix", ["none", "bos", "A fox."])
def test_the_figures_are_those_of_the_plain_model_on_lead_and_text(
    program, model, data, intactkv_root, tiny_model, tiny_tokenizer, prefix
):
    """Full precision: the cached prefix and its text are the same function."""
    code, out, _ = program("--tasks", "piqa, lambada_openai", "--model", model, "--prefix", prefix, "--json")
    assert code == 0
    piqa, lambada = json.loads(out)
    plain, tokenizer = tiny_model("llama", max_position_embeddings=2048), tiny_tokenizer()
    lead = [1] if prefix in ("none", "bos") else [1, *tokenizer.encode(prefix, add_special_tokens=False)]
    assert piqa["settings"]["lead"] == lambada["settings"]["lead"] == lead

    normed = raw = 0
    for row in PIQA:
        context = f"Question: {row['goal']}\nAnswer:"
        options = [row["sol1"], row["sol2"]]
        scores = [likelihood(plain, tokenizer, lead, context, f" {option}")[0] for option in options]
        raw += scores.index(max(scores)) == row["label"]
        by_character = [score / len(option) for score, option in zip(scores, options, strict=True)]
        normed += by_character.index(max(by_character)) == row["label"]
    assert piqa["metrics"] == pytest.approx({"acc": raw / len(PIQA), "acc_norm": normed / len(PIQA)})

    answers = [likelihood(plain, tokenizer, lead, row["text"][:-4], " dog") for row in LAMBADA]
    assert lambada["metrics"]["perplexity"] == pytest.approx(
        math.exp(-sum(score for score, _ in answers) / len(answers)), rel=1e-4
    )
    assert lambada["metrics"]["acc"] == pytest.approx(sum(greedy for _, greedy in answers) / len(answers))


def test_a_record_holds_the_protocol_the_data_and_the_counts(program, model, data, intactkv_root, caplog):
    arguments = ("--tasks", "mmlu", "--model", model, "--recipe", "rtn", "--bits", 4, "--group-size", 32, "--prefix",
                 "bos", "--limit", 3, "--json")  # fmt: skip
    code, out, _ = program(*arguments)
    assert code == 0
    record = json.loads(out)
    settings = record["settings"]
    assert (settings["task_name"], settings["protocol"], settings["fewshot"]) == ("mmlu", "hendrycks", 5)
    assert (settings["data"], settings["limit"], settings["batch_size"], settings["lead"]) == ("local", 3, 8, [1])
    assert (settings["weights"], settings["prefix"]["intact"]) == ("rtn-w4g32", True)
    assert record["samples"] == 3 + 2
    assert {name: part["total"] for name, part in record["subjects"].items()} == {"anatomy": 3, "astronomy": 2}
    correct = sum(part["correct"] for part in record["subjects"].values())
    assert record["metrics"] == {"acc": pytest.approx(correct / 5)}
    assert record["rows"] == {"rows": 5, "behind_prefix": 5, "truncated": 0}
    assert record["prompts"] == {"fewer_examples": 0, "cut": 0}
    assert "55 of its subjects are not here" in caplog.text  # the score of two subjects is not MMLU's
    assert [str(path) for path in records(intactkv_root)] == [record["path"]]


def test_a_finished_run_is_read_back_until_force_or_other_data(program, model, data, intactkv_root):
    arguments = ("--tasks", "piqa", "--model", model, "--limit", 2, "--json")
    first = json.loads(program(*arguments)[1])
    (path,) = records(intactkv_root)
    written = path.stat().st_mtime_ns
    assert json.loads(program(*arguments)[1]) == first
    assert path.stat().st_mtime_ns == written
    again = json.loads(program(*arguments, "--force")[1])
    assert path.stat().st_mtime_ns > written
    assert (again["metrics"], again["identity"]) == (first["metrics"], first["identity"])
    # Other questions, or other ways to ask them, are other runs.
    for more in (("--limit", 3), ("--bos", "tokenizer", "--batch-size", 1)):
        assert json.loads(program(*arguments, *more)[1])["identity"] != first["identity"]
    import datasets

    file = data / "piqa/plain_text/validation-00000-of-00001.parquet"
    datasets.Dataset.from_list(PIQA[::-1]).to_parquet(file)
    other = json.loads(program(*arguments)[1])
    assert other["settings"]["data_sha256"] != first["settings"]["data_sha256"]
    assert len(records(intactkv_root)) == 4
    # Another tokenizer beside the same weights reads other tokens.
    words = json.loads((model / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(words))
    assert json.loads(program(*arguments)[1])["identity"] not in {first["identity"], other["identity"]}


def test_vanilla_and_intact_read_the_same_tokens_and_stand_in_one_table(program, model, data, intactkv_root):
    common = ("--tasks", "piqa", "--model", model, "--recipe", "rtn-w3", "--group-size", 32)
    plain, intact = (json.loads(program(*common, "--prefix", p, "--json")[1]) for p in ("none", "bos"))
    assert plain["settings"]["lead"] == intact["settings"]["lead"] == [1]
    assert (plain["rows"]["behind_prefix"], intact["rows"]["behind_prefix"]) == (0, intact["rows"]["rows"])
    text = ("--prefix", "A fox.", "--json")
    intact, vanilla = json.loads(program(*common, *text)[1]), json.loads(program(*common, *text, "--vanilla")[1])
    assert intact["settings"]["lead"] == vanilla["settings"]["lead"] != [1]
    assert (intact["settings"]["prefix"]["intact"], vanilla["settings"]["prefix"]["intact"]) == (True, False)
    assert len(list((intactkv_root / "modelzoo/quantized/tiny-llama").glob("rtn*"))) == 1
    code, out, _ = program("tasks", "--format", "csv", command="table")
    assert code == 0
    rows = {(row["prefix"], row["arm"]): row for row in csv.DictReader(out.splitlines())}
    for arm, prefix in (("vanilla", "none"), ("IntactKV", "bos")):
        record = json.loads(program(*common, "--prefix", prefix, "--json")[1])
        for metric, value in record["metrics"].items():
            assert float(rows["[B]", arm][f"piqa {metric}"]) == pytest.approx(100 * value, abs=0.01)


@pytest.mark.parametrize("bos", ["always", "tokenizer", "never"])
@pytest.mark.parametrize("adds", [True, False])
def test_bos_is_there_always_or_never_or_as_the_tokenizer_has_it(program, model, data, tiny_tokenizer, adds, bos):
    if not adds:
        without_template(tiny_tokenizer()).save_pretrained(model)
    record = json.loads(program("--tasks", "piqa", "--model", model, "--bos", bos, "--limit", 1, "--json")[1])
    assert record["settings"]["lead"] == ([1] if bos == "always" or (adds and bos != "never") else [])


def test_the_sample_is_called_so_and_mmlu_has_both_protocols(program, model, intactkv_root):
    common = ("--tasks", "mmlu", "--data", "sample", "--model", model, "--limit", 1, "--json")
    ours, theirs = (json.loads(program(*common, "--protocol", name)[1]) for name in ("hendrycks", "lm-eval"))
    for record in (ours, theirs):
        assert record["samples"] == 6
        assert (record["settings"]["data"], record["settings"]["fewshot"]) == ("sample", 5)
    assert theirs["settings"]["protocol"] == "lm-eval"
    assert set(theirs["members"]) == {f"mmlu_{name}" for name in ours["subjects"]}
    assert theirs["metrics"]["acc"] == pytest.approx(sum(m["acc"] for m in theirs["members"].values()) / 6)
    assert "sample" in program(*common[:-1])[1].splitlines()[0]


def test_a_generated_answer_is_scored(program, model, data, intactkv_root):
    record = json.loads(program("--tasks", "gsm8k", "--fewshot", 0, "--limit", 1, "--model", model, "--prefix", "bos",
                                "--json")[1])  # fmt: skip
    assert set(record["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert record["rows"] == {"rows": 1, "behind_prefix": 1, "truncated": 0}


def test_members_of_a_group_are_weighted_by_their_questions(program, model, data, intactkv_root):
    """Three easy questions and one hard one, of which the model gets what it gets: not the mean of two accuracies."""
    choices = {"text": ["a", "bb", "ccc"], "label": ["A", "B", "C"]}
    for part, name, count in (("Easy", "ARC-Easy", 3), ("Challenge", "ARC-Challenge", 1)):
        rows = [{"id": f"{part} {i}", "question": {"stem": f"{part} {i}?", "choices": [
            {"text": text, "label": label} for text, label in zip(choices["text"], choices["label"], strict=True)
        ]}, "answerKey": "ABC"[i]} for i in range(count)]  # fmt: skip
        write_lines(data / "ai2_arc" / name / f"{name}-Test.jsonl", rows)
    both, easy, hard = json.loads(program("--tasks", "ai2_arc,arc_easy,arc_challenge", "--model", model, "--json")[1])
    assert (both["samples"], easy["samples"], hard["samples"]) == (4, 3, 1)
    for metric in ("acc", "acc_norm"):
        expected = (3 * easy["metrics"][metric] + hard["metrics"][metric]) / 4
        assert both["metrics"][metric] == pytest.approx(expected)
        assert both["members"]["arc_easy"][metric] == easy["metrics"][metric]
    assert 0 < easy["metrics"]["acc"] < 1  # the three have different right answers


# what is refused ------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "unknown task": (["--tasks", "helaswag"], "no task 'helaswag'; the nearest names are hellaswag"),
    "no task": (["--tasks", " ,"], "--tasks is empty"),
    "missing data": (["--tasks", "hellaswag"], "datasets/hellaswag is missing; run 'bash scripts/prepare/data.sh"),
    "missing data behind a task that could run": (["--tasks", "piqa,boolq"], "datasets/super_glue is missing"),
    "missing sample": (["--tasks", "piqa", "--data", "sample"], "scripts/prepare/data.sh sample-tasks"),
    "no sample of it": (["--tasks", "truthfulqa", "--data", "sample"], "no sample is made of truthfulqa_gen"),
    "a subject without sample": (["--tasks", "mmlu_virology", "--data", "sample"], "no questions of this subject"),
    "the hub while offline": (["--tasks", "piqa", "--data", "hub"], "HF_HUB_OFFLINE is set"),
    "the hub for MMLU": (["--tasks", "mmlu", "--data", "hub"], "--protocol lm-eval"),
    "more examples than MMLU has": (["--tasks", "mmlu", "--fewshot", "6"], "has only 5 examples to show"),
    "more examples than lm-eval's MMLU has": (
        ["--tasks", "mmlu", "--data", "sample", "--protocol", "lm-eval", "--fewshot", "6"],
        "--fewshot 6 is more than the 5 examples",
    ),
    "examples without their split": (["--tasks", "piqa", "--fewshot", "1"], "no train split"),
    "no examples at all": (["--tasks", "piqa", "--fewshot", "-1"], "--fewshot: -1 is not allowed"),
    "no questions": (["--tasks", "piqa", "--limit", "0"], "--limit: 0 is not allowed; give a whole number from 1"),
    "no batch": (["--tasks", "piqa", "--batch-size", "0"], "--batch-size: 0 is"),
    "the tokenizer's BOS behind a prefix": (["--tasks", "piqa", "--bos", "tokenizer", "--prefix", "bos"],
                                            "--bos tokenizer is for runs without a prefix"),
    "no BOS behind a prefix": (["--tasks", "piqa", "--bos", "never", "--prefix", "bos"],
                               "--bos never is for runs without a prefix"),
    "a protocol that no task has": (["--tasks", "piqa,lambada_openai", "--protocol", "hendrycks"],
                                    "--protocol hendrycks is one of mmlu, but --tasks are piqa, lambada_openai"),
    "a single subject has lm-eval's protocol": (["--tasks", "mmlu_anatomy", "--protocol", "hendrycks"],
                                                "--protocol hendrycks is one of mmlu"),
    "unanswered questions": (["--tasks", "winogrande"], "winogrande/dev.jsonl: row 1 is of no form"),
    "unknown protocol": (["--tasks", "mmlu", "--protocol", "mine"], "--help"),
    "no name": ([], "--tasks"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_line_and_exit_code_2(case, program, model, data, intactkv_root, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_lines(data / "winogrande/dev.jsonl", [UNANSWERED])
    arguments, named = BAD_INPUT[case]
    code, out, err = program(*arguments, "--model", model)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert named in line
    assert "Traceback" not in err
    assert records(intactkv_root) == []


def without_template(tokenizer: Any) -> Any:
    """A tokenizer that adds no token by itself."""
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer


@pytest.mark.parametrize("bos", ["always", "tokenizer", "never"])
def test_a_tokenizer_without_bos_and_eos_is_refused(program, model, data, tiny_tokenizer, bos):
    without_template(tiny_tokenizer(bos_token=None, eos_token=None)).save_pretrained(model)
    code, _, err = program("--tasks", "piqa", "--model", model, "--bos", bos)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "neither a BOS nor an EOS token" in line


@pytest.mark.parametrize(("missing", "lead"), [("eos_token", 1), ("bos_token", 2), ("pad_token", 1)])
def test_one_of_bos_and_eos_is_enough_and_only_generation_needs_eos(
    program, model, data, tiny_tokenizer, missing, lead
):
    without_template(tiny_tokenizer(**{missing: None})).save_pretrained(model)
    common = ("--fewshot", 0, "--limit", 2, "--model", model, "--json")
    code, out, err = program("--tasks", "piqa,lambada_openai,mmlu", *common)
    assert code == 0, err
    assert [record["settings"]["lead"] for record in json.loads(out)] == [[lead]] * 3
    code, _, err = program("--tasks", "gsm8k", *common)
    if missing == "eos_token":
        assert code == 2
        assert "has no EOS token to end one" in err
    else:
        assert code == 0, err


# other processes ------------------------------------------------------------------------------------------------------


def run(command: list[object]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)  # fmt: skip


def test_help_does_not_wait_for_torch():
    code = ("import runpy, sys; sys.argv = ['eval', 'tasks', '--help']\n"
            "try:\n    runpy.run_module('eval', run_name='__main__')\n"
            "except SystemExit:\n    pass\n"
            "assert not {'torch', 'transformers', 'lm_eval', 'datasets'} & sys.modules.keys()")  # fmt: skip
    result = run([sys.executable, "-c", code])
    assert result.returncode == 0, result.stderr
    assert "--tasks NAME" in result.stdout


def test_two_processes_share_the_questions_and_agree_with_one(model, data, intactkv_root):
    """5 questions of MMLU, 3 of the others: one process has one more than the other."""
    call = ["tasks", "--tasks", "mmlu,piqa,lambada_openai,gsm8k", "--model", model, "--limit", 3, "--batch-size", 2,
            "--fewshot", 0, "--recipe", "rtn-w4", "--group-size", 32, "--prefix", "bos", "--device", "cpu", "--json",
            "--force"]  # fmt: skip
    one = run([sys.executable, "-m", "eval", *call])
    assert one.returncode == 0, one.stderr
    two = run([*TWO_PROCESSES, "-m", "eval", *call])
    assert two.returncode == 0, two.stderr
    alone, shared = json.loads(one.stdout), json.loads(two.stdout)  # no JSON if both processes printed
    assert [record["samples"] for record in alone] == [5, 3, 3, 3]
    for first, second in zip(alone, shared, strict=True):
        assert second["identity"] == first["identity"]
        assert second["samples"] == first["samples"]
        assert second["metrics"] == pytest.approx(first["metrics"], rel=1e-5)
        assert second.get("subjects") == first.get("subjects")
        assert second["rows"]["behind_prefix"] == second["rows"]["rows"]
    assert shared[0]["rows"] == alone[0]["rows"] == {"rows": 5, "behind_prefix": 5, "truncated": 0}
    assert len(records(intactkv_root)) == 4
