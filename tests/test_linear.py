"""QuantLinear: packed weights compute what their dequantized form computes, and take the promised space."""

import json

import pytest
import torch
from common import every
from torch import Tensor

from quantization.grids.uniform import CONVENTIONS, QuantizedTensor, UniformGrid, fake_quantize, quantize
from quantization.kernels.linear import QuantLinear
from quantization.kernels.protocols import Stored

GRIDS = [UniformGrid(bits, 12, convention) for convention in CONVENTIONS for bits in (2, 3, 4, 8)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(weight: Tensor, grid: UniformGrid, bias: Tensor | None) -> QuantLinear:
    quantized = quantize(weight, grid)
    return QuantLinear(Stored(quantized.kind, quantized.tensors(), quantized.header()), weight.shape, bias)


pytestmark = pytest.mark.usefixtures("no_grad")


@every("grid", GRIDS)
def test_what_is_stored_is_what_was_quantized(grid: UniformGrid) -> None:
    weight = quantize(random(10, 36), grid)  # three groups a row: codes and zero points both need padding
    again = QuantizedTensor.restore(weight.tensors(), json.loads(json.dumps(weight.header())))
    assert again.grid == grid
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scale, weight.scale)
    assert torch.equal(again.zero_point, weight.zero_point)


@every("grid", GRIDS)
@every("dtype", [torch.float32, torch.bfloat16])
@every("has_bias", [True, False])
def test_the_output_is_that_of_the_fake_quantized_weight_bit_for_bit(
    grid: UniformGrid, dtype: torch.dtype, has_bias: bool
) -> None:
    weight, x = random(10, 36).to(dtype), random(2, 5, 36, seed=1).to(dtype)
    bias = random(10, seed=2).to(dtype) if has_bias else None
    expected = torch.nn.functional.linear(x, fake_quantize(weight, grid), bias)
    output = layer(weight, grid, bias)(x)
    assert output.dtype == dtype
    assert torch.equal(output, expected)


def test_a_layer_shows_its_shape_and_keeps_no_dense_weight() -> None:
    linear = layer(random(10, 36), UniformGrid(4, 12), random(10))
    assert (linear.out_features, linear.in_features) == (10, 36)
    assert "in_features=36, out_features=10" in repr(linear)
    assert sorted(linear.state_dict()) == ["bias", "codes", "scale", "zero_point"]
    assert not any(parameter.requires_grad for parameter in linear.parameters())


@every("bits", range(2, 9))
@every("group_size", [16, 32])
@every("scale_bits", [16, 32])
def test_an_asymmetric_weight_takes_b_plus_scale_plus_b_over_s_bits(
    bits: int, group_size: int, scale_bits: int
) -> None:
    weight = random(24, 256)  # 8 or 16 groups a row: zero points fill whole bytes
    stored = quantize(weight, UniformGrid(bits, group_size, scale_dtype=f"float{scale_bits}")).tensors()
    taken = 8 * sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert taken / weight.numel() == bits + (scale_bits + bits) / group_size


@every(("bits", "published"), [(4, 4.16), (3, 3.15)])
def test_a_group_of_128_with_half_precision_scales_takes_the_published_bits(bits: int, published: float) -> None:
    weight = random(8, 1024)
    stored = quantize(weight, UniformGrid(bits, 128, scale_dtype="float16")).tensors()
    taken = 8 * sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert round(taken / weight.numel(), 2) == published


@every("convention", [c for c, rule in CONVENTIONS.items() if rule.zero_point == "constant"])
def test_a_constant_zero_point_takes_no_space(convention: str) -> None:
    stored = quantize(random(8, 64), UniformGrid(4, 16, convention)).tensors()
    assert set(stored) == {"codes", "scale"}
