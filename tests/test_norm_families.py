"""Families with norms, RoPE or logits of their own, in their variants: what moves between weights is exact, or refused.

tests/test_families.py runs every method on every family; here are the variants that a configuration may ask for, and
scales far from those that a short calibration finds.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import ARCHITECTURES, architecture_of
from intactkv.parts import HALVES
from quantization.grids.uniform import UniformGrid, fake_quantize
from quantization.model.blocks import DecoderBlock
from quantization.model.rescale import Rescaling
from quantization.model.stream import CalibrationStream
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import load_quantized
from quantization.runs.pipeline import quantize_checkpoint
from quantization.transforms.rotate import Rotate
from quantization.transforms.smooth import Smooth
from quantization.weights.awq import AWQ, RATIOS, channel_scales
from quantization.weights.omniquant_let import initial_pairs, prefix_in_basis, transformed

SEGMENTS = torch.randint(4, 101, (3, 12), generator=torch.Generator().manual_seed(5))
PREFIX = torch.tensor([1, 40, 7])
TIED = {"tie_word_embeddings": True}
# name -> (model type, overrides of the configuration)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", TIED | {"attention_bias": True}),
    "gemma2": ("gemma2", TIED),
    "gemma2 without caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", TIED | {"final_logit_softcapping": 4.0}),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "cohere": ("cohere", TIED | {"attention_bias": True}),
    "cohere with norms of queries and keys": ("cohere", {"use_qk_norm": True, "logit_scale": 1.0}),
    "cohere2": ("cohere2", TIED),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm side by side": ("stablelm", {"use_parallel_residual": True}),
    "stablelm with norms of queries and keys": ("stablelm", {"qk_layernorm": True}),
    "granite": ("granite", TIED | {"attention_bias": True, "mlp_bias": True}),
    "smollm3": ("smollm3", TIED | {"attention_bias": True}),
    "ministral": ("ministral", {}),
    "ministral3": ("ministral3", {}),
}
# Rotations that a row refuses, and what its line must say.
UNROTATED = {
    "gemma2": "norms with gains behind attention",
    "gemma2 without caps": "norms with gains behind attention",
    "gemma3": "norms with gains behind attention",
    "olmo2": "norms with gains behind attention",
}

pytestmark = pytest.mark.usefixtures("no_grad")


def made(variant: str) -> PreTrainedModel:
    model_type, own = VARIANTS[variant]
    return tiny_model(model_type, num_hidden_layers=2, **own)


def block_of(model: PreTrainedModel, index: int, prefix: Tensor | None = None) -> DecoderBlock:
    """A block that the calibration text has reached through those in front of it."""
    architecture = architecture_of(model.config)
    stream = CalibrationStream(model, architecture, SEGMENTS, prefix)
    for i, module in enumerate(architecture.blocks_of(model)):
        block = DecoderBlock(i, module, architecture, model.config, stream)
        stream.seed(block)
        if i == index:
            return block
        stream.advance(block)
    raise AssertionError(index)


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saved(model: PreTrainedModel, recipe: Recipe, directory: Path) -> Path:
    model.save_pretrained(directory / "dense")
    return quantize_checkpoint(
        directory / "dense", recipe, directory / "out", segments=SEGMENTS if recipe.calibrates else None
    )


# scales ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("index", [0, 1])
def test_any_scales_leave_the_block_as_it_was_behind_a_prefix(variant: str, index: int) -> None:
    """Of norms, values, queries and keys, a factor of e^±1; block 1 of SmolLM3 and Cohere 2 has no RoPE."""
    block = block_of(made(variant), index, PREFIX)
    stream = block.stream
    assert stream is not None
    pairs = [
        replace(pair, log_scale=pair.log_scale + noise(*pair.log_scale.shape, seed=i))
        for i, pair in enumerate(initial_pairs(block, 0.5, shift=False))
    ]
    assert [pair.rows for pair in pairs].count(True) == ("qk_layernorm" not in VARIANTS[variant][1])
    steps = [pair.step for pair in pairs]
    weights, seeded = transformed(block, steps), prefix_in_basis(stream.seeded(block), block, steps)
    for sample, expected in zip(stream.hidden, stream.outputs(block), strict=True):
        assert far(stream.forward(block, sample, weights, stream.new_cache(block, seeded=seeded)), expected) < 1e-5


@pytest.mark.parametrize(
    ("variant", "index", "wrong"),
    [
        ("cohere", 0, {"pairing": HALVES}),
        ("stablelm", 0, {"turned": None}),
        ("smollm3", 0, {"unturned": frozenset({0})}),
        ("cohere2", 0, {"unturned": frozenset({0})}),
    ],
)
def test_scales_shared_by_other_channels_than_rope_turns_move_the_scores(
    variant: str, index: int, wrong: dict[str, Any]
) -> None:
    block = block_of(made(variant), index)
    stream = block.stream
    assert stream is not None
    block = replace(block, architecture=replace(block.architecture, **wrong))
    pair = initial_pairs(block, 0.5, shift=False)[-1]
    weights = transformed(block, [replace(pair, log_scale=noise(*pair.log_scale.shape)).step])
    assert far(stream.forward(block, stream.hidden[0], weights), next(iter(stream.outputs(block)))) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_smoothing_alone_leaves_the_logits_as_they_were(variant: str, tmp_path: Path) -> None:
    model = made(variant)
    smooth = load_quantized(saved(model, Recipe((Smooth(0.8, values=True, down=True),)), tmp_path))
    assert far(smooth(SEGMENTS).logits, model(SEGMENTS).logits) < 1e-5
    norms = [name for name, _ in model.named_parameters() if "layers.0" in name and name.endswith("norm.weight")]
    moved = [n for n in norms if not torch.equal(smooth.get_parameter(n), model.get_parameter(n))]
    assert bool(moved) == (variant != "olmo2")


def test_a_norm_that_multiplies_by_1_plus_w_is_scaled_as_its_gain_is() -> None:
    block = block_of(made("gemma"), 0)
    gain = 1 + block.module.get_parameter("input_layernorm.weight").double()
    query = block.module.get_parameter("self_attn.q_proj.weight").double().clone()
    feed, scale = block.feeds()[0], torch.logspace(-1, 1.5, 64)
    stored = block.rescale(Rescaling(feed.producer, feed.consumers, scale))
    torch.testing.assert_close(
        1 + block.module.get_parameter("input_layernorm.weight").double(), gain / scale.double(), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        block.module.get_parameter("self_attn.q_proj.weight").double(), query * scale.double(), rtol=1e-5, atol=1e-7
    )
    assert stored.header()["offset"] == 1
    again = Rescaling.restore(stored.tensors(), stored.header())
    assert replace(again, scale=scale) == replace(stored, scale=scale)


def test_values_have_no_offset_and_files_without_one_are_read_as_before() -> None:
    block = block_of(made("gemma"), 0)
    feed = block.feeds()[1]
    assert block.rescale(Rescaling(feed.producer, feed.consumers, torch.full((32,), 2.0))).offset == 0
    old = {"producer": "input_layernorm", "consumers": ["self_attn.q_proj"], "rows": False}
    step = Rescaling.restore({"scale": torch.ones(64)}, old)
    assert step.offset == 0
    assert step.header() == old


def test_what_a_narrow_dtype_rounds_of_1_plus_w_goes_into_the_linears() -> None:
    """A gain near 0 is rounded as coarsely as 1: by 9% here, if the linears got the scale that was asked for."""
    worst = {}
    for model_type in ("gemma", "llama"):
        block = block_of(tiny_model(model_type, dtype=torch.bfloat16), 0)
        names = block.architecture
        norm, linear = (block.module.get_parameter(f"{n}.weight") for n in ("input_layernorm", names.query))
        before = linear.double() * (norm.double() + names.gain_offset)
        feed = block.feeds()[0]
        block.rescale(Rescaling(feed.producer, feed.consumers, torch.logspace(-1, 1.5, 64)))
        error = linear.double() * (norm.double() + names.gain_offset) - before
        worst[model_type] = float((error.norm(dim=0) / before.norm(dim=0)).max())
        again = {n: p.clone() for n, p in block.module.named_parameters()}
        fresh = block_of(tiny_model(model_type, dtype=torch.bfloat16), 0)
        fresh.rescale(block.rescalings[0])  # as an exported search does
        assert all(torch.equal(p, again[n]) for n, p in fresh.module.named_parameters())
    assert worst["gemma"] <= worst["llama"] < 2**-8  # one rounding, of linears alone; llama's norm is rounded as well


@pytest.mark.parametrize("variant", ["cohere", "stablelm side by side"])
def test_awq_measures_the_block_where_one_norm_feeds_both_parts(variant: str) -> None:
    """Its scales are those of the smallest error of the block's output, found by running it with each candidate."""
    block, grid = block_of(made(variant), 0), UniformGrid(3, 16)
    stream, feed = block.stream, block.feeds()[0]
    assert stream is not None
    assert (feed.inside, len(feed.consumers)) == ("", 5)
    seen: list[Tensor] = []
    block.observe(lambda name, x: seen.append(x.flatten(0, 1)) if name == feed.consumers[0] else None)
    magnitude = torch.cat(seen).abs().mean(0)
    errors = []
    for i in range(RATIOS):
        scale = channel_scales(magnitude, i / RATIOS)
        weights = {
            f"{name}.weight": fake_quantize(block.linears()[name].weight * scale, grid) / scale
            for name in feed.consumers
        }
        made_, wanted = (
            torch.cat([stream.forward(block, x, w) for x in stream.hidden]).double() for w in (weights, None)
        )
        errors.append(float((made_ - wanted).square().mean()))
    best = channel_scales(magnitude, errors.index(min(errors)) / RATIOS)
    AWQ(grid, clip=False).quantize_block(block)
    torch.testing.assert_close(block.rescalings[0].scale, best)


