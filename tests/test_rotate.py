"""QuaRot's rotations: exact in full precision, against dense float64 matrices; saved, resumed, behind a prefix."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from quantization.export.writer import export_checkpoint
from quantization.grids.uniform import UniformGrid
from quantization.hadamard import matrix, plan, random_rotation
from quantization.kv_cache import Rotated
from quantization.model.blocks import DecoderBlock
from quantization.named import named_recipe
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import load_quantized
from quantization.runs.pipeline import quantize_checkpoint
from quantization.runs.plan import plan_run
from quantization.transforms.rotate import Rotate
from quantization.weights.base import GridQuantizer
from quantization.weights.rtn import RTN

# 9 query heads over 3 KV heads have no Hadamard matrix; head_dim apart from hidden size / heads; biases everywhere
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3,
                        "tie_word_embeddings": True, "attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "mistral": ("mistral", {}),
    "opt": ("opt", {}),
    "opt-tied": ("opt", {"tie_word_embeddings": True}),
    "opt-unbiased": ("opt", {"enable_bias": False}),  # but its norms have shifts
    "cohere": ("cohere", {"tie_word_embeddings": True, "logit_scale": 1.0}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
}  # fmt: skip
VARIANTS = {
    "quarot": Rotate(),
    "random": Rotate(seed=3, mode="random"),
    "hartley": Rotate(head_mix="hartley", online_down=False),
    "prefixquant": Rotate(seed=1, head_mix="none"),
}
PREFIX = torch.tensor([1, 40, 7])
SEGMENTS = torch.randint(4, 101, (3, 12), generator=torch.Generator().manual_seed(5))
A4 = UniformGrid(4, convention="quarot-sym")


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def checkpoint(checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """checkpoint(family, **overrides) -> a dense checkpoint that tests only read."""

    def make(family: str = "llama", **overrides: Any) -> Path:
        model_type, own = FAMILIES[family]
        return checkpoint(model_type, **(own | overrides))

    return make


def dense(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory).eval().requires_grad_(False)


def rotated(source: Path, step: Rotate, out: Path) -> PreTrainedModel:
    """The full-precision model behind the rotations, from its files."""
    return load_quantized(quantize_checkpoint(source, Recipe((step,)), out))


def w4a4(**parts: Any) -> Recipe:
    return replace(named_recipe("quarot-rtn"), **parts)


def linear_inputs(model: PreTrainedModel, name: str, index: int = 1) -> Tensor:
    """What a linear of a block is called with, before anything that stands in front of it: (3, 12, channels)."""
    seen: list[Tensor] = []
    linear = architecture_of(model.config).blocks_of(model)[index].get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()), prepend=True)
    model(SEGMENTS)
    handle.remove()
    return seen[0].view(*SEGMENTS.shape, -1)


def block_outputs(model: PreTrainedModel) -> list[Tensor]:
    seen: list[Tensor] = []
    blocks = architecture_of(model.config).blocks_of(model)
    handles = [b.register_forward_hook(lambda _m, _a, out: seen.append(out)) for b in blocks]
    model(SEGMENTS)
    for handle in handles:
        handle.remove()
    return seen


# full precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_full_precision_the_logits_do_not_move(family, variant, checkpoint, tmp_path):
    source = checkpoint(family)
    before, after = dense(source), rotated(source, VARIANTS[variant], tmp_path / "out")
    expected, found = before(SEGMENTS).logits, after(SEGMENTS).logits
    assert float(expected.abs().max()) > 5
    # float32 weights, rounded once more, and sums in another order; measured 6e-5 at most
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    down = f"{architecture_of(before.config).block_name(1)}.{architecture_of(before.config).down}.weight"
    assert float((new[down] - old[down]).norm() / old[down].norm()) > 0.5  # it is not the model it was


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step", [Rotate(), Rotate(seed=1), Rotate(mode="random")], ids=str)
def test_keys_stay_and_values_are_rotated_per_head_whatever_the_seed(family, step, checkpoint, tmp_path):
    source = checkpoint(family)
    before, after = dense(source), rotated(source, step, tmp_path / "out")
    old, new = (model(SEGMENTS, use_cache=True).past_key_values.layers for model in (before, after))
    h = matrix(plan(old[0].keys.shape[-1]))
    for plain, turned in zip(old, new, strict=True):
        torch.testing.assert_close(turned.keys, plain.keys, rtol=0, atol=5e-5)
        torch.testing.assert_close(turned.values, (plain.values.double() @ h.T).float(), rtol=0, atol=5e-5)
    assert not torch.allclose(new[1].values, old[1].values, atol=0.1)


def test_without_head_mixing_one_random_rotation_serves_all_layers(checkpoint, tmp_path):
    before, after = dense(checkpoint("qwen2")), rotated(checkpoint("qwen2"), VARIANTS["prefixquant"], tmp_path / "out")
    r = random_rotation(16, 1)
    old, new = (model(SEGMENTS, use_cache=True).past_key_values.layers for model in (before, after))
    for plain, turned in zip(old, new, strict=True):
        torch.testing.assert_close(turned.values, (plain.values.double() @ r).float(), rtol=0, atol=5e-5)
    output = after.get_submodule("model.layers.1.self_attn.o_proj")
    assert not output._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_the_residual_stream_is_the_original_times_q(family, checkpoint, tmp_path):
    turned = rotated(checkpoint(family), Rotate(seed=4), tmp_path / "out")
    before, after = (block_outputs(model) for model in (dense(checkpoint(family)), turned))
    q = random_rotation(before[0].shape[-1], 4)
    for old, new in zip(before, after, strict=True):
        if family == "opt":  # LayerNorms never saw the mean
            old = old - old.mean(-1, keepdim=True)
        torch.testing.assert_close(new, (old.double() @ q).float(), rtol=0, atol=5e-5)
        torch.testing.assert_close(new.norm(dim=-1), old.norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_a_channel_that_dwarfs_the_others_no_longer_does(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(tmp_path, "llama")
    model = dense(source)
    model.model.embed_tokens.weight[:, 3] *= 1000
    model.save_pretrained(source)

    def peak(states: Tensor) -> float:
        """Largest channel over root mean square, mean over tokens; 8 = √64 if one channel is all."""
        return float((states.abs().amax(-1) / states.square().mean(-1).sqrt()).mean())

    before = [peak(states) for states in block_outputs(dense(source))]
    after = [peak(states) for states in block_outputs(rotated(source, Rotate(), tmp_path / "out"))]
    assert min(before) > 6
    assert max(after) < 2.5


def test_rotations_are_rounded_once_to_the_dtype_of_the_checkpoint(checkpoint, tmp_path):
    source = checkpoint("qwen2", dtype=torch.bfloat16)
    old = dense(source).model
    new = rotated(source, Rotate(), tmp_path / "out").model
    assert new.embed_tokens.weight.dtype == new.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    q, size = random_rotation(64, 0), 16
    block, gain = old.layers[0], old.layers[0].input_layernorm.weight.double()
    h = torch.block_diag(*[matrix(plan(size))] * 2)
    expected = {
        "embed_tokens": old.embed_tokens.weight.double() @ q,
        "layers.0.self_attn.q_proj": block.self_attn.q_proj.weight.double() * gain @ q,
        "layers.0.self_attn.v_proj": h @ (block.self_attn.v_proj.weight.double() * gain) @ q,
        "layers.0.mlp.down_proj": q.T @ block.mlp.down_proj.weight.double() @ matrix(plan(96)).T,
    }
    for name, weight in expected.items():
        found = new.get_submodule(name).weight
        step = torch.finfo(torch.bfloat16).eps / 2 * weight.abs()  # half a unit in the last place, at most
        assert (found.double() - weight).abs().le(step * 1.001 + 1e-12).all(), name
    bias = h @ block.self_attn.v_proj.bias.double()
    torch.testing.assert_close(new.layers[0].self_attn.v_proj.bias, bias.bfloat16())
    assert torch.equal(new.layers[0].input_layernorm.weight, torch.ones(64, dtype=torch.bfloat16))


# on disk --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt-tied"])
def test_a_tied_head_becomes_a_matrix_of_its_own(family, checkpoint, tmp_path):
    model = rotated(checkpoint(family), Rotate(), tmp_path / "out")
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert not torch.allclose(model.lm_head.weight, model.get_input_embeddings().weight, atol=0.1)


def test_a_head_in_the_file_of_a_model_that_calls_it_tied_stays_that_head(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint("llama"), tmp_path / "source")
    (file,) = source.glob("*.safetensors")
    head = torch.randn(101, 144, generator=torch.Generator().manual_seed(0))
    save_file(load_file(file) | {"lm_head.weight": head}, file, {"format": "pt"})
    expected = dense(source)(SEGMENTS).logits  # transformers takes it for the head, too
    torch.testing.assert_close(
        rotated(source, Rotate(), tmp_path / "out")(SEGMENTS).logits, expected, rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_linear_behind_an_online_rotation_rounds_what_it_rotated(name, checkpoint, tmp_path):
    model = load_quantized(quantize_checkpoint(checkpoint("llama"), w4a4(), tmp_path / "out"))
    linear = model.get_submodule(f"model.layers.1.{name}")
    seen: list[Tensor] = []
    handle = linear.register_forward_hook(lambda _m, _a, out: seen.append(out))
    x = linear_inputs(model, name).double()
    handle.remove()
    m = matrix(plan(96)) if "down" in name else torch.kron(matrix(plan(9)), torch.eye(16, dtype=torch.float64))
    turned = x @ m.T
    scale = 0.9 * turned.abs().amax(-1, keepdim=True) / 7
    rounded = (turned / scale).round().clamp(-8, 7) * scale
    expected = rounded @ linear.weight.double().T + (0 if linear.bias is None else linear.bias.double())
    torch.testing.assert_close(seen[0].double(), expected, rtol=0, atol=1e-4)
    lossless = turned @ linear.weight.double().T + (0 if linear.bias is None else linear.bias.double())
    assert not torch.allclose(seen[0].double(), lossless, atol=1e-2)


def test_without_online_rotations_other_runtimes_load_it_unless_its_norms_are_others(checkpoint, tmp_path):
    recipe = Recipe((Rotate(head_mix="none", online_down=False),), RTN(UniformGrid(4, 16)))
    made = quantize_checkpoint(checkpoint("llama"), recipe, tmp_path / "llama")
    export_checkpoint(made, tmp_path / "export", "dense")
    assert torch.equal(dense(tmp_path / "export")(SEGMENTS).logits, load_quantized(made)(SEGMENTS).logits)
    for family in ("opt", "cohere"):  # a norm of the latter has the names of the one that takes its place
        made = quantize_checkpoint(checkpoint(family), recipe, tmp_path / family)
        with pytest.raises(UserError, match=f"has norms that a plain {family} does not have"):
            export_checkpoint(made, tmp_path / "refused", "dense")
    with pytest.raises(UserError, match="quantizes or rotates"):
        export_checkpoint(quantize_checkpoint(checkpoint("llama"), w4a4(), tmp_path / "a4"), tmp_path / "x", "dense")


# calibration ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording(GridQuantizer):
    """Keeps what the linears of the second block read, and leaves them as they are."""

    grid: UniformGrid = A4
    inputs: dict[str, list[Tensor]] = field(default_factory=dict, init=False, compare=False)
    name: ClassVar[str] = "recording"

    def quantize_block(self, block: DecoderBlock) -> dict[str, Any]:
        if block.index == 1:
            block.observe(lambda linear, x: self.inputs.setdefault(linear, []).extend(x.clone()))
        return {}


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_calibration_sees_rotated_inputs_that_are_not_quantized(family, checkpoint, tmp_path):
    model, recording = dense(checkpoint(family)), Recording()
    names, heads = architecture_of(model.config), model.config.num_attention_heads
    recipe = w4a4(weights=recording)
    quantize_checkpoint(checkpoint(family), recipe, tmp_path / "out", segments=SEGMENTS)
    found = {linear: torch.stack(samples).double() for linear, samples in recording.inputs.items()}
    d = model.config.hidden_size
    rotation = {
        names.down: matrix(plan(96)).T,
        names.output: torch.kron(matrix(plan(heads)), matrix(plan(d // heads))).T,
    }
    for linear, turn in rotation.items():
        expected = linear_inputs(model, linear).double() @ turn
        torch.testing.assert_close(found[linear], expected, rtol=0, atol=1e-4)
    # what a reader sees is the normalized stream, without gain and shift, times Q
    stream = block_outputs(model)[0].double()
    stream = stream - stream.mean(-1, keepdim=True) if names.centred else stream
    plain = stream / (stream.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    reader = names.linears[0][0]
    torch.testing.assert_close(found[reader], plain @ random_rotation(d, 0), rtol=0, atol=1e-3)


# behind a prefix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_prefix_in_another_basis_is_refused(family, checkpoint, tmp_path):
    source = checkpoint(family)
    model = load_quantized(quantize_checkpoint(source, w4a4(), tmp_path / "out"))
    attach(model, build_prefix(rotated(source, Rotate(), tmp_path / "twin"), PREFIX))
    with pytest.raises(UserError, match="basis is 'plain' in the prefix"):
        attach(model, build_prefix(dense(source), PREFIX))
    other = rotated(source, Rotate(head_mix="none"), tmp_path / "other")
    with pytest.raises(UserError, match="basis is"):
        attach(model, build_prefix(other, PREFIX))


@pytest.mark.parametrize("family", ["llama", "opt-tied"])
@pytest.mark.parametrize("kernel", [None, "unpack"])
def test_a_planned_run_brings_the_rotated_twins_prefix(family, kernel, tiny_checkpoint, intactkv_root):
    model_type, overrides = FAMILIES[family]
    source = tiny_checkpoint(intactkv_root, model_type, **overrides)
    eight = UniformGrid(8, convention="quarot-sym")
    recipe = w4a4(prefix="bos", kv_cache=Rotated(8, keep=1.0))
    recipe = replace(recipe, weights=replace(recipe.weights, grid=eight),
                     activations=replace(recipe.activations, grid=eight, keep=1.0))  # fmt: skip
    plan_of = plan_run(source, recipe, device=torch.device("cpu"), kernel=kernel)
    model = plan_of.load()
    assert model.prefix is not None
    assert model.prefix.model.basis == plan_of.basis != "plain"
    text = torch.cat([torch.ones(len(SEGMENTS), 1, dtype=torch.long), SEGMENTS], dim=1)
    expected = dense(source)(text).logits
    assert 0 < float((model.score(text) - expected).norm() / expected.norm()) < 0.1  # 8 bits
    # From the quantized checkpoint alone, its twin is found again.
    made = next((intactkv_root / "modelzoo" / "quantized").rglob("quantization.json")).parents[1]
    directory = next(path for path in made.iterdir() if "rtn" in path.name and path.is_dir())
    again = plan_run(directory, Recipe(prefix="bos", kv_cache=Rotated(8, keep=1.0)), device=torch.device("cpu"))
    assert torch.equal(again.load().score(text), model.score(text))


def test_rotation_makes_four_bits_of_everything_better_where_a_channel_dwarfs_the_others(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(tmp_path, "llama")
    model = dense(source)
    for block in model.model.layers:  # what massive activations do to down_proj's input and to the stream
        block.mlp.up_proj.weight[5] *= 50
        block.mlp.down_proj.weight[:, 5] /= 50
        block.input_layernorm.weight[[3, 50]] *= 50
        for name in ("q_proj", "k_proj", "v_proj"):
            block.self_attn.get_submodule(name).weight[:, [3, 50]] /= 50
    model.save_pretrained(source)
    expected = dense(source)(SEGMENTS).logits
    error = {}
    for name in ("quarot-rtn", "rtn-w4a4kv4"):
        recipe = replace(named_recipe(name), weights=None)  # activations alone: weights would need groups
        found = load_quantized(quantize_checkpoint(source, recipe, tmp_path / name))(SEGMENTS).logits
        error[name] = float((found - expected).norm() / expected.norm())
    assert error["quarot-rtn"] < 0.7 * error["rtn-w4a4kv4"]


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "overrides", "step", "named"),
    [
        ("opt", {"do_layer_norm_before": False}, Rotate(), "do_layer_norm_before=false"),
        ("opt", {"word_embed_proj_dim": 32}, Rotate(), "word_embed_proj_dim=32, hidden_size=64"),
        ("opt", {"_remove_final_layer_norm": True}, Rotate(), "_remove_final_layer_norm=true"),
        ("llama", {}, Rotate(head_mix="hadamard"), "no Hadamard matrix of order 9"),
    ],
)
def test_what_cannot_be_rotated_is_refused_before_any_work(family, overrides, step, named, checkpoint, tmp_path):
    source = checkpoint(family, **overrides)
    with pytest.raises(UserError, match=named) as refusal:
        quantize_checkpoint(source, Recipe((step,)), tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("out*"))


def test_a_layer_norm_without_parameters_is_still_one(checkpoint, tmp_path):
    source = checkpoint("opt", layer_norm_elementwise_affine=False)
    found = rotated(source, Rotate(), tmp_path / "out")(SEGMENTS).logits
    torch.testing.assert_close(found, dense(source)(SEGMENTS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "value"), [("mode", "givens"), ("head_mix", "fourier")])
def test_unknown_words_are_refused(name, value):
    with pytest.raises(UserError, match=f"{name}={value} is not known; choose from"):
        Rotate(**{name: value})


# the real model -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_keeps_its_logits_and_loses_its_outliers(smollm2, tmp_path):
    ids = torch.randint(100, 40000, (1, 64), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = 1  # its [BOS], a pivot
    before, after = dense(smollm2), rotated(smollm2, Rotate(), tmp_path / "out")
    expected, found = before(ids).logits, after(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    peaks = []
    for model in (before, after):
        states = model(ids, output_hidden_states=True).hidden_states[20][0]
        peaks.append(float((states.abs().amax(-1) / states.square().mean(-1).sqrt())[0]))
    assert peaks[0] > 20
    assert peaks[1] < 5
