"""Small questions of every category, and a chat template for tiny tokenizers."""

import json
from pathlib import Path

from corpora.json_lines import read_lines
from eval.mtbench.answers import CATEGORIES, Question, temperature_of

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
