"""Rounding that passes gradients: what block-wise training learns scales, ranges and weights through.

x̂ = s · (clamp(round(x / s) + z, 0, top) − z),    ∂round(u)/∂u := 1
inside the range: ∂x̂/∂x = 1, ∂x̂/∂s = (x̂ − x)/s, ∂x̂/∂z = 0;    where clamp acts: 0, x̂/s, −s
"""

from typing import Any

import torch
from torch import Tensor

from quantization.grids.uniform import Fit, UniformGrid, encode

__all__ = ["OnGrid", "fit_through", "on_grid", "straight"]


class OnGrid(torch.autograd.Function):
    """x̂ of grouped values on a fitted grid.

    Spelled out because autograd would keep three more float32 tensors of the size of x, and not every release lets
    gradients pass codes 0 and top that nothing clipped.
    """

    @staticmethod
    def forward(ctx: Any, groups: Tensor, scale: Tensor, zero_point: Tensor, grid: UniformGrid) -> Tensor:
        """groups: (..., groups, group_size), any float dtype. scale, zero_point: float32, (..., groups, 1) or what
        broadcasts to it."""
        values = groups.float()
        codes = encode(values, Fit(scale, zero_point), grid)
        quantized = (codes - zero_point) * scale
        ctx.save_for_backward(groups, scale, zero_point, quantized)
        ctx.grid = grid
        return quantized

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        """Gradients for the values (None if nobody asks), scale and zero point."""
        groups, scale, zero_point, quantized = ctx.saved_tensors
        values = groups.float()
        steps = values / scale
        codes = (steps + zero_point).round() if ctx.grid.rule.round_sum else steps.round() + zero_point
        inside = gradient * ((codes >= 0) & (codes <= ctx.grid.top))
        of_scale = (gradient * quantized - inside * values).sum(-1, keepdim=True) / scale
        of_zero_point = (inside - gradient).sum(-1, keepdim=True) * scale
        return (
            inside.to(groups.dtype) if ctx.needs_input_grad[0] else None,
            of_scale.sum_to_size(scale.shape),
            of_zero_point.sum_to_size(zero_point.shape),
            None,
        )


def on_grid(groups: Tensor, fitted: Fit, grid: UniformGrid) -> Tensor:
    """x̂ in float32, with gradients for values, scale and zero point where they are asked for."""
    quantized = OnGrid.apply(groups, fitted.scale, fitted.zero_point, grid)
    assert isinstance(quantized, Tensor)
    return quantized


def straight(rounded: Tensor, exact: Tensor) -> Tensor:
    """The value of the one, bit for bit, with the gradient of the other."""
    return rounded.detach() + (exact - exact.detach())


def fit_through(low: Tensor, high: Tensor, grid: UniformGrid) -> Fit:
    """The grid of a range, (..., 1) each, with gradients for its ends that pass the rounding of the zero point, too."""
    scale, zero_point = grid.rule.fit(low, high, grid.bits)
    if grid.rule.zero_point == "constant" or not (low.requires_grad or high.requires_grad):
        return Fit(scale, zero_point)
    exact = -low / scale
    return Fit(scale, straight(zero_point, exact.clamp(0, grid.top) if grid.rule.zero_point == "code" else exact))
