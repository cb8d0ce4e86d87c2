"""Rounding a run of channels, in torch and in Triton, against a plain loop in float64; Hessians and their factors."""

import math
from pathlib import Path

import pytest
import torch
from common import KERNELS, compiled_for, every, needs_triton
from torch import Tensor

import quantization.weights.gptq as driver
from quantization.grids.uniform import CONVENTIONS, UniformGrid, fit, quantize
from quantization.kernels.columns import LONGEST, Levels, round_columns
from quantization.weights.gptq import Hessian, gptq, inverse_factor
from quantization.weights.spqr import SpQR, spqr

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the kernel runs in Triton's interpreter

pytestmark = pytest.mark.usefixtures("no_grad")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def hessian(channels: int, seed: int = 1) -> Tensor:
    mix = random(channels, channels, seed=seed) / channels**0.5 + torch.eye(channels, device=DEVICE)
    x = random(4 * channels, channels, seed=seed + 1) @ mix * torch.linspace(0.2, 3, channels, device=DEVICE)
    return x.T @ x / channels


def grids(n: int, out: int, grid: UniformGrid, groups: int = 3) -> Levels:
    """Fitted to random weights; neighbours have different ones, as in activation order."""
    fitted = fit(random(groups, out, 40, seed=9), grid)
    group = torch.randint(0, groups, (n,), generator=torch.Generator().manual_seed(3)).int().to(DEVICE)
    scale, zero_point = (x[..., 0].contiguous() for x in fitted)
    return Levels(scale, zero_point, group, grid.top, grid.rule.round_sum)


def rounded(w: Tensor, factor: Tensor, levels: Levels, kernel: bool) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.full(w.shape, 255, dtype=torch.uint8, device=w.device)
    errors, corrections = w.clone(), torch.full_like(w, torch.nan, dtype=torch.float16)
    round_columns(errors, factor, levels, codes, corrections, kernel=kernel)
    return codes, errors, corrections


def check(w: Tensor, factor: Tensor, levels: Levels, kernel: bool) -> None:
    """Follow the choice of codes in float64, channel by channel: each is a nearest one, and so are errors."""
    codes, errors, corrections = rounded(w, factor, levels, kernel)
    now, u, e = w.double(), factor.double(), errors.double()
    for c in range(len(w)):
        scale, zero_point = (x[levels.group[c]].double() for x in (levels.scale, levels.zero_point))
        value = now[c] - u[:c, c] @ e[:c]
        place = value / scale + zero_point
        # Half a step beside the code, where none is beyond the ends; float32 sums move what lies between two codes.
        assert ((place.clamp(0, levels.top) - codes[c]).abs() < 0.5 + 1e-4).all()
        missing = value - (codes[c] - zero_point) * scale
        if levels.limit is not None:
            outlier, kept = (missing / u[c, c]) ** 2 > levels.limit, corrections[c].double()
            assert ((kept != 0) == outlier).float().mean() > 0.99
            assert torch.allclose(kept, missing.where(kept != 0, 0), rtol=1e-3, atol=1e-5)
            missing -= kept
        assert torch.allclose(e[c], missing / u[c, c], atol=2e-5 * float(w.abs().max() / u.diagonal().min()))


