"""One reader for every kind of value that a word of the command line, the environment or --set stands for.

A reader takes the word and gives the value. It raises `argparse.ArgumentTypeError` with the word and what is allowed in
its place, so that argparse names the option; `from_environment` and --set name theirs. Numbers are written in ASCII
digits alone, without spaces or underscores: what Python would take beside that ("٣", "1_000", " 4", "nan") is more
likely a mistake. Only the standard library is imported here, so that a wrong word is refused at once.
"""

import argparse
import math
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from corpora.errors import UserError

__all__ = ["LARGEST_SEED", "MANY", "automatic", "count", "device", "duration", "finite", "from_environment",
           "group_size", "limit", "memory", "name", "number", "path", "plain", "real", "seed", "several", "shown",
           "size", "text", "unshown", "whole", "words"]  # fmt: skip

Value = TypeVar("Value")

MANY = 1_000_000  # the largest count: of tokens, pieces, steps, calls
LARGEST_SEED = 2**63 - 1  # kept to 63 bits: torch takes 64, also after the epochs are added
LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, on Linux
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
LONGEST_SHOWN = 60


def shown(word: str) -> str:
    """A word as a message of one line shows it: in quotes where it is empty or has other than letters and signs, and
    cut where it is long."""
    cut = word if len(word) <= LONGEST_SHOWN else f"{word[:LONGEST_SHOWN]}…"
    return cut if re.fullmatch(r"[!-~]+…?", cut) else repr(cut)


def _refuse(word: str, allowed: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"{shown(word)} is not allowed; give {allowed}")


def whole(word: str, allowed: str = "a whole number") -> int:
    """A whole number."""
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", word):
        _refuse(word, allowed)
    return int(word)


def count(least: int = 1, most: int = MANY) -> Callable[[str], int]:
    """Reader of a whole number from `least` to `most`."""
    allowed = f"a whole number from {least} to {most}"

    def read(word: str) -> int:
        value = whole(word, allowed)
        return value if least <= value <= most else _refuse(word, allowed)

    return read


def several(read: Callable[[str], Value]) -> Callable[[str], tuple[Value, ...]]:
    """Reader of values joined by commas, at least one; what is given twice counts once."""

    def read_all(word: str) -> tuple[Value, ...]:
        return tuple(dict.fromkeys(read(part) for part in word.split(",")))

    return read_all


def group_size(word: str) -> int:
    """Channels that share a grid: a positive number, or -1 for all."""
    allowed = f"a whole number from 1 to {MANY}, or -1 for one group"
    value = whole(word, allowed)
    return value if value == -1 or 1 <= value <= MANY else _refuse(word, allowed)


def seed(word: str) -> int:
    """What a random generator starts from."""
    allowed = f"a whole number from 0 to {LARGEST_SEED} (2^63 - 1)"
    value = whole(word, allowed)
    return value if 0 <= value <= LARGEST_SEED else _refuse(word, allowed)


def limit(word: str) -> str:
    """A filter by a limit: a count, or `all` for none."""
    if word != "all" and not (re.fullmatch(r"[1-9][0-9]*", word) and int(word[:20]) <= MANY):
        _refuse(word, f"a whole number from 1 to {MANY}, or all")
    return word


def real(word: str, allowed: str = "a number") -> float:
    """A number as it is written, infinity (`inf`) too; never NaN."""
    if len(word) > 400 or not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?|[+-]?inf", word):
        _refuse(word, allowed)
    value = float(word)
    # What is too large for a float is not what was meant.
    return value if math.isfinite(value) or word.endswith("inf") else _refuse(word, allowed)


def number(
    *, above: float | None = None, least: float | None = None, most: float | None = None, like: str = ""
) -> Callable[[str], float]:
    """Reader of a finite number within bounds. like: an example for the message."""
    bounds = [f"{word} {bound:g}" for word, bound in (("above", above), ("of at least", least), ("of at most", most))
              if bound is not None]  # fmt: skip
    allowed = " ".join(["a number", " and ".join(bounds)]).strip() + f", such as {like}" * bool(like)

    def read(word: str) -> float:
        value = real(word, allowed)
        within = (above is None or value > above) and (least is None or value >= least)
        return value if math.isfinite(value) and within and (most is None or value <= most) else _refuse(word, allowed)

    return read


