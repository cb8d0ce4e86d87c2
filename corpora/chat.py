"""The one call of a tokenizer's chat template, and the one answer to what can go wrong in it.

A template is a program from elsewhere: it may raise, and it may ask what day it is (LLaMA 3.1 and later do). Prompts,
prefixes and answers of two days must be the same text, so its clock always shows `TODAY`, the day that LLaMA's own
templates take where there is no clock. It runs in a sandbox of transformers', which holds it from files and from
Python's insides; here it has only so many steps, so much memory and so long a text.
"""

import os
import resource
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from corpora.errors import UserError, said_by

__all__ = ["TODAY", "asks_the_clock", "rendered", "template_source"]

TODAY = datetime(2024, 7, 26)
STEPS = 1_000_000  # lines of its program that a template runs; a dialogue of twenty turns takes a few thousand
MEMORY = 1 << 30  # bytes that it may take
_ONE_AT_A_TIME = threading.Lock()  # the clock and the limit are the whole process's
LONGEST = 1 << 24  # characters that it may write besides the turns


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
        with _ONE_AT_A_TIME, _stopped_clock(), _counted_steps(), _bounded_memory():
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened))
        if len(text) > LONGEST + sum(map(len, turns)):
            raise TemplateError(f"it writes {len(text)} characters")
    except (TemplateError, ArithmeticError, AttributeError, ImportError, LookupError, MemoryError, RecursionError,
            TypeError, ValueError) as error:  # fmt: skip
        turn = "1 turn" if len(turns) == 1 else f"{len(turns)} turns"
        raise UserError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} cannot write a dialogue of {turn} "
            f"({said_by(error)}); {way_out}"
        ) from None
    return text


@contextmanager
def _counted_steps() -> Iterator[None]:
    """End what runs more than `STEPS` lines of a template: a count, unlike a time, is the same on every machine."""
    from jinja2 import TemplateError

    left = STEPS

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != "<template>":
            return None
        left -= 1
        if left < 0:
            raise TemplateError(f"it runs more than {STEPS} steps")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """End what takes more than `MEMORY`, where the system can count it."""
    usage = Path("/proc/self/statm")
    if not usage.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(usage.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


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
