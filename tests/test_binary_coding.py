"""Binary coding: the fit against slow plain formulas, the packed layout, the LUT product, and both as a checkpoint."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import every
from torch import Tensor

import quantization.kernels.lut
import quantization.weights.bcq
from corpora.errors import UserError
from quantization.grids.binary_coding import BinaryCoded, BinaryGrid, from_uniform, pack_planes, signs, unpack_planes
from quantization.grids.uniform import CONVENTIONS, UniformGrid, fake_quantize, quantize
from quantization.kernels.lut import lut_matmul, tables
from quantization.named import named_recipe
from quantization.recipes.recipe import Recipe, with_settings
from quantization.runs.checkpoint import load_quantized
from quantization.runs.pipeline import quantize_checkpoint
from quantization.weights.bcq import (
    BCQ,
    Coding,
    GPTQToBCQ,
    Runs,
    assignment_step,
    bcq,
    codes_of,
    greedy,
    scale_step,
    sort_groups,
)
from quantization.weights.gptq import GPTQ, gptq

BITS = range(1, 9)
ULP = 2.0**-23
SEGMENTS = torch.randint(4, 101, (3, 12), generator=torch.Generator().manual_seed(5))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def importance_of(channels: int, seed: int = 9) -> Tensor:
    """Positive, over three orders of magnitude."""
    return (2 * randn(channels, seed=seed)).exp()


def patterns(bits: int) -> Tensor:
    """Every row of ±1, counting up with the first column as the slowest digit: (2^q, q)."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits)), dtype=torch.float64)


def squared_error(weight: Tensor, coded: BinaryCoded, d: Tensor | None = None) -> float:
    error = (coded.dequantize().double() - weight.double()).square()
    return float((error if d is None else error * d.double()).sum())


def plain_fit(
    w: Tensor, bits: int, rounds: int, offset: bool = False, d: Tensor | None = None, coding: Coding | None = None
) -> Tensor:
    """The values of one fitted group (g,), by the published algorithm one step after the other in float64.

    coding: levels to start from; their nearest codes are the first signs. None starts greedily.
    """
    w, d, b = w.double(), torch.ones(len(w)).double() if d is None else d.double(), patterns(bits)
    shift = (d * w).sum() / d.sum() if offset else torch.zeros(()).double()
    residual, planes, alphas = w - shift, [], []
    for _ in range(bits):
        planes.append(torch.where(residual >= 0, 1.0, -1.0).double())
        alphas.append((d * residual.abs()).sum() / d.sum())
        residual = residual - alphas[-1] * planes[-1]
    signs_of_w, alpha = torch.stack(planes, dim=1), torch.stack(alphas)
    if coding is not None:
        alpha, shift = coding.alpha[0].double(), coding.offset[0, 0].double()
        signs_of_w = b[(w[:, None] - b @ alpha - shift).abs().argmin(1)]
    for _ in range(rounds):
        columns = torch.cat([signs_of_w, torch.ones(len(w), 1)], dim=1) if offset else signs_of_w
        root = d.sqrt()[:, None]
        solved = torch.linalg.lstsq(root * columns, root * w[:, None], driver="gelsd").solution[:, 0]
        alpha, shift = solved[:bits].abs(), solved[bits] if offset else shift
        signs_of_w = b[(w[:, None] - b @ alpha - shift).abs().argmin(1)]
    return signs_of_w @ alpha + shift


# the fit --------------------------------------------------------------------------------------------------------------


@every("rounds", [0, 30])
def test_one_plane_is_the_mean_size_and_the_signs(rounds: int) -> None:
    w = randn(6, 64)
    w[0, 3] = 0.0  # counts as positive
    coded = bcq(w, BinaryGrid(1, 16), rounds=rounds)
    alpha = w.unflatten(1, (4, 16)).abs().mean(2)
    torch.testing.assert_close(coded.alpha[:, 0].T, alpha)
    expected = torch.where(w >= 0, 1.0, -1.0) * alpha.repeat_interleave(16, dim=1)
    torch.testing.assert_close(coded.dequantize(), expected)


