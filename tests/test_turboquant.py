"""TurboQuant: the levels against a plain integral, the codes against a search, and the laws of rotated rounding."""

import math

import pytest
import torch
from common import every
from torch import Tensor
from torch.testing import assert_close

from corpora.errors import UserError
from quantization.hadamard import matrix, plan
from quantization.kv_cache import TurboQuant
from quantization.kv_cache.lloyd import decode_lloyd, encode_lloyd, fp8, fp8_levels, levels, rotated, signs
from quantization.labels import kv_label
from quantization.named import named_recipe
from quantization.recipes.recipe import describe

BITS = (2, 3, 4)
# Lloyd-Max of N(0, 1): positive levels and mean squared error (Max, 1960, table I).
NORMAL = {
    2: ((0.4528, 1.5104), 0.1175),
    3: ((0.2451, 0.7560, 1.3439, 2.1520), 0.03454),
    4: ((0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326), 0.009497),
}


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def density(size: int) -> tuple[Tensor, Tensor]:
    """A million equally spaced coordinates of a unit vector and their weights, which sum to 1; float64."""
    t = (torch.arange(2**20, dtype=torch.float64) + 0.5) / 2**19 - 1
    weight = (1 - t * t) ** ((size - 3) / 2)
    return t, weight / weight.sum()


def lloyd_error(size: int, bits: int) -> float:
    """The squared error of a coordinate, as a share of its variance 1/d."""
    (t, weight), table = density(size), levels(size, bits).double()
    nearest = (t[:, None] - table).abs().amin(1)
    return float((weight * nearest.square()).sum()) * size


def share(x: Tensor, bits: int, seed: int = 0, norm_correction: bool = True) -> Tensor:
    """‖x̂ − x‖²/‖x‖² of every vector."""
    back = decode_lloyd(*encode_lloyd(x, bits, seed, norm_correction), bits, seed)
    return (back - x).square().sum(-1) / x.square().sum(-1)


@every("size", [4, 16, 80, 128])
@every("bits", BITS)
def test_every_level_is_the_mean_of_its_cell(size, bits):
    (t, weight), table = density(size), levels(size, bits).double()
    cell = (t[:, None] - table).abs().argmin(1)
    mean = torch.stack([(t * weight)[cell == i].sum() / weight[cell == i].sum() for i in range(2**bits)])
    assert_close(table, mean, rtol=0, atol=1e-6)
    assert torch.equal(table, -table.flip(0))
    assert (table.diff() > 0).all()


@every("bits", BITS)
def test_in_many_dimensions_the_levels_are_those_of_the_normal_distribution(bits):
    positive, error = NORMAL[bits]
    table = levels(2**16, bits).double() * 2**8
    assert_close(table[2 ** (bits - 1) :], torch.tensor(positive, dtype=torch.float64), rtol=0, atol=2e-4)
    assert share(states(300, 4096), bits, norm_correction=False).mean() == pytest.approx(error, rel=0.02)


@every("size", [16, 64, 96])
@every("bits", BITS)
def test_the_error_on_random_vectors_is_the_integral(size, bits):
    error = share(states(20_000, size), bits, norm_correction=False).mean()
    assert error == pytest.approx(lloyd_error(size, bits), rel=0.02)


@every("bits", [1, 5, 8])
def test_tables_of_other_bits_are_refused(bits):
    with pytest.raises(UserError, match=f"Lloyd levels of {bits} bits are not supported; use 2 to 4"):
        levels(64, bits)


@every("size", [16, 64, 80, 128])
def test_the_rotation_is_orthonormal_and_undone(size):
    x = states(5, size).double()
    dense = matrix(plan(size)) @ torch.diag(signs(size, 3).double())
    assert_close(dense.T @ dense, torch.eye(size, dtype=torch.float64))
    assert_close(rotated(x, 3), x @ dense.T)
    assert_close(rotated(rotated(x, 3), 3, back=True), x)


