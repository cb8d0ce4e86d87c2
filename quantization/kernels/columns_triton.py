"""The Triton kernel of `columns.round_columns`: a program rounds a run of channels for a few rows of the weight.

Every thread has rows of its own and holds d of all channels of the run in registers, zero at first: a step is one
product and sum over all of them, in which channels that have not come yet count nothing, and writes its d by a mask. So
no register is chosen by a variable and no thread waits for another. What the next step reads is loaded a step ahead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantization.kernels.launch import start

__all__ = ["launch"]

ROWS = 32  # of a program: as many as a warp has threads
WARPS = 1
SHORTEST = 16  # what a shorter run is filled up to
INTEGERS = tl.constexpr(2.0**23)  # from here on a float32 number is an integer


@triton.jit
def _nearest(x):
    """To the nearest integer, halves to the even one: adding 2²³ leaves no place for a fraction."""
    size = tl.abs(x)
    rounded = (size + INTEGERS) - INTEGERS
    return tl.where(size < INTEGERS, tl.where(x < 0, -rounded, rounded), x)


@triton.jit(do_not_specialize=["n"])
def _columns_kernel(
    w,  # (n, out); becomes errors
    before,  # (COLUMNS, COLUMNS): U_kc / U_kk at [c, k], k < c < n; else zeros
    pivots,  # (n,), U_cc
    scale,  # (groups, out)
    zero_point,
    group,  # (n,)
    limit,  # (out,) or none
    codes,  # (n, out) uint8
    corrections,  # (n, out) float16 or none
    n,
    out,
    w_stride,  # of a channel
    codes_stride,
    TOP: tl.constexpr,
    ROUND_SUM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`ROWS` rows from the program's own first one on."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < out
    channel = tl.arange(0, COLUMNS)
    number, step = channel.to(tl.float32), 0.0  # one instruction compares floats, LLVM takes two for integers
    d = tl.zeros((COLUMNS, ROWS), tl.float32)
    if limit is not None:
        most = tl.load(limit + row, mask=real, other=0.0)
    next_x = tl.load(w + row, mask=real, other=0.0)
    of_group = tl.load(group).to(tl.int64) * out
    next_scale = tl.load(scale + of_group + row, mask=real, other=1.0)
    next_zero = tl.load(zero_point + of_group + row, mask=real, other=0.0)
    next_group = tl.load(group + tl.minimum(1, n - 1))
    for c in range(n):
        x, s, z = next_x, next_scale, next_zero
        ahead = tl.minimum(c + 1, n - 1)
        next_x = tl.load(w + ahead * w_stride + row, mask=real, other=0.0)
        of_group = next_group.to(tl.int64) * out
        next_scale = tl.load(scale + of_group + row, mask=real, other=1.0)
        next_zero = tl.load(zero_point + of_group + row, mask=real, other=0.0)
        next_group = tl.load(group + tl.minimum(c + 2, n - 1))

        u = tl.load(before + c * COLUMNS + channel)
        x -= tl.sum(u[:, None] * d, 0)
        steps = tl.div_rn(x, s)
        code = _nearest(steps + z) if ROUND_SUM else _nearest(steps) + z
        code = tl.minimum(tl.maximum(code, 0.0), TOP)
        missing = x - (code - z) * s
        pivot = tl.load(pivots + c)
        if limit is not None:
            error = tl.div_rn(missing, pivot)
            kept = tl.where(error * error > most, missing, 0.0).to(tl.float16)
            tl.store(corrections + c * codes_stride + row, kept, mask=real)
            missing -= kept.to(tl.float32)
        tl.store(codes + c * codes_stride + row, code.to(tl.uint8), mask=real)
        tl.store(w + c * w_stride + row, tl.div_rn(missing, pivot), mask=real)
        d = tl.where(number[:, None] == step, missing[None, :], d)
        step += 1.0


def launch(
    w: Tensor,
    before: Tensor,
    pivots: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    limit: Tensor | None,
    codes: Tensor,
    corrections: Tensor | None,
    top: int,
    round_sum: bool,
) -> None:
    """`columns.round_columns` by the kernel. before: U_kc / U_kk at [c, k], (n, n). pivots: diag U. Grids: `Levels`."""
    n, out = w.shape
    columns = max(SHORTEST, triton.next_power_of_2(n))
    square = torch.nn.functional.pad(before, (0, columns - n, 0, columns - n)) if n < columns else before
    tensors = (w, square, pivots.contiguous(), scale, zero_point, group, limit, codes, corrections)
    numbers = (n, out, w.stride(0), codes.stride(0), top, round_sum, columns, ROWS)
    start(_columns_kernel, (-(-out // ROWS), 1, 1), tensors, numbers, WARPS)
