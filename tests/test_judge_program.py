"""The program `python -m eval judge` against a real HTTP server: what it asks, keeps, prints and refuses."""

import csv
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT, error_line
from endpoint import Answer, Endpoint, error, grade, serving
from families import plain_logits

from corpora.errors import UserError
from corpora.json_lines import read_lines
from eval.__main__ import main
from eval.mtbench.answers import question_file, read_questions
from eval.mtbench.judge_client import local_judge
from eval.mtbench.verdicts import rating
from quantization.runs.opening import load_tokenizer


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    with serving(monkeypatch) as server:
        yield server


@pytest.fixture
def answers(intactkv_root: Path) -> Callable[..., Path]:
    """answers(name, limit) -> a file of answers to the sample's first questions."""

    def write(name: str = "m-seed_42", limit: int = 16) -> Path:
        path = intactkv_root / f"{name}.jsonl"
        rows = [
            {"question_id": q.id, "answer_id": "x", "model_id": name, "tstamp": 1.0,
             "choices": [{"index": 0, "turns": [f"{name} says {q.id}", "and more"]}]}
            for q in read_questions(question_file("sample"))[:limit]
        ]  # fmt: skip
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def program(monkeypatch, run_main, endpoint):
    """program(arguments…) -> (exit code, stdout, stderr) of `eval judge` against the endpoint, run in this process."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    common = ("--judge-model", "org/judge-1", "--base-url", endpoint.url, "--retries", 1, "--timeout", 60)
    return partial(run_main, main, "judge", *common)


def test_all_judgements_are_made_once_and_the_table_has_them(program, endpoint, answers, intactkv_root):
    second = threading.Event()

    def judge(n: int, body: dict[str, Any]) -> Answer:
        if n == 1:
            second.set()
        second.wait(60)  # so the first one is under way when the second one comes
        return grade("[[9]]" if "says 9007" in body["messages"][1]["content"] else "[[6]]")

    endpoint.answer = judge
    files = [answers("m-seed_42"), answers("m-seed_43")]
    call = ("--answers", *files, "--concurrency", 3, "--price-in", 10, "--price-out", 30)
    code, out, err = program(*call)
    assert code == 0, err
    assert len(endpoint.requests) == 2 * 2 * 16
    assert 2 <= endpoint.most_at_once <= 3
    assert "64000 prompt tokens, 6400 of the judgements: 0.8320 USD" in out
    assert "not an MT-bench score" in out
    row = next(line for line in out.splitlines() if line.startswith("| m "))  # both seeds in one row
    assert "6.19 ± 0.00 (2)" in row
    assert "7.50 ± 0.00 (2)" in row  # math
    path = intactkv_root / "outputs/mt_bench/model_judgment/org-judge-1_single.jsonl"
    assert len(read_lines(path, "it")) == 64
    (record,) = (intactkv_root / "outputs/runs").glob("judge-*.json")
    record = json.loads(record.read_text())
    assert record["models"]["m-seed_42"]["categories"]["math"] == 7.5
    assert record["settings"]["references"] == "own"
    assert program(*call)[0] == 0
    assert len(endpoint.requests) == 64
    assert program("--answers", answers("other", 2))[0] == 0  # a third model joins the same file
    assert len(read_lines(path, "it")) == 68


def test_failures_and_refusals_are_unscored_and_only_failures_are_asked_again(
    program, endpoint, answers, intactkv_root
):
    endpoint.answer = lambda n, body: (
        error(500) if "9002" in body["messages"][1]["content"]
        else grade(None, refusal="no") if "9003" in body["messages"][1]["content"] else grade()
    )  # fmt: skip
    code, out, err = program("--answers", answers(limit=4))
    assert code == 2
    assert "2 of 8 judgements are unscored because the judge gave no usable answer (HTTP 500" in error_line(err)
    assert "7.00" in out
    assert list((intactkv_root / "outputs/runs").glob("judge-*.json")) == []
    path = intactkv_root / "outputs/mt_bench/model_judgment/org-judge-1_single.jsonl"
    outcomes = [(line["question_id"], line["outcome"], line["score"]) for line in read_lines(path, "it")]
    assert [row for row in outcomes if row[2] == -1] == [
        (number, outcome, -1) for number, outcome in ((9002, "failed"), (9003, "refused")) for _ in range(2)
    ]
    endpoint.answer = lambda n, body: grade("[[3]]")
    before = len(endpoint.requests)
    code, _, err = program("--answers", answers(limit=4))
    assert code == 0, err
    assert len(endpoint.requests) - before == 2
    assert [line["score"] for line in read_lines(path, "it")] == [7, 7, 3, 3, -1, -1, 7, 7]


def test_a_judge_that_is_down_leaves_what_it_tried_and_the_rest_for_later(program, endpoint, answers, intactkv_root):
    endpoint.answer = lambda n, body: error(503)
    code, out, err = program("--answers", answers(), "--concurrency", 2, "--retries", 0)
    assert code == 2
    assert "32 of 32 judgements are unscored" in error_line(err)
    assert "n/a" in out
    assert len(endpoint.requests) <= 8 + 2
    endpoint.answer = lambda n, body: grade()
    code, _, err = program("--answers", answers())
    assert code == 0, err
    path = intactkv_root / "outputs/mt_bench/model_judgment/org-judge-1_single.jsonl"
    assert [line["score"] for line in read_lines(path, "it")] == [7.0] * 32


def test_a_killed_judge_goes_on(program, endpoint, answers, intactkv_root):
    ended = threading.Event()

    def hangs(n: int, body: dict[str, Any]) -> Answer:
        if n >= 3:
            ended.wait(600)
        return grade()

    endpoint.answer = hangs
    path = intactkv_root / "outputs/mt_bench/model_judgment/judge-1_single.jsonl"
    call = [sys.executable, "-m", "eval", "judge", "--judge-model", "judge-1", "--base-url", endpoint.url, "--answers",
            str(answers()), "--concurrency", "1", "--timeout", "900"]  # fmt: skip
    process = subprocess.Popen(call, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "k"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 600
    while len(endpoint.requests) < 4 or path.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    with path.open("a") as file:
        file.write('{"question_id": 9010, "mod')
    kept = path.read_bytes().count(b"\n")
    ended.set()
    endpoint.answer = lambda n, body: grade()
    code, _, err = program("--answers", answers(), "--judge-model", "judge-1")
    assert code == 0, err
    assert (kept, len(endpoint.requests)) == (3, 4 + 32 - 3)
    keys = [(line["question_id"], line["turn"]) for line in read_lines(path, "it")]
    assert keys == sorted(set(keys))
    assert len(keys) == 32


def test_a_comparison_counts_consistent_wins(program, endpoint, answers, intactkv_root):
    """The judge prefers `m`, except that it takes the first place where question 9001 is asked."""

    def judge(n: int, body: dict[str, Any]) -> Answer:
        text = body["messages"][1]["content"]
        if "says 9001" in text:
            return grade("[[A]]")
        return grade("[[A]]" if text.index("m says") < text.index("base says") else "[[B]]")

    endpoint.answer = judge
    code, out, err = program("--answers", answers("m"), "--baseline", answers("base"))
    assert code == 0, err
    assert len(endpoint.requests) == 4 * 16
    row = [cell.strip() for cell in next(line for line in out.splitlines() if "| all" in line).split("|")]
    assert row[1:8] == ["m", "all", "30", "2", "0", "0", "96.9%"]
    lines = read_lines(intactkv_root / "outputs/mt_bench/model_judgment/org-judge-1_pair.jsonl", "it")
    assert len(lines) == 32


def test_a_radar_chart_shows_the_categories(program, endpoint, answers, tmp_path):
    code, _, err = program("--answers", answers("m-seed_42"), answers("n"), "--plot", tmp_path / "radar.png")
    assert code == 0, err
    assert (tmp_path / "radar.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "radar.csv").open()))
    assert {row["model"] for row in rows} == {"m", "n"}
    assert len(rows) == 16
    assert {row["score"] for row in rows} == {"7.0"}


def test_fewer_than_three_categories_are_no_chart_and_nothing_is_judged_for_it(program, endpoint, answers, tmp_path):
    code, out, err = program("--answers", answers(limit=4), "--plot", tmp_path / "radar.png")
    assert (code, out) == (2, "")
    assert "a radar chart needs at least 3 categories, these scores have 2" in error_line(err)
    assert endpoint.requests == []


def test_a_judge_that_says_nothing_is_told_apart(program, endpoint, answers, intactkv_root):
    said = {"9001": grade(""), "9002": grade("<think>[[5]]"), "9003": grade("A good answer.")}
    endpoint.answer = lambda n, body: next(
        (answer for number, answer in said.items() if number in body["messages"][1]["content"]), grade("[[6]]")
    )
    code, out, err = program("--answers", answers(limit=4), "--json")
    assert code == 0, err
    record = json.loads(out)
    (found,) = record["models"].values()
    assert found["unscored"] == {"no rating": 2, "empty": 4, "refused": 0, "failed": 0}
    assert (record["empty"], found["score"]) == (4, 6)
    assert "4 judgements are empty: the judge returned no text, or reasoning alone" in program(
        "--answers", answers(limit=4)
    )[1]  # fmt: skip


BAD_CALLS: dict[str, tuple[list[object], str]] = {
    "one price": (["--price-in", 1], "--price-in and --price-out belong together"),
    "no calls at once": (["--concurrency", 0], "--concurrency: 0 is not allowed"),
    "a chart of comparisons": (["--plot", "a.png", "--baseline", "b.jsonl"], "shows grades, not comparisons"),
    "an unknown ending": (["--plot", "a.gif"], "ends in .png"),
    "no baseline": (["--baseline", "none.jsonl"], "none.jsonl is missing"),
    "other questions": (["--questions", "mt_bench"], "scripts/prepare/mtbench.sh"),
    "no prompts": (["--prompts", "none.jsonl"], "the file of judge prompts none.jsonl is missing"),
    "another variable": (["--key-variable", "NO_SUCH_KEY"], "set $NO_SUCH_KEY"),
    "no local judge": (["--judge-model", "local:nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_mistake_is_one_line(case, program, answers, endpoint, monkeypatch, tmp_path):
    arguments, named = BAD_CALLS[case]
    given = answers()
    if case == "other questions":
        monkeypatch.setattr("eval.mtbench.answers.data_folder", lambda name: tmp_path / name)
    code, out, err = program("--answers", given, *arguments)
    assert (code, out) == (2, "")
    assert named in error_line(err)
    assert endpoint.requests == []


def test_no_key_is_one_line(program, answers, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    code, _, err = program("--answers", answers())
    assert code == 2
    assert "the key of the judge is missing: set $OPENAI_API_KEY" in error_line(err)


def test_a_wrong_key_stops_the_program_at_once(program, endpoint, answers):
    endpoint.answer = lambda n, body: error(401, "wrong key")
    code, _, err = program("--answers", answers(), "--concurrency", 2)
    assert code == 2
    assert "refuses every call (HTTP 401: wrong key)" in error_line(err)
    assert len(endpoint.requests) <= 6


def test_answers_to_unknown_questions_and_two_files_of_one_name_are_refused(program, answers, tmp_path):
    path = answers()
    path.write_text(path.read_text().replace("9001", "77"))
    assert "which are in none of the sets here" in error_line(program("--answers", path)[2])
    assert "answers question 77" in error_line(program("--answers", path, "--questions", "sample")[2])
    (tmp_path / "two").mkdir()
    other = tmp_path / "two" / path.name
    other.write_text(path.read_text())
    assert "two files of answers are called 'm-seed_42'" in error_line(program("--answers", path, other)[2])


@pytest.fixture
def local(intactkv_root, tiny_checkpoint, tiny_tokenizer) -> Path:
    """A tiny checkpoint that judges: what it says by itself is noise."""
    directory = tiny_checkpoint(intactkv_root / "modelzoo", "llama", max_position_embeddings=3000)
    tiny_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}").save_pretrained(directory)
    return directory


def test_a_local_judge_shows_the_flow_and_decides(run_main, answers, intactkv_root, local):
    program = partial(run_main, main, "judge")
    call = ("--answers", answers(limit=6), "--judge-model", f"local:{local}", "--max-tokens")
    code, out, err = program(*call, 8)
    assert code == 0, err
    assert "a local judge shows the flow" in out
    path = intactkv_root / "outputs/mt_bench/model_judgment/local-tiny-llama_single.jsonl"
    lines = read_lines(path, "it")
    assert len(lines) == 12
    assert {line["outcome"] for line in lines} == {"scored"}
    assert all(1 <= line["score"] <= 10 and line["usage"]["completion_tokens"] > 0 for line in lines)
    before = path.read_bytes()
    assert program(*call, 8)[0] == 0
    assert path.read_bytes() == before
    assert program(*call, 9)[0] == 0  # another length, so other judgements
    assert all(line["max_tokens"] == 9 for line in read_lines(path, "it"))
    code, _, err = program(*call, 8, "--baseline", answers("b", limit=6))
    assert code == 0, err
    pairs = read_lines(path.with_name("local-tiny-llama_pair.jsonl"), "it")
    assert {line["outcome"] for line in pairs} == {"scored"}


def test_a_local_judges_unfinished_reasoning_is_closed_before_it_decides(local, tiny_tokenizer):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}\n<think>\n"
    tiny_tokenizer(chat_template=template).save_pretrained(local)
    endings = [f"Rating: [[{grade}]]" for grade in range(1, 11)]
    judge = local_judge(local, torch.device("cpu"), 6, endings, lambda text: rating(text) > 0)
    reply = judge("be fair", "[[5]]")
    opening, _, end = reply.text.rpartition("</think>\n\n")
    assert opening.startswith("<think>")
    assert end in endings
    assert rating(reply.text) == float(end[10:-2])


def test_another_prompt_of_a_local_judge_is_another_protocol(run_main, answers, local, tiny_tokenizer, intactkv_root):
    program = partial(run_main, main, "judge")
    call = ("--answers", answers(limit=2), "--judge-model", f"local:{local}", "--max-tokens", 4)
    path = intactkv_root / "outputs/mt_bench/model_judgment/local-tiny-llama_single.jsonl"
    told = []
    for template in ("{{ messages[0].content }}", "Judge! {{ messages[0].content }}"):
        tiny_tokenizer(chat_template=template).save_pretrained(local)
        code, _, err = program(*call)
        assert code == 0, err
        told.append({(line["judge_prompting"], line["tstamp"]) for line in read_lines(path, "it")})
    assert len(told[0]) == len(told[1]) == 4
    assert not told[0] & told[1]


def test_a_local_judge_without_a_rating_of_its_own_gives_the_most_likely_one(local, tiny_model):
    """Beside a loop over plain forward passes: its own greedy text, then the digits that have the largest logits."""
    model = tiny_model("llama", max_position_embeddings=3000)
    tokenizer = load_tokenizer(local)
    endings = [f"Rating: [[{grade}]]" for grade in (*range(1, 10), 10, 42)]
    user = "a question"

    def greedy(ids: list[int], among: Iterable[int] | None = None) -> int:
        logits = plain_logits(model, torch.tensor(ids))[-1]
        return int(logits.argmax()) if among is None else max(among, key=lambda token: float(logits[token]))

    ids = [tokenizer.bos_token_id, *tokenizer.encode(f"be fair\n\n{user}", add_special_tokens=False)]
    own: list[int] = []
    while len(own) < 6 and tokenizer.eos_token_id not in own:
        own.append(greedy(ids + own))
    own = [token for token in own if token != tokenizer.eos_token_id]
    spelled = {ending: tokenizer.encode(f"\n\n{ending}", add_special_tokens=False) for ending in endings}
    said: list[int] = []
    while said not in spelled.values():
        fitting = {tokens[len(said)] for tokens in spelled.values() if tokens[: len(said)] == said}
        said.append(greedy(ids + own + said, fitting))
    expected = next(ending for ending, tokens in spelled.items() if tokens == said)
    judge = local_judge(local, torch.device("cpu"), 6, endings, lambda text: False)
    reply = judge("be fair", user)
    assert reply.outcome == "answered"
    assert reply.text.endswith(f"\n\n{expected}")
    assert local_judge(local, torch.device("cpu"), 6, endings, lambda text: True)(
        "be fair", user
    ).text == reply.text.removesuffix(f"\n\n{expected}")
    assert judge("be fair", "long " * 700).outcome == "failed"  # no room in the context


@pytest.mark.parametrize("option", ["--base-url", "--key-variable"])
def test_a_local_judge_takes_nothing_of_an_endpoint(run_main, answers, option):
    code, _, errors = run_main(main, "judge", "--answers", answers, "--judge-model", "local:modelzoo/m", option, "a")
    assert (code, "are for an endpoint, but the judge local:modelzoo/m is local" in errors) == (2, True)


def test_a_local_judge_that_cannot_tell_grades_apart_is_refused(local):
    content = json.loads((local / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {word: i for word, i in vocabulary.items() if not word.isdigit()}
    (local / "tokenizer.json").write_text(json.dumps(content))
    endings = [f"Rating: [[{grade}]]" for grade in range(1, 10)]
    with pytest.raises(UserError, match=r"the same tokens for several of Rating: \[\[1\]\], .*take another judge"):
        local_judge(local, torch.device("cpu"), 6, endings, lambda text: False)
