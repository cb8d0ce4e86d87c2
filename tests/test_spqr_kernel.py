"""The kernels of SpQR's product in Triton against the dequantized matrix, in the interpreter or on a GPU."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from common import compiled_for, every
from torch import Tensor

from quantization.grids.sparse import SecondLevel, SparseRows, SpQRWeight
from quantization.kernels.linear import QuantLinear
from quantization.kernels.protocols import Stored
from quantization.kernels.spqr import GROUP, Spqr, layout

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from quantization.kernels.spqr_triton import ROWS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the kernels run in Triton's interpreter
CLOSE = 2e-6  # of the norm: float32 sums of some hundred terms, some of which cancel (z·Σx)

pytestmark = pytest.mark.usefixtures("no_grad", "triton_anywhere")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(DEVICE)


def spqr_weight(
    out: int, channels: int, size: int, bits: int = 3, second: int = 3, tile: int = 4, share: float = 0.05,
    order: bool = True,
) -> SpQRWeight:  # fmt: skip
    """Random codes on random grids; so large a share of weights has a correction; one row has none, one is full."""
    draw, groups = generator(out + channels), channels // size

    def level(offset: float) -> SecondLevel:
        codes = torch.randint(2**second, (groups, out), generator=draw, dtype=torch.uint8)
        scale = (torch.rand(groups, out // tile, generator=draw) + 0.5).half() / 2**second
        zero = (torch.rand(scale.shape, generator=draw) * 2 + offset).half()
        return SecondLevel(codes.to(DEVICE), scale.to(DEVICE), zero.to(DEVICE))

    kept = torch.rand(out, channels, generator=draw) < share
    if share:
        kept[0], kept[1] = False, True
    corrections = SparseRows.from_dense((torch.randn(out, channels, generator=draw) * kept).half().to(DEVICE))
    codes = torch.randint(2**bits, (out, channels), generator=draw, dtype=torch.uint8).to(DEVICE)
    channel = torch.randperm(channels, generator=draw).to(torch.uint16).to(DEVICE) if order else None
    return SpQRWeight(codes, level(-3.0), level(0.5), corrections, channel, bits, second, second)


def linear_of(weight: SpQRWeight, bias: Tensor | None = None) -> QuantLinear:
    made = QuantLinear(Stored(weight.kind, weight.tensors(), weight.header()), weight.codes.shape, bias, kernel="spqr")
    assert made.kernel == "spqr"
    return made


@every(("out", "channels", "size", "bits", "second", "tile", "share", "order"), [
    (20, 64, 16, 3, 3, 4, 0.05, True), (34, 48, 16, 4, 3, 2, 0.05, False), (33, 96, 32, 2, 4, 3, 0.0, True),
    (16, 60, 12, 5, 5, 16, 0.05, True), (8, 64, 64, 8, 8, 4, 0.0, False), (8, 640, 16, 3, 3, 8, 0.05, True),
])  # fmt: skip
def test_the_product_is_that_of_the_matrix_with_its_outliers(out, channels, size, bits, second, tile, share, order):
    weight, bias = spqr_weight(out, channels, size, bits, second, tile, share, order), randn(out, seed=3)
    linear, dense = linear_of(weight, bias), weight.dequantize().double()
    for shape in ((1,), (ROWS + 1,), (1, 2), (0,)):
        x = randn(*shape, channels, seed=7)
        y, truth = linear(x), x.double() @ dense.T + bias.double()
        assert y.shape == truth.shape
        assert y.dtype == x.dtype
        assert float((y.double() - truth).norm()) <= CLOSE * float(truth.norm())


@every("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_half_precision_are_rounded_at_the_end_alone(dtype):
    weight, x = spqr_weight(24, 320, 16), randn(2, 320, seed=1).to(dtype)
    y, truth = linear_of(weight)(x), x.double() @ weight.dequantize().double().T
    assert y.dtype == dtype
    assert float((y.double() - truth).norm()) <= torch.finfo(dtype).eps * float(truth.norm())


@every("dtype", [torch.float32, torch.float16])
@every("order", [True, False])
def test_a_one_hot_input_picks_a_column_with_its_outliers(dtype, order):
    """Float16 numbers are rounded once: with their correction."""
    weight = spqr_weight(24, 96, 16, order=order)
    linear, dense = linear_of(weight), weight.dequantize(dtype)
    eye = torch.eye(96, dtype=dtype, device=DEVICE)
    rounding = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-11, "atol": 2**-11}
    torch.testing.assert_close(linear(eye[:ROWS]).T, dense[:, :ROWS], **rounding)  # z·x is taken off a sum
    found = linear(eye).T
    assert torch.equal(linear.dequantize(dtype), found)
    assert torch.equal(found, dense) or DEVICE == "cuda"  # whose compiler contracts s·(q − z) + r
    torch.testing.assert_close(found, dense, **rounding)


def test_a_product_has_the_same_bits_every_time() -> None:
    linear, x = linear_of(spqr_weight(40, 320, 16)), randn(2, 320)
    once = linear(x)
    assert torch.equal(once, linear(x))
    assert torch.equal(once[1:], linear(x[1:]))


@every("bits", range(2, 9))
@every("size", [12, 16, 33])
def test_words_hold_every_code(bits, size):
    codes = torch.randint(2**bits, (5, 3 * size), generator=generator(0), dtype=torch.uint8)
    words, per_word = layout(codes, bits, 3), 32 // bits
    for g in range(3):
        for place in range(size):
            field = (words[g, place // per_word] >> (bits * (place % per_word))) & (2**bits - 1)
            assert field.tolist() == codes[:, g * size + place].tolist()


def test_spqr_weights_on_a_gpu_are_taken_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantization.kernels.spqr.runs_triton", lambda device: device.type == "cuda")
    weight = spqr_weight(8, 64, 16)
    stored = Stored(weight.kind, weight.tensors(), weight.header())
    assert Spqr().takes(stored, torch.device("cuda"))
    assert not Spqr().takes(stored, torch.device("cpu"))
    assert not Spqr().takes(replace(stored, kind="uniform"), torch.device("cuda"))
    large = spqr_weight(8, 4 * GROUP, 2 * GROUP)
    assert not Spqr().takes(Stored(large.kind, large.tensors(), large.header()), torch.device("cuda"))


# Without a GPU --------------------------------------------------------------------------------------------------------


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    shared = compiled_for(90, "compiled_spqr.py", tmp_path)
    assert len(shared) == 6
    assert max(shared) <= 2**15  # bytes, for sums across warps
