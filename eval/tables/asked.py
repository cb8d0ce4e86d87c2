"""What is asked of the programs for a table: its cells, and the runs that they are of.

A `Run` is everything that is asked: program, model, method, arm, item, seed, and what must be made before. Its key is a
hash of all that. Runs that need the same checkpoint or trained prefix name the same run for it, which is made once.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from corpora.catalog import ModelDefaults, catalog_name, model_defaults
from corpora.json_files import identity
from corpora.paths import modelzoo_dir, outputs_dir
from eval.tables.declared import ALONE, BOS, BOS_ALONE, PUBLISHED, Arm, Measure, Method, Paper, Row, Scope, Words
from eval.tables.heads import heads_of
from eval.tables.papers.columns import BIGBENCH, GSM8K, MMLU, SIX, TRUTHFULQA, behind_bos
from eval.tasks.groups import GROUPS

__all__ = ["PLACE", "Call", "Cell", "Run", "bases_of", "calls_of", "cells_of", "measures_of", "needed_first", "rows_of",
           "runs_of", "size_of", "words_of"]  # fmt: skip

PLACE = "\0"  # in front of a number, the file of that run of `needs`: no word of a command line can hold it
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
# Of the published needles: units of filler in all; tokens of a line of it, and of all that is no filler, about.
UNITS, LINE, NEEDLE = 10, 24, 120
TOLD = ("--recipe", "--bits", "--group-size", "--kv", "--kv-bits", "--seed", "--prefix")  # in a run's label
WITHOUT_MODEL = ("judge", "latency")
RUN_TIME = ("--dtype", "--kernel", "--kv-storage")
KNOWN_TASKS = behind_bos(*SIX, MMLU, GSM8K, TRUTHFULQA, BIGBENCH)  # with their metrics; of others the record says it
# Protocols of perplexity whose windows all start with [BOS]; corpora.text, which has them, imports torch.
BOS_IN_WINDOWS = ("intactkv",)


@dataclass(frozen=True)
class Run:
    """What is asked of a program once. model: directory. item: what is scored: a corpus, a task, a prompt. words: all
    other options but for the model and the device; PLACE + "0" is the file of the first of `needs`. needs: what must be
    made before. on_the_way: the name of what the program makes by itself if it is not there (levels of a cache, a
    search of a prefix); of runs that share one, the first goes ahead."""

    program: str
    model: Path
    item: str
    words: Words
    needs: tuple["Run", ...] = ()
    on_the_way: str = field(default="", compare=False)

    @cached_property
    def key(self) -> str:
        """Identity of what is asked. Where it computes is left out: the record says it."""
        return identity({
            "program": self.program, "model": self.model.name, "item": self.item, "words": self.words,
            "needs": [run.key for run in self.needs],
        }, 16)  # fmt: skip

    def option(self, name: str) -> str:
        """The last value of an option among its words, as argparse takes it; empty if it is not there."""
        places = [i for i, word in enumerate(self.words[:-1]) if word == name]
        return self.words[places[-1] + 1] if places else ""

    @property
    def label(self) -> str:
        """What is asked, in short for a reader: what tells it from most others, and the item."""
        told = [
            f"{word[2:]} {'trained' if value.startswith(PLACE) else value}"
            for word, value in pairwise(self.words)
            if word in TOLD
        ]
        flags = {"--calibrate-behind-prefix": "behind it", "--vanilla": "vanilla"}
        more = [word for flag, word in flags.items() if flag in self.words]
        return " ".join([*MODULES[self.program][-1:], self.model.name, *told, *more, self.item]).rstrip()

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
        words = [files[int(word[1:])] if word.startswith(PLACE) else word for word in run.words]
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
    """The columns that a model fills: of other corpora or tasks than the paper's where the scope, or for perplexity the
    model, has some; behind what is the paper's own."""
    found: dict[Measure, None] = {}
    for measure in paper.measures:
        corpora = _corpora(measure, model, scope) if measure.program == "ppl" else ()
        if corpora:
            own = {m.item: m for m in paper.measures if m.program == "ppl" and m.options == measure.options}
            taken = {m.head for m in paper.measures}
            called = heads_of([name for name in dict.fromkeys(corpora) if name not in own], taken)
            found |= {own.get(name) or replace(measure, item=name, head=called[name]): None for name in corpora}
        else:
            found[measure] = None
    if scope.tasks:
        asked = {m.item: m for m in (*KNOWN_TASKS, *paper.measures) if m.program == "tasks" and m.item}
        names = [task for name in scope.tasks if name != "none" for task in GROUPS.get(name, (name,))]
        columns = [asked.get(name, Measure(name, "tasks", name, better="higher")) for name in names]
        # In one table no text stands alone in two ways.
        alone = next((m.alone for m in paper.measures if m.program == "tasks"), ())
        columns = [replace(column, alone=alone) for column in columns]
        heads = {column.head for column in columns}
        means = [m for m in found if m.average_of and heads.issuperset(m.average_of)]
        found = dict.fromkeys([*(m for m in found if m.program != "tasks"), *columns, *means])
    return tuple(found)


