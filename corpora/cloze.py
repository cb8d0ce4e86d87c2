"""Sample items for every kind of task, made by rule from the sample text and from arithmetic.

They let every path of the evaluation run on a fresh machine. They are not the benchmarks, and a score on them compares
only with another score on them: the rules below are all that there is to know.

    lambada_openai  three sentences of an article; the last word, at least five letters, stands earlier in the text,
                    alone or in a longer word
    hellaswag       a sentence and the first half of the next; endings: its second half, or those of three others
    openbookqa      a sentence without its last word; choices: the word, or three last words of other articles
    arc_easy        "Which word is missing?"; choices: the word, or three words of the same article
    arc_challenge   the same; choices: the word, or three words of the same length or nearly
    winogrande      a sentence with a gap for its capitalised name; options: the name, or another of the same article
    boolq           a paragraph; "does the passage mention NAME?", where half the names are another article's
    piqa            the beginning of a sentence; solutions: its end, or its end with the words in another order
    gsm8k           two-step word problems about counting, with the steps and `#### answer`

Items come from the evaluation half of the text, drawn by Python's `random` with a fixed seed.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from corpora.errors import UserError
from corpora.fetch import prepare_directory
from corpora.readers import read_documents
from corpora.tokens import text_hash

__all__ = ["ITEMS", "make_items", "prepare_sample_tasks"]

ITEMS = 40  # of each task
SHOTS = 8  # of gsm8k, shown before the question
SEED = 0
# Of all items as JSON: everybody's sample is the same.
ITEMS_SHA256 = "71e55242510c43f5683f3316b92fa6c12f1a00feca88cad155e510d5a7958ada"

Row = dict[str, Any]
WORD = re.compile(r"[A-Za-z]{5,}")
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{3,}")  # capitalised inside a sentence


def prepare_sample_tasks(target: Path, text: Path) -> bool:
    """Write {task}/{split}.jsonl below `target` from the sample's evaluation text; returns whether it had to."""

    def build(directory: Path) -> dict[str, Any]:
        items = make_items(list(read_documents(text)))
        found = text_hash(json.dumps(items, sort_keys=True))
        if found != ITEMS_SHA256:
            raise UserError(
                f"the items made from {text} have SHA-256 {found}, expected {ITEMS_SHA256}: the sample text is "
                "another one; prepare it again (bash scripts/prepare/data.sh sample)"
            )
        for name, splits in items.items():
            for split, rows in splits.items():
                path = directory / name / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return {
            "name": "items made by rule from the sample text: no benchmark",
            "items_sha256": found,
            "licence": "CC BY-SA 3.0 and GFDL, as the text",
        }

    return prepare_directory(target, build, lambda note: note.get("items_sha256") == ITEMS_SHA256)


def make_items(articles: list[str]) -> dict[str, dict[str, list[Row]]]:
    """Rows by task and split, in the hub's columns. Raises UserError if the text is too short for the rules."""
    rules: dict[str, tuple[str, Callable[[list[list[str]], random.Random], Iterator[Row]]]] = {
        "lambada_openai": ("test", _lambada),
        "hellaswag": ("validation", _hellaswag),
        "openbookqa": ("test", _openbookqa),
        "arc_easy": ("test", _arc_easy),
        "arc_challenge": ("test", _arc_challenge),
        "winogrande": ("validation", _winogrande),
        "boolq": ("validation", _boolq),
        "piqa": ("validation", _piqa),
    }
    sentences = [_sentences(article) for article in articles]
    items: dict[str, dict[str, list[Row]]] = {}
    for name, (split, rule) in rules.items():
        generator = random.Random(f"{SEED} {name}")
        order = [s for s in sentences if len(s) >= 4]
        generator.shuffle(order)
        rows: list[Row] = []
        for row in rule(order, generator):
            rows.append(row)
            if len(rows) == ITEMS:
                break
        else:
            raise UserError(f"the text gives only {len(rows)} of {ITEMS} items of {name}; use a longer one")
        items[name] = {split: rows}
    problems = list(_arithmetic(random.Random(f"{SEED} gsm8k"), ITEMS + SHOTS))
    items["gsm8k"] = {"test": problems[:ITEMS], "train": problems[ITEMS:]}
    return items


def _sentences(article: str) -> list[str]:
    """Plain sentences of 8 to 40 words, in order; headings and lists have no full stop and fall out."""
    sentences = []
    for paragraph in article.split("\n"):
        for sentence in re.split(r"(?<=[a-z)]\.) (?=[A-Z])", paragraph.strip()):
            if sentence.endswith(".") and 8 <= len(sentence.split()) <= 40 and "\t" not in sentence:
                sentences.append(sentence)
    return sentences


def _shuffled(right: str, wrong: list[str], generator: random.Random) -> tuple[list[str], int]:
    """The choices in a random order, and where the right one is."""
    choices = [right, *wrong]
    generator.shuffle(choices)
    return choices, choices.index(right)


def _last_word(sentence: str) -> str:
    return sentence[:-1].split()[-1]


def _lambada(articles: list[list[str]], generator: random.Random) -> Iterator[Row]:
    for sentences in articles:
        for i in range(len(sentences) - 2):
            text = " ".join(sentences[i : i + 3])
            word = _last_word(text)
            if WORD.fullmatch(word) and text.count(word) > 1:
                yield {"text": text[:-1]}  # without the full stop: the last word is what is asked for
                break


