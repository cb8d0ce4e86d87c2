"""What a judge says behind its reasoning: a verdict that it considers there is none.

Models write their reasoning between two marks in front of the answer, or their prompt holds the first mark and they
write the second alone. A server that knows a model's marks takes the reasoning out by itself.
"""

import re

__all__ = ["CLOSINGS", "left_open", "opened_at_the_end", "spoken"]

TAGS = "think|thinking|thought|thoughts|reason|reasoning|reflection|analysis|scratchpad|seed:think"
# What opens, what closes, and how the latter is written; a group is the tag that both have.
MARKS = (
    (rf"<(?P<tag>{TAGS})(?:\s[^<>]*)?>", rf"</(?P<end>{TAGS})\s*>", "</{}>"),
    (r"\[THINK\]", r"\[/THINK\]", "[/THINK]"),  # Mistral
    (r"◁think▷", r"◁/think▷", "◁/think▷"),  # Kimi
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>", "<|end_of_thought|>"),
    # gpt-oss
    (r"<\|channel\|>(?:analysis|commentary)", r"<\|channel\|>final<\|message\|>", "<|channel|>final<|message|>"),
)
CLOSINGS = tuple(dict.fromkeys(mark.format(tag) for *_, mark in MARKS for tag in TAGS.split("|")))
_ANY = re.compile("|".join(f"(?P<open{i}>{a})|(?P<close{i}>{b})" for i, (a, b, _) in enumerate(MARKS)), re.IGNORECASE)


def _told(found: re.Match[str]) -> tuple[bool, str]:
    """Whether a mark opens reasoning, and the mark that closes it, or is it."""
    (name,) = (name for name, mark in found.groupdict().items() if mark and name[-1].isdigit())
    return name.startswith("open"), MARKS[int(name[-1])][2].format((found["tag"] or found["end"] or "").lower())


def _read(text: str) -> tuple[str, str]:
    """What stands outside the reasoning, and the mark that an unfinished one lacks ("" if there is none).

    Unfinished reasoning begins a line; within one, a mark without its other half is a word of the answer.
    """
    parts: list[str] = []
    at, missing = 0, ""
    marks = [(found, *_told(found)) for found in _ANY.finditer(text)]
    for number, (found, opens, closing) in enumerate(marks):
        if opens and not missing:
            ends = any(not other and mark == closing for _, other, mark in marks[number + 1 :])
            if not ends and text[: found.start()].rpartition("\n")[2].strip():
                continue  # a word about such a mark, as of one in the answer that is judged
            parts.append(text[at : found.start()])
            missing = closing
        elif not opens and closing == missing:
            missing, at = "", found.end()
        elif not opens and not missing:  # the prompt opened it
            parts, at = [], found.end()
    return "".join(parts if missing else [*parts, text[at:]]), missing


def spoken(text: str) -> str:
    """A text without reasoning; an unfinished one takes all that follows with it."""
    return _read(text)[0]


def left_open(text: str) -> str:
    """The mark that would close a text's reasoning; "" where none is open."""
    return _read(text)[1]


def opened_at_the_end(prompt: str) -> str:
    """The mark of reasoning that a prompt ends with; "" if it does not."""
    found = [mark for mark in _ANY.finditer(prompt) if not prompt[mark.end() :].strip()]
    return found[-1][0] if found and left_open(found[-1][0]) else ""
