"""Tables of finished runs: every setting's vanilla arm beside its IntactKV arm.

Figures of different protocols, windows or dtypes never share a table. Both arms score the same windows, so the change
carries a standard error from the windows' paired differences d: exp(mean d) − 1 ± exp(mean d) · sd(d) / √W.
Weights or a KV cache that were calibrated behind the prefix are a third arm: the same recipe but for that switch. Runs
that differ only in the seed of their calibration text can be joined: mean ± standard deviation over seeds, changes
paired by seed. Which runs belong together (`settings_of`) is one rule for perplexities and tasks.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from corpora.storage import identity
from corpora.text import PROTOCOLS
from eval.tables.render import Cell, Figure, Table, change_of, mean_of, percent
from eval.tables.render import render as render_tables
from quantization.labels import kv_label, told

__all__ = [
    "ARMS",
    "BEHIND",
    "BEHIND_COLUMNS",
    "HEAD",
    "INTACT",
    "VANILLA",
    "Arm",
    "Row",
    "Setting",
    "behind_of",
    "figures_of",
    "perplexity_rows",
    "prefix_label",
    "print_table",
    "render",
    "settings_of",
    "weights_label",
]


@dataclass(frozen=True)
class Arm:
    """One way to run a setting; None where there is nothing to compare with (or, for the error, only one window).

    figure: perplexity. relative: change against vanilla. error: its standard error over windows.
    """

    figure: Figure | None = None
    relative: Figure | None = None
    error: float | None = None

    @property
    def perplexity(self) -> float | None:
        """The perplexity, or its mean over seeds."""
        return self.figure.value if self.figure else None

    @property
    def change(self) -> float | None:
        """The relative change against vanilla, or its mean over seeds."""
        return self.relative.value if self.relative else None


@dataclass(frozen=True)
class Row:
    """One setting: without the intact prefix, with it, and with weights or a KV cache calibrated behind it. Arms that
    were not run have no perplexity. cost: of quantizing (bits per weight, seconds, MB), where it is known. cache: of a
    KV policy, bits of an element and the share rounded of what attention read."""

    caption: str
    model: str
    weights: str
    kv: str
    corpus: str
    prefix: str
    identity: str
    vanilla: Arm
    intact: Arm
    behind: Arm = Arm()
    cost: dict[str, Any] | None = None
    cache: dict[str, Any] | None = None

    @property
    def visible(self) -> tuple[str, ...]:
        """What a reader of the table can tell rows apart by."""
        return self.caption, self.model, self.weights, self.kv, self.corpus, self.prefix


def weights_label(settings: dict[str, Any]) -> str:
    """The weights, as all arms call them, with what is other than in the named recipe of their kind."""
    return told(settings["weights"].removesuffix("-behind"), settings["recipe"])


def _weights_and_seed(records: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], int | None]]:
    """What the weights of every record were made of but for the calibration seed, and that seed (None: none).

    Records name the text by its files, earlier ones by the tokens that a seed drew (`segments`), which go with it. But
    weights whose tokens differ under one seed differ in more than the seed: they stay as they are, under no seed.
    """
    parted = [_without_seed(record["settings"]["made_of"]) for record in records]
    drawn = defaultdict(set)
    for (rest, seed), record in zip(parted, records, strict=True):
        drawn[identity(rest), seed].add(record["settings"]["made_of"].get("segments"))
    mixed = {weights for (weights, _), texts in drawn.items() if len(texts) > 1}
    return [
        (record["settings"]["made_of"], None) if identity(rest) in mixed else (rest, seed)
        for (rest, seed), record in zip(parted, records, strict=True)
    ]


def _without_seed(made_of: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    calibration = made_of.get("calibration")
    if calibration is None:
        return made_of, None
    rest = {key: value for key, value in made_of.items() if key != "segments"}
    rest["calibration"] = {key: value for key, value in calibration.items() if key != "seed"}
    return rest, calibration["seed"]


VANILLA, INTACT, BEHIND = "vanilla", "IntactKV", "calibrated behind"

Runs = dict[int | None, list[dict[str, Any]]]  # an arm's, by seed (None if seeds are not joined), oldest first


@dataclass(frozen=True)
class Setting:
    """Runs that stand together: by arm those behind one intact prefix, and the vanilla ones of the same tokens.

    identity: what tells the setting from others of the same words.
    """

    identity: str
    arms: dict[str, Runs]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of one of its runs, behind the prefix if there is one."""
        first = next(self.arms[arm] for arm in (INTACT, BEHIND, VANILLA) if arm in self.arms)
        return next(iter(first.values()))[-1]["settings"]


