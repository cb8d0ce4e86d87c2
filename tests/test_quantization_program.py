"""python -m quantization: what it prints, what it makes, and one line for every mistake."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from common import ROOT, computing_at_most

from quantization.__main__ import main
from quantization.grids.uniform import QuantizedTensor, UniformGrid
from quantization.model.blocks import DecoderBlock
from quantization.named import RECIPES, NamedRecipe
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import load_quantized
from quantization.runs.pipeline import quantize_checkpoint
from quantization.weights.base import GridQuantizer
from quantization.weights.rtn import RTN


@pytest.fixture
def dense(tiny_checkpoint: Callable[..., Path], intactkv_root: Path) -> Path:
    """A dense checkpoint beside an empty modelzoo."""
    return tiny_checkpoint(intactkv_root, "llama")


@pytest.fixture
def program(run_main: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """program(*arguments) -> exit code, stdout, stderr; in this process, since torch takes seconds to import."""
    return partial(run_main, main)


def in_subprocess(*arguments: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-m", "quantization", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


# answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["prefix", "--help"], ["prefix", "build", "--help"]])
def test_help_answers_without_importing_torch(arguments: list[str]) -> None:
    with computing_at_most(5):  # a second on an idle machine
        done = in_subprocess(*arguments, flags=("-X", "importtime"))
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m quantization")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported  # the list is what it should be
    assert not {name for name in imported if name.split(".")[0] in ("torch", "transformers", "numpy", "safetensors")}


def test_help_names_every_option(program: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = program("--help")
    assert code == 0
    shared = ("--model", "--recipe", "--bits", "--group-size", "--set", "--out", "--device", "--list", "--prefix")
    text = ("--calibration", "--calibration-samples", "--calibration-length", "--seed", "--calibrate-behind-prefix")
    for option in (*shared, *text):
        assert option in out


def test_the_list_has_one_line_a_recipe_with_its_paper(program: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = program("--list")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(row.paper in line and row.note in line for line, row in zip(lines, RECIPES.values(), strict=True))
    parts = {line.split()[0]: line.rpartition("[")[2] for line in lines}  # what --weights and the others can take
    assert parts["smoothquant-w8a8"] == "transforms, weights, activations]"
    assert (parts["kv4"], parts["fp16"]) == ("kv_cache]", "no parts]")


# runs -----------------------------------------------------------------------------------------------------------------


def test_a_whole_run_writes_what_the_library_writes(dense: Path, intactkv_root: Path) -> None:
    out = intactkv_root / "made" / "w4"
    done = in_subprocess("--model", str(dense), "--recipe", "rtn", "--bits", "4", "--group-size", "32",
                         "--set", "weights.grid.convention=gptq-sym", "--out", str(out), "--device", "cpu",
                         "--verbose")  # fmt: skip
    assert done.returncode == 0, done.stderr
    library = quantize_checkpoint(dense, Recipe(weights=RTN(UniformGrid(4, 32, "gptq-sym"))), intactkv_root / "library")
    assert {f.name: f.read_bytes() for f in out.glob("*.safetensors")} == {
        f.name: f.read_bytes() for f in library.glob("*.safetensors")
    }
    # 4 bits, and a float32 scale per 32 weights: symmetric, so no zero point
    assert re.fullmatch(
        rf"rtn-w4g32-gptq-sym  5\.00 bits per weight  \d+ s  \d+ MB  {re.escape(str(out))}\n", done.stdout
    )
    lines = re.findall("[^\r\n]*weight error[^\r\n]*", done.stderr)
    assert [line[:10] for line in lines] == [f"block  {i}/3" for i in (1, 2, 3)]  # --verbose: above the bar


def test_without_out_the_result_lies_in_the_zoo_under_its_identity_and_is_found_again(
    dense: Path, intactkv_root: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    arguments = ("--model", dense, "--recipe", "rtn-w3", "--group-size", "16")
    code, out, err = program(*arguments)
    assert code == 0, err
    (made,) = (intactkv_root / "modelzoo" / "quantized" / "tiny-llama").glob("rtn-w3g16-*")
    manifest = json.loads((made / "quantization.json").read_text())
    assert made.name == f"rtn-w3g16-{manifest['identity']}"
    assert out.rstrip().endswith(str(made))
    before = {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
    assert program(*arguments)[:2] == (0, out)
    assert {file.name: file.stat().st_mtime_ns for file in made.iterdir()} == before
    with torch.no_grad():
        assert torch.isfinite(load_quantized(made)(torch.arange(10)[None]).logits).all()


@pytest.fixture
def text(intactkv_root: Path) -> Path:
    """A text of 2,700 characters, each a token of the tiny tokenizer."""
    file = intactkv_root / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return file


GPTQ = ("--recipe", "gptq", "--group-size", "32", "--calibration-samples", "3", "--calibration-length", "20")


def test_json_says_where_the_checkpoint_lies_and_what_it_took(
    program: Callable[..., tuple[int, str, str]], dense: Path
):
    code, out, err = program("--model", dense, "--recipe", "rtn-w4", "--group-size", "32", "--json")
    assert code == 0, err
    told = json.loads(out)
    load_quantized(Path(told["directory"]))
    assert told["label"] == "rtn-w4g32"
    assert 4 < told["bits_per_weight"] < 8


def test_the_calibration_options_decide_the_text_and_its_identity(
    dense: Path, text: Path, intactkv_root: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    places = []
    for extra in ([], ["--seed", "7"], ["--calibration-samples", "4"], ["--calibration-length", "24"]):
        code, out, err = program("--model", dense, *GPTQ, "--calibration", text, *extra)
        assert code == 0, err
        places.append(Path(out.split()[-1]))
    assert len(set(places)) == 4
    manifest = json.loads((places[1] / "quantization.json").read_text())
    assert manifest["recipe"]["calibration"] == {
        "kind": "Calibration", "corpus": str(text), "samples": 3, "length": 20, "seed": 7, "draw": "segments",
    }  # fmt: skip
    assert manifest["needs_prefix"] is None


def test_calibrating_behind_a_prefix_is_one_switch(
    dense: Path, text: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    call = ("--model", dense, *GPTQ, "--calibration", text, "--calibrate-behind-prefix")
    code, out, err = program(*call, "--prefix", "bos")
    assert code == 0, err
    place = Path(out.split()[-1])
    assert place.name.startswith("gptq-w3g32-behind-")
    assert json.loads((place / "quantization.json").read_text())["needs_prefix"] == [1]
    code, _, err = program(*call)
    assert (code, err.strip()) == (
        2, "error: calibrate_behind_prefix=true needs a prefix; choose one, for example --prefix bos",
    )  # fmt: skip


def test_a_method_that_calibrates_only_when_told_to_takes_its_text(
    dense: Path, text: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    call = ("--model", dense, "--recipe", "bcq", "--group-size", "32", "--set", "weights.rounds=1",
            "--calibration", text, "--calibration-samples", "2", "--calibration-length", "16")  # fmt: skip
    code, _, err = program(*call, "--set", "weights.weighted=true")
    assert code == 0, err
    assert program(*call)[0] == 2


@pytest.mark.parametrize(("extra", "named"), [
    (["--recipe", "rtn", "--calibration", "c4"], "rtn calibrates on no text"),
    (["--recipe", "rtn", "--calibrate-behind-prefix", "--prefix", "bos"], "rtn needs no calibration"),
    ([*GPTQ, "--calibration", "nowhere.txt"], "nowhere.txt"),
    ([*GPTQ, "--calibration-length", "5000"], "5000 tokens with what stands in front do not fit the 256 positions"),
    ([*GPTQ, "--set", "calibration.draw=lots"], "calibration.draw=lots"),
    ([*GPTQ, "--set", "weights.damp=-1"], "weights.damp=-1"),
])  # fmt: skip
def test_what_cannot_calibrate_is_refused_in_one_line(
    extra: list[str], named: str, dense: Path, text: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    given = [] if "--calibration" in extra or "rtn" in extra else ["--calibration", text]
    code, out, err = program("--model", dense, *extra, *given)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert named in err


def test_a_model_of_the_zoo_brings_its_own_group_size_and_an_option_overrides_it(
    tiny_checkpoint: Callable[..., Path], intactkv_root: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    # SmolLM2's 576 channels are no multiple of 128: its default is 64, whatever recipe is named.
    smollm2 = intactkv_root / "smollm2-tiny"
    tiny_checkpoint(intactkv_root, "llama", intermediate_size=128).rename(smollm2)
    assert program("--model", smollm2, "--recipe", "rtn")[1].startswith("rtn-w3g64 ")
    assert program("--model", smollm2, "--recipe", "rtn", "--group-size", "-1")[1].startswith("rtn-w3row ")
    assert program("--model", smollm2, "--recipe", "rtn", "--set", "weights.grid.group_size=32")[1].startswith(
        "rtn-w3g32 "
    )


@dataclass(frozen=True)
class Peeking(GridQuantizer):
    """RTN that asks to see calibration text."""

    grid: UniformGrid
    name: ClassVar[str] = "peeking"
    calibrates: ClassVar[bool] = True
    lengths: ClassVar[list[int]] = []

    def quantize_block(self, block: DecoderBlock) -> dict[str, QuantizedTensor]:
        block.observe(lambda name, x: self.lengths.append(x.shape[1]))
        return RTN(self.grid).quantize_block(block)


def test_a_recipe_may_calibrate_behind_its_prefix(
    dense: Path, intactkv_root: Path, program: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(weights=Peeking(UniformGrid(4, 32)))
    monkeypatch.setitem(RECIPES, "peeking", NamedRecipe(recipe, "-", "-"))  # type: ignore[misc]
    text = intactkv_root / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    settings = [f"calibration.corpus={text}", "calibration.samples=2", "calibration.length=16"]
    arguments = ["--model", dense, "--recipe", "peeking", *(x for s in settings for x in ("--set", s))]
    plain, behind = intactkv_root / "plain", intactkv_root / "behind"
    code, _, err = program(*arguments, "--out", plain)
    assert code == 0, err
    code, _, err = program(*arguments, "--set", "prefix=bos", "--set", "calibrate_behind_prefix=true", "--out", behind)
    assert code == 0, err
    assert set(Peeking.lengths) == {16}
    needs = [json.loads((out / "quantization.json").read_text())["needs_prefix"] for out in (plain, behind)]
    assert needs == [None, [1]]


def test_a_prefix_is_built_from_the_command_line(
    dense: Path, intactkv_root: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    from intactkv.prefix import Prefix

    file = intactkv_root / "bos.safetensors"
    code, out, err = program("prefix", "build", "--model", dense, "--prefix", "bos", "--out", file)
    assert code == 0, err
    assert out == f"1 tokens [1]  torch.float32  basis plain  {file}\n"
    assert Prefix.load(file).ids.tolist() == [1]


# mistakes -------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown recipe": (["--recipe", "gptw"], "unknown recipe 'gptw'"),
    "no recipe": ([], "leaves the model as it is"),
    "a recipe for the cache": (["--recipe", "kv4"], "leaves the model as it is"),
    "bits for a recipe without weights": (["--bits", "4"], "the recipe fp16 quantizes none"),
    "group size that does not divide": (
        ["--recipe", "rtn", "--group-size", "48"],
        "model.layers.0.self_attn.q_proj: group_size=48 does not divide its 64 input channels",
    ),
    "group size 0": (["--recipe", "rtn", "--group-size", "0"], "--group-size: 0 is not allowed"),
    "bits 9": (["--recipe", "rtn", "--bits", "9"], "bits=9 is not supported"),
    "bits that are no number": (
        ["--recipe", "rtn", "--bits", "four"],
        "--bits: four is not allowed; give a whole number",
    ),
    "unknown field": (["--recipe", "rtn", "--set", "weights.grid.size=4"], "UniformGrid has no field 'size'"),
    "setting without a value": (["--recipe", "rtn", "--set", "weights.grid.bits"], "expected FIELD=VALUE"),
    "missing model": (["--model", "nowhere"], "model directory nowhere is missing"),
    "unknown device": (["--recipe", "rtn", "--device", "tpu"], "--device: tpu is not known"),
    "GPU that is not there": (["--recipe", "rtn", "--device", "cuda:99"], "--device cuda:99: this machine shows"),
    "GPU without a number": (["--recipe", "rtn", "--device", "cuda:x"], "--device: cuda:x is not known"),
    "unknown option": (["--recipe", "rtn", "--groupsize", "32"], "unrecognized arguments: --groupsize 32"),
    "calibration that RTN does not need": (
        ["--recipe", "rtn", "--set", "prefix=bos", "--set", "calibrate_behind_prefix=true"],
        "rtn needs no calibration",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_two_and_one_line(
    mistake: str, dense: Path, intactkv_root: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    arguments, said = MISTAKES[mistake]
    before = set(intactkv_root.rglob("*"))
    code, out, err = program("--model", dense, *arguments)  # a second --model wins
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert said in err
    left = {path for path in set(intactkv_root.rglob("*")) - before if path.is_file() and path.suffix != ".lock"}
    assert not left


def test_no_model_at_all_ends_with_two_and_one_line(program: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = program("--recipe", "rtn")
    assert (code, out) == (2, "")
    assert err.startswith("error: the following arguments are required: --model")
    assert err.count("\n") == 1


def test_a_mistake_in_a_process_of_its_own_leaves_no_traceback() -> None:
    done = in_subprocess("--model", "nowhere", "--recipe", "rtn")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: model directory nowhere is missing")
    assert len(done.stderr.splitlines()) == 1


def test_quantizing_a_quantized_checkpoint_ends_with_two_and_one_line(
    dense: Path, intactkv_root: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    out = quantize_checkpoint(dense, Recipe(weights=RTN(UniformGrid(4, 32))), intactkv_root / "out")
    for recipe in (["--recipe", "rtn"], []):
        code, _, err = program("--model", out, *recipe)
        assert code == 2
        assert err.count("\n") == 1
        assert "is quantized already (rtn-w4g32)" in err


def test_out_that_holds_something_else_ends_with_two_and_stays(
    dense: Path, intactkv_root: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    arguments = ["--model", dense, "--recipe", "rtn", "--group-size", "32", "--out"]
    other = quantize_checkpoint(dense, Recipe(weights=RTN(UniformGrid(2, 32))), intactkv_root / "other")
    before = {file.name: file.read_bytes() for file in other.iterdir()}
    (intactkv_root / "file").write_text("mine")
    for out in ("other", "file", "tiny-llama"):
        code, _, err = program(*arguments, intactkv_root / out)
        assert code == 2
        assert err.count("\n") == 1
        assert {
            "other": "already holds",
            "file": "is there and no directory; name another",
            "tiny-llama": "is what the program reads",
        }[out] in err
    assert {file.name: file.read_bytes() for file in other.iterdir()} == before
    assert (intactkv_root / "file").read_text() == "mine"
    # A directory inside a file cannot be made.
    code, _, err = program(*arguments, intactkv_root / "file" / "out")
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
