"""What is asked of the programs for a table: its cells, and the runs that they are of.

A `Run` is everything that is asked: program, model, method, arm, item, seed, and what must be made before. Its key is a
hash of all that. Runs that need the same checkpoint or trained prefix name the same run for it, which is made once.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from corpora.catalog import ModelDefaults, catalog_name, model_defaults
from corpora.json_files import identity
from corpora.paths import modelzoo_dir, outputs_dir
from eval.tables.declared import PUBLISHED, Arm, Measure, Method, Paper, Row, Scope, Words

__all__ = ["Call", "Cell", "Run", "calls_of", "cells_of", "measures_of", "needed_first", "runs_of", "words_of"]

# What the programs are, for `python -m`, and how they take what they score.
MODULES = {
    "ppl": ("eval", "ppl"), "tasks": ("eval", "tasks"), "needle": ("eval", "needle"), "chat": ("eval", "chat"),
    "mtbench": ("eval", "mtbench"), "judge": ("eval", "judge"), "latency": ("benchmarks.lutgemm",),
    "quantization": ("quantization",), "calibrate": ("intactkv", "calibrate"),
    "train-prefix": ("intactkv", "train-prefix"),
}  # fmt: skip
ITEMS = {"ppl": "--corpus", "tasks": "--tasks", "chat": "--prompt"}
# Programs that write a file of our naming: its folder below the root, and its ending.
FILES = {
    "calibrate": ("modelzoo/prefixes", ".safetensors"), "train-prefix": ("modelzoo/prefixes", ".safetensors"),
    "mtbench": ("outputs/mt_bench/model_answer", ".jsonl"),
}  # fmt: skip
WITHOUT_MODEL = ("judge", "latency")


@dataclass(frozen=True)
class Run:
    """What is asked of a program once. model: directory. item: what is scored: a corpus, a task, a prompt. words: all
    other options but for the model and the device; `{0}` is the file of the first of `needs`. needs: what must be made
    before."""

    program: str
    model: Path
    item: str
    words: Words
    needs: tuple["Run", ...] = ()

    @property
    def key(self) -> str:
        """Identity of what is asked. Where it computes is left out: the record says it."""
        return identity({
            "program": self.program, "model": self.model.name, "item": self.item, "words": self.words,
            "needs": [run.key for run in self.needs],
        }, 16)  # fmt: skip

    @property
    def label(self) -> str:
        """What is asked, in one line for a reader."""
        return " ".join([*MODULES[self.program][-1:], self.model.name, *self.words, self.item]).rstrip()

    @property
    def file(self) -> Path | None:
        """The file that it writes beside its record; None for programs that name theirs themselves."""
        if self.program not in FILES:
            return None
        folder, suffix = FILES[self.program]
        place = {"modelzoo": modelzoo_dir, "outputs": outputs_dir}[folder.partition("/")[0]]()
        return place / folder.partition("/")[2] / f"{self.model.name}-{self.key}{suffix}"


@dataclass(frozen=True)
class Call:
    """Runs of one program that differ only in the item: one command, one model loaded."""

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """Which stands for all but for the item."""
        return self.runs[0]

    @property
    def needs(self) -> tuple[Run, ...]:
        """What must be made before."""
        return self.first.needs

    @property
    def label(self) -> str:
        """What is asked, in one line for a reader, with all items."""
        return " ".join([replace(self.first, item="").label, *(run.item for run in self.runs)]).rstrip()

    def command(self, device: str = "auto") -> list[str]:
        """The command line, with this interpreter in front."""
        run = self.first
        files = [str(needed.file) for needed in run.needs]
        words = [files[int(word[1:-1])] if word[:1] + word[-1:] == "{}" else word for word in run.words]
        items: list[str] = []
        if run.program == "tasks":
            items = ["--tasks", ",".join(run.item for run in self.runs)]
        elif run.program in ITEMS:
            items = [word for run in self.runs for word in (ITEMS[run.program], run.item)]
        model = [] if run.program in WITHOUT_MODEL else ["--model", str(run.model)]
        out = [] if run.file is None else ["--out", str(run.file)]
        return [sys.executable, "-m", *MODULES[run.program], *model, *words, *items, *out, "--device", device]


@dataclass(frozen=True)
class Cell:
    """A figure of a table, and the runs that it is of: one, or one for every seed; none for an average."""

    row: Row
    measure: Measure
    runs: tuple[Run, ...]


def measures_of(paper: Paper, model: Path, scope: Scope) -> tuple[Measure, ...]:
    """The columns that a model fills: perplexities of other corpora than the paper's stand in the place of its own."""
    own = model_defaults(model.name).default_corpora
    found: dict[Measure, None] = {}
    for measure in paper.measures:
        protocol = "gptq" if "gptq" in measure.options else "intactkv"
        corpora = scope.corpora
        if not corpora and own != ModelDefaults().default_corpora:
            corpora = model_defaults(model.name).corpora_of(protocol)
        if measure.program == "ppl" and corpora:
            own_columns = {m.item: m for m in paper.measures if m.program == "ppl" and m.options == measure.options}
            found |= {
                own_columns.get(name, replace(measure, item=name, head=Path(name).name)): None for name in corpora
            }
        else:
            found[measure] = None
    return tuple(found)