@pytest.mark.parametrize("kernel", KERNELS)
@every("convention", ["gptq-asym", "gptq-sym", "smoothquant-sym", "deepspeed-asym", "spqr-asym"])
@every(("bits", "n", "out"), [(2, 1, 1), (3, 37, 35), (8, 64, 7)])
def test_a_run_is_rounded_as_a_plain_loop_in_float64_does(
    convention: str, bits: int, n: int, out: int, kernel: bool
) -> None:
    factor, _ = inverse_factor(hessian(n), 0.01)
    check(random(n, out), factor, grids(n, out, UniformGrid(bits, 40, convention)), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_run_of_the_longest_kind(kernel: bool) -> None:
    factor, _ = inverse_factor(hessian(LONGEST), 0.01)
    check(random(LONGEST, 32), factor, grids(LONGEST, 32, UniformGrid(4, 40)), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@every("limit", [0.0, 0.05])
def test_outliers_keep_a_correction_in_half_precision(limit: float, kernel: bool) -> None:
    factor, _ = inverse_factor(hessian(40), 0.01)
    levels = grids(40, 24, UniformGrid(3, 40, "spqr-asym"))
    limits = torch.full((24,), limit, device=DEVICE)
    check(random(40, 24), factor, Levels(levels.scale, levels.zero_point, levels.group, 7, True, limits), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@every("shift", [0.2, 1.0, -2.0])
def test_codes_beside_a_zero_point_with_a_fraction(shift: float, kernel: bool) -> None:
    """Weights of one sign: q − z takes more digits than q, and must not come back as a little less than q."""
    w = (torch.rand(8, 500, generator=torch.Generator().manual_seed(0)) + shift).to(DEVICE)
    low, high = w.aminmax(dim=0, keepdim=True)
    scale = (high - low) / 7
    zero_point = -low / scale
    expected = torch.round(w / scale + zero_point).clamp(0, 7)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=DEVICE)
    grid = Levels(scale, zero_point, torch.zeros(8, dtype=torch.int32, device=DEVICE), 7, round_sum=True)
    round_columns(w, torch.eye(8, device=DEVICE), grid, codes, kernel=kernel)
    assert torch.equal(codes.float(), expected)


@needs_triton
@every("convention", CONVENTIONS)
@every("bits", range(2, 9))
def test_the_kernel_rounds_as_torch_does_bit_for_bit_where_nothing_is_summed(bits: int, convention: str) -> None:
    """Halves go to the even code, and a quotient is the nearest number to the true one."""
    n, out, grid = 6, 32, UniformGrid(bits, 40, convention)
    levels = grids(n, out, grid)
    w = random(n, out)
    w[:5] = (torch.arange(5, device=DEVICE)[:, None] - 1.5) * levels.scale[levels.group[:5].long()]
    codes, errors, _ = rounded(w, torch.eye(n, device=DEVICE), levels, kernel=True)
    scale, zero_point = (x[levels.group.long()] for x in (levels.scale, levels.zero_point))
    steps = torch.round(w / scale + zero_point) if grid.rule.round_sum else torch.round(w / scale) + zero_point
    assert torch.equal(codes, steps.clamp(0, grid.top).to(torch.uint8))
    assert torch.allclose(errors, w - (codes - zero_point) * scale, atol=1e-5)


@needs_triton
@every(
    ("bits", "group_size", "act_order", "static_groups", "columns"),
    [
        (2, -1, True, True, 128),
        (3, 16, False, False, 48),
        (4, 16, True, False, 128),
        (4, 48, False, False, 16),
        (4, 24, True, True, 40),
        (8, 16, False, True, 128),
    ],
)
def test_gptq_through_the_kernel(
    bits: int, group_size: int, act_order: bool, static_groups: bool, columns: int
) -> None:
    """Its loss is that of its own weights, and it ends where torch's does."""
    channels, rows = 96, 30
    weight, h = random(rows, channels), hessian(channels)
    grid = UniformGrid(bits, group_size, ("gptq-asym", "gptq-sym")[bits == 3])
    how = {"act_order": act_order, "static_groups": static_groups, "columns": columns}
    result, loss, _ = gptq(weight, h.clone(), grid, kernel=True, **how)
    reference, reference_loss, _ = gptq(weight, h.clone(), grid, kernel=False, **how)
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(channels, device=DEVICE)
    error = (result.dequantize() - weight).double()
    assert loss == pytest.approx(float(torch.trace(error @ damped @ error.T)), rel=1e-4)
    assert loss == pytest.approx(reference_loss, rel=0.02)  # float32 sums in another order: single roundings may tip
    assert (result.codes == reference.codes).float().mean() > 0.97


@needs_triton
def test_with_an_identity_hessian_the_kernel_is_rtn_bit_for_bit() -> None:
    weight, grid = random(32, 64), UniformGrid(3, 16)
    result, _, _ = gptq(weight, 7.0 * torch.eye(64, device=DEVICE), grid, kernel=True)
    assert torch.equal(result.dequantize(), quantize(weight, grid).dequantize())


@needs_triton
@every(("threshold", "size"), [(math.inf, 16), (0.25, 16), (0.25, 48), (0.5, -1)])
def test_spqr_through_the_kernel(threshold: float, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h, how = random(32, 144), hessian(144), SpQR(UniformGrid(3, size, "spqr-asym"), threshold=threshold)
    reference, reference_loss, _ = spqr(weight, h.clone(), how)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "round_columns", lambda *arguments: round_columns(*arguments[:-1], kernel=True))
        stored, loss, _ = spqr(weight, h.clone(), how)
    assert loss == pytest.approx(reference_loss, rel=0.02)
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(144, device=DEVICE)
    error = (stored.dequantize() - weight).double()
    assert loss == pytest.approx(float(torch.trace(error @ damped @ error.T)), rel=1e-4)
    assert (stored.dequantize() - reference.dequantize()).abs().lt(1e-3).float().mean() > 0.97
    assert (stored.corrections.values.numel() > 0) == (threshold < math.inf)


# Hessian --------------------------------------------------------------------------------------------------------------


@every("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every("channels", [40, 700])  # less than a panel, and several with a short one
def test_samples_count_one_by_one_or_together_and_give_the_sum_in_float64(dtype: torch.dtype, channels: int) -> None:
    x = random(6, 50, channels).to(dtype)
    one_by_one, together = Hessian(), Hessian()
    for sample in x:
        one_by_one.add(sample)
    together.add(x[:4])
    together.add(x[4:])
    expected = 2 / 6 * x.double().flatten(0, 1).T @ x.double().flatten(0, 1)
    for h in (one_by_one.take(), together.take()):
        assert h.dtype == torch.float32
        assert torch.allclose(h.double(), expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(h.tril(-192), h.T.tril(-192))


@every("channels", [1, 40, 700])
def test_the_factor_is_computed_panel_by_panel(channels: int) -> None:
    h = hessian(channels)
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(channels, device=DEVICE)
    factor, _ = inverse_factor(h, 0.01)
    assert torch.equal(factor, factor.triu())
    inverse = torch.linalg.inv(damped)
    assert (factor.double().T @ factor.double() - inverse).abs().max() < 1e-3 * inverse.abs().max()


# Without a GPU --------------------------------------------------------------------------------------------------------


@needs_triton
def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    shared = compiled_for(90, "compiled_columns.py", tmp_path)
    assert len(shared) == 3
    assert max(shared) <= 1024  # bytes, for one channel of U: what the sums run over stays in registers
