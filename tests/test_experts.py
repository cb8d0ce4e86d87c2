"""Mixtures of experts: laid out, read, calibrated on the tokens that the router sends, transformed and exported."""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import tiny_config, tiny_model
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

import quantization.runs.pipeline as pipeline
from corpora.errors import UserError
from intactkv.architecture import architecture_of
from intactkv.discover import down_maxima
from intactkv.experts import SeparateExperts
from intactkv.layout import Part, lay_out, sources_of
from intactkv.observe import hooked, outputs_of
from quantization.__main__ import main as quantize
from quantization.export.awq_search import export_search
from quantization.export.writer import export_checkpoint
from quantization.grids.uniform import UniformGrid
from quantization.model.activations import input_ranges
from quantization.model.blocks import DecoderBlock
from quantization.model.routed import experts_said
from quantization.model.stream import CalibrationStream
from quantization.model.walk import Walk
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import load_quantized, read_cost
from quantization.runs.dense import DenseCheckpoint, empty_model
from quantization.runs.opening import load_model
from quantization.runs.pipeline import partial_of, quantize_checkpoint
from quantization.transforms.base import BlockTransform
from quantization.transforms.rotate import Rotate
from quantization.transforms.smooth import Smooth, input_maxima
from quantization.weights.awq import AWQ
from quantization.weights.gptq import GPTQ
from quantization.weights.hessians import shared_hessians
from quantization.weights.rtn import RTN

TYPES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
SEGMENTS = torch.randint(4, 101, (5, 24), generator=torch.Generator().manual_seed(3))
IDS = torch.randint(4, 101, (2, 40), generator=torch.Generator().manual_seed(4))
ROW = UniformGrid(4, -1)

pytestmark = pytest.mark.usefixtures("no_grad")


def block_of(model: PreTrainedModel, segments: Tensor = SEGMENTS) -> DecoderBlock:
    """The first block of a model, laid out, with the text in front of it."""
    lay_out(model)
    names = architecture_of(model.config)
    stream = CalibrationStream(model, names, segments)
    return DecoderBlock(0, names.blocks_of(model)[0], names, model.config, stream)


def lonely(model_type: str = "mixtral", **overrides: Any) -> PreTrainedModel:
    """A model whose last expert no token goes to: its router's row is the mean of the others, and only the largest of
    all is chosen."""
    model = tiny_model(model_type, num_experts_per_tok=1, **overrides)
    for layer in model.model.layers:
        weight = layer.mlp.gate.weight
        weight[-1] = weight[:-1].mean(0)
    return model


def outputs_in_front(block: DecoderBlock) -> list[Tensor]:
    """What the norm in front of the router puts out, sample by sample."""
    assert block.stream is not None
    with outputs_of([block.module.get_submodule("post_attention_layernorm")]) as normed:
        for hidden in block.stream.hidden:
            block.stream.forward(block, hidden)
    return normed


def read_by_experts(block: DecoderBlock) -> dict[int, tuple[Tensor, Tensor]]:
    """What the first and the last linears of every expert read, in float64, by the formula: its tokens' outputs of the
    norm; the gated product."""
    mlp: Any = block.module.mlp
    x = torch.cat([y.flatten(0, 1) for y in outputs_in_front(block)])
    chosen = linear(x, mlp.gate.weight).topk(block.config.num_experts_per_tok, dim=-1).indices
    found = {}
    for index in range(block.config.num_local_experts):
        mine = x[(chosen == index).any(-1)].double()
        expert = getattr(mlp.experts, str(index))
        gate, up = (linear(mine, part.weight.double()) for part in (expert.gate_proj, expert.up_proj))
        found[index] = mine, silu(gate) * up
    return found


def gptq_by_hand(weight: Tensor, x: Tensor, damp: float = 0.01) -> Tensor:
    """GPTQ (Frantar et al. 2023, Eq. 2 and 3) in float64, one column after the other, of rows on their own grid."""
    w = weight.double().clone()
    h = x.T @ x
    h += damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    rounded = torch.zeros_like(w)
    for column in range(w.shape[1]):
        inverse = torch.linalg.inv(h[column:, column:])
        codes = ((w[:, column] / scale).round() + zero).clamp(0, 15)
        rounded[:, column] = (codes - zero) * scale
        error = (w[:, column] - rounded[:, column]) / inverse[0, 0]
        w[:, column:] -= error[:, None] * inverse[0]
    return rounded


