"""The house: who may import whom, and the files that know the names of a model's modules."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("eval", "quantization", "intactkv", "corpora")  # each may import itself and what stands behind it
FILES = {
    ".".join(part for part in file.relative_to(ROOT).with_suffix("").parts if part != "__init__"): file
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.py"))
}
NAMES = re.compile(r"q_proj|k_proj|v_proj|o_proj|down_proj|lm_head|model\.layers")


def imported(file: Path) -> set[str]:
    """The project's modules that a file imports, at its head, inside functions, or for types alone."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write out what is imported"
            module = node.module or ""
            within = {f"{module}.{alias.name}" for alias in node.names}
            found |= within & FILES.keys() or {module}
    return found & FILES.keys()


ARROWS = {module: imported(file) - {module} for module, file in FILES.items()}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def is_program(module: str) -> bool:
    return module.endswith(".__main__")


def room_of(module: str) -> str:
    """A folder or a top-level module of a package; a `__main__` stands above all rooms and is one of its own."""
    return module if is_program(module) else ".".join(module.split(".")[:2])


def rooms(package: str) -> dict[str, set[str]]:
    """The rooms of a package, and the others that each of them imports."""
    found: dict[str, set[str]] = {}
    for module, others in ARROWS.items():
        if package_of(module) == package and module != package:
            into = {room_of(other) for other in others if package_of(other) == package and other != package}
            found.setdefault(room_of(module), set()).update(into - {room_of(module)})
    return found


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """A way from somewhere back to itself; [] if there is none."""
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for other in sorted(arrows[path[-1]]):
            if other in path:
                return [*path[path.index(other) :], other]
            if other not in done and (found := search([*path, other])):
                return found
        done.add(path[-1])
        return []

    return next((found for start in arrows if start not in done and (found := search([start]))), [])


def test_a_circle_is_found_and_a_diamond_is_none() -> None:
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}) == ["b", "c", "d", "b"]


def test_arrows_point_down_from_package_to_package() -> None:
    """The program of prefixes forwards to one that knows recipes, that of data to the doctor, which knows tables; there
    is no other arrow up."""
    level = {package: i for i, package in enumerate(PACKAGES)}
    up = {(a, b) for a, others in ARROWS.items() for b in others if level[package_of(b)] < level[package_of(a)]}
    assert {(a, room_of(b)) for a, b in up} == {
        ("intactkv.__main__", "quantization.programs"),
        ("corpora.__main__", "eval.programs"),
    }


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(ARROWS) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_rooms_import_each_other_in_a_circle(package: str) -> None:
    assert circle(rooms(package)) == []


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("quantization.programs", ()),
        ("quantization.export", ("quantization.programs",)),
        ("quantization.runs", ("quantization.programs", "quantization.export")),
    ],
)
def test_what_stands_high_in_quantization_is_imported_from_above_alone(room: str, allowed: tuple[str, ...]) -> None:
    assert room in rooms("quantization")
    within = {r for r, others in rooms("quantization").items() if room in others and not is_program(r)}
    assert within <= set(allowed)


def test_programs_import_programs_and_nothing_else_does() -> None:
    users = {module for module, others in ARROWS.items() if any(room_of(o) == "quantization.programs" for o in others)}
    assert {m for m in users if not is_program(m)} <= {
        m for m in ARROWS if room_of(m) in ("quantization.programs", "eval.programs")
    }


def test_only_the_table_of_architectures_knows_the_names_of_modules() -> None:
    found = {module: NAMES.findall(file.read_text(encoding="utf-8")) for module, file in FILES.items()}
    knowing = {module for module, names in found.items() if names}
    assert knowing == {
        "intactkv.architecture", "intactkv.families.experts", "intactkv.families.fused", "intactkv.families.llama",
        "intactkv.layout", "intactkv.parts",
    }  # fmt: skip
