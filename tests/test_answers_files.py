"""Files of answers: what else stands where they are written stays, and what they say makes no path and no traceback."""

import json
import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from chats import CONTEXT, QUESTIONS, TEMPLATE, write_questions
from common import error_line

from corpora.errors import UserError
from corpora.json_lines import read_lines
from eval.__main__ import main
from eval.mtbench.answers import ANSWERS
from eval.mtbench.json_lines import LineFile, only_writer, part_of, parts_of, refuse_other_lines
from eval.mtbench.judge import read_answers


@pytest.fixture
def model(intactkv_root: Path, tiny_checkpoint, tiny_tokenizer) -> Path:
    directory = tiny_checkpoint(intactkv_root / "modelzoo", "llama", max_position_embeddings=CONTEXT)
    tiny_tokenizer(chat_template=TEMPLATE).save_pretrained(directory)
    return directory


@pytest.fixture
def questions(tmp_path) -> Path:
    return write_questions(tmp_path / "mine.jsonl")


@pytest.fixture
def program(run_main, model, questions):
    """program(arguments…) -> (exit code, stdout, stderr) of `eval mtbench` on two questions."""
    return partial(run_main, main, "mtbench", "--model", model, "--questions", questions, "--max-new-tokens", 2,
                   "--limit", 2)  # fmt: skip


def line(number: int, text: str = "a", **more: Any) -> dict[str, Any]:
    return {"question_id": number, "choices": [{"index": 0, "turns": [text, text]}], "tokens": [1, 1],
            "stopped": ["end", "end"], **more}  # fmt: skip


# what is anothers -----------------------------------------------------------------------------------------------------

