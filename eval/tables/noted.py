"""Which tables were asked for, of which model and at what size: one small file for each in outputs/asked/tables/.

`reproduce` and `cluster submit` note what they are going to run, so that `report` shows it without being told again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError, one_line
from corpora.files import name_part
from corpora.json_files import identity, read_json, write_json
from corpora.paths import outputs_dir
from eval.tables.declared import Paper, Words

__all__ = ["Noted", "all_noted", "note"]


@dataclass(frozen=True)
class Noted:
    """A table that was asked for. table: its name. model: its directory. words: the options of a size, as a command
    line has them; none: the published one. file: where it is noted."""

    table: str
    model: Path
    words: Words
    file: Path


class _Note(TypedDict):
    table: str
    model: str
    words: list[str]


def note(chosen: Iterable[tuple[Paper, Iterable[Path]]], words: Sequence[str]) -> None:
    """Note tables, each for some models. words: the options of the size."""
    for paper, models in chosen:
        for model in models:
            noted: _Note = {"table": paper.name, "model": str(model), "words": list(words)}
            name = f"{paper.name}-{name_part(model.name)}-{identity(noted)}.json"
            write_json(outputs_dir() / "asked" / "tables" / name, noted)


def all_noted(left_out: list[str]) -> list[Noted]:
    """All that was noted, by table and model. left_out: gets a line for what cannot be read."""
    found = []
    for file in sorted((outputs_dir() / "asked" / "tables").glob("*.json")):
        try:
            read: _Note = read_json(file, "note of a table", _Note)
        except (UserError, OSError) as error:
            left_out.append(f"left out: {one_line(str(error))}")
        else:
            found.append(Noted(read["table"], Path(read["model"]), tuple(read["words"]), file))
    return found
