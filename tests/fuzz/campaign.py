"""Many calls: every kind's files, damages and programs in a random order that a seed decides."""

import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz.damage import DAMAGES
from fuzz.damage_files import Inapplicable
from fuzz.engine import FAULTS, Call, Case, Scratch, call, damaged
from fuzz.kinds import KINDS, Kind

__all__ = ["controls", "run_case", "run_kind", "table"]

_EXPECTED: dict[tuple[str, tuple[str, ...]], Any] = {}


def controls(scratch: Scratch, kind: Kind) -> dict[str, Any]:
    """The figures of the kind's programs on intact files, each run in two copies of the world: they must agree."""
    template = scratch.template(kind.world, kind.build)
    for program in kind.programs:
        key = (kind.world, program.words)  # several kinds lie in one world
        if key in _EXPECTED:
            continue
        figures = []
        for _ in range(2):
            with scratch.copy(template) as world:
                outcome = call(world, program.words, seconds=120)
                if outcome.code != 0:
                    raise RuntimeError(f"the control of {key} fails: {outcome.frame or outcome.err[-500:]}")
                figures.append(program.figures(outcome, world))
        if figures[0] != figures[1]:
            raise RuntimeError(f"two controls of {key} differ")
        _EXPECTED[key] = figures[0]
    return {program.name: _EXPECTED[kind.world, program.words] for program in kind.programs}


def run_case(scratch: Scratch, case: Case, keep: Path | None = None) -> Call:
    """One case. Raises Inapplicable where the damage does not fit the file."""
    kind = KINDS[case.kind]
    expected = controls(scratch, kind)[case.program]
    (program,) = (program for program in kind.programs if program.name == case.program)
    template = scratch.template(kind.world, kind.build)
    rewritten = re.compile(kind.rewritten) if kind.rewritten else None
    return damaged(
        scratch, case, template, program, expected, own=kind.own, rewritten=rewritten, without=kind.without, keep=keep
    )


def run_kind(scratch: Scratch, kind: Kind, seed: int, calls: int) -> Iterator[Call]:
    """So many calls: all damages of all files under all programs in turn, each time with another variant."""
    template = scratch.template(kind.world, kind.build)
    files = sorted({str(path.relative_to(template)) for pattern in kind.files for path in template.glob(pattern)})
    if not files:
        raise RuntimeError(f"{kind.name}: no file like {kind.files}")
    rng, made, tried = random.Random(f"{seed}:{kind.name}"), 0, 0
    names = list(DAMAGES)
    # What has many variants comes more often.
    names += [name for name in ("retype", "tensor", "metadata", "header", "cell") for _ in range(4)]
    names += [name for name in ("delete", "truncate", "flip", "nest") for _ in range(1)]
    while made < calls and tried < 50 * calls:
        tried += 1
        case = Case(
            kind.name, rng.choice(kind.programs).name, rng.choice(files), rng.choice(names), rng.randrange(10**6)
        )
        try:
            yield run_case(scratch, case)
        except Inapplicable:
            continue
        made += 1


def table(calls: dict[str, list[Call]]) -> str:
    """One row a kind: calls, and how many of each fault."""
    rows = [("kind", "calls", *FAULTS)]
    for name, done in calls.items():
        count = Counter(one.fault for one in done)
        rows.append((name, str(len(done)), *(str(count[fault] or "") for fault in FAULTS)))
    total = Counter(one.fault for done in calls.values() for one in done)
    rows.append(("all", str(sum(map(len, calls.values()))), *(str(total[fault] or "") for fault in FAULTS)))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)
