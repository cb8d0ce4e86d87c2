"""The pivot itself: the largest activation of every token after every block, as a heat map with a logarithmic scale."""

from matplotlib.colors import LogNorm

from eval.plots.canvas import VANILLA, Output, literal, plt
from eval.plots.subject import Subject, token_name
from intactkv.pivots import hidden_magnitudes

__all__ = ["draw_pivots"]


def draw_pivots(subject: Subject, output: Output) -> None:
    """Draw max |hidden state|, token by layer, of the only sequence of the only arm."""
    (arm,) = subject.arms
    (ids,) = arm.ids
    magnitudes = hidden_magnitudes(arm.model.model, ids, arm.model.new_cache(single_pass=True))
    largest = magnitudes.largest  # (L + 1, T)
    names = [token_name(subject.tokenizer, int(i)) for i in ids]

    figure, axes = plt.subplots(figsize=(max(6.0, 0.2 * len(ids) + 2.0), 5.2))
    image = axes.pcolormesh(largest.numpy(), norm=LogNorm(), cmap="viridis", rasterized=True)
    pivots = magnitudes.pivots()
    axes.set_xticks([i + 0.5 for i in range(len(ids))], map(literal, names), rotation=90, fontsize=6.5)
    for i, tick in enumerate(axes.get_xticklabels()):
        if i in pivots:
            tick.set_color(VANILLA)
            tick.set_fontweight("bold")
    axes.set_yticks([i + 0.5 for i in range(0, len(largest), 5)], [str(i) for i in range(0, len(largest), 5)])
    axes.set_ylabel("output of block (0: embeddings)")
    axes.set_xlabel("token; pivots (over 100 and over 1000 × the layer's median) in bold")
    axes.set_title(
        f"{subject.caption}: largest |activation| per token and layer,\nup to {largest.max():,.0f}; pivots at "
        f"{', '.join(map(str, pivots)) or 'no position'}",
        fontsize=9,
    )
    figure.colorbar(image, label="max over channels of |hidden state|")
    output.save(
        figure,
        ("layer", "median", *(f"{position}: {name}" for position, name in enumerate(names))),
        [
            (layer, f"{median:.6g}", *(f"{x:.6g}" for x in row))
            for layer, (median, row) in enumerate(zip(magnitudes.median.tolist(), largest.tolist(), strict=True))
        ],
    )
