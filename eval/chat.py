"""A conversation with one model, turn by turn: the past stays in the cache and is not fed again.

    prompt of turn t  = chat template (question 1, answer 1, …, question t), one start token in front
    fed               = its tokens behind those that the cache holds, if it starts with them; else all of them

The template may write the past in other tokens than the model saw (some drop spaces, or what a model thought): then
the whole dialogue is fed again. In both cases the model reads the tokens of the rendered dialogue.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import torch
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList, TextStreamer
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError
from corpora.json_files import Count, Hash
from eval.generation import Generation
from eval.mtbench.answers import GREEDY, RowSampler, row_generator, warpers_of
from eval.mtbench.chat_templates import ChatTemplate
from eval.record_forms import Reference, Said
from intactkv.attach import IntactModel
from intactkv.cache import IntactCache
from intactkv.store import Memory

__all__ = ["PROMPTS", "Conversation", "Said", "Transcript", "cache_state", "divergences", "first_divergence",
           "weight_bytes"]  # fmt: skip

# Of the published chat examples, in words of this project: what is asked is the same.
PROMPTS = {
    "riddle": "In a race you overtake the runner who is third. Which place are you in now, and which place is that "
    "runner in?",
    "distillation": "What is knowledge distillation in machine learning? Give a definition.",
}


class Transcript(TypedDict):
    """A conversation as a file."""

    format: Literal[1]
    settings: dict[str, Any]
    weight_bytes: Count
    answers: list[Said]
    started: str
    environment: dict[str, Any]
    sha256: Hash


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def cache_state(cache: IntactCache) -> tuple[int, float]:
    """Bytes that a cache holds, the prefix's included, and the share of the elements behind it that is rounded."""
    told = cache.memory()
    sides = [part for part in told.values() if isinstance(part, Memory)]
    prefix = sum(part for part in told.values() if isinstance(part, int))
    elements = sum(side.elements for side in sides)
    rounded = sum(side.rounded_elements for side in sides)
    return prefix + sum(side.bytes for side in sides), rounded / elements if elements else 0.0


class _Told(TextStreamer):
    """Hands the text on in whole words, and notes when the first token came."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.say = say
        self.first: float | None = None

    def put(self, value: Any) -> None:
        """Take tokens; the first ones are the prompt."""
        if not self.next_tokens_are_prompt and self.first is None:
            self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Say what is whole."""
        self.say(text)


@dataclass
class Conversation:
    """A model, how it is asked, and what was said. context: positions of the model, None if that is not known;
    temperature: 0 is greedy, else every answer is drawn from (seed, dialogue, turn)."""

    model: IntactModel
    template: ChatTemplate
    generation: Generation
    max_new_tokens: int
    context: int | None = None
    temperature: float = 0.0
    seed: int = 0
    dialogue: int = 1
    turns: list[str] = field(default_factory=list)
    cache: IntactCache | None = None

    def __post_init__(self) -> None:
        self.generation.rule(self.model.model)

    def reset(self) -> None:
        """Begin anew; nothing is forgotten where nothing was said."""
        if self.turns:
            self.dialogue += 1
        self.turns, self.cache = [], None

    @torch.inference_mode()
    def answer(
        self, line: str, say: Callable[[str], None] = lambda text: None, ended: Callable[[], bool] = lambda: False
    ) -> Said:
        """What the model answers. say: gets the text as it is made; ended: whether the answer shall end now.

        Raises UserError for a dialogue that leaves no room for an answer; it then stays as it was.
        """
        ids = self.template.ids([*self.turns, line])
        room = self.max_new_tokens if self.context is None else min(self.max_new_tokens, self.context - len(ids))
        if room < 1:
            raise UserError(
                f"the dialogue has {len(ids)} tokens and the model {self.context} positions, which leaves none for an "
                "answer; /reset begins a new one"
            )
        held = self._held(ids)
        past, self.cache = (self.cache if held else None), None  # an answer that fails leaves no half of one
        started, told = time.perf_counter(), _Told(self.template.tokenizer, say)
        output = self.model.generate(
            torch.tensor([ids]),
            past_key_values=past,
            max_new_tokens=room,
            do_sample=False,  # the processor has drawn already
            logits_processor=LogitsProcessorList([self._sampler()]),
            stopping_criteria=StoppingCriteriaList([lambda ids, *_, **__: torch.full((len(ids),), ended())]),
            streamer=told,
            return_dict_in_generate=True,
        )
        seconds = time.perf_counter() - started
        self.cache = output.past_key_values
        new = output.sequences[0, len(ids) :].tolist()
        text, (held_bytes, share) = self._text(new), cache_state(self.cache)
        self.turns += [line, text]
        return Said(
            dialogue=self.dialogue,
            user=line,
            answer=text,
            ids=new,
            stopped=self._stopped(new, room),
            prompt=len(ids),
            fed=len(ids) - max(held, self.model.prefix_length),
            seconds=round(seconds, 4),
            seconds_to_first=round((told.first or started) - started, 4),
            quantized=share,
            cache_bytes=held_bytes,
        )

    def _held(self, ids: Sequence[int]) -> int:
        """How many tokens of a prompt the cache of the last answer holds, if it begins with all of these; else 0."""
        if self.cache is not None and self.cache.tokens is not None:
            held = self.cache.tokens[0, : self.cache.get_seq_length()].tolist()
            if len(held) < len(ids) and list(ids[: len(held)]) == held:
                return len(held)
        return 0

    def _sampler(self) -> RowSampler:
        drawn = self.temperature >= GREEDY
        generator = row_generator(self.seed, self.dialogue, len(self.turns) // 2) if drawn else None
        return RowSampler([generator], [warpers_of(self.generation, self.temperature)])

    def _text(self, new: Sequence[int]) -> str:
        """The answer without what ends it, as the next prompt spells it."""
        end = next((i for i, token in enumerate(new) if token in self.generation.stops), None)
        return str(self.template.tokenizer.decode(new[:end], skip_special_tokens=True,
                                                  clean_up_tokenization_spaces=False))  # fmt: skip

    def _stopped(self, new: Sequence[int], room: int) -> Literal["end", "length", "context", "interrupted"]:
        if new[-1] in self.generation.stops:
            return "end"
        if len(new) < room:
            return "interrupted"
        return "length" if room == self.max_new_tokens else "context"


def first_divergence(ids: Sequence[int], others: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ, the end of the shorter one included; None if in none."""
    if list(ids) == list(others):
        return None
    return next(i for i in count() if list(ids[i : i + 1]) != list(others[i : i + 1]))


def divergences(reference: Conversation, answers: Sequence[Said]) -> Iterator[Reference]:
    """What another model says to every line, each time behind the same past: the answers that were given.

    So each index tells of one answer alone. An answer that was interrupted is compared as far as it goes.
    """
    for said in answers:
        if said["dialogue"] != reference.dialogue:
            reference.reset()
            reference.dialogue = said["dialogue"]
        theirs = reference.answer(said["user"])
        reference.turns[-1] = said["answer"]
        ids = theirs["ids"][: len(said["ids"])] if said["stopped"] == "interrupted" else theirs["ids"]
        yield Reference(answer=theirs["answer"], ids=theirs["ids"], first_divergence=first_divergence(said["ids"], ids))
