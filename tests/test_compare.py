"""Ours beside theirs: declared tables filled from records, differences, verdicts, and what departs."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_tables import perplexity, task

from corpora.catalog import catalog_name
from eval.runs import record_of
from eval.tables.asked import Cell, cells_of
from eval.tables.beside import paper_table
from eval.tables.compare import Filled, cache_of, filled, scatter, value_of, verdict_of
from eval.tables.declared import ALONE, BOS, BOS_ALONE, Arm, Measure, Method, Paper, Row, Scope, with_arms
from eval.tables.ledger import Entry, keep
from eval.tables.papers import PAPERS
from eval.tables.render import Table, render

LLAMA = Path("modelzoo/llama-2/llama-2-7b")
WHOLE = Scope()
VICUNA = Path("modelzoo/vicuna-v1.5/vicuna-v1.5-7b")
JUDGED = Scope(judge=("--judge-model", "gpt-4-0125-preview"))
PPL, ACC = Measure("C4", item="c4"), Measure("BoolQ", "tasks", "boolq", metric="acc", better="higher")


def written(run: Any, record: Mapping[str, Any]) -> Path:
    """Keep a record as the answer of a run, as `reproduce` does."""
    figures = {key: value for key, value in record.items() if key not in ("settings", "identity", "started", "task")}
    settings = record["settings"] | {"asked": run.key}  # another run, another identity
    path = Path(record_of(run.program, "some", settings, lambda: figures)["path"])
    keep(run, Entry(program=run.program, model=run.model.name, item=run.item, command=[], record=path.name,
                    seconds=1.0, finished="2026-01-01T00:00:00+00:00"))  # fmt: skip
    return path


def graded(score: float | None, **others: Any) -> dict[str, Any]:
    """A record of `eval judge` on one file of answers."""
    settings = {"judge": "gpt-4-0125-preview", "mode": "single", "questions": "mt_bench", "questions_sha256": "q",
                "prompts_sha256": "p", "references_sha256": "r", "max_tokens": 2048,
                "answers_sha256": {"file": "sha"}} | others  # fmt: skip
    counts = {"judgements": 160, "unscored": {"no rating": 3, "refused": 1, "failed": 0}}
    return {"settings": settings, "models": {"file": {"score": score} | counts}}


def record_for(cell: Cell, value: float, **others: Any) -> dict[str, Any]:
    if cell.measure.program == "ppl":
        whole = 256 if cell.measure.item != "wikitext2" else 141 if "llama-3" in cell.runs[0].model.name else 166
        given: dict[str, Any] = {"corpus": cell.measure.item, "windows": whole} | others
        return perplexity(value, **given)
    if cell.measure.program == "judge":
        return graded(value, **others)
    norm = value / 100 if cell.measure.metric == "acc_norm" else None
    return task(cell.measure.item, value / 100, acc_norm=norm, **others)


Values = Mapping[tuple[str, str], float | list[float]]  # by the label of a row and of its arm; of every seed


def fill(
    paper: Paper, model: Path, values: Values, scope: Scope = WHOLE, **others: Any
) -> dict[tuple[str, str], Filled]:
    """The cells of a table of one measure by row and arm, after runs with those figures."""
    for cell in cells_of(paper, model, scope):
        given = values.get((cell.row.label, cell.row.arm.label), [])
        for run, value in zip(cell.runs, given if isinstance(given, list) else [given], strict=False):
            written(run, record_for(cell, value, **others))
    return {(one.row.label, one.row.arm.label): one for one in filled(paper, model, scope)}


def column(table: Table, head: str) -> dict[tuple[str, str], str]:
    """A column of a table by method and prefix, as text; `[B]: change` is what the prefix changes."""
    place = table.head.index(head)
    return {(str(row[0]), str(row[1])): str(row[place]) for row in table.rows}


def test_a_model_of_the_paper_has_published_ours_the_difference_and_its_verdict(intactkv_root: Path) -> None:
    found = fill(PAPERS["intactkv-1"], LLAMA, {("FP16", ""): 7.30, ("RTN", ""): 9.00, ("RTN", "[B]"): 8.50})
    assert [(found[place].theirs, found[place].verdict) for place in (("FP16", ""), ("RTN", ""), ("RTN", "[B]"))] == [
        (7.28, "agrees"), (8.97, "agrees"), (8.61, "near"),
    ]  # fmt: skip
    assert found["RTN", "[B]"].difference == pytest.approx(-0.11)
    assert found["RTN", "[B]"].departs == ()
    (table,) = paper_table(PAPERS["intactkv-1"], list(found.values()))
    assert table.head == ("method", "prefix", "C4: published", "C4: ours", "C4: difference", "C4: verdict")
    assert column(table, "C4: ours")["AWQ", "[B]"] == "None"
    assert column(table, "C4: ours")["RTN", "[B]: change"] == f"{-0.5 / 9:+.1%}"
    assert column(table, "C4: published")["RTN", "[B]: change"] == f"{8.61 / 8.97 - 1:+.1%}"
    assert column(table, "C4: published")["AWQ", "[B]: change"] == "-1.6%"
    assert column(table, "C4: difference")["RTN", "[B]: change"] == "None"
    assert column(table, "C4: difference")["RTN", "[B]"] == "-0.11"
    assert any("within 1" in note for note in table.notes)


def test_a_model_that_was_not_run_has_published_figures_and_nothing_of_ours(intactkv_root: Path) -> None:
    (table,) = paper_table(PAPERS["intactkv-1"], filled(PAPERS["intactkv-1"], LLAMA))
    assert table.head == ("method", "prefix", "C4: published", "C4: ours")
    assert set(column(table, "C4: ours").values()) == {"None"}
    assert "n/a" in render([table], "markdown")


@pytest.mark.parametrize(("scope", "others", "word"), [
    (Scope(window=512), {"window": 512}, "window 512"), (Scope(limit=8), {"limit": 8, "windows": 8}, "limit 8"),
    (Scope(corpora=("wikitext2",)), {}, "corpus wikitext2"), (Scope(), {"window": 1024}, "windows of 1024 tokens"),
    (Scope(scoring=("--protocol", "gptq")), {"protocol": "gptq"}, "protocol gptq"),
])  # fmt: skip
def test_there_is_no_difference_between_figures_of_other_protocols(
    scope: Scope, others: dict[str, Any], word: str, intactkv_root: Path
) -> None:
    paper = PAPERS["intactkv-1"]
    found = fill(paper, LLAMA, {("FP16", ""): 7.30}, scope, **others)
    one = found["FP16", ""]
    assert str(one.ours) == "7.30"
    assert (one.difference, one.verdict) == (None, "")
    assert any(word in said for said in one.departs)
    (table,) = paper_table(paper, list(found.values()))
    assert not any("difference" in head for head in table.head)
    assert any(word in note for note in table.notes)


@pytest.mark.parametrize(("corpus", "model", "windows", "word"), [
    ("wikitext2", "llama-2-7b", 166, ""), ("wikitext2", "llama-2-7b", 160, ""),
    ("wikitext2", "llama-2-7b", 141, "141 windows of wikitext2, about 166 expected"),
    ("wikitext2", "llama-3.1-instruct-8b", 141, ""), ("wikitext2", "Meta-Llama-3-8B", 166, "about 141 expected"),
    ("wikitext2", "qwen2-7b", 146, ""), ("wikitext2", "qwen2-7b", 120, "about 140 to 166 expected"),
    ("c4", "vicuna-v1.5-7b", 256, ""), ("c4", "vicuna-v1.5-7b", 217, "217 windows of c4, about 256 expected"),
    ("c4", "llama-3-8b", 225, ""), ("c4-old", "llama-3-8b", 225, "225 windows of c4-old, about 256 expected"),
])  # fmt: skip
def test_a_truncated_or_replaced_text_is_told_by_its_windows(
    corpus: str, model: str, windows: int, word: str, intactkv_root: Path
) -> None:
    row = Row("FP16", Method("FP16"), published={catalog_name(model): (7.0,)})
    paper = Paper("p", "p", "t", "s", "p", (catalog_name(model),), (Measure("text", item=corpus),), (row,))
    one = fill(paper, Path(model), {("FP16", ""): 7.0}, windows=windows)["FP16", ""]
    assert one.verdict == ("" if word else "agrees")
    assert " ".join(one.departs).endswith(word)
    assert bool(one.departs) == bool(word)


@pytest.mark.parametrize("scope", [Scope(window=2048), Scope(limit=256), Scope(limit=10_000), Scope(data="local")])
def test_the_published_size_in_words_is_no_departure(scope: Scope, intactkv_root: Path) -> None:
    assert fill(PAPERS["intactkv-1"], LLAMA, {("FP16", ""): 7.30}, scope)["FP16", ""].verdict == "agrees"
    assert fill(PAPERS["intactkv-2"], VICUNA, {("FP16", ""): 50.0}, scope)["FP16", ""].departs == ()


def test_what_a_limit_left_out_departs(intactkv_root: Path) -> None:
    one = fill(PAPERS["intactkv-2"], VICUNA, {("FP16", ""): 50.0}, Scope(limit=5), samples=57 * 5)["FP16", ""]
    assert (one.departs, one.verdict) == (("limit 5",), "")
    judged = Scope(limit=80, judge=JUDGED.judge)
    assert fill(PAPERS["intactkv-4"], VICUNA, {("FP16", ""): 5.2}, judged)["FP16", ""].departs == ()


def test_a_part_of_the_seeds_has_no_verdict(intactkv_root: Path) -> None:
    """10 and 12 of three seeds: 11 ± √2; 9 of three."""
    paper, scope = PAPERS["intactkv-1"], Scope(seeds=(0, 1, 2))
    found = fill(paper, LLAMA, {("GPTQ", ""): [10.0, 12.0], ("GPTQ", "[B]"): 9.0}, scope)
    (table,) = paper_table(paper, list(found.values()))
    assert column(table, "C4: ours")["GPTQ", "alone"] == "11.00 ± 1.41 (2 of 3 seeds)"
    assert column(table, "C4: ours")["GPTQ", "[B]"] == "9.00 (1 of 3 seeds)"
    assert [(one.departs, one.verdict) for one in (found["GPTQ", ""], found["GPTQ", "[B]"])] == [
        (("2 of 3 seeds",), ""), (("1 of 3 seeds",), ""),
    ]  # fmt: skip


def heads_of(*corpora: str) -> list[str]:
    return [cell.measure.head for cell in cells_of(PAPERS["intactkv-1"], LLAMA, Scope(corpora=corpora))
            if (cell.row.label, cell.row.arm) == ("FP16", ALONE)]  # fmt: skip


def test_texts_of_one_file_name_have_columns_of_their_own(intactkv_root: Path) -> None:
    """By the shortest end of the path that tells them apart; a table's own name is not for a file."""
    assert heads_of("a/x.txt", "y.txt") == ["x.txt", "y.txt"]
    assert heads_of("a/x.txt", "b/x.txt") == ["a/x.txt", "b/x.txt"]
    assert heads_of("a/c/x.txt", "b/c/x.txt", "b/y/x.txt") == ["a/c/x.txt", "b/c/x.txt", "y/x.txt"]
    assert heads_of("c4", "b/C4", "wikitext2") == ["C4", "b/C4", "wikitext2"]
    assert heads_of("b/wikitext2", "b/c4") == ["wikitext2", "b/c4"]
    assert heads_of("b/wikitext2", "wikitext2") == ["b/wikitext2", "wikitext2"]
    assert heads_of("C4")[0].endswith("/C4")
    paper, scope = PAPERS["intactkv-1"], Scope(corpora=("a/x.txt", "b/x.txt"))
    for i, cell in enumerate(cells_of(paper, LLAMA, scope)[:2]):
        written(cell.runs[0], record_for(cell, 7.0 + i))
    (table,) = paper_table(paper, filled(paper, LLAMA, scope))
    assert [column(table, f"{head}: ours")["FP16", "alone"] for head in ("a/x.txt", "b/x.txt")] == ["7.00", "8.00"]


