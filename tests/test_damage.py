"""Files that are not whole, and files of another model than the configuration beside them, are refused; what is meant
is read.

The truth of a good checkpoint is transformers' own from_pretrained.
"""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import every
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from corpora.errors import UserError
from eval.doctor.suits import check
from intactkv.architecture import ARCHITECTURES
from quantization.grids.uniform import UniformGrid
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import load_quantized
from quantization.runs.dense import DenseCheckpoint, empty_model
from quantization.runs.opening import load_model
from quantization.runs.pipeline import quantize_checkpoint
from quantization.weights.gptq import GPTQ
from quantization.weights.rtn import RTN
from quantization.weights.spqr import SpQR

IDS = torch.arange(3, 43).view(2, 20)
RTN8 = Recipe(weights=RTN(UniformGrid(8, -1)))
DIFFERENT = "which a {} of this config.json does not have; the checkpoint and its configuration belong to different"
Tensors = dict[str, Tensor]

pytestmark = pytest.mark.usefixtures("no_grad")


def saved(directory: Path, model_type: str, **overrides: Any) -> Path:
    tiny_model(model_type, **overrides).save_pretrained(directory)
    return directory


def edit(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    file = directory / "model.safetensors"
    save_file({name: x.contiguous() for name, x in change(load_file(file)).items()}, file, {"format": "pt"})
    return directory


def configure(directory: Path, **changes: Any) -> Path:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


def cut(directory: Path, first: float, last: float = 1.0) -> Path:
    """From one share of the data to another there are zeros, as where a downloader wrote nothing."""
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    (header,) = struct.unpack("<Q", data[:8])
    start, stop = (8 + header + int(share * (len(data) - 8 - header)) for share in (first, last))
    data[start:stop] = bytes(stop - start)
    file.write_bytes(data)
    return directory


def emptied(*patterns: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        assert all(any(re.search(p, name) for name in tensors) for p in patterns)
        return {n: torch.zeros_like(x) if any(re.search(p, n) for p in patterns) else x for n, x in tensors.items()}

    return change


def full(directory: Path) -> Any:
    return load_model(directory, torch.float32, torch.device("cpu"))


def own(directory: Path) -> Tensor:
    """Logits of transformers' own model."""
    logits: Tensor = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(IDS).logits
    return logits


def look(directory: Path) -> None:
    """What the quantizer does before its work."""
    DenseCheckpoint(directory).weights(empty_model(directory)).check()


# files that were not fetched whole ------------------------------------------------------------------------------------


@every("model_type", list(ARCHITECTURES))
def test_zeros_in_the_place_of_half_the_data_are_refused(model_type: str, tmp_path_factory: Any) -> None:
    directory = cut(saved(tmp_path_factory.mktemp("half"), model_type), 0.5)
    lines = []
    for reads in (full, look):
        with pytest.raises(UserError, match=r"tensor '.*' holds nothing but zeros, .*not fetched whole; ") as said:
            reads(directory)
        lines.append(str(said.value))
    assert "\n" not in lines[0]


@every("part", [(0.0, 0.4), (0.3, 0.6), (0.6, 0.8), (0.85, 1.0)])
@every("model_type", ["llama", "phi3", "gemma2"])
def test_a_hole_in_the_data_is_refused_wherever_it_is(
    model_type: str, part: tuple[float, float], tmp_path_factory: Any
) -> None:
    directory = cut(saved(tmp_path_factory.mktemp("hole"), model_type), *part)
    for reads in (full, look):
        with pytest.raises(UserError, match="holds nothing but zeros"):
            reads(directory)


@every("model_type", list(ARCHITECTURES))
def test_what_transformers_starts_training_with_is_no_damage(model_type: str, tmp_path_factory: Any) -> None:
    """Biases of 0, and norms whose weights are 0 where they multiply by 1 + w."""
    directory = tmp_path_factory.mktemp("fresh")
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    made.save_pretrained(directory)
    look(directory)
    torch.testing.assert_close(full(directory)(IDS).logits, made(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "patterns"),
    [
        ("llama", (r"layers\.1\.self_attn\.o_proj", r"layers\.1\.mlp\.down_proj")),
        ("gpt2", (r"h\.1\.attn\.c_proj", r"h\.1\.mlp\.c_proj")),
        ("olmo2", (r"layers\.1\.post_attention_layernorm", r"layers\.1\.post_feedforward_layernorm")),
        ("mixtral", (r"layers\.1\..*experts\.2\.",)),
    ],
)
def test_blocks_that_pass_text_on_and_empty_experts_are_read_and_named(
    model_type: str, patterns: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As block expansion puts them in (LLaMA Pro), and as pruning leaves them."""
    directory = edit(saved(tmp_path / "model", model_type), emptied(*patterns))
    expected = own(directory)
    torch.testing.assert_close(full(directory)(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert "tensors of nothing but zeros, which may be meant: " in caplog.text
    rounded = load_quantized(quantize_checkpoint(directory, RTN8, tmp_path / "rtn")).state_dict()
    for name, exact in full(directory).state_dict().items():
        assert float((rounded[name] - exact).norm()) <= 0.02 * float(exact.norm())  # 8 bits; of zeros: zeros


def test_a_block_without_a_living_expert_is_refused(tmp_path: Path) -> None:
    directory = edit(saved(tmp_path, "mixtral"), emptied(r"layers\.1\..*experts\.\d+\.w1"))
    for reads in (full, look):
        with pytest.raises(UserError, match="holds nothing but zeros"):
            reads(directory)


@pytest.mark.parametrize("method", [GPTQ(UniformGrid(8, 32)), SpQR(UniformGrid(4, 16, "spqr-asym"))])
def test_weights_that_no_token_feeds_are_rounded_as_they_are(method: Any, tmp_path: Path) -> None:
    """Values whose bias takes every ReLU below 0: the grid is not to blame, and whatever the weights are is right."""

    def silent(tensors: Tensors) -> Tensors:
        name = "model.decoder.layers.1.fc1.bias"
        return tensors | {name: torch.full_like(tensors[name], -1e6)}

    directory = edit(saved(tmp_path / "model", "opt"), silent)
    segments = torch.randint(3, 101, (4, 32), generator=torch.Generator().manual_seed(0))
    out = quantize_checkpoint(directory, Recipe(weights=method), tmp_path / "out", segments=segments)
    name = "model.decoder.layers.1.fc2.weight"
    rounded, exact = load_quantized(out).state_dict()[name], load_file(directory / "model.safetensors")[name]
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.2


# files of another model -----------------------------------------------------------------------------------------------

# The model that the files are of, and what config.json then says.
OTHERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen2", {}, {"model_type": "llama"}),
    ("qwen3", {}, {"model_type": "llama"}),
    ("llama", {"attention_bias": True}, {"attention_bias": False}),
    ("gemma2", {}, {"model_type": "gemma"}),
    ("falcon", {"bias": True}, {"bias": False}),
    ("stablelm", {"use_qkv_bias": True}, {"use_qkv_bias": False}),
    ("stablelm", {"qk_layernorm": True}, {"qk_layernorm": False}),
    ("cohere", {"use_qk_norm": True}, {"use_qk_norm": False}),
    ("gpt_neox", {"attention_bias": True}, {"attention_bias": False}),
    ("opt", {"enable_bias": True}, {"enable_bias": False}),
]


@pytest.mark.parametrize(("model_type", "overrides", "said"), OTHERS)
def test_parameters_that_the_configuration_denies_are_refused(
    model_type: str, overrides: dict[str, Any], said: dict[str, Any], tmp_path: Path
) -> None:
    directory = configure(saved(tmp_path, model_type, **overrides), **said)
    kind = said.get("model_type", model_type)
    for reads in (full, look):
        with pytest.raises(UserError, match=DIFFERENT.format(kind)):
            reads(directory)
    damage = check(directory).damage
    assert damage is not None
    assert re.search(DIFFERENT.format(kind), damage)


# What lies in the files of whole models: what nobody computes with, or what changes nothing.
BESIDE: dict[str, Callable[[str], Tensors]] = {
    "rotation": lambda block: {f"{block}.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    "mask": lambda block: {f"{block}.attn.bias": torch.ones(1, 1, 9, 9), f"{block}.attn.masked_bias": torch.ones(())},
    "flat mask": lambda block: {f"{block}.attn.bias": torch.ones(9, 9).tril().bool()},
    "bias of zeros": lambda block: {f"{block}.self_attn.q_proj.bias": torch.zeros(64)},
    "KV scale": lambda block: {f"{block}.self_attn.k_scale": torch.ones(1)},
    "adapter": lambda block: {f"{block}.self_attn.q_proj.lora_A.default.weight": torch.ones(4, 64)},
    "score": lambda _: {"score.weight": torch.ones(2, 64)},
    "prediction": lambda _: {"model.mtp.layers.0.input_layernorm.weight": torch.ones(64)},
    "another model": lambda _: {"vision.encoder.layers.0.self_attn.q_proj.bias": torch.ones(64)},
    "partial sums": lambda block: {f"{block}.empty.weight": torch.ones(0)},
}  # fmt: skip


@pytest.mark.parametrize("kind", BESIDE)
def test_what_lies_beside_the_parameters_is_left(kind: str, tmp_path: Path) -> None:
    directory = saved(tmp_path, "llama")
    expected = own(directory)
    edit(directory, lambda tensors: tensors | BESIDE[kind]("model.layers.1"))
    assert torch.equal(own(directory), expected)
    assert torch.equal(full(directory)(IDS).logits, expected)
    look(directory)


def test_check_names_what_is_not_read(tmp_path: Path) -> None:
    directory = saved(tmp_path, "llama")
    assert "not read" not in check(directory).facts
    edit(directory, lambda tensors: tensors | BESIDE["score"](""))
    found = check(directory)
    assert (found.damage, found.facts["not read"]) == (None, "1 tensor of the files: score.weight")
