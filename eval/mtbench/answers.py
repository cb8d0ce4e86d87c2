"""MT-bench answers (Zheng et al., NeurIPS 2023, arXiv:2306.05685), in FastChat's files.

Two turns a question, each turn's prompt is the whole dialogue so far. The temperature is the category's; below 1e-4
decoding is greedy. An answer ends at a stop token, at `max_new_tokens`, or where the model's context does; which one
is kept beside it.

Departs from the published code, whose seed was reset before every question: a token is drawn with a generator seeded
from (seed, question, choice, turn), one uniform number a token, on the CPU. So an answer depends neither on the order
of the questions, nor on the batch it is made in (up to the rounding of a padded batch), nor on the device's generator.
Top-k, top-p and min-p are those of the model's generation_config, as `generate` would apply them.
"""

import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from corpora.errors import UserError
from corpora.json_lines import read_lines
from corpora.paths import CHECKOUT
from eval.generation import Generation
from eval.mtbench.chat_templates import ChatTemplate
from eval.mtbench.forms import TURNS, MadeLine, QuestionLine
from eval.mtbench.json_lines import Lines
from intactkv.attach import IntactModel

__all__ = [
    "ANSWERS",
    "CATEGORIES",
    "QUESTION_SETS",
    "TEMPERATURES",
    "Answer",
    "Answerer",
    "Question",
    "behind_prefix",
    "data_folder",
    "question_file",
    "read_questions",
    "temperature_of",
]

