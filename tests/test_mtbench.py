"""Answers to MT-bench's questions: what they depend on, what is on file, what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from families import plain_logits

from corpora.errors import UserError, run_program
from eval.__main__ import main
from eval.chat_templates import chat_template
from eval.json_lines import LineFile, read_lines
from eval.mtbench import (
    CATEGORIES,
    Answerer,
    Question,
    RowSampler,
    answer_key,
    question_file,
    read_questions,
    row_generator,
    temperature_of,
)
from intactkv.attach import IntactModel, attach

ROOT = Path(__file__).parents[1]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
CONTEXT = 512
QUESTIONS = [Question(81 + i, category, (f"Say {i} words" * (1 + i % 3), f"Again, {i}?"))
             for i, category in enumerate(CATEGORIES)]  # fmt: skip
SAMPLED = [question.id for question in QUESTIONS if temperature_of(question.category) > 0]


def write_questions(path: Path, questions: list[Question] = QUESTIONS) -> Path:
    rows = [{"question_id": q.id, "category": q.category, "turns": list(q.turns)} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns_of(path: Path) -> dict[int, list[str]]:
    return {line["question_id"]: line["choices"][0]["turns"] for line in read_lines(path, "the answers")}


@pytest.fixture
def chat(tiny_tokenizer) -> Any:
    return chat_template("auto", tiny_tokenizer(chat_template=TEMPLATE), "tiny")


@pytest.fixture
def answerer(tiny_model, chat):
    """answerer(**settings) -> Answerer of a tiny model that ends some answers by itself."""

    def make(
        model_type: str = "llama", *, seed: int = 42, max_new_tokens: int = 12, context: int = CONTEXT
    ) -> Answerer:
        model = tiny_model(model_type, max_position_embeddings=context)
        return Answerer(attach(model, None), chat, seed=seed, max_new_tokens=max_new_tokens, context=context)

    return make


def turns(lines: list[dict[str, Any]]) -> list[list[str]]:
    return [line["choices"][0]["turns"] for line in lines]


# what an answer depends on --------------------------------------------------------------------------------------------


def test_categories_have_fastchats_temperatures():
    by_temperature = {temperature_of(name): set() for name in (*CATEGORIES, "other")}
    for name in (*CATEGORIES, "other"):
        by_temperature[temperature_of(name)].add(name)
    assert by_temperature == {0.7: {"writing", "roleplay", "other"}, 0.1: {"stem", "humanities"},
                              0.0: {"extraction", "math", "coding", "reasoning"}}  # fmt: skip


def test_answers_depend_on_the_seed_where_they_are_drawn_and_only_there(answerer):
    first, same, other = (turns(answerer(seed=seed).lines(QUESTIONS, "m")) for seed in (42, 42, 43))
    assert first == same
    differ = [q.id for q, a, b in zip(QUESTIONS, first, other, strict=True) if a != b]
    assert set(differ) <= set(SAMPLED)
    warm = [q.id for q in QUESTIONS if temperature_of(q.category) == 0.7]
    assert set(warm) <= set(differ)


@pytest.mark.parametrize("model_type", ["llama", "opt", "qwen2"])
def test_answers_depend_neither_on_the_batch_nor_on_the_order(answerer, model_type):
    together = answerer(model_type)
    expected = dict(zip([q.id for q in QUESTIONS], turns(together.lines(QUESTIONS, "m")), strict=True))
    assert any(all(answer) for answer in expected.values())
    alone = answerer(model_type)
    for question in QUESTIONS[::-1]:
        assert turns(alone.lines([question], "m")) == [expected[question.id]]
    for group in (QUESTIONS[3:7], QUESTIONS[:3][::-1]):
        assert turns(alone.lines(group, "m")) == [expected[question.id] for question in group]


def test_streams_of_turns_and_questions_differ_and_repeat():
    streams = {
        (seed, question, turn): torch.rand(4, generator=row_generator(seed, question, turn)).tolist()
        for seed in (42, 43)
        for question in (81, 82)
        for turn in (0, 1)
    }
    assert len({tuple(values) for values in streams.values()}) == 8
    assert torch.rand(4, generator=row_generator(42, 81, 1)).tolist() == streams[42, 81, 1]


def test_a_greedy_answer_is_the_plain_models(answerer, chat, tiny_model):
    model = tiny_model("llama", max_position_embeddings=CONTEXT)
    question = next(q for q in QUESTIONS if q.category == "math")
    (line,) = answerer().lines([question], "m")
    answer = line["choices"][0]["turns"]
    dialogues = ([question.turns[0]], [question.turns[0], answer[0], question.turns[1]])
    for dialogue, said, count in zip(dialogues, answer, line["tokens"], strict=True):
        ids = chat.ids(dialogue)
        new: list[int] = []
        while len(new) < 12 and chat.tokenizer.eos_token_id not in new:
            new.append(int(plain_logits(model, torch.tensor(ids + new))[-1].argmax()))
        assert count == len(new)
        text = chat.tokenizer.decode(new)
        for special in ("<pad>", "<s>", "</s>", "<unk>"):
            text = text.replace(special, "")
        assert said == text.strip()


def test_draws_follow_the_distribution_and_the_models_top_k(answerer):
    """4000 draws at temperature 0.7: frequencies within 4 standard errors of the softmax of the top three."""
    one = answerer()
    one.top_k = 3
    logits = torch.tensor([[0.5, 2.0, -1.0, 1.5, 1.0, 0.9]])
    count = 4000
    sampler = RowSampler([torch.Generator().manual_seed(0)], [one._warpers(0.7)])
    drawn = torch.stack([sampler(torch.ones(1, 1, dtype=torch.long), logits).argmax() for _ in range(count)])
    expected = torch.zeros(6)
    expected[[1, 3, 4]] = (logits[0, [1, 3, 4]] / 0.7).softmax(-1)
    found = torch.bincount(drawn, minlength=6) / count
    assert bool(((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all())


def test_the_prompt_of_turn_two_holds_the_own_answer_and_no_temperature_is_passed(answerer, chat, monkeypatch):
    calls = []
    real = IntactModel.generate

    def spy(self, ids, mask=None, **options):
        calls.append((ids, options))
        return real(self, ids, mask, **options)

    monkeypatch.setattr(IntactModel, "generate", spy)
    question = QUESTIONS[0]
    (line,) = answerer().lines([question], "m")
    first = line["choices"][0]["turns"][0]
    assert [ids[0].tolist() for ids, _ in calls] == [
        chat.ids([question.turns[0]]),
        chat.ids([question.turns[0], first, question.turns[1]]),
    ]
    assert all("temperature" not in options and options["do_sample"] is False for _, options in calls)


@pytest.mark.parametrize("model_type", ["llama", "opt"])  # OPT has no positions beyond its context
def test_an_answer_stops_where_the_context_does(answerer, chat, model_type):
    question = QUESTIONS[4]
    context = len(chat.ids([question.turns[0]])) + 8
    one = answerer(model_type, context=context)
    one.stops = []  # nothing else ends it
    (alone,) = one.lines([question], "m")
    assert alone["stopped"] == ["context", "context"]
    assert alone["tokens"] == [8, 0]
    assert alone["choices"][0]["turns"][1] == ""
    assert answer_key(alone) == question.id
    short = Question(99, "math", ("a", "b"))
    mixed = one.lines([short, question], "m")
    assert mixed[1]["tokens"] == [8, 0]
    assert turns(mixed)[1] == turns([alone])[0]
    assert mixed[0]["stopped"][0] == "length"


def test_an_answer_is_cut_at_a_stop_token_and_cleaned(answerer, chat):
    one = answerer()
    encode = chat.tokenizer.convert_tokens_to_ids
    ids = [encode("Ġ"), encode("a"), encode("<unk>"), encode("b"), encode("Ġ"), 2, encode("c"), 0]
    answer = one._cut(ids, 12)
    assert (answer.text, answer.tokens, answer.stopped) == ("ab", 6, "end")
    assert one._cut(ids[:5], 12).stopped == "length"
    assert one._cut(ids[:5], 5).stopped == "context"


# files ----------------------------------------------------------------------------------------------------------------


def test_lines_are_kept_dropped_and_sorted_by_their_keys(tmp_path):
    path = tmp_path / "a.jsonl"

    def line(number: int, text: str) -> dict[str, Any]:
        return {"question_id": number, "choices": [{"index": 0, "turns": [text, text]}]}

    file = LineFile(path, answer_key)
    for number, text in ((83, "x"), (81, "old"), (82, "z \ud800"), (81, "new")):
        file.append(line(number, text))
    with path.open("a") as raw:
        raw.write('{"question_id": 84, "choices": [{"ind')
    again = LineFile(path, answer_key)
    assert (again.dropped, sorted(again.rows)) == (1, [81, 82, 83])
    again.append(line(84, "w"))
    again.finish(lambda row: row["question_id"])
    assert [row["question_id"] for row in read_lines(path, "it")] == [81, 82, 83, 84]
    assert turns_of(path)[81] == ["new", "new"]
    path.write_text(path.read_text().rstrip("\n"))  # whole, but the next line must not join the last
    LineFile(path, answer_key).append(line(85, "v"))
    assert sorted(turns_of(path)) == [81, 82, 83, 84, 85]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "is empty"),
        ("{]\n", "line 1, is no JSON object"),
        ('{"question_id": 1}\n', "has no 'category'"),
        ('{"question_id": "1", "category": "math", "turns": ["a", "b"]}\n', "question_id '1'"),
        ('{"question_id": 1, "category": "math", "turns": ["a"]}\n', "needs a category and 2 turns"),
        ('{"question_id": 1, "category": "math", "turns": ["a", "b"]}\n' * 2, "there twice"),
    ],
)
def test_a_damaged_file_of_questions_is_refused(tmp_path, text, named):
    path = tmp_path / "question.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=named):
        read_questions(path)


# the program ----------------------------------------------------------------------------------------------------------


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
def program(monkeypatch, capsys):
    """program(arguments…) -> (exit code, stdout, stderr) of `eval mtbench`, run in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eval", "mtbench", *map(str, arguments)])
        try:
            run_program(main)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_run_leaves_fastchats_lines_its_settings_and_a_record(program, model, questions, intactkv_root):
    common = ("--model", model, "--questions", questions, "--max-new-tokens", 8, "--seed", 43)
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