def settings_of(
    records: Sequence[dict[str, Any]], caption: Callable[[dict[str, Any]], str], over_seeds: bool = False
) -> list[Setting]:
    """Join records, oldest first, by what they measured; every intact prefix, built in or a file, is on its own.

    Arms belong together if the same weights (but for calibrating behind the prefix) and the same KV policy read the
    same tokens, those in front included, whatever their labels say. So vanilla runs stand with every intact prefix of
    their tokens; without any, alone. caption: of the table that a run's settings belong to; tables share nothing.
    over_seeds: weights that differ only in the calibration seed are the same.
    """
    weights = (
        _weights_and_seed(records) if over_seeds else [(record["settings"]["made_of"], None) for record in records]
    )
    found: dict[tuple[str, str], tuple[dict[str, Runs], dict[tuple[str, str | None], dict[str, Runs]]]] = {}
    for record, (made_of, seed) in zip(records, weights, strict=True):
        s = record["settings"]
        shared = {"made_of": _without_prefix(made_of), "kv": s["kv"], "tokens": _tokens(s)}
        if "kv_made_of" in s:  # of its own text, and seed
            shared["kv_made_of"] = _kv_part(s)
            rest, own = _without_seed(shared["kv_made_of"])
            if over_seeds and seed in (None, own):
                shared["kv_made_of"], seed = rest, own
        vanilla, by_prefix = found.setdefault((caption(s), identity(shared)), ({}, {}))
        prefix = s["prefix"]
        arms = by_prefix.setdefault((prefix["label"], prefix["file"]), {}) if prefix["intact"] else vanilla
        arms.setdefault(arm_of(s), {}).setdefault(seed, []).append(record)
    settings = []
    for (_, key), (vanilla, by_prefix) in found.items():
        for (_, file), arms in by_prefix.items():
            mine = key if file is None else identity({"shared": key, "file": file})
            settings.append(Setting(mine, vanilla | arms))
        if not by_prefix:
            settings.append(Setting(key, vanilla))
    return settings


def arm_of(settings: dict[str, Any]) -> str:
    """`BEHIND`, `INTACT` or `VANILLA`."""
    return BEHIND if _is_behind(settings) else INTACT if settings["prefix"]["intact"] else VANILLA


def _is_behind(settings: dict[str, Any]) -> bool:
    """Whether the weights or the KV cache were calibrated behind a prefix."""
    return bool(settings["made_of"].get("calibrate_behind_prefix")) or "prefix" in settings.get("kv_made_of", {})


def _without_prefix(made_of: dict[str, Any]) -> dict[str, Any]:
    """What the weights were made of, but for what tells the arms apart."""
    return {key: value for key, value in made_of.items() if key not in ("calibrate_behind_prefix", "prefix")}


def _kv_part(settings: dict[str, Any]) -> dict[str, Any]:
    """What the KV cache was calibrated to, but for what tells the arms apart, and for the run's own weights."""
    made_of = settings["kv_made_of"]
    apart = ("prefix", "prefix_kv", *(["weights"] if made_of.get("weights") == settings["made_of"] else []))
    return {key: value for key, value in made_of.items() if key not in apart}


def _tokens(settings: dict[str, Any]) -> Any:
    """What tells the tokens that the model read, but for a task's own: every task is a column of its own."""
    if "lead" in settings:
        return {"model": settings["model"], "lead": settings["lead"]}  # its tokenizer, and what stands in front
    return settings["tokens_sha256"]  # with what stands in front


def prefix_label(settings: dict[str, Any]) -> str:
    """The prefix by its name: a run without one is the vanilla arm of [B] where its text starts with [BOS] anyway."""
    if settings["prefix"]["label"] != "none":
        return settings["prefix"]["label"]
    starts = settings["lead"] if "lead" in settings else PROTOCOLS[settings["protocol"]].bos_in_every_window
    return "[B]" if starts else "none"


def perplexity_rows(records: Iterable[dict[str, Any]], over_seeds: bool = False) -> list[Row]:
    """Join the records of all arms into rows; of several runs of one arm (and seed) the newest counts."""
    settings = settings_of(list(records), _caption_of, over_seeds)
    rows = sorted((_row(setting) for setting in settings), key=lambda row: row.caption)
    # Settings that differ only where no column shows it (a convention, a text prefix, a file of another's name) get
    # their identity as a name.
    seen = Counter(row.visible for row in rows)
    return [replace(row, weights=f"{row.weights}-{row.identity}") if seen[row.visible] > 1 else row for row in rows]


def _caption_of(settings: dict[str, Any]) -> str:
    """What perplexities of one table share."""
    limit = "all" if settings["limit"] is None else settings["limit"]
    return (
        f"protocol {settings['protocol']}, window {settings['window']}, windows {limit}, {settings['dtype']} on "
        f"{settings['device']}"
    )