# rotations ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_rotations_leave_the_logits_as_they_were_or_are_refused_before_any_work(variant: str, tmp_path: Path) -> None:
    model = made(variant)
    if variant in UNROTATED:
        with pytest.raises(UserError, match=UNROTATED[variant]) as refused:
            saved(model, Recipe((Rotate(),)), tmp_path)
        assert "use a recipe without rotations" in str(refused.value)
        assert not (tmp_path / "out").exists()
        return
    ours = load_quantized(saved(model, Recipe((Rotate(), Smooth())), tmp_path))
    assert far(ours(SEGMENTS).logits, model(SEGMENTS).logits) < 2e-5
    embeddings = f"{architecture_of(model.config).embeddings[0]}.weight"
    assert far(ours.get_parameter(embeddings), model.get_parameter(embeddings)) > 0.1


@pytest.mark.parametrize("variant", [name for name, why in UNROTATED.items() if "norms" in why])
def test_a_refused_rotation_would_be_wrong(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_type, _ = VARIANTS[variant]
    row = ARCHITECTURES[model_type]
    model = made(variant)
    monkeypatch.setitem(ARCHITECTURES, model_type, lambda config: replace(row(config), unrotated=None))  # type: ignore[arg-type]
    ours = load_quantized(saved(model, Recipe((Rotate(),)), tmp_path))
    assert far(ours(SEGMENTS).logits, model(SEGMENTS).logits) > 1e-2


# what a row says ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_logits_are_what_the_head_says_of_what_the_decoder_returns(variant: str) -> None:
    model = made(variant)
    names = architecture_of(model.config)
    hidden = model.get_submodule(names.decoder)(SEGMENTS).last_hidden_state
    logits = model.get_submodule(names.head)(hidden)
    assert (far(logits, model(SEGMENTS).logits) < 1e-5) == names.plain_logits


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
def test_a_model_that_looks_ahead_is_refused_by_name(model_type: str, checkpoint: Callable[..., Path]) -> None:
    source = checkpoint(model_type, use_bidirectional_attention=True)
    assert AutoModelForCausalLM.from_pretrained(source) is not None  # transformers takes it
    with pytest.raises(UserError, match="use_bidirectional_attention=true"):
        quantize_checkpoint(source, Recipe((Smooth(),)), source.parent / "out", segments=SEGMENTS)


def test_smoothing_nothing_is_refused_with_what_there_is_to_smooth(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"olmo2 has no norm in front of its linears.*transforms\.smooth\.values=true"):
        saved(made("olmo2"), Recipe((Smooth(),)), tmp_path)
