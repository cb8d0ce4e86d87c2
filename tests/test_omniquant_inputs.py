"""OmniQuant with quantized inputs (W4A4): training sees what the model will see."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from intactkv.architecture import architecture_of
from intactkv.attach import attach
from quantization.grids.uniform import UniformGrid
from quantization.kv_cache import PerHead
from quantization.model.activations import Activations
from quantization.model.attention import AttentionProducts
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import InputQuantizer
from quantization.model.rounding import BlockRounding
from quantization.model.stream import CalibrationStream
from quantization.named import named_recipe
from quantization.recipes.recipe import Recipe, describe, with_settings
from quantization.runs.checkpoint import load_quantized
from quantization.runs.identities import by_tokens
from quantization.runs.pipeline import quantize_checkpoint
from quantization.weights import omniquant
from quantization.weights.omniquant import Learned, OmniQuant, learn, start
from quantization.weights.omniquant_let import initial_pairs

SEGMENTS = torch.randint(4, 101, (4, 24), generator=torch.Generator().manual_seed(5))
LEAD = torch.tensor([1, 40])
WEIGHTS, TOKENS = UniformGrid(4, -1, "intactkv-asym"), UniformGrid(4, -1, "minmax-asym")

pytestmark = pytest.mark.usefixtures("no_grad")


def plain_rounded(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Every last axis of x on its own 4-bit grid of min and max; low, high: another range."""
    low = x.amin(-1, keepdim=True) if low is None else low
    high = x.amax(-1, keepdim=True) if high is None else high
    scale = (high - low) / 15
    zero = torch.round(-low / scale)
    return (torch.clamp(torch.round(x / scale) + zero, 0, 15) - zero) * scale


def plain_block(module: Any, hidden: Tensor, cosine: Tensor, sine: Tensor, rounded: bool) -> Tensor:
    """A LLaMA block on (1, T, d) in float64, with weights of 0.982 of their range on 4-bit grids per row. rounded: also
    what every linear reads, queries and keys after RoPE, values, each on the grid of its token and head."""
    share = float(torch.sigmoid(torch.tensor(4.0, dtype=torch.float64)))
    see = plain_rounded if rounded else lambda x: x

    def weight(linear: Any) -> Tensor:
        w = linear.weight.double()
        low, high = share * w.amin(-1, keepdim=True), share * w.amax(-1, keepdim=True)
        return plain_rounded(w, low.clamp_max(0), high.clamp_min(0))  # which contains 0

    def norm(of: Any, x: Tensor) -> Tensor:
        return of.weight.double() * x / (x.square().mean(-1, keepdim=True) + of.variance_epsilon).sqrt()

    attention, mlp, x = module.self_attn, module.mlp, hidden.double()
    inputs = see(norm(module.input_layernorm, x))
    query, key, value = (
        (inputs @ weight(linear).T).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, cosine.double(), sine.double())
    query, key, value = see(query), see(key), see(value)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) / attention.head_dim**0.5
    later = torch.ones_like(scores[0, 0]).triu(1).bool()
    mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
    x = x + see(mixed.transpose(1, 2).flatten(2)) @ weight(attention.o_proj).T
    inputs = see(norm(module.post_attention_layernorm, x))
    gate, up = inputs @ weight(mlp.gate_proj).T, inputs @ weight(mlp.up_proj).T
    return x + see(torch.nn.functional.silu(gate) * up) @ weight(mlp.down_proj).T


def first_block(model: PreTrainedModel, prefix: Tensor | None = None) -> DecoderBlock:
    """The first block as the pipeline hands it over, with what W4A4 rounds."""
    architecture = architecture_of(model.config)
    stream = CalibrationStream(model, architecture, SEGMENTS, prefix)
    block = DecoderBlock(0, architecture.blocks_of(model)[0], architecture, model.config, stream)
    stream.seed(block)
    stream.full = list(stream.hidden)
    stream.targets = list(stream.outputs(block, stream.full))
    inputs = Activations(TOKENS).fit_block(block)
    return replace(block, rounding=BlockRounding(inputs, AttentionProducts(TOKENS, rows=False), PerHead(4)))


