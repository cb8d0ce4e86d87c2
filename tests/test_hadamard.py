"""Hadamard and Hartley rotations: constructions, plans, the fast product beside the dense one, random rotations."""

import json
import math
from collections.abc import Callable
from itertools import combinations_with_replacement

import pytest
import torch
from common import every
from torch import Tensor
from torch.testing import assert_close

from corpora.errors import UserError
from quantization.hadamard import (
    CPU_VALUES,
    WILLIAMSON,
    Plan,
    apply,
    apply_heads,
    exists,
    hartley,
    matrix,
    paley_first,
    paley_second,
    plan,
    random_rotation,
    random_signs,
    sylvester,
    williamson,
)

PRIMES = [q for q in range(2, 200) if all(q % d for d in range(2, q))]

# Hidden size, MLP width or number of heads of a published model: factors that are no power of two, and the power.
MODEL_SIZES = {
    576: ((12, 12), 4),
    1536: ((12,), 128),
    960: ((12, 20), 4),
    2560: ((20,), 128),
    2048: ((), 2048),
    8192: ((), 8192),
    3072: ((12,), 256),
    24: ((12,), 2),
    5632: ((44,), 128),
    768: ((12,), 64),
    12: ((12,), 1),
    4096: ((), 4096),
    11008: ((172,), 64),
    32: ((), 32),
    5120: ((20,), 256),
    13824: ((12, 12, 12), 8),
    40: ((20,), 2),
    6656: ((52,), 128),
    17920: ((20, 28), 32),
    52: ((52,), 1),
    22016: ((172,), 128),
    64: ((), 64),
    28672: ((28,), 1024),
    14336: ((28,), 512),
    896: ((28,), 32),
    4864: ((76,), 64),
    8960: ((20, 28), 16),
    3584: ((28,), 128),
    18944: ((148,), 128),
    28: ((28,), 1),
    27648: ((12, 12, 12), 16),
    29568: ((12, 28, 44), 2),
    1024: ((), 1024),
    16: ((), 16),
    6144: ((12,), 512),
    12288: ((12,), 1024),
    9728: ((76,), 128),
    17408: ((68,), 256),
    25600: ((20, 20), 64),
}
NO_HADAMARD = (9, 14, 15)  # heads of SmolLM2-135M, Qwen2.5-0.5B, SmolLM2-360M
# Every way to build M at a size whose dense form is quick: several factors, Williamson, S alone, Hartley, trivial.
SMALL = [
    *(plan(n) for n in (1, 2, 12, 24, 52, 92, 100, 172, 576, 960, 1024, 1536)),
    *(plan(n, "hartley") for n in (9, 14, 15, 100, 576)),
]


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_orthogonal(m: Tensor) -> None:
    """Entries ±1 and M Mᵀ = n I, exactly: sums of whole numbers."""
    assert torch.equal(m.abs(), torch.ones_like(m))
    assert torch.equal(m @ m.T, len(m) * torch.eye(len(m), dtype=torch.float64))


# constructions --------------------------------------------------------------------------------------------------------


@every("n", [1, 2, 4, 8, 64])
def test_sylvesters_sign_is_the_parity_of_the_bits_that_row_and_column_share(n: int) -> None:
    parity = [[(i & j).bit_count() % 2 for j in range(n)] for i in range(n)]
    assert torch.equal(sylvester(n), 1 - 2 * torch.tensor(parity, dtype=torch.float64))
    assert_orthogonal(sylvester(n))


@every("q", [q for q in PRIMES if q % 4 == 3])
def test_the_first_construction_of_paley_is_a_hadamard_matrix(q: int) -> None:
    assert len(paley_first(q)) == q + 1
    assert_orthogonal(paley_first(q))


@every("q", [q for q in PRIMES if q % 4 == 1])
def test_the_second_construction_of_paley_is_a_hadamard_matrix(q: int) -> None:
    assert len(paley_second(q)) == 2 * (q + 1)
    assert_orthogonal(paley_second(q))


@every("n", WILLIAMSON)
def test_williamsons_construction_is_a_hadamard_matrix(n: int) -> None:
    assert len(williamson(n)) == n
    assert_orthogonal(williamson(n))


