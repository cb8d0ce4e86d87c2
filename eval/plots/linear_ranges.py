"""PrefixQuant's ranges: the largest, median and smallest token-wise maxima of a linear's input or output, by layer.

    M_t = max_c |X_tc|;  per sequence and layer the largest, 2nd, 3rd, median, smallest M_t; mean over sequences

Inputs show tokens far above the median (upper outliers); queries, keys and values show tokens far below it (lower
outliers). Departs from the published code: the outputs are outputs, Q and K after RoPE unless `pre_rope` (there the
inputs of their linears were drawn), and a division by zero is guarded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corpora.errors import UserError
from eval.plots.canvas import BEHIND, GREY, INTACT, ORANGE, VANILLA, Output, plt
from eval.plots.subject import Arm, Subject
from intactkv.observe import Site, input_sites, output_sites, token_maxima
from intactkv.pivots import EPS

__all__ = ["INPUT_LINES", "OUTPUT_LINES", "draw_linear_inputs", "draw_linear_outputs", "token_ranges"]

INPUT_LINES = ("Top-1", "Top-2", "Top-3", "Median", "Min-1")
OUTPUT_LINES = ("Max", "Median", "Min-3", "Min-2", "Min-1")
INPUT_RATIO = 10.0  # PrefixQuant calls a ratio above it red
OUTPUT_RATIO = 5.0
# Colour and marker; a line of one name looks the same for inputs and outputs.
STYLES = {
    **dict.fromkeys(("Top-1", "Max"), (INTACT, "o")),
    **dict.fromkeys(("Top-2", "Min-2"), (ORANGE, "s")),
    **dict.fromkeys(("Top-3", "Min-3"), (BEHIND, "D")),
    "Median": (GREY, "^"),
    "Min-1": (VANILLA, "v"),
}


def token_ranges(maxima: Tensor) -> dict[str, Tensor]:
    """Order statistics over tokens, mean over sequences, by the names of INPUT_LINES and OUTPUT_LINES: (L,) each.

    maxima: (L, N, T), T ≥ 3. The median is the lower of two.
    """
    ascending = maxima.float().sort(dim=-1).values
    places = {"Top-1": -1, "Top-2": -2, "Top-3": -3, "Median": (maxima.shape[-1] - 1) // 2, "Min-1": 0, "Min-2": 1,
              "Min-3": 2, "Max": -1}  # fmt: skip
    return {name: ascending[..., place].mean(dim=-1) for name, place in places.items()}


def draw_linear_inputs(subject: Subject, log: bool, output: Output) -> None:
    """The inputs of a block's linears: all in one figure, and one figure each."""
    _draw("inputs of linears", subject, input_sites(subject.architecture), INPUT_LINES, INPUT_RATIO, log, output)


def draw_linear_outputs(subject: Subject, pre_rope: bool, log: bool, output: Output) -> None:
    """Queries, keys and values: all in one figure, and one figure each."""
    sites = output_sites(subject.architecture, pre_rope)
    _draw("outputs of linears", subject, sites, OUTPUT_LINES, OUTPUT_RATIO, log, output)


def _draw(
    what: str, subject: Subject, sites: Sequence[Site], lines: Sequence[str], limit: float, log: bool, output: Output
) -> None:
    """Raises UserError for sequences without three tokens."""
    if (tokens := min(arm.ids.shape[1] for arm in subject.arms)) < 3:
        raise UserError(
            f"{tokens} tokens of a sequence are shown, and a third largest needs at least 3; give more with --tokens"
        )
    with subject.progress(what, 1 + len(sites)) as bar:
        ranges: list[dict[str, dict[str, Tensor]]] = []
        for arm in subject.arms:
            maxima = token_maxima(arm.model, arm.ids, sites, advance=bar.update)
            ranges.append({name: token_ranges(values) for name, values in maxima.items()})
        for part, chosen in [("", sites), *((site.name, (site,)) for site in sites)]:
            _figure(subject, chosen, ranges, lines, limit, log, output, part)
            bar.update()


def _figure(
    subject: Subject, sites: Sequence[Site], ranges: Sequence[dict[str, dict[str, Tensor]]], lines: Sequence[str],
    limit: float, log: bool, output: Output, part: str,
) -> None:  # fmt: skip
    """Rows: arms; columns: sites. Every panel has its own scale, since an arm may be a thousandth of the other."""
    arms = subject.arms
    size = (3.4 * len(sites) + 0.6, 3.1 * len(arms) + 0.9) if len(sites) > 1 else (5.2, 3.4 * len(arms) + 0.7)
    figure, panels = plt.subplots(len(arms), len(sites), figsize=size, squeeze=False, layout="constrained")
    rows: list[tuple[Any, ...]] = []
    for arm, found, row in zip(arms, ranges, panels, strict=True):
        for site, axes in zip(sites, row, strict=True):
            _panel(axes, arm, site, found[site.name], lines, limit, log)
            rows += [
                (arm.label, site.name, name, block, f"{value:.6g}")
                for name in lines
                for block, value in enumerate(found[site.name][name].tolist())
            ]
        row[0].set_ylabel("token-wise maximum |x|" + (" (log scale)" if log else ""))
    for axes in panels[-1]:
        axes.set_xlabel("block")
    figure.legend(*panels[0][0].get_legend_handles_labels(), ncols=len(lines), loc="outside lower center",
                  frameon=False, fontsize=8)  # fmt: skip
    scales = "; every panel has its own scale" if len(arms) > 1 else ""
    figure.suptitle(f"{subject.caption}{scales}", fontsize=9)
    output.save(figure, ("prefix", "tensor", "line", "block", "maximum"), rows, part=part)


def _panel(
    axes: Any, arm: Arm, site: Site, found: dict[str, Tensor], lines: Sequence[str], limit: float, log: bool
) -> None:
    blocks = range(len(found["Median"]))
    for name in lines:
        colour, marker = STYLES[name]
        axes.plot(blocks, found[name].numpy(), color=colour, marker=marker, markersize=2.8, linewidth=1.1, label=name)
    axes.set_xticks(sorted({0, *(max(1, len(blocks) * quarter // 4) - 1 for quarter in (1, 2, 3, 4))}))
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{arm.title}\n{site.label}" if arm.title else site.label, fontsize=8.5, pad=27)
    top, median, least = found[lines[0]], found["Median"], found["Min-1"]
    for height, name, over, under in (
        (1.085, f"{lines[0]} / Median", top, median),
        (1.015, "Median / Min-1", median, least),
    ):
        ratio = float(torch.max(over / under.clamp_min(EPS)))
        shown = f"{ratio:,.0f}" if ratio > 100 else f"{ratio:.1f}"
        above = ratio > limit
        axes.text(0.5, height, f"largest {name} = {shown} ({'above' if above else 'within'} {limit:g})",
                  transform=axes.transAxes, ha="center", va="bottom", fontsize=7.5,
                  color=VANILLA if above else BEHIND, fontweight="bold" if above else "normal")  # fmt: skip
