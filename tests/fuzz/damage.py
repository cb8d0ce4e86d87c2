"""What can happen to a file: each damage is a function of a path and a seeded generator.

A damage that breaks the form (a file cut short, a list where a number belongs) must be refused wherever it is read, or
change no figure. One that leaves a valid file of the same kind (another number, another byte of a text) may change the
figures of files that carry no sum, because they are another model, text or question then.
"""

import csv
import io
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = ["DAMAGES", "Damage", "Inapplicable"]

MARK = "@@fuzz@@"
DIGITS = "9" * 5000
DEEP = "[" * 10_000 + "]" * 10_000
# What a JSON value becomes, as it is spelled; the last ones are no values of a well-behaved program.
RAW = (
    "null", "[]", "{}", '""', '"abc"', "true", "0", "1", "-1", "-1.5", "1.5", '"1"', "[1, 2]", '{"a": 1}', '["a"]',
    '"../../x"', '"/x"', "1e22", "10000000000000000000000", "1e400", "-1e400", "NaN", "-Infinity", DIGITS, DEEP,
    '"\\ud83d"', '"a\\u0000\\u001b[31m\\nerror: b"', '"' + "x" * 10_000 + '"',
)  # fmt: skip
ROOT_USER = os.geteuid() == 0


class Inapplicable(Exception):
    """The damage does not fit the file (JSON keys of a text, tensors of a table)."""


@dataclass(frozen=True)
class Damage:
    """work: changes the file, and says what it did and whether the form is broken for certain."""

    name: str
    work: Callable[[Path, random.Random, list[Path]], tuple[str, bool]]


def _replace(path: Path, content: bytes) -> None:
    """Write a new file in the place of the old one."""
    path.unlink()
    path.write_bytes(content)


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if not content:
        raise Inapplicable
    return content


# Bytes ----------------------------------------------------------------------------------------------------------------


