"""The published tables as data: figures that agree with each other, and commands that the programs understand."""

import argparse
import contextlib
import io
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from common import ROOT

from corpora.catalog import FAMILIES
from corpora.text import PROTOCOLS
from eval.__main__ import parser
from eval.tables.asked import BOS_IN_WINDOWS, Run, bases_of, calls_of, cells_of, runs_of
from eval.tables.declared import BOS, BOS_ALONE, Arm, Method, Paper, Row, Scope
from eval.tables.departures import QUESTIONS
from eval.tables.papers import PAPERS
from eval.tables.papers.gptq import gptq
from quantization.named import RECIPES, named_recipe
from quantization.programs.options import add_plan_options, chosen_recipe, plan_of
from quantization.programs.quantize import quantize_parser
from quantization.runs.checkpoint import find_checkpoint

JUDGED = Scope(judge=("--judge-model", "somebody"))
EVERY_ROW = [(paper, row) for paper in PAPERS.values() for row in paper.rows]


def published(row: Row) -> Iterator[tuple[str, tuple[float | None, ...]]]:
    """Figures by model; answers in words are none."""
    for model, figures in row.published.items():
        yield model, tuple(None if isinstance(figure, str) else figure for figure in figures)


def test_every_table_has_its_own_name_its_models_rows_and_figures() -> None:
    known = {f"{family}-{size}" for family, models in FAMILIES.items() for size in models.sizes}
    assert len(PAPERS) == len({paper.title + paper.source for paper in PAPERS.values()})
    for name, paper in PAPERS.items():
        assert paper.name == name
        assert set(paper.models) <= known
        places = [(row.label, row.arm) for row in paper.rows]
        assert len(places) == len(set(places))
        assert len(paper.measures) == len({measure.head for measure in paper.measures})
        for row in paper.rows:
            assert set(row.published) <= set(paper.models or [""])
            assert all(len(figures) == len(paper.measures) for figures in row.published.values())


def test_a_published_average_is_the_mean_of_its_columns() -> None:
    found = 0
    for paper, row in EVERY_ROW:
        heads = [measure.head for measure in paper.measures]
        for _, figures in published(row):
            for measure, figure in zip(paper.measures, figures, strict=True):
                parts = [figures[heads.index(head)] for head in measure.average_of]
                if parts and figure is not None and None not in parts:
                    found += 1
                    # Both the columns and the mean are rounded to hundredths.
                    assert figure == pytest.approx(fmean(p for p in parts if p is not None), abs=0.0101), (paper, row)
    assert found == 47


# Cells that tables give otherwise than other tables do; a note of each table says so.
OTHERWISE = {
    ("FP16", "llama-3.1-instruct-8b"): "differ between qllm's sections",
    ("RTN", "llama-3.1-instruct-8b"): "another run",
    ("GPTQ", "llama-3.1-instruct-8b"): "another run",
}


def test_the_same_run_has_the_same_figure_in_every_table() -> None:
    """But for those that a note names; some tables print more decimals."""
    cells: dict[object, list[tuple[float, Paper, Row]]] = defaultdict(list)
    for paper, row in EVERY_ROW:
        for model, figures in published(row):
            for measure, figure in zip(paper.measures, figures, strict=True):
                if figure is not None and not measure.average_of:
                    asked = (model, row.method, row.arm, measure.program, measure.item, measure.options, measure.metric)
                    cells[asked].append((figure, paper, row))
    repeated = [same for same in cells.values() if len(same) > 1]
    assert len(repeated) > 80
    for asked, same in cells.items():
        model = asked[0]  # type: ignore[index]
        for (first, paper, row), (second, other, _) in itertools.combinations(same, 2):
            if abs(first - second) > 0.0051:
                said = OTHERWISE[row.method.name, model]
                assert any(said in note for note in (*paper.notes, *other.notes)), (paper.name, other.name, row.label)


@pytest.mark.parametrize(("table", "printed"), [
    ("gptq-opt-accuracy", ("52.87", "50.11", "50.19", "31.43", "47.42", "13.16", "17.52", "13.76", "1.2e4", "16.48")),
    ("spqr-accuracy", ("42.30",)), ("spqr-perplexity", ("11.49",)),
])  # fmt: skip
def test_what_a_page_prints_wrongly_is_a_note_and_no_figure(table: str, printed: tuple[str, ...]) -> None:
    paper = PAPERS[table]
    notes = " ".join(paper.notes)
    assert all(word in notes for word in printed)
    figures = {figure for row in paper.rows for _, of_model in published(row) for figure in of_model}
    assert not figures & set(map(float, printed))


