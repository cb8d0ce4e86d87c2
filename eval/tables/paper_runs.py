"""Which finished runs have a place in IntactKV's Tables 1 to 3 and 5, and which of them stand there.

A run has a place if its recipe is the table's: full precision or one of the methods at 3 bits in groups of 128 (or of
the model's own default), nothing else quantized; in Table 5 one that quantizes what its named recipe does. Alone or
behind IntactKV_[B]. A column holds the runs of one model on
one text under one setting; runs that differ only in the calibration seed share a place.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from corpora.catalog import model_defaults
from corpora.storage import identity
from eval.tables.perplexities import caption_of, is_behind, prefix_label, weights_and_seed
from eval.tables.published import BITS, FULL, METHODS, QUESTIONS, WHOLE_METHODS, PublishedTable, paper_name
from eval.tables.tasks import QA_AVERAGES, QA_METRICS, averages, task_caption
from quantization.kv_cache import kv_bits
from quantization.named import named_recipe
from quantization.recipes.recipe import describe

__all__ = ["RECORDS", "Column", "Scores", "columns_of", "departures", "one_per_model", "what_fits"]

RECORDS: Mapping[int, str] = {1: "ppl", 2: "tasks", 3: "tasks", 5: "ppl"}  # whose records have a place in a table

Scores = dict[str, float]  # by measure; Table 3 has two, the others one without a name


@dataclass(frozen=True)
class _Place:
    """Where a run stands. source: fingerprint of the dense checkpoint. group: None for full precision, which belongs
    to every group size of its model."""

    setting: str
    model: str
    source: str
    text: str
    method: str
    arm: str
    group: int | None


@dataclass
class Variant:
    """One way to make a method's weights: scores by arm and seed, and when the newest started.

    settings: of one run. questions: how many it scored, by task.
    """

    settings: Mapping[str, Any]
    questions: Mapping[str, int]
    started: str = ""
    arms: dict[str, dict[int | None, Scores]] = field(default_factory=dict)

    @property
    def preference(self) -> tuple[int, int, str]:
        """Which of several stands in the table: nearest to the named recipe, then fullest, then newest."""
        return -len(departures(self.settings)), sum(len(runs) for runs in self.arms.values()), self.started


@dataclass
class Column:
    """The finished runs of one model on one text under one setting. methods: the variants of each, the first stands in
    the table. unlike: what is not the paper's (model, text, window, …); nothing if the figures compare."""

    setting: str
    model: str
    text: str
    group: int
    unlike: tuple[str, ...]
    methods: dict[str, list[Variant]]

    @property
    def figures(self) -> int:
        """How many places of the table it fills."""
        return sum(len(variants[0].arms) for variants in self.methods.values())

    @property
    def started(self) -> str:
        """When its newest run started."""
        return max(variant.started for variants in self.methods.values() for variant in variants)

    @property
    def head(self) -> str:
        """What a reader must know of it: `smollm2-135m, sample, groups of 64`."""
        return f"{self.model}, {self.text}, {'one grid per row' if self.group == -1 else f'groups of {self.group}'}"


def what_fits(table: PublishedTable) -> str:
    """What a run must be to have a place, in words."""
    perplexities = "perplexities by protocol intactkv"
    if table.number == 5:
        return f"{perplexities}, of full precision or of the recipe {' or '.join(table.recipes.values())}"
    measured = {1: perplexities, 2: "mmlu with 5 shots by protocol hendrycks"}
    runs = measured.get(table.number, "the seven question answering tasks, all of them, without shots")
    return f"{runs}, of full precision or of {', '.join(METHODS)} at {BITS} bits, with a 16-bit KV cache"