def test_a_task_without_accuracy_shows_its_own_first_metric_by_name(intactkv_root: Path) -> None:
    paper, scope = PAPERS["intactkv-3"], Scope(tasks=("squadv2", "wikitext", "copa"), recipes=("fp16",))
    metrics = {"squadv2": {"exact": 31.5, "f1": 40.0}, "wikitext": {"word_perplexity": 12.25}, "copa": {"acc": 0.5}}
    for cell in cells_of(paper, VICUNA, scope):
        (run,) = cell.runs
        written(run, task(run.item, 0.5) | {"metrics": metrics[run.item]})
    found = {one.measure.head: one for one in filled(paper, VICUNA, scope)}
    assert {head: str(one.ours) for head, one in found.items()} == {
        "squadv2, exact": "31.50", "wikitext, word_perplexity": "12.25", "copa": "50.00",
    }  # fmt: skip
    assert [one.measure.better for one in found.values()] == ["higher", "lower", "higher"]


def test_there_is_no_mean_of_runs_that_were_computed_otherwise(intactkv_root: Path) -> None:
    """Of two seeds, or of the columns of an average; the average's own columns have their figures."""
    paper, scope = PAPERS["intactkv-1"], Scope(seeds=(0, 1))
    cell = next(one for one in cells_of(paper, LLAMA, scope) if (one.row.label, one.row.arm) == ("GPTQ", ALONE))
    for run, others in zip(cell.runs, ({}, {"dtype": "float32", "device": "cpu"}), strict=True):
        written(run, record_for(cell, 9.0, **others))
    (one,) = (one for one in filled(paper, LLAMA, scope) if one.ours is not None)
    assert one.ours == "no mean of float16 on cuda and float32 on cpu"
    assert (one.difference, one.departs) == (None, (one.ours,))
    found = seven(50.0, 60.0, PAPERS["intactkv-3"], VICUNA, without="boolq")
    boolq = found["BoolQ"]
    (run,) = next(
        c for c in cells_of(PAPERS["intactkv-3"], VICUNA) if (c.row.label, c.measure) == ("FP16", boolq.measure)
    ).runs
    written(run, task("boolq", 0.5, dtype="float32", device="cpu"))
    heads = {one.measure.head: one for one in filled(PAPERS["intactkv-3"], VICUNA) if one.row.label == "FP16"}
    assert heads["QA average"].ours == "no mean of float16 on cuda and float32 on cpu"
    assert str(heads["BoolQ"].ours) == "50.00"


