"""Tables of finished tasks (MMLU, question answering): every setting's vanilla arm above its IntactKV arm.

Accuracies are percent, changes are points. Figures of different protocols, shots, data or limits never share a table.
The averages are those of published tables (`AVERAGES`), plain means of all their tasks. IntactKV's takes acc_norm where
the task defines it, else acc; that is inferred, so the mean of plain acc stands beside it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from eval.tables.perplexities import BEHIND, INTACT, VANILLA, arm_of, prefix_label, settings_of, weights_label
from eval.tables.render import Cell, Figure, Table, change_of, in_percent, mean_of
from quantization.labels import kv_label

__all__ = ["AVERAGES", "QA_METRICS", "Average", "averages", "run_tables", "task_tables"]


@dataclass(frozen=True)
class Average:
    """A plain mean over tasks. metrics: the one that counts of each task."""

    name: str
    metrics: Mapping[str, str]


def _normed(*tasks: str) -> dict[str, str]:
    """acc_norm of the tasks that define it, acc of the others."""
    plain = ("winogrande", "boolq", "lambada_openai")
    return {task: "acc" if task in plain else "acc_norm" for task in tasks}


QA_METRICS = _normed(
    "openbookqa", "winogrande", "arc_challenge", "arc_easy", "boolq", "hellaswag", "lambada_openai"
)  # IntactKV, Table 3
FOUR = ("boolq", "arc_challenge", "piqa", "winogrande")
FIVE = ("winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge")
AVERAGES = (
    Average("QA average", QA_METRICS),
    Average("mean of plain acc", dict.fromkeys(QA_METRICS, "acc")),
    Average("CSQA of 6", dict.fromkeys(("boolq", *FIVE), "acc")),  # qllm: GPTQ, SmoothQuant, ZeroQuant, KIVI, KVQuant
    Average("CSQA of 5", dict.fromkeys(FIVE, "acc")),  # qllm: SpQR; PrefixQuant's "Average Acc"
    Average("CSQA of 5, normed", _normed(*FIVE)),  # PrefixQuant's "Average Acc (with norm)"
    Average("CSQA of 4", dict.fromkeys(FOUR, "acc")),  # qllm: LUT-GEMM
)
HEAD = ("model", "weights", "KV bits", "prefix", "arm")

Scores = Mapping[int | None, Mapping[str, float]]  # of one arm: by calibration seed, then by head of the table


def _figures(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's metrics, and of MMLU the four categories, as they are printed."""
    categories = {name: 100 * value for name, value in record.get("groups", {}).items() if ":" not in name}
    return {metric: in_percent(metric, value) for metric, value in record["metrics"].items()} | categories


def averages(records: Mapping[str, Mapping[str, Any]], wanted: Sequence[Average] = AVERAGES) -> dict[str, float]:
    """The averages in percent whose tasks are all there, by name, from records by task name."""
    return {
        average.name: 100 * fmean(records[task]["metrics"][metric] for task, metric in average.metrics.items())
        for average in wanted
        if all(task in records and metric in records[task]["metrics"] for task, metric in average.metrics.items())
    }


def task_caption(settings: Mapping[str, Any]) -> str:
    """What figures of one table share."""
    data = "a small sample, not the benchmark" if settings["data"] == "sample" else f"data {settings['data']}"
    limit = "all questions" if settings["limit"] is None else f"at most {settings['limit']} questions a task or subject"
    shots = "1 shot" if settings["fewshot"] == 1 else f"{settings['fewshot'] or 'no'} shots"
    return f"protocol {settings['protocol']}, {shots}, {data}, {limit}, {settings['dtype']} on {settings['device']}"


def run_tables(records: Sequence[dict[str, Any]]) -> list[Table]:
    """What one run of the program measured: a line for every metric of every task, and how long it took."""
    tables = []
    for caption in dict.fromkeys(task_caption(record["settings"]) for record in records):
        lines: list[tuple[Cell, ...]] = []
        mine = [record for record in records if task_caption(record["settings"]) == caption]
        for record in mine:
            metrics, errors = record["metrics"], record["stderr"]
            for metric, value in metrics.items():
                error = Figure(in_percent(metric, errors[metric])) if metric in errors else None
                first = metric == next(iter(metrics))
                lines.append(
                    (
                        record["settings"]["task_name"] if first else "",
                        metric,
                        Figure(in_percent(metric, value)),
                        error,
                        str(record["samples"]) if first else "",
                        f"{record['seconds']:.0f}" if first else "",
                    )
                )
        means = averages({record["settings"]["task_name"]: record for record in mine})
        lines += [(name, "", Figure(value), None, "", "") for name, value in means.items()]
        s = mine[0]["settings"]
        prefix = s["prefix"]["label"] + ("" if s["prefix"]["intact"] or s["prefix"]["label"] == "none" else ", vanilla")
        who = f"{s['model']}, weights {s['weights']}, KV bits {kv_label(s['kv'])}, prefix {prefix}"
        head = ("task", "metric", "value", "standard error", "questions", "seconds")
        notes = tuple(_kv_notes([((*_words(one["settings"]), arm_of(one["settings"])), one) for one in mine]))
        tables.append(Table(f"{who}; accuracy in % ({caption})", head, tuple(lines), words=2, notes=notes))
    return tables


def task_tables(records: Iterable[dict[str, Any]], over_seeds: bool = False) -> list[Table]:
    """The tables of task records, oldest first; of several runs of one place the newest counts."""
    records = list(records)
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(task_caption(record["settings"]), []).append(record)
    return [_table(caption, groups[caption], over_seeds) for caption in sorted(groups)]