def _hellaswag(articles: list[list[str]], generator: random.Random) -> Iterator[Row]:
    for index, sentences in enumerate(articles):
        i = generator.randrange(len(sentences) - 1)
        words = sentences[i + 1].split()
        half = len(words) // 2
        others = [generator.choice(articles[(index + k) % len(articles)]).split() for k in (1, 2, 3)]
        endings, label = _shuffled(
            " ".join(words[half:]), [" ".join(other[len(other) // 2 :]) for other in others], generator
        )
        start = " ".join(words[:half])
        yield {
            "ind": index,
            "activity_label": "Encyclopedia",
            "ctx_a": sentences[i],
            "ctx_b": start,
            "ctx": f"{sentences[i]} {start}",
            "endings": endings,
            "source_id": "sample",
            "split": "val",
            "split_type": "indomain",
            "label": str(label),
        }


def _choice_row(index: int, question: str, right: str, wrong: list[str], generator: random.Random) -> Row:
    choices, label = _shuffled(right, wrong, generator)
    return {
        "id": f"sample-{index}",
        "question": question,
        "question_stem": question,
        "choices": {"text": choices, "label": list("ABCD")},
        "answerKey": "ABCD"[label],
    }


def _openbookqa(articles: list[list[str]], generator: random.Random) -> Iterator[Row]:
    last = [[w for s in sentences if WORD.fullmatch(w := _last_word(s))] for sentences in articles]
    for index, sentences in enumerate(articles):
        candidates = [s for s in sentences if WORD.fullmatch(_last_word(s))]
        others = [generator.choice(words) for k in range(1, 8) if (words := last[(index + k) % len(last)])]
        if candidates:
            sentence = generator.choice(candidates)
            word = _last_word(sentence)
            wrong = [w for w in dict.fromkeys(others) if w != word][:3]
            if len(wrong) == 3:
                yield _choice_row(index, sentence[: -len(word) - 2], word, wrong, generator)


def _missing_word(sentence: str, generator: random.Random) -> tuple[str, str]:
    """A sentence with one long lower-case word replaced by a gap, and the word; two empty texts if it has none."""
    words = [w for w in WORD.findall(sentence) if w.islower()]
    if not words:
        return "", ""
    word = generator.choice(words)
    return re.sub(rf"\b{word}\b", "____", sentence, count=1), word


def _gap_items(articles: list[list[str]], generator: random.Random, near: Callable[[str, str], bool]) -> Iterator[Row]:
    for index, sentences in enumerate(articles):
        gap, word = _missing_word(generator.choice(sentences), generator)
        pool = sorted({w for s in sentences for w in WORD.findall(s) if w.islower() and w not in gap and w != word})
        pool = [w for w in pool if near(w, word)]
        if word and len(pool) >= 3:
            question = f"Which word is missing in the sentence: {gap}"
            yield _choice_row(index, question, word, generator.sample(pool, 3), generator)


def _arc_easy(articles: list[list[str]], generator: random.Random) -> Iterator[Row]:
    yield from _gap_items(articles, generator, lambda other, word: True)
    yield from _gap_items(articles, generator, lambda other, word: True)


def _arc_challenge(articles: list[list[str]], generator: random.Random) -> Iterator[Row]:
    def near(other: str, word: str) -> bool:
        return abs(len(other) - len(word)) <= 1

    for _ in range(4):
        yield from _gap_items(articles, generator, near)


def _winogrande(articles: list[list[str]], generator: random.Random) -> Iterator[Row]:
    for _ in range(4):
        for sentences in articles:
            sentence = generator.choice(sentences)
            names = NAME.findall(sentence)
            pool = sorted({n for s in sentences for n in NAME.findall(s) if n not in sentence})
            if not names or not pool:
                continue
            name = generator.choice(names)
            options, label = _shuffled(name, [generator.choice(pool)], generator)
            gap = re.sub(rf"\b{name}\b", "_", sentence, count=1)
            if gap.count("_") != 1:  # a part of a word ("PlayStation"), or a gap that was there
                continue
            yield {
                "sentence": gap,
                "option1": options[0],
                "option2": options[1],
                "answer": str(label + 1),
            }


def _boolq(articles: list[list[str]], generator: random.Random) -> Iterator[Row]:
    label = 0
    for start in (0, 4, 8):
        for index, sentences in enumerate(articles):
            passage = " ".join(sentences[start : start + 4])
            other = articles[(index + 1) % len(articles)]
            names = sorted(set(NAME.findall(passage)))
            strange = sorted({n for s in other for n in NAME.findall(s) if n not in passage})
            if names and strange:
                name = generator.choice(names if label else strange)
                yield {"question": f"does the passage mention {name}", "passage": passage, "idx": index, "label": label}
                label = 1 - label


def _piqa(articles: list[list[str]], generator: random.Random) -> Iterator[Row]:
    for sentences in articles:
        words = generator.choice(sentences)[:-1].split()
        half = len(words) // 2
        mixed = words[half:]
        generator.shuffle(mixed)
        if mixed != words[half:]:
            solutions, label = _shuffled(" ".join(words[half:]), [" ".join(mixed)], generator)
            yield {"goal": " ".join(words[:half]), "sol1": solutions[0], "sol2": solutions[1], "label": label}


def _arithmetic(generator: random.Random, count: int) -> Iterator[Row]:
    things = ("apples", "books", "stamps", "marbles", "coins", "shells")
    people = ("Ada", "Bela", "Carla", "Dan", "Ema", "Finn")
    for _ in range(count):
        who, what = generator.choice(people), generator.choice(things)
        boxes, each, more = generator.randint(2, 9), generator.randint(2, 12), generator.randint(1, 30)
        first, total = boxes * each, boxes * each + more
        yield {
            "question": f"{who} has {boxes} boxes with {each} {what} in each, and finds {more} more {what}. How many "
            f"{what} does {who} have now?",
            "answer": f"In the boxes there are {boxes} * {each} = <<{boxes}*{each}={first}>>{first} {what}.\n"
            f"Together that makes {first} + {more} = <<{first}+{more}={total}>>{total} {what}.\n#### {total}",
        }
