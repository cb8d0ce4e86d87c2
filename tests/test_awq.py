"""AWQ: the search against slow formulas in float64, files of the model zoo, the twin, and its calibration text."""

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from common import every
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from corpora.errors import UserError
from corpora.text import packed_documents
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from quantization.__main__ import main as quantization_main
from quantization.export.awq_search import recovered_limits
from quantization.grids.stored import restore
from quantization.grids.uniform import UniformGrid, fake_quantize, quantize
from quantization.model.blocks import DecoderBlock
from quantization.model.rescale import per_column, rescale_all
from quantization.model.stream import CalibrationStream
from quantization.model.text import BATCH
from quantization.named import named_recipe
from quantization.programs.export import export
from quantization.programs.export import main as export_main
from quantization.recipes.recipe import Recipe, with_settings
from quantization.runs.checkpoint import block_file, load_quantized, read_block, read_manifest
from quantization.runs.identities import by_tokens
from quantization.runs.pipeline import quantize_checkpoint
from quantization.runs.plan import plan_run
from quantization.weights.awq import (
    AWQ,
    Inputs,
    _fresh_cache,
    channel_scales,
    clip_limits,
    clipped,
    search_scales,
)
from quantization.weights.rtn import RTN

MHA = {"num_key_value_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),  # two query heads read one value head
    "llama-mha": ("llama", MHA),
    "qwen3": ("qwen3", {}),
    "opt": ("opt", {}),
}
W3 = UniformGrid(3, 32)
PREFIX = torch.tensor([1, 40, 7])
SEGMENTS = torch.randint(4, 101, (3, 12), generator=torch.Generator().manual_seed(5))
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def checkpoint(checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """checkpoint(family, **overrides) -> a dense checkpoint that tests only read."""

    def make(family: str = "llama", **overrides: Any) -> Path:
        model_type, own = FAMILIES[family]
        return checkpoint(model_type, **(own | overrides))

    return make


@pytest.fixture(scope="module")
def searched(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """searched(family, method=AWQ(W3), behind=False, **overrides) -> AWQ's checkpoint, which tests only read."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", method: AWQ = AWQ(W3), behind: bool = False, **overrides: Any) -> Path:  # noqa: B008
        key = f"{family}{method}{behind}{sorted(overrides.items(), key=str)}"
        if key not in made:
            out = tmp_path_factory.mktemp("awq") / "out"
            made[key] = awq(checkpoint(family, **overrides), method, out, behind)
        return made[key]

    return make


def awq(source: Path, method: AWQ, out: Path, behind: bool = False) -> Path:
    recipe = Recipe(weights=method, prefix="bos", calibrate_behind_prefix=behind)
    text = SEGMENTS if method.calibrates else None
    return quantize_checkpoint(source, recipe, out, segments=text, behind=PREFIX if behind else None)


def dense(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory).eval().requires_grad_(False)


def blocks_of(model: PreTrainedModel) -> list[DecoderBlock]:
    architecture = architecture_of(model.config)
    modules = architecture.blocks_of(model)
    return [DecoderBlock(i, module, architecture, model.config) for i, module in enumerate(modules)]


def twin_of(source: Path, quantized: Path) -> PreTrainedModel:
    """The dense model with the checkpoint's rescalings, nothing rounded."""
    model = dense(source)
    for block in blocks_of(model):
        rescale_all(block.module, read_block(block_file(quantized, block.index)).rescalings, block.head_size)
    return model


def published_rounding(w: Tensor, bits: int, size: int) -> Tensor:
    """The definition, group by group along a row; the range holds 0. w: (out, in) float32, as is the result."""
    groups = w.view(len(w), -1, size)
    low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    step = (high - low).clamp_min(1e-5) / (2**bits - 1)
    zero = (-torch.round(low / step)).clamp(0, 2**bits - 1)
    return ((torch.round(groups / step) + zero).clamp(0, 2**bits - 1) - zero).mul(step).view_as(w)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# rounding -------------------------------------------------------------------------------------------------------------


@every("bits", [2, 3, 4])
@every("size", [8, 64])
def test_the_default_grid_is_the_published_one_and_the_reference_s_where_groups_straddle_zero(
    bits: int, size: int
) -> None:
    weight = gaussian(32, 64)
    assert AWQ(UniformGrid(bits, size)).grid.convention == "gptq-asym"
    ours = fake_quantize(weight, UniformGrid(bits, size))
    assert torch.equal(ours, published_rounding(weight, bits, size))
    straddles = (weight.view(32, -1, size).amin(-1) < 0) & (weight.view(32, -1, size).amax(-1) > 0)
    reference = fake_quantize(weight, UniformGrid(bits, size, "awq-asym"))
    assert torch.equal(ours.view(32, -1, size)[straddles], reference.view(32, -1, size)[straddles])


def test_a_group_of_one_sign_survives() -> None:
    weight = torch.linspace(1, 2, 32)[None]
    assert float((fake_quantize(weight, W3) - weight).abs().max()) <= 2 / 7 / 2 * 1.0001
    assert len(fake_quantize(weight, UniformGrid(3, 32, "awq-asym")).unique()) == 1  # the reference


# scales ---------------------------------------------------------------------------------------------------------------


@every("ratio", [0.0, 0.05, 0.5, 0.95])
def test_scales_are_powers_of_the_magnitudes_with_a_geometric_mean_of_the_extremes_of_one(ratio: float) -> None:
    magnitude = gaussian(64).abs() * 10
    magnitude[5] = 0  # a channel that no token ever fed
    scale = channel_scales(magnitude, ratio)
    assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-6)
    plain = [max(float(a) ** ratio, 1e-4) for a in magnitude.double()]
    expected = torch.tensor(plain).double() / (max(plain) * min(plain)) ** 0.5
    torch.testing.assert_close(scale.double(), expected, rtol=1e-5, atol=0)
    if ratio == 0:
        assert torch.equal(scale, torch.ones(64))


def test_of_equal_losses_the_smaller_ratio_wins() -> None:
    magnitude = gaussian(8).abs()
    assert torch.equal(search_scales(magnitude, lambda s: torch.tensor(1.0), "here")[0], torch.ones(8))
    tried: list[float] = []

    def loss(scale: Tensor) -> Tensor:
        tried.append(len(tried))
        return torch.tensor({8: 1.0, 9: 1.0, 10: torch.nan}.get(len(tried), 2.0))

    assert torch.equal(search_scales(magnitude, loss, "here")[0], channel_scales(magnitude, 7 / 20))
    assert len(tried) == 20


def test_losses_that_are_not_finite_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="here: no scale gives a finite error"):
        search_scales(torch.ones(4), lambda s: torch.tensor(torch.nan), "here")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])
