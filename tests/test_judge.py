"""The judge without a network: ratings, prompts, references, comparisons in both orders, scores, what is made again."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from corpora.errors import UserError
from corpora.json_lines import read_lines
from eval.mtbench.answers import CATEGORIES, data_folder, question_file, read_questions
from eval.mtbench.json_lines import LineFile
from eval.mtbench.judge import (
    COMPARISONS,
    GRADES,
    IN_A_ROW,
    Materials,
    judge_all,
    kept_line,
    pair_jobs,
    read_answers,
    read_materials,
    single_jobs,
)
from eval.mtbench.judge_client import Reply
from eval.mtbench.reasoning import left_open, opened_at_the_end, spoken
from eval.mtbench.verdicts import rating, scores, verdict, winner

SAMPLE = data_folder("sample")
PROMPTS = SAMPLE / "judge_prompts.jsonl"
REFERENCES = SAMPLE / "reference_answer" / "own.jsonl"


@pytest.fixture
def materials() -> Materials:
    return read_materials(read_questions(question_file("sample")), PROMPTS, REFERENCES)


def answers_of(materials: Materials, word: str) -> dict[int, list[str]]:
    return {number: [f"{word} one {number} {{x}}", f"{word} two {number}"] for number in materials.questions}


def say(text: str) -> Any:
    return lambda system, user: Reply(text, "answered", 10, 2)


# what the judge said --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judgment", "score"),
    [
        ("Rating: [[7]]", 7),
        ("Rating: [[7.5]]", 7.5),
        ("Rating: [7]", 7),
        ("[3] is wrong. [[7]] then [[2]]", 7),
        ("Rating: [[10]]", 10),
        ("Rating: [[85]]", -1),  # no grade of 1 to 10
        ("As in [2023].", -1),
        ("Rating: 7", -1),
        ("Rating: [[seven]]", -1),
        ("", -1),
    ],
)
def test_the_first_number_in_double_brackets_counts_then_in_single_ones(judgment, score):
    assert rating(judgment) == score


@pytest.mark.parametrize(("judgment", "name"), [("so [[A]]", "A"), ("[[B]]", "B"), ("[[C]]", "tie"), ("A", "error")])
def test_a_verdict_is_a_letter_in_double_brackets(judgment, name):
    assert verdict(judgment) == name


REASONED = {  # what a judge wrote: its words behind the reasoning, and the mark that is missing
    "<think>Format: [[5]]. Perhaps [[3]].</think> Rating: [[9]]": (" Rating: [[9]]", ""),
    "<think>The form is [[5]], so": ("", "</think>"),
    "It is opened by the prompt, [[4]] or so.\n</think>\n\n[[7]]": ("\n\n[[7]]", ""),
    "<THINK effort='high'>[[1]]</Think>[[2]]": ("[[2]]", ""),
    "<thinking>[[1]] </think> [[3]]</thinking>[[2]]": ("[[2]]", ""),
    "<reasoning>[[1]]</reasoning>[[2]]": ("[[2]]", ""),
    "<think>a <think>b</think> [[1]]</think>[[2]]": ("[[2]]", ""),
    "<think></think>Well, [[6]]. <think>Or [[7]]?</think> Done.": ("Well, [[6]].  Done.", ""),
    "Well, [[6]].\n<think>Or [[7]]?": ("Well, [[6]].\n", "</think>"),
    "It uses an <analysis> tag. Rating: [[6]]": ("It uses an <analysis> tag. Rating: [[6]]", ""),
    "`<reason>` is fine.\nRating: [[6]]": ("`<reason>` is fine.\nRating: [[6]]", ""),
    "[THINK][[1]][/THINK][[2]]": ("[[2]]", ""),
    "◁think▷[[1]]◁/think▷[[2]]": ("[[2]]", ""),
    "<seed:think>[[1]]": ("", "</seed:think>"),
    "<|begin_of_thought|>[[1]]<|end_of_thought|>[[2]]": ("[[2]]", ""),
    "<|channel|>analysis<|message|>[[1]]<|end|><|start|>assistant<|channel|>final<|message|>[[2]]": ("[[2]]", ""),
    "I think that x < y and <thinker> is no mark: [[8]]": ("I think that x < y and <thinker> is no mark: [[8]]", ""),
}


@pytest.mark.parametrize("text", REASONED)
def test_reasoning_decides_nothing(text):
    said, missing = REASONED[text]
    assert (spoken(text), left_open(text)) == (said, missing)
    assert rating(text) == rating(said)
    letters = text.replace("[[2]]", "[[B]]")
    assert verdict(letters) == ("B" if "[[2]]" in text else "error")


def test_the_mark_that_a_prompt_ends_with_is_found_and_no_other():
    assert opened_at_the_end("a </think> b\nassistant\n<think>\n\n") == "<think>"
    for prompt in ("", "is <think> a word", "<think>\n\n</think>\n", "[[5]]"):
        assert opened_at_the_end(prompt) == ""


@pytest.mark.parametrize(
    ("first", "second", "won"),
    [
        ("model_1", "model_1", "model_1"),
        ("model_2", "model_2", "model_2"),
        ("model_1", "model_2", "tie"),
        ("model_1", "tie", "tie"),
        ("tie", "tie", "tie"),
        ("error", "model_1", "error"),
    ],
)
def test_a_win_needs_both_orders(first, second, won):
    assert winner({"g1_winner": first, "g2_winner": second}) == won


# what the judge reads -------------------------------------------------------------------------------------------------


def test_the_sample_is_two_questions_a_category_with_references_where_they_are_needed(materials):
    categories = [question.category for question in materials.questions.values()]
    assert categories == [name for name in CATEGORIES for _ in range(2)]
    assert min(materials.questions) == 9001
    needed = {q.id for q in materials.questions.values() if q.category in ("math", "reasoning", "coding")}
    assert materials.references.keys() == needed
    assert len({turn for q in materials.questions.values() for turn in q.turns}) == 32


def test_every_question_is_judged_twice_with_its_prompt_and_reference(materials):
    answers = answers_of(materials, "mine")
    jobs = single_jobs(materials, "j", "m", answers)
    assert len(jobs) == 2 * len(answers)
    for job in jobs:
        number, model, (judge, name), turn = job.key
        question = materials.questions[number]
        referenced = question.category in ("math", "reasoning", "coding")
        assert (model, judge) == ("m", "j")
        assert name == ("single-math-v1" if referenced else "single-v1") + ("-multi-turn" if turn == 2 else "")
        (user,) = job.users
        assert question.turns[0] in user
        assert (question.turns[1] in user) == (turn == 2)
        assert answers[number][0] in user
        assert (answers[number][1] in user) == (turn == 2)
        for i in (0, 1):
            if referenced:
                assert (materials.references[number][i] in user) == (i < turn)
        assert job.system


def test_missing_references_prompts_and_places_are_named(materials):
    answers = answers_of(materials, "a")
    without = Materials(materials.questions, materials.prompts, {})
    with pytest.raises(UserError, match=r"question 9005 \(reasoning\) .* --references FILE"):
        single_jobs(without, "j", "m", answers)
    fewer = {name: row for name, row in materials.prompts.items() if name != "single-v1"}
    with pytest.raises(UserError, match="have no 'single-v1'; known are single-math-v1"):
        single_jobs(Materials(materials.questions, fewer, materials.references), "j", "m", answers)
    odd = materials.prompts | {"single-v1": materials.prompts["single-v1"] | {"prompt_template": "{question} {other}"}}
    with pytest.raises(UserError, match="'single-v1' has a place for 'other'"):
        single_jobs(Materials(materials.questions, odd, materials.references), "j", "m", answers)


def test_answers_without_two_turns_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question_id": 1, "choices": [{"index": 0, "turns": ["one"]}]}) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 1, is damaged: its 'choices\.0\.turns' .* has not 2 turns"):
        read_answers(path)
    with pytest.raises(UserError, match="is missing"):
        read_answers(tmp_path / "none.jsonl")


# judging --------------------------------------------------------------------------------------------------------------


def test_lines_are_fastchats_and_nothing_is_scored_twice(materials, tmp_path):
    path = tmp_path / "model_judgment" / "j_single.jsonl"
    jobs = single_jobs(materials, "j", "m", answers_of(materials, "a"))
    asked: list[str] = []

    def judge(system: str, user: str) -> Reply:
        asked.append(user)
        return Reply("Fine. Rating: [[8]]", "answered", 100, 5)

    assert judge_all(jobs[:20], judge, LineFile(path, GRADES), {}, concurrency=3) is None
    assert judge_all(jobs, judge, LineFile(path, GRADES), {}, concurrency=3) is None
    assert judge_all(jobs, judge, LineFile(path, GRADES), {}, concurrency=3) is None
    assert sorted(asked) == sorted(job.users[0] for job in jobs)
    lines = read_lines(path, "it")
    assert len(lines) == 32
    for line in lines:
        assert (line["model"], line["judge"][0], line["score"], line["judgment"]) == (
            "m",
            "j",
            8.0,
            "Fine. Rating: [[8]]",
        )
        assert [type(line[name]) for name in ("question_id", "user_prompt", "turn", "tstamp")] == [int, str, int, float]
        assert line["usage"] == {"prompt_tokens": 100, "completion_tokens": 5}


def test_other_answers_of_the_same_model_are_judged_again(materials, tmp_path):
    path = tmp_path / "j_single.jsonl"
    for word, text in (("old", "[[3]]"), ("new", "[[9]]")):
        file = LineFile(path, GRADES)
        judge_all(single_jobs(materials, "j", "m", answers_of(materials, word)), say(text), file, {}, concurrency=2)
        file.finish(lambda line: (line["question_id"], line["turn"]))
    lines = read_lines(path, "it")
    assert [line["score"] for line in lines] == [9.0] * 32


@pytest.mark.parametrize(
    ("reply", "outcome", "again"),
    [
        (Reply("HTTP 503", "failed"), "failed", True),
        (Reply("I will not", "refused"), "refused", False),
        (Reply("No number.", "answered"), "no rating", False),
        (Reply(" \n", "answered"), "empty", False),
        (Reply("<think>Perhaps [[5]].", "answered"), "empty", False),
    ],
)
def test_what_has_no_score_counts_nowhere_and_only_failures_are_made_again(materials, tmp_path, reply, outcome, again):
    path = tmp_path / "j_single.jsonl"
    jobs = single_jobs(materials, "j", "m", answers_of(materials, "a"))
    bad = jobs[3].users[0]
    judge_all(jobs, lambda _, user: reply if user == bad else Reply("[[6]]", "answered"), LineFile(path, GRADES),
              {}, concurrency=2)  # fmt: skip
    file = LineFile(path, GRADES)
    line = file.rows[jobs[3].key]
    assert (line["score"], line["outcome"], line["judgment"]) == (-1, outcome, reply.text)
    found = scores(list(file.rows.values()), lambda number: materials.questions[number].category)
    assert found["score"] == 6.0
    assert found["unscored"] == {"no rating": 0, "empty": 0, "refused": 0, "failed": 0} | {outcome: 1}
    asked = []
    judge_all(jobs, lambda _, user: (asked.append(user), Reply("[[2]]", "answered"))[1], file, {}, concurrency=2)
    assert asked == ([bad] if again else [])


@pytest.mark.parametrize(("protocols", "made"), [
    ([{"max_tokens": 64}, {"max_tokens": 64}, {"max_tokens": 128}], [32, 0, 32]),
    ([{}, {"max_tokens": 64}], [32, 0]),  # FastChat's lines say nothing of it
])  # fmt: skip
def test_judgements_by_another_protocol_are_made_again(materials, tmp_path, protocols, made):
    path = tmp_path / "j_single.jsonl"
    jobs = single_jobs(materials, "j", "m", answers_of(materials, "a"))
    for protocol, count in zip(protocols, made, strict=True):
        asked: list[str] = []
        file = LineFile(path, GRADES)
        judge_all(jobs, lambda _, user, asked=asked: (asked.append(user), Reply("[[2]]", "answered"))[1], file,
                  protocol, concurrency=2)  # fmt: skip
        file.finish(lambda line: (line["question_id"], line["turn"]))
        assert len(asked) == count
        lines = read_lines(path, "it")
        assert len(lines) == 32
        assert all(line.get("max_tokens") == protocol["max_tokens"] for line in lines if count and protocol)


def test_lines_that_were_read_with_their_reasoning_are_read_anew_and_not_paid_again(materials, tmp_path):
    single, pair = tmp_path / "j_single.jsonl", tmp_path / "j_pair.jsonl"
    text = "<think>[[5]] or [[A]]</think> [[9]], so [[B]]"
    answers = answers_of(materials, "a"), answers_of(materials, "b")
    jobs = {single: single_jobs(materials, "j", "m", answers[0]), pair: pair_jobs(materials, "j", ("m", "n"), answers)}
    for path, key, old in ((single, GRADES, {"score": 5.0}),
                           (pair, COMPARISONS, {"g1_winner": "model_1", "g2_winner": "model_2"})):  # fmt: skip
        file = LineFile(path, key)
        judge_all(jobs[path], say(text), file, {}, concurrency=2)
        expected = {number: dict(row) for number, row in file.rows.items()}
        for row in list(file.rows.values())[::3]:
            file.append(row | old)
        asked: list[str] = []
        again = LineFile(path, key)
        judge_all(jobs[path], lambda _, user, asked=asked: asked.append(user), again, {}, concurrency=2)
        assert asked == []
        assert again.rows == LineFile(path, key).rows == expected
        before = path.read_bytes()
        judge_all(jobs[path], say("no"), again, {}, concurrency=2)
        assert path.read_bytes() == before


@pytest.mark.parametrize("address", ["http://h:1/v1", "http://h/a&b/it's#1", 'http://h/\\1"$x'])
def test_the_command_that_says_where_judgements_were_made_does_so_whatever_stands_in_address_and_path(
    address, materials, tmp_path
):
    path = tmp_path / "it's & $HOME" / "j_single.jsonl"
    jobs = single_jobs(materials, "j", "m", answers_of(materials, "a"))
    judge_all(jobs, say("[[7]]"), LineFile(path, GRADES), {}, concurrency=1)
    before = read_lines(path, "it")
    with pytest.raises(UserError, match="name no address") as refusal:
        kept_line(jobs[0], LineFile(path, GRADES), {"endpoint": address})
    command = str(refusal.value).partition("such as ")[2].partition(", or move")[0]
    subprocess.run(["bash", "-c", command], check=True)
    assert read_lines(path, "it") == [row | {"endpoint": address} for row in before]
    assert kept_line(jobs[0], LineFile(path, GRADES), {"endpoint": address})


def test_a_judge_that_is_down_is_not_asked_for_ever(materials, tmp_path):
    jobs = single_jobs(materials, "j", "m", answers_of(materials, "a"))
    asked = []
    file = LineFile(tmp_path / "j_single.jsonl", GRADES)
    reason = judge_all(jobs, lambda _, user: (asked.append(user), Reply("gone", "failed"))[1], file, {}, concurrency=1)
    assert reason == "gone"
    assert len(asked) == IN_A_ROW < len(jobs)
    assert all(line["score"] == -1 for line in file.rows.values())


def test_scores_are_means_over_valid_lines_by_turn_and_category(materials):
    def line(number: int, turn: int, score: float) -> dict[str, Any]:
        return {"question_id": number, "turn": turn, "score": score}

    lines = [line(9001, 1, 8), line(9001, 2, 5), line(9007, 1, -1), line(9007, 2, 2), line(9008, 1, 9)]
    found = scores(lines, lambda number: materials.questions[number].category)
    assert found["score"] == (8 + 5 + 2 + 9) / 4
    assert found["turns"] == {"1": 8.5, "2": 3.5}
    assert found["categories"] == {"writing": 6.5, "math": 5.5}
    assert scores(lines[2:3], lambda _: "math")["score"] is None


def test_two_answers_are_compared_in_both_orders_and_the_place_of_an_answer_wins_nothing(materials, tmp_path):
    """A judge that always prefers the first place, and one that knows what it likes."""
    answers = (answers_of(materials, "good"), answers_of(materials, "bad"))
    jobs = pair_jobs(materials, "j", ("m", "base"), answers)
    assert len(jobs) == 32
    for job in jobs:
        first, second = job.users
        assert first.index("good") < first.index("bad")
        assert second.index("bad") < second.index("good")

    def taste(system: str, user: str) -> Reply:
        return Reply("[[A]]" if user.index("good") < user.index("bad") else "[[B]]", "answered")

    for judge, expected, games in ((say("[[A]]"), "tie", ("model_1", "model_2")),
                                   (taste, "model_1", ("model_1", "model_1")),
                                   (say("[[C]]"), "tie", ("tie", "tie")),
                                   (say("hm"), "error", ("error", "error"))):  # fmt: skip
        file = LineFile(tmp_path / f"{expected}{games}.jsonl", COMPARISONS)
        judge_all(jobs, judge, file, {}, concurrency=2)
        assert {winner(line) for line in file.rows.values()} == {expected}
        assert {(line["g1_winner"], line["g2_winner"]) for line in file.rows.values()} == {games}
        line = next(iter(file.rows.values()))
        assert (line["model_1"], line["model_2"]) == ("m", "base")
        assert {"g1_user_prompt", "g1_judgment", "g2_user_prompt", "g2_judgment", "turn", "tstamp"} <= line.keys()


def test_fastchat_reads_the_judgements(materials, tmp_path: Path):
    """As fastchat.llm_judge.show_result does: the means of its data frame are ours."""
    pandas = pytest.importorskip("pandas")
    file = LineFile(tmp_path / "j_single.jsonl", GRADES)
    jobs = single_jobs(materials, "j", "m", answers_of(materials, "a"))
    judge_all(jobs, lambda _, user: Reply(f"[[{len(user) % 10 + 1}]]", "answered"), file, {}, concurrency=2)
    frame = pandas.read_json(file.path, lines=True)[["model", "score", "turn"]]
    frame = frame[frame["score"] != -1]
    ours = scores(list(file.rows.values()), lambda _: "all")
    for turn in (1, 2):
        theirs = frame[frame["turn"] == turn].groupby(["model", "turn"]).mean()["score"].iloc[0]
        assert theirs == pytest.approx(ours["turns"][str(turn)])
    assert frame[["model", "score"]].groupby("model").mean()["score"].iloc[0] == pytest.approx(ours["score"])
