"""The published calls: one line for every mistake, and the checkpoints that later calls find."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from common import ROOT, refusals

QUANTIZERS = ("auto_gptq", "llm_awq", "omniquant")
RUNNERS = ("run_gptq", "run_spqr", "run_lutgemm", "run_zeroquant", "run_smoothquant", "run_prefixquant", "run_kivi",
           "run_kvquant")  # fmt: skip


@pytest.fixture(autouse=True)
def environment() -> None:
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("scripts/setup.sh has not made .venv")


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"scripts/{script}.sh", *arguments],
        cwd=ROOT,
        env=os.environ | {"INTACTKV_ROOT": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        *((f"quantization/{name}", ("smollm2", "135m", "3"), "got 3 of 5") for name in QUANTIZERS),
        *((f"quantization/{name}", ("no-such", "7b", "3", "64", "cpu"), "no-such-7b is") for name in QUANTIZERS),
        *((f"quantization/{name}", ("smollm2", "135m", "3", "64", "gpu"), "device 'gpu'") for name in QUANTIZERS),
        *((name, ("0",), "got 1 of") for name in RUNNERS),
        ("run_gptq", ("cpu", "no-such-model"), "no-such-model"),
        ("eval/quarot", ("smollm2", "135m"), "got 2 of 3"),
        ("eval/quarot", ("no-such", "7b", "cpu"), "intactkv-5 cannot run: no model in modelzoo/no-such/no-such-7b"),
        ("eval/quarot", ("smollm2", "135m", "gpu"), "device 'gpu'"),
        *((f"eval/{name}", ("cpu",), "got 1 of 2") for name in ("needle", "chat")),
        *((f"eval/{name}", ("cpu", "no-such-model"), "no-such-model") for name in ("needle", "chat")),
        ("table/weights", ("cpu",), "got 1 of at least 2"),
        ("table/weights", ("cpu", "modelzoo", "gptx"), "--only full gptx leaves nothing of ours-weights; known are"),
        ("table/table1", ("cpu", "modelzoo", "gptx"), "--only fp16 gptx leaves nothing of intactkv-1; known are"),
        ("table/seeds", ("cpu",), "usage: seeds.sh DEVICE MODEL_PATH [METHOD]… (got 1 of at least 2"),
        ("run_gptq", ("cpu", "modelzoo", "3"), "usage: run_gptq.sh DEVICE MODEL_PATH (got 3 of 2 arguments)"),
        ("run_lutgemm", ("cpu", "modelzoo", "3", "4"), "DEVICE MODEL_PATH [ROUNDS] (got 4 of 2 or 3 arguments)"),
        ("run_spqr", ("97", "modelzoo"), "GPU index 97 is not there"),
    ],
)
def test_a_mistake_is_one_line(script: str, arguments: tuple[str, ...], named: str) -> None:
    done = run(script, *arguments)
    assert done.returncode == 2
    said = refusals(done.stderr)
    assert len(said) == 1, done.stderr
    assert said[0].startswith("error: ")
    assert named in said[0]


def test_an_alpha_is_searched_on_a_text_that_is_not_evaluated() -> None:
    done = run("run_smoothquant", "cpu", "modelzoo", ALPHAS="0.4 0.6")
    assert done.returncode == 2
    assert "HELD_OUT is not set" in done.stderr


@pytest.mark.slow
def test_every_alpha_is_scored_on_the_text_that_is_held_out(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    model, text = tiny_checkpoint(tmp_path, "llama"), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    small = {"INTACTKV_ROOT": str(tmp_path), "CALIBRATION": str(text), "CALIBRATION_SAMPLES": "2",
             "CALIBRATION_LENGTH": "16", "WINDOW": "32", "LIMIT": "2", "HELD_OUT": str(text),
             "ALPHAS": "0.9 0.35"}  # fmt: skip
    done = run("run_smoothquant", "cpu", str(model), **small)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in done.stdout.splitlines() if "| alpha" in line]
    assert [row for row in rows if "change" not in row[1]] == [
        [f"alpha {alpha}", arm] for alpha in ("0.35", "0.90") for arm in ("alone", "[B]")
    ]
    records = [json.loads(file.read_text()) for file in (tmp_path / "outputs" / "runs").glob("*.json")]
    assert len({record["settings"]["recipe"]["transforms"][0]["alpha"] for record in records}) == 2


@pytest.mark.slow
def test_opt_is_measured_as_published_with_rtn_beside_it(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    model, text = tiny_checkpoint(tmp_path, "opt"), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    small = {"INTACTKV_ROOT": str(tmp_path), "CALIBRATION": str(text), "CALIBRATION_SAMPLES": "2",
             "CALIBRATION_LENGTH": "16", "WINDOW": "32", "LIMIT": "2", "CORPUS": str(text),
             "BITS": "3", "ACT_ORDER": "false", "BESIDE": "rtn"}  # fmt: skip
    done = run("run_gptq", "cpu", str(model), **small)
    assert done.returncode == 0, done.stderr
    records = [json.loads(file.read_text()) for file in (tmp_path / "outputs" / "runs").glob("*.json")]
    assert {record["settings"]["protocol"] for record in records} == {"gptq"}
    prefixes = [(r["settings"]["recipe"]["weights"]["kind"], r["settings"]["prefix"]) for r in records]
    arms = [("[B]", False), ("[B]", True), ("none", False)]
    assert sorted((kind, prefix["label"], prefix["intact"]) for kind, prefix in prefixes) == [
        (kind, *arm) for kind in ("GPTQ", "RTN") for arm in arms
    ]
    act_order = {r["settings"]["recipe"]["weights"].get("act_order") for r in records}
    assert act_order == {False, None}
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in done.stdout.splitlines() if " bits" in line]
    found = [row for row in rows if "change" not in row[1]]
    assert found == [[f"{name}, 3 bits", arm] for name in ("GPTQ", "RTN") for arm in ("alone", "BOS", "[B]")]


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_the_published_gptq_call_makes_what_the_evaluation_finds(tmp_path: Path) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "sample").symlink_to(ROOT / "datasets" / "sample")
    (tmp_path / "modelzoo" / "smollm2").mkdir(parents=True)
    (tmp_path / "modelzoo" / "smollm2" / "smollm2-135m").symlink_to(ROOT / "modelzoo" / "smollm2" / "smollm2-135m")
    small = {"INTACTKV_ROOT": str(tmp_path), "CALIBRATION_SAMPLES": "2", "CALIBRATION_LENGTH": "64", "WINDOW": "64",
             "LIMIT": "2"}  # fmt: skip
    made = run("quantization/auto_gptq", "smollm2", "smollm2-135m", "3", "64", "cpu", **small)
    assert made.returncode == 0, made.stderr
    (place,) = (tmp_path / "modelzoo" / "quantized" / "smollm2-135m").glob("gptq-w3g64-????????")
    before = (place / "checksums.json").read_bytes()
    call = ("smollm2", "135m", "gptq", "3", "16", "ppl", "29500", "cpu")
    done = run("eval/eval", *call, **small, BEHIND="bos")
    assert done.returncode == 0, done.stderr
    assert (place / "checksums.json").read_bytes() == before
    line = [line for line in done.stdout.splitlines() if "gptq-w3g64" in line][-1]  # every run prints its own first
    assert "n/a" not in line  # vanilla, IntactKV, and calibrated behind the prefix
    assert len(list((tmp_path / "outputs" / "runs").glob("*.json"))) == 3


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    """But for variables that another file sets or reads, which it sources or is sourced by."""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted(map(str, (ROOT / "scripts").rglob("*.sh")))
    done = subprocess.run(
        ["shellcheck", "--severity=warning", "--exclude=SC2034,SC2154", *scripts], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")


def test_options_may_stand_on_several_lines() -> None:
    """Not on the first alone: the others would be dropped without a word."""
    done = subprocess.run(
        ["bash", "-euc", 'source scripts/common.sh; printf "%s " "${options[@]}"'], cwd=ROOT, capture_output=True,
        text=True, check=True, env=os.environ | {"OPTIONS": "--bits 4\n    --group-size 64\n--k-bits 8"},
    )  # fmt: skip
    assert done.stdout.split() == ["--bits", "4", "--group-size", "64", "--k-bits", "8"]
