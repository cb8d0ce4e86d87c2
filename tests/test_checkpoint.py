"""Checkpoints that are broken, incomplete or not ours: every one gets an error that names the thing."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import ROOT
from safetensors.torch import load_file, save_file

from corpora.errors import UserError
from quantization.grids.uniform import UniformGrid
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import CHECKSUMS, MANIFEST, block_file, find_checkpoint, is_quantized, load_quantized
from quantization.runs.dense import DenseCheckpoint, empty_model, read_config
from quantization.runs.pipeline import quantize_checkpoint
from quantization.runs.sums import add_sum
from quantization.weights.rtn import RTN

RECIPE = Recipe(weights=RTN(UniformGrid(4, 32)))


@pytest.fixture
def dense(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return tiny_checkpoint(tmp_path, "llama")


@pytest.fixture
def quantized(dense: Path, tmp_path: Path) -> Path:
    """A quantized checkpoint to break."""
    return quantize_checkpoint(dense, RECIPE, tmp_path / "quantized")


def rewrite(file: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a safetensors file; None removes one."""
    tensors = load_file(file)
    for name, tensor in changes.items():
        assert name in tensors
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def configure(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(file: Path, share: float) -> None:
    os.truncate(file, int(share * file.stat().st_size))


def refuse(dense: Path, said: str) -> None:
    """Quantizing is refused with these words, and nothing is written."""
    out = dense.parent / "refused"
    with pytest.raises(UserError, match=said):
        quantize_checkpoint(dense, RECIPE, out)
    assert not out.exists()
    assert not list(dense.parent.glob("refused*"))


# dense ----------------------------------------------------------------------------------------------------------------


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", r"model directory .*nowhere is missing; `python -m corpora`")


def test_a_directory_without_configuration_is_named(dense: Path) -> None:
    (dense / "config.json").unlink()
    refuse(dense, r"tiny-llama holds no config\.json")


def test_a_directory_without_weights_is_named(dense: Path) -> None:
    (dense / "model.safetensors").unlink()
    refuse(dense, r"tiny-llama holds no \*\.safetensors file")


@pytest.mark.parametrize("content", ["", "{", '{"no_type": 1}', '{"model_type": "nothing-like-it"}'])
def test_a_configuration_that_is_none_is_named(dense: Path, content: str) -> None:
    (dense / "config.json").write_text(content)
    refuse(dense, r"config\.json")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(dense: Path, share: float) -> None:
    truncate(dense / "model.safetensors", share)
    refuse(dense, r"model\.safetensors is truncated or not a safetensors file")


def test_a_lost_shard_is_noticed_by_its_tensors(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path, "llama", max_shard_size="100KB")
    shards = sorted(dense.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    refuse(dense, "lacks the tensor 'model.* incomplete")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named_before_any_block_is_quantized(dense: Path, name: str) -> None:
    rewrite(dense / "model.safetensors", **{name: None})
    refuse(dense, f"lacks the tensor '{name}'")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.mlp.down_proj.weight", (64, 32)),
        ("model.layers.1.mlp.down_proj.weight", (96, 64)),
        ("model.norm.weight", (32,)),
        ("model.embed_tokens.weight", (55, 64)),
    ],
)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(dense: Path, name: str, shape: tuple[int, ...]) -> None:
    rewrite(dense / "model.safetensors", **{name: torch.ones(shape)})
    refuse(dense, rf"the tensor '{name}' has shape \({shape[0]}, ?.*config\.json asks for")


def test_a_configuration_of_another_model_is_noticed(dense: Path) -> None:
    configure(dense, num_hidden_layers=4)
    refuse(dense, r"lacks the tensor 'model\.layers\.3\.")
    configure(dense, num_hidden_layers=3, intermediate_size=192)
    refuse(dense, r"has shape \(96, 64\), config\.json asks for \(192, 64\)")


def test_a_model_type_outside_the_table_is_refused_with_those_in_it(dense: Path) -> None:
    configure(dense, model_type="mpt", architectures=["MptForCausalLM"])
    refuse(dense, "'mpt' is not in the architecture table. No family there")
    configure(dense, model_type="t5")  # no causal language model at all
    refuse(dense, "'t5' is not in the architecture table")


