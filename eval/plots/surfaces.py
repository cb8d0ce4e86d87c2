"""Magnitudes over token and channel as a 3-D surface: PrefixQuant's inputs of linears and outputs of blocks.

A surface of T × 11008 cells takes minutes to draw, so neighbouring tokens and channels are merged to at most 256 × 256
by their largest value: no spike is lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from eval.plots.canvas import Output, plt
from eval.plots.subject import Arm, Subject
from intactkv.observe import BLOCK_OUTPUT, Site, down_input, head_input, input_sites, observe

__all__ = ["Surface", "View", "draw_block_outputs", "draw_layer_inputs", "draw_surfaces", "surface_of"]

MOST = 256  # cells of an axis


@dataclass(frozen=True)
class View:
    """Where the eye stands, in degrees, and whether heights are logarithmic."""

    elevation: float = 20.0  # PrefixQuant's
    azimuth: float = -45.0
    log: bool = False


@dataclass(frozen=True, eq=False)
class Surface:
    """Largest |value| of blocks of neighbouring tokens and channels. heights: (r, c). token_step, channel_step: size of
    a block. tokens, channels: how many there were. peak: position in the text and channel of the largest value."""

    heights: Tensor
    token_step: int
    channel_step: int
    tokens: int
    channels: int
    peak: tuple[int, int]


def surface_of(x: Tensor, most: int = MOST) -> Surface:
    """|x| reduced to at most `most` × `most` cells by block maxima. x: (T, C), any float dtype."""
    magnitude = x.float().abs().cpu()
    steps = [-(-size // most) for size in magnitude.shape]
    heights = torch.nn.functional.max_pool2d(magnitude[None, None], (steps[0], steps[1]), ceil_mode=True)[0, 0]
    top = divmod(int(magnitude.argmax()), magnitude.shape[1])
    return Surface(heights, steps[0], steps[1], magnitude.shape[0], magnitude.shape[1], top)


def draw_surfaces(
    panels: Sequence[tuple[Arm, Surface]], title: str, view: View, output: Output, part: str,
    spots: Sequence[Sequence[tuple[int, str]]] = (),
) -> None:  # fmt: skip
    """One figure: a surface per arm, on one scale, with the numbers as CSV (rows tokens, columns channels).

    spots: for every arm, positions to mark at the height of their largest value, and what to write there.
    """
    lowest = min(float(s.heights[s.heights > 0].min()) if bool((s.heights > 0).any()) else 1.0 for _, s in panels)
    highest = max(float(s.heights.max()) for _, s in panels)
    lift = (lambda z: np.log10(np.maximum(z, lowest))) if view.log else np.asarray
    norm = Normalize(float(lift(lowest)) if view.log else 0.0, float(lift(max(highest, lowest))))
    figure = plt.figure(figsize=(6.4 * len(panels), 5.2))
    for number, (arm, surface) in enumerate(panels):
        axes: Any = figure.add_subplot(1, len(panels), number + 1, projection="3d", computed_zorder=False)
        x = surface.channel_step * np.arange(surface.heights.shape[1])
        y = arm.start + surface.token_step * np.arange(surface.heights.shape[0])
        z = lift(surface.heights.numpy())
        grid = np.meshgrid(x, y)
        # matplotlib would colour a face by the mean of its corners, and a spike one channel wide would look flat.
        colours = plt.get_cmap("coolwarm")(norm(_faces(z)))
        shown = axes.plot_surface(
            *grid, z, facecolors=colours, shade=False, rcount=MOST, ccount=MOST, linewidth=0.5, antialiased=False
        )
        shown.set_rasterized(True)
        if arm.prompt is not None:
            floor = [float(norm.vmin or 0)] * 2
            axes.plot([0, surface.channels - 1], [arm.prompt] * 2, floor, color="red", linestyle="--", linewidth=1.2,
                      label="end of the system prompt", zorder=3)  # fmt: skip
            axes.legend(frameon=False, fontsize=8, loc="lower left")
        for position, words in spots[number] if spots else ():
            row = z[(position - arm.start) // surface.token_step]
            behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
            axes.text(x[int(row.argmax())], position, row.max(), f" {words}", fontsize=8, zorder=4, bbox=behind)
        axes.set_zlim(norm.vmin, norm.vmax)
        axes.view_init(view.elevation, view.azimuth)
        axes.set_box_aspect(None, zoom=0.95)
        axes.set_xlabel("channel")
        axes.set_ylabel("token (position)")
        axes.set_zlabel("magnitude" + (" (log scale)" if view.log else ""), labelpad=14)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.tick_params(labelsize=9)
        axes.tick_params(axis="z", pad=7)
        if view.log:
            axes.zaxis.set_major_locator(MaxNLocator(integer=True))
            axes.zaxis.set_major_formatter(FuncFormatter(lambda exponent, _: f"$10^{{{exponent:.0f}}}$"))
        else:
            axes.zaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        token, channel = surface.peak
        largest = _figures(float(surface.heights.max()))
        where = f"largest {largest} at position {arm.start + token}, channel {channel}"
        axes.set_title(f"{arm.title}: {where}" if arm.title else where, fontsize=9, y=0.97)
    figure.subplots_adjust(left=0.02, right=0.94, bottom=0.04, top=0.93, wspace=0.12)
    figure.suptitle(title, fontsize=10, y=1.0)
    output.save(figure, *_table(panels), part=part)


def draw_layer_inputs(subject: Subject, layers: Sequence[int], only_down: bool, log: bool, output: Output) -> None:
    """|input| of every set of linears that reads one tensor, and of the head: a figure per linear and layer.

    only_down: the last linear of the feed-forward part alone. The first sequence of the text is shown.
    """
    sites = (down_input(subject.architecture),) if only_down else input_sites(subject.architecture)
    parts = len(layers) * len(sites) + (not only_down)
    view = View(log=log)
    with subject.progress(f"inputs of {len(sites)} linears", parts) as bar:
        panels = _surfaces(subject, sites, layers, bar.update)
        for site in sites:
            for layer in layers:
                title = f"{subject.caption}\n|{site.label}|, block {layer}"
                draw_surfaces(panels[site.name, layer], title, view, output, f"{site.name}__layer{layer}")
                bar.update()
        if not only_down:
            head = [(arm, surface_of(head_input(arm.model, arm.ids[0]))) for arm in subject.arms]
            name = subject.architecture.head
            draw_surfaces(head, f"{subject.caption}\n|input of {name}|", view, output, name)
            bar.update()


def draw_block_outputs(subject: Subject, layers: Sequence[int], log: bool, output: Output) -> None:
    """|output| of decoder blocks: a figure per layer. The first sequence of the text is shown."""
    with subject.progress("outputs of blocks", len(layers)) as bar:
        panels = _surfaces(subject, (BLOCK_OUTPUT,), layers, bar.update)
        for layer in layers:
            title = f"{subject.caption}\n|{BLOCK_OUTPUT.label}|, block {layer}"
            draw_surfaces(panels[BLOCK_OUTPUT.name, layer], title, View(log=log), output, f"layer{layer}")
            bar.update()


def _surfaces(
    subject: Subject, sites: Sequence[Site], layers: Sequence[int], advance: Any
) -> dict[tuple[str, int], list[tuple[Arm, Surface]]]:
    """The surfaces of the first sequence by site and layer, one per arm."""
    found: dict[tuple[str, int], list[tuple[Arm, Surface]]] = {}
    for arm in subject.arms:

        def look(site: Site, layer: int, _row: int, x: Tensor, arm: Arm = arm) -> None:
            found.setdefault((site.name, layer), []).append((arm, surface_of(x[0])))

        observe(arm.model, arm.ids[:1], sites, look, layers=layers, advance=advance)
    return found


def _table(panels: Sequence[tuple[Arm, Surface]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the CSV. A column is named after its first channel, a row after its first position."""
    surface = panels[0][1]
    head = ["prefix", "position", *(f"channel {surface.channel_step * c}" for c in range(surface.heights.shape[1]))]
    rows = [
        [arm.label, str(arm.start + surface.token_step * r), *(f"{value:.6g}" for value in line)]
        for arm, surface in panels
        for r, line in enumerate(surface.heights.tolist())
    ]
    return head, rows


def _faces(z: Any) -> Any:
    """The largest of the four corners of every face of a surface: (r, c) heights to (r − 1, c − 1)."""
    along = np.maximum(z[:-1], z[1:])
    return np.maximum(along[:, :-1], along[:, 1:])


def _figures(value: float) -> str:
    """A magnitude in about three figures."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
