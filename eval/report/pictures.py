"""Figures of outputs/figures as data URIs, so that the report needs no other file."""

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from corpora.files import name_part
from corpora.paths import outputs_dir

__all__ = ["Picture", "pictures_of"]

PNG = b"\x89PNG\r\n\x1a\n"
KINDS = {".png": "png", ".svg": "svg+xml"}
LARGEST, ALL = 2_000_000, 20_000_000  # bytes, of one picture and of all


@dataclass(frozen=True)
class Picture:
    """A figure of a model. uri: the picture itself; empty for one that is too large to be embedded."""

    name: str
    caption: str
    uri: str


def pictures_of(models: Iterable[str]) -> list[Picture]:
    """The figures whose names begin with those of models, as `eval plot` calls them: MODEL__KIND… .png or .svg, or
    MODEL-RECIPE__KIND…

    A file that is no picture after all, a link, or one that cannot be read is left out.
    """
    found: dict[str, Picture] = {}
    room = ALL
    for model in dict.fromkeys(models):
        plain = plain_name(model)
        for file in sorted((outputs_dir() / "figures").glob("*")):
            if file.stem in found or file.suffix not in KINDS or not file.name.startswith((f"{plain}__", f"{plain}-")):
                continue
            if (data := _read(file)) is None:
                continue
            uri = ""
            if len(data) <= min(LARGEST, room):
                room -= len(data)
                uri = f"data:image/{KINDS[file.suffix]};base64,{base64.b64encode(data).decode()}"
            found[file.stem] = Picture(file.name, _caption(file.stem), uri)
    return list(found.values())


def plain_name(model: str) -> str:
    """A model's name as the name of a figure has it."""
    return name_part(re.sub(r"[^\w.+=-]+", "-", model))


def _read(file: Path) -> bytes | None:
    try:
        data = file.read_bytes() if file.is_file() and not file.is_symlink() else b""
    except OSError:
        return None
    return data if data.startswith(PNG) or (file.suffix == ".svg" and b"<svg" in data[:2000]) else None


def _caption(stem: str) -> str:
    model, _, rest = stem.partition("__")
    return f"{rest.replace('__', ', ').replace('_', ' ')}: {model}"
