"""JSON at one boundary: what is read has the form that its reader expects, or is refused in one line.

A form is a type: `dict`, `list[int]`, a TypedDict with the keys that must be there (`NotRequired` for those that may).
pydantic compares value and form strictly, so that "4", 4.0 and true are no 4. Keys that a form does not name stay.
A file of ours may hold the sum of all that it says (`with_sum`), which its reader compares (`without_sum`).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from corpora.errors import UserError
from corpora.files import open_text, plain_file, plain_name, refuse_half_characters
from corpora.writing import write_beside

__all__ = [
    "SUM",
    "Count",
    "FileName",
    "Hash",
    "Size",
    "check_values",
    "fitted",
    "identity",
    "parse_json",
    "read_json",
    "refuse_code",
    "with_sum",
    "without_sum",
    "write_json",
]

DEEPEST = 100  # lists and objects within each other; ours and those of Hugging Face have fewer than ten
LARGEST = 10**9  # bytes of a JSON file
LONGEST_INTEGER = 38  # digits; the longest in use is a tokenizer's 10^30 for "no limit"
CODE = ("auto_map", "auto_mapping")  # what lets transformers and PEFT import code by name
IMPLEMENTATIONS = ("attn_implementation", "attn_implementation_internal", "experts_implementation")  # also behind a _
REMAKE = "delete the file and make it again"

FileName = Annotated[str, AfterValidator(plain_name)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(ge=1, lt=2**31)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]+$", min_length=8, max_length=64)]


def read_json(path: Path, what: str, form: Any = Any, *, mend: str = REMAKE) -> Any:
    """Read a JSON file that is expected to be whole and of a form.

    what: it should have been; mend: what can be done, both for the message. Raises UserError if it is missing, no plain
    file, no JSON, or of another form.
    """
    if (size := plain_file(path, what).stat().st_size) > LARGEST:
        raise UserError(f"{what} {path} has {size / 1e9:.1f} GB, which no such file has; {mend}")
    with open_text(path, what) as file:
        return parse_json(file.read(), f"{what} {path}", form, mend=mend)


def parse_json(text: str, what: str, form: Any = Any, *, mend: str = REMAKE) -> Any:
    """The value of a JSON text. what, mend: where it stands and what can be done, for the message.

    Raises UserError for what is no JSON, for nesting, integers and floats that no reader could use (1e400, NaN), half
    characters, and another form.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{what} is nested deeper than {DEEPEST} levels; {mend}") from None
    except ValueError as error:  # JSONDecodeError, or an integer of more digits than Python reads
        raise UserError(f"{what} is not readable JSON ({error}); {mend}") from None
    check_values(value, what, mend)
    return fitted(value, form, what, mend=mend)


def fitted(value: Any, form: Any, what: str, *, mend: str = REMAKE) -> Any:
    """The value itself, if it is of a form. Raises UserError, with the place in it and what is expected there."""
    try:
        _adapter(form).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        if first["type"] == "missing":
            raise UserError(f"{what} is damaged: it has no {place!r}; {mend}") from None
        shown = repr(first["input"])
        shown = f"{shown[:40]}…" if len(shown) > 41 else shown
        expected = first["msg"].removeprefix("Value error, ")
        expected = expected.removeprefix("Input should be ") if first["type"] != "value_error" else expected
        said = expected if first["type"] == "value_error" else f"is not {expected}"
        where = f"its {place!r} {shown}" if place else f"{shown}"
        raise UserError(f"{what} is damaged: {where} {said}; {mend}") from None
    return value


@lru_cache(maxsize=128)
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)


def check_values(value: Any, what: str, mend: str) -> None:
    """Raise UserError for values that are JSON, but that nothing behind could work with."""
    found: list[tuple[str, Any, int]] = [("", value, 0)]
    while found:
        place, member, depth = found.pop()
        at = f"its {place.lstrip('.')!r}" if place else "it"
        if isinstance(member, (dict, list)):
            if depth == DEEPEST:
                raise UserError(f"{what} is nested deeper than {DEEPEST} levels; {mend}")
            members = member.items() if isinstance(member, dict) else enumerate(member)
            found.extend((f"{place}.{name}"[:200], inner, depth + 1) for name, inner in members)
            if isinstance(member, dict):
                refuse_half_characters(list(member), what)
        elif isinstance(member, str):
            refuse_half_characters(member, what)
        elif isinstance(member, float) and not math.isfinite(member):
            raise UserError(f"{what} holds a number that is not finite: {at} is {member}; {mend}")
        elif isinstance(member, int) and abs(member) >= 10**LONGEST_INTEGER:
            raise UserError(f"{what} holds an integer of more than {LONGEST_INTEGER} digits: {at}; {mend}")


def refuse_code(content: Mapping[str, Any], file: Path) -> None:
    """Raise UserError for a library's configuration that names Python code of its directory or of a repository, which
    is never run."""
    for entry in CODE:
        if code := content.get(entry):
            raise UserError(
                f"{file} asks for code of its directory ({entry}: {str(code)[:80]}), which is never run here; use one "
                f"that needs none, or take {entry} out if it is the same"
            )
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        for entry, value in part.items():
            # transformers would fetch and run it, whatever it was told about code of the directory.
            if entry.endswith(IMPLEMENTATIONS) and "/" in str(value):
                raise UserError(
                    f"{file} asks for code of a repository ({entry}: {str(value)[:80]}), which is never run here; take "
                    f"{entry} out"
                )


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises UserError for a number that JSON has no word for."""
    if found := not_finite(value):
        raise UserError(f"{path} is not written, because it would hold {found}; what made it has no result")
    with write_beside(path) as beside:
        beside.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def identity(made_of: Mapping[str, Any], digits: int = 8) -> str:
    """Hash of all that made an artefact: the first hexadecimal digits of the SHA-256 of its canonical JSON."""
    canonical = json.dumps(made_of, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:digits]


SUM = "sha256"  # the key of a file's own sum


def with_sum(value: Mapping[str, Any], key: str = SUM) -> dict[str, Any]:
    """A value as a file keeps it that has a sum of its own, under a key that comes last."""
    return {**value, key: identity(value, 64)}


def without_sum(value: Mapping[str, Any], what: str, *, key: str = SUM, mend: str = REMAKE) -> dict[str, Any]:
    """What `with_sum` was given. Files of before may have no sum and are compared with none.

    what, mend: as in `parse_json`. Raises UserError if the sum is another one.
    """
    rest = {name: member for name, member in value.items() if name != key}
    if key in value and value[key] != identity(rest, 64):
        raise UserError(f"{what} has changed since it was written (its sum is another); {mend}")
    return rest


def not_finite(value: Any) -> str | None:
    """The first NaN or infinite number within lists and dictionaries, as "its.place = nan"; None if there is none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else f"= {value}"
    members: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        members = value.items()
    elif isinstance(value, (list, tuple)):
        members = enumerate(value)
    for name, member in members:
        if found := not_finite(member):
            return f"{name} {found}" if found.startswith("=") else f"{name}.{found}"
    return None
