"""Number grids: every convention by hand, the laws of rounding, clip search, packing."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from common import every
from torch import Tensor

from corpora.errors import UserError
from quantization.grids.packing import pack_codes, unpack_codes
from quantization.grids.uniform import (
    CONVENTIONS,
    QuantizedTensor,
    UniformGrid,
    fake_quantize,
    fit,
    quantize,
    split_groups,
)

BITS = range(2, 9)
ALL = tuple(CONVENTIONS)
# One step of float32 relative to the value: what s·(q − z) may lose when s itself is a rounded quotient.
ULP = 2.0**-23


def rows(count: int = 64, channels: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


def step_of(x: Tensor, grid: UniformGrid) -> Tensor:
    """The scale of every value, in the shape of x."""
    size = x.shape[-1] if grid.group_size == -1 else grid.group_size
    return quantize(x, grid).scale.float().repeat_interleave(size, dim=-1)


# the table of conventions ---------------------------------------------------------------------------------------------

# convention, bits, values of one group, scale, zero point, codes, values on the grid: by hand from the published rules.
TABLE = [
    # GPTQ asym, (hi − lo)/N = 15/15 = 1, z = 8
    ("gptq-asym", 4, [-8, -3, 0, 2, 7], 1, 8, [0, 5, 8, 10, 15], [-8, -3, 0, 2, 7]),
    # the range contains 0: 1…7.5 becomes 0…7.5, s = 0.5; 1.3/0.5 = 2.6 → 3
    ("gptq-asym", 4, [1, 1.3, 3, 7.5], 0.5, 0, [2, 3, 6, 15], [1, 1.5, 3, 7.5]),
    ("gptq-asym", 4, [-7.5, -3, -1], 0.5, 15, [0, 9, 13], [-7.5, -3, -1]),
    # GPTQ sym: m = 7.5, s = 15/15 = 1, z = 8; the largest positive value 7.5 → 8 is clipped by half a step to 7
    ("gptq-sym", 4, [-7.5, -3, 0, 2, 7.5], 1, 8, [0, 5, 8, 10, 15], [-8, -3, 0, 2, 7]),
    ("gptq-sym", 4, [0, 0], 2 / 15, 8, [8, 8], [0, 0]),
    # AWQ asym: plain range; the same as GPTQ if it contains 0 …
    ("awq-asym", 4, [-8, -3, 0, 2, 7], 1, 8, [0, 5, 8, 10, 15], [-8, -3, 0, 2, 7]),
    # … but z is clamped to 0…N, so a group of one sign is cut: 10…25, s = 1, z = clamp(−10) = 0
    ("awq-asym", 4, [10, 12, 25], 1, 0, [10, 12, 15], [10, 12, 15]),
    ("awq-asym", 4, [0, 0], 1e-5 / 15, 0, [0, 0], [0, 0]),
    # SmoothQuant: m/7, levels −7…7 (stored from 0)
    ("smoothquant-sym", 4, [-7, -3, 0, 2, 6.6], 1, 7, [0, 4, 7, 9, 14], [-7, -3, 0, 2, 7]),
    ("smoothquant-sym", 4, [-2, 7], 1, 7, [5, 14], [-2, 7]),
    ("smoothquant-sym", 4, [0, 0], 1e-5 / 7, 7, [7, 7], [0, 0]),
    # QuaRot: the same scale and values, codes counted from −8
    ("quarot-sym", 4, [-7, -3, 0, 2, 6.6], 1, 8, [1, 5, 8, 10, 15], [-7, -3, 0, 2, 7]),
    ("quarot-sym", 4, [0, 0], 1e-5 / 7, 8, [8, 8], [0, 0]),
    # ZeroQuant: m/8 = 1; the largest positive value 8 is clipped by a whole step, −8 is not
    ("deepspeed-sym", 4, [-3, 0, 2, 8], 1, 8, [5, 8, 10, 15], [-3, 0, 2, 7]),
    ("deepspeed-sym", 4, [-8, 3], 1, 8, [0, 11], [-8, 3]),
    ("deepspeed-sym", 4, [0, 0], 1 / 8, 8, [8, 8], [0, 0]),
    # DeepSpeed asym: (hi − lo)/16 = 1, offset round(−8/1); 8 is the level that does not exist
    ("deepspeed-asym", 4, [-8, -3, 0, 2, 8], 1, 8, [0, 5, 8, 10, 15], [-8, -3, 0, 2, 7]),
    # the offset is rounded to whole steps: lo = 2.4, s = 1, offset 2; the range need not contain 0
    ("deepspeed-asym", 4, [2.4, 5, 18.4], 1, -2, [0, 3, 15], [2, 5, 17]),
    # SpQR: plain range, real zero point: lo = 2.5, s = 1, z = −2.5; both ends are exact
    ("spqr-asym", 4, [2.5, 5.25, 17.5], 1, -2.5, [0, 3, 15], [2.5, 5.5, 17.5]),
    ("spqr-asym", 4, [-8, -3, 0, 2, 7], 1, 8, [0, 5, 8, 10, 15], [-8, -3, 0, 2, 7]),
    # IntactKV's rule for the cache: the range as it is, and a zero point that need be no code; 1e-5 ≤ s
    ("minmax-asym", 4, [-8, -3, 0, 2, 7], 1, 8, [0, 5, 8, 10, 15], [-8, -3, 0, 2, 7]),
    ("minmax-asym", 4, [10, 12, 25], 1, -10, [0, 2, 15], [10, 12, 25]),
    ("minmax-asym", 4, [0, 0], 1e-5, 0, [0, 0], [0, 0]),
    # with a range that contains 0: GPTQ's with 1e-5 ≤ s
    ("intactkv-asym", 4, [-8, -3, 0, 2, 7], 1, 8, [0, 5, 8, 10, 15], [-8, -3, 0, 2, 7]),
    ("intactkv-asym", 4, [0, 0], 1e-5, 0, [0, 0], [0, 0]),
    # other widths: N = 3 and N = 255
    ("gptq-asym", 2, [-1, 0, 0.6, 2], 1, 1, [0, 1, 2, 3], [-1, 0, 1, 2]),
    ("gptq-sym", 2, [-1.5, 0, 1.5], 1, 2, [0, 2, 3], [-2, 0, 1]),
    ("smoothquant-sym", 8, [-127, 0, 63.4], 1, 127, [0, 127, 190], [-127, 0, 63]),
    ("gptq-asym", 8, [-55, 0, 200], 1, 55, [0, 55, 255], [-55, 0, 200]),
]


@every(("convention", "bits", "values", "scale", "zero_point", "codes", "restored"), TABLE)
def test_each_convention_gives_the_codes_computed_by_hand(
    convention: str, bits: int, values: list, scale: float, zero_point: float, codes: list, restored: list
) -> None:
    quantized = quantize(torch.tensor([values], dtype=torch.float32), UniformGrid(bits, -1, convention))
    assert quantized.scale.item() == pytest.approx(scale, rel=ULP)
    assert quantized.zero_point.item() == zero_point
    assert quantized.codes.tolist() == [codes]
    torch.testing.assert_close(quantized.dequantize(), torch.tensor([restored], dtype=torch.float32), rtol=ULP, atol=0)


def test_every_convention_stands_in_the_table_by_hand() -> None:
    assert {row[0] for row in TABLE} == set(ALL)


@every(
    ("convention", "published"),  # MSE/σ² of Gaussian rows of 4096 at 4 bits
    [("deepspeed-sym", 0.0189), ("gptq-asym", 0.0195), ("gptq-sym", 0.0215), ("smoothquant-sym", 0.0246)],
)
def test_the_mean_squared_error_on_gaussian_rows_is_the_known_one(convention: str, published: float) -> None:
    x = rows(256, 4096)
    error = (fake_quantize(x, UniformGrid(4, -1, convention)) - x).square().mean() / x.square().mean()
    assert float(error) == pytest.approx(published, rel=0.03)  # spread over 256 rows


# rounding -------------------------------------------------------------------------------------------------------------


@every("bits", BITS)
def test_the_base_convention_errs_by_at_most_half_a_step(bits: int) -> None:
    x, grid = rows() + 0.7, UniformGrid(bits, 8)
    error = (fake_quantize(x, grid).double() - x.double()).abs()
    # x̂ and x/s are float32: half a step plus their rounding, one ulp of the value each.
    assert bool((error <= step_of(x, grid).double() / 2 + 2 * ULP * x.double().abs()).all())


@every("convention", ["spqr-asym", "intactkv-asym", "smoothquant-sym", "quarot-sym"])
def test_conventions_that_clip_nothing_err_by_at_most_half_a_step(convention: str) -> None:
    x, grid = rows(), UniformGrid(4, 8, convention)
    error = (fake_quantize(x, grid) - x).abs()
    # For SpQR s·(q − z) cancels: a few ulps of s·z, which is below the range of 15 steps.
    assert bool((error <= step_of(x, grid) * (0.5 + 30 * ULP) + 2 * ULP * x.abs()).all())


@every("bits", BITS)
@every("convention", [c for c in ALL if c not in ("spqr-asym", "awq-asym", "deepspeed-asym")])
def test_zero_stays_zero_exactly(bits: int, convention: str) -> None:
    x = torch.where(rows(seed=1) > 0.5, rows(), torch.zeros(()))
    assert bool((x == 0).any())
    assert bool((fake_quantize(x, UniformGrid(bits, 8, convention))[x == 0] == 0).all())


@every("bits", BITS)
@every("group_size", [8, -1])
def test_quantizing_twice_is_quantizing_once(bits: int, group_size: int) -> None:
    grid = UniformGrid(bits, group_size)
    once = quantize(rows(), grid)
    twice = quantize(once.dequantize(), grid)
    assert torch.equal(twice.codes, once.codes)
    assert torch.equal(twice.zero_point, once.zero_point)
    torch.testing.assert_close(twice.dequantize(), once.dequantize(), rtol=2 * ULP, atol=0)  # s is divided once more


@every("bits", BITS)
@every("value", [0.1, -0.1, 3.0, -1e-3, 1e-20, -7e4])
def test_constant_groups_are_exact_to_one_ulp(bits: int, value: float) -> None:
    x = torch.full((1, 8), value)
    torch.testing.assert_close(fake_quantize(x, UniformGrid(bits)), x, rtol=ULP, atol=0)


@every("convention", [c for c in ALL if c != "spqr-asym"])
def test_all_zero_groups_are_exact(convention: str) -> None:
    x = torch.zeros(2, 8)
    quantized = quantize(x, UniformGrid(4, 4, convention, clip_search=True))
    assert torch.equal(quantized.dequantize(), x)
    assert bool((quantized.scale > 0).all())


@every("convention", ["gptq-asym", "spqr-asym"])
def test_a_group_without_a_range_gets_the_range_from_minus_one_to_one(convention: str) -> None:
    quantized = quantize(torch.zeros(1, 8), UniformGrid(4, -1, convention))
    assert quantized.scale.item() == pytest.approx(2 / 15, rel=ULP)
    # SpQR's zero point is the real number 7.5: its nearest level to 0 is half a step away.
    assert bool((quantized.dequantize().abs() <= (1 + ULP) / 15).all())


@every("scale_dtype", ["float32", "float16"])
@every("convention", ALL)
@every("value", [0.0, 1.0, -3.0, 1e-8, -1e-8, 1e-38, 3e-45, 1e4])
def test_no_convention_gives_nan_for_groups_without_spread(convention: str, value: float, scale_dtype: str) -> None:
    grid = UniformGrid(4, 4, convention, scale_dtype=scale_dtype)
    for x in (torch.full((1, 4), value), torch.tensor([[0.0, 0.0, 0.0, value]])):
        quantized = quantize(x, grid)
        assert bool(torch.isfinite(quantized.dequantize()).all())
        assert bool(torch.isfinite(fake_quantize(x, grid)).all())
        assert bool((quantized.dequantize().abs() <= max(abs(value), 1.0) * 1.1).all())  # a range of ±1 at most
        assert int(quantized.codes.max()) <= grid.top


@every("convention", ALL)
@every("factor", [2.0**-6, 0.5, 4.0, 2.0**10])
def test_scaling_by_a_power_of_two_scales_the_result(convention: str, factor: float) -> None:
    x, grid = 10 * rows(), UniformGrid(4, 8, convention)
    assert torch.equal(quantize(factor * x, grid).codes, quantize(x, grid).codes)
    assert torch.equal(fake_quantize(factor * x, grid), factor * fake_quantize(x, grid))


@every("convention", ["smoothquant-sym", "quarot-sym"])
@every("bits", BITS)
def test_the_sign_commutes_with_even_symmetric_grids(convention: str, bits: int) -> None:
    x, grid = rows(), UniformGrid(bits, 8, convention)
    assert torch.equal(fake_quantize(-x, grid), -fake_quantize(x, grid))


@every("convention", ["deepspeed-sym", "gptq-sym"])
@every("bits", BITS)
def test_the_sign_does_not_commute_with_grids_that_lack_the_highest_level(convention: str, bits: int) -> None:
    x, grid = rows(), UniformGrid(bits, 8, convention)
    assert not torch.equal(fake_quantize(-x, grid), -fake_quantize(x, grid))


@every("bits", range(2, 8))
def test_one_more_bit_divides_the_step_by_the_ratio_of_levels(bits: int) -> None:
    coarse, fine = (quantize(rows(), UniformGrid(b, 8)).scale.double() for b in (bits, bits + 1))
    torch.testing.assert_close(coarse / fine, torch.full_like(coarse, (2 ** (bits + 1) - 1) / (2**bits - 1)), rtol=1e-6,
                               atol=0)  # fmt: skip


@every("convention", ALL)
def test_the_step_of_a_group_is_never_above_that_of_a_group_containing_it(convention: str) -> None:
    x = rows()
    steps = [step_of(x, UniformGrid(4, size, convention)) for size in (4, 8, 16, -1)]
    for inner, outer in pairwise(steps):
        assert bool((inner <= outer).all())
        assert bool((inner < outer).any())


@every("convention", ALL)
def test_more_bits_err_less_over_many_groups(convention: str) -> None:
    x = rows(256)
    errors = [float((fake_quantize(x, UniformGrid(b, 16, convention)) - x).square().mean()) for b in BITS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 1000


@every("convention", ALL)
@every("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_the_codes_of_their_float32_copy(convention: str, dtype: torch.dtype) -> None:
    half, grid = rows().to(dtype), UniformGrid(4, 8, convention)
    assert torch.equal(quantize(half, grid).codes, quantize(half.float(), grid).codes)
    assert fake_quantize(half, grid).dtype == dtype
    assert torch.equal(fake_quantize(half, grid), fake_quantize(half.float(), grid).to(dtype))


def test_ties_are_rounded_to_even() -> None:
    # lo = 0, hi = 15: s = 1, z = 0
    x = torch.tensor([[0, 0.5, 1.5, 2.5, 3.5, 14.5, 15]])
    assert quantize(x, UniformGrid(4)).codes.tolist() == [[0, 0, 2, 2, 4, 14, 15]]


def test_the_zero_point_is_added_after_rounding_and_only_the_published_sums_are_rounded_whole() -> None:
    # s = 1, z = 3 (odd): round(0.5) + 3 = 3, but round(0.5 + 3) = 4
    x = torch.tensor([[-3.0, 0.5, 2.5, 12.0]])
    assert quantize(x, UniformGrid(4, -1, "gptq-asym")).codes.tolist() == [[0, 3, 5, 15]]
    assert quantize(x, UniformGrid(4, -1, "spqr-asym")).codes.tolist() == [[0, 4, 6, 15]]
    assert {name for name, row in CONVENTIONS.items() if row.round_sum} == {"deepspeed-asym", "spqr-asym"}


# groups ---------------------------------------------------------------------------------------------------------------


@every("convention", ALL)
@every("clip_search", [False, True])
def test_every_group_is_quantized_as_if_it_stood_alone(convention: str, clip_search: bool) -> None:
    x, grid = rows(4, 12), UniformGrid(3, 4, convention, clip_search)
    alone = UniformGrid(3, -1, convention, clip_search)
    expected = torch.cat([fake_quantize(x[:, i : i + 4].contiguous(), alone) for i in (0, 4, 8)], dim=1)
    assert torch.equal(fake_quantize(x, grid), expected)


def test_changing_one_row_changes_no_other_row() -> None:
    x, grid = rows(6, 16), UniformGrid(3, 8)
    changed = x.clone()
    changed[2] *= 100
    same = [0, 1, 3, 4, 5]
    assert torch.equal(fake_quantize(changed, grid)[same], fake_quantize(x, grid)[same])
    assert not torch.equal(fake_quantize(changed, grid)[2], fake_quantize(x, grid)[2])


def test_permuting_tokens_permutes_the_quantized_tokens() -> None:
    x, order = rows(2 * 3 * 5, 8).reshape(2, 3, 5, 8), torch.tensor([3, 1, 4, 0, 2])
    grid = UniformGrid(4)
    assert torch.equal(fake_quantize(x[:, :, order], grid), fake_quantize(x, grid)[:, :, order])


def test_a_group_size_that_does_not_divide_the_row_is_refused_with_both_numbers() -> None:
    # 5 divides the 8·10 values of the matrix but not the row of 8: groups must not cross rows.
    with pytest.raises(UserError, match=r"block\.q_proj: group_size=5 does not divide its 8 input channels"):
        quantize(rows(10, 8), UniformGrid(4, 5), "block.q_proj")
    with pytest.raises(UserError, match="group_size=16 does not divide its 8 input channels"):
        fake_quantize(rows(2, 8), UniformGrid(4, 16))


@every(
    ("wrong", "said"),
    [
        ({"bits": 1}, "bits=1 .* 2 to 8"),
        ({"bits": 9}, "bits=9 .* 2 to 8"),
        ({"bits": 2.5}, r"bits=2\.5"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": -2}, "group_size=-2"),
        ({"convention": "gptq"}, "unknown convention 'gptq'; choose from gptq-asym"),
        ({"scale_dtype": "float64"}, "unknown scale_dtype 'float64'; choose from float32"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_when_it_is_made(wrong: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        UniformGrid(**{"bits": 4, **wrong})


@every("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    x = rows(4, 8).half()
    x[3, 5] = value
    with pytest.raises(UserError, match=r"layers\.3\.fc1 holds values that are not finite in float16; convert"):
        quantize(x, UniformGrid(4), "layers.3.fc1")


# clip search ----------------------------------------------------------------------------------------------------------


def clip_errors(x: Tensor, bits: int) -> Tensor:
    """The 2.4-norm error of every candidate range p·(lo, hi), p = 1.00, 0.99 … 0.21, in float64: (80, rows)."""
    x, top = x.double(), 2**bits - 1
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    errors = []
    for i in range(80):
        p = 1 - i / 100
        scale = p * (high - low) / top
        zero = torch.round(-p * low / scale)
        restored = scale * ((torch.round(x / scale) + zero).clamp(0, top) - zero)
        errors.append((restored - x).abs().pow(2.4).sum(-1))
    return torch.stack(errors)


def clip_error(x: Tensor, quantized: QuantizedTensor) -> Tensor:
    return (quantized.dequantize(torch.float64) - x.double()).abs().pow(2.4).sum(-1)


@every("bits", [2, 3, 4])
def test_the_clip_search_finds_what_a_brute_force_search_finds(bits: int) -> None:
    x = rows(64, 64) ** 3  # heavy tails, so that clipping pays
    errors = clip_errors(x, bits)
    found = clip_error(x, quantize(x, UniformGrid(bits, clip_search=True)))
    # float32 against float64 may choose between two near-equal candidates; their errors agree to float32's precision
    torch.testing.assert_close(found, errors.amin(0), rtol=1e-4, atol=0)
    assert bool((errors.argmin(0) > 0).float().mean() > 0.5)  # the search had something to do


@every("convention", ALL)
@every("bits", [2, 3, 8])
def test_the_clip_search_never_raises_the_error_it_minimizes(convention: str, bits: int) -> None:
    x, grid = rows(64, 16) ** 3, UniformGrid(bits, -1, convention)
    without, searched = (clip_error(x, quantize(x, replace(grid, clip_search=on))) for on in (False, True))
    assert bool((searched <= without * (1 + 1e-5)).all())  # the search compares in float32
    if bits < 8:
        assert bool((searched < without * 0.99).any())


# fp16 scales ----------------------------------------------------------------------------------------------------------


@every("convention", ALL)
def test_half_precision_scales_are_stored_as_such_and_used_for_the_codes(convention: str) -> None:
    x, grid = rows() + 0.3, UniformGrid(4, 8, convention, scale_dtype="float16")
    quantized = quantize(x, grid)
    assert quantized.scale.dtype == torch.float16
    assert torch.equal(quantized.dequantize(), fake_quantize(x, grid))
    exact = quantize(x, replace(grid, scale_dtype="float32")).scale
    torch.testing.assert_close(quantized.scale.float(), exact, rtol=2**-11, atol=0)


@every("convention", ["gptq-asym", "spqr-asym", "deepspeed-asym", "smoothquant-sym"])
@every("offset", [0.0, 1.0, -30.0, 1000.0])
def test_half_precision_scales_cost_at_most_their_own_rounding(convention: str, offset: float) -> None:
    x, grid = rows() + offset, UniformGrid(4, 8, convention)
    full, half = (fake_quantize(x, replace(grid, scale_dtype=d)) for d in ("float32", "float16"))
    step = step_of(x, grid)
    # The range of 15 steps shrinks or grows by 2^-11, and a code that sat on a tie may turn: never more than a step.
    bound = (full - x).abs().clamp_min(step / 2) + 17 * step * 2**-11
    assert bool(((half - x).abs() <= bound).all())


def test_a_scale_that_half_precision_cannot_hold_is_refused_or_kept_finite() -> None:
    tiny = quantize(torch.full((1, 4), 1e-9), UniformGrid(4, scale_dtype="float16"))
    assert bool((tiny.scale > 0).all())
    assert bool((tiny.dequantize().abs() <= 1e-9).all())
    with pytest.raises(UserError, match=r"fc1.*float16"):
        quantize(torch.tensor([[-1e6, 1e6]]), UniformGrid(4, scale_dtype="float16"), "fc1")


# packing --------------------------------------------------------------------------------------------------------------


def naive_pack(row: list[int], bits: int) -> list[int]:
    """The codes as one string of binary digits, least significant first, cut into bytes."""
    digits = "".join(format(code, f"0{bits}b")[::-1] for code in row)
    digits += "0" * (-len(row) % 8 * bits)
    return [int(digits[i : i + 8][::-1], 2) for i in range(0, len(digits), 8)]


@every("bits", BITS)
@every("count", [1, 7, 8, 9, 31, 64])
def test_packed_bytes_are_those_of_a_bit_string_and_unpack_to_the_codes(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (5, count), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    codes[0], codes[1] = 0, 2**bits - 1  # all bits clear, all bits set
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [naive_pack(row, bits) for row in codes.tolist()]
    assert packed.shape == (5, math.ceil(count / 8) * bits)
    assert torch.equal(unpack_codes(packed, bits, count), codes)


def test_codes_of_any_shape_are_packed_row_by_row() -> None:
    codes = torch.randint(0, 8, (2, 3, 10), dtype=torch.uint8)
    assert torch.equal(pack_codes(codes, 3)[1, 2], pack_codes(codes[1, 2], 3))
    assert torch.equal(unpack_codes(pack_codes(codes, 3), 3, 10), codes)


def test_a_fitted_grid_has_one_scale_and_zero_point_a_group() -> None:
    fitted = fit(split_groups(rows(6, 24), 8), UniformGrid(4, 8))
    assert fitted.scale.shape == fitted.zero_point.shape == (6, 3, 1)