def _corpora(measure: Measure, model: Path, scope: Scope) -> Words:
    """What a column of perplexity scores in place of its own corpus; nothing if that is what it scores."""
    own = model_defaults(model.name).default_corpora
    if scope.corpora or own == ModelDefaults().default_corpora:
        return scope.corpora
    by = (*measure.options, *scope.scoring)
    return model_defaults(model.name).corpora_of("gptq" if "gptq" in by else "intactkv")


def rows_of(paper: Paper, scope: Scope) -> tuple[Row, ...]:
    """The rows, or those of the scope's recipes; with what is calibrated behind the prefix of an arm, if it asks so."""
    arms = {row.arm for row in paper.rows}
    rows = tuple(row for name in scope.recipes for row in _recipe_rows(name, scope, BOS_ALONE in arms)) or paper.rows
    found: list[Row] = []
    for row in rows:
        found.append(row)
        arm, method = row.arm, row.method
        plain = arm.prefix != ALONE.prefix and not (arm.behind or arm.vanilla or arm.trains)
        if scope.behind and plain and method.calibrates and not method.behind:
            behind = replace(arm, label=f"behind {arm.label}", behind=True)
            if not any(other.method == method and other.arm.behind for other in rows):
                found.append(replace(row, arm=behind, published={}))
    return tuple(found)


def _recipe_rows(name: str, scope: Scope, bos_alone: bool) -> list[Row]:
    """A named recipe behind each prefix of the scope, as `with_arms` has it. bos_alone: [BOS] also stands in front as
    in the table, with nothing of it kept. Raises UserError for an unknown name."""
    from quantization.named import named_recipe
    from quantization.recipes.recipe import with_settings

    options, recipe = scope.options_of(Method(name, name)), named_recipe(name)
    sets = [value for word, value in pairwise(options) if word == "--set"]
    labels = {"none": (ALONE,), "bos": (BOS_ALONE, BOS) if bos_alone else (BOS,)}
    arms = [arm for word in scope.prefixes for arm in labels.get(word, (Arm(f"[{Path(word).stem}]", word),))]
    if not recipe.makes_checkpoint and recipe.kv_cache is None:
        return [Row(name, Method(name, name), arm) for arm in (ALONE, *(arm for arm in arms if arm.vanilla))]
    fields = [one for one in sets if one.startswith(("weights.", "activations."))]  # they decide what calibrates
    method = Method(
        name, name, calibrates=with_settings(recipe, fields).calibrates, quantizes=recipe.makes_checkpoint,
        behind=recipe.calibrate_behind_prefix,
    )  # fmt: skip
    return [Row(name, method, arm) for arm in arms]


def cells_of(paper: Paper, model: Path, scope: Scope = PUBLISHED) -> list[Cell]:
    """The cells of a table for one model, row by row. model: its directory, which need not be there."""
    measures = measures_of(paper, model, scope)
    kinds = words_of(paper, measures, scope)
    return [
        Cell(row, measure, _runs(row, measure, model, scope))
        for row in rows_of(paper, scope)
        for measure in measures
        if _chosen(row, measure, measures, kinds, scope)
    ]