def test_the_loss_is_that_of_rounded_inputs_queries_keys_and_values(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    block = first_block(model)
    assert block.stream is not None
    positions = torch.arange(SEGMENTS.shape[1])[None]
    cosine, sine = model.model.rotary_emb(block.stream.hidden[0], positions)
    expected = {}
    for rounded in (True, False):
        outputs = [plain_block(block.module, x, cosine, sine, rounded) for x in block.stream.hidden]
        pairs = zip(outputs, block.stream.targets, strict=True)
        expected[rounded] = float(torch.stack([(y - t).square().mean() for y, t in pairs]).mean())
    method = OmniQuant(WEIGHTS, epochs=1, lwc_lr=1e-12)
    for seen, rounded in ((block, True), (replace(block, rounding=None), False)):
        with torch.enable_grad():
            before, _ = learn(seen, Learned(start(block, WEIGHTS)), method)
        assert before == pytest.approx(expected[rounded], rel=0.01)  # a value between two levels may fall to either
    assert expected[True] > 1.5 * expected[False]
    # Afterwards nothing rounds, and attention runs as before.
    after = list(block.stream.outputs(block, block.stream.full))
    assert all(torch.equal(x, y) for x, y in zip(after, block.stream.targets, strict=True))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("prefix", [None, LEAD], ids=["", "behind"])
def test_every_step_sees_rounded_inputs_and_the_targets_see_none(
    model_type: str, prefix: Tensor | None, tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of LET reach the scales of queries and keys, which only rounded keys and queries have."""
    model = tiny_model(model_type)
    lead = SEGMENTS[:, :0] if prefix is None else prefix.expand(len(SEGMENTS), -1)
    exact = model(torch.cat([lead, SEGMENTS], 1), output_hidden_states=True).hidden_states[1][:, lead.shape[1] :]
    block = first_block(model, prefix)
    assert block.stream is not None
    learned = Learned(start(block, WEIGHTS), initial_pairs(block, 0.5, False))
    method = OmniQuant(WEIGHTS, let=True, epochs=3, aug_loss=True)
    scale = learned.pairs[-1].log_scale.clone()
    rounded: list[InputQuantizer] = []
    seen: list[list[list[Tensor]]] = []
    quantize, sample_loss = InputQuantizer.forward, omniquant._sample_loss

    def count(self: InputQuantizer, x: Tensor) -> Tensor:
        rounded.append(self)
        return quantize(self, x)

    def look(block: DecoderBlock, student: Any, targets: list[list[Tensor]], i: int) -> Tensor:
        seen.append(targets)
        return sample_loss(block, student, targets, i)

    monkeypatch.setattr(InputQuantizer, "forward", count)
    monkeypatch.setattr(omniquant, "_sample_loss", look)
    with torch.enable_grad():
        before, after = learn(block, learned, method)
    assert after < before
    assert (learned.pairs[-1].log_scale - scale).abs().max() > 1e-3
    # Three times over four samples, and the losses before and after each: every input, and nothing else.
    assert len(seen) == 3 * 4 + 4 * 4
    assert len(rounded) == len(seen) * len(block.architecture.linears)
    assert len(seen[-1]) == 2
    for target in seen[-1]:
        assert_close(torch.cat(list(target)), exact)


def test_trained_w4a4_is_nearer_to_full_precision_on_text_that_it_did_not_learn_from(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path, "llama", num_hidden_layers=1, seed=2)
    text, held_out = (torch.randint(4, 101, (32, 32), generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))
    exact = AutoModelForCausalLM.from_pretrained(source).eval()(held_out).logits
    trained = with_settings(named_recipe("omniquant-w4a4"), ["weights.epochs=5"])
    # Rounding to nearest behind the scales that LET starts from.
    untrained = with_settings(trained, ["weights.epochs=1", "weights.let_lr=1e-12", "weights.lwc=false"])
    errors = []
    for name, recipe in (("untrained", untrained), ("trained", trained)):
        model = load_quantized(quantize_checkpoint(source, recipe, tmp_path / name, segments=text))
        errors.append(float((attach(model, None, recipe.kv_cache).score(held_out) - exact).norm() / exact.norm()))
    assert errors[1] < 0.98 * errors[0], errors


# recipes and identities -----------------------------------------------------------------------------------------------


def test_the_rows_are_the_papers_settings() -> None:
    w4a4, w6a6 = named_recipe("omniquant-w4a4"), named_recipe("omniquant-w6a6")
    for recipe, bits in ((w4a4, 4), (w6a6, 6)):
        weights, tokens = UniformGrid(bits, -1, "intactkv-asym"), UniformGrid(bits, -1, "minmax-asym")
        assert recipe.weights == OmniQuant(weights, let=True, epochs=20, aug_loss=bits == 4)
        assert recipe.activations == Activations(tokens)
        assert recipe.attention == AttentionProducts(tokens, rows=False)
        assert recipe.kv_cache == PerHead(bits, "minmax-asym")  # one rule for all that is rounded token by token
        assert recipe.trains_rounded
    assert replace(w4a4, activations=None, attention=None, kv_cache=None) == named_recipe("omniquant-let")


def made_of(recipe: Recipe) -> dict[str, Any]:
    return by_tokens("0" * 16, recipe, SEGMENTS).made_of


def test_what_training_sees_is_part_of_the_checkpoints_name_and_nothing_else_is() -> None:
    recipe = named_recipe("omniquant-w4a4")
    assert made_of(recipe)["kv_cache"] == describe(PerHead(4))
    assert made_of(replace(recipe, kv_cache=PerHead(3))) != made_of(recipe)
    assert made_of(replace(recipe, attention=None)) != made_of(recipe)
    # Without rounded inputs, and with static ones, training sees no cache: the checkpoints are those of before.
    for blind in (
        replace(recipe, activations=None, attention=None),
        replace(recipe, activations=Activations(TOKENS, static=True), attention=None),
    ):
        assert not blind.trains_rounded
        assert made_of(replace(blind, kv_cache=None)) == made_of(replace(blind, kv_cache=PerHead(4)))


def test_an_older_part_of_attention_is_described_as_before() -> None:
    assert describe(AttentionProducts(TOKENS)) == {"kind": "AttentionProducts", "grid": describe(TOKENS)}
    assert describe(AttentionProducts(TOKENS, rows=False))["rows"] is False
    assert (AttentionProducts(TOKENS).label, AttentionProducts(TOKENS, rows=False).label) == ("qs4", "q4")


def test_queries_alone_are_rounded_where_rows_are_not(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """With 8-bit queries and exact rows the error is that of the queries; rows of 2 bits would show."""
    exact = tiny_model("llama")(SEGMENTS).logits
    errors = {}
    for rows in (True, False):
        model = tiny_model("llama")
        AttentionProducts(UniformGrid(8), rows=rows).install(model)
        errors[rows] = float((model(SEGMENTS).logits - exact).norm())
    assert 0 < errors[False] < errors[True]
