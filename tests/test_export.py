"""Exported checkpoints: the layouts against independent unpackers, the directories against transformers."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers.integrations.compressed_tensors
from common import every
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

import quantization.export.writer
from corpora.errors import UserError
from corpora.json_files import read_json
from corpora.storage import weight_files
from intactkv.attach import attach
from intactkv.prefix import Prefix, build_prefix
from quantization.export import awq, compressed_tensors, gptq
from quantization.export.layout import Contents
from quantization.export.writer import FORMATS, PREFIX_FILE, export_checkpoint
from quantization.grids.stored import StoredWeight
from quantization.grids.uniform import QuantizedTensor, UniformGrid, quantize
from quantization.model.blocks import DecoderBlock
from quantization.model.rescale import Rescaling
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import load_quantized
from quantization.runs.dense import DenseCheckpoint, empty_model
from quantization.runs.pipeline import quantize_checkpoint
from quantization.weights.base import GridQuantizer
from quantization.weights.gptq import gptq as gptq_matrix
from quantization.weights.rtn import RTN

IDS = torch.randint(3, 101, (2, 14), generator=torch.Generator().manual_seed(3))
SYMMETRIC = ("gptq-sym", "smoothquant-sym", "quarot-sym", "deepspeed-sym")
HALF = torch.finfo(torch.float16).eps / 2  # relative error of rounding to half precision


pytestmark = pytest.mark.usefixtures("no_grad")


def matrix(rows: int = 64, columns: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def on_grid(bits: int, group_size: int = 32, convention: str = "gptq-asym", **fields: Any) -> QuantizedTensor:
    return quantize(matrix(), UniformGrid(bits, group_size, convention, **fields))


def quantized(dense: Path, out: Path, *grid: Any, **fields: Any) -> Path:
    return quantize_checkpoint(dense, Recipe(weights=RTN(UniformGrid(*grid, **fields))), out)


def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def loaded(directory: Path, **options: Any) -> PreTrainedModel:
    """As a user of transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found = {}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
    return found


# independent readers of the layouts, slow on purpose ------------------------------------------------------------------


