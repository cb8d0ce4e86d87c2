"""What a judgement says: the grade or the winner in the judge's own words, and the means over many of them.

What the judge does not grade counts nowhere: its score is −1.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from eval.mtbench.reasoning import spoken

__all__ = ["ENDINGS", "NO_SCORE", "TURNS", "is_decided", "rating", "scores", "verdict", "winner"]

NO_SCORE = -1
HIGHEST = 10  # grade
TURNS = (1, 2)
# The lines that decide, of single-answer grading and of comparisons.
ENDINGS = {
    "single": [f"Rating: [[{grade}]]" for grade in range(1, HIGHEST + 1)],
    "pair": [f"Verdict: [[{name}]]" for name in "ABC"],
}


def rating(judgment: str) -> float:
    """The first number in double square brackets, else in single ones, else −1; −1 for one above 10, which FastChat
    takes as it is. Reasoning does not count, which FastChat reads, too."""
    judgment = spoken(judgment)
    for pattern in (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]"):
        if found := re.search(pattern, judgment):
            return grade if (grade := float(found[1])) <= HIGHEST else NO_SCORE
    return NO_SCORE


def verdict(judgment: str) -> str:
    """A, B or tie, in FastChat's order of looking; "error" if the judge names none. Reasoning does not count."""
    judgment = spoken(judgment)
    return next((name for sign, name in (("A", "A"), ("B", "B"), ("C", "tie")) if f"[[{sign}]]" in judgment), "error")


def is_decided(kind: str, judgment: str) -> bool:
    """Whether a judgement of a kind of `ENDINGS` holds a rating, or a verdict."""
    return rating(judgment) != NO_SCORE if kind == "single" else verdict(judgment) != "error"


def winner(line: dict[str, Any]) -> str:
    """The winner of a comparison: model_1 or model_2 if both orders agree, else tie; "error" if one is unscored."""
    both = {line["g1_winner"], line["g2_winner"]}
    if "error" in both:
        return "error"
    return both.pop() if len(both) == 1 else "tie"


def scores(lines: Sequence[dict[str, Any]], category_of: Callable[[int], str]) -> dict[str, Any]:
    """Means of single-answer grades over the valid lines: all, by turn, by category; None where there is none."""
    valid = [line for line in lines if line["score"] != NO_SCORE]

    def mean(chosen: Iterable[dict[str, Any]]) -> float | None:
        values = [line["score"] for line in chosen]
        return fmean(values) if values else None

    categories = list(dict.fromkeys(category_of(line["question_id"]) for line in lines))
    outcomes = [line.get("outcome", "scored" if line["score"] != NO_SCORE else "no rating") for line in lines]
    return {
        "score": mean(valid),
        "turns": {str(turn): mean(line for line in valid if line["turn"] == turn) for turn in TURNS},
        "categories": {
            name: mean(line for line in valid if category_of(line["question_id"]) == name) for name in categories
        },
        "judgements": len(lines),
        "unscored": {name: outcomes.count(name) for name in ("no rating", "empty", "refused", "failed")},
    }
