"""OmniQuant: learned clipping, learned equivalent scales, their training, and the merged result."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import every
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from corpora.errors import UserError
from corpora.json_files import read_json
from intactkv.architecture import architecture_of
from quantization.grids.stored import restore
from quantization.grids.uniform import QuantizedTensor, UniformGrid, encode, split_groups
from quantization.model.blocks import DecoderBlock
from quantization.model.rescale import Rescaling
from quantization.model.stream import CalibrationStream
from quantization.named import named_recipe
from quantization.recipes.recipe import Calibration, Recipe, with_settings
from quantization.runs.checkpoint import MANIFEST, block_file, load_quantized, read_block
from quantization.runs.pipeline import quantize_checkpoint
from quantization.weights.omniquant import Learned, OmniQuant, clipped_fit, fake_quantize, start, student
from quantization.weights.omniquant_let import Pair, initial_pairs, prefix_in_basis, transformed
from quantization.weights.rtn import RTN

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "opt")
CONVENTIONS = ("gptq-asym", "intactkv-asym", "quarot-sym")
W3 = UniformGrid(3, 16, "intactkv-asym")
PREFIX = torch.tensor([1, 40, 7])
SEGMENTS = torch.randint(4, 101, (3, 12), generator=torch.Generator().manual_seed(5))
CLIP = 1 / (1 + torch.exp(torch.tensor(-4.0, dtype=torch.float64)))  # σ(4)


pytestmark = pytest.mark.usefixtures("no_grad")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def first_block(model: PreTrainedModel, prefix: Tensor | None = None, disturb: float = 0.05) -> DecoderBlock:
    """The first block as the pipeline hands it over; what stands for X_q is X_fp plus some noise."""
    architecture = architecture_of(model.config)
    stream = CalibrationStream(model, architecture, SEGMENTS, prefix)
    block = DecoderBlock(0, architecture.blocks_of(model)[0], architecture, model.config, stream)
    stream.seed(block)
    stream.full = list(stream.hidden)
    stream.targets = list(stream.outputs(block, stream.full))
    stream.hidden = [x + disturb * noise(*x.shape, seed=i).to(x.dtype) for i, x in enumerate(stream.full)]
    return block


def stream_of(block: DecoderBlock) -> CalibrationStream:
    assert block.stream is not None
    return block.stream


def moved(pairs: tuple[Pair, ...], spread: float = 0.5) -> tuple[Pair, ...]:
    """The pairs, with other scales and shifts."""
    return tuple(
        replace(
            pair,
            log_scale=pair.log_scale + spread * noise(*pair.log_scale.shape, seed=i),
            shift=None if pair.shift is None else pair.shift + spread * noise(*pair.shift.shape, seed=10 + i),
        )
        for i, pair in enumerate(pairs)
    )


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The mean over samples of the mean squared difference, in float64."""
    return float(torch.stack([(x.double() - y.double()).square().mean() for x, y in zip(a, b, strict=True)]).mean())


def assert_near(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * float(expected.abs().max()))


# the slow truth -------------------------------------------------------------------------------------------------------


def plain_grid(values: list[float], upper: float, lower: float, bits: int) -> tuple[float, int]:
    """h and z of one group, whose range shrinks to upper·max and lower·min and contains 0."""
    high, low = max(upper * max(values), 0.0), min(lower * min(values), 0.0)
    scale = min(max((high - low) / (2**bits - 1), 1e-5), 1e4)
    return scale, round(-low / scale)


