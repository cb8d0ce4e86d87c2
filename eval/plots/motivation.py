"""IntactKV's motivation curve: loss of the last block against the size of the prefix, pivot tokens marked."""

from collections.abc import Sequence

from torch import Tensor

from eval.plots.canvas import INTACT, VANILLA, Output, literal, plt

__all__ = ["draw_motivation"]


def draw_motivation(losses: Tensor, tokens: Sequence[str], pivots: Sequence[int], caption: str, output: Output) -> None:
    """losses: (P + 1, L). tokens: the prefix's, in words. pivots: positions of pivot tokens among them."""
    last = losses[:, -1]
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    axes.plot(range(len(last)), last.numpy(), color=INTACT, marker="o", markersize=4, linewidth=2)
    for position in pivots:
        axes.axvline(position + 1, color=VANILLA, linewidth=1, linestyle="--")
        axes.annotate(
            literal(f"{tokens[position]} taken in"), (position + 1, float(last.max())), xytext=(5, 0),
            textcoords="offset points", fontsize=9, color=VANILLA, va="top",
        )  # fmt: skip
    sizes = sorted({0, len(last) - 1, *(position + 1 for position in pivots)})
    axes.set_xticks(sizes)
    axes.grid(alpha=0.3)
    axes.set_xlabel("size of IntactKV (tokens of the prefix)")
    axes.set_ylabel("loss of the last block, ½ · mean square")
    axes.set_title(caption, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    head = ("size", "token taken in", "pivot", "loss of the last block", "sum over blocks")
    rows = [
        (m, tokens[m - 1] if m else "", int(m - 1 in pivots), f"{last[m]:.8g}", f"{losses[m].sum():.8g}")
        for m in range(len(last))
    ]
    output.save(figure, head, rows)
