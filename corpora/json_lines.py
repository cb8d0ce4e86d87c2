"""Files of JSON lines that are expected to be whole: each is an object of a form, blank ones count for nothing."""

import json
from pathlib import Path
from typing import Any

from corpora.errors import UserError
from corpora.files import open_text
from corpora.json_files import parse_json

__all__ = ["LONGEST", "read_lines", "whole_characters"]

LONGEST = 1 << 28  # characters of a file; MT-bench's have less than a million
MEND = "mend the line, or fetch the file again"


def read_lines(path: Path, what: str, form: Any = dict, *, mend: str = MEND, heal: bool = False) -> list[Any]:
    """The objects of a file, at least one. Raises UserError for a damaged file, with the line.

    what: it should be, and mend: what can be done, for the message. heal: whether halves of characters are replaced, as
    in what a model said; elsewhere they are refused.
    """
    with open_text(path, what) as file:
        text = file.read(LONGEST + 1)
    if len(text) > LONGEST:
        raise UserError(f"{what} {path} is longer than {LONGEST >> 20} million characters, so it is none; name another")
    rows = [
        parse_json(whole_characters(line) if heal else line, f"{what} {path}, line {number},", form, mend=mend)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{what} {path} is empty; {mend}")
    return rows


def whole_characters(line: str) -> str:
    """A line of JSON without halves of characters, which are stored where a server cut an emoji; they become U+FFFD."""
    if "\\ud" not in line.lower():
        return line
    try:
        value = json.loads(line, parse_constant=str)
    except (ValueError, RecursionError):
        return line
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
