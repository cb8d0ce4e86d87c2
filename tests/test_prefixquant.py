"""PrefixQuant's quantizers: what the searches look at, what training moves, and what a checkpoint keeps of it."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from common import Rounds
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.policy import Bound
from intactkv.prefix import build_prefix
from intactkv.store import Exact, Store
from intactkv.training import train
from quantization.grids.uniform import Fit, UniformGrid, fit, split_groups
from quantization.kv_cache import ClippedPerHead, Policy, StaticPerHead
from quantization.model.activations import Activations
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import InputQuantizer
from quantization.model.stream import CalibrationStream
from quantization.model.walk import Walk
from quantization.named import RECIPES, named_recipe
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import block_file, load_quantized, read_block, read_cost
from quantization.runs.kept import bound_kv
from quantization.runs.pipeline import quantize_checkpoint
from quantization.tuning import prefixquant as tuning_module
from quantization.tuning.prefixquant import LOSSES, PrefixQuantTuning
from quantization.tuning.quantizers import Quantizers, at_work, min_max, output_error, stream_of
from quantization.tuning.search import (
    attended,
    attention_rows,
    best_factor,
    best_scales,
    best_shares,
    grams,
    group_errors,
    initialize,
)
from quantization.weights.gptq import GPTQ
from quantization.weights.rtn import RTN

SYM8, SYM4, SYM3 = (UniformGrid(bits, -1, "gptq-sym") for bits in (8, 4, 3))
PREFIX = torch.tensor([1, 40, 7])
SEGMENTS = torch.randint(4, 101, (6, 12), generator=torch.Generator().manual_seed(5))
BLOCKS = 2  # of a checkpoint


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def checkpoint(checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """checkpoint(model_type) -> a directory that tests only read, of two blocks."""
    return partial(checkpoint, num_hidden_layers=2)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def first_block(model: PreTrainedModel, prefix: Tensor | None = PREFIX) -> DecoderBlock:
    architecture = architecture_of(model.config)
    stream = CalibrationStream(model, architecture, SEGMENTS, prefix)
    block = DecoderBlock(0, architecture.blocks_of(model)[0], architecture, model.config, stream)
    stream.seed(block)
    return block


def quantizers(
    block: DecoderBlock, static: bool = True, weights: UniformGrid | None = SYM4, inputs: UniformGrid = SYM4
) -> Quantizers:
    """As the pipeline hands them over."""
    activations = Activations(inputs, static=static, keep=1.0 if static else 0.95)
    kv: Policy = StaticPerHead(4, "gptq-sym") if static else ClippedPerHead(4)
    fitted = activations.fit_block(block)
    block.kv.update(kv.fit_block(block))
    return Quantizers(weights, {} if weights is None else min_max(block, weights), fitted, kv)


def tiny_recipe(name: str = "prefixquant-w4a4kv4-static", **tuning: Any) -> Recipe:
    settings = {"mse_init_size": 2, "held_out": 0.3, "batch": 2, **tuning}
    return replace(named_recipe(name), prefix="bos", tuning=PrefixQuantTuning(**settings))


def quantized(source: Path, recipe: Recipe, out: Path, prefix: Tensor | None = PREFIX) -> Path:
    if prefix is None:
        recipe = replace(recipe, prefix="none", calibrate_behind_prefix=False)
    return quantize_checkpoint(source, recipe, out, segments=SEGMENTS, behind=prefix)


# one search at a time -------------------------------------------------------------------------------------------------


def test_a_static_scale_is_searched_over_the_published_factors_and_one() -> None:
    seen: list[float] = []

    def error(factor: float) -> float:
        seen.append(factor)
        return abs(factor - 0.63)

    best = best_factor(error)
    coarse, fine = [0.25 + 0.1 * i for i in range(8)], [0.6 + 0.1 * i / 9 for i in range(10)]
    assert seen == pytest.approx([1.0, *coarse, *fine], abs=1e-6)
    assert best == pytest.approx(min(fine, key=lambda f: abs(f - 0.63)), abs=1e-6)


def test_of_equal_errors_the_later_factor_wins_but_none_that_is_worse_than_one() -> None:
    assert best_factor(lambda _: 1.0) == pytest.approx(1.0, abs=1e-6)  # 0.95 + 0.05, the last that is tried
    assert best_factor(lambda factor: 2.0 - (factor == 1.0)) == 1.0


def test_shares_of_a_range_are_searched_for_one_end_or_two() -> None:
    for symmetric, count in ((True, 9), (False, 81)):
        seen: list[tuple[float, float]] = []

        def error(low: float, high: float, seen: list[tuple[float, float]] = seen) -> float:
            seen.append((low, high))
            return abs(low - 0.7) + abs(high - 0.9)

        low, high = best_shares(error, symmetric)
        assert len(set(seen)) == count
        assert sorted({low for low, _ in seen}) == pytest.approx([0.6 + 0.05 * i for i in range(9)])
        assert (low == high) if symmetric else (low, high) == pytest.approx((0.7, 0.9))


def test_every_element_of_a_scale_is_shrunk_by_its_own_best_factor_of_the_first_scale() -> None:
    scale, wanted = torch.tensor([1.0, 2.0, 4.0, 1.0]), torch.tensor([0.55, 1.6, 4.0, 0.1])
    best = best_scales(scale, lambda s: (s - wanted).abs())
    # 1 − i/20 for i < 10, each of the scale that the range gave.
    grid = [[s * (1 - i / 20) for i in range(10)] for s in scale.tolist()]
    assert best.tolist() == pytest.approx(
        [min(row, key=lambda s: abs(s - w)) for row, w in zip(grid, wanted.tolist(), strict=True)]
    )


@pytest.mark.parametrize("size", [-1, 16])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_groups_error_is_that_of_its_part_of_the_output(
    model_type: str, size: int, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    block, grid = first_block(tiny_model(model_type)), UniformGrid(3, size, "gptq-asym")
    name = block.architecture.linears[-1][0]
    weight = block.linears()[name].weight.data
    groups = split_groups(weight, size)
    fitted = fit(groups, grid)
    errors = group_errors(groups, fitted, grid, grams(block, size)[name])
    x = split_groups(torch.cat(list(Walk(block).inputs(name))).flatten(0, 1).double(), size)  # (tokens, groups, size)
    codes = ((groups.double() / fitted.scale).round() + fitted.zero_point).clamp(0, 7)
    change = (codes - fitted.zero_point) * fitted.scale - groups.double()
    for row in (0, 5):
        for group in range(x.shape[1]):
            plain = (x[:, group] @ change[row, group]).square().sum()
            assert float(errors[row, group]) == pytest.approx(float(plain), rel=1e-4)


@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["alone", "behind"])
@pytest.mark.parametrize(("model_type", "options"), [
    ("llama", {}), ("qwen3", {}), ("opt", {}), ("mistral", {"sliding_window": 8}),
])  # fmt: skip
def test_attention_rows_are_those_of_transformers_eager_attention(
    model_type: str, options: dict[str, Any], prefix: Tensor | None, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(model_type, **options)
    before = model.config._attn_implementation
    rows = [attention_rows(sample, sample.key) for sample in attended(first_block(model, prefix))]
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    for segment, found in zip(SEGMENTS, rows, strict=True):
        ids = segment if prefix is None else torch.cat([prefix, segment])
        expected = model(ids[None], output_attentions=True).attentions[0][0, :, -len(segment) :]
        assert_close(found, expected[..., -found.shape[-1] :], rtol=0, atol=1e-5)


# all searches of a block ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [True, False])
def test_no_quantizer_alone_makes_a_larger_error_than_with_the_range_as_it_is(
    static: bool, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    block = first_block(tiny_model("llama"))
    found = quantizers(block, static, weights=SYM3)
    targets = list(stream_of(block).outputs(block))

    def errors() -> dict[str, Any]:
        of_input = {}
        for names, quantizer in found.inputs.items():
            with at_work(block, {names: quantizer}):
                of_input[names[0]] = torch.tensor(output_error(block, targets))
        for name, linear in block.linears().items():
            first = next(names[0] for names in block.architecture.linears if name in names)
            groups = split_groups(linear.weight.data, -1)
            of_input[f"weight of {name}"] = group_errors(groups, found.fits[name], SYM3, grams(block, -1)[first])
        policy = Rounds(found.kv, block.kv)
        of_input["values"] = torch.stack([
            (Rounds(policy).values(v) - v).square().mean((0, 2, 3)) for _, v in block.keys_and_values()  # type: ignore[union-attr]
        ]).mean(0)  # fmt: skip
        return of_input

    if not static:  # the whole range, with which a search must not be worse
        for quantizer in found.inputs.values():
            quantizer.low.fill_(1.0), quantizer.high.fill_(1.0)
        block.kv["values_high"].fill_(1.0)
    before = errors()
    initialize(block, found, targets, skip_qk_weights=False)
    after = errors()
    better = 0
    for name, error in after.items():
        if name == "values" and not static:
            continue  # searched by the output of the block
        assert (error <= before[name] * (1 + 1e-6)).all(), name
        better += int((error < before[name]).any())
    assert better > len(after) / 2
    assert all(q.scale.shape == (1, 1) for q in found.inputs.values() if q.static)
    if static:
        assert block.kv["keys_scale"].shape == block.kv["values_scale"].shape == (2, 1, 1)  # a scale per KV head


def test_keys_are_searched_by_what_attention_makes_of_them(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """The best of the ten grids of a head, found by running transformers' eager attention."""
    model = tiny_model("llama")
    model.set_attn_implementation("eager")  # first: it wants masks of its own
    block = first_block(model)
    kv = StaticPerHead(3, "gptq-sym", rotate_keys=True)
    block.kv.update(kv.fit_block(block))
    start = block.kv["keys_scale"].clone()
    found = Quantizers(None, {}, {}, kv)
    initialize(block, found, list(stream_of(block).outputs(block)), skip_qk_weights=False)
    errors: list[Tensor] = []
    for factor in [1 - i / 20 for i in range(10)]:
        only_keys: Any = _OnlyKeys(kv, {**block.kv, "keys_scale": start * factor})
        error = torch.zeros(4)
        for hidden in stream_of(block).hidden:
            rows = []
            for cache in (
                stream_of(block).new_cache(block),
                stream_of(block).new_cache(block, only_keys),
            ):
                attention = block.module.self_attn
                seen: list[Tensor] = []
                handle = attention.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out[1]))
                stream_of(block).forward(block, hidden, cache=cache)
                handle.remove()
                rows.append(seen[0][0])
            error += (rows[0] - rows[1]).square().mean((1, 2))
        errors.append(error.view(2, 2).sum(1))  # query heads 0, 1 read KV head 0
    best = torch.stack(errors).argmin(0)
    assert (best > 0).any()
    assert_close(block.kv["keys_scale"][:, 0, 0], start[:, 0, 0] * (1 - best / 20))


