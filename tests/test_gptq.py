"""GPTQ: the laws of its specification, in plain float64 formulas; its Hessians, orders, repairs and checkpoints."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import every
from torch import Tensor
from transformers import AutoModelForCausalLM

from corpora.errors import UserError
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from quantization.grids.uniform import QuantizedTensor, UniformGrid, quantize
from quantization.kernels.columns import Levels
from quantization.model.blocks import DecoderBlock
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import load_quantized, read_cost
from quantization.runs.pipeline import quantize_checkpoint
from quantization.weights.gptq import GPTQ, Hessian, column_loop, gptq, inverse_factor

ROWS, CHANNELS = 64, 96
PREFIX = torch.tensor([1, 40, 7])
SEGMENTS = torch.randint(4, 101, (6, 40), generator=torch.Generator().manual_seed(5))
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "opt")


pytestmark = pytest.mark.usefixtures("no_grad")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(channels: int = CHANNELS, tokens: int = 512, seed: int = 1) -> Tensor:
    """Inputs whose channels depend on each other and differ in size, (tokens, channels)."""
    mix = random(channels, channels, seed=seed) / channels**0.5 + torch.eye(channels)
    return random(tokens, channels, seed=seed + 1) @ mix * torch.linspace(0.2, 3, channels)


def hessian_of(x: Tensor) -> Tensor:
    hessian = Hessian()
    hessian.add(x)
    return hessian.take()


def damped(h: Tensor, damp: float) -> Tensor:
    h = h.double()
    return h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def proxy(error: Tensor, h: Tensor) -> float:
    """tr(ΔW H ΔWᵀ)."""
    return float(torch.trace(error.double() @ h @ error.double().T))


def slow_gptq(weight: Tensor, h: Tensor, scale: Tensor, zero: Tensor, top: int, size: int, order: list[int]) -> Tensor:
    """Optimal brain quantization in a fixed order, in float64, with the inverse of what remains recomputed at each
    step instead of a factor; static groups."""
    w, remaining = weight.double().clone(), list(order)
    out = torch.empty_like(w)
    for c in order:
        inverse = torch.linalg.inv(h[remaining][:, remaining])
        s, z = scale[:, c // size].double(), zero[:, c // size].double()
        out[:, c] = ((torch.round(w[:, c] / s) + z).clamp(0, top) - z) * s
        error = (w[:, c] - out[:, c]) / inverse[0, 0]
        w[:, remaining] -= error[:, None] * inverse[0]
        remaining = remaining[1:]
    return out


# one matrix -----------------------------------------------------------------------------------------------------------


@every("act_order", [False, True])
@every("convention", ["gptq-asym", "gptq-sym"])
@every("bits", [2, 3, 4, 8])
def test_it_is_optimal_brain_quantization_in_a_fixed_order(bits: int, convention: str, act_order: bool) -> None:
    channels, size = 24, 8
    weight, h = random(16, channels), hessian_of(correlated(channels))
    grid = UniformGrid(bits, size, convention)
    rtn = quantize(weight, grid)
    order = torch.argsort(h.diagonal(), descending=True).tolist() if act_order else list(range(channels))
    expected = slow_gptq(weight, damped(h, 0.01), rtn.scale, rtn.zero_point, grid.top, size, order)
    result, loss, repairs = gptq(weight, h.clone(), grid, act_order=act_order)
    assert repairs == 0
    # A value within rounding noise of the middle between two levels may fall to either side, and moves those after it.
    same = (result.dequantize().double() - expected).abs() < 1e-4
    assert same.all(dim=1).float().mean() > 0.9
    assert loss == pytest.approx(proxy(result.dequantize() - weight, damped(h, 0.01)), rel=1e-3)


@every("group_size", [-1, 16, 32, 48])
@every("act_order", [False, True])
@every("bits", [2, 3, 4, 8])
def test_with_an_identity_hessian_it_is_rtn_bit_for_bit(bits: int, act_order: bool, group_size: int) -> None:
    weight, grid = random(ROWS, CHANNELS), UniformGrid(bits, group_size)
    result, _, _ = gptq(weight, 7.0 * torch.eye(CHANNELS), grid, act_order=act_order)
    expected = quantize(weight, grid)
    assert torch.equal(result.codes, expected.codes)
    assert torch.equal(result.dequantize(), expected.dequantize())


def test_clip_search_is_that_of_the_grid() -> None:
    weight, grid = random(ROWS, CHANNELS), UniformGrid(3, 32, clip_search=True)
    result, _, _ = gptq(weight, torch.eye(CHANNELS), grid)
    assert torch.equal(result.dequantize(), quantize(weight, grid).dequantize())


@every("static_groups", [False, True])
@every("act_order", [False, True])
@every("group_size", [-1, 16, 32])
def test_the_loss_is_the_trace_over_the_damped_hessian(group_size: int, act_order: bool, static_groups: bool) -> None:
    weight, h = random(ROWS, CHANNELS), hessian_of(correlated())
    result, loss, _ = gptq(
        weight, h.clone(), UniformGrid(2, group_size), damp=0.05, act_order=act_order, static_groups=static_groups
    )
    assert loss == pytest.approx(proxy(result.dequantize() - weight, damped(h, 0.05)), rel=1e-4)


@every("static_groups", [False, True])
@every("act_order", [False, True])
@every(("bits", "group_size"), [(2, -1), (3, 32), (4, 32), (4, -1), (3, 16)])
def test_over_a_matrix_the_proxy_loss_is_below_that_of_rtn(
    bits: int, group_size: int, act_order: bool, static_groups: bool
) -> None:
    weight, h, grid = random(256, CHANNELS), hessian_of(correlated()), UniformGrid(bits, group_size)
    _, loss, _ = gptq(weight, h.clone(), grid, act_order=act_order, static_groups=static_groups)
    assert loss < 0.8 * proxy(quantize(weight, grid).dequantize() - weight, damped(h, 0.01))


@every("columns", [1, 7, 16, 96])
@every("run", [1, 5, 16, 96, 128])
def test_how_many_columns_wait_for_updates_changes_nothing(columns: int, run: int) -> None:
    weight, h = random(ROWS, CHANNELS), hessian_of(correlated()).double()
    factor, _ = inverse_factor(h, 0.01)
    quarters = torch.full((1, ROWS), 0.25, dtype=torch.float64)
    levels = Levels(quarters, 512 * quarters, torch.zeros(CHANNELS, dtype=torch.int32), 255)
    results = []
    for numbers in ({"columns": columns, "run": run}, {}):
        codes = torch.empty(CHANNELS, ROWS, dtype=torch.uint8)
        loss = column_loop(weight.double().T.contiguous(), factor, levels.of, codes, **numbers)
        results.append((codes, float(loss)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-9)


@every("columns", [1, 128, 300, 1000])
def test_a_long_run_is_rounded_in_parts_that_do_not_reach_into_the_next_run(columns: int) -> None:
    """Of 150 channels, where 128 are rounded at a time: each run has its own grid."""
    channels, asked, current = 300, [], []
    full = random(ROWS, channels).double().T.contiguous()
    factor, _ = inverse_factor(hessian_of(correlated(channels, 900)).double(), 0.01)
    scale = torch.tensor([[0.25], [0.5]], dtype=torch.float64).expand(2, ROWS)
    of_channels = (torch.arange(channels) // 150).int()
    codes, expected = (torch.empty(channels, ROWS, dtype=torch.uint8) for _ in range(2))
    levels = Levels(scale, torch.full_like(scale, 128), of_channels, 255)

    def of_run(first: int, last: int) -> Levels:
        asked.append((first, last))
        current.append(w[first : first // 150 * 150 + 150].clone())
        return levels.of(first, last)

    w = full.clone()
    column_loop(w, factor, of_run, codes, run=150, columns=columns)
    assert asked == [(0, 128), (128, 150), (150, 278), (278, 300)]
    one_by_one = full.clone()
    column_loop(one_by_one, factor, levels.of, expected, run=1, columns=1)
    assert torch.equal(codes, expected)
    second = full[150:] - factor[:150, 150:].T @ one_by_one[:150]  # its weights when the first run is done
    assert torch.allclose(current[2], second)


def test_groups_that_are_fitted_on_the_way_see_all_updates_made_so_far() -> None:
    channels, size = 24, 8
    weight, h = random(16, channels), hessian_of(correlated(channels))
    result, _, _ = gptq(weight, h.clone(), UniformGrid(3, size), act_order=False, static_groups=False)
    w, full = weight.double().clone(), damped(h, 0.01)
    for c in range(channels):
        inverse = torch.linalg.inv(full[c:, c:])
        if c % size == 0:
            group = w[:, c : c + size]
            low, high = group.amin(1).clamp_max(0), group.amax(1).clamp_min(0)
            assert torch.allclose(result.scale[:, c // size].double(), (high - low) / 7, rtol=1e-3)
        # Follow our own choice: what is tested is the grid, not a rounding at the edge between two levels.
        error = (w[:, c] - result.dequantize()[:, c].double()) / inverse[0, 0]
        w[:, c:] -= error[:, None] * inverse[0]


@every("static_groups", [False, True])
def test_permuted_inputs_permute_the_result_under_activation_order(static_groups: bool) -> None:
    weight, x = random(ROWS, CHANNELS), correlated()
    shuffled = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(3))
    grid = UniformGrid(4, -1 if static_groups else 16)
    plain, _, _ = gptq(weight, hessian_of(x), grid, static_groups=static_groups)
    moved, _, _ = gptq(weight[:, shuffled], hessian_of(x[:, shuffled]), grid, static_groups=static_groups)
    same = (moved.dequantize() - plain.dequantize()[:, shuffled]).abs() < 1e-4
    assert same.float().mean() > 0.97  # float32 sums in another order: single roundings may tip


def test_the_first_column_in_order_is_plain_rounding() -> None:
    weight, h, grid = random(ROWS, CHANNELS), hessian_of(correlated()), UniformGrid(3, 32)
    first = int(h.diagonal().argmax())
    result, _, _ = gptq(weight, h, grid)
    assert torch.equal(result.codes[:, first], quantize(weight, grid).codes[:, first])


def test_a_dead_channel_becomes_zero_and_leaves_the_others_alone() -> None:
    weight, x = random(ROWS, CHANNELS), correlated()
    x[:, 5] = 0
    x[:, 60] = 0
    zeroed = weight.clone()
    zeroed[:, [5, 60]] = 0
    result, _, _ = gptq(weight, hessian_of(x), UniformGrid(3, 32))
    other, _, _ = gptq(zeroed, hessian_of(x), UniformGrid(3, 32))
    assert (result.dequantize()[:, [5, 60]] == 0).all()
    assert torch.equal(result.dequantize(), other.dequantize())
    tiny, _, _ = gptq(weight, hessian_of(1e-4 * x), UniformGrid(3, 32))  # dead channels do not dominate the damping
    assert (tiny.dequantize() - result.dequantize()).abs().gt(1e-4).float().mean() < 0.02


def test_with_endless_damping_it_is_rtn() -> None:
    weight, grid = random(ROWS, CHANNELS), UniformGrid(3, 32)
    result, _, _ = gptq(weight, hessian_of(correlated()), grid, damp=1e9)
    assert torch.equal(result.codes, quantize(weight, grid).codes)


def test_dynamic_groups_under_activation_order_remember_the_group_of_every_channel() -> None:
    weight, h, grid = random(ROWS, CHANNELS), hessian_of(correlated()), UniformGrid(3, 16)
    order = torch.argsort(h.diagonal(), descending=True)
    result, _, _ = gptq(weight, h, grid, static_groups=False)
    assert result.group_index is not None
    assert torch.equal(result.group_index[order], torch.arange(CHANNELS, dtype=torch.int32) // 16)
    slow = torch.empty_like(weight)
    for channel in range(CHANNELS):
        group = int(result.group_index[channel])
        slow[:, channel] = (result.codes[:, channel].float() - result.zero_point[:, group]) * result.scale[:, group]
    assert torch.equal(result.dequantize(), slow)
    again = QuantizedTensor.restore(result.tensors(), json.loads(json.dumps(result.header())))
    assert torch.equal(again.dequantize(), slow)


def test_scales_are_rounded_to_their_dtype_before_the_codes_are_chosen() -> None:
    weight, h = random(ROWS, CHANNELS), hessian_of(correlated())
    result, loss, _ = gptq(weight, h.clone(), UniformGrid(3, 32, scale_dtype="float16"))
    assert result.scale.dtype == torch.float16
    assert loss == pytest.approx(proxy(result.dequantize() - weight, damped(h, 0.01)), rel=1e-4)


# Hessian and factor ---------------------------------------------------------------------------------------------------


def test_the_hessian_is_twice_the_mean_over_samples() -> None:
    samples = [correlated(tokens=40, seed=i) for i in range(5)]
    hessian = Hessian()
    for x in samples:
        hessian.add(x)
    expected = sum(2 / 5 * x.double().T @ x.double() for x in samples)
    assert torch.allclose(hessian.take().double(), torch.as_tensor(expected), rtol=1e-5, atol=1e-4)


@every("dtype", [torch.float32, torch.float64])
def test_the_factor_is_upper_triangular_and_gives_the_inverse(dtype: torch.dtype) -> None:
    h = hessian_of(correlated()).to(dtype)
    expected = torch.linalg.inv(damped(h, 0.01))
    factor, repairs = inverse_factor(h.clone(), 0.01)
    assert repairs == 0
    assert torch.equal(factor, factor.triu())
    product = factor.double().T @ factor.double()
    assert (product - expected).abs().max() < (1e-3 if dtype == torch.float32 else 1e-12) * expected.abs().max()


def test_a_hessian_without_a_factor_gets_more_damping_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    h = hessian_of(correlated())
    broken = (
        h - 0.05 * h.diagonal().mean() * torch.eye(CHANNELS) - 1.2 * torch.linalg.eigvalsh(h)[0] * torch.eye(CHANNELS)
    )
    with caplog.at_level(logging.WARNING):
        factor, repairs = inverse_factor(broken.clone(), 0.01, "model.layers.3.mlp.down_proj")
    assert repairs == 1  # 0.01 is too little, 0.1 is enough
    assert "model.layers.3.mlp.down_proj" in caplog.text
    expected = torch.linalg.inv(damped(broken, 0.1))
    assert (factor.double().T @ factor.double() - expected).abs().max() < 1e-2 * expected.abs().max()


def test_float64_comes_after_three_steps_and_then_a_clear_refusal() -> None:
    h = torch.eye(8)
    h[0, 1] = h[1, 0] = -12.0  # eigenvalue −11: 10 times the diagonal cannot lift it
    with pytest.raises(UserError, match=r"layer.*no Cholesky factor.*1000.*float64.*--calibration"):
        inverse_factor(h.clone(), 0.01, "layer")
    h[0, 1] = h[1, 0] = -1.0 - 5e-8  # singular in float32 at any λ it can add below its rounding
    factor, repairs = inverse_factor(h, 1e-9, "layer")
    assert torch.isfinite(factor).all()
    assert repairs > 0


@every("place", [(2, 2), (299, 299)])
@every("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_has_no_factor(place: tuple[int, int], value: float) -> None:
    h = torch.eye(300)  # more than a panel
    h[place] = h[place[::-1]] = value
    with pytest.raises(UserError, match=r"layer.*no Cholesky factor"):
        inverse_factor(h, 0.01, "layer")


def test_weights_that_are_not_finite_are_named() -> None:
    weight = random(8, 16)
    weight[2, 3] = float("nan")
    with pytest.raises(UserError, match=r"block.*not finite"):
        gptq(weight, torch.eye(16), UniformGrid(4, 8), name="block.q_proj")


@every("damp", [0.0, -0.01, float("nan")])
def test_damping_must_be_positive(damp: float) -> None:
    with pytest.raises(UserError, match=r"weights\.damp="):
        GPTQ(UniformGrid(4), damp=damp)


# a block --------------------------------------------------------------------------------------------------------------


def recipe(**fields: Any) -> Recipe:
    behind = fields.pop("behind", False)
    weights = GPTQ(UniformGrid(3, 32), **fields)
    return Recipe(weights=weights, calibrate_behind_prefix=behind, prefix="bos" if behind else "none")


class Watching(GPTQ):
    """GPTQ that keeps the Hessians it was given."""

    seen: dict[str, Tensor]

    def quantize_block(self, block: DecoderBlock) -> Any:
        from quantization.weights import gptq as module

        original = module.shared_hessians

        def watched(block: DecoderBlock, true_sequential: bool) -> Any:
            for names, hessian in original(block, true_sequential):
                Watching.seen |= {f"{block.name}.{name}": hessian.clone() for name in names}
                yield names, hessian

        module.shared_hessians = watched
        try:
            return super().quantize_block(block)
        finally:
            module.shared_hessians = original


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("true_sequential", [False, True])
def test_the_first_blocks_hessians_are_those_of_hooks_on_the_whole_model(
    model_type: str, true_sequential: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, Watching.seen = tiny_checkpoint(tmp_path, model_type), {}
    quantized = quantize_checkpoint(
        source,
        Recipe(weights=Watching(UniformGrid(3, 32), true_sequential=true_sequential)),
        tmp_path / "q",
        segments=SEGMENTS,
    )
    dense, mine = AutoModelForCausalLM.from_pretrained(source), load_quantized(quantized)
    name = next(iter(Watching.seen)).rsplit(".layers.0.", 1)[0] + ".layers.0"
    block = dense.get_submodule(name)
    for step in Watching(UniformGrid(3, 32)).__class__.__mro__[1:2]:
        assert step is GPTQ
    sets = [
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj", "out_proj"),
        ("gate_proj", "up_proj", "fc1"),
        ("down_proj", "fc2"),
    ]
    for names in sets:
        linears = {n: m for n, m in block.named_modules() if n.split(".")[-1] in names}
        sums: dict[str, Tensor] = {}

        def look(module: Any, args: Any, sums: dict[str, Tensor] = sums, linears: dict[str, Any] = linears) -> None:
            key = next(n for n, m in linears.items() if m is module)
            x = args[0].flatten(0, -2).double()
            sums[key] = sums.get(key, torch.zeros(())) + 2 / len(SEGMENTS) * x.T @ x

        handles = [m.register_forward_pre_hook(look) for m in linears.values()]
        for segment in SEGMENTS:
            dense(input_ids=segment[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for linear, expected in sums.items():
            assert torch.allclose(Watching.seen[f"{name}.{linear}"].double(), expected, rtol=1e-3, atol=1e-3), linear
        if true_sequential:  # the later sets read what the quantized earlier ones put out
            for linear in linears:
                block.get_submodule(linear).weight.data = mine.get_submodule(f"{name}.{linear}").weight.data


@pytest.mark.parametrize("true_sequential", [False, True])
def test_every_linear_is_quantized_as_if_it_stood_alone(
    true_sequential: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Stacking q, k, v and gate, up into one matrix changes nothing."""
    source, Watching.seen = tiny_checkpoint(tmp_path, "llama", num_hidden_layers=1), {}
    method = Watching(UniformGrid(3, 32), true_sequential=true_sequential)
    mine = load_quantized(quantize_checkpoint(source, Recipe(weights=method), tmp_path / "q", segments=SEGMENTS))
    dense = AutoModelForCausalLM.from_pretrained(source)
    for name, h in Watching.seen.items():
        alone, _, _ = gptq(dense.get_submodule(name).weight, h, UniformGrid(3, 32))
        agree = (alone.dequantize() - mine.get_submodule(name).weight).abs() < 1e-5
        assert agree.float().mean() > 0.99, name  # sums of other widths: single roundings may tip


