"""`python -m eval table` from the outside: which table, filters, formats, files, and one line for every mistake."""

import csv
import io
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from common import ROOT, refusals
from test_compare import WHOLE, fill, record_for, written
from test_tables import BOS, CAL, NONE, perplexity, task

from eval.__main__ import main
from eval.runs import record_of
from eval.tables.asked import cells_of
from eval.tables.declared import Scope
from eval.tables.noted import note
from eval.tables.papers import PAPERS


@pytest.fixture
def program(run_main):
    """program(arguments…) -> (exit code, stdout, stderr) of `eval table`, run in this process."""
    return partial(run_main, main, "table")


def keep(kind: str, record: dict[str, Any]) -> None:
    """Write a record as a run does."""
    figures = {key: value for key, value in record.items() if key not in ("settings", "identity", "started")}
    record_of(kind, "some", record["settings"], lambda: figures)


@pytest.fixture
def runs(intactkv_root) -> Path:
    """Records of two models and of one task."""
    for prefix, value in ((NONE, 9.0), (BOS, 8.5)):
        keep("ppl", perplexity(value, "rtn-w3", prefix=prefix))
    keep("ppl", perplexity(70.0, "rtn-w3", model="smollm2-135m", group=64, corpus="sample", window=512, limit=8))
    keep("tasks", task("boolq", 0.5))
    return intactkv_root