def _row(setting: Setting) -> Row:
    newest = {arm: {seed: mine[-1] for seed, mine in runs.items()} for arm, runs in setting.arms.items()}
    vanilla = newest.get(VANILLA, {})
    s = setting.settings
    runs = [run for arm in newest.values() for run in arm.values()]
    return Row(
        caption=_caption_of(s),
        model=s["model"],
        weights=weights_label(s),
        kv=kv_label(s["kv"]),
        corpus=s["corpus"],
        prefix=prefix_label(s),
        identity=setting.identity,
        vanilla=Arm(mean_of(list(_perplexities(vanilla).values()))),
        intact=_arm(newest.get(INTACT, {}), vanilla),
        behind=_arm(newest.get(BEHIND, {}), vanilla),
        cost=next((run["quantization"] for run in runs if run.get("quantization")), None),
        cache=next((run["kv_cache"] for run in runs if run.get("kv_cache")), None),
    )


Newest = Mapping[int | None, dict[str, Any]]  # the run of an arm that counts, by seed


def _perplexities(runs: Newest) -> dict[int | None, float]:
    return {seed: run["perplexity"] for seed, run in runs.items()}


def _arm(runs: Newest, vanilla: Newest) -> Arm:
    """An arm beside the vanilla one, compared over the seeds that both have.

    The windows' error is that of the change of the mean over seeds; the spread over seeds stands with the change.
    """
    figure = mean_of(list(_perplexities(runs).values()))
    change = change_of(_perplexities(vanilla), _perplexities(runs), relative=True)
    if change is None:
        return Arm(figure)
    both = [(vanilla[seed]["window_nll"], runs[seed]["window_nll"]) for seed in vanilla.keys() & runs.keys()]
    if len({len(losses) for pair in both for losses in pair}) > 1:  # windows of no pairs: there is no error of these
        return Arm(figure, change)
    per_seed = [[b - a for a, b in zip(*pair, strict=True)] for pair in both]  # (seeds, windows)
    differences = [fmean(window) for window in zip(*per_seed, strict=True)]
    error = (1 + change.value) * stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return Arm(figure, change, error)


HEAD = ("model", "weights", "KV bits", "corpus", "prefix")
ARMS = ("vanilla", "IntactKV", "change", "standard error")
BEHIND_COLUMNS = ("calibrated behind", "change", "standard error")
CACHE = ("KV bits an element", "KV rounded")
COSTS = ("bits per weight", "quantizing, s", "quantizing, MB")


def render(rows: list[Row], style: str, costs: bool = False) -> str:
    """Rows as text: a table per protocol, under its caption; as `csv` one table with the protocol as a column.

    The third arm, the KV cache and the costs (if wanted) get columns where a row has them, in CSV always.
    """
    if style == "csv":
        head = ("protocol", *HEAD, *ARMS, *(f"behind: {name}" for name in BEHIND_COLUMNS), *CACHE, *COSTS)
        lines = tuple((*row.visible, *_intact(row), *_behind(row), *_cache(row), *_costs(row)) for row in rows)
        return render_tables([Table("", head, lines, words=1 + len(HEAD))], style)
    tables = []
    for caption in dict.fromkeys(row.caption for row in rows):
        mine = [row for row in rows if row.caption == caption]
        behind = any(row.behind.figure is not None for row in mine)
        costly, cached = costs and any(row.cost for row in mine), any(row.cache for row in mine)
        head = (*HEAD, *ARMS, *(BEHIND_COLUMNS * behind), *(CACHE * cached), *(COSTS * costly))
        lines = tuple(
            (
                *row.visible[1:],
                *_intact(row),
                *(_behind(row) * behind),
                *(_cache(row) * cached),
                *(_costs(row) * costly),
            )
            for row in mine
        )
        tables.append(Table(f"Perplexity ({caption})", head, lines, words=len(HEAD)))
    return render_tables(tables, style)


def figures_of(row: Row) -> tuple[float | None, ...]:
    """What stands under `ARMS`."""
    return row.vanilla.perplexity, row.intact.perplexity, row.intact.change, row.intact.error


def behind_of(row: Row) -> tuple[float | None, ...]:
    """What stands under `BEHIND_COLUMNS`."""
    return row.behind.perplexity, row.behind.change, row.behind.error


def _compared(arm: Arm) -> tuple[Cell, ...]:
    return arm.figure, arm.relative, None if arm.error is None else Figure(arm.error, percent)


def _intact(row: Row) -> tuple[Cell, ...]:
    return row.vanilla.figure, *_compared(row.intact)


def _behind(row: Row) -> tuple[Cell, ...]:
    return _compared(row.behind)


def _cache(row: Row) -> tuple[Cell, ...]:
    if row.cache is None:
        return None, None
    return Figure(fmean(row.cache["bits_per_element"])), Figure(row.cache["rounded"], lambda x: f"{100 * x:.1f} %")


def _costs(row: Row) -> tuple[Cell, ...]:
    cost = row.cost or {}
    forms = {"bits_per_weight": "{:.2f}".format, "seconds": "{:.0f}".format, "peak_memory_mb": "{:.0f}".format}
    return tuple(None if cost.get(key) is None else Figure(cost[key], form) for key, form in forms.items())


def print_table(rows: list[Row], style: str = "markdown", costs: bool = False) -> None:
    """Print the rows on stdout."""
    print(render(rows, style, costs), end="")