BAD_INPUT = {
    "no questions of the publishers": (["--questions", "mt_bench"], "scripts/prepare/mtbench.sh"),
    "no such file": (["--questions", "none.jsonl"], "there is no such file"),
    "no question": (["--limit", "0"], "--limit 0: give 1 or more"),
    "no tokens": (["--max-new-tokens", "0"], "--max-new-tokens 0"),
    "not a file of lines": (["--out", "a.json"], "ends in .jsonl"),
    "a prefix that no dialogue starts with": (["--prefix", "A fox."], "does not start with the prefix's tokens"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_a_mistake_is_one_line(case, program, model, questions, monkeypatch, tmp_path):
    arguments, named = BAD_INPUT[case]
    if "--questions" not in arguments:
        arguments = [*arguments, "--questions", questions]
    monkeypatch.setattr("eval.mtbench.data_folder", lambda name: tmp_path / name)
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


def test_a_killed_run_goes_on_without_a_lost_or_doubled_answer(program, model, questions, intactkv_root, tmp_path):
    """SIGKILL after the second answer, and half a line more, as if the kill had met it while writing."""
    path = tmp_path / "killed.jsonl"
    call = ["--model", model, "--questions", questions, "--max-new-tokens", 100, "--batch-size", 1, "--device", "cpu"]
    process = subprocess.Popen(
        [str(word) for word in [sys.executable, "-m", "eval", "mtbench", *call, "--out", path]],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not path.exists() or path.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = path.read_text().splitlines()
    assert 2 <= len(kept) < 8
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
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert named in done.stderr


@pytest.mark.slow
def test_the_real_model_answers_the_sample_with_its_prompt_intact(program, intactkv_root):
    directory = ROOT / "modelzoo" / "smollm2" / "smollm2-135m"
    if not (directory / "config.json").exists():
        pytest.skip("scripts/prepare/model.sh smollm2 135m has not run")
    common = ("--model", directory, "--limit", 2, "--max-new-tokens", 16, "--device", "cpu")
    for prefix in ("none", "prompt"):
        code, out, err = program(*common, "--prefix", prefix)
        assert code == 0, err
        assert "sample" in out.splitlines()[0]
    folder = intactkv_root / "outputs/mt_bench/model_answer"
    plain, intact = (turns_of(folder / f"smollm2-135m-full-{arm}sample-seed_42.jsonl") for arm in ("", "intactkv-"))
    assert plain == intact  # full precision with its own prefix is the same function
    assert all(len(turn) > 10 for turns in plain.values() for turn in turns)
    assert question_file("sample").is_file()
