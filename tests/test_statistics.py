"""SQNR, MSE and kurtosis, against known noise, slow formulas and scipy."""

import math

import pytest
import torch
from scipy import stats

from eval.inside.statistics import Loss, TokenLoss, kurtosis, mse, spread, sqnr
from quantization.grids.uniform import UniformGrid, fake_quantize


@pytest.mark.parametrize("power", [1e-4, 1e-2, 1.0])
def test_sqnr_is_the_ratio_of_the_powers(power):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    noise = power**0.5 * torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    assert sqnr(x, x + noise) == pytest.approx(-10 * math.log10(power), abs=0.05)  # 200,000 draws: 0.3 % of a power
    assert mse(x, x + noise) == pytest.approx(power, rel=0.02)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-10, 2.0**60])
def test_sqnr_does_not_depend_on_the_unit(scale):
    x, changed = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    assert sqnr(scale * x, scale * changed) == pytest.approx(sqnr(x, changed), abs=1e-9)


def test_sqnr_is_infinite_only_for_equal_tensors():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert sqnr(x, x.clone()) == math.inf
    nearly = x.clone()
    nearly[17] = torch.nextafter(x[17], torch.tensor(math.inf))
    assert 100 < sqnr(x, nearly) < math.inf
    assert math.isfinite(sqnr(torch.tensor([2.0, 3.0]), torch.tensor([3.0, 2.0])))  # errors that add up to 0
    assert math.isfinite(sqnr(torch.tensor([1e-30]), torch.tensor([2e-30])))  # whose square float32 does not hold
    assert sqnr(torch.zeros(3), torch.ones(3)) == -math.inf


def test_errors_of_half_precision_do_not_overflow():
    x = torch.full((4,), 60_000.0, dtype=torch.float16)
    assert mse(x, -x) == pytest.approx(120_000.0**2, rel=1e-3)
    assert sqnr(x, -x) == pytest.approx(10 * math.log10(0.25))


def test_every_bit_gives_6_02_db_on_uniform_data():
    x = torch.rand(400_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = [sqnr(x, fake_quantize(x[None], UniformGrid(bits))[0]) for bits in range(4, 9)]
    # The step is range / (2^b − 1), the noise uniform in a step.
    for bits, value in zip(range(4, 9), found, strict=True):
        assert value == pytest.approx(20 * math.log10(2**bits - 1), abs=0.1)
    assert found[-1] - found[-2] == pytest.approx(6.02, abs=0.1)


def test_kurtosis_is_scipys():
    generator = torch.Generator().manual_seed(0)
    normal, uniform = torch.randn(300_000, generator=generator), torch.rand(300_000, generator=generator)
    assert kurtosis(normal) == pytest.approx(0, abs=0.05)  # standard error sqrt(24 / n) = 0.009
    assert kurtosis(uniform) == pytest.approx(-1.2, abs=0.02)
    for x in (normal, uniform, normal**3, normal + 1000):
        assert kurtosis(x.view(300, -1)) == pytest.approx(stats.kurtosis(x.double().numpy()), rel=1e-9, abs=1e-9)
    assert math.isnan(kurtosis(torch.ones(5)))


def test_spread_is_that_of_the_population():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    flat = x.double().numpy()
    expected = {"mean": flat.mean(), "std": flat.std(), "kurt": stats.kurtosis(flat, axis=None), "max": flat.max(),
                "min": flat.min()}  # fmt: skip
    assert spread(x) == pytest.approx(expected)


def test_losses_add_up_and_keep_the_median_token():
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    changed = x + 0.1 * torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    changed[0] = x[0] + 100  # one token that outweighs the others
    changed[1] = x[1]
    loss = TokenLoss()
    loss.add(x[:4], changed[:4])
    loss.add(x[4:], changed[4:])
    assert loss.sqnr == pytest.approx(sqnr(x, changed))
    assert loss.mse == pytest.approx(mse(x, changed))
    own = sorted(sqnr(a, b) for a, b in zip(x, changed, strict=True))
    assert loss.median == pytest.approx(own[4], abs=1e-4)
    with pytest.raises(ValueError, match="shape"):
        loss.add(x, changed[:3])
    assert math.isnan(Loss().sqnr)
    assert math.isnan(TokenLoss().median)
