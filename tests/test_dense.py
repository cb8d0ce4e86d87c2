"""One truth for what a dense checkpoint is: full precision and the quantizer read the same tensors, or refuse alike.

The truth of a good checkpoint is transformers' own from_pretrained.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import every
from conftest import MODEL_TYPES
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from corpora.errors import UserError
from corpora.storage import checkpoint_fingerprint, is_finite, write_tensors
from eval.__main__ import main as eval_main
from intactkv.prefix import PLAIN_BASIS, build_prefix
from quantization.export.writer import export_checkpoint
from quantization.grids.uniform import UniformGrid
from quantization.named import named_recipe
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import find_checkpoint, load_quantized
from quantization.runs.dense import DenseCheckpoint, empty_model
from quantization.runs.opening import load_model, load_tokenizer
from quantization.runs.pipeline import quantize_checkpoint
from quantization.runs.plan import plan_run
from quantization.weights.rtn import RTN

W8 = Recipe(weights=RTN(UniformGrid(8, 32)))
IDS = torch.arange(3, 43).view(2, 20)
LINEAR = "model.layers.1.mlp.down_proj"
Tensors = dict[str, Tensor]

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def dense(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint to change."""
    return tiny_checkpoint(tmp_path, "llama")


def edit(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The tensors of model.safetensors become what `change` makes of them."""
    file = directory / "model.safetensors"
    save_file({name: x.contiguous() for name, x in change(load_file(file)).items()}, file, {"format": "pt"})
    return directory


def configure(directory: Path, file: str = "config.json", **changes: Any) -> Path:
    (directory / file).write_text(json.dumps(json.loads((directory / file).read_text()) | changes))
    return directory


def full(directory: Path, dtype: torch.dtype = torch.float32, spread: bool = False) -> PreTrainedModel:
    return load_model(directory, dtype, torch.device("cpu"), spread_over_gpus=spread)


def theirs(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def rtn(directory: Path) -> Tensor:
    """Logits of the checkpoint at 8 bits."""
    out = quantize_checkpoint(directory, W8, directory.parent / "rtn")
    logits = load_quantized(out)(IDS).logits
    shutil.rmtree(out)
    return logits


def both_refuse(directory: Path, said: str) -> None:
    """Full precision and the quantizer give the same line, and nothing is written."""
    lines = []
    for reads in (full, rtn):
        with pytest.raises(UserError, match=said) as caught:
            reads(directory)
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert not (directory.parent / "rtn").exists()


def both_read(directory: Path, expected: Tensor) -> None:
    """Full precision gives these logits, and 8 bits come close."""
    assert torch.equal(full(directory)(IDS).logits, expected)
    error = (rtn(directory) - expected).norm() / expected.norm()
    assert 0 < float(error) < 0.1


# good checkpoints -----------------------------------------------------------------------------------------------------


@every(
    ("options", "dtype", "spread"),
    [
        ({}, torch.float32, False),
        ({}, torch.float16, True),
        ({"tie_word_embeddings": True}, torch.float32, True),
        ({"max_shard_size": "100KB"}, torch.bfloat16, False),
    ],
)
@every("model_type", MODEL_TYPES)
def test_a_good_checkpoint_is_the_model_that_transformers_loads(
    checkpoint: Callable[..., Path], model_type: str, options: dict[str, Any], dtype: torch.dtype, spread: bool
) -> None:
    directory = checkpoint(model_type, **options)
    ours, expected = full(directory, dtype, spread), theirs(directory, dtype)
    if ours.device.type == "cpu":  # where there is a GPU, a spread model is on it
        assert torch.equal(ours(IDS).logits, expected(IDS).logits)
    assert ours.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(x.cpu(), expected.state_dict()[name]) for name, x in ours.state_dict().items())
    assert dict(ours.named_buffers()).keys() == dict(expected.named_buffers()).keys()
    assert ours.generation_config.to_dict() == expected.generation_config.to_dict()
    assert ours.config.to_dict() == expected.config.to_dict()
    assert (ours.name_or_path, ours.dtype, ours.training) == (expected.name_or_path, dtype, False)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


GPT_NEO = {"vocab_size": 101, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 8,
           "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256}  # fmt: skip
MIXTRAL = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
           "num_local_experts": 4, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


@pytest.mark.parametrize(("model_type", "options"), [("gpt_neo", GPT_NEO), ("mixtral", MIXTRAL)])
def test_a_type_outside_the_table_is_loaded_and_checked_too(
    model_type: str, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the files hold its parts in another form than the model (the experts of Mixtral)."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).eval()
    made.save_pretrained(tmp_path / "model")
    assert torch.equal(full(tmp_path / "model")(IDS).logits, made(IDS).logits)
    norm = next(name for name in load_file(tmp_path / "model" / "model.safetensors") if "norm" in name or "ln_" in name)
    extra, nan = {"of_nobody": torch.ones(2)}, {norm: torch.full((64,), float("nan"))}
    edit(tmp_path / "model", lambda tensors: tensors | extra)
    assert torch.equal(full(tmp_path / "model")(IDS).logits, made(IDS).logits)
    assert "holds 1 tensors that its model does not read: of_nobody" in caplog.text
    for change, said in (
        (lambda tensors: tensors | nan, f"the tensor '{norm}' holds values that are not finite"),
        (lambda tensors: tensors | {norm: torch.ones(63)}, r"has shape \(63,\), config.json asks for \(64,\)"),
        (lambda tensors: tensors | {norm: torch.ones(64).to(torch.int8)}, f"'{norm}' is stored as I8"),
        (lambda tensors: tensors | {f"{norm}_scale": torch.ones(1)}, f"quantized already.*'{norm}_scale'"),
        (lambda tensors: {name: x for name, x in tensors.items() if name != norm}, "lacks the tensor"),
    ):
        copy = edit(Path(shutil.copytree(tmp_path / "model", tmp_path / "copy")), change)
        with pytest.raises(UserError, match=said):
            full(copy)
        shutil.rmtree(copy)


@every("prefix", ["", "model.model."])
@every("model_type", ["llama", "opt"])
def test_names_without_the_leading_model_or_with_two_are_read(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, model_type: str, prefix: str
) -> None:
    directory = tiny_checkpoint(tmp_path_factory.mktemp("names"), model_type, tie_word_embeddings=True)
    expected = theirs(directory)(IDS).logits
    edit(directory, lambda tensors: {prefix + name.removeprefix("model."): x for name, x in tensors.items()})
    assert torch.equal(theirs(directory)(IDS).logits, expected)
    both_read(directory, expected)


@every("model_type", MODEL_TYPES)
def test_a_tied_model_may_store_either_of_the_two(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, model_type: str
) -> None:
    directory = tiny_checkpoint(tmp_path_factory.mktemp("tied"), model_type, tie_word_embeddings=True)
    expected = theirs(directory)(IDS).logits
    edit(directory, lambda t: {("lm_head.weight" if "embed_tokens" in name else name): x for name, x in t.items()})
    assert torch.equal(theirs(directory)(IDS).logits, expected)
    both_read(directory, expected)
    edit(directory, lambda tensors: {name: x for name, x in tensors.items() if name != "lm_head.weight"})
    both_refuse(directory, r"lacks the tensor '.*embed_tokens\.weight'")


def test_what_is_left_over_is_named_once_and_changes_nothing(dense: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = full(dense)(IDS).logits
    assert "does not read" not in caplog.text
    silent = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    silent["model.layers.0.self_attn.masked_bias"] = torch.tensor(-1e4)
    edit(dense, lambda tensors: tensors | silent)
    both_read(dense, expected)
    assert "does not read" not in caplog.text
    empty_and_scalar = {"model.layers.0.self_attn.k_scale": torch.tensor(1.0), "model.extra.weight": torch.ones(0, 3)}
    edit(dense, lambda tensors: tensors | empty_and_scalar)
    assert find_checkpoint(dense).fingerprint == checkpoint_fingerprint(dense)
    full(dense)
    lines = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert lines == [f"{dense} holds 2 tensors that its model does not read: model.extra.weight, "
                     "model.layers.0.self_attn.k_scale"]  # fmt: skip
    both_read(dense, expected)


# which files count ----------------------------------------------------------------------------------------------------


def test_a_file_of_another_day_beside_the_model_is_read_by_nobody(dense: Path, checkpoint: Callable[..., Path]) -> None:
    before, expected = checkpoint_fingerprint(dense), theirs(dense)(IDS).logits
    for name in ("model_old.safetensors", "model-00001-of-00002.safetensors", "consolidated.safetensors"):
        shutil.copy(checkpoint(seed=5) / "model.safetensors", dense / name)
    (dense / "._model.safetensors").write_bytes(b"\0\5\x16\7" * 9)
    assert checkpoint_fingerprint(dense) == before
    both_read(dense, expected)


def test_an_adapter_beside_the_model_leaves_open_whether_it_counts(dense: Path) -> None:
    """transformers would read it on top of the weights."""
    (dense / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    both_refuse(dense, r"holds a PEFT adapter \(adapter_config\.json\), .* merge it \(merge_and_unload")


def test_a_single_file_beside_shards_leaves_open_which_is_meant(
    tiny_checkpoint: Callable[..., Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    shards = tiny_checkpoint(tmp_path, "llama", max_shard_size="100KB")
    shutil.copy(checkpoint(seed=5) / "model.safetensors", shards)
    both_refuse(shards, r"holds two sets of weights: model\.safetensors, and the files that model\.safetensors\.index")


def test_without_an_index_or_the_usual_name_every_file_counts_but_those_of_a_mac(dense: Path) -> None:
    expected = theirs(dense)(IDS).logits
    (dense / "model.safetensors").rename(dense / "weights.safetensors")
    (dense / "._weights.safetensors").write_bytes(b"\0\5\x16\7" * 9)
    both_read(dense, expected)
    shutil.copy(dense / "weights.safetensors", dense / "weights-old.safetensors")
    both_refuse(dense, r"weights-old\.safetensors and weights\.safetensors both hold the tensor 'lm_head\.weight'")


# what is no dense checkpoint ------------------------------------------------------------------------------------------


@every(
    ("change", "said"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}, r"'lm_head\.weight'; .*without its head"),
        (lambda t: {k.removeprefix("model."): v for k, v in t.items() if k != "lm_head.weight"}, "without its head"),
        (lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, r"lacks the tensor .* holds '_orig_mod\.lm_head"),
        (lambda t: {k: v for k, v in t.items() if LINEAR not in k}, rf"'{LINEAR}\.weight'; the checkpoint is incompl"),
        (lambda t: t | {f"{LINEAR}.weight": t[f"{LINEAR}.weight"].to(torch.int8)}, "is stored as I8"),
        (lambda t: t | {f"{LINEAR}.weight": t[f"{LINEAR}.weight"].to(torch.float8_e4m3fn)}, "is stored as F8_E4M3"),
        (lambda t: t | {f"{LINEAR}.weight": t[f"{LINEAR}.weight"].bool()}, "is stored as BOOL"),
        (lambda t: t | {f"{LINEAR}.weight_scale": torch.ones(64, 1)}, "quantized already.* holds .*weight_scale'"),
        (lambda t: t | {f"{LINEAR}.weight_scale_inv": torch.ones(1, 1)}, "quantized already.*weight_scale_inv'"),
        (lambda t: t | {f"{LINEAR}.weight.absmax": torch.ones(96)}, r"quantized already.*weight\.absmax'"),
        (lambda t: {k.replace(f"{LINEAR}.w", f"{LINEAR}.qw"): v for k, v in t.items()}, "quantized already.*qweight'"),
        (lambda t: t | {f"{LINEAR}.weight": t[f"{LINEAR}.weight"] * float("nan")}, rf"'{LINEAR}.* not finite"),
        (lambda t: t | {"model.norm.weight": t["model.norm.weight"] / 0}, r"'model\.norm\.weight' .* not finite"),
    ],
)
def test_what_is_wrong_with_the_tensors_is_one_line_for_both(
    tiny_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    change: Callable[[Tensors], Tensors],
    said: str,
) -> None:
    both_refuse(edit(tiny_checkpoint(tmp_path_factory.mktemp("wrong"), "llama"), change), said)


def belongs(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """A model that counts as loaded from another directory."""
    model.__dict__["intactkv_source"] = (checkpoint_fingerprint(directory), PLAIN_BASIS)
    return model


@pytest.mark.parametrize("prefix", ["none", "FILE"])
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {name: x for name, x in tensors.items() if name != "lm_head.weight"},
        lambda tensors: tensors | {f"{LINEAR}.weight_scale": torch.ones(64, 1)},
    ],
)
def test_a_run_is_refused_before_its_record_is_looked_for(
    dense: Path,
    change: Callable[[Tensors], Tensors],
    prefix: str,
    intactkv_root: Path,
    run_main: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Callable[..., Path],
) -> None:
    """A figure that was taken when such files were still read is not shown again."""
    (intactkv_root / "text.txt").write_text("some text " * 40)
    good = checkpoint()
    edit(dense, change)
    if prefix == "FILE":
        prefix = str(intactkv_root / "p.safetensors")
        build_prefix(belongs(full(good), dense), [1]).save(Path(prefix))
    ppl = ("ppl", "--model", dense, "--corpus", intactkv_root / "text.txt", "--window", 64, "--limit", 1,
           "--prefix", prefix)  # fmt: skip
    with monkeypatch.context() as before:  # as if it had been taken of these files
        before.setattr(DenseCheckpoint, "check", lambda _: None)
        before.setattr("quantization.runs.plan.load_model", lambda *_, **__: belongs(full(good), dense))
        assert run_main(eval_main, *ppl)[0] == 0
    code, shown, errors = run_main(eval_main, *ppl)
    assert (code, shown) == (2, "")
    assert "lacks the tensor" in errors or "quantized already" in errors


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8", None])
def test_weights_in_the_layout_of_another_program_are_refused_by_its_name(dense: Path, method: str | None) -> None:
    configure(dense, quantization_config=None)
    assert find_checkpoint(dense).manifest is None
    configure(dense, quantization_config={"quant_method": method} if method else {"bits": 4})
    both_refuse(
        dense, f"quantized already, in the layout of {method or 'another program'} .* give the dense checkpoint"
    )
    with pytest.raises(UserError, match="quantized already"):
        plan_run(dense, Recipe(), device=torch.device("cpu"))


def test_an_export_of_ours_names_the_checkpoint_to_give(
    dense: Path, intactkv_root: Path, run_main: Callable[..., Any]
) -> None:
    (intactkv_root / "text.txt").write_text("some text " * 40)
    source = quantize_checkpoint(dense, Recipe(weights=RTN(UniformGrid(4, 32, "gptq-sym"))), intactkv_root / "w4")
    for form in ("compressed-tensors", "gptq", "awq"):
        export_checkpoint(source, intactkv_root / form, form)
        for more in ((), ("--recipe", "rtn", "--bits", 8, "--group-size", 32)):
            code, _, errors = run_main(eval_main, "ppl", "--model", intactkv_root / form, "--corpus",
                                       intactkv_root / "text.txt", "--window", 64, "--limit", 1, *more)  # fmt: skip
            assert (code, len(errors.splitlines())) == (2, 1), errors
            assert f"quantized already, in the layout of {form}" in errors
            assert "give the quantized checkpoint that it was exported from" in errors
    export_checkpoint(source, intactkv_root / "dense", "dense")
    assert torch.equal(full(intactkv_root / "dense")(IDS).logits, load_quantized(source)(IDS).logits)
    plan = plan_run(intactkv_root / "dense", Recipe(), device=torch.device("cpu"))
    assert plan.describe()["weights"] == "rtn-w4g32"
    with pytest.raises(UserError, match="is an export of ours: its numbers are those of quantized weights already"):
        quantize_checkpoint(intactkv_root / "dense", W8, intactkv_root / "twice")


def test_a_file_in_the_place_of_the_model_is_called_a_file(dense: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is a file, not a model; give the directory"):
        find_checkpoint(dense / "config.json")


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        (
            "config.json",
            {"dtype": "bf16"},
            r"config\.json: dtype 'bf16' is none of torch's; write float32, float16 or bf",
        ),
        ("config.json", {"dtype": "auto"}, r"config\.json: dtype 'auto' is none of torch's; write float32"),
        (
            "config.json",
            {"hidden_size": "wide"},
            r"config\.json is damaged: its 'hidden_size' 'wide' is not a valid integer",
        ),
        (
            "config.json",
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
            r"config\.json asks for code.*own\.Config",
        ),
        ("generation_config.json", {"max_new_tokens": -3}, r"generation_config\.json does not say how to generate"),
        ("tokenizer_config.json", {"unk_token": ""}, r"tokenizer_config\.json: unk_token is empty.*write null"),
        ("tokenizer_config.json", {"bos_token": "", "eos_token": ""}, r"tokenizer_config\.json: bos_token is empty"),
    ],
)
def test_a_value_that_a_library_chokes_on_is_one_line_with_its_file(
    dense: Path, file: str, changes: dict[str, Any], said: str
) -> None:
    configure(dense, file, **changes)
    with pytest.raises(UserError, match=said) as caught:
        (full if "tokenizer" not in file else load_tokenizer)(dense)
    assert "\n" not in str(caught.value)


def test_a_damaged_generation_config_is_not_passed_over(dense: Path) -> None:
    (dense / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json is not readable JSON"):
        full(dense)


# numbers --------------------------------------------------------------------------------------------------------------


METHODS = ("rtn", "gptq", "spqr", "omniquant", "quarot", "zeroquant-w4a4", "awq", "smoothquant-w8a8")


@every(("name", "wide"), [*((name, True) for name in METHODS), ("gptq", False)])
def test_a_block_of_several_dtypes_computes_in_the_widest(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, name: str, wide: bool
) -> None:
    """The same bits as of the checkpoint with every tensor stored in that dtype. wide: float32 norms among bfloat16
    linears; else float16 embeddings, which with bfloat16 meet in float32, too."""
    mixed, one = (tiny_checkpoint(tmp_path_factory.mktemp("mixed"), "llama", dtype=torch.bfloat16) for _ in range(2))
    other = torch.float32 if wide else torch.float16

    def kept(tensors: Tensors) -> Tensors:
        return {key: x.to(other) if ("norm" if wide else "embed") in key else x for key, x in tensors.items()}

    edit(mixed, kept)
    edit(one, lambda tensors: {key: x.float() for key, x in kept(tensors).items()})
    recipe = named_recipe(name)
    recipe = replace(recipe, prefix="none", calibrate_behind_prefix=False)
    if hasattr(recipe.weights, "epochs"):
        recipe = replace(recipe, weights=replace(recipe.weights, epochs=1))
    if recipe.weights is not None and isinstance(grid := recipe.weights.grid, UniformGrid):
        recipe = replace(recipe, weights=replace(recipe.weights, grid=replace(grid, group_size=32)))
    logits = []
    for directory in (mixed, one):
        out = quantize_checkpoint(directory, recipe, directory / "out", segments=IDS if recipe.calibrates else None)
        logits.append(load_quantized(out, dtype=torch.float32)(IDS).logits)
    assert torch.equal(*logits)
    assert DenseCheckpoint(mixed).weights(empty_model(mixed)).dtype == torch.float32


def test_a_weight_beyond_the_dtype_of_the_run_is_refused(dense: Path) -> None:
    edit(dense, lambda tensors: tensors | {f"{LINEAR}.weight": tensors[f"{LINEAR}.weight"] * 1e7})
    assert torch.isfinite(full(dense)(IDS).logits).all()
    with pytest.raises(UserError, match=rf"'{LINEAR}\.weight' holds .*e\+06, which is beyond float16; choose --dtype"):
        full(dense, torch.float16)
    out = quantize_checkpoint(dense, W8, dense.parent / "out")
    with pytest.raises(UserError, match=rf"'{LINEAR}\.weight', in float16, holds values that are not finite"):
        load_quantized(out, dtype=torch.float16)


@every("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@every("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_written(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, value: float
) -> None:
    file = tmp_path_factory.mktemp("nan") / "file.safetensors"
    tensor = torch.tensor([[1.0, value], [-2.0, 3.0]]).to(dtype)
    assert not is_finite(tensor)
    with pytest.raises(UserError, match=r"file\.safetensors is not written: its tensor 'x' holds values .* not finite"):
        write_tensors(file, {"good": torch.ones(2), "x": tensor})
    assert not list(file.parent.iterdir())
    write_tensors(file, {"good": torch.ones(2).to(dtype), "empty": torch.ones(0, 2), "codes": torch.ones(2).int()})
    assert load_file(file).keys() == {"good", "empty", "codes"}


def test_a_block_whose_scales_are_not_finite_is_not_written(dense: Path, tmp_path: Path) -> None:
    class Broken(RTN):
        def quantize_block(self, block):  # type: ignore[no-untyped-def]
            found = super().quantize_block(block)
            found["mlp.down_proj"].scale[3] = float("nan")
            return found

    with pytest.raises(UserError, match=r"block-000\.safetensors is not written: its tensor '.*down_proj\.scale'"):
        quantize_checkpoint(dense, Recipe(weights=Broken(UniformGrid(4, 32))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("grid", [{"scale_dtype": "float16"}, {"convention": "awq-asym"}])
def test_weights_that_a_grid_makes_nothing_but_zeros_are_refused(
    dense: Path, tmp_path: Path, grid: dict[str, str]
) -> None:
    edit(dense, lambda tensors: tensors | {f"{LINEAR}.weight": tensors[f"{LINEAR}.weight"] * 1e-8})
    with pytest.raises(UserError, match=rf"{LINEAR}: all of its weights become 0.*scale_dtype=float32"):
        quantize_checkpoint(dense, Recipe(weights=RTN(UniformGrid(4, 32, **grid))), tmp_path / "out")
    out = quantize_checkpoint(dense, Recipe(weights=RTN(UniformGrid(4, 32))), tmp_path / "fine")
    assert load_quantized(out).get_parameter(f"{LINEAR}.weight").any()