def columns_of(table: PublishedTable, records: Iterable[dict[str, Any]]) -> list[Column]:
    """Every model, text and setting that has a run in the table. records: oldest first; a place's newest counts."""
    fitting = [(record, place) for record in records if (place := _place(table, record["settings"])) is not None]
    runs: dict[tuple[_Place, str, int | None], dict[str, dict[str, Any]]] = {}
    for (record, place), (made_of, seed) in zip(fitting, weights_and_seed([r for r, _ in fitting]), strict=True):
        task = record["settings"].get("task_name", "")
        runs.setdefault((place, identity(made_of), seed), {})[task] = record
    found: dict[tuple[str, ...], dict[_Place, dict[str, Variant]]] = {}
    for (place, weights, seed), mine in runs.items():
        scores = _scores(table, mine)
        if not scores:
            continue
        newest = max(mine.values(), key=lambda record: record["started"])
        questions = {task: record["samples"] for task, record in mine.items() if task}
        text = identity({task: _text(record["settings"]) for task, record in mine.items()} | {"questions": questions})
        shared = (place.setting, place.model, place.source, place.text, text)
        variants = found.setdefault(shared, {}).setdefault(replace(place, arm=""), {})
        variant = variants.setdefault(weights, Variant(newest["settings"], questions))
        variant.arms.setdefault(place.arm, {})[seed] = scores
        variant.started = max(variant.started, newest["started"])
    return [column for places in found.values() for column in _by_group(table, places)]


def _by_group(table: PublishedTable, places: Mapping[_Place, Mapping[str, Variant]]) -> list[Column]:
    """The columns of one model, text and setting: one per group size, full precision in each."""
    first, variants = next(iter(places.items()))
    variant = next(iter(variants.values()))
    groups = sorted({place.group for place in places if place.group is not None})
    return [
        Column(
            setting=first.setting,
            model=first.model,
            text=first.text,
            group=group,
            unlike=_unlike(table, first.model, group, variant),
            methods={
                place.method: sorted(variants.values(), key=lambda variant: variant.preference, reverse=True)
                for place, variants in places.items()
                if place.group in (None, group)
            },
        )
        for group in groups or [_group_sizes(table, first.model)[-1]]
    ]


def _place(table: PublishedTable, settings: dict[str, Any]) -> _Place | None:
    """The place of a run, None if the table has none for it."""
    prefix, method = settings["prefix"], _method(table, settings)
    if method is None or is_behind(settings) or not _is_measured(table, settings):
        return None
    if prefix["file"] is not None or prefix_label(settings) != "[B]":
        return None  # another prefix, or prompts without [BOS]
    if method == FULL and prefix["intact"]:
        return None  # the same function as without the prefix; the paper shows it once
    group = None if method == FULL else settings["recipe"]["weights"]["grid"]["group_size"]
    if group not in (None, *_group_sizes(table, settings["model"])):
        return None
    if RECORDS[table.number] == "ppl":
        setting, text = caption_of(settings), settings["corpus"]
    else:
        setting, text = task_caption(settings), f"{settings['data']} data"
    model, source = paper_name(settings["model"]), settings["made_of"]["source"]
    return _Place(setting, model, source, text, method, table.arms[prefix["intact"]], group)


def _method(table: PublishedTable, settings: Mapping[str, Any]) -> str | None:
    """The method of a run, by its name in the table; None if the table has no such method."""
    recipe, kv = settings["recipe"], settings["kv"]
    weights = recipe.get("weights")
    plain = ("kind", "weights", "prefix", "calibration", "calibrate_behind_prefix")
    if kv is None and not any(part for name, part in recipe.items() if name not in plain):
        if weights is None:
            return FULL
        known = table.recipes is METHODS and weights["kind"] in METHODS and weights["grid"]["bits"] == BITS
        return weights["kind"] if known else None
    return next((method for method, name in table.recipes.items() if _quantizes_as(name, recipe, kv)), None)


def _quantizes_as(name: str, recipe: Mapping[str, Any], kv: Mapping[str, Any] | None) -> bool:
    """Whether a described recipe quantizes what the named one does."""
    named = describe(named_recipe(name))
    return _quantizes(recipe, kv) == _quantizes(named, named["kv_cache"])


def _quantizes(recipe: Mapping[str, Any], kv: Mapping[str, Any] | None) -> tuple[Any, ...]:
    """What a described recipe does to a model: transforms, and what is rounded to how many bits."""
    weights, activations = recipe.get("weights"), recipe.get("activations")
    others = [recipe.get(name) for name in ("attention", "tuning")]
    return (
        [step["kind"] for step in recipe.get("transforms") or ()],
        weights and (weights["kind"], weights["grid"]["bits"]),
        activations and (activations["static"], activations["grid"]["bits"], activations["grid"]["group_size"]),
        kv and (kv["kind"], kv_bits(kv)),
        others,
    )


def _group_sizes(table: PublishedTable, model: str) -> tuple[int, ...]:
    """Group sizes of the weights: the paper's, and the model's own where groups are meant."""
    return (-1,) if table.group_size == -1 else (table.group_size, model_defaults(model).default_group_size)


