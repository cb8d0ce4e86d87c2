"""Which prefix a run stands behind: what `auto` searches, what a checkpoint needs, what building one reads."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eval.__main__ import main as evaluate
from intactkv.__main__ import main as intactkv
from intactkv.prefix import Prefix, build_prefix
from quantization.__main__ import main as quantize
from quantization.named import named_recipe
from quantization.runs.auto_prefix import default_search
from quantization.runs.checkpoint import find_checkpoint
from quantization.runs.opening import load_model, load_tokenizer
from quantization.runs.plan import plan_run

Run = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")


@pytest.fixture
def dense(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint()


@pytest.fixture
def calibration(text: Path) -> tuple[object, ...]:
    return "--calibration", text, "--calibration-samples", 2, "--calibration-length", 32


def score(text: Path, *options: object) -> tuple[object, ...]:
    return "ppl", "--corpus", text, "--window", 32, "--limit", 2, "--json", *options


def discovery(printed: str) -> str:
    """The file of the discovery in what --plan prints."""
    return next(line for line in printed.splitlines() if line.startswith("discovery")).split()[-1]


# auto -----------------------------------------------------------------------------------------------------------------


def searched(dense: Path, corpus: Path | None = None, threshold: float | None = None) -> str:
    checkpoint = find_checkpoint(dense)
    return str(default_search(checkpoint, load_tokenizer(dense), 256, corpus and str(corpus), threshold).file)


def test_auto_is_searched_on_the_text_that_is_given(
    dense: Path, text: Path, calibration: tuple[object, ...], run_main: Run
) -> None:
    other = text.with_name("other.txt")
    other.write_text("Eleven grey wolves sleep. " * 200)
    recipe = ("--model", dense, "--recipe", "gptq", "--group-size", 16, *calibration, "--plan")
    for program, options in ((evaluate, score(text)), (quantize, ()), (intactkv, ("build", "--out", "x.safetensors"))):
        for word, expected in (
            ("auto", searched(dense, text)),
            ("auto@9", searched(dense, text, 9.0)),
            (f"auto:{other}@9", searched(dense, other, 9.0)),
        ):
            code, out, err = run_main(program, *options, *recipe, "--prefix", word)
            assert code == 0, err
            assert discovery(out) == expected
    # Training embeddings starts from what is discovered on the text that it trains on.
    train = ("train-prefix", "--model", dense, "--corpus", other, "--out", "x.safetensors", "--length", 32, "--plan")
    code, out, err = run_main(intactkv, *train)
    assert code == 0, err
    assert discovery(out) == searched(dense, other)


def test_without_a_text_auto_stays_what_it_was(dense: Path) -> None:
    plan = plan_run(dense, named_recipe("prefixquant-w4a4kv4-static"), device=CPU, makes="discovery")
    assert plan.search is not None
    assert (plan.search.text.corpus, plan.search.threshold) == ("pile", 64.0)


def test_a_threshold_finds_other_tokens_and_is_refused_where_it_means_nothing(
    dense: Path, text: Path, intactkv_root: Path, run_main: Run
) -> None:
    found = {}
    for threshold in (2, 64):
        code, out, err = run_main(
            evaluate, *score(text), "--model", dense, "--prefix", f"auto:{text}@{threshold}"
        )  # fmt: skip
        assert code == 0, err
        found[threshold] = json.loads(out)["prefix_ids"]
    assert len(found[2]) > len(found[64]) == 1
    code, _, err = run_main(evaluate, *score(text), "--model", dense, "--prefix", f"auto:{text}@1")
    assert code == 2
    assert "a ratio is a number above 1" in err


def test_discovered_tokens_serve_in_any_basis(
    dense: Path, text: Path, intactkv_root: Path, run_main: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file, built = intactkv_root / "found.safetensors", intactkv_root / "built.safetensors"
    call = ("--model", dense, "--corpus", text, "--samples", 4, "--length", 64, "--threshold", 2, "--device", "cpu",
            "--out", file)  # fmt: skip
    code, _, err = run_main(intactkv, "discover", *call)
    assert code == 0, err
    call = ("--model", dense, "--recipe", "rotate", "--prefix", file, "--device", "cpu", "--out", built)
    code, _, err = run_main(intactkv, "build", *call)
    assert code == 0, err
    assert "are in another basis than the model's" in caplog.text
    ours, theirs = Prefix.load(built), Prefix.load(file)
    assert ours.ids.tolist() == theirs.ids.tolist()
    assert ours.model.basis != theirs.model.basis
    rotated = next((intactkv_root / "modelzoo" / "quantized").glob("*/rotate-*/"))
    expected = build_prefix(load_model(rotated, torch.float32, CPU), theirs.ids.tolist())
    assert all(torch.equal(a, b) for a, b in zip(ours.values, expected.values, strict=True))
    assert not torch.allclose(ours.values[0], theirs.values[0], atol=1e-3)


# what is not read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["quarot", "gptq-w4", "prefixquant-w4a4kv4-static"])
def test_building_a_prefix_reads_no_calibration_text(
    recipe: str, dense: Path, intactkv_root: Path, run_main: Run
) -> None:
    """The published text is not there, and nothing needs it: the twin calibrates nothing."""
    out = intactkv_root / "bos.safetensors"
    options = ("--group-size", 16) if recipe == "gptq-w4" else ()
    code, _, err = run_main(
        intactkv, "build", "--model", dense, "--recipe", recipe, *options, "--prefix", "bos", "--out", out
    )
    assert code == 0, err
    assert Prefix.load(out).ids.tolist() == [1]
    code, _, err = run_main(quantize, "--model", dense, "--recipe", recipe, *options, "--prefix", "bos")
    assert code == 2  # who quantizes needs it


def test_training_embeddings_reads_its_own_text_alone(
    dense: Path, text: Path, intactkv_root: Path, run_main: Run
) -> None:
    out = intactkv_root / "trained.safetensors"
    sizes = ("--samples", 2, "--held-out", 2, "--length", 32, "--prefix-len", 2, "--prefix-epochs", 1)
    call = ("train-prefix", "--model", dense, "--recipe", "quarot", "--corpus", text, *sizes, "--out", out)
    code, _, err = run_main(intactkv, *call, "--prefix", "bos")
    assert code == 0, err
    made_of = Prefix.load(out).calibrated
    assert made_of is not None
    assert made_of["for"]["recipe"]["transforms"][0]["kind"] == "Rotate"
    assert made_of["for"]["recipe"]["weights"] is None


# what a checkpoint needs ----------------------------------------------------------------------------------------------


def test_a_checkpoint_runs_behind_the_prefix_that_it_was_calibrated_behind(
    dense: Path,
    text: Path,
    calibration: tuple[object, ...],
    intactkv_root: Path,
    run_main: Run,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    made = intactkv_root / "made"
    recipe = ("--recipe", "gptq", "--group-size", 16, *calibration, "--calibrate-behind-prefix")
    code, _, err = run_main(quantize, "--model", dense, *recipe, "--prefix", "the fox", "--out", made)
    assert code == 0, err
    figures = {}
    for prefix in ((), ("--prefix", "the fox")):
        code, out, err = run_main(evaluate, *score(text), "--model", made, *prefix, "--force")
        assert code == 0, err
        assert ("was calibrated behind --prefix the fox, and runs behind it" in caplog.text) == (not prefix)
        caplog.clear()
        figures[prefix] = {name: value for name, value in json.loads(out).items() if name in ("settings", "perplexity")}
    assert figures[()] == figures["--prefix", "the fox"]
    for prefix in (("--prefix", "none"), ("--prefix", "bos"), ("--vanilla",)):
        code, _, err = run_main(evaluate, *score(text), "--model", made, *prefix)
        assert (code, err.splitlines()[-1].startswith("error: ")) == (2, True)
        assert "is calibrated behind" in err
