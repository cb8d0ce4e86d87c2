"""What a judge's lines say: scores and wins per model, and their tables."""

import re
from statistics import fmean
from typing import Any

from eval.mtbench.answers import CATEGORIES
from eval.mtbench.judge import Materials
from eval.mtbench.verdicts import TURNS, scores, winner
from eval.tables.render import Figure, Table, mean_of, percent

__all__ = ["judge_table", "mean_grades", "pair_report", "single_report"]


def single_report(lines: list[dict[str, Any]], materials: Materials) -> dict[str, Any]:
    """The scores of every model."""
    models = dict.fromkeys(line["model"] for line in lines)
    return {
        "models": {
            model: scores(
                [line for line in lines if line["model"] == model],
                lambda number: materials.questions[number].category,
            )
            for model in models
        }
    }


def pair_report(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Wins of every model over the baseline, by turn and in all."""
    found: dict[str, Any] = {}
    for model in dict.fromkeys(line["model_1"] for line in lines):
        own = [line for line in lines if line["model_1"] == model]
        parts = {"all": own} | {f"turn {turn}": [line for line in own if line["turn"] == turn] for turn in TURNS}
        found[model] = {}
        for part, chosen in parts.items():
            won = [winner(line) for line in chosen]
            counts = {"wins": won.count("model_1"), "ties": won.count("tie"), "losses": won.count("model_2")}
            found[model][part] = counts | {"unscored": won.count("error")}
    return {"models": found}


def _without_seed(model: str) -> str:
    return re.sub(r"-seed_\d+$", "", model)


def judge_table(record: dict[str, Any], cost: str) -> Table:
    """A record's grades, or wins, with what a reader must know about them. cost: of the judgements, in words."""
    settings = record["settings"]
    notes = [cost, *([f"the judge is at {settings['endpoint']}"] if "endpoint" in settings else [])]
    if settings["questions"] == "sample":
        notes.append("sample: questions, references and judge prompts written for this project; not an MT-bench score")
    if settings["judge"].startswith("local-"):
        notes.append("a local judge shows the flow; a small model's grades say nothing about quality")
    if empty := record.get("empty"):
        notes.append(
            f"{empty} judgements are empty: the judge returned no text, or reasoning alone; more --max-tokens may help"
        )
    if record["missing"]:
        notes.append(f"{record['missing']} judgements were not tried")
    return (_score_table if settings["mode"] == "single" else _pair_table)(record, tuple(notes))


def mean_grades(record: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The mean grade by model, over its seeds, and category."""
    grades: dict[str, dict[str, list[float]]] = {}
    for model, found in record["models"].items():
        row = grades.setdefault(_without_seed(model), {name: [] for name in CATEGORIES if name in found["categories"]})
        for name, value in found["categories"].items():
            row.setdefault(name, []).extend([] if value is None else [value])
    return {model: {name: fmean(v) if v else None for name, v in row.items()} for model, row in grades.items()}


def _score_table(record: dict[str, Any], notes: tuple[str, ...]) -> Table:
    """One row per model; several seeds of one are its mean and spread."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for model, found in record["models"].items():
        rows.setdefault(_without_seed(model), []).append(found)
    present = {name for runs in rows.values() for found in runs for name in found["categories"]}
    categories = [name for name in CATEGORIES if name in present] + sorted(present - set(CATEGORIES))

    def cells(runs: list[dict[str, Any]]) -> list[Any]:
        columns = [
            [found["turns"]["1"] for found in runs],
            [found["turns"]["2"] for found in runs],
            [found["score"] for found in runs],
            *([found["categories"].get(name) for found in runs] for name in categories),
        ]
        unscored = sum(sum(found["unscored"].values()) for found in runs)
        means = [mean_of([value for value in column if value is not None]) for column in columns]
        return [*means, Figure(unscored, "{:.0f}".format), Figure(sum(f["judgements"] for f in runs), "{:.0f}".format)]

    return Table(
        f"Grades (1 to 10) by {record['settings']['judge']} of answers to {record['settings']['questions']}",
        ("model", "turn 1", "turn 2", "mean", *categories, "unscored", "judgements"),
        tuple((model, *cells(runs)) for model, runs in rows.items()),
        notes=notes,
    )


def _pair_table(record: dict[str, Any], notes: tuple[str, ...]) -> Table:
    """One row per model and turn: a win needs both orders to agree."""

    rows = []
    for model, parts in record["models"].items():
        for part, found in parts.items():
            decided = found["wins"] + found["ties"] + found["losses"]
            rate = Figure((found["wins"] + found["ties"] / 2) / decided, percent) if decided else None
            rows.append((model, part, *(Figure(n, "{:.0f}".format) for n in found.values()), rate))
    (baseline,) = record["settings"]["baseline"]
    return Table(
        f"Against {baseline}, by {record['settings']['judge']}, answers to {record['settings']['questions']}",
        ("model", "turns", "wins", "ties", "losses", "unscored", "win rate"),
        tuple(rows),
        words=2,
        notes=("a win needs both orders of the answers to agree; a tie counts half", *notes),
    )
