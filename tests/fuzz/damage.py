"""What can happen to a file: each damage is a function of a path and a seeded generator.

A damage that breaks the form (a file cut short, a list where a number belongs) must be refused wherever it is read, or
change no figure. One that leaves a valid file of the same kind (another number, another byte of a text) may change the
figures of files that carry no sum, because they are another model, text or question then.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz import damage_files, damage_json, damage_tensors

__all__ = ["DAMAGES", "Damage"]


@dataclass(frozen=True)
class Damage:
    """work: changes the file, and says what it did and whether the form is broken for certain."""

    name: str
    work: Callable[[Path, random.Random, list[Path]], tuple[str, bool]]


DAMAGES = {
    name: Damage(name, work)
    for name, work in {
        "truncate": damage_files.truncate,
        "flip": damage_files.flip_bit,
        "zero": damage_files.zero_bytes,
        "append": damage_files.append,
        "empty": damage_files.empty,
        "swap": damage_files.other_kind,
        "encoding": damage_files.encoding,
        "missing": damage_files.missing,
        "directory": damage_files.directory,
        "dangling": damage_files.dangling,
        "loop": damage_files.loop,
        "pipe": damage_files.pipe,
        "unreadable": damage_files.unreadable,
        "retype": damage_json.json_retype,
        "delete": damage_json.json_delete,
        "add": damage_json.json_add,
        "nest": damage_json.json_nest,
        "twice": damage_json.json_twice,
        "cell": damage_tensors.cell,
        "header": damage_tensors.tensor_header,
        "metadata": damage_tensors.tensor_metadata,
        "tensor": damage_tensors.tensor_change,
    }.items()
}