def cells(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_without_a_number_it_shows_the_perplexities_of_all_runs(program, runs):
    code, out, _ = program("--format", "csv")
    assert code == 0
    assert [(row["model"], row["vanilla"], row["IntactKV"]) for row in cells(out)] == [
        ("llama-2-7b", "9", "8.5"),
        ("smollm2-135m", "70", ""),
    ]
    assert [row["model"] for row in cells(program("--format", "csv", "--window", 512)[1])] == ["smollm2-135m"]
    both = program("--format", "csv", "--model", "smollm2-135m", "--model", "Llama-2-7b-hf")[1]
    assert len(cells(both)) == 2


def asked(name: str, model: Path, values: dict[tuple[str, str], float], scope: Scope = WHOLE, **others: Any) -> None:
    """Answers of the runs of a published table with one column, as `reproduce` leaves them."""
    for cell in cells_of(PAPERS[name], model, scope):
        value = values.get((cell.row.label, cell.row.arm.label))
        for run in cell.runs if value is not None else ():
            written(run, record_for(cell, value, **others))


def test_a_published_table_shows_published_and_ours(program, runs):
    asked("intactkv-1", Path("llama-2-7b"), {("RTN", ""): 9.0, ("RTN", "[B]"): 8.5})
    for name in ("1", "intactkv-1"):
        code, out, _ = program(name, "--model", "llama-2-7b", "--format", "csv")
        assert code == 0
        row = next(row for row in cells(out) if (row["method"], row["prefix"]) == ("RTN", "[B]"))
        assert [row[head] for head in row if head not in ("table", "method", "prefix")] == [
            "8.61", "8.5", "-0.11", "near",
        ]  # fmt: skip


def test_runs_of_another_size_are_found_by_the_options_that_they_were_made_with(program, runs):
    scope = Scope(window=512, limit=8)
    asked("intactkv-1", Path("smollm2-135m"), {("RTN", ""): 72.5}, scope, window=512, limit=8)
    code, _, err = program("1", "--model", "smollm2-135m")
    assert (code, "no finished run of intactkv-1 fits --model smollm2-135m" in err) == (2, True)
    code, out, _ = program("1", "--model", "smollm2-135m", "--window", 512, "--limit", 8)
    assert code == 0
    assert out.startswith("intactkv-1, smollm2-135m, limit 8, window 512: ")
    assert "72.50" in out
    assert "window 512" in out
    assert "limit 8" in out


def test_a_size_that_reproduce_has_noted_is_found_without_being_told_and_shares_no_table(program, runs):
    scope = Scope(window=512, limit=8)
    model = Path("smollm2-135m")
    asked("intactkv-1", model, {("RTN", ""): 72.5}, scope, window=512, limit=8)
    asked("intactkv-1", model, {("RTN", ""): 60.25}, window=2048)
    note([(PAPERS["intactkv-1"], [model])], ["--window", "512", "--limit", "8"])
    code, out, _ = program("1", "--model", "smollm2-135m")
    assert code == 0
    whole, reduced, published = out.split("\n\nintactkv-1")  # these once
    assert ("60.25" in whole, "72.50" in whole) == (True, False)
    assert ("60.25" in reduced, "72.50" in reduced) == (False, True)
    assert "as published of llama-7b" in published
    assert "60.25" not in program("1", "--window", 512, "--limit", 8)[1]


def test_two_runs_of_a_table_with_other_seeds_have_captions_that_say_so(program, runs):
    """In CSV, too, where rows of both would be the same; a second run that adds no figure has no table of its own."""
    model, paper = Path("smollm2-135m"), PAPERS["intactkv-1"]
    asked("intactkv-1", model, {("RTN", ""): 72.5, ("GPTQ", ""): 60.25}, window=2048)
    asked("intactkv-1", model, {("GPTQ", ""): [61.0, 62.0]}, Scope(seeds=(1, 2)), window=2048)
    for words in ([], ["--seeds", "1", "2"], ["--mmlu-protocol", "lm-eval"]):  # the table has no MMLU
        note([(paper, [model])], words)
    code, out, err = program("1", "--model", "smollm2-135m")
    assert code == 0, err
    names = [line.partition(": ")[0] for line in out.splitlines() if line.startswith("intactkv-1")]
    assert sorted(names) == [
        "intactkv-1, as published of llama-7b", "intactkv-1, smollm2-135m", "intactkv-1, smollm2-135m, seeds 1 2",
    ]  # fmt: skip
    rows = [(row["table"], row["method"], row["prefix"]) for row in cells(program("1", "--format", "csv")[1])]
    assert len(rows) == len(set(rows)) > 0


def test_without_a_model_every_model_that_has_figures_stands_in_the_table(program, runs):
    asked("intactkv-1", Path("Llama-2-7b-hf"), {("FP16", ""): 7.3})
    asked("intactkv-1", Path("mistral-7b"), {("FP16", ""): 7.9})
    heads = program("1", "--format", "csv")[1].splitlines()[0].split(",")
    assert {"C4 llama-2-7b: ours", "C4 mistral-7b: ours"} <= set(heads)
    assert "C4 llama-2-13b: published" not in heads
    other, own = program("1")[1].split("\n\nintactkv-1: ")
    assert (other.startswith("intactkv-1, mistral-7b"), "7.90" in other, "C4: published" in own) == (True, True, True)
    assert "mistral-7b" not in program("1", "--model", "llama-2-7b")[1]


def test_over_seeds_joins_runs_of_other_calibration_seeds(program, intactkv_root):
    for seed, value in ((0, 9.0), (1, 9.4)):
        keep("ppl", perplexity(value, "gptq-w3", seed=seed))
    assert len(cells(program("--format", "csv")[1])) == 2
    (row,) = cells(program("--format", "csv", "--over-seeds")[1])
    assert (row["vanilla"], float(row["vanilla sd"]), row["vanilla runs"]) == (
        "9.2",
        pytest.approx(0.08**0.5, 1e-5),
        "2",
    )
    scope = Scope(seeds=(0, 1))
    fill(PAPERS["intactkv-1"], Path("llama-2-7b"), {("GPTQ", ""): [9.0, 9.4]}, scope)
    assert "9.20 ± 0.28 (2)" in program("1", "--seeds", 0, 1)[1]


def test_a_prefix_file_has_a_row_of_its_own(program, runs):
    keep("ppl", perplexity(8.1, "rtn-w3", prefix=CAL))
    keep("tasks", task("boolq", 0.6, prefix=CAL))
    rows = cells(program("--format", "csv", "--model", "llama-2-7b")[1])
    assert sorted((row["prefix"], row["vanilla"], row["IntactKV"]) for row in rows) == [
        ("[B]", "9", "8.5"),
        ("[cal]", "9", "8.1"),
    ]
    assert [(row["prefix"], row["arm"], row["boolq acc"]) for row in cells(program("tasks", "--format", "csv")[1])] == [
        ("[cal]", "vanilla", "50"),
        ("[cal]", "IntactKV", "60"),
        ("[cal]", "IntactKV − vanilla", "10"),
    ]


def test_tasks_have_their_own_table(program, runs):
    code, out, _ = program("tasks", "--format", "csv", "--task", "boolq")
    assert code == 0
    assert cells(out)[0]["boolq acc"] == "50"


@pytest.mark.parametrize("which", [(), ("1",), ("2",), ("3",), ("4",), ("5",), ("tasks",), ("spqr-accuracy",)])
@pytest.mark.parametrize("style", ["markdown", "csv", "latex"])
def test_every_table_comes_in_every_format(which, style, program, runs):
    code, out, err = program(*which, "--format", style)
    assert (code, err) == (0, "")
    first = {
        "markdown": ("Perplexity", "intactkv-", "spqr-accuracy", "Tasks"),
        "csv": ("protocol", "table"),
        "latex": (r"\begin{table}",),
    }
    assert out.startswith(first[style])
    assert out.endswith("\n")


def test_out_writes_what_would_be_printed(program, runs):
    printed = program("1")[1]
    path = runs / "reports" / "table1.md"
    code, out, _ = program("1", "--out", path)
    assert (code, out.strip()) == (0, str(path))
    assert path.read_text() == f"{printed}\n<!-- made by IntactKV -->\n"


BAD_INPUT = {
    "unknown table": (["7"], "table 7 is not known; choose 1 to 5"),
    "unknown model": (["--model", "nosuch"], "--model nosuch"),
    "unknown model in a paper's table": (["1", "--model", "nosuch"], "--model nosuch"),
    "no run with that window": (["--window", "77"], "--window 77"),
    "no run with that window in a paper's table": (["1", "--window", "77"], "--window 77"),
    "a model without runs under a filter": (["1", "--model", "llama-7b", "--limit", "3"], "--model llama-7b --limit 3"),
    "a setting of other runs": (["tasks", "--window", "512"], "--window is no setting of tasks"),
    "a setting of tasks": (["--fewshot", "5"], "--fewshot is no setting of perplexities"),
    "a filter where nothing was run": (["4", "--limit", "8"], "--limit 8"),
    "a filter of records": (["1", "--dtype", "float16"], "--dtype is no setting of a published table"),
    "a task of a published table": (["2", "--task", "mmlu"], "--task is no setting of a published table"),
    "the protocol of MMLU": (["2", "--protocol", "lm-eval"], "--mmlu-protocol"),
    "a choice without a table": (["--only", "rtn"], "--only is of a published table"),
    "a setting without a table": (["tasks", "--set", "weights.damp=1"], "--set is of a published table"),
    "costs of a paper's table": (["1", "--costs"], "--costs"),
    "unknown format": (["--format", "html"], "html"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_a_mistake_is_one_line(case, program, runs):
    arguments, named = BAD_INPUT[case]
    code, out, err = program(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert named in err


def test_a_file_that_cannot_be_written_is_named(program, runs):
    (runs / "file").write_text("")
    code, out, err = program("--out", runs / "file" / "table.md")
    assert (code, out) == (2, "")
    assert f"--out {runs / 'file' / 'table.md'}: {runs / 'file'} is no directory" in err


def test_without_any_run_the_program_says_how_to_make_one(program, intactkv_root):
    assert "run `python -m eval ppl` first" in program()[2]
    assert "run `python -m eval tasks` first" in program("tasks")[2]
    assert program("1")[0] == 0  # the published figures need none


def test_help_does_not_wait_for_torch():
    code = ("import runpy, sys; sys.argv = ['x', 'table', '--help']\n"
            "try:\n    runpy.run_module('eval', run_name='__main__')\nexcept SystemExit:\n    pass\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules")  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                            check=False)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "TABLE|tasks|needle" in result.stdout


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(("arguments", "named"), [
    (("cpu",), "got 1 of at least 2"),
    (("cpu", "modelzoo", "gptx"), "--only fp16 gptx leaves nothing of intactkv-"),
    (("cpu", "modelzoo/no-such/no-such-7b"), "no model in"),
    (("gpu", "modelzoo"), "device 'gpu'"),
])  # fmt: skip
def test_the_scripts_refuse_in_one_line(number, arguments, named):
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("scripts/setup.sh has not made .venv")
    result = subprocess.run(["bash", f"scripts/table/table{number}.sh", *arguments], cwd=ROOT, capture_output=True,
                            env=os.environ | {"INTACTKV_ROOT": str(ROOT)}, text=True, timeout=120,
                            check=False)  # fmt: skip
    assert result.returncode == 2
    assert len(refusals(result.stderr)) == 1, result.stderr
    assert named in result.stderr


def test_a_published_table_is_shown_without_a_library_that_computes(intactkv_root: Path) -> None:
    code = "import sys; sys.argv = ['x', 'table', 'gptq-llama']; from eval.__main__ import main; main()\n" \
           "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"  # fmt: skip
    env = {"PYTHONPATH": str(ROOT), "INTACTKV_ROOT": str(intactkv_root), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=intactkv_root)
    assert (done.returncode, "8.66" in done.stdout) == (0, True), done.stderr
