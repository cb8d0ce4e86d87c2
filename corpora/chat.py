"""The one call of a tokenizer's chat template, and the one answer to what can go wrong in it.

A template is a program from elsewhere: it may raise, and it may ask what day it is (LLaMA 3.1 and later do). Prompts,
prefixes and answers of two days must be the same text, so its clock always shows `TODAY`, the day that LLaMA's own
templates take where there is no clock.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from corpora.errors import UserError, said_by

__all__ = ["TODAY", "asks_the_clock", "rendered", "template_source"]

TODAY = datetime(2024, 7, 26)


def template_source(tokenizer: Any) -> str | None:
    """The text of a tokenizer's chat template, None if it has none.

    Raises UserError for several named ones of which none is the default, and for what is no text.
    """
    source = tokenizer.chat_template
    if isinstance(source, Mapping) and source:
        if "default" not in source:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has the chat templates {', '.join(map(str, source))}, and "
                "none is called default; name the one that is meant so, or put it into chat_template.jinja"
            )
        source = source["default"]
    if source and not isinstance(source, str):
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has a chat template that is no text but a "
            f"{type(source).__name__}; mend it, or put it into chat_template.jinja"
        )
    return source or None


def asks_the_clock(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template may print the date."""
    return "strftime_now" in (template_source(tokenizer) or "")


def rendered(tokenizer: Any, turns: Sequence[str], *, opened: bool, way_out: str) -> str:
    """Alternating turns, the user's first, as the tokenizer's chat template writes them.

    opened: whether the model's next turn is opened. way_out: what the user can do about a template that fails, for the
    UserError which that raises. The tokenizer must have a template.
    """
    from jinja2 import TemplateError

    template_source(tokenizer)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    try:
        with _stopped_clock():
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    except (TemplateError, ArithmeticError, AttributeError, ImportError, LookupError, RecursionError, TypeError,
            ValueError) as error:  # fmt: skip
        turn = "1 turn" if len(turns) == 1 else f"{len(turns)} turns"
        raise UserError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} cannot write a dialogue of {turn} "
            f"({said_by(error)}); {way_out}"
        ) from None
    return str(text)


class _Clock:
    """Stands where transformers' templates look for the time: a function that is handed to them does not reach them."""

    @staticmethod
    def now() -> datetime:
        return TODAY


@contextmanager
def _stopped_clock() -> Iterator[None]:
    from transformers.utils import chat_template_utils

    templates: Any = chat_template_utils
    clock = templates.datetime
    templates.datetime = _Clock
    try:
        yield
    finally:
        templates.datetime = clock
