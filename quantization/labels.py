"""Readable names of recipes: what a checkpoint's directory and a row of a table are called in front of any hash.

    gptq-w3g128                          methods, bits and groups: `Recipe.label`, which records are stored under
    gptq-w3g128-no-static_groups         and every other field that is not as in the first named recipe of this kind
    rtn-w8row-a8-a-gptq-asym             of several grids, with the mark of whose it is: w, a (inputs), q (attention)
    2g32 kivi final                      a KV policy: bits, groups, word, and every field that is not its default

Of a kind are recipes with the same parts; where no named recipe has them, each part is compared with the first one of
its own kind. Works on descriptions, so that tables name the recipes of stored records, too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

from quantization.kv_cache import KV_POLICIES, kv_bits
from quantization.named import RECIPES
from quantization.recipes.recipe import Recipe, describe

__all__ = ["differences", "full_label", "kv_label", "told"]

PARTS = ("transforms", "weights", "activations", "attention", "tuning")
MARKS = {"weights": "w", "activations": "a", "attention": "q"}
# Fields that `Recipe.label` and `kv_bits` tell.
IN_LABEL = ("bits", "v_bits", "group_size", "attention_bits", "groups", "static")
BY_VALUE = ("convention", "scale_dtype", "values", "levels", "prefill")  # values that need no name beside them

Part = Mapping[str, Any]


def full_label(recipe: Recipe) -> str:
    """The readable name of a recipe's weights, with what is other than in the named recipe of its kind."""
    return told(recipe.label(), describe(recipe))


def told(label: str, recipe: Mapping[str, Any]) -> str:
    """A label with what is other in a described recipe; `-behind` stays where it is."""
    return "-".join([label, *differences(recipe)])


def differences(recipe: Mapping[str, Any]) -> list[str]:
    """Words for the fields of a described recipe that are not as in the first named recipe of its kind."""
    parts, marks = _parts(recipe), [mark for part, mark in _marked(recipe)]
    several = sum("grid" in part for part in parts) > 1
    of_kind = _rows().get(tuple(map(_kind, parts)))
    words = []
    for i, part in enumerate(parts):
        base = of_kind[i] if of_kind is not None else _first().get(_kind(part))
        if base is None:  # no named recipe has such a part: what it is stands in its label
            continue
        words += _other(part, base, marks[i] if several else "")
    return words


def kv_label(kv: Mapping[str, Any] | None) -> str:
    """`16` for a full-precision cache, else bits, groups and word of a described policy, `4 per_head`, with words for
    its fields that are not the policy's default: `2 turboquant lloyd`, `4 kvquant outliers0`."""
    if kv is None:
        return "16"
    for word, policy in KV_POLICIES.items():
        if policy.__name__ == kv["kind"]:
            return " ".join([kv_bits(kv), word, *_other(kv, describe(policy(bits=policy.allowed_bits[0])))])
    return f"{kv_bits(kv)} {kv['kind']}"


def _other(part: Part, base: Part, mark: str = "") -> list[str]:
    """Words for the fields of a described part that are not as in another of its kind."""
    usual = dict(_leaves(base))
    return [_word(name, value, mark) for name, value in _leaves(part) if name in usual and value != usual[name]]


def _marked(recipe: Mapping[str, Any]) -> list[tuple[Part, str]]:
    """The described parts, transforms one by one, and the marks of those with a grid."""
    found: list[tuple[Part, str]] = []
    for name in PARTS:
        part = recipe.get(name)
        found += [(one, MARKS.get(name, "")) for one in (part if isinstance(part, list) else [part] if part else [])]
    return found


def _parts(recipe: Mapping[str, Any]) -> list[Part]:
    return [part for part, _ in _marked(recipe)]


def _kind(part: Part) -> tuple[str, bool]:
    return part["kind"], bool(part.get("static"))


@cache
def _rows() -> dict[tuple[tuple[str, bool], ...], list[Part]]:
    """The parts of the first named recipe of every kind."""
    rows: dict[tuple[tuple[str, bool], ...], list[Part]] = {}
    for row in RECIPES.values():
        parts = _parts(describe(row.recipe))
        rows.setdefault(tuple(map(_kind, parts)), parts)
    return rows


@cache
def _first() -> dict[tuple[str, bool], Part]:
    """The first part of every kind."""
    first: dict[tuple[str, bool], Part] = {}
    for parts in _rows().values():
        for part in parts:
            first.setdefault(_kind(part), part)
    return first


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    """What descriptions leave out, by class of parts and KV policies: fields that came later, as they were before."""
    kinds: dict[str, dict[str, Any]] = {}

    def keep(kind: Any) -> None:
        kinds[kind.__name__] = {f.name: f.metadata.get("before", (f.default,))[0]
                                for f in fields(kind) if f.init and f.default is not MISSING}  # fmt: skip

    def look(part: Any) -> None:
        keep(type(part))
        if hasattr(part, "grid"):
            look(part.grid)

    for row in RECIPES.values():
        for name in PARTS:
            part = getattr(row.recipe, name)
            for one in part if isinstance(part, tuple) else [part] * (part is not None):
                look(one)
    for policy in KV_POLICIES.values():
        keep(policy)
    return kinds


def _leaves(part: Part, front: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of a described part that its label does not tell, those of its grid as `grid.…`, with their values."""
    for name, value in {**_defaults().get(part["kind"], {}), **part}.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")
        elif name not in ("kind", *IN_LABEL):
            yield front + name, value


def _word(name: str, value: Any, mark: str) -> str:
    leaf = name.rpartition(".")[2]
    if isinstance(value, bool):
        return leaf if value else f"no-{leaf}"
    if leaf in BY_VALUE:
        return f"{mark}-{value}" if mark else str(value)
    if leaf.endswith("sha256"):
        return str(value)[:8]
    if isinstance(value, str):  # a file by its name alone: the word becomes part of a path
        return f"{leaf}-{Path(value).stem or 'none'}"
    return f"{leaf}{value:g}"