OTHERS: dict[str, Callable[[Path, Path], object]] = {
    "the questions": lambda out, questions: out.write_bytes(questions.read_bytes()),
    "one question without a line end": lambda out, q: out.write_text(q.read_text().splitlines()[0]),
    "answers of another program": lambda out, q: out.write_text(
        '{"question_id": 1, "choices": [{"turns": ["a", "b"]}]}\n'
    ),
    "text": lambda out, q: out.write_text("my notes"),
    "a broken line inside": lambda out, q: out.write_text('{"question_id": 88, "ans\n' + json.dumps(line(89)) + "\n"),
    "other bytes": lambda out, q: out.write_bytes(b"\x00\xff" * 9),
    "a link": lambda out, q: out.symlink_to(q),
    "a link to nothing": lambda out, q: out.symlink_to(q.with_name("nothing")),
    "a pipe": lambda out, q: os.mkfifo(out),
    "a folder": lambda out, q: out.mkdir(),
    "settings of something else": lambda out, q: out.with_suffix(".run.json").write_text('{"seed": 1}'),
    "settings that are a link": lambda out, q: out.with_suffix(".run.json").symlink_to(q),
}  # fmt: skip


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"") for path in folder.iterdir()
    }


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("case", OTHERS)
def test_what_another_program_made_is_refused_before_the_work_and_stays(case, force, program, questions, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    out = place / "out.jsonl"
    OTHERS[case](out, questions)
    before = state(place)
    code, said, err = program("--out", out, *(["--force"] if force else []))
    assert (code, said) == (2, "")
    assert str(out.with_suffix("")) in error_line(err)
    assert state(place) == before


def test_answers_of_ours_are_replaced_with_force(program, tmp_path):
    out = tmp_path / "out.jsonl"
    assert program("--out", out)[0] == 0
    first = read_lines(out, "it")
    code, _, err = program("--out", out, "--force")
    assert code == 0, err
    assert [row["answer_id"] for row in read_lines(out, "it")] != [row["answer_id"] for row in first]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_answers_of_a_model_with_a_long_name_are_called_by_its_beginning(program, model, intactkv_root):
    long = model.rename(model.with_name("m" * 190))
    code, _, err = program("--model", long)
    assert code == 0, err
    (path,) = (intactkv_root / "outputs" / "mt_bench" / "model_answer").glob("*.jsonl")
    assert path.stem.startswith("m" * 100)
    assert {row["model_id"] for row in read_lines(path, "it")} == {path.stem}


def test_the_questions_are_never_the_answers(program, questions):
    before = questions.read_bytes()
    code, _, err = program("--out", questions, "--force")
    assert code == 2
    assert f"--out {questions} is what the program reads" in error_line(err)
    assert questions.read_bytes() == before


# what is ours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, len(json.dumps(line(83))) + 1))
def test_what_a_kill_leaves_of_the_last_line_is_made_again_and_nothing_else_is_lost(cut, tmp_path):
    path = tmp_path / "a.jsonl"
    whole = [json.dumps(line(number)) for number in (81, 82, 83)]
    path.write_text("\n".join([*whole[:2], whole[2][:cut]]))
    file = LineFile(path, ANSWERS)
    kept = 3 if cut == len(whole[2]) else 2
    assert (len(file.rows), file.dropped) == (kept, 3 - kept)
    assert path.read_text() == "".join(f"{row}\n" for row in whole[:kept])


@pytest.mark.parametrize("damage", [
    {"question_id": None}, {"question_id": [1]}, {"question_id": 10**40}, {"choices": []}, {"choices": [None]},
    {"choices": [{"turns": "ab"}]}, {"choices": [{"turns": ["a"]}]}, {"choices": {"0": 1}}, {"tokens": ["1", "2"]},
    {"tokens": None}, {"stopped": ["end"]}, {"stopped": ["end", "never"]}, {"x": float("nan")},
])  # fmt: skip
def test_a_damaged_line_is_named_and_the_file_stays(damage, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(line(81))}\n{json.dumps(line(82, **damage))}\n{json.dumps(line(83))}\n")
    before = path.read_bytes()
    for reader in (partial(LineFile, path), partial(refuse_other_lines, path)):
        with pytest.raises(UserError, match=r"a\.jsonl, line 2,"):
            reader(ANSWERS)
    assert path.read_bytes() == before
    LineFile(tmp_path / "b.jsonl", ANSWERS).append(line(81))  # an intact one is
    assert LineFile(tmp_path / "b.jsonl", ANSWERS).rows == {81: line(81)}


def test_half_a_character_that_was_once_stored_is_read_as_a_sign(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(line(81, "\U0001f600 \ud83d \\ud83d")) + "\n")
    assert LineFile(path, ANSWERS).rows[81]["choices"][0]["turns"][0] == "\U0001f600 � \\ud83d"
    assert read_answers(path)[81][0] == "\U0001f600 � \\ud83d"  # the judge reads what `mtbench` goes on from


def test_a_line_that_finds_no_room_leaves_nothing_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    file = LineFile(path, ANSWERS)
    file.append(line(81))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*a\.jsonl"):
            file.append(line(82))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    file.append(line(83))
    assert LineFile(path, ANSWERS).rows.keys() == {81, 83}


def test_no_two_processes_share_a_part_and_no_lock_stays(tmp_path):
    path = tmp_path / "a.jsonl"
    parts = {part_of(path, 0) for _ in range(100)}
    assert len(parts) == 100
    for part in parts:
        part.touch()
    assert set(parts_of(path)) == parts
    with only_writer(path):
        with pytest.raises(UserError, match=r"another process is writing .*a\.jsonl"), only_writer(path):
            pass
        assert tmp_path.joinpath(".a.jsonl.lock").exists()  # of the one that writes
    with pytest.raises(BlockingIOError, match="a pipe of the work"), only_writer(path):  # no other process is at fault
        raise BlockingIOError("a pipe of the work")
    assert set(tmp_path.iterdir()) == parts


def test_a_model_id_of_a_file_makes_no_path_and_answers_are_read_as_theirs(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(line(81, model_id="../../x")) + "\n")
    assert read_answers(path) == {81: ["a", "a"]}
    path.write_text(json.dumps({"question_id": 81, "choices": [{"turns": ["FastChat's", "b"]}]}) + "\n")
    assert read_answers(path) == {81: ["FastChat's", "b"]}


# templates ------------------------------------------------------------------------------------------------------------

TEMPLATES: dict[str, str] = {
    "a text of gigabytes": "{{ 'a' * 3000000000 }}" + TEMPLATE,
    "a text that doubles": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    "{{ n.x }}" + TEMPLATE,
    "a width of gigabytes": "{{ '%3000000000d' % 1 }}" + TEMPLATE,
    "a long text": "{{ 'a' * 20000000 }}" + TEMPLATE,
    "an endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + TEMPLATE,
    "calls of itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}" + TEMPLATE,
    "an undefined name": "{{ nothing.at.all }}" + TEMPLATE,
    "Python's insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}" + TEMPLATE,
    "a range too long": "{{ range(10**9)|list }}" + TEMPLATE,
    "division by zero": "{{ 1 / 0 }}" + TEMPLATE,
    "no template": "{% for %}" + TEMPLATE,
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_goes_wrong_is_one_line(case, program, model, tiny_tokenizer):
    tiny_tokenizer(chat_template=TEMPLATES[case]).save_pretrained(model)
    code, out, err = program()
    assert (code, out) == (2, "")
    assert f"the chat template of {model}" in error_line(err)
    assert len(error_line(err)) < 600


def test_an_intact_template_answers(program):
    code, _, err = program()
    assert code == 0, err
    assert len(QUESTIONS) > 2