# the layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model_type", TYPES)
def test_laid_out_experts_compute_what_those_of_transformers_do(model_type: str, implementation: str) -> None:
    model = tiny_model(model_type)
    model.set_experts_implementation(implementation)
    exact = model(IDS).logits
    before = sum(parameter.numel() for parameter in model.parameters())
    lay_out(model)
    assert any(isinstance(module, SeparateExperts) for module in model.modules())
    assert sum(parameter.numel() for parameter in model.parameters()) == before
    assert_close(model(IDS).logits, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", TYPES)
def test_in_half_precision_laid_out_experts_are_transformers_eager_ones(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    exact = copy.deepcopy(model).float()(IDS).logits
    default = model(IDS).logits.float()
    model.set_experts_implementation("eager")
    eager = model(IDS).logits
    found = lay_out(model)(IDS).logits
    assert torch.equal(found, eager)
    # The default may add in float32. It is not nearer to the truth by more than chance.
    assert (found.float() - exact).norm() < 1.2 * (default - exact).norm()


def test_an_index_beyond_the_experts_stands_for_none() -> None:
    model = lay_out(tiny_model("mixtral"))
    experts = model.model.layers[0].mlp.experts
    x, index = torch.randn(3, 64), torch.tensor([[0, 4], [4, 4], [2, 1]])
    weights = torch.full((3, 2), 0.5)
    found = experts(x, index, weights)
    assert_close(found[0], 0.5 * experts.get_submodule("0")(x[:1])[0])
    assert not found[1].any()


def test_linears_are_views_of_the_stacks() -> None:
    model = tiny_model("qwen3_moe")
    stack = model.model.layers[1].mlp.experts.gate_up_proj
    lay_out(model)
    up = model.get_parameter("model.layers.1.mlp.experts.2.up_proj.weight")
    assert up.data_ptr() == stack[2, 32:].data_ptr()


@pytest.mark.parametrize(
    ("overrides", "blocks"), [({"mlp_only_layers": [1]}, r"\(1:"), ({"decoder_sparse_step": 2}, r"\(0, 2:")]
)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe"])
def test_blocks_without_experts_are_refused_by_name(model_type: str, overrides: dict[str, Any], blocks: str) -> None:
    with pytest.raises(UserError, match=rf"blocks without experts {blocks}.*blocks are alike"):
        architecture_of(tiny_config(model_type, **overrides))


def test_cut_queries_take_no_scales_and_no_rotation() -> None:
    names = architecture_of(tiny_config("olmoe", clip_qkv=1.5))
    for why in (names.unscaled, names.unrotated):
        assert why is not None
        assert "clip_qkv=1.5" in why


# reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_spelling_of_files_is_read(model_type: str, original: bool, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    exact = model(IDS).logits
    model.save_pretrained(tmp_path / "model", save_original_format=original)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        stacked = [name for name in file.keys() if name.endswith("gate_up_proj")]  # noqa: SIM118 (not a mapping)
    assert bool(stacked) != original
    checkpoint = DenseCheckpoint(tmp_path / "model")
    checkpoint.check()
    checkpoint.weights(empty_model(tmp_path / "model")).check()
    read = load_model(tmp_path / "model", torch.float32, torch.device("cpu"))
    assert_close(read(IDS).logits, exact, rtol=1e-5, atol=1e-5)


def test_an_expert_is_read_alone_from_a_stack() -> None:
    names = architecture_of(tiny_config("mixtral"))
    places = list(sources_of(names, "model.layers.1.mlp.experts.3.up_proj.weight"))
    assert places[1] == Part("model.layers.1.block_sparse_moe.experts.3.w3.weight")
    stack = next(place for place in places if place.name == "model.layers.1.mlp.experts.gate_up_proj")
    asked: list[Any] = []

    class Watched:
        def __getitem__(self, index: Any) -> Tensor:
            asked.append(index)
            return torch.zeros(4, 192, 64)[index]

    assert stack.taken(Watched()).shape == (96, 64)
    assert asked == [(3, slice(96, 192))]


def test_a_value_of_one_expert_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.model.layers[2].mlp.experts.down_proj[1, 0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model", save_original_format=False)
    weights = DenseCheckpoint(tmp_path / "model").weights(empty_model(tmp_path / "model"))
    with pytest.raises(UserError, match=r"model.layers.2.mlp.experts.down_proj' holds values that are not finite"):
        weights.check()


# calibration ----------------------------------------------------------------------------------------------------------


def test_the_linears_of_an_expert_see_the_tokens_that_are_sent_to_it() -> None:
    block = block_of(tiny_model("mixtral"))
    seen: dict[str, list[Tensor]] = {}
    block.observe(lambda name, x: seen.setdefault(name, []).append(x.flatten(0, 1)))
    for index, (first, last) in read_by_experts(block).items():
        for part, expected in (("gate_proj", first), ("up_proj", first), ("down_proj", last)):
            assert_close(torch.cat(seen[f"mlp.experts.{index}.{part}"]).double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.cat(seen["mlp.gate"]).shape == (SEGMENTS.numel(), 64)


@pytest.mark.parametrize("part", ["gate_proj", "down_proj"])
def test_a_walk_asks_one_expert_alone(part: str) -> None:
    block = block_of(tiny_model("mixtral"))
    expected = read_by_experts(block)[2][part == "down_proj"]
    asked: list[int] = []
    walk = Walk(block)
    for _ in walk.inputs("self_attn.o_proj"):
        pass
    experts = block.module.get_submodule("mlp.experts")
    with hooked(
        module.register_forward_pre_hook(lambda _module, _args, index=index: asked.append(index))
        for index, module in enumerate(experts.children())
    ):
        found = torch.cat([x[0] for x in walk.inputs(f"mlp.experts.2.{part}")])
    assert set(asked) == {2}
    assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_gptq_of_an_expert_is_gptq_by_hand_on_its_tokens(true_sequential: bool) -> None:
    block = block_of(tiny_model("mixtral"))
    full = {name: part.weight.clone() for name, part in block.linears().items()}
    exact = read_by_experts(block)
    grid = UniformGrid(4, -1, convention="gptq-asym")
    quantized = GPTQ(grid, act_order=False, true_sequential=true_sequential).quantize_block(block)
    if true_sequential:  # behind what is rounded in front of it
        for name, weight in quantized.items():
            if not name.endswith("down_proj"):
                block.linears()[name].weight.data = weight.dequantize()
        exact = read_by_experts(block)  # the last reads what its own first linears, rounded, make
    for index, read in exact.items():
        for part, x in zip(("gate_proj", "down_proj"), read, strict=True):
            name = f"mlp.experts.{index}.{part}"
            by_hand = gptq_by_hand(full[name], x)
            mine = quantized[name].dequantize().double()
            step = (full[name].amax(1) - full[name].amin(1)).double()[:, None] / 15
            assert ((mine - by_hand).abs() > 0.5 * step).float().mean() < 2e-3  # a code at a tie moves all behind it


def test_an_expert_without_tokens_takes_the_hessian_of_the_others() -> None:
    block = block_of(lonely())
    read = read_by_experts(block)
    assert not len(read[3][0])
    hessians = {names[0]: h for names, h in shared_hessians(block, False)}
    assert [*hessians][-2:] == ["mlp.experts.3.gate_proj", "mlp.experts.3.down_proj"]
    for part, which in (("gate_proj", 0), ("down_proj", 1)):
        x = torch.cat([read[i][which] for i in range(3)])
        found, expected = hessians[f"mlp.experts.3.{part}"].double(), x.T @ x
        assert_close(found / found.trace(), expected / expected.trace(), rtol=1e-3, atol=1e-6)


def test_an_expert_without_tokens_takes_the_ranges_of_the_others() -> None:
    ranges = input_ranges(block_of(lonely()))
    low, high = ranges["mlp.experts.3.down_proj"]
    others = [ranges[f"mlp.experts.{i}.down_proj"] for i in range(3)]
    assert_close(low, torch.stack([x for x, _ in others]).amin(0))
    assert_close(high, torch.stack([x for _, x in others]).amax(0))


def test_quantization_says_how_many_tokens_the_experts_saw(
    tiny_checkpoint: Callable[..., Path], run_main: Callable[..., tuple[int, str, str]], text: Path, tmp_path: Path
) -> None:
    model = tiny_checkpoint(tmp_path, "mixtral", num_hidden_layers=2)
    words = ("--calibration", text, "--calibration-samples", 6, "--calibration-length", 32)
    code, out, err = run_main(quantize, "--model", model, "--recipe", "gptq-row", *words)
    said = re.search(
        r"^\[experts\] all 8 \(2 blocks × 4\) saw calibration text, (\d+) to (\d+) tokens each$", out, re.M
    )
    assert code == 0, err
    assert said is not None, out
    # two of four experts for each of 6 * 32 tokens
    assert 0 < int(said[1]) <= 6 * 32 / 2 <= int(said[2]) <= 6 * 32


@pytest.mark.parametrize("method", [GPTQ(ROW), AWQ(ROW)], ids=["gptq", "awq"])
def test_unseen_experts_are_counted_and_said_in_one_line(
    method: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lonely(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "quantization.model.routed"):
        out = quantize_checkpoint(tmp_path / "model", Recipe(weights=method), tmp_path / "out", segments=SEGMENTS)
    figures = read_cost(out)["figures"]
    assert figures["experts"] == 8
    assert figures["experts_unseen"] == 2
    assert 0 < figures["expert_tokens_least"] < figures["expert_tokens_most"] <= SEGMENTS.numel()
    assert figures["expert_tokens_most"] >= 40
    assert str(experts_said(figures)).startswith(
        "[experts] 2 of 8 (2 blocks × 4) saw no calibration text and took the others' statistics; the rest "
    )
    lines = [record.getMessage() for record in caplog.records if "experts see" in record.getMessage()]
    assert len(lines) == 2
    assert "of 120 tokens; 1 of them none (3), which take the statistics of the others" in lines[0]
    assert bool(load_quantized(out)(IDS).logits.isfinite().all())


def test_the_scales_of_a_norm_are_weighed_by_all_tokens() -> None:
    block = block_of(tiny_model("mixtral"))
    maxima = input_maxima(block)
    tokens = torch.cat([x for x, _ in read_by_experts(block).values()])
    assert_close(maxima["mlp.gate"].double(), tokens.abs().amax(0), rtol=1e-5, atol=1e-6)


def test_a_look_at_the_last_linears_shows_every_token_what_its_experts_read() -> None:
    model = tiny_model("mixtral")
    block = block_of(model)
    x = torch.cat([y.flatten(0, 1) for y in outputs_in_front(block)])
    chosen = linear(x, block.module.get_parameter("mlp.gate.weight")).topk(2, dim=-1).indices
    truth = torch.stack([torch.cat([_product(block, int(e), x[t]) for e in of]) for t, of in enumerate(chosen)])
    found = down_maxima(model, SEGMENTS)[0]
    assert_close(found, truth.abs().amax(-1).view(SEGMENTS.shape), rtol=1e-5, atol=1e-5)


def _product(block: DecoderBlock, index: int, x: Tensor) -> Tensor:
    expert: Any = block.module.get_submodule(f"mlp.experts.{index}")
    return silu(linear(x, expert.gate_proj.weight)) * linear(x, expert.up_proj.weight)


# transforms -----------------------------------------------------------------------------------------------------------


@contextmanager
def routes(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The experts that every router chooses, in the order of calls."""
    found: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output[2].sort(-1).values)

    with hooked(layer.mlp.gate.register_forward_hook(note) for layer in model.model.layers):
        yield found


@pytest.mark.parametrize("transform", [Smooth(values=True, down=True), Rotate()], ids=["smooth", "rotate"])
@pytest.mark.parametrize("model_type", TYPES)
def test_transforms_change_neither_the_function_nor_the_routes(
    model_type: str, transform: BlockTransform, tmp_path: Path
) -> None:
    tiny_model(model_type, dtype=torch.float64).save_pretrained(tmp_path / "model")
    recipe = Recipe((transform,))
    segments = SEGMENTS if recipe.calibrates else None
    out = quantize_checkpoint(tmp_path / "model", recipe, tmp_path / "out", segments=segments)
    cpu = torch.device("cpu")
    dense, twin = (load_model(path, torch.float64, cpu) for path in (tmp_path / "model", out))
    assert not torch.equal(*(m.model.layers[0].mlp.gate.weight for m in (dense, twin)))
    with routes(dense) as before:
        exact = dense(IDS).logits
    with routes(twin) as after:
        mine = twin(IDS).logits
    for mine_of, exact_of in zip(after, before, strict=True):
        assert torch.equal(mine_of, exact_of)
    assert_close(mine, exact, rtol=1e-5, atol=1e-5)  # scales are float32, and so are the routers' probabilities


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_a_search_from_a_file_scales_every_router_along(
    model_type: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, file, grid = checkpoint(model_type, num_hidden_layers=2), tmp_path / "search.pt", Recipe(weights=AWQ(ROW))
    searched = quantize_checkpoint(source, grid, tmp_path / "searched", segments=SEGMENTS)
    export_search(searched, file)
    again = Recipe(weights=AWQ(ROW, file=str(file)))
    applied = quantize_checkpoint(source, again, tmp_path / "applied")
    assert torch.equal(load_quantized(applied)(IDS).logits, load_quantized(searched)(IDS).logits)

    def without(content: dict[str, Any], name: str) -> dict[str, Any]:
        steps = [(producer, tuple(n for n in names if n != name), s) for producer, names, s in content["scale"]]
        assert steps != content["scale"]
        return {**content, "scale": steps}

    content = torch.load(file, weights_only=True)
    for router in architecture_of(tiny_config(model_type)).routers:
        torch.save(without(content, f"model.layers.1.{router}"), file)
        with pytest.raises(UserError, match=rf"1\.post_attention_layernorm → .*\(it leaves out .*: {router}\)") as said:
            quantize_checkpoint(source, again, tmp_path / "forgotten")
        assert "\n" not in str(said.value)
        assert not partial_of(tmp_path / "forgotten").exists()


# whole runs -----------------------------------------------------------------------------------------------------------


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lonely("qwen3_moe").save_pretrained(tmp_path / "model")
    recipe = Recipe((Rotate(),), GPTQ(ROW))
    whole = quantize_checkpoint(tmp_path / "model", recipe, tmp_path / "whole", segments=SEGMENTS)
    process: Callable[..., Any] = pipeline.process_block

    def killed(block: DecoderBlock, *rest: Any) -> Any:
        if block.index == 2:
            raise KeyboardInterrupt
        return process(block, *rest)

    monkeypatch.setattr(pipeline, "process_block", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "model", recipe, tmp_path / "out", segments=SEGMENTS)
    assert (partial_of(tmp_path / "out") / "block-001.safetensors").is_file()
    monkeypatch.setattr(pipeline, "process_block", process)
    out = quantize_checkpoint(tmp_path / "model", recipe, tmp_path / "out", segments=SEGMENTS)
    for file in sorted(whole.glob("*.safetensors")):
        assert file.read_bytes() == (out / file.name).read_bytes(), file.name


@pytest.mark.parametrize("model_type", TYPES)
def test_real_values_are_exported_for_transformers(
    model_type: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out = quantize_checkpoint(checkpoint(model_type), Recipe(weights=RTN(ROW)), tmp_path / "out")
    export_checkpoint(out, tmp_path / "export", "dense")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_close(theirs(IDS).logits, load_quantized(out)(IDS).logits, rtol=1e-5, atol=1e-5)
    if model_type == "mixtral":  # what other runtimes call the parts, too
        with safe_open(next((tmp_path / "export").glob("model*.safetensors")), "pt") as file:
            assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in list(file.keys())


def test_packed_experts_are_refused_in_one_line(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe(weights=RTN(UniformGrid(4, 32, convention="gptq-asym")))
    out = quantize_checkpoint(checkpoint("qwen3_moe"), recipe, tmp_path / "out")
    for form in ("compressed-tensors", "gptq", "awq"):
        with pytest.raises(UserError, match=r"keeps the experts of a block in one tensor.*--format dense") as refused:
            export_checkpoint(out, tmp_path / "export", form)
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "export").exists()
