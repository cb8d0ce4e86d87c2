"""Sample items: each rule does what it promises, on any text that is long enough, and always the same."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from common import ROOT

from corpora.cloze import ITEMS, ITEMS_SHA256, SHOTS, make_items, prepare_sample_tasks
from corpora.errors import UserError
from corpora.task_data import SAMPLE_TASKS, TASK_DATA
from corpora.tokens import text_hash

NAMES = ("Alaric", "Bodmin", "Corvin", "Dunmore", "Elswick", "Farrow", "PlayStation", "Brontë")  # two are no plain word
WORDS = ("river", "castle", "market", "garden", "winter", "bridge", "forest", "letter", "harbour", "village", "painter",
         "song", "old", "grey", "long", "made", "found", "kept", "near", "with")  # fmt: skip


def article(seed: int, sentences: int = 16) -> str:
    """Plain English-looking sentences over a few paragraphs, with headings between; names and words repeat."""
    generator = random.Random(seed)
    mine = generator.sample(NAMES, 4)
    text = [f"Title {seed}"]
    for paragraph in range(sentences // 4):
        lines = []
        for _ in range(4):
            words = [generator.choice(WORDS) for _ in range(generator.randint(8, 20))]
            words[generator.randrange(1, len(words) - 1)] = generator.choice(mine)
            words[-1] = generator.choice(WORDS[:11])
            lines.append(f"The {' '.join(words)}.")
        text += [f"Heading {paragraph}", " ".join(lines)]
    return "\n\n".join(text)


ARTICLES = [article(seed) for seed in range(60)]
Items = dict[str, list[dict[str, Any]]]


@pytest.fixture(params=["text of the test", "the sample"])
def items(request: pytest.FixtureRequest) -> Items:
    """The scored items by task: of a made-up text, and the ones that everybody has."""
    if request.param == "text of the test":
        return {name: next(iter(splits.values())) for name, splits in make_items(ARTICLES).items()}
    folder = ROOT / "datasets/sample-tasks"
    if not folder.is_dir():
        pytest.skip("datasets/sample-tasks is missing: bash scripts/prepare/data.sh sample-tasks")
    files = {name: folder / name / f"{next(iter(TASK_DATA[name].splits))}.jsonl" for name in SAMPLE_TASKS}
    return {name: [json.loads(line) for line in path.open(encoding="utf-8")] for name, path in files.items()}


def test_there_are_40_different_items_of_every_task(items: Items) -> None:
    assert set(items) == set(SAMPLE_TASKS)
    for name, rows in items.items():
        assert len(rows) == ITEMS == 40
        assert len({json.dumps(row) for row in rows}) == ITEMS, name


def test_the_last_word_of_lambada_stands_earlier_in_the_text(items: Items) -> None:
    for row in items["lambada_openai"]:
        context, _, word = row["text"].rpartition(" ")  # as lm-eval cuts it
        assert re.fullmatch("[A-Za-z]{5,}", word)
        assert word in context


def options(name: str, row: dict[str, Any]) -> tuple[list[str], int]:
    """A row's options and the place of the right one, as the benchmark's columns say it."""
    match name:
        case "hellaswag":
            return row["endings"], int(row["label"])
        case "winogrande":
            return [row["option1"], row["option2"]], int(row["answer"]) - 1
        case "piqa":
            return [row["sol1"], row["sol2"]], row["label"]
        case "boolq":
            return ["no", "yes"], row["label"]
    return row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])


CHOICES = {"hellaswag": 4, "openbookqa": 4, "arc_easy": 4, "arc_challenge": 4, "winogrande": 2, "piqa": 2, "boolq": 2}


@pytest.mark.parametrize("name", CHOICES)
def test_the_right_answer_is_among_the_options_once_and_its_place_says_nothing(items: Items, name: str) -> None:
    places: Counter[int] = Counter()
    for row in items[name]:
        texts, right = options(name, row)
        assert len(texts) == CHOICES[name]
        assert texts.count(texts[right]) == 1
        places[right] += 1
    assert set(places) == set(range(CHOICES[name]))
    # Always the same letter must not score far over chance: 40 draws, five standard deviations of a binomial.
    chance = 1 / CHOICES[name]
    assert max(places.values()) <= ITEMS * chance + 5 * (ITEMS * chance * (1 - chance)) ** 0.5


def test_the_right_answer_is_what_the_text_has() -> None:
    """Put back into its place, the right answer gives a passage of the text; of the others only by accident."""
    everything = "\n".join(ARTICLES)
    splits = {name: next(iter(rows.values())) for name, rows in make_items(ARTICLES).items()}
    for name in ("hellaswag", "openbookqa", "arc_easy", "arc_challenge", "winogrande", "piqa"):
        for row in splits[name]:
            texts, right = options(name, row)
            answer = texts[right]
            match name:
                case "hellaswag":
                    assert row["ctx_a"] in everything  # the next sentence may stand below a heading
                    assert f"{row['ctx_b']} {answer}" in everything
                    assert row["ctx"] == f"{row['ctx_a']} {row['ctx_b']}"
                case "openbookqa":
                    assert f"{row['question_stem']} {answer}." in everything
                case "winogrande":
                    assert row["sentence"].count("_") == 1
                    assert row["sentence"].replace("_", answer) in everything
                case "piqa":
                    assert f"{row['goal']} {answer}." in everything
                case _:
                    question = row["question"].removeprefix("Which word is missing in the sentence: ")
                    assert question.count("____") == 1
                    assert question.replace("____", answer) in everything


def test_the_wrong_answers_keep_the_rule_of_their_task(items: Items) -> None:
    for row in items["arc_challenge"]:
        texts, right = options("arc_challenge", row)
        assert all(abs(len(text) - len(texts[right])) <= 1 for text in texts)
    for row in items["piqa"]:
        assert sorted(row["sol1"].split()) == sorted(row["sol2"].split())
        assert row["sol1"] != row["sol2"]
    for row in items["winogrande"]:
        assert row["sentence"].index("_") > 0
        texts, right = options("winogrande", row)
        assert texts[1 - right] not in row["sentence"]


def test_the_passage_mentions_the_name_or_does_not(items: Items) -> None:
    for row in items["boolq"]:
        name = row["question"].removeprefix("does the passage mention ")
        assert (name in row["passage"]) == bool(row["label"])
    assert sum(row["label"] for row in items["boolq"]) == ITEMS / 2


def test_the_steps_of_gsm8k_compute() -> None:
    splits = make_items(ARTICLES)["gsm8k"]
    assert {split: len(rows) for split, rows in splits.items()} == {"test": ITEMS, "train": SHOTS}
    for row in (*splits["test"], *splits["train"]):
        boxes, each, more = map(int, re.findall(r"\d+", row["question"]))
        steps = re.findall(r"(\d+) ([*+]) (\d+) = <<(\d+)([*+])(\d+)=(\d+)>>(\d+)", row["answer"])
        assert len(steps) == 2
        for left, sign, right, *again, result, shown in steps:
            assert [left, sign, right] == again
            assert result == shown
            assert int(result) == (int(left) * int(right) if sign == "*" else int(left) + int(right))
        assert row["answer"].endswith(f"\n#### {boxes * each + more}")


def test_the_same_text_gives_the_same_items_and_another_text_others() -> None:
    first = make_items(ARTICLES)
    assert make_items(list(ARTICLES)) == first
    other = make_items([article(seed) for seed in range(100, 160)])
    assert {name for name in first if other[name] == first[name]} == {"gsm8k"}  # which reads no text


@pytest.mark.parametrize("articles", [[], ["Short."], ARTICLES[:20]])
def test_a_text_that_is_too_short_is_refused(articles: list[str]) -> None:
    with pytest.raises(UserError, match=r"the text gives only \d+ of 40 items of \w+; use a longer one"):
        make_items(articles)


def test_items_of_another_text_are_not_the_sample(tmp_path: Path) -> None:
    """Everybody's sample is the same, or none: a score on other items would pass for one on these."""
    text = tmp_path / "evaluation.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in ARTICLES))
    with pytest.raises(UserError, match=rf"made from {text} have SHA-256 [0-9a-f]{{64}}, expected {ITEMS_SHA256}"):
        prepare_sample_tasks(tmp_path / "sample-tasks", text)
    assert not (tmp_path / "sample-tasks").exists()


@pytest.mark.slow
def test_the_items_of_the_real_sample_are_the_pinned_ones(tmp_path: Path) -> None:
    text = ROOT / "datasets/sample/evaluation.jsonl"
    if not text.is_file():
        pytest.skip("datasets/sample is missing: bash scripts/prepare/data.sh sample")
    articles = [json.loads(line)["text"] for line in text.open(encoding="utf-8")]
    items = make_items(articles)
    assert text_hash(json.dumps(items, sort_keys=True)) == ITEMS_SHA256
    target = tmp_path / "sample-tasks"
    assert prepare_sample_tasks(target, text)
    assert not prepare_sample_tasks(target, text)
    for name, splits in items.items():
        for split, rows in splits.items():
            lines = (target / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            assert [json.loads(line) for line in lines] == rows
