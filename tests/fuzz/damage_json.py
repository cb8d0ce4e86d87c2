"""Damages of JSON: another value, a key too few or too many; of what Python's json does not parse, too."""

import json
import random
from pathlib import Path
from typing import Any

from fuzz.damage_files import Inapplicable, content_of, replaced

__all__ = ["chosen", "retyped", "shown", "spelled", "value_at"]

MARK = "@@fuzz@@"
DIGITS = "9" * 5000
DEEP = "[" * 10_000 + "]" * 10_000
# What a JSON value becomes, as it is spelled; the last ones are no values of a well-behaved program.
RAW = (
    "null", "[]", "{}", '""', '"abc"', "true", "0", "1", "-1", "-1.5", "1.5", '"1"', "[1, 2]", '{"a": 1}', '["a"]',
    '"../../x"', '"/x"', "1e22", "10000000000000000000000", "1e400", "-1e400", "NaN", "-Infinity", DIGITS, DEEP,
    '"\\ud83d"', '"a\\u0000\\u001b[31m\\nerror: b"', '"' + "x" * 10_000 + '"',
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value within a JSON value, itself first; of long lists the first members."""
    found = [at]
    members = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, member in members:
        found += places(member, (*at, key))
    return found


def parsed(path: Path) -> tuple[list[Any], bool]:
    """The JSON values of a file and whether they stand on lines of their own."""
    if path.suffix not in (".json", ".jsonl"):
        raise Inapplicable
    text = content_of(path).decode()
    try:
        return [json.loads(text)], False
    except json.JSONDecodeError:
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()], True
        except json.JSONDecodeError:
            raise Inapplicable from None


def spelled(values: list[Any], lines: bool, raw: str) -> bytes:
    texts = [json.dumps(value, indent=None if lines else 2).replace(f'"{MARK}"', raw) for value in values]
    return ("\n".join(texts) + "\n").encode("utf-8", "surrogatepass")


def put_at(values: list[Any], place: tuple[Any, ...], new: Any) -> None:
    target: Any = values
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = new


def value_at(values: list[Any], place: tuple[Any, ...]) -> Any:
    target: Any = values
    for key in place:
        target = target[key]
    return target


def chosen(values: list[Any], rng: random.Random) -> tuple[Any, ...]:
    """The way to a value, the shallow ones as likely as the many deep ones."""
    index = rng.randrange(min(len(values), 4))
    found = [(index, *place) for place in places(values[index])]
    depth = rng.choice(sorted({len(place) for place in found})[:6])
    return rng.choice([place for place in found if len(place) == depth])


def kind_of(value: Any) -> str:
    """What a value's place takes: whole numbers stand for fractions, too."""
    if isinstance(value, bool) or value is None:
        return str(type(value))
    return "number" if isinstance(value, (int, float)) else type(value).__name__


def shown(place: tuple[Any, ...]) -> str:
    return ".".join(map(str, place))[:80]


def retyped(values: list[Any], rng: random.Random) -> tuple[str, str, bool]:
    """Change one value; returns how the mark is spelled, what was done, and whether that breaks the form."""
    place = chosen(values, rng)
    old, raw = value_at(values, place), rng.choice(RAW)
    try:
        new = json.loads(raw)
    except (ValueError, RecursionError):
        new = MARK
    wild = raw in (DIGITS, DEEP, "NaN", "-Infinity", "1e400", "-1e400", '"\\ud83d"')
    if not wild and new == old and type(new) is type(old):
        raise Inapplicable
    put_at(values, place, MARK)
    short = raw if len(raw) < 40 else f"{raw[:3]}… ({len(raw)} characters)"
    whole = isinstance(old, int) and isinstance(new, float) and not float(new).is_integer()
    # null often stands for "none", a token or a template for example.
    return raw, f"{shown(place)} = {short}", wild or whole or (None not in (old, new) and kind_of(new) != kind_of(old))


def json_retype(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    values, lines = parsed(path)
    raw, done, breaks = retyped(values, rng)
    replaced(path, spelled(values, lines, raw))
    return done, breaks


def json_delete(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    values, lines = parsed(path)
    for _ in range(20):
        place = chosen(values, rng)
        if len(place) > 1:
            del value_at(values, place[:-1])[place[-1]]
            replaced(path, spelled(values, lines, ""))
            return f"{shown(place)} deleted", False
    raise Inapplicable


def json_add(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    values, lines = parsed(path)
    objects = [(i, *place) for i, value in enumerate(values[:4]) for place in places(value)]
    objects = [place for place in objects if isinstance(value_at(values, place), dict)]
    if not objects:
        raise Inapplicable
    place = rng.choice(objects[:10])
    name, value = rng.choice([("unused", 1), ("auto_map", {"AutoConfig": "x.C"}), ("", None), ("../x", "../x")])
    value_at(values, place)[name] = value
    replaced(path, spelled(values, lines, ""))
    return f"{shown(place)}: {name!r} added", False


def json_nest(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    values, lines = parsed(path)
    place = chosen(values, rng)
    inner = value_at(values, place)
    put_at(values, place, rng.choice([[inner], {"value": inner}, [[inner]]]))
    replaced(path, spelled(values, lines, ""))
    return f"{shown(place)} nested", True


def json_twice(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    values, lines = parsed(path)
    if not lines:
        raise Inapplicable
    index = rng.randrange(len(values))
    replaced(path, spelled([*values, values[index]], True, ""))
    return f"record {index} twice", False
