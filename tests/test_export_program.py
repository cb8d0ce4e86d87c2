"""python -m quantization.export: what it prints and refuses, and what --verify finds in a fresh process."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from common import ROOT
from safetensors.torch import load_file, save_file

from quantization.export.verify import VerificationFailed, verify
from quantization.export.writer import FORMATS as TABLE
from quantization.export.writer import export_checkpoint
from quantization.grids.uniform import UniformGrid
from quantization.programs.export import FORMATS, main
from quantization.recipes.recipe import Recipe
from quantization.runs.pipeline import quantize_checkpoint
from quantization.weights.gptq import GPTQ
from quantization.weights.rtn import RTN

GPTQMODEL_PYTHON = os.environ.get("INTACTKV_GPTQMODEL_PYTHON")  # an interpreter with gptqmodel and optimum


@pytest.fixture
def dense(tiny_checkpoint: Callable[..., Path], intactkv_root: Path) -> Path:
    """A dense checkpoint beside an empty modelzoo."""
    return tiny_checkpoint(intactkv_root, "llama")


@pytest.fixture
def quantized(dense: Path, tmp_path: Path) -> Path:
    return quantize_checkpoint(dense, Recipe(weights=RTN(UniformGrid(3, 32))), tmp_path / "w3")


@pytest.fixture
def program(run_main: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """program(*arguments) -> exit code, stdout, stderr; in this process, since torch takes seconds to import."""
    return partial(run_main, main)


def test_help_answers_without_importing_torch_and_names_every_format() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "quantization.export", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "numpy", "safetensors"}
    for word in (
        *FORMATS,
        "awq-search",
        "--model",
        "--out",
        "--prefix",
        "--verify",
        "--verify-python",
        "--dtype",
        "scale_dtype",
    ):
        assert word in done.stdout
    assert tuple(TABLE) == FORMATS


def test_a_whole_run_is_verified_by_transformers_in_a_fresh_process(
    quantized: Path, tmp_path: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "ct"
    code, printed, errors = program(
        "--model", quantized, "--out", out, "--prefix", "bos", "--device", "cpu", "--verify"
    )
    assert code == 0, errors
    first, facts, prefix, verified = printed.splitlines()
    size = (out / "model.safetensors").stat().st_size
    assert first == f"compressed-tensors  {size / 1e6:.1f} MB  {out}"
    assert facts == "3 bits, groups of 32, asymmetric. Scales are exact."
    assert prefix == "prefix  1 tokens [1]  basis plain"
    assert verified.startswith(
        "verified  largest logit difference 0  relative 0.0e+00 (allowed 1e-05)  read by Linear, "
    )
    for package in ("torch", "transformers", "compressed-tensors"):
        assert f"{package} " in verified
    assert (out / "intactkv-prefix.safetensors").is_file()


def test_verification_finds_a_single_wrong_word(quantized: Path, tmp_path: Path) -> None:
    done = export_checkpoint(quantized, tmp_path / "ct")
    file = tmp_path / "ct" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.down_proj.weight_packed"][3, 1] ^= -(1 << 31)  # the high bit of one code
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(VerificationFailed, match=r"computes other logits than .* do not use it"):
        verify(quantized, done, sys.executable)


def test_a_directory_that_does_not_open_ends_with_1_and_one_line(
    quantized: Path, tmp_path: Path, program: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "reader.py"  # reads what is there, and fails as a library would
    broken.write_text("import sys\nif len(sys.argv) > 2:\n    raise ValueError('no such layout')\n")
    monkeypatch.setattr("quantization.export.verify.READER", broken)
    code, _, errors = program("--model", quantized, "--out", tmp_path / "ct", "--verify", "--device", "cpu")
    assert code == 1
    assert errors == f"error: {sys.executable} cannot open {tmp_path / 'ct'}: ValueError: no such layout\n"


def test_a_missing_package_is_named_before_anything_is_written(
    quantized: Path, tmp_path: Path, program: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TABLE, "gptq", replace(TABLE["gptq"], packages=("torch", "no-such-package")))
    code, _, errors = program("--model", quantized, "--out", tmp_path / "out", "--format", "gptq", "--verify")
    assert code == 2
    assert errors.startswith("error: --verify needs no-such-package, which ")
    assert "--verify-python" in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "awq"], "bits=3 is taken by no reader of AWQ's format; they know 4"),
        (["--prefix", "nowhere.safetensors"], "prefix file nowhere.safetensors is missing"),
        (["--verify", "--verify-python", "/nowhere/python"], "--verify-python /nowhere/python cannot be started"),
        (["--device", "tpu"], "--device: tpu is not known"),
        (["--format", "gguf"], "invalid choice: 'gguf'"),
    ],
)
def test_every_mistake_is_one_line(
    arguments: list[str], words: str, quantized: Path, tmp_path: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    code, printed, errors = program("--model", quantized, "--out", tmp_path / "out", *arguments)
    assert (code, printed) == (2, "")
    assert errors.startswith("error: ")
    assert words in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dense_model_and_an_existing_directory_are_refused(
    dense: Path, quantized: Path, tmp_path: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, errors = program("--model", dense, "--out", tmp_path / "out")
    assert code == 2
    assert "is no quantized checkpoint of this project" in errors
    code, _, errors = program("--model", quantized, "--out", quantized)
    assert (code, "is what the program reads" in errors) == (2, True)
    code, _, errors = program("--model", quantized, "--out", tmp_path / "out", "--verify-python", "python")
    assert (code, "is for --verify; add that" in errors) == (2, True)
    (tmp_path / "there").mkdir()
    code, _, errors = program("--model", quantized, "--out", tmp_path / "there")
    assert code == 2
    assert "exists already; choose another" in errors


@pytest.mark.skipif(GPTQMODEL_PYTHON is None, reason="INTACTKV_GPTQMODEL_PYTHON names no interpreter")
@pytest.mark.parametrize(
    ("format_name", "grid"),
    [
        ("gptq", UniformGrid(4, 32, "gptq-sym")),
        ("gptq", UniformGrid(4, 32, "smoothquant-sym")),
        ("gptq", UniformGrid(4, 32, scale_dtype="float16")),
        ("gptq", UniformGrid(3, 32)),
        ("gptq", UniformGrid(2, 32)),
        ("gptq", UniformGrid(8, -1)),
        ("gptq-v2", UniformGrid(4, 32)),
        ("gptq-v2", UniformGrid(3, 32)),
        ("awq", UniformGrid(4, 32, "gptq-sym")),
        ("awq", UniformGrid(4, 32, "awq-asym")),
        ("awq", UniformGrid(4, 64)),
    ],
    ids=str,
)
def test_gptqmodel_computes_our_logits(
    format_name: str, grid: UniformGrid, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    dense = tiny_checkpoint(tmp_path, "llama", hidden_size=128, head_dim=32, intermediate_size=192)
    source = quantize_checkpoint(dense, Recipe(weights=RTN(grid)), tmp_path / "q")
    assert GPTQMODEL_PYTHON is not None
    found = verify(source, export_checkpoint(source, tmp_path / "out", format_name), GPTQMODEL_PYTHON)
    print(f"{format_name} {grid}: largest {found.largest:.3g}, relative {found.relative:.1e}, {found.reader}")
    assert "gptqmodel" in found.reader
    assert found.relative < 5e-3  # kernels in half precision, scales in float16


@pytest.mark.skipif(GPTQMODEL_PYTHON is None, reason="INTACTKV_GPTQMODEL_PYTHON names no interpreter")
def test_gptqmodel_follows_groups_in_activation_order(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path, "llama", hidden_size=128, head_dim=32, intermediate_size=192)
    segments = torch.randint(4, 101, (4, 64), generator=torch.Generator().manual_seed(5))
    recipe = Recipe(weights=GPTQ(UniformGrid(4, 32), static_groups=False))
    source = quantize_checkpoint(dense, recipe, tmp_path / "q", segments=segments)
    assert GPTQMODEL_PYTHON is not None
    found = verify(source, export_checkpoint(source, tmp_path / "out", "gptq"), GPTQMODEL_PYTHON)
    assert found.relative < 5e-3
