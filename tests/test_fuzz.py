"""A short run of the fuzzer over every kind of file and every program's options, and that it sees what it looks for.

`python -m tests.fuzz --seed 7 --calls 200` is the long one; `--case NAME` runs one case again.
"""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from common import ROOT
from fuzz.campaign import run_case, run_kind
from fuzz.damage import DAMAGES
from fuzz.engine import Call, Case, Outcome, Program, Scratch, damaged, judge, scratch
from fuzz.kinds import KINDS, named, printed
from fuzz.options import PROGRAMS, option_cases, run_options
from fuzz.worlds import MODEL

from corpora.errors import UserError

CALLS, OPTIONS, SEED = 3, 40, 14
WORLDS = sorted({kind.world for kind in KINDS.values()})


@pytest.fixture(scope="module")
def place() -> Iterator[Scratch]:
    with scratch() as made:
        yield made


def told(calls: list[Call]) -> str:
    return "\n".join(f"{one.name}  {one.done}\n    {one.fault}: {one.told}" for one in calls if one.fault)


@pytest.mark.parametrize("world", WORLDS)
def test_a_damaged_file_is_refused_in_one_line_or_changes_no_figure(place: Scratch, world: str) -> None:
    kinds = [kind for kind in KINDS.values() if kind.world == world]
    calls = [one for kind in kinds for one in run_kind(place, kind, SEED, CALLS)]
    assert len(calls) == CALLS * len(kinds)
    assert not told(calls), told(calls)


def test_nonsense_for_an_option_is_refused_in_one_line(place: Scratch) -> None:
    calls = list(run_options(place, SEED, OPTIONS))
    assert len(calls) == OPTIONS
    assert not told(calls), told(calls)


def test_every_option_with_a_value_is_known_to_the_fuzzer(place: Scratch) -> None:
    """Those of the parsers: a program whose parser is not found would have none."""
    for name in PROGRAMS:
        assert len(list(option_cases(name))) > 50, name


@pytest.mark.parametrize("name", [
    f"config:ppl:{MODEL}/config.json:nest:2", "prefix:ppl:p.safetensors:truncate:1",
])  # fmt: skip
def test_a_process_of_its_own_ends_as_the_call_in_this_one(place: Scratch, name: str) -> None:
    case = Case.named(name)
    here = run_case(place, case).outcome
    kind = KINDS[case.kind]
    (words,) = (program.words for program in kind.programs if program.name == case.program)
    with place.copy(place.template(kind.world, kind.build)) as world:
        DAMAGES[case.damage].work(world / case.file, random.Random(case.name), [])
        environment = os.environ | {"INTACTKV_ROOT": str(world), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, here.code) == (2, 2)
    there, ours = (re.sub(r"/calls/\d+/", "/", text) for text in (done.stderr, here.err))
    assert there == ours


# that it sees faults --------------------------------------------------------------------------------------------------


def boom() -> None:
    raise KeyError("a bug")


def sleeps() -> None:
    time.sleep(30)


def leaves() -> None:
    Path("left.txt").write_text("x")
    raise UserError("no")


def leaves_a_folder() -> None:
    Path("outputs/runs").mkdir(parents=True)
    raise UserError("no")


def leaves_outside() -> None:
    Path("../../x").write_text("x")
    raise UserError("no")


def overwrites() -> None:
    Path("input.json").write_text("{}")
    print("1")


def says_more() -> None:
    print("by the way", file=sys.stderr)
    raise UserError("no")


def other_figures() -> None:
    print(Path("input.json").read_text())


def opens_the_pipe() -> None:
    if not Path("input.json").is_dir():
        Path("input.json").read_text()
    print("1")


FAULTY: dict[Callable[[], None], tuple[str, str]] = {
    boom: ("truncate", "traceback"), sleeps: ("truncate", "hang"), leaves: ("truncate", "leftover"),
    leaves_outside: ("truncate", "leftover"), leaves_a_folder: ("truncate", "leftover"),
    overwrites: ("truncate", "changed"), says_more: ("truncate", "lines"),
    other_figures: ("retype", "silent"), opens_the_pipe: ("pipe", "hang"),
    lambda: sys.exit(1): ("truncate", "exit code"),
}  # fmt: skip


@pytest.mark.parametrize(("main", "damage", "fault"), [(main, *case) for main, case in FAULTY.items()])
def test_a_fault_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], damage: str, fault: str
) -> None:
    if fault == "hang":
        monkeypatch.setattr("fuzz.engine.SECONDS", 0.2)
    assert fault_of(tmp_path, monkeypatch, main, damage) == fault


@pytest.mark.parametrize(("told", "fault"), [("by the way", "silent"), ("1 row of ./input.json is left out", None)])
def test_a_file_is_left_out_only_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, fault: str | None
) -> None:
    def other() -> None:
        print(told, file=sys.stderr)
        print("0")

    assert fault_of(tmp_path, monkeypatch, other, "retype", named) == fault


def test_control_characters_are_seen() -> None:
    for stream in range(3):
        texts = ["a\x1b[31m" if i == stream else "" for i in range(3)]
        assert judge(Outcome(0, *texts), {}, {}, lambda: True)[0] == "control"


@pytest.mark.parametrize(
    "damage", sorted(set(DAMAGES) - {"unreadable", "cell", "header", "metadata", "tensor", "twice"})
)
def test_a_program_that_behaves_has_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    def refuses() -> None:
        raise UserError("input.json is damaged")

    assert fault_of(tmp_path, monkeypatch, refuses, damage) is None
    assert fault_of(tmp_path, monkeypatch, lambda: print("1"), damage) is None


def fault_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    main: Callable[[], None],
    damage: str,
    without: Callable[[Outcome, str], bool] | None = None,
) -> str | None:
    """What the fuzzer says of a program with such a `main` whose input is damaged."""
    module = ModuleType("planted.__main__")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "planted", ModuleType("planted"))
    monkeypatch.setitem(sys.modules, "planted.__main__", module)
    template = tmp_path / "world"
    template.mkdir(exist_ok=True)
    (template / "input.json").write_text('{"a": 1}')
    program = Program("planted", ("planted",), printed)
    case = Case("planted", "planted", "input.json", damage, 1)
    return damaged(Scratch(tmp_path), case, template, program, "1\n", own=True, rewritten=None, without=without).fault