def plain_clipping(weight: Tensor, uppers: Tensor, lowers: Tensor, bits: int, size: int) -> Tensor:
    """ŵ of every weight, number by number, with the shares σ(γ) (out, groups) of the range that are kept."""
    result = torch.empty(weight.shape, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for group in range(weight.shape[1] // size):
            columns = range(group * size, (group + 1) * size)
            values = [float(weight[row, c]) for c in columns]
            scale, zero = plain_grid(values, float(uppers[row, group]), float(lowers[row, group]), bits)
            for c, value in zip(columns, values, strict=True):
                result[row, c] = scale * (min(max(round(value / scale) + zero, 0), 2**bits - 1) - zero)
    return result


def straight_through(weight: Tensor, upper: Tensor, lower: Tensor, bits: int, size: int) -> Tensor:
    """The same in float64 as autograd sees it, `round` being the identity to gradients."""

    def rounded(x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()

    groups = weight.unflatten(-1, (-1, size))
    high = (torch.sigmoid(upper) * groups.amax(-1, keepdim=True)).clamp_min(0)
    low = (torch.sigmoid(lower) * groups.amin(-1, keepdim=True)).clamp_max(0)
    scale = (high - low) / (2**bits - 1)
    zero, top = rounded(-low / scale), 2.0**bits - 1
    codes = rounded(groups / scale) + zero
    codes = torch.where(codes < 0, 0.0, torch.where(codes > top, top, codes))  # releases differ in clamp's gradient
    return (scale * (codes - zero)).flatten(-2)


# learned clipping -----------------------------------------------------------------------------------------------------


@every("bits", [2, 3, 4])
def test_clipped_weights_are_those_of_the_paper_number_by_number(bits: int) -> None:
    weight = 0.1 * noise(6, 32) + torch.linspace(-0.2, 0.2, 6)[:, None]  # some groups have one sign only
    upper, lower = 2 * noise(6, 2, 1, seed=1), 2 * noise(6, 2, 1, seed=2)
    found = fake_quantize(weight, (upper, lower), UniformGrid(bits, 16, "intactkv-asym"))
    shares = [torch.sigmoid(gamma.double())[..., 0] for gamma in (upper, lower)]
    assert_near(found.double(), plain_clipping(weight.double(), *shares, bits, 16))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
def test_without_clipping_it_is_rtn_bit_for_bit(
    convention: str, scale_dtype: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    grid = UniformGrid(3, 16, convention, scale_dtype=scale_dtype)
    block = first_block(tiny_model("llama"))
    rtn = RTN(grid).quantize_block(block)
    infinite = {name: (torch.full_like(a, torch.inf), torch.full_like(a, torch.inf))
                for name, (a, _) in start(block, grid).items()}  # fmt: skip
    for bounds in ({}, infinite):
        ours = Learned(bounds).quantize(block, grid)
        assert ours.keys() == rtn.keys()
        for name in rtn:
            for part, value in rtn[name].tensors().items():
                assert torch.equal(ours[name].tensors()[part], value), (name, part)


def test_training_starts_with_982_thousandths_of_the_range(tiny_model: Callable[..., PreTrainedModel]) -> None:
    block = first_block(tiny_model("llama"))
    for name, stored in Learned(start(block, W3)).quantize(block, W3).items():
        groups = split_groups(block.linears()[name].weight.double(), 16)
        low, high = groups.aminmax(dim=-1)
        assert ((low < 0) & (high > 0)).all()
        torch.testing.assert_close(stored.scale.double(), CLIP * (high - low) / 7, rtol=1e-6, atol=0)
    assert float(CLIP) == pytest.approx(0.982, abs=5e-4)


def test_gradients_are_those_of_autograd_with_rounding_as_the_identity() -> None:
    weight, upper, lower, of_output = noise(5, 32), noise(5, 2, 1, seed=1), noise(5, 2, 1, seed=2), noise(5, 32, seed=3)
    ours = [x.clone().requires_grad_() for x in (weight, upper, lower)]
    truth = [x.double().requires_grad_() for x in (weight, upper, lower)]
    with torch.enable_grad():
        found = fake_quantize(ours[0], (ours[1], ours[2]), UniformGrid(3, 16))
        expected = straight_through(*truth, 3, 16)
        (found * of_output).sum().backward()
        (expected * of_output.double()).sum().backward()
    assert_near(found.double(), expected, 1e-6)
    for a, b in zip(ours, truth, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert float(b.grad.abs().max()) > 0
        assert_near(a.grad.double(), b.grad)


def test_a_clipped_top_value_moves_its_bound_and_not_the_other() -> None:
    weight = torch.tensor([[-1.0, -0.3, 0.2, 1.0]])
    upper, lower = torch.zeros(1, 1, 1, requires_grad=True), torch.full((1, 1, 1), 50.0, requires_grad=True)
    with torch.enable_grad():
        top = fake_quantize(weight, (upper, lower), UniformGrid(4, 4))[0, 3]
        top.backward()
    assert top.item() == pytest.approx(0.5)  # σ(0) of the range, and −1 + 15 steps of 0.1 hits it
    assert upper.grad is not None
    assert lower.grad is not None
    assert float(upper.grad) == pytest.approx(0.25)  # σ'(0) · max w
    assert float(lower.grad) == pytest.approx(0, abs=1e-6)


@every("convention", CONVENTIONS)
def test_zero_points_are_codes_and_groups_have_at_most_two_to_the_bits_values(convention: str) -> None:
    grid = UniformGrid(2, 16, convention)
    weight = noise(8, 32) + torch.linspace(-9, 9, 8)[:, None]
    groups = split_groups(weight, 16)
    fitted = clipped_fit(groups, (2 * noise(8, 2, 1, seed=1), 2 * noise(8, 2, 1, seed=2)), grid)
    assert torch.equal(fitted.zero_point, fitted.zero_point.round().clamp(0, 3))
    values = (encode(groups, fitted, grid) - fitted.zero_point) * fitted.scale
    assert max(len(group.unique()) for group in values.flatten(0, 1)) <= 4


# equivalent transformation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("behind", [False, True], ids=["without a prefix", "behind a prefix"])
def test_without_rounding_any_scales_and_shifts_leave_the_block_as_it_was(
    model_type: str, behind: bool, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    block = first_block(tiny_model(model_type), PREFIX if behind else None)
    stream = stream_of(block)
    steps = [pair.step for pair in moved(initial_pairs(block, 0.5, shift=model_type == "opt"))]
    weights = transformed(block, steps)
    assert sum(not torch.equal(weights[name], p) for name, p in block.module.named_parameters()) >= 8
    seeded = prefix_in_basis(stream.seeded(block), block, steps) if behind else None
    for sample, expected in zip(stream.hidden, stream.outputs(block), strict=True):
        assert_near(stream.forward(block, sample, weights, stream.new_cache(block, seeded=seeded)), expected)
    if behind:  # and the unconverted prefix is another one
        assert float((stream.forward(block, sample, weights) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_merged_is_what_training_saw_bit_for_bit(model_type: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    block = first_block(tiny_model(model_type))
    steps = [pair.step for pair in moved(initial_pairs(block, 0.5, shift=model_type == "opt"))]
    temporary = transformed(block, steps)
    for step in steps:
        block.rescale(step)
    merged = dict(block.module.named_parameters())
    assert merged.keys() == temporary.keys()  # no parameter was added
    assert all(torch.equal(merged[name], temporary[name]) for name in merged)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_with_rotary_positions_only_paired_scales_keep_the_scores(
    model_type: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    block = first_block(tiny_model(model_type))
    stream = stream_of(block)
    expected = list(stream.outputs(block))
    pair = initial_pairs(block, 0.5, shift=False)[-1]
    assert pair.rows
    for shared, unchanged in ((pair.shared, True), (None, False)):
        shape = pair.step.scale.shape if shared is None else pair.log_scale.shape
        step = replace(pair, log_scale=0.5 * noise(*shape), shared=shared).step
        weights = transformed(block, [step])
        outputs = [stream.forward(block, sample, weights) for sample in stream.hidden]
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(outputs, expected, strict=True))
        assert worst < 1e-5 if unchanged else worst > 1e-3


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_converted_prefix_is_what_the_transformed_block_writes(
    model_type: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    block = first_block(tiny_model(model_type), PREFIX)
    stream = stream_of(block)
    steps = [pair.step for pair in moved(initial_pairs(block, 0.5, shift=model_type == "opt"))]
    before = stream.seeded(block)
    converted = prefix_in_basis(before, block, steps)
    for step in steps:
        block.rescale(step)
    stream.seed(block)
    for ours, written, old in zip(converted, stream.seeded(block), before, strict=True):
        assert_near(ours, written)
        assert float((written - old).abs().max()) > 0.1


@pytest.mark.parametrize("alpha", [0.5, 0.75])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_scales_start_from_the_maxima_of_inputs_and_weights(
    model_type: str, alpha: float, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    block = first_block(tiny_model(model_type))
    seen: dict[str, list[Tensor]] = {}
    block.observe(lambda name, x: seen.setdefault(name, []).extend(x.double()))
    *pairs, last = initial_pairs(block, alpha, shift=model_type == "opt")
    assert torch.equal(last.step.scale, torch.ones_like(last.step.scale))
    for pair in pairs:
        inputs = seen[pair.consumers[0]]
        for channel, scale in enumerate(pair.step.scale.tolist()):
            columns = [channel]
            if model_type == "llama" and pair.producer.endswith("v_proj"):  # 2 KV heads of 16, each read by 2 heads
                head, within = divmod(channel, 16)
                columns = [(2 * head + i) * 16 + within for i in range(2)]
            a = max(float(x[:, c].abs().max()) for x in inputs for c in columns)
            w = max(float(block.linears()[name].weight[:, c].abs().max()) for name in pair.consumers for c in columns)
            assert scale == pytest.approx(a**alpha / w ** (1 - alpha), rel=1e-5)
        if model_type == "opt":
            centre = None
            for x in inputs:
                middle = (x.amax(0) + x.amin(0)) / 2
                centre = middle if centre is None else 0.99 * centre + 0.01 * middle
            assert pair.shift is not None
            assert centre is not None
            assert_near(pair.shift.double(), centre)
        else:
            assert pair.shift is None


def test_an_input_that_is_always_zero_gets_the_smallest_scale_and_no_infinity(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    model = tiny_model("llama")
    block = first_block(model)
    block.module.input_layernorm.weight[3] = 0
    for name in ("q_proj", "k_proj", "v_proj"):
        block.module.get_submodule(f"self_attn.{name}").weight[:, 3] = 0
    scale = initial_pairs(block, 0.75, shift=False)[0].step.scale
    assert float(scale[3]) == pytest.approx(1e-5**0.75 / 1e-5**0.25, rel=1e-4)
    assert torch.isfinite(scale).all()


# counts and what is learned -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_as_many_parameters_are_learned_as_the_paper_has(
    model_type: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    block = first_block(tiny_model(model_type))
    bounds = start(block, W3)
    for name, linear in block.linears().items():
        assert [gamma.numel() for gamma in bounds[name]] == [linear.out_features * linear.in_features // 16] * 2
    shift = model_type == "opt"
    pairs = initial_pairs(block, 0.5, shift)
    # hidden 64, 4 heads of 16 over 2 KV heads (OPT: 4): s_in, s_o, s_mlp, s_qk
    counts = {"opt": [64, 64, 64, 64], "qwen3": [64, 32, 64, 8]}.get(model_type, [64, 32, 64, 16])
    assert [pair.log_scale.numel() for pair in pairs] == counts
    assert [pair.shift is not None for pair in pairs] == [shift, shift, shift, False]
    assert not any("down_proj" in name or "fc2" in name for pair in pairs for name in pair.consumers)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "opt"])
def test_gradients_reach_all_that_is_learned_and_no_weight(
    model_type: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    block = first_block(tiny_model(model_type), PREFIX)
    stream = stream_of(block)
    learned = Learned(start(block, W3), initial_pairs(block, 0.5, shift=model_type == "opt"))
    for tensor in (*learned.clipping, *learned.equivalence):
        tensor.requires_grad_()
    block.module.requires_grad_(True)
    with torch.enable_grad():
        weights, seeded = student(block, learned, W3)
        output = stream.forward(block, stream.hidden[0], weights, stream.new_cache(block, seeded=seeded))
        # The loss alone leaves q ↔ k alone: scaling a row scales its grid, and the scores stay what they are.
        size = torch.stack([w.square().mean() for w in weights.values()]).sum()
        ((output - stream.targets[0]).square().mean() + size).backward()
    assert all(parameter.grad is None for parameter in block.module.parameters())
    for tensor in (*learned.clipping, *learned.equivalence):
        assert tensor.grad is not None
        assert float(tensor.grad.abs().max()) > 1e-6


# training -------------------------------------------------------------------------------------------------------------


def merged_loss(block: DecoderBlock, quantized: dict[str, QuantizedTensor], targets: list[Tensor]) -> float:
    """The loss of the finished block as the pipeline runs it: rescaled, seeded again, linears dequantized."""
    stream = stream_of(block)
    stream.seed(block)
    for name, weight in quantized.items():
        linear = block.linears()[name]
        linear.weight.data = weight.dequantize(linear.weight.dtype)
    return distance(list(stream.outputs(block)), targets)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("settings", [{}, {"let": True}, {"let": True, "lwc": False}], ids=["lwc", "both", "let"])
def test_training_lowers_the_loss_that_the_finished_block_has(
    model_type: str, settings: dict[str, bool], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    block = first_block(tiny_model(model_type), PREFIX)
    targets = stream_of(block).targets
    shift = model_type == "opt" and "let" in settings
    method = OmniQuant(W3, epochs=4, lwc_lr=0.1, let_lr=0.02, shift=shift, **settings)
    quantized = method.quantize_block(block)
    assert bool(block.rescalings) == method.rescales == ("let" in settings)
    assert block.figures["loss_after"] < 0.98 * block.figures["loss_before"]
    assert merged_loss(block, quantized, targets) == pytest.approx(block.figures["loss_after"], rel=1e-4)


def test_a_longer_training_is_never_worse(tiny_model: Callable[..., PreTrainedModel]) -> None:
    losses = []
    for epochs in (1, 2, 6, 7, 8):  # at this rate the seventh does harm
        block = first_block(tiny_model("llama"))
        OmniQuant(W3, epochs=epochs, lwc_lr=1.0).quantize_block(block)
        losses.append(block.figures["loss_after"])
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_a_training_that_only_does_harm_ends_where_it_began(tiny_model: Callable[..., PreTrainedModel]) -> None:
    block = first_block(tiny_model("llama"))
    harmed = OmniQuant(W3, epochs=2, lwc_lr=1e3).quantize_block(block)
    assert block.figures["loss_after"] == block.figures["loss_before"]
    untrained = OmniQuant(W3, epochs=0).quantize_block(block)
    assert all(torch.equal(harmed[name].dequantize(), untrained[name].dequantize()) for name in harmed)


def test_the_second_target_adds_exactly_its_own_term(tiny_model: Callable[..., PreTrainedModel]) -> None:
    before = {}
    for both in (False, True):
        block = first_block(tiny_model("llama"))
        stream = stream_of(block)
        second = list(stream.outputs(block))  # the full-precision block on X_q
        OmniQuant(W3, epochs=1, aug_loss=both).quantize_block(block)
        before[both] = block.figures["loss_before"]
    quantized = OmniQuant(W3, epochs=0).quantize_block(block)
    targets = stream.targets
    assert before[False] == pytest.approx(merged_loss(block, quantized, targets), rel=1e-5)
    assert before[True] - before[False] == pytest.approx(distance(list(stream.outputs(block)), second), rel=1e-4)


def test_weight_decay_pulls_what_is_learned_towards_zero(tiny_model: Callable[..., PreTrainedModel]) -> None:
    scales = []
    for decay in (0.0, 10.0):
        block = first_block(tiny_model("llama"))
        OmniQuant(W3, let=True, epochs=1, let_lr=0.02, lwc_lr=1e-6, weight_decay=decay).quantize_block(block)
        scales.append(block.rescalings[0].scale.log().abs().mean())
    assert scales[1] < 0.7 * scales[0]


def test_without_epochs_it_is_rounding_of_the_clipped_range_and_needs_no_text(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    method = OmniQuant(W3, epochs=0)
    assert not method.calibrates
    assert OmniQuant(W3).calibrates
    out = quantize_checkpoint(checkpoint(), Recipe(weights=method), tmp_path / "out")
    model, dense = load_quantized(out), AutoModelForCausalLM.from_pretrained(checkpoint())
    for name, parameter in dense.named_parameters():
        found = model.get_parameter(name)
        if "proj" in name:
            share = CLIP.expand(parameter.shape[0], parameter.shape[1] // 16)
            assert_near(found.double(), plain_clipping(parameter.double(), share, share, 3, 16))
        else:
            assert torch.equal(found, parameter)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_scales_and_codes_rebuild_the_trained_weights_bit_for_bit(
    convention: str, scale_dtype: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    grid = UniformGrid(2, 16, convention, scale_dtype=scale_dtype)
    block = first_block(tiny_model("llama"))
    learned = Learned(
        {name: (noise(*a.shape, seed=1), noise(*a.shape, seed=2)) for name, (a, _) in start(block, grid).items()},
        moved(initial_pairs(block, 0.5, shift=False)),
    )
    trained, _ = student(block, learned, grid)
    for name, stored in learned.quantize(block, grid).items():
        read_back = restore(stored.kind, stored.tensors(), stored.header())
        assert torch.equal(read_back.dequantize(), trained[f"{name}.weight"])
        assert max(len(group.unique()) for group in split_groups(trained[f"{name}.weight"], 16).flatten(0, 1)) <= 4


def test_half_precision_checkpoints_train_in_float32_and_keep_their_dtype(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    block = first_block(tiny_model("llama", dtype=torch.bfloat16), PREFIX)
    method = OmniQuant(W3, let=True, epochs=3, lwc_lr=0.1, let_lr=0.02)
    weights, seeded = student(block, Learned(start(block, W3)), W3)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert seeded is not None
    assert seeded[0].dtype == torch.float32
    quantized = method.quantize_block(block)
    assert block.figures["loss_after"] < block.figures["loss_before"]
    assert {parameter.dtype for parameter in block.module.parameters()} == {torch.bfloat16}
    loss = merged_loss(block, quantized, stream_of(block).targets)
    assert loss == pytest.approx(block.figures["loss_after"], rel=0.05)  # the finished block computes in bfloat16


# the pipeline ---------------------------------------------------------------------------------------------------------

LWC = Recipe(weights=OmniQuant(W3, epochs=2, lwc_lr=0.1))
LET = Recipe(weights=OmniQuant(W3, let=True, epochs=2, lwc_lr=0.1), prefix="bos", calibrate_behind_prefix=True)


def made(source: Path, recipe: Recipe, out: Path) -> Path:
    prefix = PREFIX if recipe.calibrate_behind_prefix else None
    return quantize_checkpoint(source, recipe, out, segments=SEGMENTS, behind=prefix)


def test_every_block_reports_a_loss_that_did_not_grow(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = made(checkpoint(), LWC, tmp_path / "out")
    for index in range(3):
        figures = read_block(block_file(out, index)).figures
        assert 0 < figures["loss_after"] <= figures["loss_before"]


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_clipping_alone_changes_nothing_but_the_linears(
    model_type: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out = made(checkpoint(model_type), LWC, tmp_path / "out")
    assert read_json(out / MANIFEST, "manifest")["basis"] == "plain"
    model, dense = load_quantized(out), AutoModelForCausalLM.from_pretrained(checkpoint(model_type))
    linears = architecture_of(dense.config).linears_of(architecture_of(dense.config).blocks_of(dense)[0], "block")
    for name, parameter in dense.named_parameters():
        quantized = any(name.endswith(f"{linear}.weight") for linear in linears)
        assert torch.equal(model.get_parameter(name), parameter) != quantized


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": UniformGrid(3, 16, "awq-asym")}, "awq-asym"),
        ({"grid": UniformGrid(3, 16, clip_search=True)}, "clip_search=true"),
        ({"lwc": False}, "learns nothing"),
        ({"epochs": -1}, "weights.epochs=-1"),
        ({"epochs": 0, "let": True}, "weights.epochs=0 is not allowed with weights.let=true"),
        ({"lwc_lr": 0.0}, "weights.lwc_lr=0"),
        ({"let_lr": -1.0}, "weights.let_lr=-1"),
        ({"weight_decay": -1.0}, "weights.weight_decay=-1"),
        ({"alpha": 1.5}, "weights.alpha=1.5"),
        ({"shift": True}, "weights.shift=true is a part of LET"),
    ],
)
def test_what_cannot_work_is_refused_when_the_recipe_is_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OmniQuant(**{"grid": W3, **settings})


def test_what_a_model_has_no_place_for_is_refused_before_any_work(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    for weights, source, message in (
        (OmniQuant(W3, let=True, shift=True), checkpoint("llama"), r"input_layernorm of this llama model has none"),
        (OmniQuant(W3, let=True), checkpoint("opt", do_layer_norm_before=False), "do_layer_norm_before=false"),
        (OmniQuant(W3, let=True), checkpoint("opt", layer_norm_elementwise_affine=False), "has no weights"),
        (OmniQuant(replace(W3, group_size=48)), checkpoint("llama"), "group_size=48 does not divide"),
    ):
        with pytest.raises(UserError, match=message):
            made(source, Recipe(weights=weights), tmp_path / "out")
        assert not (tmp_path / "out.partial").exists()


def test_a_loss_that_is_not_finite_names_the_block(tiny_model: Callable[..., PreTrainedModel]) -> None:
    block = first_block(tiny_model("llama"))
    stream_of(block).hidden[1] = torch.full_like(stream_of(block).hidden[1], torch.nan)
    with pytest.raises(UserError, match=r"the loss of model\.layers\.0 is nan"):
        OmniQuant(W3, epochs=1).quantize_block(block)


def test_weights_that_are_not_finite_or_too_large_are_refused_by_name(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    block = first_block(tiny_model("llama"))
    block.linears()["mlp.up_proj"].weight[0, 0] = 1e6
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj holds values up to 1e\+06"):
        OmniQuant(UniformGrid(3, 16, scale_dtype="float16"), epochs=0).quantize_block(block)
    block.linears()["mlp.up_proj"].weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj holds values that are not finite"):
        OmniQuant(W3).quantize_block(block)


# the rows -------------------------------------------------------------------------------------------------------------


def test_the_rows_are_the_published_recipes() -> None:
    for name, bits in (("omniquant", 3), ("omniquant-w4", 4), ("omniquant-w3", 3)):
        assert named_recipe(name).weights == OmniQuant(UniformGrid(bits, 128, "intactkv-asym"), epochs=20)
    w2 = OmniQuant(UniformGrid(2, 128, "intactkv-asym"), epochs=40, aug_loss=True)
    assert named_recipe("omniquant-w2").weights == w2
    let = named_recipe("omniquant-let")
    assert let.weights == OmniQuant(UniformGrid(4, -1, "intactkv-asym"), let=True, aug_loss=True, epochs=20)
    assert let.calibration == Calibration("wikitext2", 128, 2048, seed=2)
    short = with_settings(let, ["weights.epochs=2", "weights.let_lr=1e-3", "weights.alpha=0.75"])
    assert short.weights == replace(let.weights, epochs=2, let_lr=1e-3, alpha=0.75)


def test_a_shared_scale_is_repeated_for_the_query_heads_of_its_group(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    block = first_block(tiny_model("llama"))
    query, key = (block.linears()[f"self_attn.{x}_proj"].weight.clone() for x in "qk")
    scale = torch.arange(1.0, 33.0)  # 2 KV heads of 16 channels; 4 query heads
    block.rescale(Rescaling("self_attn.q_proj", ("self_attn.k_proj",), scale, rows=True))
    assert torch.equal(block.linears()["self_attn.k_proj"].weight, key * scale[:, None])
    for head in range(4):
        rows, group = slice(16 * head, 16 * head + 16), slice(16 * (head // 2), 16 * (head // 2) + 16)
        assert torch.equal(block.linears()["self_attn.q_proj"].weight[rows], query[rows] / scale[group, None])
