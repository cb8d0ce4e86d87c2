"""The Triton product with uniform codes, in Triton's interpreter where no GPU is: the dequantized matrix in float64."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from common import compiled_for, every
from torch import Tensor
from torch.testing import assert_close

from quantization.grids.uniform import CONVENTIONS, QuantizedTensor, UniformGrid, quantize
from quantization.kernels.protocols import Prepared, Stored

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from quantization.kernels import launch, uniform_triton
from quantization.kernels.uniform import Uniform, layout
from quantization.kernels.uniform_triton import DotTile, Tile, UniformCodes, few_rows, some_rows, tile_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What a product of so few channels may be off, of the norm of its inputs times that of the weights: the rounding of the
# result, and of the weights where they are dequantized in the dtype of the inputs.
NEAR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

pytestmark = pytest.mark.usefixtures("no_grad", "bfloat16_products")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def prepared(weight: QuantizedTensor) -> Prepared:
    return Uniform().prepare(Stored(weight.kind, weight.tensors(), weight.header()))


def error(weight: QuantizedTensor, x: Tensor, bias: Tensor | None = None) -> float:
    """How far the product is from that in float64, relative to the largest it could be."""
    made = prepared(weight)
    y = made.multiply(x, made.tensors, bias)
    assert (y.shape, y.dtype) == ((*x.shape[:-1], len(weight.codes)), x.dtype)
    dense = weight.dequantize(torch.float64)
    expected = x.double() @ dense.T + (0 if bias is None else bias.double())
    return float((y.double() - expected).abs().max() / (x.double().norm(dim=-1).max() * dense.norm(dim=1).max()))


@every("bits", [2, 3, 4, 8])
@every(
    ("rows", "dtype"),
    [(1, torch.float32), (1, torch.bfloat16), (2, torch.float16), (4, torch.float32), (16, torch.bfloat16)],
)
def test_the_product_is_that_of_the_dequantized_matrix(bits: int, rows: int, dtype: torch.dtype) -> None:
    weight = quantize(random(67, 32 * 6), UniformGrid(bits, 96))  # outputs are filled up, units of a tile are missing
    assert error(weight, random(rows, 32 * 6, seed=1).to(dtype)) < NEAR[dtype]


@every("convention", CONVENTIONS)
def test_every_kind_of_zero_point_is_multiplied(convention: str) -> None:
    weight = quantize(random(5, 64) + 1, UniformGrid(3, 32, convention, scale_dtype="float16"))
    assert error(weight, random(1, 64, seed=1), random(5, seed=2)) < NEAR[torch.float32]


@every("rows", [1, 3, 6])
def test_channels_may_be_in_any_groups(rows: int) -> None:
    weight = quantize(random(9, 128), UniformGrid(4, 32))
    index = torch.arange(128)[torch.randperm(128, generator=torch.Generator().manual_seed(3))] // 32
    weight = replace(weight, group_index=index.int().to(DEVICE))
    assert error(weight, random(2, rows, 128, seed=1)) < NEAR[torch.float32]
    made = prepared(weight)
    assert_close(made.dequantize(made.tensors, torch.float32), weight.dequantize(), rtol=1e-6, atol=1e-6)


@every("dtype", NEAR)
@every("bits", [2, 3, 4, 8])
def test_the_dequantized_matrix_is_that_of_its_grid(bits: int, dtype: torch.dtype) -> None:
    """Near, and not the same bits: s·c − s·z is rounded once less than s·(c − z)."""
    weight = quantize(random(70, 96), UniformGrid(bits, 32))
    made = prepared(weight)
    near = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert_close(made.dequantize(made.tensors, dtype), weight.dequantize(dtype), rtol=near, atol=1e-6)


def test_inputs_may_lie_anywhere() -> None:
    weight, x = quantize(random(6, 64), UniformGrid(4, 32)), random(2, 129, seed=1).bfloat16()
    assert error(weight, x[:1, 1:65]) < NEAR[torch.bfloat16]  # no line of memory begins there
    assert error(weight, x[:, 1:65]) < NEAR[torch.bfloat16]
    assert error(weight, x[:, ::2][:, :64].double()) < NEAR[torch.float32]


def test_no_rows_and_rows_that_need_gradients_go_another_way() -> None:
    weight = quantize(random(6, 64), UniformGrid(4, 32))
    made = prepared(weight)
    assert made.multiply(random(0, 64), made.tensors, None).shape == (0, 6)
    with torch.enable_grad():
        x = random(1, 64).requires_grad_()
        made.multiply(x, made.tensors, None).sum().backward()
    assert_close(x.grad, weight.dequantize().sum(0, keepdim=True), rtol=1e-5, atol=1e-5)


@every("bits", [2, 3, 4, 8])
def test_words_hold_every_code_once(bits: int) -> None:
    """One code set, all others zero: one field of one word is set, and no two codes share a bit."""
    seen = torch.zeros(bits, dtype=torch.int64)
    for place in range(32):
        codes = torch.zeros(1, 32, dtype=torch.uint8)
        codes[0, place] = 2**bits - 1
        words = layout(codes, bits).flatten().long() & (2**32 - 1)
        assert not (seen & words).any()
        seen |= words
    assert (seen == 2**32 - 1).all()


def test_values_far_from_any_activation_are_in_range() -> None:
    weight = quantize(random(4, 32), UniformGrid(4, 32))
    made = prepared(weight)
    for size in (1e-20, 1e11):
        x = random(1, 32, seed=1) * size
        expected = x.double() @ weight.dequantize(torch.float64).T
        assert_close(made.multiply(x, made.tensors, None).double(), expected, rtol=1e-4, atol=1e-5 * size)


def test_only_what_the_kernels_know_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(bits: int, group: int, channels: int = 128, device: str = "cuda", index: Tensor | None = None) -> bool:
        weight = replace(quantize(random(4, channels), UniformGrid(bits, group)), group_index=index)
        return Uniform().takes(Stored(weight.kind, weight.tensors(), weight.header()), torch.device(device))

    monkeypatch.setattr("quantization.kernels.uniform.runs_triton", lambda device: device.type == "cuda")
    assert all(taken(bits, group) for bits in (2, 3, 4, 8) for group in (32, 64, -1))
    assert not any(taken(bits, 32) for bits in (5, 6, 7))
    assert not taken(4, 16)
    assert not taken(4, -1, channels=48)
    assert not taken(4, 32, device="cpu")
    assert taken(4, 64, index=torch.arange(128).int() % 2)
    assert not taken(4, 64, index=(torch.arange(128) > 60).int())


@every(("bits", "rows"), [(2, 1), (3, 3), (4, 1), (8, 1)])
@every(
    "tile",
    [
        Tile(32, 2, 1),
        Tile(8, 4, 1),
        Tile(32, 2, 1, splits=2),
        Tile(32, 2, 1, ahead=True, splits=3),
        Tile(32, 2, 1, scaled=True),
        Tile(32, 1, 1, scaled=True, ahead=True, splits=2),
    ],
)
def test_every_tile_gives_the_product(bits: int, rows: int, tile: Tile) -> None:
    weight = quantize(random(61, 320), UniformGrid(bits, 64))  # ten units: no number of those that are read at a time
    codes, tensors, x, bias = (
        UniformCodes(bits, 320, 61, 2, None),
        prepared(weight).tensors,
        random(rows, 320),
        random(61),
    )
    y = torch.empty(rows, 61, device=DEVICE)
    few_rows(x, tensors, bias, y, codes, rows, tile)
    assert_close(y.double(), x.double() @ weight.dequantize(torch.float64).T + bias, rtol=1e-5, atol=1e-4)


def test_every_shape_has_a_tile_that_its_outputs_fill() -> None:
    for bits in (2, 3, 4, 8):
        for outputs, channels in ((64, 64), (576, 1536), (4096, 14336), (14336, 4096), (12288, 49152), (128256, 8192)):
            for rows in (1, 2, 4):
                tile = tile_of(UniformCodes(bits, channels, outputs, 4, None), rows)
                assert 64 % (tile.outputs * tile.tiles) == 0
                assert 1 <= tile.splits <= 8


@pytest.mark.parametrize(
    "tile",
    [Tile(32, 2, 1), Tile(32, 2, 1, scaled=True), Tile(32, 1, 1, scaled=True, ahead=True, splits=2), DotTile(64, 16)],
)
def test_a_second_call_hands_the_same_kernels_its_own_tensors(
    tile: Tile | DotTile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the first call compiles, and later ones start what it compiled with addresses alone. Here a compiled
    kernel is one that finds the tensors of the addresses and has them interpreted."""
    if DEVICE == "cuda":
        pytest.skip("there every test of few rows can tell")
    known: dict[int, Tensor] = {}
    started: list[str] = []

    class Kernel:
        def __init__(self, name: str):
            self.name, self.kernel = name, getattr(uniform_triton, name)

        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **options: self.kernel[grid](*arguments, **options) or Compiled(self)

    class Compiled:
        def __init__(self, of: Kernel):
            self.of = of

        def __getitem__(self, grid: Any) -> Any:
            def start(*arguments: Any, stream: int) -> None:
                started.append(self.of.name)
                assert not any(isinstance(argument, Tensor) for argument in arguments)
                self.of.kernel[grid](*(known.get(a, a) if isinstance(a, int) else a for a in arguments))

            return start

    def room(*arguments: Any, **options: Any) -> Tensor:
        made = empty(*arguments, **options)
        known[made.data_ptr()] = made
        return made

    empty = torch.empty
    names = ("few_rows_kernel", "scale_kernel", "sum_kernel", "turn_kernel", "some_rows_kernel")
    for name in names:
        monkeypatch.setattr(uniform_triton, name, Kernel(name))
    monkeypatch.setattr(torch, "empty", room)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    codes = UniformCodes(3, 128, 64, 1, None)
    for seed, dtype in enumerate((torch.float32, torch.float32, torch.bfloat16)):  # the last ones by model.to
        weight = quantize(random(64, 128, seed=seed), UniformGrid(3, 32))
        weight = replace(weight, scale=weight.scale.to(dtype))
        made, x, bias, y = prepared(weight), random(1, 128, seed=seed + 5), random(64), torch.empty(1, 64)
        known.update({tensor.data_ptr(): tensor for tensor in (*made.tensors.values(), x, bias, y)})
        started.clear()
        if isinstance(tile, Tile):
            few_rows(x, made.tensors, bias, y, codes, 1, tile)
        else:
            some_rows(x, made.tensors, bias, y, codes, 1, tile)
        assert_close(y.double(), x.double() @ weight.dequantize(torch.float64).T + bias, rtol=1e-5, atol=1e-4)
        before, main, behind = ["scale_kernel"], "few_rows_kernel", ["sum_kernel"]
        if isinstance(tile, Tile):
            before, behind = before * tile.scaled, behind * (tile.splits > 1)
        else:
            before, main = ["turn_kernel"], "some_rows_kernel"
        again = [main] if dtype == torch.float32 else []  # no kernel is started that reads float32 scales
        assert started == ([] if seed == 0 else before + again + behind)


# Without a GPU --------------------------------------------------------------------------------------------------------


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    shared = compiled_for(80, "compiled_uniform.py", tmp_path)
    assert len(shared) == 2 * 5  # one row; some rows, turned before and summed; the matrix
    assert max(shared) <= 99 * 2**10  # bytes that a program has on the GPUs with the least
