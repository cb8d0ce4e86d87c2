"""Fingerprints once covered less of a model. What names a model by one of those still serves, but no figure does."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import corpora.storage
from corpora.errors import UserError
from corpora.storage import checkpoint_fingerprint
from eval.__main__ import main as evaluate
from intactkv.attach import attach
from intactkv.peft import write_adapter
from intactkv.prefix import Prefix
from quantization.grids.uniform import UniformGrid
from quantization.recipes.recipe import Recipe
from quantization.runs.dense import empty_model
from quantization.runs.identities import artefact_of
from quantization.runs.opening import load_model
from quantization.runs.pipeline import quantize_checkpoint
from quantization.runs.plan import plan_run
from quantization.transforms.rotate import Rotate
from quantization.weights.rtn import RTN

CPU = torch.device("cpu")
RTN_W4 = Recipe(weights=RTN(UniformGrid(4, 16)))
ROTATED = Recipe(transforms=(Rotate(),), weights=RTN(UniformGrid(4, 16)))
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 103, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-05, "hidden_act": "silu", "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dtype": "float32",
}  # fmt: skip
EARLIER = "63769722a625fd26"  # what the release that covered less calls the model below


@pytest.fixture
def dense(intactkv_root: Path, tiny_tokenizer: Callable[..., Any]) -> Path:
    """A model that is the same bytes with every version of the libraries."""
    directory = intactkv_root / "before"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    state = {}
    for number, (name, empty) in enumerate(sorted(empty_model(directory).state_dict().items())):
        numbers = (torch.arange(empty.numel()) * 7919 + 31 * number) % 257 - 128
        state[name] = (numbers / 512 + (1 if "norm" in name else 0)).view(empty.shape)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    tiny_tokenizer().save_pretrained(directory)
    return directory


def edited(dense: Path, row: int) -> None:
    """Change a token's embedding. The earlier sample covers rows 0 to 7; those behind it, here and there."""
    state = load_file(dense / "model.safetensors")
    state["model.embed_tokens.weight"][row] += 1
    save_file(state, dense / "model.safetensors", {"format": "pt"})


def of_before(file: Path, basis: str | None = None, trained: bool = False, fingerprint: str = EARLIER) -> Path:
    """Write a prefix again as that release did."""
    prefix = Prefix.load(file)
    owner = replace(prefix.model, fingerprint=fingerprint, basis=basis or prefix.model.basis)
    replace(prefix, model=owner, calibrated={} if trained else None).save(file)
    return file


def built(dense: Path, file: Path, recipe: Recipe) -> Path:
    plan_run(dense, replace(recipe, prefix="bos"), device=CPU, makes="prefix").intact_prefix().save(file)
    return file


def test_what_a_model_was_called_before(dense: Path) -> None:
    assert checkpoint_fingerprint(dense) != EARLIER
    assert checkpoint_fingerprint(dense, EARLIER) == EARLIER
    assert checkpoint_fingerprint(dense, "0" * 16) == checkpoint_fingerprint(dense)
    edited(dense, 2)
    assert checkpoint_fingerprint(dense, EARLIER) != EARLIER


def test_a_prefix_file_of_before_is_taken(
    dense: Path, text: Path, tmp_path: Path, run_main: Callable[..., Any]
) -> None:
    file = of_before(built(dense, tmp_path / "bos.safetensors", RTN_W4))
    write_adapter(Prefix.load(file), tmp_path / "adapter")
    attach(load_model(dense, torch.float32, CPU), Prefix.load(file))
    quantized = quantize_checkpoint(dense, RTN_W4, tmp_path / "q")
    score = ("ppl", "--corpus", text, "--window", 32, "--limit", 2, "--json", "--device", "cpu")
    figures = {}
    for prefix in ("bos", file, tmp_path / "adapter"):
        for model in (("--model", dense, "--recipe", "rtn-w4", "--group-size", 16), ("--model", quantized)):
            code, out, err = run_main(evaluate, *score, *model, "--prefix", prefix)
            assert code == 0, err
            figures[str(prefix), model[1]] = json.loads(out)["perplexity"]
    for model in (dense, quantized):
        assert len({figure for (_, of), figure in figures.items() if of == model}) == 1
    edited(dense, 2)
    code, _, err = run_main(
        evaluate, *score, "--model", dense, "--recipe", "rtn-w4", "--group-size", 16, "--prefix", file
    )
    assert code == 2
    assert f"this prefix belongs to another model or basis: fingerprint is '{EARLIER}' in the prefix" in err


def test_a_trained_prefix_of_before_is_taken_in_the_basis_that_is_now_called_otherwise(
    dense: Path, tmp_path: Path
) -> None:
    file = built(dense, tmp_path / "bos.safetensors", ROTATED)
    ours = Prefix.load(file).model.basis
    earlier = artefact_of(EARLIER, ROTATED).basis
    assert ours != earlier
    of_before(file, earlier, trained=True)
    plan = plan_run(dense, replace(ROTATED, prefix=str(file)), device=CPU)
    model = plan.load()
    assert model.prefix is not None
    assert (model.prefix.model.fingerprint, model.prefix.model.basis) == (checkpoint_fingerprint(dense), ours)
    for basis, fingerprint in (("plain", EARLIER), (ours[::-1], EARLIER), (earlier, "0" * 16)):
        of_before(file, basis, trained=True, fingerprint=fingerprint)
        with pytest.raises(UserError, match="this prefix belongs to another model or basis"):
            plan_run(dense, replace(ROTATED, prefix=str(file)), device=CPU)


def test_a_checkpoint_of_before_finds_its_dense_model_and_takes_a_prefix_of_now(dense: Path, tmp_path: Path) -> None:
    file = built(dense, tmp_path / "bos.safetensors", RTN_W4)
    quantized = quantize_checkpoint(dense, RTN_W4, tmp_path / "q", fingerprint=EARLIER)
    plan_run(quantized, Recipe(prefix="bos"), device=CPU).load()  # whose prefix the dense model writes
    plan_run(quantized, Recipe(prefix=str(file)), device=CPU).load()
    edited(dense, 2)
    with pytest.raises(UserError, match=r"the dense full-precision model of .* is not at hand"):
        plan_run(quantized, Recipe(prefix="bos"), device=CPU).twin()
    with pytest.raises(UserError, match="this prefix belongs to another model or basis: fingerprint is"):
        plan_run(quantized, Recipe(prefix=str(file)), device=CPU)


def test_a_checkpoint_by_its_recipe_is_made_anew(dense: Path) -> None:
    """The old one may be of a model that was edited where the earlier sample did not look."""
    plan = plan_run(dense, RTN_W4, device=CPU)
    old = replace(plan, checkpoint=replace(plan.checkpoint, fingerprint=EARLIER)).written(RTN_W4)
    assert plan.written(RTN_W4) != old


def test_a_model_is_read_for_its_fingerprint_once_and_again_when_it_changed(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, opened = checkpoint_fingerprint(dense), []
    open_tensors = corpora.storage.open_tensors
    monkeypatch.setattr(corpora.storage, "open_tensors", lambda file: (opened.append(file), open_tensors(file))[1])
    assert checkpoint_fingerprint(dense) == before
    assert not opened
    edited(dense, 50)
    assert checkpoint_fingerprint(dense) != before
    assert opened
    before = checkpoint_fingerprint(dense)
    (dense / "config.json").write_text(json.dumps(CONFIG | {"rms_norm_eps": 1e-06}))
    assert checkpoint_fingerprint(dense) != before
