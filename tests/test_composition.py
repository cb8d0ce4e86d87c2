"""Methods together: ranges of rescaled blocks, prefixes that calibration runs behind, rotations that stay as they were,
what is refused before any work."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration import calibrated
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from corpora.errors import UserError
from eval.inside.distances import layerwise_distance, linear_statistics
from eval.inside.pairs import Pair
from eval.perplexity import Windows
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.prefix import Prefix, build_prefix
from quantization.grids.uniform import UniformGrid, fake_quantize
from quantization.hadamard import Plan
from quantization.kv_cache import StaticPerHead
from quantization.model import online
from quantization.model.activations import Activations
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import put_in_front
from quantization.model.online import OnlineRotation
from quantization.model.rescale import Rescaling
from quantization.recipes.recipe import Calibration, Recipe
from quantization.runs.checkpoint import block_file, load_quantized, read_block
from quantization.runs.pipeline import quantize_checkpoint
from quantization.runs.plan import plan_run
from quantization.runs.sums import add_sum
from quantization.transforms.rotate import Rotate
from quantization.transforms.smooth import Smooth
from quantization.weights.awq import AWQ
from quantization.weights.omniquant import OmniQuant
from quantization.weights.rtn import RTN

ROW = UniformGrid(8, -1, "gptq-asym")
SEGMENTS = torch.randint(4, 101, (4, 24), generator=torch.Generator().manual_seed(0))
PREFIX = torch.tensor([1, 7, 9])
CPU = torch.device("cpu")


@pytest.fixture
def source(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, "llama", num_key_value_heads=4)


def dense(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory).eval().requires_grad_(False)


def values_of(model: PreTrainedModel, layer: int) -> Tensor:
    """What v_proj puts out for the calibration text, (N, T, heads, D)."""
    seen: list[Tensor] = []
    projection = model.get_submodule(f"model.layers.{layer}.self_attn.v_proj")
    handle = projection.register_forward_hook(lambda _m, _a, output: seen.append(output))
    model(SEGMENTS)
    handle.remove()
    return seen[0].unflatten(-1, (4, 16))


# ranges and rescaling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [AWQ(UniformGrid(8, 32)), OmniQuant(UniformGrid(8, 32, "intactkv-asym"), let=True, epochs=1)],
    ids=["awq", "let"],
)
def test_static_kv_ranges_are_those_of_the_rescaled_block(weights: Any, source: Path, tmp_path: Path) -> None:
    recipe = Recipe(weights=weights, activations=Activations(ROW, static=True))
    out = quantize_checkpoint(source, recipe, tmp_path / "out", segments=SEGMENTS)
    block = read_block(block_file(out, 0))
    assert any(step.producer == "self_attn.v_proj" for step in block.rescalings)
    scale = torch.ones(64)
    for step in block.rescalings:
        if step.producer == "self_attn.v_proj":
            scale = scale * step.scale
    ranges = calibrated(out, StaticPerHead(8), tmp_path / "kv.safetensors", SEGMENTS)[0]["values_scale"].flatten() * 255
    values = values_of(load_quantized(out), 0)
    spread = values.amax((0, 1, 3)).clamp_min(0) - values.amin((0, 1, 3)).clamp_max(0)
    torch.testing.assert_close(ranges, spread, rtol=1e-4, atol=0)
    values = values_of(dense(source), 0) / scale.view(4, 16)
    spread = values.amax((0, 1, 3)).clamp_min(0) - values.amin((0, 1, 3)).clamp_max(0)
    torch.testing.assert_close(ranges, spread, rtol=0.05, atol=0)  # weights and inputs are rounded to 8 bits
    # o_proj reads the rescaled values: its range is theirs, not that of the checkpoint before.
    inputs = block.within("model.layers.0")["self_attn.o_proj.input.quantizer.scale"]
    seen: list[Tensor] = []
    model = dense(source)
    model.get_submodule("model.layers.0.self_attn.o_proj").register_forward_pre_hook(
        lambda _m, args: seen.append(args[0] / scale)
    )
    model(SEGMENTS)
    low, high = float(seen[0].min().clamp_max(0)), float(seen[0].max().clamp_min(0))
    assert float(inputs) == pytest.approx((high - low) / 255, rel=1e-4)


def test_scales_do_not_move_through_an_online_rotation(source: Path, tmp_path: Path) -> None:
    for smooth, mixing in ((Smooth(values=True), "auto"), (Smooth(down=True), "none")):
        recipe = Recipe((Rotate(head_mix=mixing), smooth), RTN(ROW))
        with pytest.raises(UserError, match="a rotation stands between"):
            quantize_checkpoint(source, recipe, tmp_path / f"refused-{mixing}", segments=SEGMENTS)


def test_rescaling_looks_at_what_stands_in_front_of_the_consumer(source: Path) -> None:
    model = dense(source)
    architecture = architecture_of(model.config)
    block = DecoderBlock(0, architecture.blocks_of(model)[0], architecture, model.config)
    step = Rescaling("mlp.up_proj", ("mlp.down_proj",), torch.full((96,), 2.0))
    block.rescale(step)
    put_in_front(block.module, ("mlp.down_proj",), OnlineRotation.of(96))
    with pytest.raises(UserError, match=r"up_proj cannot move to mlp\.down_proj"):
        block.rescale(step)
    assert len(block.rescalings) == 1


# prefixes that calibration runs behind --------------------------------------------------------------------------------


def trained(source: Path) -> Prefix:
    """A prefix whose keys and values are not those of its tokens."""
    prefix = build_prefix(dense(source), PREFIX)
    generator = torch.Generator().manual_seed(1)
    return replace(
        prefix,
        keys=tuple(k + torch.randn(k.shape, generator=generator) for k in prefix.keys),
        values=tuple(3 * v for v in prefix.values),
        calibrated={"how": "by hand"},
    )


def test_calibration_behind_a_trained_prefix_reads_its_keys_and_values(source: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        weights=RTN(ROW), activations=Activations(ROW, static=True), prefix="file", calibrate_behind_prefix=True
    )
    prefix = trained(source)
    out = quantize_checkpoint(source, recipe, tmp_path / "out", segments=SEGMENTS, behind=prefix)
    by_ids = quantize_checkpoint(source, recipe, tmp_path / "ids", segments=SEGMENTS, behind=PREFIX)
    # The first block's text meets nothing quantized in front of it: o_proj's input is full precision's.
    model, seen = dense(source), list[Tensor]()
    model.get_submodule("model.layers.0.self_attn.o_proj").register_forward_pre_hook(
        lambda _m, args: seen.append(args[0])
    )
    attach(model, prefix).feed(SEGMENTS)
    low, high = float(seen[0].min().clamp_max(0)), float(seen[0].max().clamp_min(0))
    name = "model.layers.0.self_attn.o_proj.input.quantizer.scale"
    found = read_block(block_file(out, 0)).parameters[name]
    assert float(found) == pytest.approx((high - low) / 255, rel=1e-4)
    assert float(read_block(block_file(by_ids, 0)).parameters[name]) != pytest.approx(float(found), rel=1e-2)

    attach(load_quantized(out), prefix)
    with pytest.raises(UserError, match="other keys and values"):
        attach(load_quantized(out), build_prefix(dense(source), PREFIX))


def test_a_plan_hands_a_trained_prefix_to_calibration(
    tiny_checkpoint: Callable[..., Path], intactkv_root: Path
) -> None:
    source, text = tiny_checkpoint(intactkv_root, "llama"), intactkv_root / "text.txt"
    text.write_text("the quick brown fox jumps over it " * 60)
    file = intactkv_root / "trained.safetensors"
    trained(source).save(file)
    recipe = Recipe(
        weights=RTN(ROW),
        activations=Activations(ROW, static=True),
        prefix=str(file),
        calibration=Calibration(str(text), samples=2, length=32),
        calibrate_behind_prefix=True,
    )
    plan = plan_run(source, recipe, device=CPU)
    assert isinstance(plan.behind, Prefix)
    assert torch.isfinite(plan.load().feed(SEGMENTS).logits).all()
    other = replace(trained(source), values=build_prefix(dense(source), PREFIX).values)
    other.save(file)
    assert plan_run(source, recipe, device=CPU).describe()["made_of"] != plan.describe()["made_of"]


def test_a_trained_prefix_of_another_basis_is_refused_before_any_work(
    tiny_checkpoint: Callable[..., Path], intactkv_root: Path
) -> None:
    source, file = tiny_checkpoint(intactkv_root, "llama"), intactkv_root / "plain.safetensors"
    replace(build_prefix(dense(source), PREFIX), calibrated={"best_step": 1}).save(file)
    with pytest.raises(UserError, match="basis is 'plain' in the prefix"):
        plan_run(source, Recipe((Rotate(),), RTN(ROW), prefix=str(file)), device=CPU)
    assert not (intactkv_root / "modelzoo" / "quantized").exists()


# rotations and ranges in a checkpoint ---------------------------------------------------------------------------------


def test_a_checkpoint_keeps_its_rotations_whatever_is_planned_later(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = quantize_checkpoint(source, Recipe((Rotate(),)), tmp_path / "out")
    expected = load_quantized(out)(SEGMENTS).logits
    monkeypatch.setattr(online, "plan", lambda size, kind="auto": Plan("hartley", (size,), 1))
    assert torch.equal(load_quantized(out)(SEGMENTS).logits, expected)


@pytest.mark.parametrize("static", [True, False])
def test_a_checkpoint_without_its_ranges_ends_in_one_line(static: bool, source: Path, tmp_path: Path) -> None:
    recipe = Recipe(weights=RTN(ROW), activations=Activations(ROW, static=static))
    out = quantize_checkpoint(source, recipe, tmp_path / "out", segments=SEGMENTS if static else None)
    file = block_file(out, 1)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    del tensors[f"model.layers.1.mlp.down_proj.input.quantizer.{'scale' if static else 'low'}"]
    save_file(tensors, file, metadata)
    add_sum(file)  # or the one of before would tell first
    with pytest.raises(UserError, match=r"lacks the ranges (scale|low) of the input of mlp\.down_proj"):
        load_quantized(out)


# measured errors ------------------------------------------------------------------------------------------------------


def test_statistics_of_a_smoothed_model_with_rounded_inputs(
    tiny_checkpoint: Callable[..., Path], intactkv_root: Path
) -> None:
    source, text = tiny_checkpoint(intactkv_root, "llama"), intactkv_root / "text.txt"
    text.write_text("the quick brown fox jumps over it " * 60)
    calibration = Calibration(str(text), samples=2, length=32)
    exact = Recipe((Smooth(),), calibration=calibration)
    coarse = replace(exact, activations=Activations(UniformGrid(4, -1, "gptq-asym")))
    windows = Windows(torch.tensor([1]), SEGMENTS[:1], False)
    for recipe in (exact, coarse):
        plan = plan_run(source, recipe, device=CPU)
        loaded, twin = plan.load(), plan.twin()
        pair = Pair("none", loaded, attach(twin, None))
        rows = {(row["block"], row["linear"]): row for row in linear_statistics(pair, windows)}
        assert all(row["mse_w"] == 0 for row in rows.values())  # the twin is smoothed, too
        curves, _ = layerwise_distance(pair, windows)
        first = next(c for c in curves if (c["curve"], c["block"], c["linear"]) == ("input", 0, "self_attn.q_proj"))
        assert first["mse"] < 1e-10
        row = rows[0, "self_attn.q_proj"]
        if recipe is exact:
            assert row["mse_x"] == 0
            continue
        seen: list[Tensor] = []
        twin.get_submodule("model.layers.0.input_layernorm").register_forward_hook(
            lambda _m, _a, output, seen=seen: seen.append(output)
        )
        twin(torch.cat([windows.lead, windows.fed[0]])[None])
        error = (fake_quantize(seen[0], UniformGrid(4, -1, "gptq-asym")) - seen[0]).double().square().mean()
        assert row["mse_x"] == pytest.approx(float(error), rel=1e-4)