class _OnlyKeys:
    space, calibrates = "post_rope", True

    def __init__(self, policy: Any, tensors: Any):
        self.policy, self.tensors = policy, tensors

    def store(self, layer: int, tensors: Any, packed: bool = False) -> Store:
        return Store(self.policy.roundings(self.tensors)[0], Exact())


def test_weights_of_q_and_k_can_be_left_at_their_range(tiny_model: Callable[..., PreTrainedModel]) -> None:
    block = first_block(tiny_model("llama"))
    found = quantizers(block, weights=SYM3)
    start = {name: fitted.scale.clone() for name, fitted in found.fits.items()}
    initialize(block, found, list(stream_of(block).outputs(block)), skip_qk_weights=True)
    kept = {name for name, fitted in found.fits.items() if torch.equal(fitted.scale, start[name])}
    assert kept == {"self_attn.q_proj", "self_attn.k_proj"}


# losses ---------------------------------------------------------------------------------------------------------------


def test_the_losses_are_their_formulas() -> None:
    output, target = 9 * noise(2, 8, 5).double(), 9 * noise(2, 8, 5, seed=1).double()
    squares = (output - target) ** 2
    plain = dict.fromkeys(LOSSES, 0.0)
    for b in range(2):
        ranked = sorted(range(8), key=lambda t: -float(target[b, t].abs().mean()))
        for t in range(8):
            x, y = output[b, t], target[b, t]
            plain["mse"] += float(squares[b, t].sum()) / 80
            plain["skip_mse"] += 0.0 if t in ranked[:3] else float(squares[b, t].sum()) / 80
            clamped = sum((min(max(i, -10.0), 10.0) - min(max(j, -10.0), 10.0)) ** 2 for i, j in zip(x, y, strict=True))
            plain["clamp_mse"] += float(clamped) / 80
            plain["normalized_mse"] += float(squares[b, t].sum()) / float(y.abs().max()) ** 2 / 80
            plain["cosine"] += (1 - float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))) / 16
    for name, loss in LOSSES.items():
        assert float(loss(output, target)) == pytest.approx(plain[name], rel=1e-6), name
        assert float(loss(target, target)) == pytest.approx(0.0, abs=1e-12), name


