"""Exports of models whose matrices are fused: the files hold what transformers' own modules have, as one matrix."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_export import SYMMETRIC, loaded, logits, quantized, read_awq, read_gptq, tensors_of
from test_layout import SEGMENTS, VARIANTS
from torch import nn

from corpora.errors import UserError
from corpora.json_files import read_json
from intactkv.architecture import architecture_of
from quantization.export.awq_search import export_search
from quantization.export.writer import FORMATS, export_checkpoint
from quantization.grids.uniform import QuantizedTensor, UniformGrid, quantize
from quantization.model.blocks import DecoderBlock
from quantization.named import named_recipe
from quantization.recipes.recipe import Recipe, with_settings
from quantization.runs.checkpoint import load_quantized
from quantization.runs.pipeline import quantize_checkpoint
from quantization.weights.awq import AWQ
from quantization.weights.base import GridQuantizer
from quantization.weights.gptq import GPTQ

PACKED = ["phi3", "pythia", "bloom", "falcon-40b", "glm4"]

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def dense_of(checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    """dense_of(variant) -> a dense checkpoint that tests only read."""

    def make(variant: str) -> Path:
        model_type, own = VARIANTS[variant]
        return checkpoint(model_type, **{"num_hidden_layers": 2, **own})

    return make


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("variant", PACKED)
@pytest.mark.parametrize("convention", ["gptq-sym", "gptq-asym"])
def test_transformers_computes_our_bits_from_compressed_tensors(
    variant: str, convention: str, dense_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = quantized(dense_of(variant), tmp_path / "q", 4, 32, convention)
    done = export_checkpoint(source, tmp_path / "ct")
    assert torch.equal(logits(loaded(tmp_path / "ct")), logits(load_quantized(source)))
    own = architecture_of(load_quantized(source).config)
    assert {name.rpartition(".")[2] for name in done.schemes} & {fused.module.rpartition(".")[2] for fused in own.fused}
    config = read_json(tmp_path / "ct" / "config.json", "configuration")["quantization_config"]
    unpacks = convention not in SYMMETRIC or variant.startswith("falcon")  # Falcon's linears read their own weight
    assert config.get("dequantize", False) == unpacks


@pytest.mark.parametrize("variant", [*PACKED, "gpt2", "falcon-rw"])
def test_dense_exports_are_transformers_own_models(
    variant: str, dense_of: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = with_settings(named_recipe("bcq-w3"), ["weights.grid.group_size=16", "weights.rounds=2"])
    for place, made in (("u", Recipe(weights=GPTQ(UniformGrid(4, 32)))), ("b", recipe)):
        source = quantize_checkpoint(dense_of(variant), made, tmp_path / place, segments=SEGMENTS)
        export_checkpoint(source, tmp_path / f"{place} dense", "dense")
        assert torch.equal(logits(loaded(tmp_path / f"{place} dense")), logits(load_quantized(source)))


@pytest.mark.parametrize("variant", ["phi3", "pythia", "falcon-40b"])
def test_files_of_gptq_and_awq_hold_transformers_own_matrices(
    variant: str, dense_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = quantized(dense_of(variant), tmp_path / "q", 4, 32, "gptq-sym", scale_dtype="float16")
    export_checkpoint(source, tmp_path / "dense", "dense")
    weights = tensors_of(tmp_path / "dense")
    model = loaded(tmp_path / "dense")
    blocks = architecture_of(model.config).blocks
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(f"{blocks}.")}
    for kind in ("gptq", "gptq-v2", "awq"):
        export_checkpoint(source, tmp_path / kind, kind)
        found = tensors_of(tmp_path / kind)
        assert {name.removesuffix(".qweight") for name in found if name.endswith(".qweight")} == linears
        for name in linears:
            of_linear = {part: found[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
            if kind == "awq":
                read = read_awq(of_linear, 32)
            else:
                read = read_gptq(of_linear | {"g_idx": found[f"{name}.g_idx"]}, 4, int(kind == "gptq"))
            assert torch.equal(read, weights[f"{name}.weight"].double()), name
            assert (f"{name}.bias" in found) == (f"{name}.bias" in weights)


def test_parts_in_activation_order_share_it(dense_of: Callable[[str], Path], tmp_path: Path) -> None:
    method = GPTQ(UniformGrid(4, 16, scale_dtype="float16"), act_order=True, static_groups=False)
    source = quantize_checkpoint(dense_of("pythia"), Recipe(weights=method), tmp_path / "q", segments=SEGMENTS)
    export_checkpoint(source, tmp_path / "dense", "dense")
    export_checkpoint(source, tmp_path / "gptq", "gptq-v2")
    found, weights = tensors_of(tmp_path / "gptq"), tensors_of(tmp_path / "dense")
    name = "gpt_neox.layers.1.attention.query_key_value"
    of_linear = {part: found[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
    assert not torch.equal(of_linear["g_idx"], torch.arange(64, dtype=torch.int32) // 16)
    torch.testing.assert_close(read_gptq(of_linear, 4, 0).float(), weights[f"{name}.weight"], rtol=0, atol=0)


def test_no_packed_format_holds_the_matrices_of_gpt2(dense_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = quantized(dense_of("gpt2"), tmp_path / "q", 4, 32, "gptq-sym")
    for kind in [name for name, row in FORMATS.items() if row.config is not None]:
        with pytest.raises(UserError, match=r"^attn\.c_attn is no linear .* --format dense$"):
            export_checkpoint(source, tmp_path / "out", kind)
        assert not (tmp_path / "out").exists()


@dataclass(frozen=True)
class Some(GridQuantizer):
    """Rounds some parts of a fused matrix, or each with bits of its own."""

    grid: UniformGrid
    leaves: str = ""
    name: ClassVar[str] = "some"
    calibrates: ClassVar[bool] = False

    def quantize_block(self, block: DecoderBlock) -> Mapping[str, QuantizedTensor]:
        """Four bits for k, five for the others."""
        kept = {n: m for n, m in block.linears().items() if not self.leaves or self.leaves not in n}
        return {n: quantize(m.weight, replace(self.grid, bits=4 if "k_proj" in n else 5), n) for n, m in kept.items()}


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Some(UniformGrid(5, 32, "gptq-sym")), "its parts q_proj, k_proj, v_proj are on different grids"),
        (Some(UniformGrid(5, 32, "gptq-sym"), "v_proj"), "of its parts v_proj are not quantized"),
    ],
)
def test_parts_that_differ_go_out_dense_only(
    method: Any, words: str, dense_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = quantize_checkpoint(dense_of("pythia"), Recipe(weights=method), tmp_path / "q")
    with pytest.raises(UserError, match=rf"query_key_value: {words}.*--format dense$"):
        export_checkpoint(source, tmp_path / "ct")
    export_checkpoint(source, tmp_path / "dense", "dense")
    assert torch.equal(logits(loaded(tmp_path / "dense")), logits(load_quantized(source)))


@pytest.mark.parametrize("variant", ["phi3", "bloom", "falcon-7b"])
def test_a_search_that_is_exported_gives_the_same_checkpoint_again(
    variant: str, dense_of: Callable[[str], Path], tmp_path: Path
) -> None:
    grid = UniformGrid(4, 32, "awq-asym")
    source = quantize_checkpoint(dense_of(variant), Recipe(weights=AWQ(grid)), tmp_path / "q", segments=SEGMENTS)
    export_search(source, tmp_path / "search.pt")
    again = Recipe(weights=AWQ(grid, file=str(tmp_path / "search.pt")))
    out = quantize_checkpoint(dense_of(variant), again, tmp_path / "again")
    assert torch.equal(logits(load_quantized(out)), logits(load_quantized(source)))
