"""Fused, transposed and interleaved matrices as linears of their own: models, files and exports against transformers'.

Every family's plain model is compared in tests/test_families.py; here are the variants that its row knows, files as
they were written years ago, and the map of rows itself.
"""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import ARCHITECTURES, architecture_of
from intactkv.layout import FusedLinears, Part, joined, lay_out, owner_of, sources_of
from intactkv.parts import Fused
from quantization.grids.uniform import UniformGrid
from quantization.model.activations import Activations
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import load_quantized
from quantization.runs.dense import DenseCheckpoint, empty_model
from quantization.runs.opening import load_model
from quantization.runs.pipeline import quantize_checkpoint
from quantization.transforms.rotate import Rotate
from quantization.transforms.smooth import Smooth
from quantization.weights.awq import AWQ
from quantization.weights.gptq import GPTQ
from quantization.weights.rtn import RTN

# What a row decides by the configuration. Each has a name of its own for the tests' list.
NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0 + i / 4 for i in range(6)], "long_factor": [2.0 + i for i in range(6)],
        "partial_rotary_factor": 0.75, "factor": 4.0}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {}),
    "phi3 without groups": ("phi3", {"num_key_value_heads": 4}),
    "phi4-mini": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64,
                           "tie_word_embeddings": True}),
    "pythia": ("gpt_neox", {}),
    "pythia in sequence": ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "relu"}),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}),
    "gpt2 with relu": ("gpt2", {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True}),
    "bloom": ("bloom", {"tie_word_embeddings": True}),
    "falcon-7b": ("falcon", {"tie_word_embeddings": True}),
    "falcon-40b": ("falcon", NEW),
    "falcon-11b": ("falcon", NEW | {"num_ln_in_parallel_attn": 1}),
    "falcon-rw": ("falcon", {"multi_query": False, "num_kv_heads": 4, "parallel_attn": False, "bias": True,
                             "alibi": True}),
    "glm4": ("glm4", {}),
}  # fmt: skip
SEGMENTS = torch.randint(4, 101, (3, 12), generator=torch.Generator().manual_seed(5))
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def dense_of(checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """dense_of(variant, **overrides) -> a dense checkpoint that tests only read."""

    def make(variant: str, **overrides: Any) -> Path:
        model_type, own = VARIANTS[variant]
        return checkpoint(model_type, **{"num_hidden_layers": 2, **own, **overrides})

    return make


def own(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' own model."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval().requires_grad_(False)


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_that_is_laid_out_computes_what_it_did(variant: str, dense_of: Callable[..., Path]) -> None:
    model = own(dense_of(variant), torch.float64)
    expected = model(SEGMENTS).logits
    modules = dict(model.named_modules())
    assert lay_out(model) is model
    laid = [name for name, module in model.named_modules() if modules.get(name) is not module]
    assert laid
    near(model(SEGMENTS).logits, expected, 1e-13)
    after = dict(model.named_modules())
    lay_out(model)  # again: nothing is left to do
    assert all(module is after[name] for name, module in model.named_modules())
    architecture = architecture_of(model.config)
    for index, block in enumerate(architecture.blocks_of(model)):
        assert architecture.linears_of(block, architecture.block_name(index))


@pytest.mark.parametrize("variant", ["phi4-mini", "pythia", "gpt2", "bloom", "falcon-40b", "falcon-rw", "glm4"])
@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, {"dtype": torch.bfloat16}], ids=["shards", "bf16"])
def test_files_are_read_as_transformers_reads_them(
    variant: str, options: dict[str, Any], dense_of: Callable[..., Path]
) -> None:
    directory = dense_of(variant, **options)
    assert "max_shard_size" not in options or len(list(directory.glob("*.safetensors"))) > 3
    dtype = options.get("dtype", torch.float32)
    assert torch.equal(load_model(directory, dtype, CPU)(SEGMENTS).logits, own(directory, dtype)(SEGMENTS).logits)