def _chosen(row: Row, measure: Measure, measures: Sequence[Measure], kinds: Sequence[set[str]], scope: Scope) -> bool:
    """Whether --only leaves a cell: of each kind of word that was given, one must name it. A word that names nothing of
    a table leaves nothing of it."""
    words = {word.lower() for word in scope.only}
    names = _names(row, measure, measures)
    fits = all(words & mine or not words & known for mine, known in zip(names, kinds, strict=True))
    return fits and not words.difference(*kinds)


def _names(row: Row, measure: Measure, measures: Iterable[Measure]) -> tuple[set[str], ...]:
    """What --only calls a cell: its method, row or recipe, its width, arm, measure, or the average that it is of."""
    method = row.method
    heads = (measure.head, *(other.head for other in measures if measure.head in other.average_of))
    words = ((method.name, row.label, method.recipe), (method.bits,), (row.arm.label or "alone",), heads)
    return tuple({word.lower() for word in kind} for kind in words)


def words_of(paper: Paper, measures: Sequence[Measure], scope: Scope = PUBLISHED) -> list[set[str]]:
    """The words that --only takes of a table, by kind: methods, rows and recipes, widths, arms, measures."""
    names = [_names(row, measure, measures) for row in rows_of(paper, scope) for measure in measures]
    return [set[str]().union(*kind) for kind in zip(*names, strict=True)]


def _runs(row: Row, measure: Measure, model: Path, scope: Scope) -> tuple[Run, ...]:
    if measure.average_of or (measure.program == "judge" and not scope.judge):
        return ()
    seeds = scope.seeds if row.method.calibrates else ()
    return tuple(_run(row, measure, model, scope, seed) for seed in seeds or (None,))


def _run(row: Row, measure: Measure, model: Path, scope: Scope, seed: int | None) -> Run:
    method, arm = row.method, row.arm
    if measure.program == "latency":
        return Run("latency", model, measure.item, (*method.options, *measure.options))
    own = (*_own_groups(method, model), *dict(method.by_model).get(catalog_name(model.name), ()))
    more = scope.options_of(method)
    plain: Words = ("--recipe", method.recipe, *method.options, *own)
    made = (*plain, *more)
    text = _text(method, model, scope, seed)
    behind: Words = ("--calibrate-behind-prefix",) if arm.behind and method.calibrates else ()
    inside = bool(behind) or method.behind  # the method's text runs behind the prefix: that is made first
    prefix: Words = ("--prefix", arm.prefix) if arm.prefix else ()
    searched = f"{model.name} {arm.prefix}" if arm.prefix.startswith("auto") else ""
    needs: tuple[Run, ...] = ()
    if arm.trains and inside:
        needs = (_trained(arm, model, (*made, *text, *prefix), scope, ()),)
        prefix = ("--prefix", f"{PLACE}0")
    if method.quantizes:
        words = (*plain, *_lasting(more), *text, *behind, *(prefix if inside else ()))
        needs = (*needs, Run("quantization", model, "", words, needs, searched if inside else ""))
    if arm.trains and not inside:
        needs = (*needs, _trained(arm, model, (*made, *text, *prefix), scope, needs))
        prefix = ("--prefix", f"{PLACE}{len(needs) - 1}")
    kv = method.words(measure.generates)[2 + len(method.options) :]
    front = (*prefix, *behind, *(("--vanilla",) if arm.vanilla else ()))
    asked = (*plain, *kv, *more, *text, *front)
    alone = measure.alone if arm.prefix == ALONE.prefix else ()
    words = (*asked, *measure.options, *alone, *size_of(measure, scope))
    fitted = f"{model.name} {' '.join(asked)}" if method.calibrates and not method.quantizes else searched
    if measure.program == "judge":
        answers = Run("mtbench", model, "", words, needs)
        return Run("judge", model, "", ("--answers", f"{PLACE}0", *scope.judge), (answers,))
    return Run(measure.program, model, measure.item, words, needs, fitted)