def test_every_row_is_behind_an_arm_of_intactkv_too() -> None:
    for paper in PAPERS.values():
        arms: dict[Method, set[Arm]] = defaultdict(set)
        for row in paper.rows:
            arms[row.method].add(row.arm)
        for method, mine in arms.items():
            untouched = method.recipe == "fp16" and not method.kv
            assert any(arm.prefix != "none" and not arm.vanilla for arm in mine) != untouched, (paper.name, method)


def test_behind_bos_something_is_there_to_compare_with_where_alone_reads_none() -> None:
    """In every table but PrefixQuant's, whose methods are made behind their prefix."""
    for paper, row in EVERY_ROW:
        for measure in paper.measures:
            if row.arm == BOS and not measure.average_of:
                bases = bases_of(row, measure, paper.rows)
                assert bases or paper.project == "PrefixQuant", (paper.name, row.label, measure.head)
                assert (bases[:1] == (BOS_ALONE,)) == (BOS_ALONE in {other.arm for other in paper.rows})


def test_the_words_of_arms_are_distinct_whatever_their_case() -> None:
    for paper in PAPERS.values():
        arms = {row.arm for row in paper.rows}
        assert len({(arm.label or "alone").lower() for arm in arms}) == len(arms)


def test_the_protocols_that_start_every_window_with_bos_are_known_without_torch() -> None:
    assert {name for name, rules in PROTOCOLS.items() if rules.bos_in_every_window} == set(BOS_IN_WINDOWS)


def test_tasks_are_asked_without_bos_where_the_page_did() -> None:
    for paper in PAPERS.values():
        for measure in paper.measures:
            if measure.program == "tasks":
                assert (measure.alone == ("--bos", "never")) == paper.source.startswith("qllm"), (paper.name, measure)


def test_the_size_of_groups_gives_way_to_a_models_own_where_the_method_says_so() -> None:
    for paper, row in EVERY_ROW:
        own = [run.option("--group-size") for cell in cells_of(replace(paper, rows=(row,)), Path("smollm2-135m"))
               for run in cell.runs if run.program == "ppl"]  # fmt: skip
        if row.method.own_groups:
            assert set(own) == {"64"}
        elif "--group-size" in row.method.options:
            assert set(own) <= {"-1"}