def stream(words: Tensor, bits: int) -> list[int]:
    """All `bits`-wide values of a line of int32 words, lowest bits first."""
    number = sum((int(word) % 2**32) << (32 * i) for i, word in enumerate(words))
    return [(number >> (bits * i)) % 2**bits for i in range(len(words) * 32 // bits)]


def read_gptq(tensors: Mapping[str, Tensor], bits: int, stored_offset: int) -> Tensor:
    """W (out, in) float64 of GPTQ's format. stored_offset: 1 in v1, where z − 1 is stored."""
    codes = torch.tensor([stream(column, bits) for column in tensors["qweight"].T])  # (out, in)
    zeros = torch.tensor([stream(row, bits) for row in tensors["qzeros"]]) + stored_offset  # (groups, out)
    of_channel = tensors["g_idx"].long()
    return (codes - zeros[of_channel].T).double() * tensors["scales"].double()[of_channel].T


def read_awq(tensors: Mapping[str, Tensor], group_size: int) -> Tensor:
    """W (out, in) float64 of AWQ's GEMM format: channel 8j + c of a row is the nibble at shift 16·(c % 2) + 4·(c // 2)
    of word j, which is how the kernel finds it."""

    def nibbles(words: Tensor) -> Tensor:
        rows = [[(int(word) >> (16 * (c % 2) + 4 * (c // 2))) % 16 for word in row for c in range(8)] for row in words]
        return torch.tensor(rows)

    codes = nibbles(tensors["qweight"])  # (in, out)
    zeros, scales = nibbles(tensors["qzeros"]), tensors["scales"].double()  # (groups, out)
    size = codes.shape[0] if group_size == -1 else group_size
    return ((codes - zeros.repeat_interleave(size, 0)).double() * scales.repeat_interleave(size, 0)).T


def with_half_scales(weight: QuantizedTensor) -> Tensor:
    """Our weights in float64, had the scales been float16."""
    return replace(weight, scale=weight.scale.half()).dequantize(torch.float64)


# layouts --------------------------------------------------------------------------------------------------------------


@every("bits", range(2, 9))
@every("convention", ["gptq-asym", "awq-asym", *SYMMETRIC])
@every("group_size", [-1, 12])
def test_compressed_tensors_library_packs_the_same_words_and_unpacks_ours_to_the_same_bits(
    bits: int, convention: str, group_size: int
) -> None:
    weight = quantize(matrix(20, 60), UniformGrid(bits, group_size, convention))  # nothing is a multiple of 32
    ours = compressed_tensors.pack(weight, "w")
    assert ours.scheme is not None
    assert ours.scheme.symmetric == (convention in SYMMETRIC)
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=bits, symmetric=ours.scheme.symmetric, **strategy)
    )
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    zero_point = torch.zeros(weight.scale.shape, dtype=torch.int8)  # signed: 0 is ours at 2^(b−1)
    if not ours.scheme.symmetric:
        zero_point = (weight.zero_point - 2 ** (bits - 1)).to(torch.int8)
    dense = weight.dequantize()
    theirs = library.compress({"weight": dense, "weight_scale": weight.scale, "weight_zero_point": zero_point}, scheme)
    assert ours.tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(ours.tensors[name], tensor), name
    assert torch.equal(library.decompress(dict(ours.tensors), scheme)["weight"], dense)


@every("bits", [2, 3, 4, 8])
@every("convention", ["gptq-asym", "awq-asym", *SYMMETRIC])
@every("group_size", [-1, 32])
def test_gptq_files_hold_our_weights_but_for_the_rounding_of_scales(
    bits: int, convention: str, group_size: int
) -> None:
    weight = on_grid(bits, group_size, convention)
    for pack, offset in ((gptq.pack, 1), (gptq.pack_v2, 0)):
        packed = pack(weight, "w")
        assert {name: tensor.dtype for name, tensor in packed.tensors.items()} == {
            "qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32,
        }  # fmt: skip
        groups = weight.scale.shape[1]
        assert packed.tensors["qweight"].shape == (96 * bits // 32, 64)
        assert packed.tensors["qzeros"].shape == (groups, 64 * bits // 32)
        assert torch.equal(read_gptq(packed.tensors, bits, offset), with_half_scales(weight))


@every("convention", ["gptq-asym", "awq-asym", *SYMMETRIC])
@every("group_size", [-1, 32])
def test_awq_files_hold_our_weights_but_for_the_rounding_of_scales(convention: str, group_size: int) -> None:
    weight = on_grid(4, group_size, convention)
    packed = awq.pack(weight, "w")
    assert packed.tensors["qweight"].shape == (96, 8)
    assert packed.tensors["qzeros"].shape == (weight.scale.shape[1], 8)
    assert torch.equal(read_awq(packed.tensors, group_size), with_half_scales(weight))


@every("pack", [gptq.pack, gptq.pack_v2, awq.pack])
def test_the_reported_scale_change_is_that_of_rounding_to_float16(pack: Callable[..., Any]) -> None:
    weight = on_grid(4)
    change = pack(weight, "w").scale_change
    truth = max(abs(float(torch.tensor(s).half()) - s) / s for s in weight.scale.flatten().tolist())
    assert change == pytest.approx(truth, rel=1e-4)
    assert 0 < change <= HALF * 1.001
    assert pack(on_grid(4, scale_dtype="float16"), "w").scale_change == 0
    assert compressed_tensors.pack(weight, "w").scale_change == 0


def test_groups_in_activation_order_keep_their_index_in_gptq() -> None:
    inputs = torch.randn(200, 96, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, 96)
    weight, _, _ = gptq_matrix(matrix(), inputs.T @ inputs, UniformGrid(4, 32), act_order=True, static_groups=False)
    assert weight.group_index is not None
    assert not torch.equal(weight.group_index, torch.arange(96, dtype=torch.int32) // 32)
    packed = gptq.pack(weight, "w")
    assert torch.equal(read_gptq(packed.tensors, 4, 1), with_half_scales(weight))
    assert packed.scheme is not None
    contents = Contents({"w": packed.scheme}, [], "model.layers", torch.float32)
    assert gptq.config(contents)["desc_act"] is True
    for pack in (compressed_tensors.pack, awq.pack):
        with pytest.raises(UserError, match=r"w: .*static_groups=false.*--format gptq.*static_groups=true"):
            pack(weight, "w")


def test_a_zero_point_of_0_is_refused_by_gptq_v1_and_exact_elsewhere() -> None:
    weights = matrix()
    weights[5, :32] = weights[5, :32].abs()  # one group without a negative weight
    weight = quantize(weights, UniformGrid(4, 32))
    assert (weight.zero_point == 0).sum() == 1
    with pytest.raises(UserError, match=r"w: 1 of its 192 groups have the zero point 0.*gptq-v2 or compressed-tensors"):
        gptq.pack(weight, "w")
    assert torch.equal(read_gptq(gptq.pack_v2(weight, "w").tensors, 4, 0), with_half_scales(weight))
    assert torch.equal(read_awq(awq.pack(weight, "w").tensors, 32), with_half_scales(weight))


@pytest.mark.parametrize("pack", [compressed_tensors.pack, gptq.pack, gptq.pack_v2, awq.pack])
def test_zero_points_that_are_no_code_are_refused_whatever_the_convention_says(pack: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"w: the zero point .* of the convention spqr-asym is no integer in 0…15"):
        pack(on_grid(4, convention="spqr-asym"), "w")
    beyond = replace(on_grid(4, convention="deepspeed-asym"), zero_point=torch.full((64, 3), 16.0))
    with pytest.raises(UserError, match=r"the zero point 16 of the convention deepspeed-asym"):
        pack(beyond, "w")


def test_real_zero_points_that_happen_to_be_codes_are_exact() -> None:
    weight = on_grid(4, convention="deepspeed-asym")  # −round(lo/s), nearly always within the codes
    weight = replace(weight, zero_point=weight.zero_point.clamp(1, 15))
    assert torch.equal(read_gptq(gptq.pack(weight, "w").tensors, 4, 1), with_half_scales(weight))


@dataclass(frozen=True)
class Levels:
    """A stored weight of another kind."""

    kind: ClassVar[str] = "levels"


@pytest.mark.parametrize(
    ("pack", "weight", "words"),
    [
        (gptq.pack, on_grid(5), "bits=5 is taken by no reader of GPTQ's format; they know 2, 3, 4, 8"),
        (gptq.pack, on_grid(4, 12), "group_size=12 is taken by no reader"),
        (gptq.pack, quantize(matrix(40, 64), UniformGrid(4, 32)), "its shape 40 × 64 is no multiple of 32"),
        (gptq.pack, quantize(matrix(64, 48), UniformGrid(3, 16)), "its shape 64 × 48 is no multiple of 32"),
        (awq.pack, on_grid(3), "bits=3 is taken by no reader of AWQ's format; they know 4"),
        (awq.pack, on_grid(4, 96), "group_size=96 is taken by no reader"),
        (awq.pack, quantize(matrix(20, 64), UniformGrid(4, 32)), "its 20 output channels are no multiple of 8"),
        (awq.pack, replace(on_grid(4), scale=torch.full((64, 3), 1e5)), "its scale 100000 is beyond float16"),
        (awq.pack, quantize(1e-8 * matrix(), UniformGrid(4, 32)), "its scale 4.4e-09 becomes 0 in float16"),
        (gptq.pack_v2, quantize(1e-8 * matrix(), UniformGrid(4, 32)), "its scale 4.4e-09 becomes 0 in float16"),
        (gptq.pack, Levels(), "weights of the kind 'levels'"),
        (awq.pack, Levels(), "weights of the kind 'levels'"),
        (compressed_tensors.pack, Levels(), "weights of the kind 'levels'"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_in_one_line_with_a_way_out(
    pack: Callable[[StoredWeight, str], Any], weight: StoredWeight, words: str
) -> None:
    with pytest.raises(UserError) as refused:
        pack(weight, "model.layers.1.mlp.up_proj")
    message = str(refused.value)
    assert message.startswith(f"model.layers.1.mlp.up_proj: {words}")
    assert "--format" in message
    assert "\n" not in message


def test_a_group_of_zeros_needs_no_scale(tmp_path: Path) -> None:
    """One that half precision cannot hold is that of zeros here, and of numbers when one code is moved."""
    weight = on_grid(4)
    codes, scale = weight.codes.clone(), weight.scale.clone()
    codes[3, :32], scale[3, 0] = int(weight.zero_point[3, 0]), 1e-9
    zeros = replace(weight, codes=codes, scale=scale)
    packed = gptq.pack_v2(zeros, "w")
    assert torch.equal(read_gptq(packed.tensors, 4, 0), with_half_scales(zeros))
    assert 0 < packed.scale_change <= HALF
    zeros.codes[3, 7] += 1
    with pytest.raises(UserError, match=r"w: its scale 1\.0e-09 becomes 0 in float16"):
        gptq.pack_v2(zeros, "w")


@pytest.mark.parametrize(("factor", "said"), [(1e-9, "all of its values become 0 in float16"), (1e6, "beyond float16")])
def test_weights_that_the_dtype_of_an_export_cannot_hold_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, factor: float, said: str
) -> None:
    dense = tiny_checkpoint(tmp_path, "llama")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = tensors_of(dense)
    save_file(tensors | {name: tensors[name] * factor}, dense / "model.safetensors", {"format": "pt"})
    source = quantized(dense, tmp_path / "q", 4, 32)
    with pytest.raises(UserError, match=rf"{name}.*{said}.*--dtype bfloat16 or float32"):
        export_checkpoint(source, tmp_path / "out", "dense", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    export_checkpoint(source, tmp_path / "out", "dense", dtype=torch.bfloat16)


# directories ----------------------------------------------------------------------------------------------------------

ROUND_TRIPS = [
    ("llama", (3, 32, "gptq-sym")),
    ("llama", (4, 32, "gptq-sym")),
    ("llama", (8, 32, "gptq-sym")),
    ("llama", (2, 16, "quarot-sym")),
    ("llama", (8, -1, "smoothquant-sym")),
    ("llama", (3, 32, "gptq-asym")),
    ("llama", (4, 16, "awq-asym")),
    ("llama", (2, 32, "gptq-asym")),
    ("llama", (5, -1, "gptq-asym")),
    ("qwen2", (3, 32, "gptq-sym")),
    ("qwen3", (3, 32, "gptq-asym")),
    ("opt", (4, 32, "gptq-asym")),
]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(("model_type", "grid"), ROUND_TRIPS)
def test_transformers_computes_our_bits_from_compressed_tensors(
    model_type: str, grid: tuple[Any, ...], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = quantized(checkpoint(model_type), tmp_path / "q", *grid)
    done = export_checkpoint(source, tmp_path / "ct")
    ours = logits(load_quantized(source))
    assert torch.equal(logits(loaded(tmp_path / "ct")), ours)
    explicit = loaded(tmp_path / "ct", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(logits(explicit), ours)
    config = read_json(tmp_path / "ct" / "config.json", "configuration")["quantization_config"]
    assert config.get("dequantize", False) == grid[2].endswith("-asym")
    assert "Scales are exact" in done.facts


@pytest.mark.skipif(
    not hasattr(transformers.integrations.compressed_tensors, "CompressedTensorsDequantize"),
    reason="this transformers rounds scales to the model's dtype before it unpacks",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("convention", ["gptq-sym", "gptq-asym"])
def test_half_precision_models_keep_float32_scales(
    dtype: torch.dtype, convention: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = quantized(checkpoint(dtype=dtype), tmp_path / "q", 3, 32, convention)
    done = export_checkpoint(source, tmp_path / "ct")
    model = loaded(tmp_path / "ct")
    assert model.dtype == dtype
    assert torch.equal(logits(model), logits(load_quantized(source)))
    assert f"runtimes that keep them in {str(dtype).removeprefix('torch.')} round them" in done.facts


@pytest.mark.parametrize("format_name", FORMATS)
def test_what_is_not_quantized_goes_out_as_it_is_stored(
    format_name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    origin = checkpoint("qwen2", dtype=torch.bfloat16)  # has biases
    source = quantized(origin, tmp_path / "q", 4, 32, "gptq-sym")
    export_checkpoint(source, tmp_path / "out", format_name)
    checkpoint, exported = DenseCheckpoint(origin).weights(empty_model(origin)), tensors_of(tmp_path / "out")
    whole = {name for name in tensors_of(origin) if "proj.weight" not in name}
    assert {"model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"} <= whole
    for name in whole:
        assert exported[name].dtype == torch.bfloat16
        assert torch.equal(exported[name], checkpoint.tensor(name)), name
    ours = {".".join(name.split(".")[:-1]) for name in exported.keys() - whole}
    assert ours == {name.removesuffix(".weight") for name in tensors_of(origin).keys() - whole}


def test_dense_is_the_dequantized_model_and_takes_another_dtype(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = quantized(checkpoint(), tmp_path / "q", 3, 32)
    export_checkpoint(source, tmp_path / "plain", "dense")
    assert torch.equal(logits(loaded(tmp_path / "plain")), logits(load_quantized(source)))
    export_checkpoint(source, tmp_path / "half", "dense", dtype=torch.float16)
    model = loaded(tmp_path / "half")
    assert model.dtype == torch.float16
    assert torch.equal(logits(model), logits(load_quantized(source, dtype=torch.float16)))
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "half").values()} == {torch.float16}


def test_the_directory_has_what_a_model_needs_and_nothing_of_ours(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = quantized(checkpoint(), tmp_path / "q", 4, 32, "gptq-sym")
    export_checkpoint(source, tmp_path / "ct")
    assert {file.name for file in (tmp_path / "ct").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    index = read_json(tmp_path / "ct" / "model.safetensors.index.json", "index")
    tensors = tensors_of(tmp_path / "ct")
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    text = (tmp_path / "ct" / "README.md").read_text()
    assert "4 bits, groups of 32, symmetric" in text
    assert 'from_pretrained("ct")' in text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ct", "q"]


def test_files_are_closed_as_blocks_are_done_and_hold_the_same(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = quantized(checkpoint(), tmp_path / "q", 4, 32, "gptq-sym")
    export_checkpoint(source, tmp_path / "one")
    written: list[int] = []
    read = quantization.export.writer.read_block

    def reading(file: Path) -> Any:
        written.append(len(list(tmp_path.glob(".parts.*.partial/parts/*.partial"))))
        return read(file)

    monkeypatch.setattr(quantization.export.writer, "read_block", reading)
    export_checkpoint(source, tmp_path / "parts", shard_bytes=1)
    assert written == [0, 1, 2, 3]  # a block's file is there before the next block is read
    files = sorted(file.name for file in (tmp_path / "parts").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    one, parts = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "parts")
    assert one.keys() == parts.keys()
    assert all(torch.equal(one[name], parts[name]) for name in one)
    assert torch.equal(logits(loaded(tmp_path / "parts")), logits(loaded(tmp_path / "one")))


def test_a_failed_export_leaves_nothing_behind(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = quantized(checkpoint(), tmp_path / "q", 3, 32)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"model\.layers\.0\.\S+: bits=3 is taken by no reader of AWQ's format"):
        export_checkpoint(source, tmp_path / "out", "awq")
    assert sorted(tmp_path.iterdir()) == before


# several grids --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixed(GridQuantizer):
    """8 bits in the attention, `grid` in the MLP (ZeroQuant's W4/8); with `skip`, what ends so stays full precision."""

    grid: UniformGrid
    skip: str = ""
    name: ClassVar[str] = "mixed"
    calibrates: ClassVar[bool] = False

    def quantize_block(self, block: DecoderBlock) -> dict[str, QuantizedTensor]:
        wide = replace(self.grid, bits=8) if not self.skip else self.grid
        return {
            name: quantize(linear.weight.data, wide if "attn" in name else self.grid)
            for name, linear in block.linears().items()
            if not (self.skip and name.endswith(self.skip))
        }


def mixed(dense: Path, out: Path, convention: str, skip: str = "") -> Path:
    return quantize_checkpoint(dense, Recipe(weights=Mixed(UniformGrid(4, 32, convention), skip)), out)


def test_symmetric_linears_may_differ_in_compressed_tensors(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = mixed(checkpoint(), tmp_path / "q", "gptq-sym")
    done = export_checkpoint(source, tmp_path / "ct")
    assert {scheme.bits for scheme in done.schemes.values()} == {4, 8}
    assert torch.equal(logits(loaded(tmp_path / "ct")), logits(load_quantized(source)))


@pytest.mark.parametrize(
    ("format_name", "convention"), [("compressed-tensors", "gptq-asym"), ("gptq", "gptq-sym"), ("gptq-v2", "gptq-asym")]
)
def test_other_formats_refuse_linears_that_differ(
    format_name: str, convention: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = mixed(checkpoint(), tmp_path / "q", convention)
    with pytest.raises(UserError, match=r"^model.*: . bits, groups of 32, \w+ differs from .*\(. bits.*--format dense"):
        export_checkpoint(source, tmp_path / "out", format_name)


def test_linears_that_are_not_quantized_are_named_or_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = mixed(checkpoint(), tmp_path / "q", "gptq-sym", skip="down_proj")
    export_checkpoint(source, tmp_path / "ct")
    assert torch.equal(logits(loaded(tmp_path / "ct")), logits(load_quantized(source)))
    export_checkpoint(source, tmp_path / "awq", "awq")
    left_out = read_json(tmp_path / "awq" / "config.json", "configuration")["quantization_config"][
        "modules_to_not_convert"
    ]
    assert left_out == [*(f"model.layers.{i}.mlp.down_proj" for i in range(3)), "lm_head"]
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj: it is not quantized, and GPTQ's format"):
        export_checkpoint(source, tmp_path / "gptq", "gptq-v2")


def test_a_checkpoint_without_quantized_weights_goes_out_dense_only(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = mixed(checkpoint(), tmp_path / "q", "gptq-sym", skip="proj")  # what a recipe of transforms alone writes
    with pytest.raises(UserError, match="nothing to pack; use --format dense"):
        export_checkpoint(source, tmp_path / "ct")
    export_checkpoint(source, tmp_path / "dense", "dense")
    assert torch.equal(logits(loaded(tmp_path / "dense")), logits(loaded(checkpoint())))


# prefixes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RescaledValues(GridQuantizer):
    """Moves scales from v_proj to o_proj before it rounds, as AWQ does: V is in another basis."""

    grid: UniformGrid
    name: ClassVar[str] = "rescaled"
    calibrates: ClassVar[bool] = False
    rescales: ClassVar[bool] = True

    def quantize_block(self, block: DecoderBlock) -> dict[str, QuantizedTensor]:
        channels = block.linears()["self_attn.v_proj"].out_features
        scale = torch.linspace(0.5, 4, channels)
        block.rescale(Rescaling("self_attn.v_proj", ("self_attn.o_proj",), scale))
        return RTN(self.grid).quantize_block(block)


@pytest.mark.parametrize("format_name", ["compressed-tensors", "dense"])
def test_the_prefix_beside_fits_the_model_that_transformers_loads(
    format_name: str, checkpoint: Callable[..., Path], tmp_path: Path, intactkv_root: Path
) -> None:
    source = quantized(checkpoint(), tmp_path / "q", 4, 32)
    done = export_checkpoint(source, tmp_path / "out", format_name, prefix="bos")
    prefix, full = Prefix.load(tmp_path / "out" / PREFIX_FILE), build_prefix(loaded(checkpoint()), [1])
    assert done.prefix is not None
    assert prefix.ids.tolist() == [1]
    assert all(torch.equal(a, b) for a, b in zip(full.keys, prefix.keys, strict=True))
    ours = attach(load_quantized(source), prefix).score(IDS)
    assert torch.equal(attach(loaded(tmp_path / "out"), prefix).score(IDS), ours)
    assert torch.equal(attach(loaded(tmp_path / "out"), full).score(IDS), ours)
    text = (tmp_path / "out" / "README.md").read_text()
    assert f'Prefix.load("out/{PREFIX_FILE}")' in text
    assert "vLLM" in text


@pytest.mark.parametrize("format_name", ["compressed-tensors", "dense"])
def test_a_rescaled_model_takes_its_twins_prefix_and_not_the_originals(
    format_name: str, checkpoint: Callable[..., Path], tmp_path: Path, intactkv_root: Path
) -> None:
    source = quantize_checkpoint(checkpoint(), Recipe(weights=RescaledValues(UniformGrid(4, 32))), tmp_path / "q")
    export_checkpoint(source, tmp_path / "out", format_name, prefix="bos")
    prefix = Prefix.load(tmp_path / "out" / PREFIX_FILE)
    score = attach(loaded(tmp_path / "out"), prefix).score(IDS)
    assert torch.equal(score, attach(load_quantized(source), prefix).score(IDS))
    full = build_prefix(loaded(checkpoint()), [1])
    assert not torch.allclose(full.values[0], prefix.values[0])
    with pytest.raises(UserError, match="another model or basis: basis is 'plain'"):
        attach(loaded(tmp_path / "out"), full)
    replace(full, calibrated={"best_step": 1}).save(tmp_path / "full.safetensors")
    with pytest.raises(UserError, match="another model or basis: basis is 'plain'"):
        export_checkpoint(source, tmp_path / "other", format_name, prefix=str(tmp_path / "full.safetensors"))
    assert not (tmp_path / "other").exists()


def test_a_prefix_file_of_another_model_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = quantized(checkpoint(), tmp_path / "q", 4, 32)
    build_prefix(loaded(checkpoint(seed=1)), [1]).save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="another model"):
        export_checkpoint(source, tmp_path / "out", prefix=str(tmp_path / "other.safetensors"))


def test_no_prefix_is_built_from_an_export(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = quantized(checkpoint(), tmp_path / "q", 4, 32, "gptq-sym")
    for format_name in ("dense", "compressed-tensors"):
        export_checkpoint(source, tmp_path / format_name, format_name)
        with pytest.raises(UserError, match="an export of quantized weights"):
            build_prefix(loaded(tmp_path / format_name), [1])


@dataclass(frozen=True)
class Calibrating(GridQuantizer):
    """Says that it calibrates, so that it can be run behind a prefix."""

    grid: UniformGrid
    name: ClassVar[str] = "calibrating"

    def quantize_block(self, block: DecoderBlock) -> dict[str, QuantizedTensor]:
        return RTN(self.grid).quantize_block(block)


def test_a_checkpoint_that_needs_a_prefix_takes_it_along_and_asks_for_it(
    checkpoint: Callable[..., Path], tmp_path: Path, intactkv_root: Path
) -> None:
    recipe = Recipe(weights=Calibrating(UniformGrid(4, 32)), prefix="bos", calibrate_behind_prefix=True)
    source = quantize_checkpoint(checkpoint(), recipe, tmp_path / "q", segments=IDS, behind=torch.tensor([1]))
    for wrong in ("none", "hello"):
        with pytest.raises(UserError, match="calibrated behind a prefix of 1 tokens"):
            export_checkpoint(source, tmp_path / "out", prefix=wrong)
    export_checkpoint(source, tmp_path / "out", prefix="bos")
    model, prefix = loaded(tmp_path / "out"), Prefix.load(tmp_path / "out" / PREFIX_FILE)
    with pytest.raises(UserError, match="calibrated behind a prefix of 1 tokens"):
        attach(model, None)
    assert torch.equal(attach(model, prefix).score(IDS), attach(load_quantized(source), prefix).score(IDS))
    assert "always attach it" in (tmp_path / "out" / "README.md").read_text()


def test_our_entry_in_the_configuration_is_plain_json_that_survives_transformers(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = quantized(checkpoint(), tmp_path / "q", 4, 32, "gptq-sym")
    export_checkpoint(source, tmp_path / "plain", "dense")
    loaded(tmp_path / "plain").save_pretrained(tmp_path / "again")
    entries = [json.loads((tmp_path / name / "config.json").read_text())["intactkv"] for name in ("plain", "again")]
    assert entries[0] == entries[1]
    assert entries[0]["basis"] == "plain"
