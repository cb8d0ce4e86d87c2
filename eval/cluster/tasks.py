"""The list of a submission: tasks in arrays, as it lies in tasks.jsonl.

A task is a call of one program. Those of an array need the same artefacts, so that Slurm holds them back together and
no longer than they must wait. The list holds all tasks of its tables, finished or not, in one order: a name always
means the same list, and the number of a task stays.
"""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError
from corpora.files import name_part, open_text
from corpora.json_files import fitted, identity, parse_json, with_sum, without_sum
from corpora.paths import outputs_dir
from corpora.writing import write_beside
from eval.tables.asked import MODULES, Call, Run, calls_of, needed_first
from eval.tables.ledger import is_done

__all__ = [
    "Array",
    "Task",
    "arrays_of",
    "folder_of",
    "is_finished",
    "names",
    "read_tasks",
    "submission_name",
    "tasks_of",
    "write_tasks",
]

LARGEST_ARRAY = 1000  # Slurm's MaxArraySize is 1001 where nobody has set it
LONGEST_NAME = 80
MEND = "delete its folder once none of its jobs is left, and submit again"


@dataclass(frozen=True)
class Task:
    """A call, with the tasks whose artefacts it needs. array: of which it is a part; index: within the whole list."""

    index: int
    array: int
    call: Call
    needs: tuple[int, ...]

    @property
    def key(self) -> str:
        """Identity of all that is asked."""
        return identity({"runs": [run.key for run in self.call.runs]}, 16)


@dataclass(frozen=True)
class Array:
    """Consecutive tasks that need the same."""

    number: int
    tasks: tuple[Task, ...]

    @property
    def first(self) -> int:
        """The task that is number 0 of Slurm's array."""
        return self.tasks[0].index

    @property
    def file_name(self) -> str:
        """Of its batch script."""
        return f"{self.number:02}.sbatch"


def tasks_of(runs: Sequence[Run]) -> list[Task]:
    """Runs as tasks in arrays, what others need first."""
    made, left = (calls_of(part) for part in needed_first(runs))
    at = {run.key: place for place, call in enumerate(made) for run in call.runs}  # of what makes an artefact
    needs = [tuple(sorted({at[run.key] for run in call.needs})) for call in (*made, *left)]
    depth: list[int] = []  # of an artefact: how many stand before it; it needs only earlier ones
    for place in range(len(made)):
        depth.append(max((1 + depth[other] for other in needs[place]), default=0))

    def together(place: int) -> tuple[int, tuple[int, ...]]:
        """What a call has in common with those of its array; arrays are sorted by it."""
        return (depth[place] if place < len(made) else len(made), needs[place])

    order = sorted(range(len(needs)), key=together)
    index = {place: i for i, place in enumerate(order)}
    tasks, number = list[Task](), 0
    for _, places in groupby(order, key=together):
        for count, place in enumerate(places):
            number += bool(count) and count % LARGEST_ARRAY == 0
            call = (*made, *left)[place]
            tasks.append(Task(index[place], number, call, tuple(sorted(index[other] for other in needs[place]))))
        number += 1
    return tasks


def arrays_of(tasks: Iterable[Task]) -> list[Array]:
    """The arrays of a list."""
    return [Array(number, tuple(part)) for number, part in groupby(tasks, key=lambda task: task.array)]


def is_finished(task: Task) -> bool:
    """Whether the ledger has all that a task makes."""
    return all(is_done(run) for run in task.call.runs)


def submission_name(tables: Sequence[str], models: Sequence[Path], tasks: Sequence[Task]) -> str:
    """A readable name, with digits of a hash of the whole list: another list is another submission."""
    first = tables if len(tables) <= 3 else (tables[0], f"and-{len(tables) - 1}-more")
    words = "-".join((*first, *(model.name for model in models)))
    plain = re.sub(r"[^\w.-]+", "-", name_part(words, LONGEST_NAME), flags=re.ASCII)
    return f"{plain}-{identity({'tasks': [task.key for task in tasks]}, 6)}"


def folder_of(name: str) -> Path:
    """Where all of a submission lies."""
    return outputs_dir() / "cluster" / name


def names() -> list[str]:
    """All submissions, the newest first."""
    files = sorted((outputs_dir() / "cluster").glob("*/tasks.jsonl"), key=lambda file: -file.stat().st_mtime)
    return [file.parent.name for file in files]


class _Run(TypedDict):
    program: str
    model: str
    item: str
    words: list[str]
    needs: list[Any]  # of this form again


class _Line(TypedDict):
    task: int
    of: int  # how many there are
    array: int
    key: str
    needs: list[int]
    command: str  # to be read, and called by hand
    runs: list[_Run]
    sha256: str


def write_tasks(name: str, tasks: Sequence[Task]) -> None:
    """Write a list. Raises UserError if another one has the name."""
    path = folder_of(name) / "tasks.jsonl"
    if path.exists():
        if [task.key for task in read_tasks(name)] == [task.key for task in tasks]:
            return
        raise UserError(f"{path.parent} holds another list of tasks; give another --name, or {MEND}")
    with write_beside(path) as beside:
        beside.write_text("".join(f"{json.dumps(_line(task, len(tasks)))}\n" for task in tasks), encoding="utf-8")


def _line(task: Task, of: int) -> dict[str, Any]:
    command = shlex.join(["python", *task.call.command()[1:]])
    runs = [json.loads(json.dumps(asdict(run), default=str)) for run in task.call.runs]
    told = {"task": task.index, "of": of, "array": task.array, "key": task.key, "needs": list(task.needs)}
    return with_sum({**told, "command": command, "runs": runs})


def read_tasks(name: str) -> list[Task]:
    """The list of a submission. Raises UserError for a name that is not known, and for a damaged list."""
    path = folder_of(name) / "tasks.jsonl"
    if not path.is_file():
        known = ", ".join(names()[:5]) or "none yet"
        raise UserError(f"{path} is missing: no submission has that name; choose from {known}, or submit a table")
    what = "the list of tasks"
    with open_text(path, what) as file:
        lines = [parse_json(line, f"{what} {path}", _Line, mend=MEND) for line in file]
    tasks = []
    for i, line in enumerate(lines):
        without_sum(line, f"{what} {path}, line {i + 1},", mend=MEND)
        task = Task(i, line["array"], Call(tuple(_run(run, path) for run in line["runs"])), tuple(line["needs"]))
        if (line["task"], line["of"], line["key"]) != (i, len(lines), task.key):
            raise UserError(f"{what} {path} is damaged: line {i + 1} is not what was written there; {MEND}")
        tasks.append(task)
    if not tasks:
        raise UserError(f"{what} {path} is empty; {MEND}")
    return tasks


def _run(told: Any, path: Path) -> Run:
    fitted(told, _Run, f"the list of tasks {path}", mend=MEND)
    if told["program"] not in MODULES:
        raise UserError(f"the list of tasks {path} is damaged: no program is called {told['program']!r}; {MEND}")
    needs = tuple(_run(needed, path) for needed in told["needs"])
    return Run(told["program"], Path(told["model"]), told["item"], tuple(told["words"]), needs)