@every("bits", BITS)
def test_codes_are_the_nearest_levels_of_the_rotated_unit_vector(bits):
    x = states(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    codes, norm = encode_lloyd(x, bits, seed=5, norm_correction=False)
    y = rotated(x.double() / x.double().norm(dim=-1, keepdim=True), 5)
    assert torch.equal(codes.long(), (y[..., None] - levels(64, bits).double()).abs().argmin(-1))
    assert torch.equal(norm, x.double().norm(dim=-1, keepdim=True).half())


@every("bits", BITS)
def test_norm_correction_keeps_the_norm(bits):
    x = states(500, 64) * torch.logspace(-2, 3, 500)[:, None]
    back = decode_lloyd(*encode_lloyd(x, bits, 0), bits, 0)
    assert_close(back.norm(dim=-1), x.norm(dim=-1), rtol=2**-11 + 1e-6, atol=0)  # half a step of float16
    short = decode_lloyd(*encode_lloyd(x, bits, 0, norm_correction=False), bits, 0)
    assert (short.norm(dim=-1) / x.norm(dim=-1)).mean() < 1


def test_zeros_and_norms_beyond_float16_stay_finite():
    x = torch.zeros(3, 16)
    x[1, 2], x[2] = 1e6, 1e-30
    back = decode_lloyd(*encode_lloyd(x, 3, 0), 3, 0)
    assert torch.isfinite(back).all()
    assert torch.count_nonzero(back[0]) == 0
    assert 0 < back[1, 2] <= 65504


@every("bits", BITS)
def test_what_a_vector_looks_like_does_not_matter(bits):
    """A fixed rotation and another scale change nothing. A few large channels, of which one rotation makes few
    different coordinates, err less; a grid of the vector's own range would lose its other channels."""
    x = states(4000, 64, seed=1)
    plain = float(share(x, bits).mean())
    turn = torch.linalg.qr(states(64, 64, seed=2)).Q
    for other in (x @ turn, 100 * x):
        assert share(other, bits).mean() == pytest.approx(plain, rel=0.05)
    for large in ([3], [3, 17], [3, 17, 40], list(range(0, 64, 8))):
        spiky = x.clone()
        spiky[:, large] *= 30
        assert share(spiky, bits).mean() < plain


@every("bits", BITS)
def test_one_large_channel_alone_is_exact(bits):
    """H D takes it to ±1/√d in every coordinate: one cell and its mirror, and the corrected norm does the rest."""
    x = torch.diag(torch.logspace(-1, 2, 64))
    assert share(x, bits).amax().sqrt() < 2**-11 + 1e-6


@every("bits", BITS)
def test_seeds_are_different_rotations_and_one_seed_is_one(bits):
    x = states(50, 64)
    one, same, other = (encode_lloyd(x, bits, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# Policies -------------------------------------------------------------------------------------------------------------


@every(("name", "keys", "values"), [("k8v4", 128, 68), ("4bit-nc", 66, 68), ("k3v4-nc", 50, 68), ("3bit-nc", 50, 52)])
def test_a_preset_takes_the_bytes_of_its_codes_norms_and_grids(name, keys, values):
    """Of a token of one head of 128 channels; published: 196, 136, 120 and 104 in all, padded to eight bytes."""
    policy = named_recipe(f"turboquant-{name}").kv_cache
    store = policy.store(0, None, packed=True)
    store.append(states(1, 1, 1, 128).half(), states(1, 1, 1, 128).half())
    assert [side.memory().bytes for side in store.sides] == [keys, values]
    assert [128 * bits / 8 for bits in policy.bits_per_element(1, 128, 1)] == [keys, values]
    published = {"k8v4": 196, "4bit-nc": 136, "k3v4-nc": 120, "3bit-nc": 104}[name]
    assert -(-(keys + values) // 8) * 8 in (published, published + 4)


@every(("policy", "other"), [
    (TurboQuant(4, values="lloyd"), TurboQuant(4)),
    (TurboQuant(3, norm_correction=False), TurboQuant(3)),
    (TurboQuant(3, seed=1), TurboQuant(3)),
    (TurboQuant(8, v_bits=4), TurboQuant(8)),
])  # fmt: skip
def test_every_field_says_something(policy, other):
    x = states(1, 2, 30, 32)
    seen = [[r.numbers(x, None) for r in p.roundings()] for p in (policy, other)]
    assert any(not torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_labels_tell_levels_of_values_from_a_grid():
    assert kv_label(describe(TurboQuant(4, v_bits=2))) == "4,2 turboquant"
    assert kv_label(describe(TurboQuant(2, "lloyd"))) == "2 turboquant lloyd"


def test_values_are_on_the_grid_of_their_own_range():
    x = 5 + states(2, 2, 40, 32)
    back = TurboQuant(4).roundings()[1].numbers(x, None)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 15
    assert ((back - x).abs() <= 0.5 * step + 0.01).all()  # the minimum is rounded to float16, near 3 by up to 0.001
    assert all(len(vector.unique()) <= 16 for vector in back.flatten(0, 2))


@every(("fields", "message"), [
    ({"bits": 5}, "KV bits=5 is not supported by TurboQuant; use 2, 3, 4, 8"),
    ({"bits": 16}, "KV bits=16 is not supported; use 2 to 8"),
    ({"bits": 8, "values": "lloyd"}, "values of 8 bits have no Lloyd levels; give --v-bits 2 to 4"),
    ({"bits": 4, "values": "nuq"}, "kv_cache.values=nuq is not known; choose uniform or lloyd"),
    ({"bits": 4, "seed": -1}, "kv_cache.seed=-1 is not allowed; give 0 or more"),
])  # fmt: skip
def test_what_it_cannot_do_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        TurboQuant(**fields)


def test_heads_whose_codes_leave_bytes_open_are_refused():
    with pytest.raises(UserError, match="heads of a multiple of 8 channels, this model's have 20"):
        TurboQuant(4).in_heads(20)


def test_fp8_is_the_nearest_number_of_e4m3_and_saturates():
    x = torch.cat([states(1000) * torch.logspace(-3, 2, 1000), torch.tensor([0.0, 448.0, 470.0, -1e5])])
    table = fp8_levels().double()
    finite = torch.tensor([i for i in range(256) if i & 127 != 127])
    expected = (x.double()[:, None] - table[finite]).abs().amin(1)
    assert_close((table[fp8(x).long()] - x.double()).abs(), expected, rtol=0, atol=0)
    assert table.abs().max() == 448
    assert math.isclose(table[table > 0].min(), 2**-9)
