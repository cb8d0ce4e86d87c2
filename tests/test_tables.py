"""The paper's tables with ours beside them, and how tables become text."""

import csv
import io
import re
from collections.abc import Mapping
from typing import Any

import pytest

from corpora.errors import UserError
from eval.tables.paper_runs import departures
from eval.tables.paper_tables import paper_tables
from eval.tables.published import QUESTIONS, TABLES, paper_name
from eval.tables.render import Figure, Table, change_of, mean_of, render, signed
from eval.tables.tasks import QA_METRICS
from quantization.named import named_recipe
from quantization.recipes.recipe import describe

NONE = {"label": "none", "ids": [], "file": None, "intact": False}
BOS = {"label": "[B]", "ids": [1], "file": None, "intact": True}
PROMPT = {"label": "[P]", "ids": [1, 2], "file": None, "intact": True}
CAL = {"label": "[cal]", "ids": [1], "file": "c0ffee", "intact": True}  # --prefix cal.safetensors


def settings(recipe: str, group: int, seed: int | None, weights: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """What every record says of the model and how it was made, as `plan.describe()` does."""
    described = describe(named_recipe(recipe))
    made_of: dict[str, Any] = {"source": "abc"}
    if described["weights"] is not None:
        described["weights"] |= weights
        described["weights"]["grid"] |= {"group_size": group}
        made_of |= {"weights": described["weights"]}
    if seed is not None:
        described["calibration"] |= {"seed": seed}
        made_of |= {"calibration": described["calibration"], "segments": f"text {seed}"}
    return {"model": "llama-2-7b", "weights": recipe, "made_of": made_of, "recipe": described, "kv": None,
            "prefix": NONE, "dtype": "float16", "device": "cuda", "packed": False} | others  # fmt: skip


def perplexity(value: float, recipe: str = "fp16", *, group: int = 128, seed: int | None = None,
               weights: Mapping[str, Any] | None = None, started: str = "2026-01-01",
               **others: Any) -> dict[str, Any]:  # fmt: skip
    """A record of `eval ppl`; by itself one by the paper's protocol."""
    text = {"corpus": "c4", "tokens_sha256": "aa", "protocol": "intactkv", "window": 2048, "limit": None}
    return {"settings": settings(recipe, group, seed, weights or {}, **{**text, **others}), "identity": "x",
            "started": started, "perplexity": value, "window_nll": [1.0, 1.1]}  # fmt: skip


def task(name: str, acc: float, recipe: str = "fp16", *, acc_norm: float | None = None, group: int = 128,
         seed: int | None = None, started: str = "2026-01-01", samples: int | None = None,
         **others: Any) -> dict[str, Any]:  # fmt: skip
    """A record of `eval tasks`; acc and acc_norm are fractions. samples: None for all questions of the paper's task."""
    how = {"task_name": name, "protocol": "hendrycks" if name == "mmlu" else "lm-eval",
           "fewshot": 5 if name == "mmlu" else 0, "data": "local", "data_sha256": f"data of {name}", "lead": [1],
           "limit": None, "model": "vicuna-v1.5-7b"}  # fmt: skip
    metrics = {"acc": acc} | ({} if acc_norm is None else {"acc_norm": acc_norm})
    return {"settings": settings(recipe, group, seed, {}, **{**how, **others}), "identity": "x", "started": started,
            "metrics": metrics, "stderr": {"acc": 0.01}, "samples": samples or QUESTIONS.get(name, 100),
            "seconds": 12.3}  # fmt: skip


def seven(acc: float, acc_norm: float, recipe: str = "fp16", **others: Any) -> list[dict[str, Any]]:
    """Records of the seven question answering tasks, all of the same accuracies."""
    return [task(name, acc, recipe, acc_norm=acc_norm if metric == "acc_norm" else None, **others)
            for name, metric in QA_METRICS.items()]  # fmt: skip


def lines(tables: list[Table]) -> dict[str, dict[str, str]]:
    """The CSV of tables as row → column → text."""
    return {line["method"]: line for line in csv.DictReader(io.StringIO(render(tables, "csv")))}


# ---- published figures, as the specification prints them


@pytest.mark.parametrize(("number", "model", "method", "arm", "value"), [
    (1, "llama-2-7b", "FP16", 0, 7.28), (1, "llama-2-7b", "GPTQ", 0, 9.58), (1, "llama-2-7b", "GPTQ", 1, 9.27),
    (1, "llama-2-70b", "AWQ", 1, 6.04), (1, "llama-7b", "RTN", 0, 9.15), (1, "llama-65b", "OmniQuant", 1, 6.18),
    (2, "vicuna-v1.5-13b", "GPTQ", 1, 52.49), (2, "vicuna-v1.3-33b", "AWQ", 1, 56.91),
    (2, "vicuna-v1.3-7b", "FP16", 0, 47.12),
    (3, "vicuna-v1.5-7b", "FP16", 0, 65.33), (3, "vicuna-v1.5-13b", "RTN", 1, 65.91),
    (3, "vicuna-v1.3-13b", "AWQ", 0, 64.56),
    (4, "vicuna-v1.5-7b", "AWQ", 1, 4.68), (4, "vicuna-v1.5-13b", "RTN", 2, 5.30),
    (4, "vicuna-v1.5-13b", "FP16", 0, 5.52),
    (5, "llama-7b", "OmniQuant", 1, 16.24), (5, "llama-3-8b", "OmniQuant", 0, None),
    (5, "llama-2-7b", "QuaRot", 1, 8.12), (5, "llama-3-8b", "QuaRot", 0, 13.42), (5, "llama-3-8b", "FP16", 0, 9.48),
])  # fmt: skip
def test_published_figures_are_those_of_the_paper(number, model, method, arm, value):
    assert TABLES[number].value(model, method, TABLES[number].arms[arm]) == value


@pytest.mark.parametrize("table", TABLES.values(), ids=str)
def test_every_published_table_is_whole(table):
    assert len(table.full) == len(table.models)
    for arms in table.figures.values():
        assert [len(models) for models in arms] == [len(table.models)] * len(table.arms)


def test_the_published_accuracies_are_of_all_questions():
    assert QUESTIONS == {"mmlu": 14042, "openbookqa": 500, "winogrande": 1267, "arc_challenge": 1172, "arc_easy": 2376,
                         "boolq": 3270, "hellaswag": 10042, "lambada_openai": 5153}  # fmt: skip


@pytest.mark.parametrize(("model", "name"), [
    ("Llama-2-7b-hf", "llama-2-7b"), ("vicuna-7b-v1.5", "vicuna-v1.5-7b"), ("llama-2-7b", "llama-2-7b"),
    ("smollm2-135m", "smollm2-135m"),
])  # fmt: skip
def test_a_model_is_known_by_the_hubs_name_too(model, name):
    assert paper_name(model) == name


# ---- ours beside them


def test_without_runs_a_table_holds_what_is_published():
    rows = lines(paper_tables(1))
    assert rows["RTN + IntactKV_[B]"]["published llama-2-13b"] == "7.48"
    assert float(rows["RTN: change by [B]"]["published llama-2-13b"]) == pytest.approx(7.48 / 7.60 - 1, rel=1e-5)
    assert not any(head.startswith(("ours", "difference")) for head in rows["RTN"])


def test_a_model_of_the_paper_has_published_ours_and_the_difference():
    records = [perplexity(7.30), perplexity(9.00, "rtn-w3"), perplexity(8.50, "rtn-w3", prefix=BOS)]
    rows = lines(paper_tables(1, records, ["llama-2-7b"]))
    ours, difference = "ours: llama-2-7b, c4, groups of 128", "difference llama-2-7b"
    assert [rows[m]["published llama-2-7b"] for m in ("FP16", "RTN", "RTN + IntactKV_[B]")] == ["7.28", "8.97", "8.61"]
    assert [rows[m][ours] for m in ("FP16", "RTN", "RTN + IntactKV_[B]", "GPTQ")] == ["7.3", "9", "8.5", ""]
    assert [float(rows[m][difference]) for m in ("FP16", "RTN", "RTN + IntactKV_[B]")] == pytest.approx(
        [0.02, 0.03, -0.11]
    )
    assert float(rows["RTN: change by [B]"][ours]) == pytest.approx(-0.5 / 9, rel=1e-5)
    assert "published llama-7b" not in rows["FP16"]


def test_a_model_of_the_paper_that_was_not_run_says_so():
    (table,) = paper_tables(1, [], ["llama-2-7b"])
    assert table.head == ("method", "published llama-2-7b", "ours: llama-2-7b", "difference llama-2-7b")
    assert all(row[2:] == (None, None) for row in table.rows)


@pytest.mark.parametrize("other", [{"corpus": "wikitext2"}, {"window": 512}, {"limit": 8}, {"model": "mistral-7b"}])
def test_there_is_no_difference_between_figures_of_other_protocols(other):
    rows = lines(paper_tables(1, [perplexity(7.30, **other)]))
    assert "7.3" in rows["FP16"].values()
    assert not any(head.startswith("difference") for head in rows["FP16"])


@pytest.mark.parametrize("field", [{"window": 512}, {"limit": 8}, {"dtype": "float32"}, {"device": "cpu"}])
def test_figures_of_different_protocols_share_no_table(field):
    tables = paper_tables(1, [perplexity(7.31), perplexity(5.11, model="mistral-7b", **field)])
    texts = [render([table], "csv") for table in tables]
    assert [("7.31" in text, "5.11" in text) for text in texts] == [(True, False), (False, True)]


def test_the_two_arms_of_another_window_do_not_meet():
    records = [
        perplexity(9.0, "rtn-w3", window=512, limit=8),
        perplexity(8.0, "rtn-w3", prefix=BOS, window=256, limit=8),
    ]
    (table,) = paper_tables(1, records, ["llama-2-7b"])
    assert len(table.head) == 1 + 2  # published and ours
    assert sum(row[2] is not None for row in table.rows) == 1
    assert any("also finished" in note for note in table.notes)


@pytest.mark.parametrize("other", [
    {"recipe": "rtn-w4"}, {"recipe": "bcq-w3"}, {"group": 32}, {"kv": {"kind": "PerHead", "bits": 4}},
    {"prefix": PROMPT}, {"prefix": PROMPT | {"intact": False}}, {"protocol": "gptq"},
    {"prefix": CAL}, {"prefix": CAL | {"label": "[B]"}},  # a file of [BOS] alone may hold other K and V
])  # fmt: skip
def test_other_bits_methods_groups_caches_and_prefixes_have_no_place(other):
    recipe = other.pop("recipe", "rtn-w3")
    with pytest.raises(UserError, match=r"--window 2048; the table takes perplexities by protocol intactkv"):
        paper_tables(1, [perplexity(9.0, recipe, **other)], filters="--window 2048")


def test_weights_calibrated_behind_the_prefix_are_not_the_papers():
    record = perplexity(9.0, "gptq-w3", seed=0, prefix=BOS)
    record["settings"]["made_of"]["calibrate_behind_prefix"] = True
    with pytest.raises(UserError):
        paper_tables(1, [record], ["mistral-7b"])


def test_another_model_stands_beside_the_published_columns_and_is_named_as_such():
    records = [perplexity(72.5, "rtn-w3", group=64, model="smollm2-135m", corpus="sample", window=512, limit=8)]
    (table,) = paper_tables(1, records, ["smollm2-135m"])
    assert [head.removeprefix("published ") for head in table.head[1:-1]] == list(TABLES[1].models)
    assert table.head[-1] == "ours: smollm2-135m, sample, groups of 64"
    assert "window 512, windows 8, float16 on cuda" in table.caption
    assert any("model, group size, text, window, number of windows other than the paper's" in n for n in table.notes)
    (narrow,) = paper_tables(1, records, ["smollm2-135m", "llama-7b"])
    assert narrow.head[1] == "published llama-7b"
    assert len(narrow.head) == 1 + 3 + 1


def test_the_papers_text_comes_before_another_and_a_filter_can_choose_that():
    other = [perplexity(5.47, corpus="wikitext2"), perplexity(6.29, "rtn-w3", corpus="wikitext2")]
    (table,) = paper_tables(1, [perplexity(7.6, window=512, limit=8), *other], ["llama-2-7b"])
    assert table.head[2] == "ours: llama-2-7b, c4, groups of 128"
    assert any("llama-2-7b, wikitext2" in note and "2 figures" in note for note in table.notes)
    (table,) = paper_tables(1, other, ["llama-2-7b"], "--corpus wikitext2")
    assert str(table.rows[1][2]) == "6.29"


def test_runs_that_differ_in_the_seed_are_one_figure_and_changes_are_paired():
    pairs = {0: (10.0, 9.0), 1: (12.0, 9.6), 2: (11.0, 9.35)}
    records = [perplexity(value, "gptq-w3", seed=seed, prefix=prefix)
               for seed, both in pairs.items() for value, prefix in zip(both, (NONE, BOS), strict=True)]  # fmt: skip
    (table,) = paper_tables(1, records, ["llama-2-7b"])
    cells = {row[0]: row[2] for row in table.rows}
    assert str(cells["GPTQ"]) == "11.00 ± 1.00 (3)"
    # Changes −10 %, −20 %, −15 %: mean −15 %, deviation 5 %.
    assert str(cells["GPTQ: change by [B]"]) == "-15.0% ± 5.0% (3)"
    assert str(cells["FP16"]) == "None"
    assert {row[0]: str(row[3]) for row in table.rows}["GPTQ"] == "+1.42 ± 1.00 (3)"


def test_of_several_settings_the_named_recipe_stands_in_the_table_and_the_others_are_counted():
    records = [perplexity(8.4, "omniquant-w3", seed=2),
               perplexity(8.9, "omniquant-w3", seed=2, weights={"epochs": 2}, started="2026-02-02")]  # fmt: skip
    (table,) = paper_tables(1, records, ["llama-2-7b"])
    assert {row[0]: str(row[2]) for row in table.rows}["OmniQuant"] == "8.40"
    assert any("OmniQuant: 1 more" in note for note in table.notes)
    (table,) = paper_tables(1, records[1:], ["llama-2-7b"])
    assert any("epochs=2 (recipe: 20)" in note for note in table.notes)


def test_the_newest_of_two_runs_of_a_place_counts():
    (table,) = paper_tables(1, [perplexity(7.4), perplexity(7.2, batch_size=4)], ["llama-2-7b"])
    assert str(table.rows[0][2]) == "7.20"


def test_table_2_reads_mmlu_with_five_shots_by_hendrycks_only():
    records = [task("mmlu", 0.5), task("mmlu", 0.44, "rtn-w3"), task("mmlu", 0.46, "rtn-w3", prefix=BOS),
               task("mmlu", 0.9, "awq-w3", seed=42, fewshot=0),
               task("mmlu", 0.9, "awq-w3", seed=42, protocol="lm-eval")]  # fmt: skip
    (table,) = paper_tables(2, records, ["vicuna-v1.5-7b"])
    ours = {row[0]: str(row[2]) for row in table.rows}
    assert (ours["FP16"], ours["RTN"], ours["RTN + IntactKV_[B]"], ours["AWQ"]) == ("50.00", "44.00", "46.00", "None")
    assert ours["RTN: change by [B], points"] == "+2.00"
    assert str(table.rows[0][3]) == "+0.16"  # 50.00 − 49.84


def test_a_sample_of_the_questions_is_not_compared_with_the_benchmark():
    for sampled in ({"data": "sample"}, {"limit": 8}):
        (table,) = paper_tables(2, [task("mmlu", 0.5, **sampled)], ["vicuna-v1.5-7b"])
        assert not any(head.startswith("difference") for head in table.head)
    (table,) = paper_tables(2, [task("mmlu", 0.5, data="sample")])
    assert "not the benchmark" in table.caption


def test_an_incomplete_set_of_questions_is_not_compared_with_the_benchmark():
    (table,) = paper_tables(2, [task("mmlu", 0.5, samples=100)], ["vicuna-v1.5-7b"])
    assert [row[2] for row in table.rows if row[0] == "FP16"] == [Figure(50.0)]
    assert not any(head.startswith("difference") for head in table.head)
    assert any(note.startswith("vicuna-v1.5-7b: number of questions other than the paper's") for note in table.notes)


@pytest.mark.parametrize("short", QA_METRICS)
def test_one_incomplete_task_of_the_seven_is_enough(short):
    whole = seven(0.5, 0.6)
    assert any(head.startswith("difference") for head in paper_tables(3, whole, ["vicuna-v1.5-7b"])[0].head)
    records = [record | {"samples": 99} if record["settings"]["task_name"] == short else record for record in whole]
    (table,) = paper_tables(3, records, ["vicuna-v1.5-7b"])
    assert not any(head.startswith("difference") for head in table.head)
    assert any("number of questions other than the paper's" in note for note in table.notes)


def test_prompts_without_bos_are_not_the_vanilla_arm():
    (table,) = paper_tables(2, [task("mmlu", 0.44, "rtn-w3", lead=[])], ["vicuna-v1.5-7b"])
    assert all(row[2] is None for row in table.rows)


def test_table_3_shows_both_averages_of_all_seven_tasks():
    records = [*seven(0.5, 0.6), *seven(0.4, 0.5, "rtn-w3"), *seven(0.7, 0.7, "awq-w3", seed=1)[:-1]]
    (table,) = paper_tables(3, records, ["vicuna-v1.5-7b"])
    heads = [head.rpartition(", ")[2] for head in table.head]
    assert heads[2::2] == ["QA average", "mean of plain acc"]
    rows = {row[0]: [str(cell) for cell in row[1:]] for row in table.rows}
    # Four tasks count acc_norm, three acc: (4 · 60 + 3 · 50) / 7.
    assert rows["FP16"] == ["65.33", "55.71", "-9.62", "50.00", "-15.33"]
    assert rows["RTN"][1] == "45.71"
    assert rows["AWQ"][1:] == ["None"] * 4  # six of seven


def test_table_4_has_published_columns_and_none_of_ours():
    (table,) = paper_tables(4, models=["smollm2-135m"])
    rows = {row[0]: [str(cell) for cell in row[1:]] for row in table.rows}
    assert rows["AWQ + IntactKV_[P] + Cal"] == ["4.84", "5.44", "None"]
    assert "GPTQ" not in rows


def quarot(value: float, **others: Any) -> dict[str, Any]:
    """A record of the recipe `quarot`, with its own KV policy."""
    kv = describe(named_recipe("quarot").kv_cache)
    return perplexity(value, "quarot", **{"group": -1, "kv": kv, "seed": 0, **others})


def test_table_5_takes_what_quantizes_as_the_recipe_does_and_full_precision():
    records = [perplexity(7.3), perplexity(9.0, "rtn-w3"), quarot(8.4), quarot(8.1, prefix=BOS)]
    rows = lines(paper_tables(5, records, ["llama-2-7b"]))
    ours, difference = "ours: llama-2-7b, c4, one grid per row", "difference llama-2-7b"
    assert [rows[m][ours] for m in ("FP16", "OmniQuant", "QuaRot", "QuaRot + IntactKV_[B]")] == [
        "7.3",
        "",
        "8.4",
        "8.1",
    ]
    assert float(rows["QuaRot"][difference]) == pytest.approx(0.1)
    assert float(rows["QuaRot: change by [B]"][ours]) == pytest.approx(-0.3 / 8.4, rel=1e-5)
    assert "9" not in [cell for row in rows.values() for cell in row.values()]
    with pytest.raises(UserError, match="table takes perplexities"):  # and Table 1 does not take it
        paper_tables(1, records[2:], ["llama-2-7b"], "--dtype float16")


def test_table_5_takes_omniquant_with_quantized_inputs():
    kv = describe(named_recipe("omniquant-w4a4").kv_cache)
    records = [perplexity(21.0, "omniquant-w4a4", group=-1, kv=kv), perplexity(15.0, "omniquant-let", group=-1)]
    (table,) = paper_tables(5, records, ["llama-2-7b"])
    assert lines([table])["OmniQuant"]["ours: llama-2-7b, c4, one grid per row"] == "21"
    record = perplexity(21.0, "omniquant-w4a4", group=-1, kv=kv, weights={"alpha": 0.75})
    (table,) = paper_tables(5, [record], ["llama-2-7b"])
    assert any("alpha=0.75 (recipe: 0.5)" in note for note in table.notes)


@pytest.mark.parametrize("change", [
    {"kv": None}, {"kv": {"kind": "Rotated", "bits": 3, "keep": 0.95}}, {"kv": {"kind": "PerHead", "bits": 4}},
    {"kv": {"kind": "Rotated", "bits": 4, "keep": 0.95, "v_bits": 3}},
    {"kv": {"kind": "Rotated", "bits": 4, "keep": 0.95, "group_size": 64}},
    {"weights": {"kind": "RTN"}}, {"weights": {"grid": {"bits": 3}}}, {"group": 64},
])  # fmt: skip
def test_what_quantizes_otherwise_has_no_place_in_table_5(change):
    with pytest.raises(UserError, match="of the recipe omniquant-w4a4 or quarot"):
        paper_tables(5, [quarot(8.4, **change)], ["llama-2-7b"], "--dtype float16")


def test_table_5_names_what_a_run_does_otherwise_than_the_recipe():
    record = quarot(8.4, weights={"damp": 0.1})
    record["settings"]["recipe"]["transforms"][0] |= {"head_mix": "none"}
    record["settings"]["kv"] |= {"keep": 1.0, "convention": "gptq-sym"}
    (table,) = paper_tables(5, [record], ["llama-2-7b"])
    (note,) = (note for note in table.notes if "QuaRot" in note)
    for words in ("damp=0.1 (recipe: 0.01)", "transforms.rotate.head_mix=none (recipe: auto)", "kv_cache.keep=1.0",
                  "kv_cache.convention=gptq-sym (recipe: its default)"):  # fmt: skip
        assert words in note


def test_table_5_names_what_the_recipe_tells_and_a_run_leaves_out():
    """A run of before the ranges of keys and values were taken as they are does not say by which rule it took them."""
    settings = quarot(8.4)["settings"]
    recipe = named_recipe("omniquant-w4a4")
    settings |= {"recipe": describe(recipe), "kv": describe(recipe.kv_cache)}
    assert departures(settings) == []
    settings["kv"] = {"kind": "PerHead", "bits": 4}
    assert departures(settings) == ["kv_cache.convention=as before it was a field (recipe: minmax-asym)"]


# ---- tables as text


def test_one_run_is_a_figure_alone_and_none_is_nothing():
    assert str(mean_of([2.0])) == "2.00"
    assert mean_of([]) is None
    figure = mean_of([1.0, 2.0, 6.0])
    assert figure is not None
    assert str(figure) == f"3.00 ± {7**0.5:.2f} (3)"  # deviations −2, −1, 3: variance 14 / 2


@pytest.mark.parametrize(("relative", "changes"), [(True, "-15.0% ± 7.1% (2)"), (False, "-1.75 ± 1.06 (2)")])
def test_a_change_is_that_of_the_seeds_that_both_have(relative, changes):
    # Seeds 1 and 2: −20 % and −10 %, or −2.5 and −1: deviations 10 / √2 and 1.5 / √2.
    assert str(change_of({1: 12.5, 2: 10.0, 3: 99.0}, {0: 5.0, 2: 9.0, 1: 10.0}, relative)) == changes
    assert change_of({1: 12.5}, {0: 5.0}, relative) is None
    assert str(change_of({None: 8.0}, {None: 10.0}, relative)) == ("+25.0%" if relative else "+2.00")


HOSTILE = Table(
    caption="50 % of_all #1 & {more} ~ ^ \\",
    head=("name_of", "x & y"),
    rows=(("[B] 3 × 4", Figure(-1.5, signed)), ("*\\%$", None), ("a, \"b\"", mean_of([1.0, 2.0]))),
    notes=("`code` < 5 → ±",),
)  # fmt: skip


def test_csv_parses_back_to_the_numbers():
    text = render([HOSTILE, Table("other", ("name_of", "z"), (("c", Figure(1234567.0)),))], "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["table"] for row in rows] == ["50 % of_all #1 & {more} ~ ^ \\"] * 3 + ["other"]
    assert [row["x & y"] for row in rows] == ["-1.5", "", "1.5", ""]
    assert (rows[2]["name_of"], float(rows[2]["x & y sd"]), rows[2]["x & y runs"]) == (
        'a, "b"',
        pytest.approx(0.5**0.5, rel=1e-5),
        "2",
    )
    assert float(rows[3]["z"]) == pytest.approx(1234567, rel=1e-5)


def test_latex_is_escaped_and_balanced():
    text = render([HOSTILE], "latex")
    body = text
    for command in (r"\textbackslash{}", r"\textasciitilde{}", r"\textasciicircum{}", r"\textasciigrave{}"):
        body = body.replace(command, "")
    assert not re.search(r"(?<!\\)[%#_~^]", body)  # none of these is left unescaped
    unescaped = re.sub(r"\\[{}$&%#_]", "", body)
    assert unescaped.count("{") == unescaped.count("}")
    assert unescaped.count("$") % 2 == 0
    assert re.findall(r"\\(begin|end)\{(\w+)\}", text) == [
        ("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table"),
    ]  # fmt: skip
    (columns,) = re.findall(r"\\begin\{tabular\}\{(\w+)\}", text)
    rows = [line for line in unescaped.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + 3
    assert all(row.count("&") == len(columns) - 1 for row in rows)
    assert not re.search(r"^[\[*]", text, re.MULTILINE)  # LaTeX would read an option of the line's end before it
    assert "$-$1.50" in text
    assert r"1.50 $\pm$ 0.71 (2)" in text


def test_markdown_is_aligned_and_carries_the_notes():
    text = render([HOSTILE], "markdown")
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1
    assert text.splitlines()[-1].startswith("- `code`")
    assert "n/a" in text