def test_the_scales_alone_change_no_output(
    family: str, grouped: bool, checkpoint: Callable[..., Path], searched: Callable[..., Path]
) -> None:
    source, out = checkpoint(family), searched(family, AWQ(W3, grouped_values=grouped))
    rescalings = [read_block(block_file(out, i)).rescalings for i in range(3)]
    has_values = family in ("llama-mha", "opt") or grouped
    assert [len(steps) for steps in rescalings] == [4 if has_values else 3] * 3
    assert any(float(step.scale.max()) > 1.5 for steps in rescalings for step in steps)  # something is rescaled
    for steps in rescalings:
        for step in steps:
            assert step.scale.dtype == torch.float32
            assert float(step.scale.max() * step.scale.min()) == pytest.approx(1, rel=1e-5)
    expected = dense(source)(SEGMENTS).logits
    found = twin_of(source, out)(SEGMENTS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    # so that it is the rounding alone that makes the difference
    assert float((load_quantized(out)(SEGMENTS).logits - expected).norm() / expected.norm()) > 0.01


def seen_by(module: torch.nn.Module, run: Callable[[Tensor], Any]) -> tuple[Tensor, Tensor]:
    """What a module reads and puts out over all segments, (N·T, channels) each; the text only."""
    read: list[Tensor] = []
    put: list[Tensor] = []

    def hook(_module: torch.nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        read.append((args[0] if args else keywords["hidden_states"]).flatten(0, -2))
        put.append((output[0] if isinstance(output, tuple) else output).flatten(0, -2))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    run(SEGMENTS)
    handle.remove()
    return read[0], put[0]


@pytest.mark.parametrize(
    ("family", "behind", "grouped"),
    [(family, behind, False) for family in FAMILIES for behind in (False, True)] + [("llama", True, True)],
)
def test_the_search_finds_what_trying_every_ratio_in_the_whole_full_precision_model_finds(
    family: str, behind: bool, grouped: bool, checkpoint: Callable[..., Path], searched: Callable[..., Path]
) -> None:
    # No earlier block is rounded or rescaled in the truth: every block must see what full precision passes on. Behind
    # a prefix its tokens are in no mean, and its keys and values stay those of the full-precision weights.
    source, method = checkpoint(family), AWQ(W3, grouped_values=grouped)
    out = searched(family, method, behind)
    model = dense(source).double()
    prefix = build_prefix(model, PREFIX)
    run: Callable[[Tensor], Any] = attach(model, prefix).feed if behind else model
    for block in blocks_of(model):
        stored = read_block(block_file(out, block.index))
        steps = {step.producer: step for step in stored.rescalings}
        smallest_losses = 0.0
        for feed in method.rescaled_feeds(block):
            measured = block.module.get_submodule(feed.inside)
            _, expected = seen_by(measured, run)
            x, _ = seen_by(block.module.get_submodule(feed.consumers[0]), run)
            magnitude = x.abs().mean(0)
            if grouped and feed.producer.endswith("v_proj"):  # heads 0 and 1 read value head 0, 2 and 3 the other
                heads = magnitude.view(4, 16)
                magnitude = torch.cat([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2])
            losses, full = [], {name: block.linears()[name].weight.data for name in feed.consumers}
            for i in range(20):
                scale = magnitude.pow(i / 20).clamp_min(1e-4)
                scale = (scale / (scale.max() * scale.min()).sqrt()).float()
                for name, weight in full.items():
                    columns = per_column(scale, weight.shape[1], 16)
                    rounded = published_rounding(weight.float() * columns, 3, 32).double() / columns.double()
                    block.linears()[name].weight.data = rounded
                _, output = seen_by(measured, run)
                losses.append(float((output - expected).square().mean()))
                if torch.allclose(scale, steps[feed.producer].scale, rtol=1e-4):
                    chosen = losses[-1]
            for name, weight in full.items():
                block.linears()[name].weight.data = weight
            assert chosen <= min(losses) * (1 + 1e-4) <= losses[0] * (1 + 1e-4)
            assert max(losses) > 1.01 * min(losses)  # or there would be nothing to find
            smallest_losses += min(losses)
        assert stored.figures["loss"] == pytest.approx(smallest_losses, rel=1e-3)


def test_a_channel_with_a_hundredfold_activation_gets_the_largest_scale(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = dense(checkpoint())
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight[7] *= 100
    model.save_pretrained(tmp_path / "planted")
    out = awq(tmp_path / "planted", AWQ(W3), tmp_path / "out")
    for index in range(3):
        (step,) = [s for s in read_block(block_file(out, index)).rescalings if s.producer == "post_attention_layernorm"]
        assert int(step.scale.argmax()) == 7
        assert float(step.scale.max()) > 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_awq_loses_less_than_rounding_to_nearest(
    family: str, checkpoint: Callable[..., Path], searched: Callable[..., Path], tmp_path: Path
) -> None:
    # The output of the first block, which both see from the same input.
    source = checkpoint(family)
    rtn = quantize_checkpoint(source, Recipe(weights=RTN(W3)), tmp_path / "rtn")
    expected, *found = (
        model(SEGMENTS, output_hidden_states=True).hidden_states[1]
        for model in (dense(source), load_quantized(searched(family)), load_quantized(rtn))
    )
    errors = [float((output - expected).square().mean()) for output in found]
    assert errors[0] < 0.9 * errors[1]


# clip limits ----------------------------------------------------------------------------------------------------------


@every(("size", "convention"), [(8, "gptq-asym"), (32, "gptq-asym"), (-1, "gptq-asym"), (8, "awq-asym")])
@every("tokens", [5, 40])
def test_the_clip_limits_are_those_of_a_brute_force_search(size: int, convention: str, tokens: int) -> None:
    weight, x = gaussian(6, 32) ** 3, gaussian(tokens, 32, seed=1) * gaussian(32, seed=2).exp()
    limits = clip_limits(weight, x, UniformGrid(3, size, convention))
    width = 32 if size == -1 else size
    assert limits.shape == (6, 32 // width, 1)
    below = 0
    for row in range(6):
        for group in range(32 // width):
            columns = slice(group * width, (group + 1) * width)
            w, errors = weight[row, columns], []
            candidates = [float(w.abs().max()) * (1 - i / 20) for i in range(10)]
            for limit in candidates:
                rounded = fake_quantize(w.clamp(-limit, limit)[None], UniformGrid(3, -1, convention))[0]
                errors.append(float(((rounded - w).double() @ x[:, columns].double().T).square().mean()))
            chosen = min(range(10), key=lambda i: abs(candidates[i] - float(limits[row, group])))
            assert float(limits[row, group]) == pytest.approx(candidates[chosen], rel=1e-6)
            assert errors[chosen] <= min(errors) * (1 + 1e-3) <= errors[0] * (1 + 1e-3)
            below += chosen > 0
    assert below > 0  # something was clipped


def test_of_equal_errors_the_largest_limit_wins_and_unread_groups_are_not_clipped() -> None:
    weight, x = gaussian(4, 16), gaussian(10, 16, seed=1)
    x[:, 8:] = 0
    limits = clip_limits(weight, x, UniformGrid(3, 8))
    assert torch.equal(limits[:, 1, 0], weight[:, 8:].abs().amax(-1))


def test_many_rows_are_searched_as_each_one_alone() -> None:
    weight, x = gaussian(2500, 16), gaussian(20, 16, seed=1)
    limits = clip_limits(weight, x, UniformGrid(3, 8))
    for row in (0, 1023, 1024, 2499):
        alone = clip_limits(weight[row : row + 1], x, UniformGrid(3, 8))
        torch.testing.assert_close(limits[row], alone[0], rtol=1e-6, atol=0)


def test_clipping_clamps_every_group_to_its_limit() -> None:
    weight = torch.tensor([[1.0, -3.0, 5.0, -7.0]])
    assert clipped(weight, torch.tensor([[[2.0], [6.0]]])).tolist() == [[1.0, -2.0, 5.0, -6.0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_are_rounded_unclipped_and_the_others_clipped(
    family: str, checkpoint: Callable[..., Path], searched: Callable[..., Path]
) -> None:
    out = searched(family)
    smaller = 0
    for block in blocks_of(twin_of(checkpoint(family), out)):
        stored = read_block(block_file(out, block.index))
        for name, linear in block.linears().items():
            found = restore(*stored.linears[f"{block.name}.{name}"])
            plain = quantize(linear.weight, W3)
            is_plain = torch.equal(found.codes, plain.codes) and torch.equal(found.scale, plain.scale)
            assert is_plain == name.endswith(("q_proj", "k_proj"))
            limits = recovered_limits(linear.weight, found)
            largest = linear.weight.view(len(linear.weight), -1, 32).abs().amax(-1, keepdim=True)
            assert (limits <= largest).all()
            assert (limits >= 0.5499 * largest).all()
            smaller += int((limits < largest).sum())
    assert smaller > 100


@pytest.mark.parametrize("family", FAMILIES)
def test_clip_limits_are_searched_on_scaled_weights_and_inputs(
    family: str, checkpoint: Callable[..., Path], searched: Callable[..., Path]
) -> None:
    # With 36 tokens every one counts, so the truth is clip_limits on what the rescaled full-precision model reads.
    twin = twin_of(checkpoint(family), searched(family))
    for block in blocks_of(twin):
        stored = read_block(block_file(searched(family), block.index))
        for name, linear in block.linears().items():
            if not name.endswith(("q_proj", "k_proj")):
                x, _ = seen_by(linear, twin)
                expected = quantize(clipped(linear.weight, clip_limits(linear.weight, x, W3)), W3)
                found = restore(*stored.linears[f"{block.name}.{name}"])
                same = (expected.scale == found.scale).float().mean()
                assert float(same) > 0.97  # the two inputs differ in the last bits, and some limits are nearly equal


def test_without_clipping_every_linear_is_rounded_to_nearest_behind_its_scales(
    checkpoint: Callable[..., Path], searched: Callable[..., Path]
) -> None:
    out = searched("llama", AWQ(W3, clip=False))
    for block in blocks_of(twin_of(checkpoint("llama"), out)):
        stored = read_block(block_file(out, block.index))
        for name, linear in block.linears().items():
            found = restore(*stored.linears[f"{block.name}.{name}"])
            assert torch.equal(found.dequantize(), fake_quantize(linear.weight, W3))


@every("stride", [1, 2, 5, 7])
def test_every_kth_token_of_all_samples_is_kept(stride: int) -> None:
    samples, delta = [gaussian(count, 8, seed=count) for count in (3, 2, 12, 1, 9)], gaussian(5, 8)
    for i in range(len(samples)):
        inputs = Inputs(stride, alone=True)
        for x in samples[: i + 1]:  # fewer tokens than channels at first, then more
            inputs.add(x)
        whole = torch.cat(samples[: i + 1])
        truth = (whole.double() @ delta.double().T).square().sum()
        torch.testing.assert_close(inputs.squared_error(delta).double(), truth, rtol=1e-5, atol=0)
    assert torch.equal(torch.cat(inputs.tokens), whole[::stride])
    torch.testing.assert_close(inputs.magnitude / inputs.count, whole.abs().mean(0))


# the twin -------------------------------------------------------------------------------------------------------------


def test_the_prefix_of_a_planned_run_is_that_of_the_rescaled_model(
    tiny_checkpoint: Callable[..., Path], intactkv_root: Path
) -> None:
    source = tiny_checkpoint(intactkv_root, "llama", **MHA)
    text = intactkv_root / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    recipe = with_settings(
        named_recipe("awq"),
        ["weights.grid.bits=8", "weights.grid.group_size=32", f"calibration.corpus={text}", "calibration.samples=4",
         "calibration.length=16", "calibration.draw=segments", "prefix=bos"],
    )  # fmt: skip
    plan = plan_run(source, recipe, device=CPU)
    model = plan.load()
    prefix = plan.intact_prefix()
    assert prefix.model.basis == plan.basis != "plain"
    twin = twin_of(source, plan.written(recipe))
    expected, plain = build_prefix(twin, [1]), build_prefix(dense(source), [1])
    for layer in range(3):
        torch.testing.assert_close(prefix.values[layer], expected.values[layer], rtol=0, atol=0)
        torch.testing.assert_close(prefix.keys[layer], expected.keys[layer], rtol=0, atol=0)
        # Scaling v → o divides V; K is what the dense model writes.
        size = float(plain.values[layer].norm())
        assert float((prefix.values[layer] - plain.values[layer]).norm()) > 0.01 * size
        torch.testing.assert_close(prefix.keys[layer], plain.keys[layer], rtol=1e-4, atol=1e-4)
    # In that basis, and only in it, the run computes what full precision does (8 bits).
    ids = torch.cat([torch.ones(len(SEGMENTS), 1, dtype=torch.long), SEGMENTS], dim=1)
    truth = dense(source)(ids).logits
    right = float((model.score(ids) - truth).norm() / truth.norm())
    assert 0 < right < 0.05
    with pytest.raises(UserError, match="basis is 'plain' in the prefix"):
        attach(load_quantized(plan.written(recipe)), plain)


def test_with_grouped_queries_the_prefix_is_that_of_the_dense_model(
    checkpoint: Callable[..., Path], searched: Callable[..., Path]
) -> None:
    twin, plain = build_prefix(twin_of(checkpoint(), searched()), PREFIX), build_prefix(dense(checkpoint()), PREFIX)
    for layer in range(3):
        torch.testing.assert_close(twin.values[layer], plain.values[layer], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(twin.keys[layer], plain.keys[layer], rtol=1e-3, atol=1e-4)


# runs -----------------------------------------------------------------------------------------------------------------


def test_the_prefix_that_calibration_runs_behind_decides_the_scales(searched: Callable[..., Path]) -> None:
    plain, behind = (read_block(block_file(searched("llama", behind=b), 1)).rescalings[0].scale for b in (False, True))
    assert not torch.equal(plain, behind)


def test_half_precision_checkpoints_are_searched_too(
    checkpoint: Callable[..., Path], searched: Callable[..., Path]
) -> None:
    source, out = checkpoint("llama", dtype=torch.bfloat16), searched("llama", dtype=torch.bfloat16)
    expected = dense(source)(SEGMENTS).logits.float()
    rescaled = twin_of(source, out)(SEGMENTS).logits.float()
    assert float((rescaled - expected).norm() / expected.norm()) < 0.1  # bfloat16
    full = read_block(block_file(searched("llama"), 0)).rescalings
    for half, whole in zip(read_block(block_file(out, 0)).rescalings, full, strict=True):
        assert half.scale.dtype == torch.float32
        assert float((half.scale.log() - whole.scale.log()).abs().max()) < 0.5


def damaged(source: Path, directory: Path, name: str, value: float) -> Path:
    model = dense(source)
    model.get_parameter(name).view(-1)[3] = value
    model.save_pretrained(directory)
    return directory


def test_weights_and_activations_that_are_not_finite_are_refused_with_the_linear_s_name(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    weights = damaged(checkpoint(), tmp_path / "a", "model.layers.1.mlp.up_proj.weight", float("nan"))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight' holds values that are not finite"):
        awq(weights, AWQ(W3), tmp_path / "out-a")
    norms = damaged(checkpoint(), tmp_path / "b", "model.layers.1.post_attention_layernorm.weight", 3e38)
    with pytest.raises(UserError, match=r"not finite in front of model\.layers\.1\.mlp\.gate_proj"):
        awq(norms, AWQ(W3), tmp_path / "out-b")


def test_a_model_whose_norms_stand_behind_is_refused_before_any_work(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    for option in ("do_layer_norm_before", "layer_norm_elementwise_affine"):
        with pytest.raises(UserError, match=option):
            awq(checkpoint("opt", **{option: False}), AWQ(W3), tmp_path / "out")
    assert not list(tmp_path.glob("out*/block*"))


# files of the model zoo -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(checkpoint: Callable[..., Path], searched: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory):
    """zoo(family) -> the file of the family's own search."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("zoo") / f"tiny-{family}-w3-g32.pt"
            export(["--format", "awq-search", "--model", str(searched(family)), "--out", str(made[family])])
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_written_to_a_file_and_applied_gives_the_same_bits(
    family: str,
    checkpoint: Callable[..., Path],
    searched: Callable[..., Path],
    zoo: Callable[..., Path],
    tmp_path: Path,
) -> None:
    method = AWQ(W3, file=str(zoo(family)))
    assert not method.calibrates
    applied = awq(checkpoint(family), method, tmp_path / "out")
    for index in range(3):
        ours, theirs = (read_block(block_file(directory, index)) for directory in (searched(family), applied))
        assert all(torch.equal(ours.parameters[name], theirs.parameters[name]) for name in ours.parameters)
        for name, (_, parts, header) in ours.linears.items():
            assert theirs.linears[name][2] == header
            assert all(torch.equal(parts[part], theirs.linears[name][1][part]) for part in parts)
        for a, b in zip(ours.rescalings, theirs.rescalings, strict=True):
            assert (a.header(), torch.equal(a.scale, b.scale)) == (b.header(), True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_file_has_the_layout_of_the_zoo(
    family: str, checkpoint: Callable[..., Path], zoo: Callable[..., Path]
) -> None:
    content = torch.load(zoo(family), weights_only=True)
    assert set(content) == {"scale", "clip"}
    (block, *_), linears = blocks_of(dense(checkpoint(family))), 6 if family == "opt" else 7
    first = "self_attn_layer_norm" if family == "opt" else "input_layernorm"
    producer, consumers, scale = content["scale"][0]
    assert (producer, scale.shape) == (f"{block.name}.{first}", (64,))
    assert consumers == tuple(f"{block.name}.self_attn.{x}_proj" for x in "qkv")
    assert len(content["scale"]) == 3 * (3 if family in ("llama", "qwen3") else 4)
    assert len(content["clip"]) == 3 * (linears - 2)
    assert not any("q_proj" in name or "k_proj" in name for name, _ in content["clip"])
    for name, limits in content["clip"]:
        rows, channels = dense(checkpoint(family)).get_parameter(f"{name}.weight").shape
        assert limits.shape == (rows, channels // 32, 1)


def test_a_half_precision_file_is_applied_scales_first_then_limits_then_rounding(
    checkpoint: Callable[..., Path], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    content = torch.load(zoo("llama-mha"), weights_only=True)
    halves = {
        "scale": [(producer, consumers, s.half()) for producer, consumers, s in content["scale"]],
        "clip": [(name, m.half()) for name, m in content["clip"]],
    }
    torch.save(halves, tmp_path / "any-name.pt")
    out = load_quantized(awq(checkpoint("llama-mha"), AWQ(W3, file=str(tmp_path / "any-name.pt")), tmp_path / "out"))
    model = dense(checkpoint("llama-mha"))
    for producer, consumers, s in halves["scale"]:  # the published order, on the whole model by its full names
        weight = model.get_parameter(f"{producer}.weight")
        weight.data = weight / (s.float() if weight.ndim == 1 else s.float()[:, None])
        for name in consumers:
            model.get_parameter(f"{name}.weight").mul_(s.float())
    limits = dict(halves["clip"])
    for name, weight in model.named_parameters():
        if "_proj" in name:
            m = limits.get(name.removesuffix(".weight"))
            if m is not None:
                weight.data = torch.cat([
                    group.clamp(-m[:, i].float(), m[:, i].float()) for i, group in enumerate(weight.split(32, dim=1))
                ], dim=1)  # fmt: skip
            weight.data = published_rounding(weight, 3, 32)
    torch.testing.assert_close(out(SEGMENTS).logits, model(SEGMENTS).logits, rtol=0, atol=1e-4)


def test_limits_can_be_left_out(checkpoint: Callable[..., Path], searched: Callable[..., Path], zoo, tmp_path) -> None:
    without = awq(checkpoint(), AWQ(W3, clip=False, file=str(zoo())), tmp_path / "without")
    assert torch.equal(
        load_quantized(without)(SEGMENTS).logits,
        load_quantized(searched("llama", AWQ(W3, clip=False)))(SEGMENTS).logits,
    )


def change(content: dict[str, Any], what: str, index: int, **parts: Any) -> None:
    """Replace parts of an entry: producer, consumers, tensor."""
    entry = list(content[what][index])
    for part, value in parts.items():
        entry[{"name": 0, "consumers": 1, "tensor": -1}[part]] = value
    content[what][index] = tuple(entry)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown producer": (
        lambda c: change(c, "scale", 0, name="model.layers.0.ln_1"),
        r"scale of model\.layers\.0\.ln_1 → .* belongs to none",
    ),
    "other consumers": (
        lambda c: change(c, "scale", 0, consumers=("model.layers.0.self_attn.q_proj",)),
        "belongs to none of the block's pairs",
    ),
    "scale of another model": (
        lambda c: change(c, "scale", 0, tensor=torch.ones(128)),
        r"model\.layers\.0\.input_layernorm has the shape \(128,\), the model has 64 channels",
    ),
    "negative scale": (lambda c: c["scale"][1][2].mul_(-1), "not positive and finite"),
    "scaled twice": (lambda c: c["scale"].append(c["scale"][0]), r"scales model\.layers\.0\.input_layernorm twice"),
    "block that is not there": (
        lambda c: change(c, "clip", 0, name="model.layers.3.self_attn.v_proj"),
        r"names 'model\.layers\.3\.self_attn\.v_proj', which is in no block",
    ),
    "name of another family": (
        lambda c: change(c, "scale", 4, name="model.decoder.layers.1.fc1"),
        r"names 'model\.decoder\.layers\.1\.fc1', which is in no block",
    ),
    "unknown linear": (
        lambda c: c["clip"].append(("model.layers.0.mlp.fc1", torch.ones(96, 2, 1))),
        r"model\.layers\.0\.mlp\.fc1 are for a linear that the block does not have",
    ),
    "limits of another model": (
        lambda c: change(c, "clip", 0, tensor=torch.ones(77, 2, 1)),
        r"shape \(77, 2, 1\), which does not fit its 32 × 64 weights",
    ),
    "limits of another group size": (
        lambda c: change(c, "clip", 0, tensor=torch.ones(32, 4, 1)),
        r"are for groups of 16, the recipe has group_size=32; --set weights\.grid\.group_size=16",
    ),
    "limits that are not finite": (lambda c: c["clip"][0][1].fill_(torch.inf), "negative or not finite"),
    "a block left out": (
        lambda c: c["scale"].__delitem__(slice(6, 9)),
        r"nothing for input_layernorm, .*mlp\.up_proj of model\.layers\.2",
    ),
    "no limits": (lambda c: c["clip"].clear(), r"without clipping \(--set weights\.clip=false\)"),
    "no scales": (lambda c: c.pop("scale"), "no file of the AWQ model zoo"),
    "integers": (lambda c: change(c, "scale", 0, tensor=torch.ones(64, dtype=torch.int)), "no file of the AWQ model"),
    "a short entry": (lambda c: c["scale"].append(("a", "b")), "no file of the AWQ model zoo"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_does_not_fit_is_refused_before_any_work(
    wrong: str, checkpoint: Callable[..., Path], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    content = copy.deepcopy(torch.load(zoo(), weights_only=True))
    damage, message = WRONG[wrong]
    damage(content)
    torch.save(content, tmp_path / "zoo.pt")
    with pytest.raises(UserError, match=message) as caught:
        awq(checkpoint(), AWQ(W3, file=str(tmp_path / "zoo.pt")), tmp_path / "out")
    assert "zoo.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_what_is_no_file_of_tensors_is_refused(
    checkpoint: Callable[..., Path], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.pt").write_bytes(zoo().read_bytes()[:5000])
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"scale": [], "clip": [], "code": Path("x")}, tmp_path / "code.pt")  # a class: not safe to load
    for name in ("garbage", "empty", "cut", "list", "code"):
        with pytest.raises(UserError, match=rf"{name}\.pt is no (whole )?file") as caught:
            awq(checkpoint(), AWQ(W3, file=str(tmp_path / f"{name}.pt")), tmp_path / "out")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"nowhere\.pt is not there"):
        awq(checkpoint(), AWQ(W3, file=str(tmp_path / "nowhere.pt")), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "grid"), [("llama-2-7b-w4-g32.pt", "4 bits in groups of 32"), ("a-w3-g128.pt", "128")]
)
def test_a_file_named_for_another_grid_is_refused(
    name: str, grid: str, checkpoint: Callable[..., Path], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copyfile(zoo(), tmp_path / name)
    with pytest.raises(UserError, match=grid):
        awq(checkpoint(), AWQ(W3, file=str(tmp_path / name)), tmp_path / "out")


def test_a_file_for_other_weights_of_the_same_shapes_is_refused(
    checkpoint: Callable[..., Path], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"of the clip limits of model\.layers\.0\..* made for other weights"):
        awq(checkpoint(seed=1), AWQ(W3, file=str(zoo())), tmp_path / "out")


def test_the_content_of_the_file_is_part_of_the_checkpoint_s_identity(zoo: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "zoo.pt"
    shutil.copyfile(zoo(), file)
    recipe = Recipe(weights=AWQ(W3, file=str(file)))
    assert not recipe.calibrates
    first = by_tokens("source", recipe).made_of
    assert first["files"] == [hashlib.sha256(file.read_bytes()).hexdigest()]
    shutil.copyfile(zoo("llama-mha"), file)
    assert by_tokens("source", recipe).made_of != first
    json.dumps(first)


def test_a_file_written_anew_is_read_anew(
    checkpoint: Callable[..., Path], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "zoo.pt"
    shutil.copyfile(zoo("opt"), file)
    with pytest.raises(UserError, match="no block of this model"):
        awq(checkpoint(), AWQ(W3, file=str(file)), tmp_path / "out")
    shutil.copyfile(zoo(), file)
    awq(checkpoint(), AWQ(W3, file=str(file)), tmp_path / "out")


def test_a_program_writes_the_search_and_another_makes_the_same_checkpoint_of_it(
    checkpoint: Callable[..., Path], searched: Callable[..., Path], run_main: Callable[..., Any], tmp_path: Path
) -> None:
    file, again = tmp_path / "search.pt", tmp_path / "again"
    code, printed, errors = run_main(export_main, "--format", "awq-search", "--model", searched(), "--out", file)
    assert (code, errors) == (0, "")
    first, facts = printed.splitlines()
    assert first == f"awq-search  {file.stat().st_size / 1e6:.1f} MB  {file}"
    assert facts.startswith("9 scales, clip limits of 15 linears. Apply them with --recipe awq ")
    said = facts.partition(" with ")[2].split()
    code, _, errors = run_main(quantization_main, "--model", checkpoint(), *said, "--out", again, "--device", "cpu")
    assert code == 0, errors
    assert torch.equal(load_quantized(again)(SEGMENTS).logits, load_quantized(searched())(SEGMENTS).logits)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("rtn", "was not made by AWQ alone"),
        ("no dense", "the dense full-precision model of .* is not at hand"),
        ("other dense", "the dense full-precision model of .* is not at hand"),
        ("directory", "give a file that ends in .pt"),
        ("prefix", "leave out --prefix, --dtype, --verify and --plan"),
    ],
)
def test_only_the_search_of_an_awq_checkpoint_is_exported_where_its_dense_model_is(
    case: str,
    words: str,
    checkpoint: Callable[..., Path],
    searched: Callable[..., Path],
    run_main: Callable[..., Any],
    tmp_path: Path,
) -> None:
    source = (
        quantize_checkpoint(checkpoint(), Recipe(weights=RTN(W3)), tmp_path / "rtn") if case == "rtn" else searched()
    )
    if case.endswith("dense"):
        source = Path(shutil.copytree(source, tmp_path / "moved" / source.name))
    if case == "other dense":
        shutil.copytree(checkpoint(seed=1), source.parent / read_manifest(source)["source"]["directory"])
    out = tmp_path / ("out" if case == "directory" else "a.pt")
    more = ["--prefix", "bos"] if case == "prefix" else []
    code, printed, errors = run_main(export_main, "--format", "awq-search", "--model", source, "--out", out, *more)
    assert (code, printed) == (2, "")
    assert re.search(words, errors)
    assert not out.exists()


def test_a_search_behind_a_prefix_is_not_exported_without_it(
    checkpoint: Callable[..., Path], run_main: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = Recipe(weights=AWQ(W3), prefix="bos", calibrate_behind_prefix=True)
    source = quantize_checkpoint(checkpoint(), recipe, tmp_path / "q", segments=SEGMENTS, behind=torch.tensor([1]))
    out = tmp_path / "a.pt"
    code, _, errors = run_main(export_main, "--format", "awq-search", "--model", source, "--out", out)
    assert code == 2
    assert "was searched behind the prefix [1], without which its scales are wrong" in errors
    assert not out.exists()


# recipes and text -----------------------------------------------------------------------------------------------------


@every(("name", "bits"), [("awq", 3), ("awq-w3", 3), ("awq-w4", 4)])
def test_the_named_recipes_are_the_published_ones(name: str, bits: int) -> None:
    recipe = named_recipe(name)
    assert isinstance(recipe.weights, AWQ)
    assert (recipe.weights.grid.bits, recipe.weights.grid.group_size) == (bits, 128)
    text = recipe.calibration
    assert (text.corpus, text.samples, text.length, text.seed, text.draw) == ("pile", 128, 512, 42, "documents")
    assert (recipe.weights.reads, recipe.weights.rescales, recipe.calibrate_behind_prefix) == ("full", True, False)


def test_a_field_that_nothing_would_read_is_refused() -> None:
    with pytest.raises(UserError, match="grouped_values=true is for a search"):
        AWQ(W3, grouped_values=True, file="some.pt")
    with pytest.raises(UserError, match="awq needs no calibration"):
        Recipe(weights=AWQ(W3, file="some.pt"), prefix="bos", calibrate_behind_prefix=True)
    assert replace(AWQ(W3, file="some.pt"), file="").calibrates


DOCUMENTS = [" " * (i % 3) + "".join(chr(97 + (i + j) % 26) for j in range(i % 41)) + "\n" for i in range(200)]


@pytest.mark.parametrize("seed", [42, 7])
def test_documents_are_packed_in_the_order_of_the_datasets_library(
    seed: int, tiny_tokenizer: Callable[..., Any], tmp_path: Path, intactkv_root: Path
) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    tokenizer, length, samples = tiny_tokenizer(), 30, 50
    expected: list[int] = []
    kept = 0
    for row in datasets.Dataset.from_dict({"text": DOCUMENTS}).shuffle(seed=seed):
        ids = tokenizer(row["text"].strip())["input_ids"]  # the tokenizer puts BOS in front
        if kept < samples and len(ids) <= length and ids != [1]:
            kept += 1
            expected += ids
    pieces = packed_documents(tokenizer, str(file), samples=samples, length=length, seed=seed)
    assert kept == samples
    assert pieces.shape == (len(expected) // length, length)
    assert pieces.flatten().tolist() == expected[: pieces.numel()]
    assert int((pieces == 1).sum()) > len(pieces)  # several documents in a piece


def test_the_documents_of_a_plain_text_are_its_paragraphs(
    tiny_tokenizer: Callable[..., Any], tmp_path: Path, intactkv_root: Path
) -> None:
    """The same pieces as from JSON lines that hold the paragraphs, whatever the line ends."""
    tokenizer = tiny_tokenizer()
    paragraphs = [f"Fox {i} runs.\nIt is {'very ' * (i % 5)}quick." for i in range(40)]
    lines, plain = tmp_path / "a.jsonl", tmp_path / "a.txt"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
    expected = packed_documents(tokenizer, str(lines), samples=12, length=50, seed=3)
    for gap, end in (("\n\n", ""), ("\n \n\n", "\n"), ("\r\n\r\n", "\r\n")):
        plain.write_bytes((gap.join(paragraphs) + end).encode())
        assert torch.equal(packed_documents(tokenizer, str(plain), samples=12, length=50, seed=3), expected)
    plain.write_text("\n".join(paragraphs))  # without blank lines it is one, and too long
    with pytest.raises(UserError, match=r"a\.txt has 0 paragraphs, parted by blank lines, of at most 50 tokens"):
        packed_documents(tokenizer, str(plain), samples=12, length=50, seed=3)


def test_a_document_counts_with_its_start_token_and_is_never_cut_to_fit(
    tiny_tokenizer: Callable[..., Any], tmp_path: Path, intactkv_root: Path
) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a" * 10, "b" * 9, "", " \n")))
    pieces = packed_documents(tiny_tokenizer(), str(file), samples=4, length=10, seed=0)
    assert pieces.tolist() == [[1, *tiny_tokenizer()("b" * 9, add_special_tokens=False)["input_ids"]]]
    with pytest.raises(UserError, match="fill no piece of 5"):
        packed_documents(tiny_tokenizer(), str(file), samples=4, length=5, seed=0)


@pytest.mark.parametrize("batch", ["1", "2"])
@pytest.mark.parametrize("behind", [None, PREFIX], ids=["alone", "behind"])
def test_a_call_that_is_repeated_with_the_same_weights_returns_the_same_bits(
    behind: Tensor | None, batch: str, tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BATCH, batch)
    model = tiny_model("llama")
    architecture = architecture_of(model.config)
    stream = CalibrationStream(model, architecture, SEGMENTS, behind)
    block = DecoderBlock(0, architecture.blocks_of(model)[0], architecture, model.config, stream)
    stream.seed(block)
    _, calls = AWQ(W3)._observe(block)
    assert calls.keys() == {"self_attn", "mlp"}
    for name, of_module in calls.items():
        module = block.module.get_submodule(name)
        pairs = list(of_module.again(module, {}, lambda: _fresh_cache(block)))
        assert sum(len(wanted) for _, wanted in pairs) == len(SEGMENTS)
        assert of_module.numbers == sum(wanted.numel() for _, wanted in pairs) == SEGMENTS.numel() * 64
        assert all(torch.equal(made, wanted) for made, wanted in pairs)
        doubled = {n: 2 * x for n, x in module.named_parameters()}
        assert not any(torch.equal(a, b) for a, b in of_module.again(module, doubled, lambda: _fresh_cache(block)))