def test_a_variant_with_other_linears_is_refused(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    # OPT-350m projects its embeddings; that is outside the blocks and allowed. Without linears in the block it is not.
    dense = tiny_checkpoint(tmp_path, "opt", word_embed_proj_dim=32)
    out = quantize_checkpoint(dense, RECIPE, tmp_path / "out")
    ids = torch.arange(10)[None]
    assert load_quantized(out)(ids).logits.shape == (1, 10, 101)

    class Odd(RTN):
        def quantize_block(self, block):  # type: ignore[no-untyped-def]
            block.module.fc3 = torch.nn.Linear(2, 2)
            return super().quantize_block(block)

    with pytest.raises(UserError, match=r"layers\.0 holds the linears .*fc3.*this variant .* is not supported"):
        quantize_checkpoint(dense, Recipe(weights=Odd(UniformGrid(4, 32))), tmp_path / "odd")


def test_a_weight_that_is_not_finite_is_named(dense: Path) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    damaged = load_file(dense / "model.safetensors")[name]
    damaged[3, 5] = float("nan")
    rewrite(dense / "model.safetensors", **{name: damaged})
    with pytest.raises(UserError, match=r"v_proj\.weight' holds values that are not finite"):
        quantize_checkpoint(dense, RECIPE, dense.parent / "out")


def test_old_files_without_the_leading_model_are_read(
    tiny_checkpoint: Callable[..., Path], tiny_model: Callable, tmp_path: Path
) -> None:
    dense = tiny_checkpoint(tmp_path, "opt", tie_word_embeddings=True)
    file = dense / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    assert DenseCheckpoint(dense).stored_name("model.decoder.layers.0.fc1.weight") == "decoder.layers.0.fc1.weight"
    out = quantize_checkpoint(dense, Recipe(weights=RTN(UniformGrid(8, 32))), tmp_path / "out")
    ids = torch.arange(20)[None]
    expected = tiny_model("opt", tie_word_embeddings=True)(ids).logits
    error = (load_quantized(out)(ids).logits - expected).norm() / expected.norm()
    assert 0 < float(error) < 0.1  # 8 bits


def test_an_empty_model_has_no_weights_but_its_buffers(dense: Path) -> None:
    model = empty_model(dense)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training
    assert read_config(dense).model_type == "llama"


# quantized ------------------------------------------------------------------------------------------------------------


def test_what_a_directory_is_is_seen_from_its_manifest(dense: Path, quantized: Path) -> None:
    assert (is_quantized(dense), is_quantized(quantized)) == (False, True)
    found = find_checkpoint(quantized)
    assert found.manifest is not None
    assert found.name == "tiny-llama/quantized"
    assert found.family_name == "tiny-llama"
    assert found.fingerprint == find_checkpoint(dense).fingerprint


def test_quantizing_a_quantized_checkpoint_is_refused(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantized is quantized already"):
        quantize_checkpoint(quantized, RECIPE, tmp_path / "twice")


def test_a_quantized_checkpoint_with_a_lost_block_is_incomplete(quantized: Path) -> None:
    block_file(quantized, 1).unlink()
    with pytest.raises(UserError, match=r"block-001\.safetensors is missing; the quantized checkpoint is incomplete"):
        load_quantized(quantized)


@pytest.mark.parametrize("name", ["block-002.safetensors", "ends.safetensors"])
def test_a_truncated_file_of_a_quantized_checkpoint_is_named(quantized: Path, name: str) -> None:
    truncate(quantized / name, 0.9)
    with pytest.raises(UserError, match=f"{name} has changed since it was written"):
        load_quantized(quantized)


def test_a_quantized_checkpoint_with_lost_or_foreign_tensors_is_damaged(quantized: Path) -> None:
    file = quantized / "ends.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"ends\.safetensors has changed since it was written"):
        load_quantized(quantized)
    save_file(tensors | {"model.norm.weight": norm, "model.extra.weight": norm.clone()}, file)
    add_sum(file)
    with pytest.raises(UserError, match=r"unexpected \['model\.extra\.weight'\]"):
        load_quantized(quantized)
    save_file(tensors | {"model.norm.weight": norm[:32].clone()}, file)
    add_sum(file)
    with pytest.raises(UserError, match=r"does not fit its config\.json"):
        load_quantized(quantized)


@pytest.mark.parametrize("name", ["block-001.safetensors", "ends.safetensors"])
def test_a_changed_byte_is_noticed(quantized: Path, name: str) -> None:
    content = bytearray((quantized / name).read_bytes())
    content[-5] ^= 1  # in the values, not in the header
    (quantized / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} has changed since it was written"):
        load_quantized(quantized)


def test_a_format_of_another_version_is_refused(quantized: Path) -> None:
    manifest = json.loads((quantized / MANIFEST).read_text())
    (quantized / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match=r"not a whole manifest of format 2 \(its format: 99\).*quantize again"):
        load_quantized(quantized)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 2}'])
def test_a_broken_manifest_is_named(quantized: Path, content: str) -> None:
    (quantized / MANIFEST).write_text(content)
    for read in (find_checkpoint, load_quantized):
        with pytest.raises(UserError, match=r"quantization\.json"):
            read(quantized)


# the disk -------------------------------------------------------------------------------------------------------------


def test_a_disk_that_refuses_ends_in_one_line_and_the_run_can_go_on(dense: Path, tmp_path: Path) -> None:
    whole = quantize_checkpoint(dense, RECIPE, tmp_path / "whole")
    sizes = {file.name: file.stat().st_size for file in whole.iterdir()}
    largest_block = max(size for name, size in sizes.items() if name.startswith("block"))
    limit = sizes["ends.safetensors"] - 1000
    assert largest_block < limit  # blocks can be written, the ends cannot
    done = subprocess.run(
        [sys.executable, "-m", "quantization", "--model", dense, "--recipe", "rtn-w4", "--group-size", "32",
         "--device", "cpu", "--out", tmp_path / "out"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "INTACTKV_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert "ends.safetensors" in errors[0]
    assert done.stderr.rstrip().endswith(errors[0])
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert sorted(file.name for file in (tmp_path / "out.partial").glob("*block*")) == [
        f"block-00{i}.safetensors" for i in range(3)
    ]
    assert not list((tmp_path / "out.partial").glob(".*"))  # nothing half written is left
    before = {i: block_file(tmp_path / "out.partial", i).stat().st_mtime_ns for i in range(3)}
    out = quantize_checkpoint(dense, RECIPE, tmp_path / "out")
    assert {i: block_file(out, i).stat().st_mtime_ns for i in range(3)} == before
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in sizes if name != CHECKSUMS)