@every(("bits", "size"), [(1, 16), (2, 16), (3, 32), (4, 64), (6, 32)])
@every("rounds", [0, 1, 7])
@every("offset", [False, True])
@every("weighted", [False, True])
def test_the_fit_is_the_published_algorithm_step_by_step(
    bits: int, size: int, rounds: int, offset: bool, weighted: bool
) -> None:
    w = randn(6, size) + 0.5
    d = importance_of(size) if weighted else None
    coded = bcq(w, BinaryGrid(bits, size, offset), rounds=rounds, importance=d)
    expected = torch.stack([plain_fit(row, bits, rounds, offset, d) for row in w])
    # More planes than 2^q ≤ g can tell apart leave α undetermined, and the two solve that differently.
    determined = bits < 6 or rounds <= 1
    if determined:
        torch.testing.assert_close(coded.dequantize().double(), expected, rtol=0, atol=1e-5)
    factor = d.double() if d is not None else torch.ones(size)
    theirs = float((factor * (expected - w).square()).sum())
    assert squared_error(w, coded, d) == pytest.approx(theirs, rel=1e-4 if determined else 0.5)


@every("bits", [2, 3, 4])
def test_the_start_from_the_uniform_grid_is_the_same_algorithm_from_other_levels(bits: int) -> None:
    w = randn(6, 32) + 0.5
    coded = bcq(w, BinaryGrid(bits, 32, offset=True), rounds=5, start="uniform")
    for i, row in enumerate(w):
        grid = quantize(row[None], UniformGrid(bits))
        alpha = grid.scale * 2.0 ** torch.arange(bits - 2, -2, -1)
        start = Coding(alpha, grid.scale * ((2**bits - 1) / 2 - grid.zero_point))
        expected = plain_fit(row, bits, 5, offset=True, coding=start)
        torch.testing.assert_close(coded.dequantize()[i].double(), expected, rtol=0, atol=1e-5)


@every("bits", [2, 3, 4, 8])
def test_the_start_from_the_uniform_grid_is_rtn_and_no_round_makes_it_worse(bits: int) -> None:
    w, grid = randn(16, 128), BinaryGrid(bits, 32, offset=True)
    rtn = fake_quantize(w, UniformGrid(bits, 32))
    coded = bcq(w, grid, rounds=0, start="uniform")
    torch.testing.assert_close(coded.dequantize(), rtn, rtol=0, atol=2**bits * 4 * ULP)
    error = float((rtn - w).square().sum())
    assert squared_error(w, bcq(w, grid, rounds=6, start="uniform")) < error


@every("bits", [2, 3, 4, 8])
@every("offset", [False, True])
@every("weighted", [False, True])
def test_no_step_raises_the_error_of_any_group(bits: int, offset: bool, weighted: bool) -> None:
    w = randn(200, 48) ** 3
    d = importance_of(48) if weighted else torch.ones(48)
    groups = sort_groups(w, d)

    def error(coding: Coding, runs: Runs) -> Tensor:
        values = coding.levels().gather(1, codes_of(groups, runs).long())
        return (d * (values - w).square()).sum(1)

    coding, runs = greedy(groups, bits, offset)
    last = error(coding, runs)
    slack = 1e-6 * (d * w.square()).sum(1)  # the ridge of 1e-9, and midpoints in float32
    for _ in range(12):
        coding = scale_step(groups, runs, offset)
        runs = assignment_step(groups, coding)
        now = error(coding, runs)
        assert bool((now <= last + slack).all())
        last = now


def test_another_plane_lowers_the_error() -> None:
    w = randn(64, 128)
    for rounds in (0, 30):
        errors = [squared_error(w, bcq(w, BinaryGrid(bits, 64), rounds=rounds)) for bits in BITS]
        assert all(b < 0.9 * a for a, b in itertools.pairwise(errors))


