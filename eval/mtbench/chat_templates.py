"""Dialogues as token ids: FastChat's vicuna_v1.1 spelled out here, the tokenizer's own chat template for all others.

    [BOS] system + " USER: " + question + " ASSISTANT:" [+ " " + answer + "</s>" + "USER: " + question + " ASSISTANT:"]…

Every prompt opens with exactly one start token, whoever puts it there: the text is tokenized without special tokens of
the tokenizer's own, and the start token is added only where the template does not spell it. So the prompt of every turn
starts with the ids of IntactKV_[P].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from corpora.chat import TODAY, asks_the_clock, rendered, template_source
from corpora.errors import UserError
from corpora.sharegpt import VICUNA_SYSTEM
from corpora.storage import identity
from corpora.tokens import encode, start_token_id, text_hash, tokenizer_fingerprint

__all__ = ["TEMPLATES", "ChatTemplate", "chat_template", "vicuna_text"]

WORDS = ("apples", "pears", "plums")  # turns of a dialogue that a template must write
WAY_OUT = "choose --template vicuna_v1.1, or mend the template"
TEMPLATES = ("auto", "vicuna_v1.1", "tokenizer")


@dataclass(frozen=True)
class ChatTemplate:
    """How a dialogue becomes text. text: of turns, the user's and the model's in turn, the last one the user's.

    lead: tokens that are put in front of a prompt which does not start with them.
    """

    name: str
    tokenizer: Any
    text: Callable[[Sequence[str]], str]
    lead: tuple[int, ...] = ()

    def describe(self) -> dict[str, Any]:
        """What decides a prompt besides the dialogue, for records: an edit of the template or the tokenizer shows here.

        prompt: of the ids of a dialogue, in which also special tokens and what a template includes show.
        """
        own = self.name == "tokenizer"
        clock = {"date": TODAY.date().isoformat()} if own and asks_the_clock(self.tokenizer) else {}
        return {
            "template": self.name,
            "template_source": text_hash(template_source(self.tokenizer) or "") if own else None,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "prompt": identity({"ids": self.ids(["What is a prefix?"])}),
            **clock,
        }

    def check(self) -> None:
        """Raise UserError for a template that leaves out a turn of a dialogue: its answers would be to no question."""
        for turns in (WORDS[:1], WORDS):
            told = self.text(turns).lower()
            for what, word in zip(("question", "answer", "second question"), turns, strict=False):
                if word not in told:
                    raise UserError(
                        f"the chat template of {self.tokenizer.name_or_path or 'the tokenizer'} writes a dialogue "
                        f"without its {what}; {WAY_OUT}"
                    )

    def behind(self, lead: Sequence[int]) -> "ChatTemplate":
        """The same template with other tokens in front."""
        return replace(self, lead=tuple(lead))

    def ids(self, turns: Sequence[str]) -> list[int]:
        """The prompt for the model's next turn: one start token in front, none of it twice.

        Raises UserError if the tokenizer's template cannot write these turns.
        """
        ids, start = encode(self.tokenizer, self.text(turns)), start_token_id(self.tokenizer)
        while ids[:2] == [start, start]:  # a template that spells it and a text that brings it, too
            ids = ids[1:]
        ids = ids if ids[:1] == [start] else [start, *ids]
        if tuple(ids[: len(self.lead)]) == self.lead:
            return ids
        return [*self.lead, *(ids[1:] if start in self.lead else ids)]


def vicuna_text(turns: Sequence[str], end: str = "</s>") -> str:
    """FastChat's vicuna_v1.1: the end token closes an answer, and no space parts it from the next turn."""
    text = f"{VICUNA_SYSTEM} "
    for i, turn in enumerate(turns):
        text += f"USER: {turn} " if i % 2 == 0 else f"ASSISTANT: {turn}{end}"
    return f"{text}ASSISTANT:"


def chat_template(word: str, tokenizer: Any, model_name: str) -> ChatTemplate:
    """The template that a word of `TEMPLATES` stands for; auto: vicuna_v1.1 for Vicuna, else the tokenizer's own.

    Raises UserError if the tokenizer has no template of its own, or no end token for Vicuna's.
    """
    if word == "auto":
        word = "vicuna_v1.1" if "vicuna" in model_name.lower() else "tokenizer"
    if word == "vicuna_v1.1":
        end = tokenizer.eos_token
        if end is None:
            raise UserError(
                f"the tokenizer of {model_name} has no EOS token to close an answer in vicuna_v1.1; set eos_token in "
                "its tokenizer_config.json"
            )
        return ChatTemplate(word, tokenizer, lambda turns: vicuna_text(turns, end))
    if template_source(tokenizer) is None:
        raise UserError(
            f"the tokenizer of {model_name} has no chat template; put chat_template.jinja of its chat model beside it, "
            "or choose --template vicuna_v1.1"
        )
    return ChatTemplate(word, tokenizer, lambda turns: rendered(tokenizer, turns, opened=True, way_out=WAY_OUT))
