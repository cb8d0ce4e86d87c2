"""LUT-GEMM's kernels in Triton against the dequantized matrix in float64, in the interpreter or on a GPU."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from common import compiled_for, every
from torch import Tensor

from quantization.grids.binary_coding import BinaryCoded, BinaryGrid, pack_planes, pad_groups
from quantization.grids.uniform import UniformGrid
from quantization.kernels.linear import QuantLinear
from quantization.kernels.lut import CPU_ROWS, ROWS, Lut
from quantization.kernels.protocols import Stored
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import load_quantized
from quantization.runs.pipeline import quantize_checkpoint
from quantization.weights.bcq import GPTQToBCQ
from quantization.weights.gptq import GPTQ

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from quantization.kernels.lut_triton import Plan, Signs, dequantized, product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the kernels run in Triton's interpreter
CLOSE = 1e-6  # of the norm: float32 sums of some hundred terms
SEGMENTS = torch.randint(4, 101, (3, 12), generator=torch.Generator().manual_seed(5))
# Tables of both kinds, and signs without any.
PLANS = [None, Plan(64, 4, 4, 3), Plan(64, 5, 4, 50), Plan(128, 5, 4, 1), Signs(16, 8, 4)]

pytestmark = pytest.mark.usefixtures("no_grad")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def coded(
    out: int, channels: int, bits: int, size: int = -1, offset: bool = False, scales: str = "float32", seed: int = 0
) -> BinaryCoded:
    """Random signs, positive α of any size, any offset."""
    grid, groups = BinaryGrid(bits, size, offset, scales), 1 if size == -1 else channels // size
    draw = torch.Generator().manual_seed(seed)
    planes = pack_planes(torch.randint(2**bits, (out, channels), generator=draw, dtype=torch.uint8), bits, size)
    dtype = getattr(torch, scales)
    alpha = (randn(groups, bits, out, seed=seed + 1).abs() + 0.1).to(dtype)
    return BinaryCoded(
        planes.to(DEVICE), alpha, randn(groups, out, seed=seed + 2).to(dtype) if offset else None, grid, channels
    )


def multiplied(x: Tensor, weight: BinaryCoded, plan: Plan | Signs | None = None, bias: Tensor | None = None) -> Tensor:
    padded = pad_groups(x, weight.grid.group_size).flatten(1)
    return product(padded, weight.planes, weight.alpha, weight.offset, bias, plan)


def close(y: Tensor, x: Tensor, weight: BinaryCoded, bias: Tensor | None = None, share: float = CLOSE) -> None:
    truth = x.double() @ weight.dequantize().double().T
    if bias is not None:
        truth += bias.double()
    assert y.shape == truth.shape
    assert y.dtype == x.dtype
    assert float((y.double() - truth).norm()) <= share * float(truth.norm())


# out, channels, bits, group size, offset, batch
SHAPES = [
    (33, 64, 3, -1, True, 1), (40, 128, 2, 32, False, 2), (19, 96, 4, 48, True, 5), (37, 640, 1, -1, False, 1),
    (1, 60, 8, 20, True, 1), (21, 1088, 3, 544, True, 1),
]  # fmt: skip
CASES = [(PLANS[2], *shape) for shape in SHAPES] + [
    (plan, *shape) for plan, shape in zip(PLANS, SHAPES[:5], strict=True)
]


@every(("plan", "out", "channels", "bits", "size", "offset", "batch"), CASES)
def test_the_product_by_tables_is_the_product_with_the_numbers(plan, out, channels, bits, size, offset, batch):
    weight, x = coded(out, channels, bits, size, offset), randn(batch, channels, seed=7)
    close(multiplied(x, weight, plan), x, weight)


@every("scales", ["float16", "float32"])
@every("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_and_inputs_are_of_any_float_dtype_and_a_bias_is_added(scales, dtype):
    weight, x, bias = coded(50, 64, 3, 32, True, scales), randn(2, 64, seed=3).to(dtype), randn(50, seed=4).to(dtype)
    close(multiplied(x, weight, bias=bias), x, weight, bias, {torch.float32: CLOSE}.get(dtype, torch.finfo(dtype).eps))


@every("plan", PLANS)
@every("channel", [0, 1, 7, 8, 31, 32, 45, 95])
def test_a_one_hot_input_picks_its_bit_of_every_plane(plan, channel):
    weight, x = coded(5, 96, 3, 32), torch.zeros(1, 96, device=DEVICE)
    x[0, channel] = 1
    bits = (weight.planes[channel // 32] >> (channel % 32)) & 1  # (q, out)
    alpha = weight.alpha[channel // 32]
    expected = torch.where(bits == 1, alpha, -alpha).double().sum(0)
    assert float((multiplied(x, weight, plan)[0].double() - expected).norm()) <= CLOSE * float(expected.norm())


@every("plan", PLANS)
def test_a_product_has_the_same_bits_every_time_and_in_any_batch(plan):
    weight, x = coded(25, 128, 3, 32, True), randn(2, 128, seed=2)
    plan = plan or Plan(64, splits=4)
    once = multiplied(x, weight, plan)
    assert torch.equal(once, multiplied(x, weight, plan))
    assert torch.equal(once[1:2], multiplied(x[1:2], weight, plan))


@every("dtype", [torch.float32, torch.float16])  # the interpreter cuts numbers off to bfloat16, a GPU rounds them
@every(("out", "channels", "bits", "size", "offset"), [
    (33, 64, 3, -1, True), (70, 96, 4, 48, True), (5, 60, 8, 12, False), (64, 256, 1, 64, False),
])  # fmt: skip
def test_the_matrix_is_made_with_the_same_bits_as_in_torch(dtype, out, channels, bits, size, offset):
    weight = coded(out, channels, bits, size, offset)
    found = dequantized(weight.planes, weight.alpha, weight.offset, channels, channels if size == -1 else size, dtype)
    assert torch.equal(found, weight.dequantize(dtype))


def test_binary_coded_weights_are_taken_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantization.kernels.lut.runs_triton", lambda device: device.type == "cuda")
    weight = coded(8, 32, 2)
    stored = Stored(weight.kind, weight.tensors(), weight.header())
    for device in ("cuda", "cpu"):
        assert Lut().takes(stored, torch.device(device))
        assert not Lut().takes(replace(stored, kind="uniform"), torch.device(device))
    assert not Lut().takes(stored, torch.device("mps"))


def check_any_batch(size: int, device: str, rows: int) -> None:
    weight, bias = coded(24, 64, 3, size, True), randn(24, seed=9).to(device)
    weight = replace(weight, **{name: part.to(device) for name, part in weight.tensors().items()})
    stored = Stored(weight.kind, weight.tensors(), weight.header())
    linear = QuantLinear(stored, torch.Size((24, 64)), bias, kernel="lut")
    assert linear.kernel == "lut"
    assert torch.allclose(linear.dequantize(torch.float32), weight.dequantize(), atol=1e-6)
    for shape in ((1,), (3,), (rows + 1,), (2, 1), (2, rows), (0,)):
        x = randn(*shape, 64, seed=8).to(device)
        y = linear(x)
        assert y.shape == (*shape, 24)
        close(y.reshape(-1, 24), x.reshape(-1, 64), weight, bias)
    with torch.enable_grad():
        x = randn(1, 64).to(device).requires_grad_()
        linear(x).sum().backward()
    assert x.grad is not None
    assert float((x.grad - weight.dequantize().sum(0)).norm()) <= 1e-5 * float(x.grad.norm())


@pytest.mark.usefixtures("triton_anywhere")
@pytest.mark.parametrize("size", [32, 16, -1])
def test_a_linear_multiplies_any_batch_by_its_codes(size: int) -> None:
    check_any_batch(size, DEVICE, ROWS)


@pytest.mark.parametrize("size", [32, 16])
def test_a_linear_on_a_cpu_does_so_in_plain_torch(size: int) -> None:
    check_any_batch(size, "cpu", CPU_ROWS)


@pytest.mark.usefixtures("triton_anywhere")
def test_gptq_in_binary_coding_is_served_by_tables(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "dense", "llama", num_hidden_layers=2)
    out = {
        weights.name: quantize_checkpoint(source, Recipe(weights=weights), tmp_path / weights.name, segments=SEGMENTS)
        for weights in (GPTQ(UniformGrid(4, 32)), GPTQToBCQ(UniformGrid(4, 32)))
    }
    served = load_quantized(out["gptq-bcq"], kernel="lut", device=DEVICE)
    assert {module.kernel for module in served.modules() if isinstance(module, QuantLinear)} == {"lut"}
    token = SEGMENTS[:1, :1].to(DEVICE)  # one token: by tables; all of them: by the matrix
    for name, share in (("gptq-bcq", 1e-5), ("gptq", 1e-3)):
        dense = load_quantized(out[name], device=DEVICE)
        for ids in (token, SEGMENTS.to(DEVICE)):
            expected, found = dense(ids).logits, served(ids).logits
            # The second block's Hessians see float32 rounding of the first; it can move a weight between two levels.
            assert float((found - expected).norm()) <= share * float(expected.norm())


# Without a GPU --------------------------------------------------------------------------------------------------------


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    shared = compiled_for(90, "compiled_lut.py", tmp_path)
    assert len(shared) == 3
    assert max(shared) <= 2**13  # bytes: tables, or what a tile of rows is turned in