def _is_measured(table: PublishedTable, settings: Mapping[str, Any]) -> bool:
    """Whether a run measured what the table shows."""
    if RECORDS[table.number] == "ppl":
        return settings["protocol"] == "intactkv"
    if table.number == 2:
        return (settings["task_name"], settings["fewshot"], settings["protocol"]) == ("mmlu", 5, "hendrycks")
    return settings["task_name"] in QA_METRICS and settings["fewshot"] == 0


def _unlike(table: PublishedTable, model: str, group: int, run: Variant) -> tuple[str, ...]:
    """What is not the paper's: no difference to a published figure is taken then."""
    settings = run.settings
    same = {"model": model in table.models, "group size": group == table.group_size}
    if RECORDS[table.number] == "ppl":
        same |= {"text": settings["corpus"] == "c4", "window": settings["window"] == 2048}
        same |= {"number of windows": settings["limit"] is None}
    else:
        sampled = settings["data"] == "sample"  # other questions, however many
        whole = sampled or all(count == QUESTIONS[task] for task, count in run.questions.items())
        same |= {"questions": not sampled, "number of questions": settings["limit"] is None and whole}
    return tuple(name for name, holds in same.items() if not holds)


def _text(settings: Mapping[str, Any]) -> str:
    return settings["tokens_sha256"] if "tokens_sha256" in settings else settings["data_sha256"]


def _scores(table: PublishedTable, records: Mapping[str, Mapping[str, Any]]) -> Scores:
    """The table's figures from the records of one run, by task; empty if one is missing."""
    if RECORDS[table.number] == "ppl":
        return {"": records[""]["perplexity"]}
    if table.number == 2:
        return {"": 100 * records["mmlu"]["metrics"]["acc"]}
    return averages(records, QA_AVERAGES)


def one_per_model(table: PublishedTable, columns: Sequence[Column]) -> tuple[list[Column], list[Column]]:
    """Every model's column, the paper's models first, and the columns that are left out.

    A model's column is the nearest to the published one (the text before all else), then the fullest, then the newest.
    """

    def rank(column: Column) -> tuple[bool, int, int, str]:
        return "text" not in column.unlike, -len(column.unlike), column.figures, column.started

    ordered = sorted(columns, key=rank, reverse=True)
    best: dict[str, Column] = {}
    for column in ordered:
        best.setdefault(column.model, column)
    models = [*table.models, *sorted(best.keys() - set(table.models))]
    chosen = [best[model] for model in models if model in best]
    return chosen, [column for column in ordered if column not in chosen]


def departures(settings: Mapping[str, Any]) -> list[str]:
    """What a run's method does otherwise than its named recipe; the group size and the calibration text apart."""
    recipe = settings["recipe"]
    weights = recipe.get("weights")
    if weights is None:
        return []
    # Only Table 5 has more than weights.
    whole = next((name for name in WHOLE_METHODS.values() if _quantizes_as(name, recipe, settings["kv"])), None)
    published = describe(named_recipe(whole or METHODS[weights["kind"]]))
    words = _changed(weights, published["weights"])
    if whole:
        for name in ("transforms", "activations"):
            words += _changed({name: recipe.get(name)}, {name: published[name]})
        words += _changed({"kv_cache": settings["kv"]}, {"kv_cache": published["kv_cache"]})
    return words


def _changed(part: Mapping[str, Any], published: Mapping[str, Any]) -> list[str]:
    """The fields of a described part that are not as published; the group size apart."""
    run, named = dict(_flat(part)), dict(_flat(published))  # without what was `added` and stands as it was before
    return [
        f"{name}={run.get(name, 'as before it was a field')} (recipe: {named.get(name, 'its default')})"
        for name in run | named
        if name != "grid.group_size" and not (name in run and name in named and run[name] == named[name])
    ]


def _flat(part: Mapping[str, Any], front: str = "") -> list[tuple[str, Any]]:
    """Fields of a described part by their dotted names, as --set spells them; those of weights without `weights.`."""
    fields = []
    for name, value in part.items():
        if name == "transforms":
            value = {step["kind"].lower(): step for step in value or ()}
        fields += _flat(value, f"{front}{name}.") if isinstance(value, Mapping) else [(front + name, value)]
    return fields
