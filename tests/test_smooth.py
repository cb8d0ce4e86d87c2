"""SmoothQuant: exact without rounding, in every family; the paper's formula; better than rounding alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import plain_cache, random_ids
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from corpora.errors import UserError
from eval.__main__ import main
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from quantization.grids.uniform import UniformGrid
from quantization.model.activations import Activations
from quantization.model.blocks import DecoderBlock
from quantization.model.stream import CalibrationStream
from quantization.model.walk import Walk
from quantization.named import named_recipe
from quantization.recipes.recipe import Recipe, with_settings
from quantization.runs.checkpoint import block_file, load_quantized, read_block
from quantization.runs.pipeline import quantize_checkpoint
from quantization.runs.plan import plan_run
from quantization.transforms.smooth import Smooth, input_maxima, smoothing_scale
from quantization.weights.rtn import RTN

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "opt")
SEGMENTS = torch.randint(4, 101, (3, 12), generator=torch.Generator().manual_seed(5))
W8A8 = named_recipe("smoothquant-w8a8")


pytestmark = pytest.mark.usefixtures("no_grad")


def first_block(model: PreTrainedModel, prefix: Tensor | None = None, segments: Tensor = SEGMENTS) -> DecoderBlock:
    architecture = architecture_of(model.config)
    module = architecture.blocks_of(model)[0]
    block = DecoderBlock(
        0, module, architecture, model.config, CalibrationStream(model, architecture, segments, prefix)
    )
    assert block.stream is not None
    block.stream.seed(block)
    return block


def maxima(block: DecoderBlock) -> dict[tuple[str, ...], tuple[Tensor, Tensor]]:
    """Per set of linears: the largest |input| and the largest |weight| of every channel."""
    inputs = input_maxima(block)
    return {
        names: (
            inputs[names[0]],
            torch.cat([block.module.get_parameter(f"{name}.weight") for name in names]).abs().amax(0),
        )
        for names in block.architecture.linears
    }


def smoothed_sets(block: DecoderBlock) -> list[tuple[str, ...]]:
    return [feed.consumers for feed in block.feeds() if feed.producer not in block.linears()]


def assert_near(ours: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert float((ours - expected).abs().max()) <= relative * float(expected.abs().max())


def smoothed(model: PreTrainedModel, step: Smooth, directory: Path) -> PreTrainedModel:
    """Through the pipeline and a checkpoint."""
    model.save_pretrained(directory / "dense")
    out = quantize_checkpoint(directory / "dense", Recipe((step,)), directory / "smooth", segments=SEGMENTS)
    return load_quantized(out)


# exact ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    "step",
    [Smooth(), Smooth(0.8), Smooth(values=True, down=True), Smooth(0.7, power_of_two=True)],
    ids=["0.5", "0.8", "with v and up", "powers of two"],
)
def test_smoothing_alone_leaves_the_logits_as_they_were(
    model_type: str, step: Smooth, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model(model_type)
    ours, ids = smoothed(model, step, tmp_path), random_ids(20)[None]
    assert_near(ours(ids).logits, model(ids).logits)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, ours.get_parameter(name))]
    ends = [name for name in changed if not name.startswith(architecture_of(model.config).blocks)]
    assert not ends  # nothing outside the blocks
    assert len(changed) >= 3 * 6  # two norms, q, k, v and at least fc1 in each of three blocks
    assert any("o_proj" in name or "out_proj" in name for name in changed) == step.values
    assert any("down_proj" in name or "fc2" in name for name in changed) == step.down


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_norm_to_linear_folding_leaves_keys_and_values_as_they_were(
    model_type: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model, ids = tiny_model(model_type), random_ids(20)[None]
    ours = smoothed(model, Smooth(0.7), tmp_path)
    for layer, expected in zip(plain_cache(ours, ids).layers, plain_cache(model, ids).layers, strict=True):
        assert_near(layer.keys, expected.keys)
        assert_near(layer.values, expected.values)
    assert not Smooth().changes_kv
    assert Smooth(values=True).changes_kv


def test_powers_of_two_are_exact_in_bfloat16(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """Other scales round every weight once more."""
    for step, exact in ((Smooth(power_of_two=True), True), (Smooth(), False)):
        block = first_block(tiny_model("llama", dtype=torch.bfloat16))
        before = {name: p.clone() for name, p in block.module.named_parameters()}
        step.transform_block(block)
        assert all((s.scale.log2() == s.scale.log2().round()).all() for s in block.rescalings) == exact
        norm, weight = "input_layernorm.weight", "self_attn.q_proj.weight"
        product = block.module.get_parameter(weight).double() * block.module.get_parameter(norm).double()
        assert torch.equal(product, before[weight].double() * before[norm].double()) == exact
        assert block.module.get_parameter(weight).dtype == torch.bfloat16


# the formula ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_maxima_afterwards_are_what_the_formula_says(
    model_type: str, alpha: float, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    """a becomes (a w)^(1−α), w becomes (a w)^α: equal at 0.5; at 1 all inputs have the maximum 1, at 0 all columns."""
    block = first_block(tiny_model(model_type))
    before = maxima(block)
    Smooth(alpha).transform_block(block)
    after = maxima(block)
    for names in smoothed_sets(block):
        product = before[names][0] * before[names][1]
        torch.testing.assert_close(after[names][0], product ** (1 - alpha), rtol=1e-5, atol=0)
        torch.testing.assert_close(after[names][1], product**alpha, rtol=1e-5, atol=0)
    for names in set(before) - set(smoothed_sets(block)):
        torch.testing.assert_close(after[names], before[names], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_with_v_and_up_every_set_is_balanced(model_type: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    """The query heads of a KV head share its scales, so their largest maxima meet."""
    block = first_block(tiny_model(model_type))
    Smooth(0.5, values=True, down=True).transform_block(block)
    assert len(block.rescalings) == 4
    for names, (inputs, columns) in maxima(block).items():
        if len(names) == 1 and "attn" in names[0] and model_type == "llama":  # 4 query heads over 2 KV heads of 16
            inputs, columns = (x.view(2, 2, 16).amax(1).flatten() for x in (inputs, columns))
        torch.testing.assert_close(inputs, columns, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [Smooth(), Smooth(values=True, down=True)], ids=["norms", "with v and up"])
def test_smoothing_what_is_smooth_changes_nothing(step: Smooth, tiny_model: Callable[..., PreTrainedModel]) -> None:
    block = first_block(tiny_model("qwen2"))
    step.transform_block(block)
    count = len(block.rescalings)
    step.transform_block(block)
    for again in block.rescalings[count:]:
        torch.testing.assert_close(again.scale, torch.ones_like(again.scale), rtol=1e-4, atol=0)


def test_channels_that_are_always_zero_get_finite_scales(tiny_model: Callable[..., PreTrainedModel]) -> None:
    block = first_block(tiny_model("llama"))
    block.module.input_layernorm.weight[3] = 0
    for name in ("q_proj", "k_proj", "v_proj"):
        block.module.get_submodule(f"self_attn.{name}").weight[:, 5] = 0
    feed, inputs = block.feeds()[0], input_maxima(block)
    scale = smoothing_scale(block, feed, inputs, 0.5)
    columns = torch.cat([block.module.get_parameter(f"{name}.weight") for name in feed.consumers]).abs().amax(0)
    assert float(scale[3]) == pytest.approx(float(1e-5 / columns[3]) ** 0.5, rel=1e-5)
    assert float(scale[5]) == pytest.approx(float(inputs[feed.consumers[0]][5] / 1e-5) ** 0.5, rel=1e-5)
    assert float(smoothing_scale(block, feed, inputs, 1.0).min()) == pytest.approx(1e-5)


def test_statistics_are_the_largest_inputs_that_a_plain_model_sees(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    model = tiny_model("opt")
    seen: list[Tensor] = []
    hook = model.get_submodule("model.decoder.layers.0.fc1").register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].reshape(-1, 64).abs().amax(0))
    )
    for segment in SEGMENTS:
        model(segment[None])
    hook.remove()
    torch.testing.assert_close(input_maxima(first_block(model))["fc1"], torch.stack(seen).amax(0))


# outliers and pivots --------------------------------------------------------------------------------------------------


def with_outlier(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    """Channel 7 of what the first norm puts out is `factor` times larger; the weights do not make up for it."""
    model.get_submodule("model.layers.0.input_layernorm").weight[7] *= factor
    return model


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_an_outlier_channel_hurts_less_than_half_after_smoothing(
    model_type: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    errors = {}
    for smooth in (False, True):
        block = first_block(with_outlier(tiny_model(model_type), 100))
        query = block.linears()["self_attn.q_proj"]
        exact = torch.cat([query(x) for x in Walk(block).inputs("self_attn.q_proj")])
        if smooth:
            Smooth().transform_block(block)
        quantized = RTN(UniformGrid(8, convention="smoothquant-sym")).quantize_block(block)["self_attn.q_proj"]
        inputs = Activations(UniformGrid(8, convention="smoothquant-sym")).fit_block(block)[block.feeds()[0].consumers]
        rounded = torch.cat([inputs(x) for x in Walk(block).inputs("self_attn.q_proj")])
        ours = torch.nn.functional.linear(rounded, quantized.dequantize(), query.bias)
        errors[smooth] = float((ours - exact).norm())
    assert errors[True] < 0.5 * errors[False]


def test_behind_a_prefix_the_statistics_know_nothing_of_its_tokens(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """They are a plain model's over [prefix + text] without the prefix's positions, where the prefix would count."""
    model, name = tiny_model("llama"), "self_attn.q_proj"
    model.get_submodule("model.layers.0.input_layernorm").weight.fill_(1)
    model.get_input_embeddings().weight[1] = 0
    model.get_input_embeddings().weight[1, 7] = 1  # token 1 is a pivot: √64 in channel 7 and nothing else
    seen: list[Tensor] = []
    hook = model.get_submodule(f"model.layers.0.{name}").register_forward_pre_hook(
        lambda _module, args: seen.append(args[0][0].abs())
    )
    text = torch.cat([torch.ones(3, 1, dtype=torch.long), SEGMENTS], dim=1)
    for row in text:
        model(row[None])
    hook.remove()
    inputs = torch.stack(seen)  # (3, 13, 64)
    behind = input_maxima(first_block(model, torch.tensor([1])))[name]
    torch.testing.assert_close(behind, inputs[:, 1:].amax((0, 1)))
    in_text = input_maxima(first_block(model, segments=text))[name]
    torch.testing.assert_close(in_text, inputs.amax((0, 1)))
    assert float(in_text[7]) == pytest.approx(8, rel=1e-4)
    assert float(behind[7]) < 6


# in a recipe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("behind", [False, True], ids=["plain", "behind"])
def test_the_prefix_is_what_the_smoothed_full_precision_model_writes(
    model_type: str, values: bool, behind: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With v → o the values are in another basis, and the dense model's own prefix is refused."""
    monkeypatch.setenv("INTACTKV_ROOT", str(tmp_path))
    dense = tiny_checkpoint(tmp_path, model_type, max_position_embeddings=1024)  # the recipe's pieces have 512 tokens
    recipe = replace(W8A8, transforms=(Smooth(values=values),), prefix="bos", calibrate_behind_prefix=behind)
    plan = plan_of(dense, recipe, monkeypatch)
    prefix = plan.intact_prefix()
    plain = build_prefix(AutoModelForCausalLM.from_pretrained(dense), prefix.ids)
    scales = [
        {step.producer: step.scale for step in read_block(block_file(plan.written(recipe), i)).rescalings}
        for i in range(3)
    ]
    for i, (value, expected) in enumerate(zip(prefix.values, plain.values, strict=True)):
        if values:
            heads = expected.shape[1]
            expected = expected / scales[i]["self_attn.v_proj"].view(heads, 1, -1)
        assert_near(value, expected, 1e-4)
        assert_near(prefix.keys[i], plain.keys[i], 1e-4)
    model = load_quantized(plan.written(recipe))
    attach(model, prefix)
    if values:
        with pytest.raises(UserError, match="basis"):
            plain.check(model)
    else:
        assert plan.basis == "plain"