def _lasting(options: Words) -> Words:
    """Options without those that only matter when a model runs, which the program that quantizes does not know."""
    found: list[str] = []
    words = iter(options)
    for word in words:
        if word in RUN_TIME:
            next(words, None)
        elif word.partition("=")[0] not in RUN_TIME:
            found.append(word)
    return tuple(found)


def _text(method: Method, model: Path, scope: Scope, seed: int | None) -> Words:
    """What a method calibrates on, where that is not the recipe's or the model's own text."""
    if not method.calibrates:
        return ()
    return (*_published(method.text, model), *scope.calibration, *(() if seed is None else ("--seed", str(seed))))


def _own_groups(method: Method, model: Path) -> Words:
    """The group size of a model that has one of its own, behind the published one, whose place it takes."""
    own, published = model_defaults(model.name).default_group_size, ModelDefaults().default_group_size
    return ("--group-size", str(own)) if method.own_groups and own != published else ()


def _published(text: Words, model: Path) -> Words:
    """The paper's text; nothing for a model that has one of its own."""
    return text if model_defaults(model.name).default_calibration is None else ()


def _trained(arm: Arm, model: Path, words: Words, scope: Scope, needs: tuple[Run, ...]) -> Run:
    """The run that trains an arm's prefix, on the scope's text if there is one: how much of it, `training` says."""
    command, *own = arm.trains
    given = dict(pairwise(scope.calibration)).get("--calibration") if command == "train-prefix" else None
    text = (*_published(arm.text, model), *(() if given is None else ("--corpus", given)))
    return Run(command, model, "", (*words, *own, *text, *scope.training), needs)


def size_of(measure: Measure, scope: Scope) -> Words:
    """How much is scored, where it is not the published amount."""
    more = {"ppl": scope.scoring, "tasks": scope.asking}
    size: list[str] = [*more.get(measure.program, ()), *(scope.mmlu if measure.item == "mmlu" else ())]
    if scope.limit is not None and measure.program in ("ppl", "tasks", "judge"):
        size += ["--limit", str(scope.limit)]
    if scope.window is not None and measure.program == "ppl":
        size += ["--window", str(scope.window)]
    if scope.window is not None and measure.program == "needle":
        size += ["--lines", str(max(1, (scope.window - NEEDLE) // (UNITS * LINE)))]
    if scope.questions is not None and measure.program == "judge":
        size += ["--questions", scope.questions]
    if scope.data is not None and measure.program == "tasks":
        size += ["--data", scope.data]
    return tuple(size)


def bases_of(row: Row, measure: Measure, rows: Iterable[Row], scope: Scope = PUBLISHED) -> tuple[Arm, ...]:
    """The arms of the same method that what an intact prefix changes is taken against, the nearest first: those that
    read the same tokens in front and keep none of them in full precision. None for a row that keeps none itself.

    Alone, a model reads [BOS] by some protocols of perplexity, by `eval tasks` unless it is told otherwise, and by
    `eval needle`. A conversation is opened by its template, and a prefix that does not open it is refused.
    """
    arm = row.arm
    if arm.prefix == ALONE.prefix or arm.vanilla:
        return ()
    words = (*measure.options, *measure.alone, *size_of(measure, scope))
    options = dict(pairwise(words))  # of two that are the same the last counts
    reads_bos = {
        "ppl": options.get("--protocol", BOS_IN_WINDOWS[0]) in BOS_IN_WINDOWS,
        "tasks": options.get("--bos", "always") == "always",
    }.get(measure.program, True)
    same = measure.program in ("judge", "chat") or (arm.prefix == BOS.prefix and reads_bos)
    arms = [other.arm for other in rows if (other.label, other.method) == (row.label, row.method)]
    found = [other for other in arms if other.vanilla and other.prefix == arm.prefix]
    return (*found, *([ALONE] if same and ALONE in arms else []))


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