finite = number()


def automatic(read: Callable[[str], Value]) -> Callable[[str], Value | None]:
    """Reader of what `read` takes, or of `auto`, which is None: the program chooses."""

    def read_one(word: str) -> Value | None:
        try:
            return None if word == "auto" else read(word)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, or auto") from None

    return read_one


def words(word: str) -> tuple[str, ...]:
    """Options of a program in one word, split as a shell splits them."""
    try:
        return tuple(shlex.split(name(word)))
    except ValueError as error:  # a quote is not closed
        raise argparse.ArgumentTypeError(f"{shown(word)} is not allowed ({error}); close every quote") from None


def size(word: str) -> int:
    """A size in bytes, such as 65GiB or 500MB."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)([KMGT]i?B)?", word, re.IGNORECASE)
    value = int(float(found[1]) * UNITS[(found[2] or "").upper()]) if found else 0
    return value if value > 0 else _refuse(word, "a size such as 65GiB")


def memory(word: str) -> str:
    """The memory of a Slurm job, as --mem has it."""
    return word if re.fullmatch(r"[1-9][0-9]{0,8}[KMGT]?", word) else _refuse(word, "a memory such as 64G")


def duration(word: str) -> str:
    """How long a Slurm job may take, as --time has it."""
    if not re.fullmatch(r"[0-9]{1,6}(:[0-9]{1,2}){0,2}|[0-9]{1,3}-[0-9]{1,2}(:[0-9]{1,2}){0,2}", word) or not re.search(
        "[1-9]", word
    ):
        _refuse(word, "minutes, hours:minutes:seconds or days-hours, such as 90, 4:00:00 or 1-12")
    return word


def plain(word: str) -> str:
    """A word without spaces and control characters, as Slurm's names are."""
    if not re.fullmatch(r"[!-~]{1,200}", word):
        _refuse(word, "one word of plain letters, digits and signs, up to 200")
    return word


def device(word: str) -> str:
    """Where to compute, as it is spelled everywhere; whether it is there is asked when it is chosen."""
    if not re.fullmatch(r"auto|cpu|cuda|cuda:all|cuda:(0|[1-9][0-9]{0,3})", word):
        raise argparse.ArgumentTypeError(f"{shown(word)} is not known; choose auto, cpu, cuda or cuda:N (N from 0 on)")
    return word


def text(word: str) -> str:
    """Any text that says something."""
    return word if word.strip() else _refuse(word, "a text that is not empty")


def name(word: str) -> str:
    """The name of a thing, or the path to it: not empty, in one line, as short as a path."""
    if not word.strip() or CONTROL.search(word) or len(os.fsencode(word)) > LONGEST_PATH:
        _refuse(word, f"a name: not empty, without line ends and other control characters, up to {LONGEST_PATH} bytes")
    return word


def unshown(word: str) -> str:
    """A name or an address that may hold a secret by mistake: no refusal shows it."""
    try:
        return name(word)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            "what was given is not allowed, and not shown: it may hold a secret; give one line that is not empty"
        ) from None


def path(word: str) -> Path:
    """The path of a file or directory, whether it is there or not."""
    found = Path(name(word))
    if longest := [part for part in found.parts if len(os.fsencode(part)) > LONGEST_NAME]:
        _refuse(longest[0], f"names of files and directories up to {LONGEST_NAME} bytes")
    return found


def from_environment(variable: str, read: Callable[[str], Value], default: Value) -> Value:
    """The value of a variable of the environment, or the default where it is not set or empty. Raises UserError."""
    word = os.environ.get(variable, "")
    try:
        return read(word) if word else default
    except argparse.ArgumentTypeError as error:
        raise UserError(f"the environment variable {variable}={error}, or unset it") from None