def plan_of(dense: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("quantization.runs.plan.calibration_segments", lambda *_, **__: SEGMENTS)
    monkeypatch.setattr("quantization.runs.identities.text_identity", lambda *_, **__: {"corpus": "of the test"})
    return plan_run(dense, recipe, device=torch.device("cpu"))


def test_smoothed_and_plain_rows_are_published_pairs() -> None:
    """The row without smoothing is the same recipe but for the transform."""
    for bits in ("w8a8", "w6a6", "w4a4"):
        for version in ("", "-qllm"):
            smooth, plain = named_recipe(f"smoothquant-{bits}{version}"), named_recipe(f"rtn-{bits}{version}")
            assert replace(smooth, transforms=()) == plain
            assert (smooth.attention is None) == (smooth.kv_cache is None) == (version == "")


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["do_layer_norm_before", "layer_norm_elementwise_affine"])
def test_norms_that_take_no_scales_are_refused_before_any_work(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, option: str
) -> None:
    """They stand behind what they should feed, or have no weights."""
    dense = tiny_checkpoint(tmp_path, "opt", **{option: False})
    with pytest.raises(UserError, match=option):
        quantize_checkpoint(dense, W8A8, tmp_path / "q", segments=SEGMENTS)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_zero_to_one_is_refused(alpha: float) -> None:
    with pytest.raises(UserError, match=rf"alpha={alpha:g} is not allowed; give 0 .* to 1"):
        Smooth(alpha)