TEMPERATURES = {  # FastChat's temperature_config
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
CATEGORIES = tuple(TEMPERATURES)
OTHER_TEMPERATURE = 0.7  # of a category that is not in the table
GREEDY = 1e-4  # below this temperature nothing is drawn
CHOICE = 0  # one answer a question
QUESTION_SETS = ("sample", "mt_bench")


# questions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question of two turns."""

    id: int
    category: str
    turns: tuple[str, ...]


def data_folder(name: str) -> Path:
    """Where the questions, reference answers and judge prompts of a set lie: fastchat/data/NAME of the checkout."""
    return CHECKOUT / "fastchat" / "data" / name


def question_file(word: str) -> Path:
    """The file of a question set by name, or the file itself. Raises UserError if it is not there."""
    path = data_folder(word) / "question.jsonl" if word in QUESTION_SETS else Path(word)
    if path.is_file():
        return path
    if word == "mt_bench":
        raise UserError(
            f"the published questions are missing: {path}; run 'bash scripts/prepare/mtbench.sh' where GitHub can be "
            "reached, or use --questions sample"
        )
    raise UserError(f"--questions {word}: there is no such file; give {', '.join(QUESTION_SETS)} or a question.jsonl")


def read_questions(path: Path) -> list[Question]:
    """Questions in FastChat's form, by their ids. Raises UserError for a damaged file."""
    questions: dict[int, Question] = {}
    for row in read_lines(path, "the file of questions", QuestionLine):
        number = row["question_id"]
        if number in questions:
            raise UserError(f"the file of questions {path} has question {number} twice; mend the file")
        questions[number] = Question(number, row["category"], tuple(row["turns"]))
    return [questions[number] for number in sorted(questions)]


def temperature_of(category: str) -> float:
    """FastChat's temperature of a category."""
    return TEMPERATURES.get(category, OTHER_TEMPERATURE)


def behind_prefix(
    template: ChatTemplate, questions: Sequence[Question], lead: Sequence[int], prepend: bool
) -> ChatTemplate:
    """The template whose prompts start with the prefix ids `lead`: the same one if they do anyway.

    prepend: put the ids in front where they do not. Raises UserError if they do not and that is not wanted, or if a
    prompt is nothing but the prefix, which leaves no token to feed.
    """
    template.check()
    lead = list(lead)
    for question in questions:
        ids = template.ids(question.turns[:1])
        if ids == lead:
            raise UserError(
                f"the dialogue of question {question.id} in the template {template.name} is nothing but the prefix; "
                "use a shorter --prefix"
            )
        if ids[: len(lead)] != lead and not prepend:
            raise UserError(
                f"the dialogue of question {question.id} in the template {template.name} does not start with the "
                "prefix's tokens; use --prefix prompt or bos, the --template that the prefix was made for, or "
                "--prepend to put it in front"
            )
        if ids[: len(lead)] != lead:
            return template.behind(lead)
    return template


# answers --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One turn of the model. stopped: by a stop token ("end"), max_new_tokens ("length") or its "context"."""

    text: str
    tokens: int
    stopped: str


ANSWERS = Lines("a file of answers that `python -m eval mtbench` made", MadeLine, lambda line: line["question_id"])


def row_generator(seed: int, question: int, turn: int) -> torch.Generator:
    """The stream of random numbers of one turn, from (seed, question, choice, turn)."""
    digest = hashlib.sha256(f"{seed}/{question}/{CHOICE}/{turn}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class RowSampler(LogitsProcessor):
    """Draws the next token of every row from its own generator and leaves only that token to the greedy choice.

    Rows without a generator pass as they are. The token is where the cumulated probabilities first exceed a uniform
    number, so one number is used up a token whatever the vocabulary and the other rows are.
    """

    def __init__(self, generators: Sequence[torch.Generator | None], warpers: Sequence[LogitsProcessorList]) -> None:
        self.generators, self.warpers = generators, warpers

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """input_ids: (B, L); scores: (B, vocabulary). Returns scores of the same shape."""
        chosen = scores.clone()
        for row, (generator, warpers) in enumerate(zip(self.generators, self.warpers, strict=True)):
            if generator is None:
                continue
            warped = warpers(input_ids[row : row + 1], scores[row : row + 1].float())[0]
            cumulated = warped.double().softmax(-1).cumsum(-1)
            uniform = torch.rand(1, generator=generator, dtype=torch.float64).to(cumulated.device)
            token = torch.searchsorted(cumulated, uniform * cumulated[-1], right=True)
            chosen[row] = float("-inf")
            chosen[row, token.clamp_max(scores.shape[-1] - 1)] = 0.0
        return chosen


def warpers_of(own: Generation, temperature: float) -> LogitsProcessorList:
    """What shapes the distribution before a token is drawn, in the order of `generate`; nothing where none is."""
    warpers = LogitsProcessorList()
    if temperature >= GREEDY:
        warpers.append(TemperatureLogitsWarper(temperature))
        if own.top_k:
            warpers.append(TopKLogitsWarper(own.top_k))
        if own.top_p is not None and own.top_p < 1:
            warpers.append(TopPLogitsWarper(own.top_p))
        if own.min_p is not None:
            warpers.append(MinPLogitsWarper(own.min_p))
    return warpers


class Answerer:
    """A model that answers questions. context: positions it has, None if that is not known. generation: its own
    settings, the only ones that it generates by."""

    def __init__(
        self,
        model: IntactModel,
        template: ChatTemplate,
        generation: Generation,
        *,
        seed: int,
        max_new_tokens: int,
        context: int | None,
    ) -> None:
        self.model, self.template, self.seed = model, template, seed
        self.max_new_tokens, self.context = max_new_tokens, context
        self.own = generation
        generation.rule(model.model)

    def lines(self, questions: Sequence[Question], model_id: str) -> list[dict[str, Any]]:
        """The lines of a batch of questions, in FastChat's form, with the tokens and the end of every turn."""
        dialogues: list[list[str]] = [[] for _ in questions]
        answers: list[list[Answer]] = [[] for _ in questions]
        for turn in range(TURNS):
            for dialogue, question in zip(dialogues, questions, strict=True):
                dialogue.append(question.turns[turn])
            for i, answer in enumerate(self._turn(questions, dialogues, turn)):
                dialogues[i].append(answer.text)
                answers[i].append(answer)
        return [
            {
                "question_id": question.id,
                "answer_id": secrets.token_urlsafe(16),
                "model_id": model_id,
                "choices": [{"index": CHOICE, "turns": [answer.text for answer in turns]}],
                "tstamp": time.time(),
                "tokens": [answer.tokens for answer in turns],
                "stopped": [answer.stopped for answer in turns],
            }
            for question, turns in zip(questions, answers, strict=True)
        ]

    def _turn(self, questions: Sequence[Question], dialogues: list[list[str]], turn: int) -> list[Answer]:
        """One turn of every dialogue."""
        temperatures = [temperature_of(question.category) for question in questions]
        generators = [
            None if temperature < GREEDY else row_generator(self.seed, question.id, turn)
            for question, temperature in zip(questions, temperatures, strict=True)
        ]
        return self.complete([self.template.ids(dialogue) for dialogue in dialogues], temperatures, generators)

    def complete(
        self,
        prompts: Sequence[list[int]],
        temperatures: Sequence[float],
        generators: Sequence[torch.Generator | None],
    ) -> list[Answer]:
        """What the model says to each prompt. Rows without a generator are greedy.

        Rows that have the same room for an answer share a batch: one near the end of the context would be pushed beyond
        it by the longer answers of others. So do only rows of one length, where the model stands no pads.
        """
        answers = [Answer("", 0, "context")] * len(prompts)  # of a prompt that leaves no room
        rooms: dict[tuple[int, int], list[int]] = {}
        for i, prompt in enumerate(prompts):
            room = self.max_new_tokens if self.context is None else min(self.max_new_tokens, self.context - len(prompt))
            if room > 0:
                rooms.setdefault((room, len(prompt) if self.model.pads_shift else 0), []).append(i)
        for (room, _), rows in rooms.items():
            sampler = RowSampler([generators[i] for i in rows], [warpers_of(self.own, temperatures[i]) for i in rows])
            generated = self._generate([prompts[i] for i in rows], room, LogitsProcessorList([sampler]))
            for i, ids in zip(rows, generated, strict=True):
                answers[i] = self.cut(ids, room)
        return answers

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], room: int, processors: LogitsProcessorList) -> list[list[int]]:
        """The new tokens of every prompt, pads and all that follows a stop token included."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.own.pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        sequences = self.model.generate(
            ids,
            mask,
            do_sample=False,  # the processors have drawn already
            max_new_tokens=room,
            logits_processor=processors,
        )
        return sequences[:, longest:].tolist()

    def cut(self, ids: list[int], room: int) -> Answer:
        """The answer in new tokens: cut at the first stop token, special tokens' texts deleted, stripped."""
        end = next((i for i, token in enumerate(ids) if token in self.own.stops), None)
        text = self.template.tokenizer.decode(ids[:end])
        for special in sorted(filter(None, self.template.tokenizer.all_special_tokens), key=len, reverse=True):
            text = text.replace(special, "")
        full = "length" if room == self.max_new_tokens else "context"
        return Answer(text.strip(), len(ids) if end is None else end + 1, full if end is None else "end")
