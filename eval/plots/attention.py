"""IntactKV's attention map: probabilities of a layer summed over heads, query by key, the pivot tokens marked.

Figure 2 of 2403.01241: all queries look at the pivot tokens. Summed over heads a row sums to their number, which is the
end of the colour scale; the sum is averaged over the sequences. Keys of an intact prefix are shown too: they are what
the text attends to.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from eval.plots.activations import pivots_of
from eval.plots.canvas import INTACT, VANILLA, Output, plt
from eval.plots.subject import Arm, Subject
from intactkv.observe import attention_mass

__all__ = ["draw_attention"]


def draw_attention(subject: Subject, layers: Sequence[int], output: Output) -> None:
    """A figure per layer, a map per arm."""
    with subject.progress("attention", len(layers)) as bar:
        maps = [attention_mass(arm.model, arm.ids, layers, advance=bar.update) for arm in subject.arms]
        pivots = [
            sorted({position for row in range(len(arm.ids)) for position in pivots_of(arm, row)})
            for arm in subject.arms
        ]
        heads = int(subject.arms[0].model.model.config.get_text_config(decoder=True).num_attention_heads)
        for layer in layers:
            figure, panels = plt.subplots(
                1, len(maps), figsize=(5.6 * len(maps) + 0.8, 5.2), squeeze=False, layout="constrained"
            )
            for axes, arm, masses, found in zip(panels[0], subject.arms, maps, pivots, strict=True):
                image = _draw_map(axes, arm, masses[layer], heads, found)
            figure.colorbar(image, ax=list(panels[0]), label=f"attention, summed over {heads} heads", shrink=0.85)
            figure.suptitle(f"{subject.caption}\nattention of block {layer}", fontsize=10)
            output.save(figure, ("prefix", "query", "key", "attention"), _rows(subject.arms, maps, layer),
                        part=f"layer{layer}")  # fmt: skip
            bar.update()


def _draw_map(axes: Any, arm: Arm, mass: Tensor, heads: int, pivots: list[int]) -> Any:
    """One map of (T, P + T) masses; what lies in a query's future is blank."""
    queries, keys = mass.shape
    future = np.arange(keys)[None] > np.arange(arm.start, arm.start + queries)[:, None]
    colours = plt.get_cmap("coolwarm").with_extremes(bad="0.8")
    edges = (-0.5, keys - 0.5, arm.start + queries - 0.5, arm.start - 0.5)
    image = axes.imshow(
        np.ma.masked_where(future, mass.numpy()), cmap=colours, vmin=0, vmax=heads, extent=edges, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    marks = [("pivot token", VANILLA, pivots), ("intact prefix", INTACT, list(range(arm.start)))]
    for label, colour, places in marks:
        if places:
            top = axes.get_xaxis_transform()
            axes.plot(places, [1.015] * len(places), "v", color=colour, markersize=6, clip_on=False, transform=top,
                      label=f"{label}: {_listed(places)}")  # fmt: skip
    if arm.prompt is not None:
        axes.axvline(arm.prompt - 0.5, color="red", linestyle="--", linewidth=1.2, label="end of the system prompt")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="upper right", facecolor="0.93", framealpha=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("key (position)")
    axes.set_ylabel("query (position)")
    marked = sorted({place for _, _, places in marks for place in places})
    share = f"{100 * float(mass[:, marked].sum(dim=-1).mean()) / heads:.0f} % of the attention goes to what is marked"
    axes.set_title("\n".join(line for line in (arm.title, share if marked else "") if line), fontsize=9, pad=12)
    return image


def _listed(places: list[int]) -> str:
    """Positions in words, a run of them by its ends."""
    if len(places) > 3:
        return f"{places[0]} … {places[-1]}"
    return ", ".join(map(str, places))


def _rows(arms: Sequence[Arm], maps: Sequence[dict[int, Tensor]], layer: int) -> list[tuple[str, int, int, str]]:
    """Every query and the keys it may see, by position."""
    return [
        (arm.label, arm.start + query, key, f"{value:.6g}")
        for arm, masses in zip(arms, maps, strict=True)
        for query, line in enumerate(masses[layer].tolist())
        for key, value in enumerate(line[: arm.start + query + 1])
    ]
