"""GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323): round channel after channel, let the later ones make up for it.

    H = 2/n · Σ x xᵀ,   H_λ = H + λI,   H_λ⁻¹ = UᵀU                      section 3, step 3 (Cholesky)
    e_c = (w_c − ŵ_c) / U_cc,   w_j ← w_j − e_c · U_cj  for j > c          Eq. 2 and 3

`Hessian` (`hessians`) accumulates H, `inverse_factor` is U, `column_loop` the rounding, `gptq` one matrix, on RTN's
grid.

Departs from the reference: linears that read the same input share one H and go through the loop as one matrix; U comes
from one factorization (of H_λ with both axes flipped); groups that are fitted on the way see all updates made so far;
λ is a share of the mean over inputs that occur at all; a Hessian that cannot be factorized gets more damping, then
float64, instead of an error.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from corpora.errors import UserError
from corpora.storage import is_finite
from quantization.grids.stored import StoredWeight
from quantization.grids.uniform import (
    SCALE_DTYPES,
    Fit,
    QuantizedTensor,
    UniformGrid,
    finite,
    fit,
    split_groups,
)
from quantization.kernels.columns import LONGEST, Levels, round_columns
from quantization.model.blocks import DecoderBlock
from quantization.model.stages import stage
from quantization.weights.base import GridQuantizer
from quantization.weights.hessians import Hessian, panels, shared_hessians

__all__ = ["GPTQ", "Hessian", "column_loop", "gptq", "inverse_factor", "quantize_sets", "shared_hessians"]

log = logging.getLogger(__name__)

Weight = TypeVar("Weight", bound=StoredWeight)

COLUMNS = 128  # channels that are rounded before all later ones get their errors; changes the speed only
DAMP_STEPS = 3  # times that λ grows tenfold, in float32 and then in float64


def inverse_factor(h: Tensor, damp: float, name: str = "Hessian", order: Tensor | None = None) -> tuple[Tensor, int]:
    """U, upper triangular, with (H + λI)⁻¹ = UᵀU, and how many times the damping had to grow.

    h: (n, n) without zeros on its diagonal; overwritten. λ = damp · mean diag H. order: of U's channels, (n,), where it
    is another than that of H. With J the reversal of both axes and J(H_λ) = L Lᵀ: U = J(L⁻¹).
    Raises UserError if H is not finite, or if even 10³ times the damping in float64 gives no factor.
    """
    step, diagonal = damp * float(h.diagonal().mean()), h.diagonal()
    if not math.isfinite(step):
        raise UserError(
            f"{name}: the Hessian has no Cholesky factor, as it is not finite: the calibration text gives values whose "
            "squares float32 does not hold; the checkpoint is damaged"
        )
    exact = h.dtype == torch.float64
    for attempt in range(DAMP_STEPS + 1):
        # λ, then 10λ, …: what is missing to the next is added.
        diagonal += step * (1 if attempt == 0 else 10**attempt - 10 ** (attempt - 1))
        flipped = h.flip(0, 1) if order is None else h.index_select(0, order.flip(0)).index_select(1, order.flip(0))
        if _invert_factor(flipped):
            if attempt:
                log.warning("%s: no Cholesky factor at damping %g; took %g", name, damp, damp * 10**attempt)
            for first, last in panels(len(h), h.device):  # into the memory of H: at 14336 channels it takes 0.8 GB
                h[len(h) - last : len(h) - first] = flipped[first:last].flip(0, 1)
            return h, attempt
        del flipped
    if exact:
        raise UserError(
            f"{name}: the Hessian has no Cholesky factor even with {10**DAMP_STEPS} × the damping of {damp:g} in "
            "float64; the calibration text is degenerate, give more or other text (--calibration), or --set "
            "weights.damp=…"
        )
    log.warning("%s: no Cholesky factor in float32; trying float64", name)
    diagonal -= step * 10**DAMP_STEPS
    factor, attempt = inverse_factor(h.double(), damp, name, order)
    return factor.float(), DAMP_STEPS + 1 + attempt


def _invert_factor(a: Tensor) -> bool:
    """Turn A = L Lᵀ into L⁻¹, panel by panel, in place; false if A has no such factor.

    Torch factorizes and inverts the corners, the rest is matrix products, of one triangle alone.
    """
    parts, failed = panels(len(a), a.device), []
    for i, (first, last) in enumerate(parts):
        own = a[first:last]
        corner, wrong = torch.linalg.cholesky_ex(own[:, first:last])
        failed.append(wrong)
        inverse = torch.linalg.solve_triangular(
            corner, torch.eye(len(own), dtype=a.dtype, device=a.device), upper=False
        )
        a[last:, first:last] = a[last:, first:last] @ inverse.T  # of L from here on
        for up, down in parts[i + 1 :]:
            a[up:down, last:down].addmm_(a[up:down, first:last], a[last:down, first:last].T, alpha=-1)
        # The panels above hold L⁻¹ already.
        left = [inverse @ (own[:, up:first] @ a[up:first, up:down]) for up, down in parts[:i]]
        for (up, down), part in zip(parts, left, strict=False):
            own[:, up:down] = part.neg_()
        own[:, first:last] = inverse
        own[:, last:] = 0
    return not torch.stack(failed).any()


def column_loop(
    w: Tensor,
    factor: Tensor,
    levels: Callable[[int, int], Levels],
    codes: Tensor,
    corrections: Tensor | None = None,
    *,
    run: int = COLUMNS,
    columns: int = COLUMNS,
    kernel: bool | None = None,
) -> Tensor:
    """Round channel after channel, spreading each one's error over the later ones.

    w: (in, out) float32, input channels in processing order; becomes the errors e. factor: U, (in, in). codes: (in,
    out) uint8, is written; so is corrections, (in, out) float16, if `levels` has a limit.
    levels(first, last): the grid of these channels. It is asked for at the start of every run, when the run's weights
    have the errors of all channels before it; of a run longer than `LONGEST` part by part.
    run: channels of one run. columns: how many channels are rounded before their errors go to all the later ones;
    rounded up to whole runs. kernel: see `round_columns`.
    Returns Σ‖e_c‖², which is tr(ΔW H_λ ΔWᵀ), as a float64 scalar on the device of w.
    """
    loss = torch.zeros((), dtype=torch.float64, device=w.device)
    columns = -(-columns // run) * run  # a run must not reach into channels that wait for their updates
    for start in range(0, len(w), columns):
        stop = min(start + columns, len(w))
        errors = w[start:stop]  # channels become errors as they are rounded
        for first, last, begin, end in _parts(start, stop, run):
            now = slice(first, last)
            if first == begin > start:  # the whole run is current when its grid is asked for
                w[begin:end].addmm_(factor[start:begin, begin:end].T, w[start:begin], alpha=-1)
            elif first > begin:
                w[now].addmm_(factor[begin:first, now].T, w[begin:first], alpha=-1)
            correction = None if corrections is None else corrections[now]
            round_columns(w[now], factor[now, now], levels(first, last), codes[now], correction, kernel)
        if stop < len(w):
            w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        loss += torch.linalg.vector_norm(errors, dim=1).double().square().sum()
    return loss


def _parts(start: int, stop: int, run: int) -> list[tuple[int, int, int, int]]:
    """First and last of the channels that are rounded at a time, runs or parts of long ones, and those of the run."""
    runs = [(begin, min(begin + run, stop)) for begin in range(start, stop, run)]
    return [
        (first, min(first + LONGEST, end), begin, end) for begin, end in runs for first in range(begin, end, LONGEST)
    ]


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: UniformGrid,
    *,
    damp: float = 0.01,
    act_order: bool = True,
    static_groups: bool = True,
    columns: int = COLUMNS,
    kernel: bool | None = None,
    name: str = "weight",
) -> tuple[QuantizedTensor, float, int]:
    """One matrix on its grid: the quantized matrix, its loss ‖E‖², and how often the damping grew.

    weight: (out, in). hessian: (in, in) float32, overwritten. damp: λ over mean diag H. act_order: channels in the
    order of falling diag H. static_groups: groups are runs of neighbours, fitted before the loop; otherwise each is a
    run in processing order, fitted on its current weights when the loop reaches it. kernel: see `round_columns`.
    Raises UserError for weights that are not finite and for a Hessian without a factor.
    """
    out, channels = weight.shape
    size = channels if grid.group_size == -1 else grid.group_size
    # (in, out) float32: a channel is a contiguous row. Copied once, because stacked linears are large.
    w = torch.empty(weight.T.shape, device=weight.device).copy_(finite(weight, name).T)
    split_groups(weight, grid.group_size, name)  # refuses groups that do not fill a row
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    # No token ever fed them: any value is as good. Where all are dead, the weights stay, to be rounded as they are.
    w.masked_fill_((dead & ~dead.all())[:, None], 0)
    # Neither 1 (GPTQ) nor 0: keeps λ what it is.
    live = diagonal.sum() / (~dead).sum()
    diagonal.copy_(torch.where(dead, torch.where(dead.all(), 1.0, live), diagonal))
    static = static_groups or grid.group_size == -1
    fitted: list[Fit] = []  # each (groups, out)

    def fit_groups(groups: Tensor) -> None:
        """Of whole groups of channels, (in, out)."""
        of_rows = fit(groups.unflatten(0, (-1, size)).transpose(1, 2), grid)
        fitted.append(Fit(of_rows.scale[..., 0].contiguous(), of_rows.zero_point[..., 0].contiguous()))

    if static:  # of each channel's own neighbours, before any order
        fit_groups(w)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    if order is not None:
        w = w.index_select(0, order)
    with stage("factor"):
        factor, repairs = inverse_factor(hessian, damp, name, order)
    del hessian, diagonal
    codes = torch.empty(channels, out, dtype=torch.uint8, device=w.device)
    position = torch.arange(channels, device=w.device) if order is None else order
    group = (position // size if static else torch.zeros_like(position)).int()

    def levels(first: int, last: int) -> Levels:
        if not static and first % size == 0:
            fit_groups(w[first : first + size])
        return Levels(*fitted[-1], group[first:last], grid.top, grid.rule.round_sum)

    run = min(COLUMNS, columns) if static else size
    loss = float(column_loop(w, factor, levels, codes, run=run, columns=columns, kernel=kernel))
    scale, zero_point = (torch.cat(parts).T.contiguous() for parts in zip(*fitted, strict=True))
    if not is_finite(scale):
        raise UserError(f"{name} holds values up to {weight.abs().max():.3g}, too large for {grid.scale_dtype} scales")
    group_index = None
    if order is not None:
        back = torch.argsort(order)
        codes = codes.index_select(0, back)
        if not static:
            group_index = (back // size).int()
    quantized = QuantizedTensor(
        codes.T.contiguous(), scale.to(SCALE_DTYPES[grid.scale_dtype]), zero_point, grid, group_index
    )
    return quantized, loss, repairs


def quantize_sets(
    block: DecoderBlock,
    true_sequential: bool,
    choose: Callable[[tuple[str, ...], Tensor, Tensor, str], tuple[Mapping[str, Weight], float, int]],
) -> dict[str, Weight]:
    """Quantize a block's linears, set after set; the block keeps its full-precision weights.

    choose: names of a set, its weights stacked (rows, in), its Hessian and its name, to the quantized linears by name,
    the loss, and how often the damping grew; the last two go into the block's figures.
    """
    linears = block.linears()
    full = {name: linear.weight.data for name, linear in linears.items()}
    quantized: dict[str, Weight] = {}
    expert_of = block.architecture.expert_of
    for names, hessian in shared_hessians(block, true_sequential):
        stacked = torch.cat([full[name] for name in names])
        with stage("columns"):
            chosen, loss, repairs = choose(names, stacked, hessian, f"{block.name}.{'+'.join(names)}")
        quantized |= chosen
        if true_sequential:  # the next Hessians see these
            for name in names:
                linears[name].weight.data = quantized[name].dequantize(full[name].dtype)
            if names[0] in block.architecture.downs and (expert := expert_of(names[0])) is not None:
                for name in (name for name in linears if expert_of(name) == expert):  # the others never see these
                    linears[name].weight.data = full[name]
        block.report(loss=loss, repaired_hessians=repairs > 0)
    for name, linear in linears.items():
        linear.weight.data = full[name]
    if block.stream is not None and block.stream.walk is not None:
        block.stream.walk.end(quantized)
    return quantized


@dataclass(frozen=True)
class GPTQ(GridQuantizer):
    """Second-order rounding of every linear of a block.

    damp: λ as a share of mean diag H. act_order, static_groups: see `gptq`. true_sequential: q, k, v, then o, then
    gate and up, then down, each calibrated behind the quantized ones before it.
    """

    grid: UniformGrid
    damp: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = True
    name: ClassVar[str] = "gptq"

    def __post_init__(self) -> None:
        if not self.damp > 0:
            raise UserError(f"weights.damp={self.damp:g} is not allowed; give a positive share, 0.01 as published")

    def quantize_block(self, block: DecoderBlock) -> Mapping[str, QuantizedTensor]:
        """Every linear of the block; `figures` gets the proxy loss and the number of repaired Hessians."""
        linears = block.linears()

        def choose(
            names: tuple[str, ...], weight: Tensor, hessian: Tensor, name: str
        ) -> tuple[dict[str, QuantizedTensor], float, int]:
            whole, loss, repairs = gptq(
                weight,
                hessian,
                self.grid,
                damp=self.damp,
                act_order=self.act_order,
                static_groups=self.static_groups,
                name=name,
            )
            return split_rows(whole, names, linears), loss, repairs

        return quantize_sets(block, self.true_sequential, choose)


def split_rows(
    whole: QuantizedTensor, names: tuple[str, ...], linears: Mapping[str, nn.Linear]
) -> dict[str, QuantizedTensor]:
    """Undo the stacking of several linears into one matrix."""
    parts, start = {}, 0
    for name in names:
        rows = slice(start, start + linears[name].out_features)
        parts[name] = replace(
            whole,
            codes=whole.codes[rows],
            scale=whole.scale[rows],
            zero_point=whole.zero_point[rows],
            # safetensors refuses tensors that share memory
            group_index=None if whole.group_index is None else whole.group_index.clone(),
        )
        start = rows.stop
    return parts