@every("n", [1, 2, 7, 9, 15, 100, 171])
def test_hartley_is_the_real_less_the_imaginary_part_of_the_fourier_transform(n: int) -> None:
    fourier = torch.fft.fft(torch.eye(n, dtype=torch.float64))
    assert_close(hartley(n), fourier.real - fourier.imag, atol=1e-12, rtol=0)


# plans ----------------------------------------------------------------------------------------------------------------


@every(("n", "expected"), MODEL_SIZES.items())
def test_every_size_of_a_published_model_has_a_hadamard_plan(n: int, expected: tuple[tuple[int, ...], int]) -> None:
    found = plan(n)
    assert (found.kind, found.factors, found.sylvester) == ("hadamard", *expected)
    assert found.order == n
    assert exists(n)


@every("order", sorted({factor for factors, _ in MODEL_SIZES.values() for factor in factors}))
def test_the_factors_that_plans_name_are_hadamard_matrices(order: int) -> None:
    assert_orthogonal(torch.round(matrix(Plan("hadamard", (order,), 1)) * math.sqrt(order)))


@every("n", [n for n in range(4, 2000, 4) if exists(n)][::7])
def test_no_other_factors_have_a_smaller_sum(n: int) -> None:
    orders = {q + 1 for q in range(3, n) if q % 4 == 3 and prime(q)}
    orders |= {2 * (q + 1) for q in range(5, n // 2) if q % 4 == 1 and prime(q)} | {52, 92, 100, 172}
    usable = sorted(m for m in orders if n % m == 0 and not power_of_two(m))
    sums = [
        sum(chosen)
        for count in range(5)  # five factors make at least 12⁵, which is more than 2000
        for chosen in combinations_with_replacement(usable, count)
        if n % math.prod(chosen) == 0 and power_of_two(n // math.prod(chosen))
    ]
    assert sum(plan(n, "hadamard").factors) == min(sums)


def prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


def power_of_two(n: int) -> bool:
    return 2 ** (n.bit_length() - 1) == n


@every("n", NO_HADAMARD)
def test_without_a_hadamard_matrix_the_odd_part_is_hartleys(n: int) -> None:
    assert not exists(n)
    odd = {9: 9, 14: 7, 15: 15}[n]
    assert plan(n) == Plan("hartley", (odd,), n // odd)
    dense = torch.kron(hartley(odd), sylvester(n // odd)) / math.sqrt(n)
    assert_close(matrix(plan(n)), dense, atol=1e-14, rtol=0)


@every("n", [3, 5, 6, 7, 9, 10, 14, 15, 18, 50, 66, 90])
def test_orders_that_no_hadamard_matrix_can_have_are_refused(n: int) -> None:
    assert not exists(n)
    with pytest.raises(UserError, match=f"order {n} is known here; use hartley"):
        plan(n, "hadamard")


def test_a_power_of_two_is_sylvesters_whatever_is_asked_for() -> None:
    assert plan(64, "hartley") == plan(64, "hadamard") == plan(64)
    assert_orthogonal(matrix(plan(64, "hartley")) * 8)


@every(("n", "kind", "words"), [(12, "walsh", "'walsh' is unknown"), (0, "auto", "0 channels")])
def test_a_plan_that_cannot_be_is_refused(n: int, kind: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan(n, kind)


@every("one", SMALL)
def test_a_plan_survives_json(one: Plan) -> None:
    assert Plan.restore(json.loads(json.dumps(one.header()))) == one


@every(
    ("kind", "factors", "two"),
    [("hadamard", [9], 64), ("hadamard", [14], 2), ("hadamard", [12], 3), ("hartley", [0], 1), ("fourier", [12], 1)],
)
def test_a_stored_plan_that_names_no_rotation_is_refused(kind: str, factors: list[int], two: int) -> None:
    with pytest.raises(UserError, match=rf"kind='{kind}', factors=\[{factors[0]}\], sylvester={two}"):
        Plan.restore({"kind": kind, "factors": factors, "sylvester": two})


# products -------------------------------------------------------------------------------------------------------------


@every("one", SMALL)
def test_the_matrix_is_orthonormal_and_flat(one: Plan) -> None:
    n, m = one.order, matrix(one)
    assert_close(m @ m.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    if one.kind == "hadamard":
        assert_close(m.abs(), torch.full_like(m, 1 / math.sqrt(n)), atol=0, rtol=1e-15)
    else:
        assert m.abs().max() <= math.sqrt(2 / n) * (1 + 1e-15)


@every("transpose", [False, True])
@every("one", SMALL)
def test_the_fast_product_is_the_dense_one(one: Plan, transpose: bool) -> None:
    x, m = tokens(3, 2, one.order), matrix(one)
    assert_close(apply(x, one, transpose), x @ (m if transpose else m.T), atol=1e-12, rtol=0)


@every("transpose", [False, True])
@every("one", [plan(12), plan(40), plan(9), plan(14)])
def test_mixing_heads_is_the_product_with_a_unit_matrix_per_channel(one: Plan, transpose: bool) -> None:
    head_size = 6
    x = tokens(2, 5, one.order * head_size)
    dense = torch.kron(matrix(one), torch.eye(head_size, dtype=torch.float64))
    assert_close(apply_heads(x, one, head_size, transpose), x @ (dense if transpose else dense.T), atol=1e-12, rtol=0)


@every("n", MODEL_SIZES)
def test_at_the_size_of_a_model_the_transpose_undoes_the_product_and_lengths_stay(n: int) -> None:
    x = tokens(2, n)
    mixed = apply(x, plan(n))
    assert_close(apply(mixed, plan(n), transpose=True), x, atol=1e-12, rtol=0)
    assert_close(mixed.norm(dim=-1), x.norm(dim=-1), atol=0, rtol=1e-12)


@every("n", MODEL_SIZES)
def test_at_the_size_of_a_model_a_unit_vector_spreads_evenly(n: int) -> None:
    x = torch.zeros(1, n, dtype=torch.float64)
    x[0, n // 3] = 1
    assert_close(apply(x, plan(n)).abs(), torch.full_like(x, 1 / math.sqrt(n)), atol=0, rtol=1e-12)


def test_a_batch_longer_than_one_block_of_tokens_is_mixed_token_by_token() -> None:
    """To rounding: a product of more rows may add in another order."""
    x = tokens(2 * CPU_VALUES // 1536 + 1, 1536)
    one_by_one = torch.stack([apply(row, plan(1536)) for row in x])
    assert_close(apply(x, plan(1536)), one_by_one, atol=1e-12, rtol=0)


@every(("dtype", "error"), [(torch.float32, 2e-6), (torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_low_precision_rounds_the_result_once(dtype: torch.dtype, error: float) -> None:
    """Against float64 on the same input: half a unit in the last place, and what float32 loses in between."""
    x = tokens(64, 1536, dtype=dtype)
    exact = x.double() @ matrix(plan(1536)).T
    mixed = apply(x, plan(1536))
    assert mixed.dtype == dtype
    assert ((mixed.double() - exact).abs() <= error * exact.abs() + 2e-6).all()


def test_autocast_does_not_lower_the_precision() -> None:
    x = tokens(4, 576, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = apply(x, plan(576))
    assert torch.equal(inside, apply(x, plan(576)))


@every("shape", [(0, 576), (576,), (2, 3, 0, 576)])
def test_no_tokens_and_a_single_one_keep_their_shape(shape: tuple[int, ...]) -> None:
    assert apply(tokens(*shape), plan(576)).shape == shape


def test_a_view_that_is_not_contiguous_is_read_as_it_looks() -> None:
    x = tokens(576, 5).T
    assert torch.equal(apply(x, plan(576)), apply(x.contiguous(), plan(576)))


def test_another_number_of_channels_is_refused_even_if_it_divides() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 1152\) .* 576 × 1 channels"):
        apply(tokens(2, 1152), plan(576))
    with pytest.raises(ValueError, match=r"shape \(2, 576\) .* 9 × 32 channels"):
        apply_heads(tokens(2, 576), plan(9), 32)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: apply(x, plan(24)),
        lambda x: apply(x, plan(24), True),
        lambda x: apply(x, plan(24, "hartley")),
        lambda x: apply_heads(x, plan(6), 4),
    ],
    ids=["hadamard", "transpose", "hartley", "heads"],
)
def test_gradients_are_those_of_finite_differences(function: Callable[[Tensor], Tensor]) -> None:
    assert torch.autograd.gradcheck(function, tokens(3, 24).requires_grad_())


def test_a_first_use_in_inference_mode_leaves_later_gradients_possible() -> None:
    one = Plan("hadamard", (12, 20), 2)  # used by no other test, so that nothing is made before
    with torch.inference_mode():
        apply(tokens(1, 480), one)
    x = tokens(1, 480).requires_grad_()
    apply(x, one)[0, 0].backward()
    assert_close(x.grad[0], matrix(one)[0], atol=1e-12, rtol=0)


# random rotations -----------------------------------------------------------------------------------------------------


@every("mode", ["hadamard", "random"])
@every("n", [9, 12, 64, 90])
def test_a_random_rotation_is_orthogonal_and_follows_its_seed(n: int, mode: str) -> None:
    q = random_rotation(n, 3, mode)
    assert_close(q @ q.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(q, random_rotation(n, 3, mode))
    assert not torch.equal(q, random_rotation(n, 4, mode))


@every("n", [14, 576])
def test_a_randomized_hadamard_rotation_is_signs_and_a_fast_product(n: int) -> None:
    x = tokens(4, n)
    assert_close(x @ random_rotation(n, 0), apply(x * random_signs(n, 0), plan(n)), atol=1e-12, rtol=0)


def test_the_random_rotation_is_uniform() -> None:
    """Without the fixed sign, LAPACK's first row and column lean to one side; here every entry has mean zero."""
    mean = torch.stack([random_rotation(4, seed, "random") for seed in range(2000)]).mean(0)
    assert mean.abs().max() < 5 * 0.5 / math.sqrt(2000)  # five standard errors of an entry, whose variance is 1/4


def test_an_unknown_mode_of_rotation_is_refused() -> None:
    with pytest.raises(UserError, match="'givens' is unknown; use one of hadamard, random"):
        random_rotation(12, 0, "givens")


def test_rotations_ease_quantization_in_the_order_of_their_flatness() -> None:
    """Gaussian tokens with two channels 40 times as large, 4 bits per token: relative squared error, 576 channels.

    A mean over pairs of channels and random rotations, because a single draw moves the rotations that are not flat by a
    third. The pairs lie 7, 39, 71, … channels apart, so that 2 of 18 share a block of 64, as often as by chance.
    """
    blocks = torch.kron(torch.eye(9, dtype=torch.float64), sylvester(64) / 8)
    totals = dict.fromkeys(("none", "block-diagonal", "random", "hartley", "hadamard"), 0.0)
    draws = 18
    for draw in range(draws):
        x = tokens(300, 576, seed=1000 + draw)  # not the seed of a rotation: that would be made of the same numbers
        first = 64 * (draw % 9) + 5
        x[:, [first, (first + 32 * draw + 7) % 576]] *= 40
        totals["none"] += int4_error(x) / draws
        totals["block-diagonal"] += int4_error(x @ blocks) / draws
        totals["random"] += int4_error(x @ random_rotation(576, draw, "random")) / draws
        totals["hartley"] += int4_error(apply(x, plan(576, "hartley"))) / draws
        totals["hadamard"] += int4_error(apply(x, plan(576))) / draws
    assert sorted(totals, key=totals.__getitem__, reverse=True) == list(totals)
    # Figures of a study with other draws, which for the two that are not flat had a single one.
    assert totals["none"] == pytest.approx(0.1285, rel=0.05)
    assert totals["hadamard"] == pytest.approx(0.0085, rel=0.05)
    assert totals["hartley"] == pytest.approx(0.0094, rel=0.2)
    assert totals["random"] == pytest.approx(0.0160, rel=0.25)
    assert totals["block-diagonal"] == pytest.approx(0.0186, rel=0.25)


def int4_error(x: Tensor) -> float:
    """Σ (x̂ − x)² / Σ x² with x̂ on a symmetric grid of step max|x|/7 per token."""
    step = x.abs().amax(-1, keepdim=True) / 7
    rounded = (x / step).round().clamp(-8, 7) * step
    return float((rounded - x).square().sum() / x.square().sum())
