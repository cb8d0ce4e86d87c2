"""What a report says of a finished run: its figures, settings in short, where and when it ran, and how it is run again.

Everything here comes from a record, which may be a stranger's: it is words for the template to escape, never markup.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.tables.asked import Run
from eval.tables.ledger import entry_of

__all__ = ["Card", "Pairs", "Place", "commands_of", "facts_of", "settings_in_short"]

Pairs = tuple[tuple[str, str], ...]
LONGEST = 300  # characters of a setting
# Of a record, what is not a figure, or is shown under another name.
APART = ("format", "task", "identity", "settings", "started", "environment", "sha256", "path", "quantization")
COVERED = ("recipe", "made_of", "kv_made_of")  # of settings, what the label of the weights or of the cache stands for
MACHINE = ("gpu", "processor", "cores", "python", "torch", "transformers", "commit")


@dataclass(frozen=True)
class Place:
    """A cell that a run stands in. anchor: of the cell."""

    anchor: str
    words: str


@dataclass
class Card:
    """One record. anchor: within the page. commands: those that made it, what it needed first. places: its cells."""

    anchor: str
    title: str
    file: str
    identity: str
    figures: Pairs
    settings: Pairs
    machine: Pairs
    started: str
    seconds: float | None
    commands: tuple[str, ...]
    places: list[Place] = field(default_factory=list)

    @staticmethod
    def of(record: Mapping[str, Any], commands: tuple[str, ...], seconds: float | None) -> "Card":
        """The card of a record that `eval.runs` has read."""
        settings = record["settings"]
        words = [record["task"], settings.get("model"), settings.get("weights"), _short(settings.get("kv")),
                 _short(settings.get("prefix")), settings.get("corpus") or settings.get("task_name")]  # fmt: skip
        return Card(
            anchor=f"run-{record['identity']}",
            title=" · ".join(str(word) for word in words if word and word != "none"),
            file=Path(record["path"]).name,
            identity=record["identity"],
            figures=_short_pairs({key: value for key, value in record.items() if key not in APART}),
            settings=settings_in_short(settings),
            machine=_short_pairs({key: record["environment"].get(key) for key in MACHINE}),
            started=record["started"],
            seconds=seconds,
            commands=commands,
        )


def commands_of(runs: Iterable[Run]) -> dict[str, tuple[tuple[str, ...], float]]:
    """By the name of a record's file: the commands that made it, as the ledger has them, and the seconds of the last.

    What a run needed is made by commands of its own, which stand first.
    """
    found = {}
    for run in runs:
        entry = entry_of(run)
        if entry is not None and "record" in entry:
            before = [made["command"] for needed in run.needs if (made := entry_of(needed)) is not None]
            lines = tuple(_line(command) for command in [*before, entry["command"]])
            found[entry["record"]] = (lines, entry["seconds"])
    return found


def _line(command: Sequence[str]) -> str:
    """A command to copy: the interpreter is whichever the reader has."""
    words = ["python", *command[1:]] if command and Path(command[0]).name.startswith("python") else list(command)
    return shlex.join(words)


def settings_in_short(settings: Mapping[str, Any]) -> Pairs:
    """What a reader wants to know of a run's settings; the identity in the record's name covers all of them."""
    return _short_pairs({key: value for key, value in settings.items() if key not in COVERED})


def _short_pairs(values: Mapping[str, Any]) -> Pairs:
    pairs = ((key.replace("_", " "), _short(value)) for key, value in values.items())
    return tuple((key, words) for key, words in pairs if words)


def _short(value: Any) -> str:
    """A value as words; nothing for what is not set, or what only a program reads."""
    if value is None or value == [] or value == {}:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        if "label" in value:
            return _short(value["label"])
        if "kind" in value:
            bits = value.get("bits")
            return f"{value['kind']} {bits} bits" if isinstance(bits, int | float) else str(value["kind"])
        simple = {key: member for key, member in value.items() if isinstance(member, int | float)}
        return ", ".join(f"{key} {_short(member)}" for key, member in simple.items())[:LONGEST]
    if isinstance(value, list | tuple):
        return f"{len(value)} values" if len(value) > 12 else ", ".join(_short(member) for member in value)[:LONGEST]
    words = str(value)
    if re.fullmatch(r"[0-9a-f]{32,}", words):  # a hash
        return f"{words[:12]}…"
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}…"


def facts_of(records: Sequence[Mapping[str, Any]], seconds: float) -> Pairs:
    """Where, with what and when the runs of a table were made. seconds: of all."""
    if not records:
        return ()
    environments = [record["environment"] for record in records]
    days = sorted(record["started"][:10] for record in records)
    devices = {str(record["settings"].get("device", "")) for record in records}
    machines = [each.get("gpu") if devices != {"cpu"} and each.get("gpu") else each.get("processor")
                for each in environments]  # fmt: skip
    facts = {
        "hardware": _each(machines),
        "computed on": _each(devices),
        "dtype": _each(record["settings"].get("dtype") for record in records),
        **{name: _each(each.get(name) for each in environments) for name in ("torch", "transformers", "commit")},
        "run": days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}",
        "time of these runs, quantizing aside": _duration(seconds) if seconds else "",
    }
    return tuple((key, words) for key, words in facts.items() if words)


def _each(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(_short(value) for value in values if value is not None))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