def test_there_is_no_change_between_runs_that_were_computed_otherwise(intactkv_root: Path) -> None:
    """float32 on a CPU alone, float16 on a GPU behind [B]: both compare with the published, not with each other."""
    paper = PAPERS["intactkv-1"]
    for cell in cells_of(paper, LLAMA):
        if cell.row.label in ("RTN", "GPTQ"):
            slow = (cell.row.label, cell.row.arm) == ("RTN", ALONE)
            written(cell.runs[0], record_for(cell, 9.0, **({"dtype": "float32", "device": "cpu"} if slow else {})))
    (table,) = paper_table(paper, filled(paper, LLAMA))
    changed = {place: cell for place, cell in column(table, "C4: ours").items() if place[1] == "[B]: change"}
    assert changed.get(("RTN", "[B]: change"), "None") == "None"
    assert changed["GPTQ", "[B]: change"] == "+0.0%"
    assert column(table, "C4: verdict")["RTN", "[B]"] == "off"


def test_full_precision_on_a_cpu_compares_with_published_figures_of_16_bits(intactkv_root: Path) -> None:
    found = fill(PAPERS["intactkv-1"], LLAMA, {("FP16", ""): 7.30}, dtype="float32", device="cpu")
    assert found["FP16", ""].verdict == "agrees"