@every(
    ("size", "bits", "by_rounds"),  # MSE/σ² after 0, 1, 15, 30 rounds
    [
        (128, 3, (0.0577, 0.0488, 0.0349, 0.0348)),
        (128, 4, (0.0317, 0.0230, 0.0103, 0.0100)),
        (4096, 3, (0.0587, 0.0508, 0.0373, 0.0372)),
        (4096, 4, (0.0332, 0.0256, 0.0119, 0.0113)),
    ],
)
def test_the_error_on_gaussian_weights_is_the_known_one(size: int, bits: int, by_rounds: tuple[float, ...]) -> None:
    w = randn(2**17 // size, size)
    for rounds, known in zip((0, 1, 15, 30), by_rounds, strict=True):
        error = squared_error(w, bcq(w, BinaryGrid(bits), rounds=rounds)) / w.numel()
        assert error == pytest.approx(known, rel=0.08)  # another sample of groups


@every("offset", [False, True])
@every("weighted", [False, True])
def test_the_scale_step_is_least_squares(offset: bool, weighted: bool) -> None:
    w, d = randn(20, 40), importance_of(40) if weighted else torch.ones(40)
    groups = sort_groups(w, d)
    _, runs = greedy(groups, 3, offset)
    planes = patterns(3)[codes_of(groups, runs).long()]  # (n, g, q)
    solved = scale_step(groups, runs, offset)
    for i in range(len(w)):
        columns = torch.cat([planes[i], torch.ones(40, 1)], dim=1) if offset else planes[i]
        normal = columns.T @ (d.double()[:, None] * columns)
        truth = torch.linalg.solve(normal, columns.T @ (d.double() * w[i].double()))
        torch.testing.assert_close(solved.alpha[i], truth[:3].abs().sort(descending=True).values, rtol=1e-6, atol=0)
        torch.testing.assert_close(solved.offset[i], truth[3:] if offset else torch.zeros(1).double())


@every("offset", [False, True])
def test_a_plane_with_all_signs_turned_gets_the_same_scale(offset: bool) -> None:
    groups = sort_groups(randn(20, 40))
    _, runs = greedy(groups, 3, offset)
    solved = scale_step(groups, runs, offset)
    for turned in (0b100, 0b010, 0b111):
        other = scale_step(groups, Runs(runs.codes ^ turned, runs.edges), offset)
        torch.testing.assert_close(other.alpha, solved.alpha)
        torch.testing.assert_close(other.offset, solved.offset)


@every("bits", BITS)
@every("offset", [False, True])
def test_the_assignment_takes_the_nearest_of_all_sums(bits: int, offset: bool) -> None:
    w = randn(10, 64)
    alpha = randn(10, bits, seed=1).abs().double().sort(descending=True).values
    coding = Coding(alpha, randn(10, 1, seed=2).double() if offset else torch.zeros(10, 1).double())
    groups = sort_groups(w)
    codes = codes_of(groups, assignment_step(groups, coding)).long()
    sums = alpha @ patterns(bits).T + coding.offset
    distance = (w.double()[:, :, None] - sums[:, None, :]).abs()
    found = distance.gather(2, codes[:, :, None])[..., 0]
    assert bool((found <= distance.amin(2) + 2 * ULP).all())  # midpoints are float32


@every("bits", [1, 2, 3, 4])
@every("offset", [False, True])
def test_weights_made_of_a_coding_are_recovered_from_it(bits: int, offset: bool) -> None:
    alpha = torch.tensor([[1.0, 0.45, 0.3, 0.11]], dtype=torch.float64)[:, :bits]  # all sums distinct
    truth = Coding(alpha, torch.full((1, 1), 0.7 if offset else 0.0, dtype=torch.float64))
    codes = torch.randperm(64, generator=torch.Generator().manual_seed(3)) % 2**bits
    w = (patterns(bits) @ alpha[0] + truth.offset[0])[codes][None].float()
    groups = sort_groups(w)
    coding = scale_step(groups, assignment_step(groups, truth), offset)
    torch.testing.assert_close(coding.alpha, truth.alpha, rtol=1e-6, atol=0)
    torch.testing.assert_close(coding.offset, truth.offset, rtol=1e-6, atol=1e-7)
    assert codes_of(groups, assignment_step(groups, coding)).tolist() == [codes.tolist()]


@every("factor", [0.25, -4.0, -1.0])
@every("offset", [False, True])
def test_scaled_weights_have_scaled_levels_and_a_negative_factor_flips_the_planes(factor: float, offset: bool) -> None:
    w, grid = randn(8, 64), BinaryGrid(3, 32, offset)
    plain, scaled = bcq(w, grid), bcq(factor * w, grid)
    torch.testing.assert_close(scaled.alpha, abs(factor) * plain.alpha, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.dequantize(), factor * plain.dequantize(), rtol=1e-5, atol=1e-6)
    codes, other = (unpack_planes(coded.planes, 64, 32) for coded in (plain, scaled))
    assert torch.equal(other, codes if factor > 0 else 7 - codes)


@every("bits", BITS)
@every("offset", [False, True])
def test_groups_with_few_distinct_values_are_exact_or_finite(bits: int, offset: bool) -> None:
    """Planes coincide there, so that the system of the scale step is singular."""
    rows = [torch.zeros(32), torch.full((32,), 0.3), torch.full((32,), -1e-20), torch.tensor([1.0, -1.0]).repeat(16)]
    w = torch.stack(rows)
    coded = bcq(w, BinaryGrid(bits, offset=offset))
    torch.testing.assert_close(coded.dequantize(), w, rtol=1e-5, atol=1e-7)


def test_all_weights_equally_important_is_the_plain_fit_and_the_unit_does_not_matter() -> None:
    w, grid, d = randn(8, 64), BinaryGrid(3, 32), importance_of(64)
    assert torch.equal(bcq(w, grid, importance=torch.full((64,), 4.0)).planes, bcq(w, grid).planes)
    assert torch.equal(bcq(w, grid, importance=d * 1024).dequantize(), bcq(w, grid, importance=d).dequantize())


def test_the_weighted_fit_lowers_the_weighted_error_and_raises_the_plain_one() -> None:
    w, grid, d = randn(32, 64), BinaryGrid(3, 32), importance_of(64)
    plain, weighted = bcq(w, grid), bcq(w, grid, importance=d)
    assert squared_error(w, weighted, d) < 0.5 * squared_error(w, plain, d)
    assert squared_error(w, weighted) > squared_error(w, plain)


def test_inputs_that_never_occur_do_not_spoil_the_fit() -> None:
    w, grid, d = randn(8, 64), BinaryGrid(3, 32), torch.ones(64)
    d[:32] = 0  # a whole group: fitted as if all were equal
    d[40] = 0
    coded = bcq(w, grid, importance=d)
    assert torch.equal(coded.dequantize()[:, :32], bcq(w, grid).dequantize()[:, :32])
    moved = w.clone()
    moved[:, 40] += 5
    assert torch.equal(bcq(moved, grid, importance=d).alpha, coded.alpha)


@pytest.mark.parametrize("weighted", [False, True])
def test_pieces_of_any_size_give_the_same_bits(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    w, grid = randn(33, 96), BinaryGrid(3, 32, offset=True)
    d = importance_of(96) if weighted else None
    whole = bcq(w, grid, importance=d)
    for size in (1, 700):
        monkeypatch.setattr(quantization.weights.bcq, "CHUNK", size)
        pieces = bcq(w, grid, importance=d)
        assert all(torch.equal(pieces.tensors()[name], tensor) for name, tensor in whole.tensors().items())


def test_scales_in_half_precision_are_rounded_before_the_codes_are_chosen() -> None:
    w, grid = randn(256, 64), BinaryGrid(4, 32, offset=True, scale_dtype="float16")
    coded = bcq(w, grid)
    assert coded.alpha.dtype == torch.float16
    assert coded.offset is not None
    assert coded.offset.dtype == torch.float16
    alpha = coded.alpha.double().permute(2, 0, 1).flatten(0, 1)  # (out · groups, q)
    levels = alpha @ patterns(4).T + coded.offset.double().T.reshape(-1, 1)
    groups = w.double().view(-1, 32)
    nearest = (groups[:, :, None] - levels[:, None, :]).abs().amin(2)
    found = (coded.dequantize().double().view(-1, 32) - groups).abs()
    assert bool((found <= nearest + 4 * ULP).all())


def test_what_cannot_be_fitted_is_refused() -> None:
    w = randn(4, 48)
    with pytest.raises(UserError, match=r"o_proj: group_size=32 does not divide its 48 input channels"):
        bcq(w, BinaryGrid(4, 32), name="o_proj")
    w[1, 2] = torch.nan
    with pytest.raises(UserError, match="o_proj holds values that are not finite"):
        bcq(w, BinaryGrid(4), name="o_proj")
    with pytest.raises(UserError, match=r"o_proj holds values up to .* too large for float16"):
        bcq(randn(4, 48) * 1e6, BinaryGrid(4, scale_dtype="float16"), name="o_proj")


@every("bits", [0, 9, -1])
def test_bits_outside_one_to_eight_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match=f"bits={bits} is not supported; use 1 to 8"):
        BinaryGrid(bits)


@every(
    ("settings", "said"),
    [
        (["weights.rounds=-1"], r"weights\.rounds=-1 is not allowed"),
        (["weights.start=random"], r"weights\.start=random is not known; choose greedy or uniform"),
        (["weights.start=uniform"], r"needs 2 bits or more and an offset.*weights\.grid\.offset=true"),
        (["weights.grid.group_size=0"], "group_size=0 is not allowed"),
        (["weights.grid.scale_dtype=int8"], "unknown scale_dtype 'int8'; choose from float32, float16"),
    ],
)
def test_a_wrong_setting_is_refused_in_words(settings: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        with_settings(named_recipe("bcq"), settings)


def test_bits_and_group_size_can_be_set_like_those_of_every_recipe() -> None:
    settings = ["weights.grid.bits=1", "weights.grid.group_size=64", "weights.grid.offset=true", "weights.rounds=3"]
    recipe = with_settings(named_recipe("bcq"), settings)
    assert recipe.weights == BCQ(BinaryGrid(1, 64, offset=True), rounds=3)
    assert recipe.label() == "bcq-w1g64"
    assert not recipe.calibrates
    assert with_settings(recipe, ["weights.weighted=true"]).calibrates


# uniform levels in binary coding --------------------------------------------------------------------------------------


def exact(weight: Any) -> Tensor:
    """s·(c − z) in float64."""
    size = weight.codes.shape[1] // weight.scale.shape[1]
    scale, zero_point = (t.double().repeat_interleave(size, dim=1) for t in (weight.scale, weight.zero_point))
    return scale * (weight.codes.double() - zero_point)


@every("bits", range(2, 9))
@every("convention", CONVENTIONS)
@every("group_size", [16, -1])
def test_rtn_on_any_grid_is_the_same_matrix_in_binary_coding(bits: int, convention: str, group_size: int) -> None:
    w = randn(24, 48) + 0.3
    uniform = quantize(w, UniformGrid(bits, group_size, convention))
    coded = from_uniform(uniform)
    assert coded.grid == BinaryGrid(bits, group_size, offset=True)
    # A sum of q + 1 float32 numbers of at most 2^q steps (and of z steps, where the zero point lies outside).
    steps = 2**bits + uniform.zero_point.abs().max()
    bound = float(steps * uniform.scale.max()) * 4 * ULP
    torch.testing.assert_close(coded.dequantize().double(), exact(uniform), rtol=0, atol=bound)
    if bits == 4 and CONVENTIONS[convention].zero_point != "real":
        gap = (coded.dequantize().double() - exact(uniform)).abs() / uniform.scale.max()
        assert float(gap.max()) < 2e-6


@every("bits", [2, 3, 4, 8])
@every("act_order", [False, True])
def test_what_gptq_chose_is_the_same_matrix_in_binary_coding(bits: int, act_order: bool) -> None:
    w, x = randn(24, 64), randn(200, 64, seed=1)
    uniform, _, _ = gptq(w, x.T @ x, UniformGrid(bits, 32), act_order=act_order)
    assert not torch.equal(uniform.codes, quantize(w, UniformGrid(bits, 32)).codes)
    gap = (from_uniform(uniform).dequantize().double() - exact(uniform)).abs()
    assert float(gap.max()) <= 2**bits * float(uniform.scale.max()) * 4 * ULP


def test_groups_in_activation_order_are_refused() -> None:
    w, x = randn(24, 64), randn(200, 64, seed=1)
    uniform, _, _ = gptq(w, x.T @ x, UniformGrid(4, 32), static_groups=False)
    with pytest.raises(UserError, match=r"o_proj: its groups were formed in activation order.*static_groups=true"):
        from_uniform(uniform, "o_proj")
    with pytest.raises(UserError, match=r"weights\.static_groups=false forms groups in activation order"):
        GPTQToBCQ(UniformGrid(4, 32), static_groups=False)
    GPTQToBCQ(UniformGrid(4), static_groups=False)  # one group a row is the same in any order


# packing --------------------------------------------------------------------------------------------------------------


@every("bits", BITS)
@every(("channels", "group_size"), [(64, 32), (96, -1), (40, -1), (48, 16), (60, 20), (7, -1)])
def test_unpacking_returns_what_was_packed(bits: int, channels: int, group_size: int) -> None:
    codes = torch.randint(0, 2**bits, (5, channels), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    planes = pack_planes(codes, bits, group_size)
    size = channels if group_size == -1 else group_size
    assert planes.dtype == torch.int32
    assert planes.shape == (channels // size * -(-size // 32), bits, 5)
    assert torch.equal(unpack_planes(planes, channels, group_size), codes)


def test_bit_t_of_word_w_is_the_sign_of_input_32_w_plus_t() -> None:
    for channel in range(96):
        codes = torch.zeros(3, 96, dtype=torch.uint8)
        codes[1, channel] = 0b01  # the second plane of the second output
        words = pack_planes(codes, 2)
        assert words.count_nonzero() == 1
        assert int(words[channel // 32, 1, 1]) & 0xFFFFFFFF == 1 << channel % 32


def test_the_first_plane_is_the_highest_bit_of_a_code_and_has_the_largest_scale() -> None:
    assert torch.equal(signs(3).double(), patterns(3))
    coded = bcq(randn(6, 64), BinaryGrid(3, 32))
    assert bool((coded.alpha.diff(dim=1) <= 0).all())
    assert bool((coded.alpha >= 0).all())
    flipped = replace(coded, planes=coded.planes.clone())
    flipped.planes[0, 0, 2] ^= 1 << 5
    change = (flipped.dequantize() - coded.dequantize()).abs()
    assert change.nonzero().tolist() == [[2, 5]]
    assert float(change[2, 5]) == pytest.approx(2 * float(coded.alpha[0, 0, 2]), rel=1e-5)


@every("scale_dtype", ["float32", "float16"])
@every("offset", [False, True])
def test_the_packed_matrix_takes_the_bytes_of_the_formula(scale_dtype: str, offset: bool) -> None:
    bits, size, channels, out = 3, 64, 256, 24
    coded = bcq(randn(out, channels), BinaryGrid(bits, size, offset, scale_dtype), rounds=1)
    width = 16 if scale_dtype == "float16" else 32
    per_weight = bits + width * bits / size + (width / size if offset else 0)
    assert sum(t.nbytes for t in coded.tensors().values()) == per_weight * out * channels / 8


# the product ----------------------------------------------------------------------------------------------------------


def test_a_table_holds_every_signed_sum_of_eight_inputs() -> None:
    x = randn(2, 3, 16)
    found = tables(x)
    assert found.shape == (2, 3, 2, 256)
    for code in range(256):
        sign = torch.tensor([1.0 if code >> s & 1 else -1.0 for s in range(8)]).double()
        expected = x.double().view(2, 3, 2, 8) @ sign
        torch.testing.assert_close(found[..., code].double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.flip(-1), -found, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[..., 255].sum(-1), x.sum(-1), rtol=0, atol=1e-5)


@every("bits", [1, 3, 4, 8])
@every(("channels", "group_size"), [(64, -1), (128, 32), (100, -1), (20, -1), (120, 40), (48, 16), (60, 12)])
@every("offset", [False, True])
def test_the_lut_product_is_the_dequantized_product(bits: int, channels: int, group_size: int, offset: bool) -> None:
    coded = bcq(randn(33, channels) + 0.2, BinaryGrid(bits, group_size, offset), rounds=2)
    weight = coded.dequantize().double()
    for batch in ((), (1,), (5,), (2, 3), (0,)):
        x = randn(*batch, channels, seed=4)
        expected = x.double() @ weight.T
        found = lut_matmul(x, coded)
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


def test_the_lut_product_of_converted_weights_is_the_product_with_what_gptq_chose() -> None:
    w, x = randn(40, 128), randn(300, 128, seed=1)
    uniform, _, _ = gptq(w, x.T @ x, UniformGrid(4, 32))
    expected = x.double() @ exact(uniform).T
    assert float((lut_matmul(x, from_uniform(uniform)) - expected).norm() / expected.norm()) < 1e-5


def test_the_product_in_small_pieces_is_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    coded, x = bcq(randn(33, 96), BinaryGrid(3, 32, offset=True), rounds=1), randn(7, 96, seed=4)
    whole = lut_matmul(x, coded)
    for entries in (1, 5000):
        monkeypatch.setattr(quantization.kernels.lut, "ENTRIES", entries)
        torch.testing.assert_close(lut_matmul(x, coded), whole, rtol=1e-5, atol=1e-5)


def test_the_product_keeps_the_dtype_of_its_input_and_refuses_another_width() -> None:
    coded, x = bcq(randn(33, 64), BinaryGrid(3, 32)), randn(2, 64, seed=4).bfloat16()
    assert torch.equal(lut_matmul(x, coded), lut_matmul(x.float(), coded).bfloat16())
    with pytest.raises(UserError, match="the input has 32 channels, the binary-coded matrix takes 64"):
        lut_matmul(x[:, :32], coded)


# as a checkpoint ------------------------------------------------------------------------------------------------------

FITTED = BCQ(BinaryGrid(3, 16))
WEIGHTED = BCQ(BinaryGrid(3, 32), rounds=5, weighted=True)


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("dense"), "llama", num_hidden_layers=2)


@torch.no_grad()
def test_a_checkpoint_holds_what_the_fit_gives(source: Path, tmp_path: Path) -> None:
    dense = load_dense(source)
    out = load_quantized(quantize_checkpoint(source, Recipe(weights=FITTED), tmp_path / "out"))
    for name, weight in dense.items():
        if "_proj" in name:
            assert torch.equal(out.get_parameter(name), bcq(weight, BinaryGrid(3, 16)).dequantize())


@torch.no_grad()
def test_the_weighted_fit_counts_the_mean_square_of_what_the_linear_reads(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source).eval()
    seen: list[Tensor] = []
    linear = model.get_submodule("model.layers.0.mlp.down_proj")
    linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0].double()))
    for segment in SEGMENTS:
        model(segment[None])
    energy = torch.cat(seen, dim=1).square().mean((0, 1)).float()
    expected = bcq(linear.weight, BinaryGrid(3, 32), rounds=5, importance=energy).dequantize()
    recipe = Recipe(weights=WEIGHTED)
    out = load_quantized(quantize_checkpoint(source, recipe, tmp_path / "out", segments=SEGMENTS))
    found = out.get_parameter("model.layers.0.mlp.down_proj.weight")
    # Sums of squares in another order: a weight between two levels may move, and its group's levels with it.
    assert float(((found - expected).abs() > 1e-5).float().mean()) < 0.01


@torch.no_grad()
def test_gptq_in_binary_coding_computes_what_gptq_computes(source: Path, tmp_path: Path) -> None:
    uniform, binary = (
        load_quantized(quantize_checkpoint(source, Recipe(weights=w), tmp_path / w.name, segments=SEGMENTS))
        for w in (GPTQ(UniformGrid(4, 32)), GPTQToBCQ(UniformGrid(4, 32)))
    )
    expected, found = uniform(SEGMENTS).logits, binary(SEGMENTS).logits
    # The second block's Hessians see float32 rounding, which can move a weight that lies between two levels.
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def load_dense(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def test_a_group_that_does_not_fill_a_row_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"down_proj: group_size=64 does not divide its 96 input channels"):
        quantize_checkpoint(source, Recipe(weights=BCQ(BinaryGrid(4, 64))), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


# on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("group_size", [64, -1])
def test_a_gpu_fits_and_multiplies_as_the_cpu_does(group_size: int) -> None:
    w, x, d = randn(256, 512), randn(9, 512, seed=1), importance_of(512)
    grid = BinaryGrid(4, group_size, offset=True)
    here, there = bcq(w, grid, importance=d), bcq(w.cuda(), grid, importance=d.cuda())
    # Another order of summation may move a weight that lies between two levels, and the rounds build on it.
    assert squared_error(w, replace(there, **on_cpu(there)), d) == pytest.approx(squared_error(w, here, d), rel=1e-3)
    moved = replace(here, **{name: tensor.cuda() for name, tensor in here.tensors().items()})
    assert torch.equal(moved.dequantize().cpu(), here.dequantize())
    torch.testing.assert_close(lut_matmul(x.cuda(), moved).cpu(), lut_matmul(x, here), rtol=1e-5, atol=1e-4)


def on_cpu(coded: BinaryCoded) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in coded.tensors().items()}
