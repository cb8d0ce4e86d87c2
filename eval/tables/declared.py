"""What a published table is: rows of methods and columns of measures, with the figures that a paper gives.

    Paper: rows × measures  ──cells_of──▶  Run: one call of one program  ──ledger──▶  its record

A row is a method behind an arm, a measure is a program with its options. `eval.tables.asked` makes runs of them for a
model, `eval.tables.ledger` finds their records. None of these imports torch: a table is planned in an instant.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

__all__ = [
    "ALONE",
    "BOS",
    "BOS_ALONE",
    "NO_MODEL",
    "PUBLISHED",
    "Arm",
    "Figure",
    "Measure",
    "Method",
    "Paper",
    "Row",
    "Scope",
    "Words",
    "told",
    "with_arms",
]

Words = tuple[str, ...]  # options of a program, as a shell would split them
Figure = float | str | None  # as published: a number, an answer, or nothing


@dataclass(frozen=True)
class Measure:
    """A column: what is measured, and which number of the record it is.

    program: of `python -m eval`. item: the corpus of ppl, the task of tasks, the prompt of chat. options: of the
    program; alone: more of them where nothing stands in front. metric: of a task's record (default: the program's one
    figure). generates: the model writes answers, which a KV policy may treat otherwise. average_of: heads of other
    columns, whose plain mean this is; it is not run. digits: decimals that are printed.
    """

    head: str
    program: Literal["ppl", "tasks", "needle", "chat", "judge", "latency"] = "ppl"
    item: str = ""
    options: Words = ()
    alone: Words = ()
    metric: str = ""
    better: Literal["lower", "higher", "words"] = "lower"
    generates: bool = False
    average_of: Words = ()
    digits: int = 2


@dataclass(frozen=True)
class Method:
    """How the model of a row is made, in options of the programs.

    name: what --only calls it. options: of the recipe (--bits, --group-size, --set); a group size that is not given is
    the model's own. own_groups: also the one that is given, the published size, gives way to a model's own. kv: of the
    cache; kv_generating: the same where the model writes answers, if that differs. by_model: more options that the
    paper gives one model, by its name in modelzoo/. text: of the calibration, where the recipe's own is not the
    table's; a model with a text of its own keeps that. calibrates: it looks at text, so a seed changes it. quantizes:
    it makes a checkpoint, once for all its runs. behind: the recipe itself calibrates behind its prefix.
    """

    name: str
    recipe: str = "fp16"
    options: Words = ()
    own_groups: bool = False
    kv: Words = ()
    kv_generating: Words | None = None
    by_model: tuple[tuple[str, Words], ...] = ()
    text: Words = ()
    calibrates: bool = False
    quantizes: bool = False
    behind: bool = False

    @property
    def quantizes_something(self) -> bool:
        """Weights, activations or the cache; else more options have nothing to act on."""
        return self.recipe != "fp16" or bool(self.kv)

    @property
    def bits(self) -> str:
        """What --only calls its width, by its options or its recipe's name; of the cache where that is all. Empty where
        neither says it."""
        words = (*self.options, *self.kv)
        given = [words[i + 1] for i, word in enumerate(words) if word in ("--bits", "--kv-bits")]
        named = re.findall(r"(?:w|kv)(\d+)", self.recipe)
        found = given or named or ([] if self.quantizes_something else ["16"])
        return f"{found[0]}-bit" if found else ""

    def words(self, generates: bool = False) -> Words:
        """All options, of weights and of the cache."""
        kv = self.kv_generating if generates and self.kv_generating is not None else self.kv
        return ("--recipe", self.recipe, *self.options, *kv)


@dataclass(frozen=True)
class Arm:
    """What stands in front. label: as a table writes it. prefix: the word of --prefix. behind: the method's text runs
    behind it, too. vanilla: the same tokens, computed by the quantized model. trains: `python -m intactkv` trains the
    prefix first, by these words; text: on this, unless the model has a text of its own."""

    label: str
    prefix: str = "none"
    behind: bool = False
    vanilla: bool = False
    trains: Words = ()
    text: Words = ()


NO_MODEL = Path("no-model")  # in place of a directory, for a table that is of none
ALONE = Arm("")
BOS_ALONE = Arm("BOS", "bos", vanilla=True)  # reads what [B] reads; nothing of it is kept in full precision
BOS = Arm("[B]", "bos")


@dataclass(frozen=True)
class Row:
    """A method behind an arm. published: by model, a figure for every measure of the table (None: not given)."""

    label: str
    method: Method
    arm: Arm = ALONE
    published: Mapping[str, tuple[Figure, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Paper:
    """A table. name: what `reproduce` calls it. project: whose page it is of. source: which table or section.

    protocol: what a figure is, in words. models: those with published figures, by their names in modelzoo/; none for a
    table that is of no model, whose rows have their figures under "".
    notes: what a reader must know, errors of the published table among them.
    """

    name: str
    project: str
    title: str
    source: str
    protocol: str
    models: tuple[str, ...]
    measures: tuple[Measure, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def shown_for(self) -> tuple[str, ...]:
        """The models that it is shown for: its own, or one that is none."""
        return self.models or (NO_MODEL.name,)

    def value(self, row: Row, model: str, measure: Measure) -> Figure:
        """The published figure of a cell; None for a measure that the paper does not have."""
        figures = row.published.get(model if self.models else "")
        return figures[self.measures.index(measure)] if figures is not None and measure in self.measures else None


def with_arms(rows: Iterable[Row], *arms: Arm) -> tuple[Row, ...]:
    """Every row, followed by the same method behind each arm, which the paper does not have.

    Where nothing is quantized, an intact prefix is what the model computes from the same tokens: full precision stands
    behind the arms that are vanilla, and no others.
    """
    found: list[Row] = []
    for row in rows:
        found.append(row)
        found += [replace(row, arm=arm, published={}) for arm in arms if arm.vanilla or row.method.quantizes_something]
    return tuple(found)


@dataclass(frozen=True)
class Scope:
    """What is run of a table, and at what size.

    seeds: of calibration, one run for each; none: the recipes' own. only: names of methods, widths (`4-bit`), arms
    (`[B]`, `alone`) or measures. recipes, prefixes: rows of these in place of the table's. behind: methods that
    calibrate also do so behind the prefix of an arm. corpora, tasks: in place of the table's (`none`: no tasks). limit,
    window, data, questions: of what is scored; scoring, asking, mmlu: more options of ppl, of tasks, of MMLU alone.
    calibration: options of the text that methods calibrate on. options: more of every recipe; a setting
    `NAME:part.field=value` is of the method or recipe of that name alone. All that is not given is the published size,
    or the model's own.
    """

    seeds: tuple[int, ...] = ()
    only: Words = ()
    recipes: Words = ()
    prefixes: Words = ("none", "bos")
    behind: bool = False
    corpora: Words = ()
    tasks: Words = ()
    limit: int | None = None
    window: int | None = None
    data: str | None = None
    questions: str | None = None
    scoring: Words = ()
    asking: Words = ()
    mmlu: Words = ()
    calibration: Words = ()
    options: Words = ()
    training: Words = ()  # more options of what trains a prefix
    judge: Words = ()  # options of `eval judge`; without them nothing is judged

    def options_of(self, method: Method) -> Words:
        """More options of a method; full precision has none."""
        found: list[str] = []
        for word in self.options if method.quantizes_something else ():
            name = self.method_of(word) if found[-1:] == ["--set"] else ""
            if not name:
                found.append(word)
            elif name.lower() in (method.name.lower(), method.recipe.lower()):
                found.append(word.removeprefix(f"{name}:"))
            else:
                found.pop()
        return tuple(found)

    @property
    def settings(self) -> Words:
        """The values of --set among the options."""
        return tuple(value for word, value in pairwise(self.options) if word == "--set")

    @staticmethod
    def method_of(setting: str) -> str:
        """The method or recipe that a setting NAME:PART.FIELD=VALUE is of; empty for one of all."""
        name, colon, _ = setting.partition(":")
        return name if colon and "=" not in name else ""

    @property
    def reduced(self) -> Words:
        """What is not as published, in words; nothing if figures compare."""
        given = {
            "corpus": " ".join(self.corpora), "tasks": " ".join(self.tasks), "limit": self.limit, "window": self.window,
            "data": self.data, "questions": self.questions, "MMLU by": told(self.mmlu),
        }  # fmt: skip
        others = (self.scoring, self.asking, self.calibration, self.options, self.training)
        return (*(f"{name} {value}" for name, value in given.items() if value), *filter(None, map(told, others)))

    @property
    def called(self) -> Words:
        """What a table of this size is called, in words that no other size has: what is not as published, and which
        rows and runs stand in it. `only` leaves cells out and changes none: it is no part of a name."""
        given = {
            "seeds": " ".join(map(str, self.seeds)), "recipes": " ".join(self.recipes),
            "prefixes": " ".join(self.prefixes) if self.prefixes != PUBLISHED.prefixes else "",
        }  # fmt: skip
        rows = [f"{name} {value}" for name, value in given.items() if value]
        behind = ("also calibrated behind a prefix",) if self.behind else ()
        return (*self.reduced, *rows, *behind, *filter(None, [told(self.judge)]))


PUBLISHED = Scope()  # every figure as the paper has it


def told(words: Words) -> str:
    """Options as a sentence has them: `--calibration sample --calibration-samples 2 --set weights.damp=0.1` are
    `calibration sample, samples 2, weights.damp=0.1`."""
    parts = re.split(r"(?:^|\s)--(?:set(?:\s|=)|calibration-)?", " ".join(words))
    return ", ".join(part.strip() for part in parts if part.strip())