def test_a_batch_and_the_columns_own_protocol_are_no_departure(intactkv_root: Path) -> None:
    scope = Scope(scoring=("--protocol", "intactkv", "--batch-size", "2"))
    assert fill(PAPERS["intactkv-1"], LLAMA, {("FP16", ""): 7.30}, scope)["FP16", ""].verdict == "agrees"


def test_calibration_and_options_depart_where_they_reach(intactkv_root: Path) -> None:
    scope = Scope(calibration=("--calibration", "sample"), options=("--set", "weights.damp=0.1"))
    found = fill(PAPERS["intactkv-1"], LLAMA, {("FP16", ""): 7.3, ("RTN", ""): 9.0, ("GPTQ", ""): 9.0}, scope)
    assert [bool(found[method, ""].difference) for method in ("FP16", "RTN", "GPTQ")] == [True, False, False]
    assert any("calibration" in word for word in found["GPTQ", ""].departs)
    assert not any("calibration" in word for word in found["RTN", ""].departs)


def test_another_model_stands_beside_the_published_columns_and_is_named_as_such(intactkv_root: Path) -> None:
    paper, model = PAPERS["intactkv-1"], Path("modelzoo/smollm2/smollm2-135m")
    found = fill(paper, model, {("RTN", ""): 72.5, ("RTN", "[B]"): 70.0}, window=2048)
    assert found["RTN", ""].measure.item == "sample"
    assert found["RTN", ""].difference is None
    (table,) = paper_table(paper, list(found.values()), whole=True)
    assert [head for head in table.head if "published" in head] == [f"C4 {name}: published" for name in paper.models]
    assert column(table, "sample smollm2-135m: ours")["RTN", "alone"] == "72.50"
    assert column(table, "sample smollm2-135m: ours")["RTN", "[B]: change"] == "-3.4%"
    assert any("model smollm2-135m" in note and "corpus sample" in note for note in table.notes)
    assert any("dequantized" in note for note in table.notes)


@pytest.mark.parametrize("name", ["intactkv-1", "lutgemm-accuracy", "gptq-llama", "gptq-accuracy", "kivi-chat"])
def test_what_a_terminal_shows_of_another_model_is_no_wider_than_the_terminal(name: str, intactkv_root: Path) -> None:
    """Its own figures first, with the notes that are of them; then those of one model that the paper has."""
    paper = PAPERS[name]
    (first, second) = paper_table(paper, filled(paper, Path("modelzoo/smollm2/smollm2-135m")))
    assert not any(word in head for table in (first, second) for head in table.head for word in ("ours", "published"))
    assert f"as published of {paper.models[0]}" in second.caption
    own = {str(row[0]): row[2:] for row in second.rows if row[1] == "alone"}
    for row in paper.rows:
        if row.arm == ALONE and row.label in own:
            figures = [figure for figure in row.published[paper.models[0]] if figure is not None]
            shown = [cell if isinstance(cell, str) else cell.value for cell in own[row.label] if cell is not None]
            assert shown == figures
    lines = [line for line in render([first, second], "markdown").splitlines() if line.startswith("|")]
    assert max(map(len, lines)) <= 160