def cells_of(paper: Paper, model: Path, scope: Scope = PUBLISHED) -> list[Cell]:
    """The cells of a table for one model, row by row. model: its directory, which need not be there."""
    measures = measures_of(paper, model, scope)
    kinds = words_of(paper, measures)
    return [
        Cell(row, measure, _runs(row, measure, model, scope))
        for row in paper.rows
        for measure in measures
        if _chosen(row, measure, kinds, scope)
    ]


def _chosen(row: Row, measure: Measure, kinds: Sequence[set[str]], scope: Scope) -> bool:
    """Whether --only leaves a cell: of each kind of word that was given, one must name it. A word that names nothing of
    a table leaves nothing of it."""
    words = {word.lower() for word in scope.only}
    given = [words & known for known in kinds]
    fits = all(name in some or not some for name, some in zip(_names(row, measure), given, strict=True))
    return fits and not words.difference(*kinds)


def _names(row: Row, measure: Measure) -> tuple[str, str, str]:
    """What --only calls a cell: method, arm, measure."""
    return row.method.name.lower(), row.arm.label.lower() or "alone", measure.head.lower()


def words_of(paper: Paper, measures: Iterable[Measure]) -> tuple[set[str], set[str], set[str]]:
    """The words that --only takes of a table, by kind: methods, arms, measures."""
    names = [_names(row, measure) for row in paper.rows for measure in measures]
    return {method for method, _, _ in names}, {arm for _, arm, _ in names}, {head for _, _, head in names}


def _runs(row: Row, measure: Measure, model: Path, scope: Scope) -> tuple[Run, ...]:
    if measure.average_of or (measure.program == "judge" and not scope.judge):
        return ()
    seeds = scope.seeds if row.method.calibrates else ()
    return tuple(_run(row, measure, model, scope, seed) for seed in seeds or (None,))


def _run(row: Row, measure: Measure, model: Path, scope: Scope, seed: int | None) -> Run:
    method, arm = row.method, row.arm
    if measure.program == "latency":
        return Run("latency", model, measure.item, (*method.options, *measure.options))
    own = dict(method.by_model).get(catalog_name(model.name), ())
    more = scope.options if method.recipe != "fp16" else ()
    made: Words = ("--recipe", method.recipe, *method.options, *own, *more)
    text = _text(method, model, scope, seed)
    behind: Words = ("--calibrate-behind-prefix",) if arm.behind and method.calibrates else ()
    inside = bool(behind) or method.behind  # the method's text runs behind the prefix: that is made first
    prefix: Words = ("--prefix", arm.prefix) if arm.prefix else ()
    needs: tuple[Run, ...] = ()
    if arm.trains and inside:
        needs = (_trained(arm, model, (*made, *text, *prefix), scope, ()),)
        prefix = ("--prefix", "{0}")
    if method.quantizes:
        words = (*made, *text, *behind, *(prefix if inside else ()))
        needs = (*needs, Run("quantization", model, "", words, needs))
    if arm.trains and not inside:
        needs = (*needs, _trained(arm, model, (*made, *text, *prefix), scope, needs))
        prefix = ("--prefix", f"{{{len(needs) - 1}}}")
    kv = method.words(measure.generates)[2 + len(method.options) :]
    front = (*prefix, *behind, *(("--vanilla",) if arm.vanilla else ()))
    words = (*made, *kv, *text, *front, *measure.options, *_size(measure, scope))
    if measure.program == "judge":
        answers = Run("mtbench", model, "", words, needs)
        return Run("judge", model, "", ("--answers", "{0}", *scope.judge), (answers,))
    return Run(measure.program, model, measure.item, words, needs)


def _text(method: Method, model: Path, scope: Scope, seed: int | None) -> Words:
    """What a method calibrates on, where that is not the recipe's or the model's own text."""
    if not method.calibrates:
        return ()
    published = method.text if model_defaults(model.name).default_calibration is None else ()
    return (*published, *scope.calibration, *(() if seed is None else ("--seed", str(seed))))


def _trained(arm: Arm, model: Path, words: Words, scope: Scope, needs: tuple[Run, ...]) -> Run:
    """The run that trains an arm's prefix."""
    command, *own = arm.trains
    return Run(command, model, "", (*words, *own, *scope.training), needs)


def _size(measure: Measure, scope: Scope) -> Words:
    """How much is scored, where it is not the published amount."""
    size: list[str] = []
    if scope.limit is not None and measure.program in ("ppl", "tasks", "judge"):
        size += ["--limit", str(scope.limit)]
    if scope.window is not None and measure.program == "ppl":
        size += ["--window", str(scope.window)]
    if scope.data is not None and measure.program == "tasks":
        size += ["--data", scope.data]
    return tuple(size)


def runs_of(cells: Iterable[Cell]) -> list[Run]:
    """Every run of some cells once, what it needs in front of it."""
    found: dict[str, Run] = {}

    def add(run: Run) -> None:
        for needed in run.needs:
            add(needed)
        found.setdefault(run.key, run)

    for cell in cells:
        for run in cell.runs:
            add(run)
    return list(found.values())


def needed_first(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """What others need (checkpoints, trained prefixes, answers), and what only leaves a record."""
    needed = {part.key for run in runs for part in run.needs}
    return [run for run in runs if run.key in needed], [run for run in runs if run.key not in needed]


def calls_of(runs: Iterable[Run]) -> list[Call]:
    """Runs as calls: those of one program that differ only in the item share one, in the order of the first of each."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        together = run.program in ("ppl", "tasks")
        groups.setdefault(replace(run, item="").key if together else run.key, []).append(run)
    return [Call(tuple(group)) for group in groups.values()]
