"""python -m corpora check: what it says of a directory is what the programs do with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import every
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from corpora.__main__ import main
from eval.__main__ import main as evaluate
from eval.doctor import suits
from intactkv.architecture import ARCHITECTURES
from quantization.__main__ import main as quantize
from quantization.grids.binary_coding import BinaryGrid
from quantization.grids.uniform import UniformGrid
from quantization.model.activations import Activations
from quantization.recipes.recipe import Recipe
from quantization.runs.pipeline import quantize_checkpoint
from quantization.transforms.rotate import Rotate
from quantization.weights.bcq import BCQ
from quantization.weights.gptq import GPTQ
from quantization.weights.rtn import RTN

FAMILIES = ["llama", "opt", "qwen3", "phi3", "gpt_neox", "gpt2", "bloom", "gemma2", "cohere", "mixtral", "helium"]
RECIPES = ["rtn-w4", "omniquant-let", "quarot"]
W4 = UniformGrid(4)

Check = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    """made(family) -> a tiny checkpoint that tests only read."""
    folder = tmp_path_factory.mktemp("checked")

    def make(family: str) -> Path:
        there = folder / f"tiny-{family}"
        sizes = {"num_hidden_layers": 2, "max_position_embeddings": 2048}  # as long as calibration text is by default
        return there if there.is_dir() else tiny_checkpoint(folder, family, **sizes)

    return make


@pytest.fixture
def check(run_main: Callable[..., tuple[int, str, str]]) -> Check:
    """check(directory) -> (exit code, what it prints as JSON)."""

    def run(directory: Path) -> tuple[int, dict[str, Any]]:
        code, out, err = run_main(main, "check", directory, "--json")
        assert code in (0, 1), err
        return code, json.loads(out)

    return run


def reasons(found: dict[str, Any], kind: str) -> dict[str, str | None]:
    return {method["name"]: method["reason"] for method in found["methods"] if method["kind"] == kind}


@every("family", FAMILIES)
def test_the_facts_are_those_of_transformers_own_model(family: str, made: Callable[[str], Path], check: Check) -> None:
    directory = made(family)
    code, found = check(directory)
    own = AutoModelForCausalLM.from_pretrained(directory)
    facts = found["facts"]
    assert (code, found["damage"], found["runs"]) == (0, None, True)
    assert facts["family"] == family
    assert facts["parameters"] == sum(p.numel() for p in own.parameters())
    assert (facts["blocks"], facts["hidden size"], facts["stored as"]) == (2, 64, "F32")
    assert facts["bytes of weights"] == (directory / "model.safetensors").stat().st_size
    keys = own(torch.tensor([[1, 5, 7]]), use_cache=True).past_key_values.layers[0].keys
    assert (facts["KV heads"], facts["channels of a head"]) == (keys.shape[1], keys.shape[3])
    if family in ARCHITECTURES:
        block = next(m for m in own.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)[0]
        assert facts["bytes of one block"] == 4 * sum(p.numel() for p in block.parameters())


@every("family", FAMILIES)
def test_what_it_says_of_a_recipe_is_what_quantization_says(
    family: str, made: Callable[[str], Path], run_main: Callable[..., tuple[int, str, str]], check: Check, text: Path
) -> None:
    directory = made(family)
    said = reasons(check(directory)[1], "recipe")
    for recipe in RECIPES:
        words = ["--model", directory, "--recipe", recipe, "--plan"]
        if recipe != "rtn-w4":
            words += ["--calibration", text, "--calibration-samples", 2, "--calibration-length", 16]
        code, _, err = run_main(quantize, *words)
        assert code == (0 if said[recipe] is None else 2), err
        if said[recipe] is not None:
            assert err.strip() == f"error: {said[recipe]}"


@every("family", ["gpt2", "mixtral"])
def test_text_longer_than_a_models_positions_is_refused_with_what_fits(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory,
    run_main: Callable[..., tuple[int, str, str]], check: Check, text: Path,
) -> None:  # fmt: skip
    directory = tiny_checkpoint(tmp_path_factory.mktemp("short"), family, num_hidden_layers=2)
    found = check(directory)[1]
    recipes, kv = reasons(found, "recipe"), reasons(found, "kv")
    assert recipes["rtn-w8a8"] is None
    assert kv["per_head"] is None
    fits = f"do not fit the 256 positions of this {family}; use --{{0}} 256 or fewer"
    given = ["--model", directory, "--calibration", text]
    runs = [
        (quantize, "calibration-length", recipes["gptq-row"], [*given, "--recipe", "gptq-row"]),
        (quantize, "calibration-length", kv["static"], ["kv", *given, "--kv", "static", "--kv-bits", 4]),
        (evaluate, "window", reasons(found, "eval")["ppl"], ["ppl", "--model", directory, "--corpus", text]),
    ]
    for program, option, reason, words in runs:
        code, _, err = run_main(program, *words)
        assert reason == f"--{option} 2048: 2048 tokens with what stands in front {fits.format(option)}"
        assert (code, err.strip().replace(directory.name, f"this {family}")) == (2, f"error: {reason}")


def test_a_layout_is_told_in_words(made: Callable[[str], Path], check: Check) -> None:
    def laid_out(family: str) -> str:
        return str(check(made(family))[1]["facts"]["laid out"])

    assert laid_out("llama").startswith("nothing")
    assert "self_attn.qkv_proj as q_proj, k_proj, v_proj" in laid_out("phi3")
    assert "4 experts of gate_proj, up_proj, down_proj" in laid_out("mixtral")
    assert "stored as input × output" in laid_out("gpt2")
    assert "no row" in laid_out("helium")


def test_a_family_without_a_row_still_has_prefixes_and_kv_policies(made: Callable[[str], Path], check: Check) -> None:
    code, found = check(made("helium"))
    assert code == 0
    recipes, kv = reasons(found, "recipe"), reasons(found, "kv")
    assert recipes["fp16"] is None
    assert "llama, whose blocks hold matrices of the same names" in str(recipes["gptq-row"])
    assert kv["per_head"] is None
    assert "'helium' is not in the architecture table" in str(kv["static"])
    assert reasons(found, "prefix")["bos"] is None
    assert all(reasons(found, "export").values())


def test_transposed_and_stacked_families_are_exported_as_real_values_alone(
    made: Callable[[str], Path], check: Check
) -> None:
    for family, word in {"gpt2": "Conv1D", "mixtral": "keeps the experts of a block in one tensor"}.items():
        found = reasons(check(made(family))[1], "export")
        assert found.pop("dense") is None
        assert all(word in str(reason) for reason in found.values())
    assert not any(reasons(check(made("phi3"))[1], "export").values())


@every("damage", ["missing", "truncated", "shape", "tensor", "index"])
def test_damaged_files_are_named_and_nothing_runs(
    damage: str,
    made: Callable[[str], Path],
    check: Check,
    run_main: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    directory = shutil.copytree(made("phi3"), tmp_path / damage)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-40])
    elif damage == "index":
        weight_map = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
        (directory / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    else:
        tensors[name] = tensors[name][:8].contiguous()
        if damage == "tensor":
            del tensors[name]
        save_file(tensors, file, {"format": "pt"})
    code, found = check(directory)
    assert (code, found["runs"]) == (1, False)
    expected = {"missing": "holds no *.safetensors", "truncated": "model.safetensors", "shape": "has shape (8, 96)",
                "tensor": f"lacks the tensor '{name}'", "index": "which is missing"}[damage]  # fmt: skip
    assert expected in found["damage"]
    assert "\n" not in found["damage"]
    code, _, err = run_main(quantize, "--model", directory, "--recipe", "bcq-row", "--plan")
    assert (code, err.strip()) == (2, f"error: {found['damage']}")
    assert reasons(found, "recipe")["bcq-row"] is None  # as it would be once the files are whole


def test_what_is_no_model_gets_one_line(
    run_main: Callable[..., tuple[int, str, str]], tmp_path: Path, made: Callable[[str], Path]
) -> None:
    empty, other = tmp_path / "empty", tmp_path / "t5"
    empty.mkdir()
    shutil.copytree(made("llama"), other)
    (other / "config.json").write_text(json.dumps({"model_type": "t5"}))
    cases = {empty: "holds no config.json", other: "no causal language model", tmp_path / "nowhere": "is missing"}
    for directory, said in cases.items():
        code, out, err = run_main(main, "check", directory)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert said in err


def test_a_quantized_checkpoint_takes_caches_and_prefixes_alone(
    made: Callable[[str], Path], check: Check, tmp_path: Path
) -> None:
    out = quantize_checkpoint(made("llama"), Recipe(weights=RTN(W4)), tmp_path / "quantized")
    code, found = check(out)
    recipes = reasons(found, "recipe")
    assert (code, recipes["kv4"]) == (0, None)
    assert "fp16" not in recipes
    assert "is quantized already" in str(recipes["rtn-w4"])
    assert found["facts"]["quantized"] == "rtn-w4row"


@every(
    "more",
    [Recipe((Rotate(),)), Recipe(weights=RTN(W4), activations=Activations(W4)), Recipe(weights=BCQ(BinaryGrid(3)))],
)
def test_exports_of_a_quantized_checkpoint_are_told_as_the_exporter_tells_them(
    more: Recipe, made: Callable[[str], Path], check: Check, run_main: Callable[..., Any], tmp_path: Path
) -> None:
    out = quantize_checkpoint(made("gpt_neox"), more, tmp_path / more.label())
    said = reasons(check(out)[1], "export")
    assert said["gptq"] is not None
    for name, reason in said.items():
        code, _, err = run_main(quantize, "export", "--model", out, "--out", tmp_path / name, "--format", name)
        assert (code, err.strip()) == ((0, "") if reason is None else (2, f"error: {reason}"))


def test_a_checkpoint_that_needs_a_prefix_names_it(
    made: Callable[[str], Path], check: Check, run_main: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = Recipe(weights=GPTQ(W4), prefix="bos", calibrate_behind_prefix=True)
    segments = torch.randint(4, 101, (2, 16), generator=torch.Generator().manual_seed(1))
    out = quantize_checkpoint(made("llama"), recipe, tmp_path / "behind", segments=segments, behind=torch.tensor([1]))
    assert check(out)[1]["facts"]["calibrated behind"] == "--prefix bos; every program needs it"
    code, _, err = run_main(quantize, "export", "--model", out, "--out", tmp_path / "out")
    assert (code, err.strip().partition("; ")[2]) == (2, "run it with --prefix bos")
    assert run_main(quantize, "export", "--model", out, "--out", tmp_path / "out", "--prefix", "bos")[0] == 0


def test_the_text_says_every_method_once(made: Callable[[str], Path], run_main: Callable[..., Any]) -> None:
    code, out, _ = run_main(main, "check", made("cohere"))
    assert code == 0
    words = out.replace(",", " ").replace(":", " ").split()
    for method in suits.check(made("cohere")).methods:
        assert method.name in words
    assert max(map(len, out.splitlines())) <= 120 or "/" in max(out.splitlines(), key=len)