PLAIN = replace(PPL, options=("--protocol", "gptq"))


def arms(measure: Measure, *rows: Row) -> Paper:
    """A table of one column."""
    return Paper("p", "p", "t", "s", "p", ("llama-2-7b",), (measure,), rows)


def change(paper: Paper, values: Values, scope: Scope = WHOLE) -> tuple[str, tuple[str, ...]]:
    """What [B] changes, as the table says it, and its notes."""
    (table,) = paper_table(paper, list(fill(paper, LLAMA, values, scope).values()))
    return column(table, table.head[2]).get(("RTN", "[B]: change"), "none"), table.notes


RTN = Row("RTN", Method("RTN", "rtn-w3", quantizes=True))


def test_a_change_is_taken_where_both_read_the_same_tokens(intactkv_root: Path) -> None:
    """10 alone, 9.8 with [BOS], 9.31 with it intact: −5 % of what reads the same, not −6.9 % of what reads less."""
    values: Values = {("RTN", ""): 10.0, ("RTN", "BOS"): 9.8, ("RTN", "[B]"): 9.31}
    every = with_arms([RTN], BOS_ALONE, BOS)
    assert change(arms(PLAIN, *every), values) == ("-5.0%", ())
    asked_with_it = Scope(scoring=("--protocol", "intactkv"))
    both = arms(PLAIN, every[0], every[2])
    assert change(both, values, asked_with_it)[0] == "-6.9%"
    assert change(arms(PPL, every[0], every[2]), values)[0] == "-6.9%"
    said, (note, *_) = change(both, values)
    assert said == "none"
    assert "--protocol intactkv" in note
    said, (note, *_) = change(both, values, replace(asked_with_it, scoring=("--protocol", "gptq")))
    assert (said, "BOS" in note) == ("none", True)


@pytest.mark.parametrize(("alone", "base"), [((), 70.0), (("--bos", "never"), 72.0)])
def test_prompts_of_tasks_open_with_bos_unless_they_are_asked_without(
    alone: tuple[str, ...], base: float, intactkv_root: Path
) -> None:
    paper = arms(replace(ACC, alone=alone), *(with_arms([RTN], BOS_ALONE, BOS) if alone else with_arms([RTN], BOS)))
    values: Values = {("RTN", ""): 70.0, ("RTN", "BOS"): 72.0, ("RTN", "[B]"): 75.0}
    assert change(paper, values) == (f"{75 - base:+.2f}", ())


def test_a_prefix_that_was_searched_is_no_bos(intactkv_root: Path) -> None:
    found = replace(RTN, arm=Arm("[B]", "auto"))
    assert change(arms(PPL, RTN, found), {("RTN", ""): 10.0, ("RTN", "[B]"): 9.0})[0] == "none"


def test_no_more_departs_than_a_program_is_told(intactkv_root: Path) -> None:
    """A window and a protocol are of perplexity, shots of tasks; a limit is of both, and of MT-bench."""
    scope = Scope(limit=2, window=64, data="sample", scoring=("--protocol", "gptq"), asking=("--fewshot", "1"))
    paper = PAPERS["gptq-accuracy"]
    departs = {one.measure.head: one.departs for one in filled(paper, Path("modelzoo/llama-3.1-instruct-8b"), scope)}
    assert departs["C4"] == ("window 64",)
    assert departs["MMLU"] == ("fewshot 1",)
    chat = filled(PAPERS["gptq-chat"], Path("modelzoo/llama-3.1-instruct-8b"), scope)[0]
    assert chat.departs == ()
    judged = replace(JUDGED, limit=2)
    (cell, *_) = cells_of(PAPERS["intactkv-4"], VICUNA, judged)
    (answers,) = cell.runs[0].needs
    assert (answers.program, answers.option("--limit")) == ("mtbench", "2")


@pytest.mark.parametrize(("model", "name"), [
    ("Llama-2-7b-hf", "llama-2-7b"), ("vicuna-7b-v1.5", "vicuna-v1.5-7b"), ("llama-2-7b", "llama-2-7b"),
    ("Llama-3.1-8B-Instruct", "llama-3.1-instruct-8b"), ("smollm2-135m", "smollm2-135m"),
])  # fmt: skip
def test_a_model_is_known_by_the_hubs_name_too(model: str, name: str) -> None:
    assert catalog_name(model) == name


def test_a_directory_with_the_hubs_name_has_the_published_figures(intactkv_root: Path) -> None:
    found = fill(PAPERS["intactkv-1"], Path("elsewhere/Llama-2-7b-hf"), {("FP16", ""): 7.30})
    assert (found["FP16", ""].theirs, found["FP16", ""].verdict) == (7.28, "agrees")