def _truncate(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    content = _content(path)
    keep = rng.choice([1, len(content) // 2, len(content) - 1, rng.randrange(len(content))])
    _replace(path, content[:keep])
    # The last line of JSON lines and texts may go without a trace, and so may its line end.
    return f"cut to {keep} of {len(content)} bytes", path.suffix not in (
        ".txt",
        ".jsonl",
        ".csv",
        ".jinja",
    ) and keep < len(content.rstrip())


def _flip_bit(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    content = bytearray(_content(path))
    # Headers decide more than the values behind them.
    place = rng.randrange(min(len(content), rng.choice([64, 2000, len(content)])))
    bit = rng.randrange(8)
    content[place] ^= 1 << bit
    _replace(path, bytes(content))
    return f"bit {bit} of byte {place} flipped", False


def _zero_bytes(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    content = bytearray(_content(path))
    start = rng.randrange(len(content))
    content[start : start + 100] = bytes(len(content[start : start + 100]))
    _replace(path, bytes(content))
    return f"100 bytes from {start} zeroed", False


def _append(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    tail = rng.choice([b"\n", b"}", b"garbage", b"\x00" * 8, b"\xff\xfe", b"[[["])
    _replace(path, _content(path) + tail)
    return f"{tail!r} appended", False


def _empty(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    _replace(path, b"")
    return "emptied", path.suffix not in (".txt", ".jinja")


def _other_kind(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    donor = rng.choice([other for other in others if other.suffix != path.suffix] or [Path(__file__)])
    _replace(path, donor.read_bytes())
    return f"swapped with {donor.name}", path.suffix not in (".txt", ".jinja")


def _encoding(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    try:
        text = _content(path).decode()
    except UnicodeDecodeError:
        raise Inapplicable from None
    name = rng.choice(["utf-16", "utf-8-sig", "utf-32"])
    _replace(path, text.encode(name))
    return f"in {name}", name != "utf-8-sig"


# What stands there instead --------------------------------------------------------------------------------------------


def _missing(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    path.unlink()
    return "removed", False


def _directory(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    path.unlink()
    path.mkdir()
    return "a directory", True


def _dangling(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    path.unlink()
    path.symlink_to("nowhere")
    return "a dangling link", True


def _loop(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    path.unlink()
    path.symlink_to(path.name)
    return "a link to itself", True


def _pipe(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    path.unlink()
    os.mkfifo(path)
    return "a pipe", True


def _unreadable(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    if ROOT_USER:
        raise Inapplicable
    path.chmod(0)
    return "unreadable", True


# JSON -----------------------------------------------------------------------------------------------------------------


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value within a JSON value, itself first; of long lists the first members."""
    found = [at]
    members = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, member in members:
        found += _places(member, (*at, key))
    return found


def _parsed(path: Path) -> tuple[list[Any], bool]:
    """The JSON values of a file and whether they stand on lines of their own."""
    if path.suffix not in (".json", ".jsonl"):
        raise Inapplicable
    text = _content(path).decode()
    try:
        return [json.loads(text)], False
    except json.JSONDecodeError:
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()], True
        except json.JSONDecodeError:
            raise Inapplicable from None


def _spelled(values: list[Any], lines: bool, raw: str) -> bytes:
    texts = [json.dumps(value, indent=None if lines else 2).replace(f'"{MARK}"', raw) for value in values]
    return ("\n".join(texts) + "\n").encode("utf-8", "surrogatepass")


def _set(values: list[Any], place: tuple[Any, ...], new: Any) -> None:
    target: Any = values
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = new


def _get(values: list[Any], place: tuple[Any, ...]) -> Any:
    target: Any = values
    for key in place:
        target = target[key]
    return target


def _chosen(values: list[Any], rng: random.Random) -> tuple[Any, ...]:
    """The way to a value, the shallow ones as likely as the many deep ones."""
    index = rng.randrange(min(len(values), 4))
    places = [(index, *place) for place in _places(values[index])]
    depth = rng.choice(sorted({len(place) for place in places})[:6])
    return rng.choice([place for place in places if len(place) == depth])


def _kind(value: Any) -> str:
    """What a value's place takes: whole numbers stand for fractions, too."""
    if isinstance(value, bool) or value is None:
        return str(type(value))
    return "number" if isinstance(value, (int, float)) else type(value).__name__


def _shown(place: tuple[Any, ...]) -> str:
    return ".".join(map(str, place))[:80]


def _retyped(values: list[Any], rng: random.Random) -> tuple[str, str, bool]:
    """Change one value; returns how the mark is spelled, what was done, and whether that breaks the form."""
    place = _chosen(values, rng)
    old, raw = _get(values, place), rng.choice(RAW)
    try:
        new = json.loads(raw)
    except (ValueError, RecursionError):
        new = None
    wild = raw in (DIGITS, DEEP, "NaN", "-Infinity", "1e400", "-1e400", '"\\ud83d"')
    if not wild and new == old and type(new) is type(old):
        raise Inapplicable
    _set(values, place, MARK)
    short = raw if len(raw) < 40 else f"{raw[:3]}… ({len(raw)} characters)"
    whole = isinstance(old, int) and isinstance(new, float) and not float(new).is_integer()
    return raw, f"{_shown(place)} = {short}", wild or whole or _kind(new) != _kind(old)


def _json_retype(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    values, lines = _parsed(path)
    raw, done, breaks = _retyped(values, rng)
    _replace(path, _spelled(values, lines, raw))
    return done, breaks


def _json_delete(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    values, lines = _parsed(path)
    for _ in range(20):
        place = _chosen(values, rng)
        if len(place) > 1:
            del _get(values, place[:-1])[place[-1]]
            _replace(path, _spelled(values, lines, ""))
            return f"{_shown(place)} deleted", False
    raise Inapplicable


def _json_add(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    values, lines = _parsed(path)
    objects = [(i, *place) for i, value in enumerate(values[:4]) for place in _places(value)]
    objects = [place for place in objects if isinstance(_get(values, place), dict)]
    if not objects:
        raise Inapplicable
    place = rng.choice(objects[:10])
    name, value = rng.choice([("unused", 1), ("auto_map", {"AutoConfig": "x.C"}), ("", None), ("../x", "../x")])
    _get(values, place)[name] = value
    _replace(path, _spelled(values, lines, ""))
    return f"{_shown(place)}: {name!r} added", False


def _json_nest(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    values, lines = _parsed(path)
    place = _chosen(values, rng)
    inner = _get(values, place)
    _set(values, place, rng.choice([[inner], {"value": inner}, [[inner]]]))
    _replace(path, _spelled(values, lines, ""))
    return f"{_shown(place)} nested", True


def _json_twice(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    values, lines = _parsed(path)
    if not lines:
        raise Inapplicable
    index = rng.randrange(len(values))
    _replace(path, _spelled([*values, values[index]], True, ""))
    return f"record {index} twice", False


# Tables ---------------------------------------------------------------------------------------------------------------


def _cell(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    if path.suffix != ".csv":
        raise Inapplicable
    rows = list(csv.reader(io.StringIO(_content(path).decode())))
    row, act = rng.choice(rows), rng.choice(["empty", "fewer", "more", "answer", "control"])
    if act == "empty":
        row[rng.randrange(len(row))] = ""
    elif act == "fewer":
        row.pop()
    elif act == "more":
        row.append("more")
    elif act == "answer":
        row[-1] = rng.choice(["E", "0", "", "ABC", "a" * 200_000])
    else:
        row[rng.randrange(len(row))] += "\x1b[31m\x07"
    new = io.StringIO()
    csv.writer(new).writerows(rows)
    _replace(path, new.getvalue().encode())
    return f"a cell: {act}", act in ("empty", "fewer", "more", "answer")


# Tensors --------------------------------------------------------------------------------------------------------------


def _tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    if path.suffix != ".safetensors":
        raise Inapplicable
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except SafetensorError:
        raise Inapplicable from None


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON header of a safetensors file and what lies behind it."""
    if path.suffix != ".safetensors":
        raise Inapplicable
    content = _content(path)
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _write_header(path: Path, header: bytes, rest: bytes) -> None:
    _replace(path, len(header).to_bytes(8, "little") + header + rest)


def _tensor_header(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    header, rest = _header(path)
    values: list[Any] = [header]
    raw, done, _ = _retyped(values, rng)
    _write_header(path, _spelled(values, True, raw), rest)
    return f"header: {done}", True


def _tensor_metadata(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    """Damage the JSON within one metadata entry, or the entry."""
    header, rest = _header(path)
    about = header.get("__metadata__") or {}
    if not about:
        raise Inapplicable
    key, act = (
        rng.choice(sorted(about)),
        rng.choice(["retype", "retype", "retype", "delete", "delete key", "cut", "all"]),
    )
    try:
        values = [json.loads(about[key])]
    except json.JSONDecodeError:
        values = []
    done = f"metadata {key}"
    if act == "all":
        del header["__metadata__"]
        done = "no metadata"
    elif act == "delete":
        del about[key]
        done += " deleted"
    elif act == "cut" or not values or not isinstance(values[0], (dict, list)):
        about[key] = about[key][: rng.randrange(len(about[key]) + 1) // 2]
        done += " cut"
    elif act == "retype":
        raw, what, _ = _retyped(values, rng)
        about[key] = _spelled(values, True, raw).decode("utf-8", "surrogatepass").strip()
        done += f": {what}"
    else:
        for _ in range(20):
            place = _chosen(values, rng)
            if len(place) > 1:
                del _get(values, place[:-1])[place[-1]]
                break
        about[key] = json.dumps(values[0])
        done += f": {_shown(place)} deleted"
    _write_header(path, json.dumps(header).encode(), rest)
    return done, True


def _tensor_change(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    tensors, about = _tensors(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name].clone()
    acts = ["missing", "renamed", "reshaped", "shorter", "retyped", "sign", "nan", "other", "zero", "more", "scalar"]
    act, broken = rng.choice(acts), True
    if act == "missing":
        del tensors[name]
    elif act == "renamed":
        tensors[f"{name}2"] = tensors.pop(name)
    elif act == "reshaped":
        tensors[name] = tensor.flatten() if tensor.ndim > 1 else tensor[None]
    elif act == "shorter":
        if not tensor.ndim or tensor.shape[0] < 2:
            raise Inapplicable
        tensors[name] = tensor[:-1].clone()
    elif act == "scalar":
        tensors[name] = tensor.flatten()[0].clone() if tensor.numel() else tensor[None]
    elif act == "retyped":
        others_of = [
            x for x in (torch.float16, torch.float64, torch.int32, torch.uint8, torch.bool) if x != tensor.dtype
        ]
        tensors[name] = tensor.to(rng.choice(others_of))
        broken = False  # float64 of the same numbers is the same model
    elif act == "more":
        tensors["more"], broken = torch.ones(3), False
    else:
        flat = tensor.flatten()
        if not flat.numel() or flat.dtype == torch.bool:
            raise Inapplicable
        place = rng.randrange(flat.numel())
        if act == "nan":
            if not flat.is_floating_point():
                raise Inapplicable
            flat[place] = rng.choice([float("nan"), float("inf")])
        else:
            old = flat[place].clone()
            flat[place] = {"sign": -old, "other": old + 1, "zero": old * 0}[act]
            broken = False
        tensors[name] = flat.reshape(tensor.shape)
    path.unlink()
    save_file(tensors, path, metadata=about)
    return f"tensor {name}: {act}", broken


DAMAGES = {
    name: Damage(name, work)
    for name, work in {
        "truncate": _truncate, "flip": _flip_bit, "zero": _zero_bytes, "append": _append, "empty": _empty,
        "swap": _other_kind, "encoding": _encoding, "missing": _missing, "directory": _directory,
        "dangling": _dangling, "loop": _loop, "pipe": _pipe, "unreadable": _unreadable, "retype": _json_retype,
        "delete": _json_delete, "add": _json_add, "nest": _json_nest, "twice": _json_twice, "cell": _cell,
        "header": _tensor_header, "metadata": _tensor_metadata, "tensor": _tensor_change,
    }.items()
}  # fmt: skip