def _table(caption: str, records: Sequence[dict[str, Any]], over_seeds: bool) -> Table:
    columns = _task_columns(records)
    metrics = _metrics(records, columns)
    means = [average for average in AVERAGES if average.metrics.keys() <= {task for task, _ in columns}]
    newest = {record["settings"]["task_name"]: columns[_data(record)] for record in records}

    def scores(mine: Sequence[dict[str, Any]]) -> dict[str, float]:
        """All columns of the runs of one seed, oldest first, one for every task that was run."""
        runs = {columns[_data(record)]: record for record in mine}
        found = {
            f"{column} {metric}": value for column, record in runs.items() for metric, value in _figures(record).items()
        }
        return found | averages({task: runs[column] for task, column in newest.items() if column in runs})

    heads = (*metrics, *(average.name for average in means))
    named = [(setting, _words(setting.settings)) for setting in settings_of(records, task_caption, over_seeds)]
    seen = Counter(words for _, words in named)
    lines: list[tuple[Cell, ...]] = []
    by_line: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    for setting, words in named:
        if seen[words] > 1:  # they differ where no column shows it, as two files of one name do
            model, weights, *others = words
            words = (model, f"{weights}-{setting.identity}", *others)
        by_arm = {arm: {seed: scores(runs) for seed, runs in found.items()} for arm, found in setting.arms.items()}
        lines += [(*words, label, *figures) for label, figures in _lines(by_arm, heads)]
        by_line += [((*words, arm), record)
                    for arm, found in setting.arms.items() for runs in found.values() for record in runs]  # fmt: skip
    notes = [_sizes(records, columns)]
    errors = [100 * error for record in records for name, error in record["stderr"].items() if name.startswith("acc")]
    if errors:
        span = " to ".join(dict.fromkeys((f"{min(errors):.1f}", f"{max(errors):.1f}")))
        notes.append(f"standard error of a single accuracy over its questions: {span} points")
    for average in means:
        chosen = ", ".join(f"{task} {metric}" for task, metric in average.metrics.items())
        notes.append(f"{average.name}: plain mean of {chosen}; n/a unless all are there")
    notes += _kv_notes(by_line)
    return Table(f"Tasks, accuracy in %, change in points ({caption})", (*HEAD, *heads), tuple(lines), len(HEAD),
                 tuple(notes))  # fmt: skip


def _data(record: dict[str, Any]) -> tuple[str, str]:
    return record["settings"]["task_name"], record["settings"]["data_sha256"]


def _task_columns(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """A column's name for every task and its data: the task's name, with the data's hash where there are several."""
    both = sorted({_data(record) for record in records})
    several = Counter(task for task, _ in both)
    return {(task, data): f"{task} {data[:8]}" if several[task] > 1 else task for task, data in both}


def _metrics(records: Sequence[dict[str, Any]], columns: dict[tuple[str, str], str]) -> tuple[str, ...]:
    """Every column of the table before the averages: task by task, its metrics in the record's order."""
    found: dict[str, dict[str, None]] = {column: {} for column in columns.values()}
    for record in records:
        found[columns[_data(record)]] |= dict.fromkeys(_figures(record))
    return tuple(f"{column} {metric}" for column, metrics in found.items() for metric in metrics)


def _words(s: dict[str, Any]) -> tuple[str, ...]:
    """What stands in the first columns of a setting's lines."""
    return s["model"], weights_label(s), kv_label(s["kv"]), prefix_label(s)


def _lines(by_arm: Mapping[str, Scores], heads: Sequence[str]) -> list[tuple[str, tuple[Cell, ...]]]:
    """Vanilla, then every other arm with its change against vanilla over the seeds that both have."""

    def column(arm: str, head: str) -> dict[int | None, float]:
        return {seed: run[head] for seed, run in by_arm.get(arm, {}).items() if head in run}

    lines: list[tuple[str, tuple[Cell, ...]]] = []
    for arm in (VANILLA, INTACT, BEHIND):
        if arm not in by_arm and arm != VANILLA:
            continue
        lines.append((arm, tuple(mean_of(list(column(arm, head).values())) for head in heads)))
        if arm != VANILLA:
            changes = tuple(change_of(column(VANILLA, head), column(arm, head)) for head in heads)
            lines.append((f"{arm} − {VANILLA}", changes))
    return lines


def _kv_notes(records: Iterable[tuple[tuple[str, ...], dict[str, Any]]]) -> list[str]:
    """By line with a KV policy, which share of what attention read in every task was rounded: short prompts may read
    none. records: with the words of their line, of which a note says the policy and what lines differ by."""
    shares: dict[tuple[str, ...], dict[str, float]] = {}
    for words, record in records:
        if (cache := record.get("kv_cache")) is not None:
            shares.setdefault(words, {})[record["settings"]["task_name"]] = cache["rounded"]
    kv = HEAD.index("KV bits")
    apart = [i for i, column in enumerate(zip(*shares, strict=True)) if i != kv and len(set(column)) > 1]
    return [
        f"KV cache {', '.join(words[i] for i in (kv, *apart))}: rounded of what attention read: "
        + ", ".join(f"{task} {100 * share:.1f} %" for task, share in found.items())
        for words, found in shares.items()
    ]


def _sizes(records: Sequence[dict[str, Any]], columns: dict[tuple[str, str], str]) -> str:
    sizes = {columns[_data(record)]: record["samples"] for record in records}
    return "questions: " + ", ".join(f"{task} {sizes[task]}" for task in columns.values())