# training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["gptq-sym", "gptq-asym"])
@pytest.mark.parametrize("static", [True, False])
def test_gradients_reach_weights_scales_zero_points_shares_and_ranges_of_the_cache(
    static: bool, convention: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    block = first_block(tiny_model("llama"))
    grid = UniformGrid(2, 16, convention)
    found = quantizers(block, static, weights=grid, inputs=UniformGrid(3, -1, convention))
    for fitted, factor in ((found.fits, 0.7), (found.inputs, 0.3)):
        for quantizer in fitted.values():
            if isinstance(quantizer, Fit) or quantizer.static:
                quantizer.scale.mul_(factor)  # clip something, so that zero points count
    positive, others = found.learned(block)
    assert bool(others) == (convention == "gptq-asym")
    weights = {name: p.clone().requires_grad_(True) for name, p in block.module.named_parameters()}
    for tensor in (*positive, *others):
        tensor.requires_grad_(True)
    with torch.enable_grad(), at_work(block, found.inputs):
        rounded = weights | {f"{n}.weight": found.rounded(n, weights[f"{n}.weight"]) for n in found.fits}
        cache = stream_of(block).new_cache(block, found.kv)
        stream_of(block).forward(block, stream_of(block).hidden[0], rounded, cache).square().mean().backward()
    for tensor in (*positive, *others, *weights.values()):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad.abs().sum() > 0


def test_gradients_reach_the_shares_of_ranges_that_need_not_hold_zero() -> None:
    """PrefixQuant's dynamic asymmetric inputs, in groups: s = (p hi − p lo)/(2^b − 1), z = round(−p lo/s)."""
    quantizer = InputQuantizer(UniformGrid(3, 8, "minmax-asym"), keep=0.9)
    x = 5 + noise(1, 4, 16)
    for share in quantizer.learned:
        share.requires_grad_(True)
    with torch.enable_grad():
        found = quantizer(x)
        (found * noise(*x.shape, seed=1)).sum().backward()
    for group, rounded in zip(x.view(-1, 8), found.view(-1, 8), strict=True):
        low, high = 0.9 * float(group.min()), 0.9 * float(group.max())
        scale = (high - low) / 7
        zero = round(-low / scale)
        expected = [(min(max(round(v / scale) + zero, 0), 7) - zero) * scale for v in group.tolist()]
        assert rounded.tolist() == pytest.approx(expected, rel=1e-4)
    assert all(share.grad is not None and share.grad.abs() > 0 for share in quantizer.learned)


@pytest.mark.parametrize(("kind", "target"), [("static", "fp_input"), ("static", "both"), ("dynamic", "quant_input")])
def test_training_lowers_the_held_out_loss(
    kind: str, target: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(f"prefixquant-w4a4kv4-{kind}", epochs=8, target=target, weight_lr=1e-3, quant_lr=1e-3)
    out = quantized(checkpoint(), recipe, tmp_path / "out")
    figures = [read_block(block_file(out, index)).figures for index in range(BLOCKS)]
    assert all(block["loss_after"] <= block["loss_before"] for block in figures)
    assert read_cost(out)["figures"]["loss_after"] < 0.98 * read_cost(out)["figures"]["loss_before"]


@pytest.mark.parametrize(
    ("settings", "last", "clip"),
    [({}, 0.1, 0.3), ({"min_lr_factor": 4.0, "clip_grad": 1.5}, 0.25, 1.5), ({"clip_grad": 0.0}, 0.1, math.inf)],
)
def test_rates_fall_to_a_part_of_the_first_and_gradients_are_clipped_as_told(
    settings: dict[str, float], last: float, clip: float, checkpoint: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[Any] = []

    def watched(groups: Any, schedule: Any, *rest: Any) -> Any:
        seen.append(schedule)
        return train(groups, schedule, *rest)

    monkeypatch.setattr(tuning_module, "train", watched)
    recipe = tiny_recipe(epochs=3, mse_init=False, **settings)
    quantized(checkpoint(), recipe, tmp_path / "out")
    assert len(seen) == BLOCKS
    for schedule in seen:
        assert [schedule.share(0), schedule.share(schedule.steps)] == pytest.approx([1.0, last])
        assert schedule.clip == clip


def test_rates_of_zero_leave_everything_as_the_search_left_it(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    searched = quantized(checkpoint(), tiny_recipe(), tmp_path / "searched")
    recipe = tiny_recipe(epochs=1, weight_lr=0.0, quant_lr=0.0)
    still = quantized(checkpoint(), recipe, tmp_path / "still")
    for index in range(BLOCKS):
        a, b = (read_block(block_file(out, index)) for out in (searched, still))
        for name, (_, parts, _) in a.linears.items():
            assert all(torch.equal(parts[part], b.linears[name][1][part]) for part in parts)
        assert all(torch.equal(a.parameters[name], b.parameters[name]) for name in a.parameters)
        assert all(torch.equal(a.kv[name], b.kv[name]) for name in a.kv)


def test_a_half_precision_checkpoint_trains_in_float32_and_stays_what_it_is(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path, "llama", num_hidden_layers=2, dtype=torch.bfloat16)
    out = quantized(source, tiny_recipe(epochs=4, weight_lr=1e-3, quant_lr=1e-3), tmp_path / "out")
    figures = read_cost(out)["figures"]
    assert figures["loss_after"] < figures["loss_before"]
    block = read_block(block_file(out, 0))
    dtypes = {name: x.dtype for name, x in block.parameters.items()}
    assert {dtype for name, dtype in dtypes.items() if "norm" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if "quantizer" in name} == {torch.float32}
    assert {x.dtype for x in block.kv.values()} == {torch.float32}


def test_no_scale_falls_to_zero_however_large_the_steps(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(epochs=6, weight_lr=0.0, quant_lr=0.5)
    out = quantized(checkpoint(), recipe, tmp_path / "out")
    for index in range(BLOCKS):
        block = read_block(block_file(out, index))
        scales = [parts["scale"] for _, parts, _ in block.linears.values()]
        scales += [x for name, x in (block.parameters | block.kv).items() if name.endswith("scale")]
        assert all((x > 0).all() for x in scales)


def test_a_loss_that_is_no_number_ends_in_one_line(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    recipe = replace(tiny_recipe(epochs=3, weight_lr=1e30), activations=None, kv_cache=None)  # nothing clamps
    with pytest.raises(UserError, match=r"smaller learning rate") as refused:
        quantized(checkpoint(), recipe, tmp_path / "out")
    assert "model.layers.0" in str(refused.value)
    assert "\n" not in str(refused.value)


# checkpoints ----------------------------------------------------------------------------------------------------------

FINE_TUNED = {"epochs": 2, "weight_lr": 1e-3, "quant_lr": 1e-3}


@pytest.mark.parametrize(("name", "tuning", "model_type"), [
    ("prefixquant-w4a4kv4-static", {}, "llama"),
    ("prefixquant-w4a4kv4-static", FINE_TUNED, "llama"),
    ("prefixquant-w4a4kv4-static", FINE_TUNED, "qwen2"),
    ("prefixquant-w4a4kv4-static", FINE_TUNED, "opt"),
    ("prefixquant-w4a4kv4-dynamic", FINE_TUNED, "qwen3"),
])  # fmt: skip
@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["alone", "behind"])
def test_a_loaded_checkpoint_computes_what_the_text_met_while_it_was_made(
    name: str, tuning: dict[str, Any], model_type: str, prefix: Tensor | None, checkpoint: Callable[..., Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    passed_on: list[list[Tensor]] = []
    advance = CalibrationStream.advance

    def watched(self: CalibrationStream, *args: Any, **options: Any) -> None:
        advance(self, *args, **options)
        passed_on.append(list(self.hidden))

    monkeypatch.setattr(CalibrationStream, "advance", watched)
    source, recipe = checkpoint(model_type), tiny_recipe(name, **tuning)
    out = quantized(source, recipe, tmp_path / "out", prefix)
    assert len(passed_on) == BLOCKS
    model = load_quantized(out)
    kv = bound_kv(recipe, model)
    assert isinstance(kv, Bound)
    assert kv.tensors
    intact = None
    if prefix is not None:
        twin = load_quantized(quantize_checkpoint(source, recipe.twin, tmp_path / "twin"))
        intact = build_prefix(twin, prefix.tolist())
    running = attach(model, intact, kv)
    last: list[Tensor] = []
    architecture_of(model.config).blocks_of(model)[-1].register_forward_hook(
        lambda _module, _args, output: last.append(output if isinstance(output, Tensor) else output[0])
    )
    for segment, expected in zip(SEGMENTS, passed_on[-1], strict=True):
        running.score(segment[None] if prefix is None else torch.cat([prefix, segment])[None])
        assert torch.equal(last.pop()[0, -len(segment) :], expected[0])


@pytest.mark.parametrize("part", ["weights", "activations", "kv_cache"])
def test_each_kind_of_quantizer_works_alone(part: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    everything = tiny_recipe(epochs=1)
    alone = {name: None for name in ("weights", "activations", "kv_cache") if name != part}
    out = quantized(checkpoint(), replace(everything, **alone), tmp_path / "out")
    figures = read_cost(out)["figures"]
    assert figures["error_searched"] > 0
    assert figures["loss_after"] <= figures["loss_before"]


def test_with_nothing_quantized_nothing_changes(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    nothing: dict[str, None] = dict.fromkeys(("weights", "activations", "kv_cache"))
    recipe = replace(tiny_recipe(epochs=1), transforms=(), **nothing)
    out, source = quantized(checkpoint(), recipe, tmp_path / "out"), checkpoint()
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(x, dense[name]) for name, x in load_quantized(out).state_dict().items())


# sinks ----------------------------------------------------------------------------------------------------------------


def planted_sink(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A model whose BOS (id 1) drives one channel of the first down projection's input to thousands."""
    model = tiny_model("llama")
    block, channel, unit = model.model.layers[0], 3, 5
    model.model.embed_tokens.weight[:, channel] = 0.0
    model.model.embed_tokens.weight[1, channel] = 30.0
    block.self_attn.o_proj.weight[channel] = 0.0
    for linear in (block.mlp.gate_proj, block.mlp.up_proj):
        linear.weight[unit, channel] = 8.0
    return model


def test_static_grids_serve_behind_a_prefix_and_are_ruined_by_its_tokens_without_it(
    tiny_model: Callable[..., PreTrainedModel], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model, source = planted_sink(tiny_model), tmp_path / "sink"
    shutil.copytree(checkpoint(), source)
    model.save_pretrained(source)
    bos = torch.tensor([1])
    texts = torch.cat([bos.expand(len(SEGMENTS), 1), SEGMENTS], dim=1)
    seen: list[Tensor] = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    expected = model(texts).logits[:, 1:]
    handle.remove()
    assert seen[0][:, 0].abs().max() > 100 * seen[0][:, 1:].abs().max()
    kv = StaticPerHead(8, "gptq-sym")
    recipe = Recipe(
        weights=RTN(SYM8), activations=Activations(SYM8, static=True),
        tuning=PrefixQuantTuning(mse_init=False), kv_cache=kv, prefix="bos", calibrate_behind_prefix=True,
    )  # fmt: skip
    errors = {}
    for arm in ("behind", "alone"):
        if arm == "behind":
            out = quantize_checkpoint(source, recipe, tmp_path / arm, segments=SEGMENTS, behind=bos)
        else:
            plain = replace(recipe, prefix="none", calibrate_behind_prefix=False)
            out = quantize_checkpoint(source, plain, tmp_path / arm, segments=texts)
        loaded = load_quantized(out)
        prefix = build_prefix(model, [1]) if arm == "behind" else None
        running = attach(loaded, prefix, Bound(kv, dict(enumerate(loaded.__dict__["intactkv_kv"]))))
        errors[arm] = float((running.score(texts)[:, -SEGMENTS.shape[1] :] - expected).norm() / expected.norm())
    assert errors["behind"] < 0.2
    assert errors["alone"] > 3 * errors["behind"]


# what cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "said"), [
    ({"loss": "l1"}, "tuning.loss=l1 is not known; choose from mse, skip_mse"),
    ({"target": "fp"}, "tuning.target=fp is not known; choose from fp_input, quant_input, both"),
    ({"epochs": -1}, "tuning.epochs=-1 is not allowed; give 0 or more"),
    ({"batch": 0}, "tuning.batch=0 is not allowed; give 1 or more"),
    ({"mse_init_size": 0}, "tuning.mse_init_size=0 is not allowed"),
    ({"quant_lr": -1.0}, "tuning.quant_lr=-1 is not allowed"),
    ({"held_out": 1.0}, "tuning.held_out=1 is not allowed"),
    ({"min_lr_factor": 0.5}, "tuning.min_lr_factor=0.5 is not allowed; give 1"),
    ({"clip_grad": -1.0}, "tuning.clip_grad=-1 is not allowed; give a norm, or 0 for none"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        PrefixQuantTuning(**settings)
    assert said in str(refused.value)


@pytest.mark.parametrize(("weights", "said"), [
    (GPTQ(SYM4), "gptq cannot stand in front of it"),
    (RTN(UniformGrid(4, -1, "spqr-asym")), "convention=spqr-asym"),
    (RTN(UniformGrid(4, -1, "gptq-sym", clip_search=True)), "clip_search=true"),
    (RTN(UniformGrid(4, -1, "gptq-sym", scale_dtype="float16")), "scale_dtype=float16"),
])  # fmt: skip
def test_weights_that_it_cannot_choose_are_refused_before_anything_is_read(
    weights: Any, said: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        quantized(checkpoint(), replace(tiny_recipe(), weights=weights), tmp_path / "out")


def test_one_sample_is_too_few_to_learn_from(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves nothing to learn from"):
        quantize_checkpoint(checkpoint(), tiny_recipe(epochs=1), tmp_path / "out", segments=SEGMENTS[:1], behind=PREFIX)


def test_the_named_recipes_are_the_papers() -> None:
    epochs = {(4, "-ft"): 20, (8, "-ft"): 10, (4, ""): 0, (8, ""): 0}
    names = [name for name in RECIPES if name.startswith("prefixquant")]
    assert len(names) == 8
    for name in names:
        recipe = named_recipe(name)
        bits, tuned = int(name.split("kv")[0][-1]), "-ft" if name.endswith("-ft") else ""
        assert recipe.weights == RTN(SYM4)
        assert recipe.activations is not None
        assert recipe.activations.grid == UniformGrid(bits, -1, "gptq-sym")
        assert recipe.activations.static == ("static" in name)
        assert recipe.tuning == PrefixQuantTuning(epochs=epochs[bits, tuned])
        assert (recipe.prefix, recipe.calibrate_behind_prefix) == ("auto", True)