def test_a_repaired_hessian_is_reported_with_the_checkpoint(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantization.weights import gptq as module

    original = module.shared_hessians

    def spoiled(block: DecoderBlock, true_sequential: bool) -> Any:
        for names, h in original(block, true_sequential):
            if block.index == 1 and len(names) == 3:
                h -= (0.05 * h.diagonal().mean() + torch.linalg.eigvalsh(h)[0]) * torch.eye(len(h))
            yield names, h

    monkeypatch.setattr(module, "shared_hessians", spoiled)
    source = tiny_checkpoint(tmp_path, "llama")
    out = quantize_checkpoint(source, recipe(), tmp_path / "q", segments=SEGMENTS)
    assert read_cost(out)["figures"]["repaired_hessians"] == 1


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_it_repairs_more_of_the_output_than_rtn(
    model_type: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from quantization.weights.rtn import RTN

    source = tiny_checkpoint(tmp_path, model_type)
    dense = AutoModelForCausalLM.from_pretrained(source)
    text = torch.randint(4, 101, (8, 40), generator=torch.Generator().manual_seed(6))
    expected = dense(input_ids=text).logits

    def error(method: Recipe, name: str) -> float:
        model = load_quantized(quantize_checkpoint(source, method, tmp_path / name, segments=SEGMENTS.repeat(8, 1)))
        return float((model(input_ids=text).logits - expected).square().mean())

    assert error(recipe(), "gptq") < 0.9 * error(Recipe(weights=RTN(UniformGrid(3, 32))), "rtn")


def test_behind_the_prefix_the_hessian_holds_no_pivot(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, Watching.seen = tiny_checkpoint(tmp_path, "llama"), {}
    behind = Recipe(
        weights=Watching(UniformGrid(3, 32), true_sequential=False), calibrate_behind_prefix=True, prefix="bos"
    )
    quantize_checkpoint(source, behind, tmp_path / "q", segments=SEGMENTS, behind=PREFIX)
    dense = AutoModelForCausalLM.from_pretrained(source)
    model = attach(dense, build_prefix(dense, PREFIX.tolist()))
    rows: list[Tensor] = []
    handle = dense.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0][0]))
    for segment in SEGMENTS:
        model.score(segment[None], torch.ones_like(segment)[None])
    handle.remove()
    assert all(len(x) == SEGMENTS.shape[1] for x in rows)
    expected = sum(2 / len(rows) * x.double().T @ x.double() for x in rows)
    seen = Watching.seen["model.layers.0.self_attn.o_proj"].double()
    assert torch.allclose(seen, torch.as_tensor(expected), rtol=1e-3, atol=1e-3)


def test_activations_that_are_not_finite_are_named(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers[1].post_attention_layernorm.weight.data[3] = 3e38  # finite, but not what it multiplies
    model.save_pretrained(source)
    with pytest.raises(UserError, match=r"not finite in front of model.layers.1.mlp.gate_proj"):
        quantize_checkpoint(source, recipe(), tmp_path / "q", segments=SEGMENTS)