GRID = UniformGrid(8, 16)
RECIPES = {
    "awq": Recipe(weights=AWQ(GRID)),
    "smoothed": Recipe((Smooth(),), RTN(GRID), Activations(UniformGrid(8))),
}


@pytest.mark.parametrize("variant", ["pythia in sequence", "gpt2 with relu", "falcon-11b"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_eight_bits_hardly_move_the_logits(
    variant: str, recipe: str, dense_of: Callable[..., Path], tmp_path: Path
) -> None:
    """What tests/test_families.py does not have: feeds that a configuration decides."""
    source = dense_of(variant)
    out = quantize_checkpoint(source, RECIPES[recipe], tmp_path / "q", segments=SEGMENTS)
    expected = own(source)(SEGMENTS).logits
    found = load_quantized(out)(SEGMENTS).logits
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1
    packed = load_quantized(out, kernel="unpack")(SEGMENTS).logits
    assert torch.equal(packed, found)


@pytest.mark.parametrize(
    "variant", ["phi3", "pythia in sequence", "gpt2 with relu", "bloom", "falcon-40b", "falcon-11b"]
)
def test_scales_of_every_feed_are_exact_in_double(variant: str, dense_of: Callable[..., Path], tmp_path: Path) -> None:
    source = dense_of(variant, dtype=torch.float64)
    expected = own(source, torch.float64)(SEGMENTS).logits
    step = Smooth(values=True, down=True, power_of_two=True)
    out = quantize_checkpoint(source, Recipe((step,)), tmp_path / "q", segments=SEGMENTS)
    moved = load_quantized(out)
    near(moved(SEGMENTS).logits, expected, 5e-6 if variant == "phi3" else 1e-12)
    feeds = architecture_of(moved.config).feeds
    block = architecture_of(moved.config).blocks_of(moved)[1]
    before = architecture_of(moved.config).blocks_of(lay_out(own(source, torch.float64)))[1]
    for feed in feeds:  # every pair has scales that are not one
        gains = (x.get_submodule(feed.producer).get_parameter("weight") for x in (block, before))
        assert not torch.allclose(*gains, rtol=0.1)


@pytest.mark.parametrize("variant", ["phi4-mini", "pythia", "gpt2", "falcon-rw", "falcon-7b"])
def test_rotations_are_exact_in_double(variant: str, dense_of: Callable[..., Path], tmp_path: Path) -> None:
    source = dense_of(variant, dtype=torch.float64)
    expected = own(source, torch.float64)(SEGMENTS).logits
    turned = load_quantized(quantize_checkpoint(source, Recipe((Rotate(seed=3),)), tmp_path / "q"))
    # Phi-3's norms compute in float32, whatever the model does.
    near(turned(SEGMENTS).logits, expected, 5e-6 if VARIANTS[variant][0] == "phi3" else 1e-12)


@pytest.mark.parametrize(
    ("variant", "step", "words"),
    [
        ("glm4", Rotate(), r"this glm4 has norms behind attention and feed-forward .*use a recipe without rotations"),
        ("bloom", Rotate(), r"this bloom has a norm behind its embeddings .*use a recipe without rotations"),
    ],
)
def test_rotations_that_cannot_be_exact_are_refused(
    variant: str, step: Any, words: str, dense_of: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        quantize_checkpoint(dense_of(variant), Recipe((step,)), tmp_path / "q")


@pytest.mark.parametrize(
    ("model_type", "overrides", "words"),
    [
        ("falcon", NEW | {"parallel_attn": False}, "new_decoder_architecture=true and parallel_attn=false"),
        ("falcon", {"multi_query": False, "num_kv_heads": 2}, "multi_query=false and num_kv_heads=2"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 4}, "slow_but_exact=true and pretraining_tp=4"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=true"),
        ("falcon", NEW | {"num_kv_heads": 3}, "num_kv_heads=3.*must say a divisor of 4"),
        *(
            (family, {"head_dim": 32}, f"this {family} has head_dim=32, but its heads have 16 channels")
            for family in ("opt", "gpt_neox", "gpt2", "bloom", "stablelm", "olmoe")
        ),
    ],
)
def test_variants_that_a_row_does_not_know_are_refused_in_one_line(
    model_type: str, overrides: dict[str, Any], words: str, tiny_config: Callable[..., Any]
) -> None:
    config = tiny_config(model_type, **overrides)
    with pytest.raises(UserError, match=words) as refused:
        architecture_of(config)
    assert "\n" not in str(refused.value)


def test_a_falcon_is_refused_exactly_where_transformers_cannot_run_it(tiny_config: Callable[..., Any]) -> None:
    for new, parallel, norms in product((False, True), (False, True), (None, 0, 1, 2, 3)):
        told = {"new_decoder_architecture": new, "parallel_attn": parallel, "num_ln_in_parallel_attn": norms}
        config = tiny_config("falcon", num_hidden_layers=1, **told)
        try:
            architecture_of(config)
        except UserError:
            with pytest.raises((AttributeError, UnboundLocalError)):
                AutoModelForCausalLM.from_config(config)(SEGMENTS[:1])
        else:
            AutoModelForCausalLM.from_config(config)(SEGMENTS[:1])


def test_a_residual_stream_behind_norms_takes_no_scales(dense_of: Callable[..., Path], tmp_path: Path) -> None:
    source = dense_of("bloom", apply_residual_connection_post_layernorm=True)
    with pytest.raises(UserError, match=r"apply_residual_connection_post_layernorm=true.*use a method without scales"):
        quantize_checkpoint(source, Recipe((Smooth(),)), tmp_path / "q", segments=SEGMENTS)
    out = quantize_checkpoint(source, Recipe(weights=GPTQ(GRID)), tmp_path / "g", segments=SEGMENTS)
    near(load_quantized(out)(SEGMENTS).logits, own(source)(SEGMENTS).logits, 0.1)


# files of years ago ---------------------------------------------------------------------------------------------------


def rewritten(source: Path, out: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of a checkpoint whose tensors are others."""
    out.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (out / file.name).write_bytes(file.read_bytes())
    save_file(change(load_file(source / "model.safetensors")), out / "model.safetensors", {"format": "pt"})
    return out


def of_pythia(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As EleutherAI's files have it."""
    found = {name.replace("lm_head.", "embed_out."): tensor for name, tensor in tensors.items()}
    for i in range(2):
        attention = f"gpt_neox.layers.{i}.attention"
        found[f"{attention}.bias"] = torch.ones(1, 1, 8, 8).tril().bool()
        found[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        found[f"{attention}.rotary_emb.inv_freq"] = torch.ones(4)
    return found


def of_gpt2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As OpenAI's files on the hub have it: no `transformer.`, no head."""
    found = {n.removeprefix("transformer."): x for n, x in tensors.items() if not n.startswith("lm_head")}
    return found | {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(2)}


def of_bloom(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As BigScience's files have it."""
    return {n.removeprefix("transformer."): x for n, x in tensors.items() if not n.startswith("lm_head")}


OLD: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "pythia": of_pythia, "gpt2": of_gpt2, "bloom": of_bloom, "falcon-7b": dict,
}  # fmt: skip


@pytest.mark.parametrize("variant", OLD)
def test_names_of_published_files_are_read(
    variant: str, dense_of: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = rewritten(dense_of(variant), tmp_path / "old", OLD[variant])
    expected = own(dense_of(variant))(SEGMENTS).logits
    assert torch.equal(load_model(old, torch.float32, CPU)(SEGMENTS).logits, expected)
    assert "does not read" not in caplog.text
    out = quantize_checkpoint(old, Recipe(weights=RTN(GRID)), tmp_path / "q")
    near(load_quantized(out)(SEGMENTS).logits, expected, 0.1)


@pytest.mark.parametrize("variant", ["pythia", "gpt2"])
def test_blocks_beyond_those_of_the_configuration_are_refused(
    variant: str, dense_of: Callable[..., Path], tmp_path: Path
) -> None:
    old = rewritten(dense_of(variant), tmp_path / "old", OLD[variant])
    config = json.loads((old / "config.json").read_text())
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    (old / "config.json").write_text(json.dumps(config | {key: 1}))
    with pytest.raises(UserError, match="num_hidden_layers 1; the checkpoint and its configuration belong to differ"):
        DenseCheckpoint(old).weights(empty_model(old))


# the map of rows ------------------------------------------------------------------------------------------------------


class Counting:
    """A stored tensor that notes how many numbers were read of it."""

    def __init__(self, stored: Tensor):
        self.stored, self.numbers = stored, 0

    def __getitem__(self, index: Any) -> Tensor:
        found = self.stored[index]
        self.numbers += found.numel()
        return found


def test_of_a_fused_matrix_only_a_parts_own_rows_are_read(dense_of: Callable[..., Path]) -> None:
    model = empty_model(dense_of("phi3"))
    weights = DenseCheckpoint(dense_of("phi3")).weights(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    fused = [name for name in weights.parts if name.endswith(".weight")]
    assert len(fused) == 2 * 5  # q, k, v, gate, up of two blocks
    for name in fused:
        part = weights.parts[name]
        stored = Counting(torch.empty(part.stored_shape(tuple(shapes[name]))))
        assert part.taken(stored).shape == shapes[name]
        assert stored.numbers == shapes[name].numel()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("transposed", [False, True])
def test_joined_is_the_inverse_of_taking_parts(seed: int, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(high: int) -> int:
        return int(torch.randint(1, high, (), generator=generator))

    groups, rows, columns = drawn(5), tuple(drawn(6) for _ in range(drawn(4))), drawn(7)
    fused = Fused("qkv", tuple("abc"[: len(rows)]), rows, groups, transposed)
    for shape in ((groups * sum(rows), columns), (groups * sum(rows),)):
        by_rows = torch.randn(shape, generator=generator)
        stored = by_rows.T.contiguous() if transposed and by_rows.ndim == 2 else by_rows
        parts = {
            name: Part("w", sum(rows[:i]), rows[i], sum(rows), groups, transposed).taken(stored)
            for i, name in enumerate(fused.parts)
        }
        assert torch.equal(joined(fused, parts), stored)
        for i, name in enumerate(fused.parts):  # row by row, slowly
            start = sum(rows[:i])
            places = [g * sum(rows) + start + r for g in range(groups) for r in range(rows[i])]
            assert torch.equal(parts[name], torch.stack([by_rows[place] for place in places]))
            part = Part("w", start, rows[i], sum(rows), groups, transposed)
            assert part.stored_shape(tuple(parts[name].shape)) == tuple(stored.shape)


def test_the_fused_output_has_the_rows_of_the_stored_matrix() -> None:
    weight, x = torch.randn(2 * (3 + 1 + 1) * 4, 8), torch.randn(5, 8)
    fused = Fused("qkv", ("q", "k", "v"), (12, 4, 4), groups=2)
    linears = {}
    for i, name in enumerate(fused.parts):
        linears[name] = nn.Linear(8, 2 * fused.rows[i], bias=False)
        linears[name].weight.copy_(Part("w", sum(fused.rows[:i]), fused.rows[i], 20, 2).taken(weight))
    torch.testing.assert_close(FusedLinears(fused, linears)(x), x @ weight.T)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_place_in_transformers_own_model(variant: str, dense_of: Callable[..., Path]) -> None:
    model = own(dense_of(variant))
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    architecture = architecture_of(lay_out(model).config)
    used = set()
    for name, parameter in model.state_dict().items():
        part = next(part for part in sources_of(architecture, name) if part.name in shapes)
        assert part.stored_shape(tuple(parameter.shape)) == shapes[part.name]
        used.add(part.name)
        module, _, last = name.rpartition(".")
        assert f"{owner_of(architecture, module)}.{last}" == part.name
    assert used == shapes.keys()


def test_all_fused_families_are_looked_at_here(tiny_config: Callable[..., Any]) -> None:
    rows = {kind for kind in ARCHITECTURES if architecture_of(tiny_config(kind)).fused}
    assert rows == {kind for kind, _ in VARIANTS.values()}