def test_runs_of_several_seeds_are_one_figure_and_changes_are_paired(intactkv_root: Path) -> None:
    """10, 12, 11 alone and 9, 9.6, 9.35 behind [B]: changes −10 %, −20 %, −15 %; what calibrates not has one run."""
    scope = Scope(seeds=(0, 1, 2))
    values: Values = {("GPTQ", ""): [10.0, 12.0, 11.0], ("GPTQ", "[B]"): [9.0, 9.6, 9.35], ("RTN", ""): 9.0}
    found = fill(PAPERS["intactkv-1"], LLAMA, values, scope)
    assert str(found["GPTQ", ""].ours) == "11.00 ± 1.00 (3)"
    assert found["GPTQ", ""].difference == pytest.approx(11 - 9.58)
    assert len(found["GPTQ", ""].records) == 3
    assert str(found["RTN", ""].ours) == "9.00"
    (table,) = paper_table(PAPERS["intactkv-1"], list(found.values()))
    assert column(table, "C4: ours")["GPTQ", "[B]: change"] == "-15.0% ± 5.0% (3)"
    assert "GPTQ,[B],9.27,9.31667" in render([table], "csv")
    rtn = [
        cell for (method, prefix), cell in column(table, "C4: ours").items() if method == "RTN" and prefix != "alone"
    ]
    assert rtn == ["None", "None"]  # behind [B] nothing was run


def test_the_newest_answer_of_a_run_counts(intactkv_root: Path) -> None:
    fill(PAPERS["intactkv-1"], LLAMA, {("FP16", ""): 7.4})
    assert str(fill(PAPERS["intactkv-1"], LLAMA, {("FP16", ""): 7.2}, batch_size=4)["FP16", ""].ours) == "7.20"


def seven(
    value: float, normed: float, paper: Paper, model: Path, without: str = "", **others: Any
) -> dict[str, Filled]:
    """Full precision's cells of Table 3 by head; tasks with acc_norm have two metrics."""
    for cell in cells_of(paper, model):
        if cell.row.label == "FP16" and not cell.measure.average_of and cell.measure.item != without:
            (run,) = cell.runs
            has_norm = any(m.metric == "acc_norm" and m.item == run.item for m in paper.measures)
            written(run, task(run.item, value / 100, acc_norm=normed / 100 if has_norm else None, **others))
    return {one.measure.head: one for one in filled(paper, model) if one.row.label == "FP16"}


def test_averages_are_of_all_their_columns(intactkv_root: Path) -> None:
    """Four of the seven tasks count acc_norm, three acc: (4 · 60 + 3 · 50) / 7."""
    found = seven(50.0, 60.0, PAPERS["intactkv-3"], VICUNA)
    assert [str(found[head].ours) for head in ("QA average", "mean of acc")] == ["55.71", "50.00"]
    assert found["QA average"].difference == pytest.approx(390 / 7 - 65.33)
    assert found["QA average"].verdict == "off"
    assert found["mean of acc"].theirs is None


def test_an_average_of_six_of_seven_tasks_is_none(intactkv_root: Path) -> None:
    found = seven(50.0, 60.0, PAPERS["intactkv-3"], VICUNA, without="boolq")
    assert found["QA average"].ours is None
    assert str(found["WinoGrande"].ours) == "50.00"


@pytest.mark.parametrize(("others", "word"), [({"samples": 99}, "99 of"), ({"data": "sample"}, "data sample")])
def test_a_part_of_the_questions_is_not_compared_with_the_benchmark(
    others: dict[str, Any], word: str, intactkv_root: Path
) -> None:
    found = seven(50.0, 60.0, PAPERS["intactkv-3"], VICUNA, **others)
    assert found["QA average"].difference is None
    assert any(word in said for said in found["QA average"].departs)
    mmlu = fill(PAPERS["intactkv-2"], VICUNA, {("FP16", ""): 50.0}, **others)["FP16", ""]
    assert (str(mmlu.ours), mmlu.difference) == ("50.00", None)


def test_mmlu_of_all_questions_is_compared(intactkv_root: Path) -> None:
    one = fill(PAPERS["intactkv-2"], VICUNA, {("FP16", ""): 50.0})["FP16", ""]
    assert one.difference == pytest.approx(50.0 - 49.84)
    assert one.verdict == "agrees"