def test_the_fields_of_a_transform_are_set_by_its_name() -> None:
    changed = with_settings(W8A8, ["transforms.smooth.alpha=0.75", "transforms.smooth.values=true"])
    assert changed.transforms == (Smooth(0.75, values=True),)
    for setting, said in (
        ("transforms.rotate.seed=1", "there is no 'rotate' in this recipe; it has smooth"),
        ("transforms.smooth.beta=1", "Smooth has no field 'beta'; it has alpha, values, down"),
        ("transforms.smooth=1", r"name one of its fields, for example transforms\.smooth\.alpha"),
        ("transforms.smooth.alpha=2", "alpha=2 is not allowed"),
    ):
        with pytest.raises(UserError, match=said):
            with_settings(W8A8, [setting])
    with pytest.raises(UserError, match="nothing below that field in this recipe"):  # without transforms
        with_settings(named_recipe("rtn-w8a8"), ["transforms.smooth.alpha=1"])


def test_static_ranges_take_the_options_of_calibration(
    run_main: Callable[..., tuple[int, str, str]], tiny_checkpoint: Callable[..., Path], intactkv_root: Path
) -> None:
    """RTN calibrates on nothing, until its activations are static."""
    dense = tiny_checkpoint(intactkv_root, "llama")
    text = intactkv_root / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    call = ("ppl", "--model", dense, "--recipe", "rtn-w8a8", "--corpus", text, "--window", 32, "--limit", 2, "--device",
            "cpu", "--calibration", text, "--calibration-samples", 4, "--calibration-length", 16)  # fmt: skip
    code, _, said = run_main(main, *call)
    assert code == 2
    assert "calibrates on no text" in said
    code, out, said = run_main(main, *call, "--set", "activations.static=true")
    assert code == 0, said
    assert "rtn-w8row-a8static" in out