def test_the_documentation_counts_the_tables_and_their_figures() -> None:
    tables = [paper for paper in PAPERS.values() if not paper.name.startswith("ours-")]
    figures = [figure for paper in tables for row in paper.rows for of in row.published.values() for figure in of]
    page = " ".join((ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8").split())
    assert f"{len(tables)} published ones, with {sum(f is not None for f in figures)} figures and answers" in page


def test_questions_of_the_published_tasks_are_known() -> None:
    items = {m.item for paper in PAPERS.values() for m in paper.measures if m.program == "tasks" and not m.average_of}
    assert items <= set(QUESTIONS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A folder with a tiny model under every name of the tables; groups of 128 and 4096 runs of a matrix fit it."""
    folder = tmp_path_factory.mktemp("named")
    tiny = tiny_checkpoint(
        folder, "llama", hidden_size=128, head_dim=128, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=128, num_hidden_layers=2, max_position_embeddings=4096,
    )  # fmt: skip
    for name in {name for paper in PAPERS.values() for name in paper.models}:
        (folder / name).symlink_to(tiny, target_is_directory=True)
    (folder / "text").write_text("There was a rabbit. " * 200)
    return folder


def asked_of(models: Path) -> list[Run]:
    """Every run of every table for every model, each once."""
    scope = replace(JUDGED, calibration=("--calibration", str(models / "text")))
    papers = PAPERS.values()
    return runs_of(cell for paper in papers for name in paper.models for cell in cells_of(paper, models / name, scope))


def test_every_command_is_one_that_its_program_understands(models: Path) -> None:
    parsers = {"eval": parser(), "quantization": quantize_parser(listing=False)}
    programs = set()
    for call in calls_of(asked_of(models)):
        _, _, module, *words = call.command("cpu")
        programs.add(call.first.program)
        if module in parsers:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    parsers[module].parse_args(words)
                except SystemExit:
                    pytest.fail(f"{' '.join(words)}: {said.getvalue()}")
    assert programs >= {"ppl", "tasks", "judge", "mtbench", "quantization", "calibrate", "train-prefix"}


def test_what_is_made_behind_a_prefix_and_what_makes_prefixes_plan_their_commands(
    models: Path, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    """Once for each program and prefix."""
    from intactkv.__main__ import main as intactkv
    from quantization.__main__ import main as quantization

    mains = {"intactkv": intactkv, "quantization": quantization}
    present = {"train-prefix": ["--corpus", str(models / "text")], "calibrate": ["--conversations", "sample"]}
    seen = set()
    for call in calls_of(asked_of(models)):
        _, _, module, *words = call.command("cpu")
        if module not in mains or "--prefix" not in words or any(need.file for need in call.needs):
            continue
        named = (module, call.first.program, words[words.index("--prefix") + 1])
        if named in seen:
            continue
        seen.add(named)
        code, _, err = run_main(mains[module], *words, *present.get(call.first.program, ()), "--plan")
        assert code == 0, (words, err)
    assert {program for program, *_ in seen} == set(mains)


def test_what_a_method_says_of_itself_is_what_its_recipe_is(models: Path) -> None:
    """And every method, and something behind every arm, can be planned on a model."""
    options = argparse.ArgumentParser()
    add_plan_options(options)
    seen: set[Method | Arm] = set()
    for paper, row in EVERY_ROW:
        method, arm = row.method, row.arm
        if {method, arm} <= seen or not paper.models:
            continue
        seen |= {method, arm}
        words = [*method.words(), *(word for _, more in method.by_model[:1] for word in more)]
        text = ["--calibration", str(models / "text")] if method.calibrates else []
        model = str(models / paper.models[0])
        chosen = options.parse_args(["--model", model, *words, *text, "--prefix", arm.prefix, "--device", "cpu"])
        recipe = chosen_recipe(chosen, find_checkpoint(chosen.model))
        named = named_recipe(method.recipe)
        assert method.recipe in RECIPES
        assert (recipe.calibrates, recipe.makes_checkpoint) == (method.calibrates, method.quantizes), method
        assert named.calibrate_behind_prefix == method.behind
        if method.kv_generating is not None:
            options.parse_args(["--model", "x", *method.words(generates=True)])
        plan_of(chosen)


def test_gptq_in_groups_is_gptq_per_row_with_other_groups(models: Path) -> None:
    options = argparse.ArgumentParser()
    add_plan_options(options)

    def recipe(method: Method, *more: str) -> object:
        words = (*method.words(), *method.text, *more)
        chosen = options.parse_args(["--model", str(models / "llama-2-7b"), *words])
        return chosen_recipe(chosen, find_checkpoint(chosen.model))

    rows = ("--group-size", "128", "--set", "weights.static_groups=false")  # as qllm's script makes it
    assert recipe(gptq(4, groups=True)) == recipe(gptq(4), *rows)
    assert recipe(gptq(4, groups=True)) != recipe(gptq(3, groups=True))


def test_a_model_with_a_text_of_its_own_keeps_it_and_one_without_a_cut_gets_none() -> None:
    kvquant, zeroquant = PAPERS["kvquant-perplexity"], PAPERS["zeroquant-perplexity"]

    def words(paper: Paper, model: str) -> set[str]:
        runs = runs_of(cells_of(paper, Path("modelzoo") / model))
        return {word for run in runs for word in run.words}

    assert "wikitext2" in words(kvquant, "llama-2-7b")
    assert "--calibration" not in words(kvquant, "smollm2-135m")
    assert "weights.groups=4096" in words(zeroquant, "Llama-3.1-8B-Instruct")
    assert "weights.groups=4096" not in words(zeroquant, "llama-2-7b")


def test_a_prefix_that_is_trained_first_is_what_the_weights_are_made_behind() -> None:
    """PrefixQuant's: trained, then calibrated behind it; IntactKV's: quantized, then trained for it."""
    paper = PAPERS["prefixquant-trainable-c4"]
    row = next(row for row in paper.rows if row.arm.label == "[trained]")
    (run,) = cells_of(replace(paper, rows=(row,)), Path("modelzoo/llama-2-7b"))[0].runs
    trained, quantized = run.needs
    assert (trained.program, trained.needs) == ("train-prefix", ())
    assert (quantized.program, quantized.needs) == ("quantization", (trained,))
    (call,) = calls_of([quantized])
    assert str(trained.file) in call.command()
    assert {"--seed", "--training-seed"} <= {*quantized.words, *trained.words}

    paper = PAPERS["intactkv-4"]
    row = next(row for row in paper.rows if row.arm.label == "[P] + Cal")
    (run,) = cells_of(replace(paper, rows=(row,)), Path("modelzoo/vicuna-v1.5-7b"), JUDGED)[0].runs
    (answers,) = run.needs
    quantized, trained = answers.needs
    assert (quantized.program, trained.program, trained.needs) == ("quantization", "calibrate", (quantized,))
