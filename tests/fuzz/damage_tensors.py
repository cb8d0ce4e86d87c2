"""Damages of tables and of safetensors files: their cells, headers, metadata and tensors."""

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fuzz.damage_files import Inapplicable, content_of, replaced
from fuzz.damage_json import chosen, retyped, shown, spelled, value_at

# Tables ---------------------------------------------------------------------------------------------------------------


def cell(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    if path.suffix != ".csv":
        raise Inapplicable
    rows = list(csv.reader(io.StringIO(content_of(path).decode())))
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
    replaced(path, new.getvalue().encode())
    return f"a cell: {act}", act in ("empty", "fewer", "more", "answer")


# Tensors --------------------------------------------------------------------------------------------------------------


def tensors_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    if path.suffix != ".safetensors":
        raise Inapplicable
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except SafetensorError:
        raise Inapplicable from None


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON header of a safetensors file and what lies behind it."""
    if path.suffix != ".safetensors":
        raise Inapplicable
    content = content_of(path)
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write_header(path: Path, header: bytes, rest: bytes) -> None:
    replaced(path, len(header).to_bytes(8, "little") + header + rest)


def tensor_header(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    header, rest = header_of(path)
    values: list[Any] = [header]
    raw, done, _ = retyped(values, rng)
    write_header(path, spelled(values, True, raw), rest)
    return f"header: {done}", True


def tensor_metadata(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    """Damage the JSON within one metadata entry, or the entry."""
    header, rest = header_of(path)
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
        raw, what, _ = retyped(values, rng)
        about[key] = spelled(values, True, raw).decode("utf-8", "surrogatepass").strip()
        done += f": {what}"
    else:
        for _ in range(20):
            place = chosen(values, rng)
            if len(place) > 1:
                del value_at(values, place[:-1])[place[-1]]
                break
        about[key] = json.dumps(values[0])
        done += f": {shown(place)} deleted"
    write_header(path, json.dumps(header).encode(), rest)
    return done, True


def tensor_change(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    tensors, about = tensors_of(path)
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