def test_grades_stand_beside_the_published_ones_with_what_has_none(intactkv_root: Path) -> None:
    paper = PAPERS["intactkv-4"]
    values: Values = {("FP16", ""): 5.2, ("RTN", ""): 4.0, ("RTN", "[P]"): 4.75, ("RTN", "[P] + Cal"): 5.0}
    found = fill(paper, VICUNA, values, JUDGED)
    assert [found[place].verdict for place in values] == ["agrees", "near", "agrees", "near"]
    (table,) = paper_table(paper, list(found.values()))
    assert column(table, "MT-bench: ours")["RTN", "[P] + Cal: change"] == "+1.00"
    assert any("16 of our 640 judgements hold no grade" in note for note in table.notes)
    assert not any("GPTQ" in str(row[0]) for row in table.rows)


@pytest.mark.parametrize(("others", "named"), [
    ({"judge": "other"}, "judge other"), ({"endpoint": "http://localhost:8000/v1"}, "judge"),
    ({"questions": "sample"}, "questions sample"), ({"judge": "local-small"}, "judge local-small"),
])  # fmt: skip
def test_no_difference_is_taken_to_scores_that_were_made_otherwise(
    others: dict[str, Any], named: str, intactkv_root: Path
) -> None:
    found = fill(PAPERS["intactkv-4"], VICUNA, {("RTN", ""): 4.0}, JUDGED, **others)
    assert (str(found["RTN", ""].ours), found["RTN", ""].difference) == ("4.00", None)
    (table,) = paper_table(PAPERS["intactkv-4"], list(found.values()))
    assert any(named in note for note in table.notes)
    assert any("local judge shows the flow" in note for note in table.notes) == (others.get("judge") == "local-small")


def test_without_a_judge_nothing_is_asked_of_table_4(intactkv_root: Path) -> None:
    assert all(not cell.runs for cell in cells_of(PAPERS["intactkv-4"], VICUNA))
    (table,) = paper_table(PAPERS["intactkv-4"], filled(PAPERS["intactkv-4"], VICUNA))
    assert column(table, "MT-bench: published")["AWQ", "[P] + Cal"] == "4.84"


def test_a_record_that_cannot_be_read_is_named_and_counts_as_not_run(intactkv_root: Path) -> None:
    paper = PAPERS["intactkv-1"]
    (run,) = cells_of(paper, LLAMA)[0].runs
    path = written(run, perplexity(7.3))
    path.write_text(path.read_text().replace("7.3", "7.1"))
    lines: list[str] = []
    assert filled(paper, LLAMA, left_out=lines)[0].ours is None
    assert [path.name in line for line in lines] == [True]


def test_a_column_with_more_decimals_prints_them(intactkv_root: Path) -> None:
    paper, model = PAPERS["smoothquant-alpha"], Path("modelzoo/llama-3.1-instruct/llama-3.1-instruct-8b")
    fill(paper, model, {("alpha 0.55", ""): 7.29})
    (table,) = paper_table(paper, filled(paper, model))
    heads = ("WikiText-2: published", "WikiText-2: ours", "WikiText-2: difference")
    assert [column(table, head)["alpha 0.55", "alone"] for head in heads] == ["7.2840", "7.2900", "+0.0060"]


@pytest.mark.parametrize(("difference", "verdict"), [
    (0.0, "agrees"), (0.5, "agrees"), (-0.5, "agrees"), (0.51, "near"), (-1.5, "near"), (1.51, "off"),
])  # fmt: skip
def test_the_band_of_an_accuracy_is_the_standard_error_of_its_questions(difference: float, verdict: str) -> None:
    """Half of 10,000 questions right: the number of right ones has a variance of 2,500, so a deviation of 50."""
    error = scatter(ACC, 50.0, [10_000])
    assert error == pytest.approx(100 * math.sqrt(10_000 * 0.5 * 0.5) / 10_000)
    assert verdict_of(difference, error) == verdict


def test_what_a_figure_scatters_by() -> None:
    assert scatter(PPL, 8.0, []) == pytest.approx(0.04)
    assert scatter(ACC, 80.0, []) == pytest.approx(100 * math.sqrt(0.8 * 0.2 / 3270))  # all of BoolQ's questions
    assert scatter(replace(ACC, item="unknown"), 80.0, []) is None
    assert scatter(PPL, None, []) is None
    assert verdict_of(1.0, None) == ""


def test_the_error_of_an_average_is_that_of_independent_columns(intactkv_root: Path) -> None:
    """Of two columns with errors a and b: √(a² + b²) / 2."""
    columns = (ACC, replace(ACC, head="PIQA", item="piqa"))
    mean = Measure("mean", "tasks", better="higher", average_of=("BoolQ", "PIQA"))
    row = Row("FP16", Method("FP16"), published={"llama-2-7b": (50.0, 50.0, 50.0)})
    paper = Paper("p", "p", "t", "s", "p", ("llama-2-7b",), (*columns, mean), (row,))
    for cell in cells_of(paper, LLAMA)[:2]:
        written(cell.runs[0], task(cell.measure.item, 0.5, samples={"boolq": 3270, "piqa": 1838}[cell.measure.item]))
    error = math.hypot(50 / math.sqrt(3270), 50 / math.sqrt(1838)) / 2
    assert filled(paper, LLAMA)[2].verdict == "agrees"
    for shift, verdict in ((0.99, "agrees"), (1.01, "near"), (3.01, "off")):
        moved = replace(row, published={"llama-2-7b": (50.0, 50.0, 50.0 + shift * error)})
        assert filled(replace(paper, rows=(moved,)), LLAMA)[2].verdict in (verdict, "near")


