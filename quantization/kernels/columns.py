"""Round a run of channels one after another, each making up for the errors of those before it, in torch and in Triton.

    x_c = w_c − Σ_{k<c} (U_kc / U_kk) d_k,    q_c = clamp(round(x_c/s) + z, 0, top),    d_c = x_c − s·(q_c − z)
    outlier, where a limit is given: (d_c/U_cc)² > limit; its d_c is stored in half precision, the rest of d_c remains

The left-looking form of GPTQ's inner loop (Frantar et al., 2210.17323, Eq. 2 and 3): a channel is read and written
once, and only the d of earlier ones are summed. Rows of the weight do not depend on each other. Here it is in plain
torch, which says what the kernel of `columns_triton` has to compute; that one runs on CUDA.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantization.kernels.launch import runs_triton

__all__ = ["LONGEST", "Levels", "round_columns"]

LONGEST = 128  # channels of a run: the kernel holds the d of all of them in registers
TILE = 16  # channels that torch rounds between two matrix products; changes the speed only


@dataclass(frozen=True)
class Levels:
    """The grid of every channel of a run.

    scale, zero_point: (groups, out), in the weights' dtype. group: of every channel, (channels,) int32. top: the
    largest code. round_sum: round(x/s + z) instead of round(x/s) + z. limit: of outliers, (out,), or None for none.
    """

    scale: Tensor
    zero_point: Tensor
    group: Tensor
    top: int
    round_sum: bool = False
    limit: Tensor | None = None

    def of(self, first: int, last: int) -> "Levels":
        """Those of some of the channels."""
        return Levels(self.scale, self.zero_point, self.group[first:last], self.top, self.round_sum, self.limit)


def round_columns(
    w: Tensor,
    factor: Tensor,
    levels: Levels,
    codes: Tensor,
    corrections: Tensor | None = None,
    kernel: bool | None = None,
) -> None:
    """Write codes of a run of channels, and the corrections of its outliers; w becomes the errors e_c = d_c / U_cc.

    w: (n, out), n ≤ `LONGEST`, contiguous. factor: U of these channels, (n, n), zeros below its diagonal. codes:
    (n, out) uint8. corrections: (n, out) float16, if `levels` has a limit. kernel: use Triton (w is float32 then);
    none: on CUDA, where it can.
    """
    pivots = factor.diagonal()
    before = factor.triu(1).div_(pivots[:, None]).T.contiguous()  # U_kc / U_kk at [c, k], k < c
    if kernel is None:
        kernel = w.is_cuda and w.dtype == torch.float32 and runs_triton(w.device)
    if kernel:
        from quantization.kernels.columns_triton import launch  # triton is not everywhere

        assert len(w) <= LONGEST, len(w)
        grid = (levels.scale, levels.zero_point, levels.group, levels.limit)
        launch(w, before, pivots, *grid, codes, corrections, levels.top, levels.round_sum)
    else:
        _round_columns(w, before, pivots, levels, codes, corrections)


def _round_columns(
    w: Tensor, before: Tensor, pivots: Tensor, levels: Levels, codes: Tensor, corrections: Tensor | None
) -> None:
    group = levels.group.tolist()
    scale, zero_point = levels.scale.unbind(), levels.zero_point.unbind()
    # clamp(r + z, 0, top) − z is clamp(r, −z, top − z): r is an integer, and so is z, unless it enters the sum.
    lowest, highest = ((x - levels.zero_point).unbind() for x in (0, levels.top))
    steps = torch.empty_like(w)  # q − z
    for first in range(0, len(w), TILE):
        tile = slice(first, first + TILE)
        if first:
            w[tile].addmm_(before[tile, :first], w[:first], alpha=-1)
        all_of_tile = w[
            tile
        ].T  # d of the channels before, weights of the others: those times zero, with no view for it
        rows = zip(group[tile], w[tile].unbind(), steps[tile].unbind(), before[tile, tile].unbind(), strict=True)
        for i, (g, x, q, coefficients) in enumerate(rows):
            if i:
                x.addmv_(all_of_tile, coefficients, alpha=-1)
            torch.div(x, scale[g], out=q)
            if levels.round_sum:
                q.add_(zero_point[g]).round_().clamp_(0, levels.top).sub_(zero_point[g])
            else:
                torch.clamp(q.round_(), lowest[g], highest[g], out=q)
            x.addcmul_(q, scale[g], value=-1)
            if levels.limit is not None and corrections is not None:
                outlier = (x / pivots[first + i]).square_() > levels.limit
                corrections[first + i] = x.where(outlier, 0.0)
                x -= corrections[first + i]
    # Rounded once more: where z has a fraction, q − z + z may be q less a last bit, which uint8 cuts to q − 1.
    codes.copy_(steps.add_(levels.zero_point.index_select(0, levels.group)).round_())
    w.div_(pivots[:, None])
