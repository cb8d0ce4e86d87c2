"""ZeroQuant's weights and inputs: the symmetric rule, widths by module, runs that cross rows, what files keep."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import every
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import architecture_of
from quantization.grids.flat import FlatTensor, quantize_flat
from quantization.grids.stored import restore
from quantization.grids.uniform import UniformGrid, quantize
from quantization.model.activations import Activations
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import InputQuantizer
from quantization.named import RECIPES, named_recipe
from quantization.recipes.recipe import Recipe, with_settings
from quantization.runs.checkpoint import load_quantized, read_cost
from quantization.runs.pipeline import quantize_checkpoint
from quantization.weights.rtn import RTN
from quantization.weights.zeroquant import ZeroQuant

ROW4 = UniformGrid(4, convention="deepspeed-sym")
SEGMENTS = torch.randint(4, 101, (2, 12), generator=torch.Generator().manual_seed(5))


pytestmark = pytest.mark.usefixtures("no_grad")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def first_block(model: PreTrainedModel) -> DecoderBlock:
    architecture = architecture_of(model.config)
    return DecoderBlock(0, architecture.blocks_of(model)[0], architecture, model.config)


def plain_runs(weight: Tensor, groups: int, bits: int) -> Tensor:
    """DeepSpeed's rule in float64: reshape the flat matrix, a scale per run, reshape back."""
    runs = weight.double().reshape(groups, -1)
    largest = runs.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, 2 * largest / 2**bits)
    return ((runs / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).reshape(weight.shape)


# the rule -------------------------------------------------------------------------------------------------------------


def test_a_group_on_the_grid_is_exact_and_the_positive_end_loses_a_step() -> None:
    c = 0.375
    group = torch.arange(-8.0, 8.0)[None] * c
    assert torch.equal(quantize_flat(group, 1, ROW4).dequantize(), group)
    group[0, -1] = 8 * c
    assert quantize_flat(group, 1, ROW4).dequantize()[0, -1] == 7 * c


@every("groups", [0, 64])
def test_rounding_is_odd_but_for_the_top_code_keeps_zeros_and_follows_powers_of_two(groups: int) -> None:
    def rounded(w: Tensor) -> Tensor:
        return (quantize_flat(w, groups, ROW4) if groups else quantize(w, ROW4)).dequantize()

    weight = noise(48, 64)
    weight[:, ::7] = 0
    weight[3] = 0
    found = rounded(weight)
    assert torch.isfinite(found).all()
    assert (found[weight == 0] == 0).all()
    assert torch.equal(rounded(weight * 0.25), found * 0.25)
    runs = weight.reshape(groups or len(weight), -1)
    steps = (8 * runs / runs.abs().amax(dim=1, keepdim=True)).nan_to_num().round().reshape(weight.shape)
    assert torch.equal(rounded(-weight) != -found, steps.abs() == 8)


# widths and runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_attention_has_a_width_of_its_own(
    model_type: str, group_size: int, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    block = first_block(tiny_model(model_type))
    grid = replace(ROW4, group_size=group_size)
    found = ZeroQuant(grid, attention_bits=8).quantize_block(block)
    wide = RTN(replace(grid, bits=8)).quantize_block(block)
    narrow = RTN(grid).quantize_block(block)
    assert found.keys() == block.linears().keys()
    for name, weight in found.items():
        of_its_width = wide if "attn" in name else narrow
        assert torch.equal(weight.dequantize(), of_its_width[name].dequantize()), name
        assert not torch.equal(wide[name].dequantize(), narrow[name].dequantize())


def test_as_many_runs_as_rows_are_the_rows() -> None:
    weight = noise(32, 48)
    flat, rows = quantize_flat(weight, 32, ROW4), quantize(weight, ROW4)
    assert torch.equal(flat.dequantize(), rows.dequantize())
    assert torch.equal(flat.runs.codes, rows.codes)


@pytest.mark.parametrize("groups", [1, 8, 48, 96])
def test_runs_that_cross_rows_are_those_of_the_flat_matrix(
    groups: int, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    weight = noise(96, 64)  # 8 runs are 12 rows each; 48: two; 96: one
    expected = plain_runs(weight, groups, 4)
    torch.testing.assert_close(quantize_flat(weight, groups, ROW4).dequantize().double(), expected, rtol=1e-6, atol=0)
    block = first_block(tiny_model("llama"))
    stored = ZeroQuant(ROW4, groups=32).quantize_block(block)
    for name, linear in block.linears().items():
        bits = 8 if "attn" in name else 4
        found = stored[name].dequantize().double()
        torch.testing.assert_close(found, plain_runs(linear.weight, 32, bits), rtol=1e-6, atol=0)
    # gate_proj: 96 × 64 values in 32 runs: three rows share a scale, which no grid of rows says.
    assert isinstance(stored["mlp.gate_proj"], FlatTensor)
    assert stored["mlp.gate_proj"].runs.scale.shape == (32, 1)
    ends_inside_rows = noise(14, 8)  # runs of three and a half rows
    found = quantize_flat(ends_inside_rows, 4, ROW4).dequantize().double()
    torch.testing.assert_close(found, plain_runs(ends_inside_rows, 4, 4), rtol=1e-6, atol=0)


@every("bits", [3, 4, 8])
def test_runs_survive_the_file(bits: int) -> None:
    stored = quantize_flat(noise(14, 10), 4, replace(ROW4, bits=bits))  # runs of 35: no multiple of eight
    again = restore("flat", stored.tensors(), stored.header())
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(again.dequantize(dtype), stored.dequantize(dtype))


def test_a_bfloat16_model_and_its_float32_copy_have_the_same_codes(tiny_model: Callable[..., PreTrainedModel]) -> None:
    half = tiny_model("llama", dtype=torch.bfloat16)
    exact = tiny_model("llama", dtype=torch.bfloat16).float()
    for method in (ZeroQuant(ROW4), ZeroQuant(ROW4, groups=32)):
        a, b = (method.quantize_block(first_block(model)) for model in (half, exact))
        for name in a:
            for part, tensor in a[name].tensors().items():
                assert torch.equal(tensor, b[name].tensors()[part]), (name, part)


# inputs ---------------------------------------------------------------------------------------------------------------


@every("bits", [4, 8])
def test_tokens_are_rounded_one_by_one(bits: int) -> None:
    quantizer = InputQuantizer(UniformGrid(bits, convention="deepspeed-sym"))
    x = noise(2, 9, 24)
    x[0, 0] *= 1000  # a pivot
    x[1, 3] = 0
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(quantizer(x[:, order]), quantizer(x)[:, order])
    expected = torch.stack([plain_runs(token[None], 1, bits)[0] for token in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(quantizer(x).double(), expected, rtol=1e-6, atol=0)


# checkpoints and recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_checkpoint_computes_what_the_plain_rule_computes_and_counts_its_bits(
    model_type: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path, model_type)
    truth = AutoModelForCausalLM.from_pretrained(source).eval()
    bits_of: list[tuple[int, int]] = []
    for block in architecture_of(truth.config).blocks_of(truth):
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                bits = 8 if "attn" in name else 4
                module.weight.data = plain_runs(module.weight, module.out_features, bits).float()
                bits_of.append((module.weight.numel(), bits * module.weight.numel() + 32 * module.out_features))
    out = quantize_checkpoint(source, Recipe(weights=ZeroQuant(ROW4)), tmp_path / "out")
    for kernel in (None, "unpack"):
        torch.testing.assert_close(load_quantized(out, kernel=kernel)(SEGMENTS).logits, truth(SEGMENTS).logits)
    expected = sum(size for _, size in bits_of) / sum(count for count, _ in bits_of)
    assert read_cost(out)["bits_per_weight"] == pytest.approx(expected)

    cross = quantize_checkpoint(source, Recipe(weights=ZeroQuant(ROW4, groups=32)), tmp_path / "cross")
    plain, packed_model = load_quantized(cross), load_quantized(cross, kernel="unpack")
    assert torch.equal(plain(SEGMENTS).logits, packed_model(SEGMENTS).logits)
    assert not torch.equal(plain(SEGMENTS).logits, load_quantized(out)(SEGMENTS).logits)


def test_without_input_quantizers_the_inputs_are_left_alone(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path, "llama")
    weights = ZeroQuant(replace(ROW4, bits=8))
    a16, a8 = (
        load_quantized(quantize_checkpoint(source, Recipe(weights=weights, activations=inputs), tmp_path / name))
        for name, inputs in (("a16", None), ("a8", Activations(replace(ROW4, bits=8))))
    )
    assert not any(name.endswith(".input") for name, _ in a16.named_modules())
    assert sum(name.endswith("input.quantizer") for name, _ in a8.named_modules()) == 3 * 4
    error = (a16(SEGMENTS).logits - a8(SEGMENTS).logits).norm() / a16(SEGMENTS).logits.norm()
    assert 1e-4 < float(error) < 0.2


def test_labels_say_both_widths_and_the_cut() -> None:
    assert named_recipe("zeroquant-w4-8a8").label() == "zeroquant-w4-8row-a8"
    assert named_recipe("zeroquant-w4-8a16").label() == "zeroquant-w4-8row"
    assert named_recipe("zeroquant-w8a8").label() == "zeroquant-w8row-a8"
    assert named_recipe("zeroquant-w4a4-lkd").label() == "zeroquant-w4row-a4-lkd"
    published = with_settings(named_recipe("zeroquant-w4-8a8"), ["weights.groups=4096"])
    assert published.label() == "zeroquant-w4-8x4096-a8"
    assert Recipe(weights=ZeroQuant(replace(ROW4, group_size=64))).label() == "zeroquant-w4-8g64"


def test_the_rows_are_the_published_recipes() -> None:
    widths = {"zeroquant-w8a8": (8, 8, 8), "zeroquant-w4-8a16": (4, 8, None), "zeroquant-w4-8a8": (4, 8, 8),
              "zeroquant-w4a4": (4, 4, 4)}  # fmt: skip
    for name, (mlp, attention, inputs) in widths.items():
        recipe, distilled = named_recipe(name), named_recipe(f"{name}-lkd")
        assert recipe.weights == ZeroQuant(UniformGrid(mlp, convention="deepspeed-sym"), attention)
        grid = None if recipe.activations is None else recipe.activations.grid
        assert grid == (None if inputs is None else UniformGrid(inputs, convention="deepspeed-sym"))
        assert not recipe.calibrates
        assert distilled.calibrates
        assert replace(distilled, tuning=None) == recipe
    assert not any(row.recipe.attention for name, row in RECIPES.items() if name.startswith("zeroquant"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["weights.grid.bits=2"], "weights.grid.bits=2"),
        (["weights.attention_bits=16"], "weights.attention_bits=16"),
        (["weights.groups=-1"], "weights.groups=-1"),
        (["weights.grid.group_size=32", "weights.groups=8"], "both say how"),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_built(settings: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        with_settings(named_recipe("zeroquant-w4-8a8"), settings)


def test_groups_that_do_not_fill_a_linear_are_refused_before_any_work(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path, "llama")
    for method, message in (
        (ZeroQuant(ROW4, groups=96), r"layers\.0\.self_attn\.q_proj: its 64 × 64 values make no 96 runs"),
        (ZeroQuant(replace(ROW4, group_size=48)), "group_size=48 does not divide"),
    ):
        with pytest.raises(UserError, match=message):
            quantize_checkpoint(source, Recipe(weights=method), tmp_path / "out")
        assert not (tmp_path / "out.partial").exists()
