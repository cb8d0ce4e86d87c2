"""Which graded answers have a place in IntactKV's Table 4 (MT-bench).

A judge's record holds the grades of files of answers, the record of the run that wrote a file says what answered: they
meet by the file's content. A run has a place if its recipe is the table's: full precision or one of its methods at 3
bits in groups of 128 (or of the model's own default), nothing else quantized, alone, behind IntactKV_[P] or behind [P]
calibrated. A column holds one model's answers to one set of questions, graded by one judge; seeds share a place.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from corpora.catalog import model_defaults
from corpora.storage import identity
from eval.tables.paper_runs import Column, Variant
from eval.tables.perplexities import is_behind
from eval.tables.published import BITS, FULL, GROUP_SIZE, PublishedTable, paper_name

__all__ = ["grade_notes", "judged_columns"]

# What the published scores were made with.
JUDGE, QUESTIONS, QUESTION_COUNT, TURN_TOKENS = "gpt-4-0125-preview", "mt_bench", 80, 1024
ARMS = {"": "", "[P]": "+ IntactKV_[P]", "[P] + Cal": "+ IntactKV_[P] + Cal"}  # of a run, and the table's word
UNSCORED, JUDGEMENTS = "unscored", "judgements"  # measures beside the score, which has no name

_Methods = dict[tuple[str, int | None], dict[str, Variant]]  # by method and group size, by identity of the weights


def judged_columns(table: PublishedTable, records: Iterable[dict[str, Any]]) -> list[Column]:
    """The columns that records of `eval mtbench` and `eval judge` make, oldest first; a place's newest grade counts."""
    records = list(records)
    answered = {record["answers_sha256"]: record for record in records if record["task"] == "mtbench"}
    found: dict[tuple[str, ...], _Methods] = {}
    for judged in records:
        how = judged["settings"]
        if judged["task"] != "judge" or how["mode"] != "single":
            continue
        for name, content in how["answers_sha256"].items():
            run, grades = answered.get(content), judged["models"].get(name)
            place = None if run is None else _place(table, run)
            if run is None or place is None or grades is None or grades["score"] is None:
                continue
            method, group, arm = place
            s = run["settings"]
            text = identity({
                "questions": s["questions_sha256"], "template": s["template"], "count": run["samples"],
                **{part: how[part] for part in ("prompts_sha256", "references_sha256", "max_tokens")},
            })  # fmt: skip
            # A name at another address than OpenAI's is another judge.
            judge = f"{how['judge']} at {how['endpoint']}" if "endpoint" in how else how["judge"]
            setting = (
                f"graded by {judge}, {run['samples']} questions of {s['questions']}, at most "
                f"{s['max_new_tokens']} tokens a turn, {s['dtype']} on {s['device']}"
            )
            shared = (setting, paper_name(s["model"]), s["made_of"]["source"], text, judge)
            variants = found.setdefault(shared, {}).setdefault((method, group), {})
            variant = variants.setdefault(identity(s["made_of"]), Variant(s, {s["questions"]: run["samples"]}))
            unscored = sum(grades["unscored"].values())
            scores = {"": grades["score"], UNSCORED: unscored, JUDGEMENTS: grades["judgements"]}
            variant.arms.setdefault(arm, {})[s["seed"]] = scores
            variant.started = max(variant.started, judged["started"])
    return [column for shared, methods in found.items() for column in _by_group(table, shared, methods)]


def _place(table: PublishedTable, run: Mapping[str, Any]) -> tuple[str, int | None, str] | None:
    """Method, group size (None for full precision) and arm of a run; None if the table has no place for it."""
    settings = run["settings"]
    recipe, weights = settings["recipe"], settings["recipe"].get("weights")
    plain = ("kind", "weights", "prefix", "calibration", "calibrate_behind_prefix")
    more = settings["kv"] is not None or any(part for name, part in recipe.items() if name not in plain)
    arm = ARMS.get(run.get("arm", "?"))
    if more or arm is None or is_behind(dict(settings)):
        return None
    if weights is None:  # behind its own prefix it is the same function
        return None if arm else (FULL, None, arm)
    group = weights["grid"]["group_size"]
    groups = (GROUP_SIZE, model_defaults(settings["model"]).default_group_size)
    if weights["kind"] not in table.figures or weights["grid"]["bits"] != BITS or group not in groups:
        return None
    return weights["kind"], group, arm


def _by_group(table: PublishedTable, shared: tuple[str, ...], methods: _Methods) -> list[Column]:
    """One column per group size, full precision in each."""
    setting, model, _, _, judge = shared
    some = next(iter(next(iter(methods.values())).values()))
    ((questions, count),) = some.questions.items()
    columns = []
    for group in sorted({g for _, g in methods if g is not None}) or [model_defaults(model).default_group_size]:
        same = {
            "model": model in table.models,
            "group size": group == GROUP_SIZE,
            "questions": questions == QUESTIONS,
            "number of questions": questions != QUESTIONS or count == QUESTION_COUNT,
            "tokens of a turn": some.settings["max_new_tokens"] == TURN_TOKENS,
            "judge": judge == JUDGE,
        }
        columns.append(
            Column(
                setting=setting,
                model=model,
                text=questions,
                group=group,
                unlike=tuple(name for name, holds in same.items() if not holds),
                methods={
                    method: sorted(variants.values(), key=lambda variant: variant.preference, reverse=True)
                    for (method, g), variants in methods.items()
                    if g in (None, group)
                },
            )
        )
    return columns


def grade_notes(column: Column) -> list[str]:
    """What a reader of a column's scores must know of the judge."""
    runs = [run for variants in column.methods.values() for arm in variants[0].arms.values() for run in arm.values()]
    unscored, judgements = (sum(round(run[measure]) for run in runs) for measure in (UNSCORED, JUDGEMENTS))
    notes = [f"{column.model}: {unscored} of our {judgements} judgements hold no grade and count nowhere"]
    if column.setting.startswith("graded by local-"):
        notes.append("a local judge shows the flow; a small model's grades say nothing about quality")
    return notes
