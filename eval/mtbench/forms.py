"""The forms of MT-bench's files, FastChat's and ours: what every line of them must hold to be read.

Whole numbers, texts and lists are what they say, strictly; keys that no form names stay. Names and categories stand in
tables and in messages, so they are one printable line.
"""

import string
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.json_files import Count, Hash

__all__ = [
    "TURNS",
    "AnswerLine",
    "AnswerSettings",
    "ComparisonLine",
    "GradeLine",
    "MadeLine",
    "PromptLine",
    "QuestionLine",
]

TURNS = 2  # of every question


def _label(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("is no name (one line, nothing unprintable)")
    return text


def _template(text: str) -> str:
    """A text with places such as {answer}. A format may also ask for attributes of what is filled in, or for a width of
    gigabytes: a stranger's file may not."""
    try:
        places = [place for place in string.Formatter().parse(text) if place[1] is not None]
    except ValueError as error:
        raise ValueError(f"is no template ({error}); write {{{{ and }}}} for braces") from None
    for _, name, form, conversion in places:
        if not str(name).isidentifier() or form or conversion:
            shown = str(name)[:20]
            raise ValueError(f"has the place {shown!r}; a place is a plain name such as {{answer}}, without : ! . or [")
    return text


def _of_each_turn(parts: list[Any]) -> list[Any]:
    if len(parts) != TURNS:
        raise ValueError(f"has not {TURNS} turns")
    return parts


def _some(parts: list[Any]) -> list[Any]:
    if not parts:
        raise ValueError("is empty")
    return parts


def _text(turn: str) -> str:
    if not turn.strip():
        raise ValueError("is no text")
    return turn


Label = Annotated[str, AfterValidator(_label)]
Text = Annotated[str, AfterValidator(_text)]
Score = Annotated[float, Field(allow_inf_nan=False)]
JudgeAndPrompt = Annotated[list[str], Field(min_length=2, max_length=2)]  # names
Outcome = Literal["scored", "no rating", "empty", "refused", "failed"]
Won = Literal["model_1", "model_2", "tie", "error"]


class QuestionLine(TypedDict):
    """A question."""

    question_id: Count
    category: Label
    turns: Annotated[list[Text], AfterValidator(_of_each_turn)]


class PromptLine(TypedDict):
    """A prompt of the judge."""

    name: Label
    system_prompt: str
    prompt_template: Annotated[str, AfterValidator(_template)]


class _Choice(TypedDict):
    turns: Annotated[list[str], AfterValidator(_of_each_turn)]


class AnswerLine(TypedDict):
    """An answer, of whatever program; the first choice is read."""

    question_id: Count
    choices: Annotated[list[_Choice], AfterValidator(_some)]


class MadeLine(AnswerLine):
    """An answer of ours."""

    tokens: Annotated[list[Count], AfterValidator(_of_each_turn)]
    stopped: Annotated[list[Literal["end", "length", "context"]], AfterValidator(_of_each_turn)]


class AnswerSettings(TypedDict):
    """What stands beside our answers: what they were made with."""

    model: str
    questions: str
    questions_sha256: Hash
    max_new_tokens: Count
    seed: int


class _Usage(TypedDict):
    prompt_tokens: Count
    completion_tokens: Count


class _Judgement(TypedDict):
    question_id: Count
    judge: JudgeAndPrompt
    turn: Literal[1, 2]
    outcome: NotRequired[Outcome]
    usage: NotRequired[_Usage]
    endpoint: NotRequired[str]


class GradeLine(_Judgement):
    """A grade of one answer."""

    model: str
    user_prompt: str
    judgment: str
    score: Score


class ComparisonLine(_Judgement):
    """A comparison of two answers."""

    model_1: str
    model_2: str
    g1_winner: Won
    g2_winner: Won
    g1_user_prompt: NotRequired[str]
    g1_judgment: NotRequired[str]
    g2_user_prompt: NotRequired[str]
    g2_judgment: NotRequired[str]
