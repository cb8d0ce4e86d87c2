"""MMLU in its authors' protocol, as IntactKV's tables have it (Hendrycks et al. 2021, arXiv 2009.03300).

    prompt = "The following are multiple choice questions (with answers) about  {subject}." + k examples + the question
    answer = argmax over the ids of A, B, C, D of the logits behind "Answer:"
    score  = right answers / all questions          (weighted by questions, not the mean over subjects)

Examples are dropped from the end while the prompt is longer than 2,048 tokens, its lead included; a question that is
too long by itself is cut from the left (the published code would never end) and counted.
Departs from the published code: the letters' ids are those that follow "Answer:" in the tokenizer's own encoding, which
for LLaMA's is what "A" alone encodes to, and for others the letter with its space.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from corpora.errors import UserError
from corpora.mmlu import CATEGORIES, LETTERS, SUBCATEGORIES, Question, Subject
from corpora.tokens import encode
from eval.tasks.lm import IntactLM, Request

__all__ = ["LONGEST_PROMPT", "Prompt", "answers", "figures", "fitting_prompt", "letter_ids", "prompt"]

LONGEST_PROMPT = 2048  # tokens; the published limit


def prompt(subject: str, question: Question, shots: Sequence[Question]) -> str:
    """The text that a model completes with a letter; the subject stands behind two spaces, as published."""
    header = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
    shown = "".join(f"{_open(shot)} {shot.answer}\n\n" for shot in shots)
    return header + shown + _open(question)


def _open(question: Question) -> str:
    options = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=True))
    return f"{question.question}{options}\nAnswer:"


@dataclass(frozen=True)
class Prompt:
    """Ids of a prompt, lead included; how many examples are in it; whether the question itself was cut."""

    ids: tuple[int, ...]
    shots: int
    cut: bool


def fitting_prompt(
    lm: IntactLM, subject: str, question: Question, shots: Sequence[Question], limit: int = LONGEST_PROMPT
) -> Prompt:
    """The prompt with as many of the first examples as fit `limit` tokens and the model's context.

    Raises UserError if the lead alone fills the limit.
    """
    limit = min(limit, lm.max_length)
    if len(lm.lead) >= limit:
        raise UserError(
            f"a prefix of {len(lm.lead)} tokens leaves no room for a question in a prompt of {limit}; use a shorter one"
        )
    for count in range(len(shots), -1, -1):
        ids = lm.tok_encode(prompt(subject, question, shots[:count]))
        if len(ids) <= limit:
            return Prompt(tuple(ids), count, cut=False)
    kept = ids[len(lm.lead) :][-(limit - len(lm.lead)) :]
    return Prompt((*lm.lead, *kept), 0, cut=True)


def letter_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of A, B, C and D behind "Answer:". Raises UserError if the tokenizer does not tell them apart."""
    ids = [encode(tokenizer, f"Answer: {letter}")[-1] for letter in LETTERS]
    if len(set(ids)) < len(LETTERS):
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} ends 'Answer: A' to 'Answer: D' with the ids {ids}, which do "
            "not tell the answers apart; MMLU cannot be scored by letters with it"
        )
    return ids


def answers(lm: IntactLM, prompts: Sequence[Prompt]) -> list[str]:
    """The letter that the model prefers behind each prompt."""
    letters = letter_ids(lm.tokenizer)
    requests: list[Request] = [(None, list(p.ids), [letter]) for p in prompts for letter in letters]
    scores = torch.tensor([score for score, _ in lm.score(requests)])
    best = scores.view(-1, len(letters)).argmax(dim=1).tolist() if len(scores) else []
    return [LETTERS[index] for index in best]


def figures(subjects: Sequence[Subject], right: Sequence[Tensor]) -> dict[str, Any]:
    """Scores by subject, subcategory, category and in all, each weighted by its questions.

    right: per subject (questions,) of 0 and 1. A subject that is not the benchmark's counts only in the whole.
    """
    counts = {s.name: (int(r.sum()), len(r)) for s, r in zip(subjects, right, strict=True)}
    total = sum(n for _, n in counts.values())
    accuracy = sum(c for c, _ in counts.values()) / total
    members: dict[str, list[tuple[int, int]]] = {}
    for category, subcategories in CATEGORIES.items():
        for name, count in counts.items():
            if SUBCATEGORIES.get(name) in subcategories:
                members.setdefault(category, []).append(count)
                members.setdefault(f"{category}: {SUBCATEGORIES[name]}", []).append(count)
    return {
        "metrics": {"acc": accuracy},
        "stderr": {"acc": (accuracy * (1 - accuracy) / max(1, total - 1)) ** 0.5},
        "samples": total,
        "subjects": {name: {"correct": c, "total": n} for name, (c, n) in counts.items()},
        "groups": {name: sum(c for c, _ in mine) / sum(n for _, n in mine) for name, mine in members.items()},
    }