@pytest.mark.parametrize(("measure", "record", "value"), [
    (PPL, {"perplexity": 7}, 7.0), (ACC, {"metrics": {"acc": 0.5}}, 50.0),
    (replace(ACC, metric="exact_match,strict-match"), {"metrics": {"exact_match,strict-match": 0.25}}, 25.0),
    (replace(ACC, metric="bleu_acc"), {"metrics": {"bleu_acc": 0.25, "bleu_diff": -1.0}}, 25.0),
    (replace(ACC, metric="acc_norm"), {"metrics": {"acc": 0.5}}, None),
    (Measure("MT-bench", "judge"), graded(None), None), (Measure("MT-bench", "judge"), graded(6.5), 6.5),
])  # fmt: skip
def test_the_number_of_a_record(measure: Measure, record: dict[str, Any], value: float | None) -> None:
    assert value_of(record, measure) == value


def test_arms_of_a_table_are_told_apart_by_row_and_prefix() -> None:
    assert {row.arm for row in PAPERS["intactkv-1"].rows} == {ALONE, BOS}


KIVI = Row("KIVI", Method("KIVI", kv=("--kv", "kivi", "--kv-bits", "2")))
CACHED = {"kind": "KIVI", "bits": 2}


def cached(paper: Paper, rounded: Mapping[str, float], scope: Scope = WHOLE, **others: Any) -> Table:
    """A table of one column whose cache rounded such shares, by the label of the arm: 10 alone, 9 behind a prefix."""
    for cell in cells_of(paper, LLAMA, scope):
        if cell.row.arm.label in rounded:
            record = record_for(cell, 9.0 if cell.row.arm.label else 10.0, kv=CACHED, **others)
            share = rounded[cell.row.arm.label]
            figures = {"rounded": share, "bits_per_element": [3.0, 3.5], "tokens": 64}
            written(cell.runs[0], record | {"kv_cache": figures})
    return paper_table(paper, filled(paper, LLAMA, scope))[0]


def test_beside_scores_of_a_rounded_cache_stands_how_much_was_rounded(intactkv_root: Path) -> None:
    table = cached(arms(PPL, *with_arms([KIVI], BOS)), {"": 0.93, "[B]": 0.91})
    assert table.notes[0] == (
        "llama-2-7b, KV cache, rounded of what attention read: KIVI 91.0 to 93.0 % (3.25 bits an element)"
    )
    assert not any("nothing" in note for note in table.notes)
    assert column(table, "C4: ours")["KIVI", "[B]: change"] == "-10.0%"


@pytest.mark.parametrize("recipe", ["fp16", "gptq-w3"])
def test_a_cache_that_rounded_nothing_is_no_result_of_its_policy(recipe: str, intactkv_root: Path) -> None:
    """No change is taken of the model as it is; quantized weights have theirs."""
    row = replace(KIVI, method=replace(KIVI.method, recipe=recipe))
    table = cached(arms(PPL, *with_arms([row], BOS)), {"": 0.0, "[B]": 0.0}, recipe=recipe)
    changed, said = column(table, "C4: ours").get(("KIVI", "[B]: change")), " ".join(table.notes)
    assert "nothing of the cache was rounded in KIVI (C4)" in said
    assert (changed, "is not told" in said) == (("-10.0%", False) if recipe == "gptq-w3" else (None, True))
    assert "does not open with" not in said


def test_needles_and_conversations_say_it_in_their_own_records() -> None:
    kv, none = {"settings": {"kv": CACHED}}, {"settings": {"kv": None}}
    needle, chat = replace(PPL, program="needle"), replace(PPL, program="chat")
    results = [{"bits_per_element": [2.0, 4.0]}, {"bits_per_element": [3.0, 5.0]}]
    assert cache_of(kv | {"quantized": 0.5, "results": results}, needle) == (0.5, 3.5)
    assert cache_of(none | {"quantized": 0.0, "results": results}, needle) is None
    answers = [{"quantized": 0.1}, {"quantized": 0.25}]
    assert cache_of(kv | {"answers": answers}, chat) == (0.25, None)
    assert cache_of(none | {"answers": answers}, chat) is None
    assert cache_of(none, replace(PPL, program="judge")) is None
