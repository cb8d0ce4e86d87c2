"""IntactKV's comparison of pivot and other tokens: how large and how spread keys (before RoPE) and values are.

    max |x|  and  the standard deviation of x  over the channels of a token, mean over tokens, then over layers

Keys and values of pivot tokens are smaller and smoother (2403.01241, section 3): cheap to keep exact, and hurt by a
range that they share with others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corpora.errors import UserError
from corpora.json_files import write_json
from eval.plots.activations import pivots_of
from eval.plots.canvas import INTACT, VANILLA, Output, literal, plt
from eval.plots.subject import Subject, token_name
from eval.tables.render import Figure, Table
from intactkv.observe import Site, observe
from intactkv.pivots import EPS

__all__ = ["STATISTICS", "Smoothness", "draw_kv_smoothness", "smoothness"]

STATISTICS = ("largest magnitude", "standard deviation")


@dataclass(frozen=True, eq=False)
class Smoothness:
    """Means over tokens, layer by layer. pivots, others: (L,)."""

    pivots: Tensor
    others: Tensor

    @property
    def ratio(self) -> float:
        """Pivots over others, of the means over layers."""
        return float(self.pivots.mean() / self.others.mean().clamp_min(EPS))


def smoothness(values: Tensor, pivot: Tensor) -> Smoothness:
    """values: (L, N, T), a statistic of every token. pivot: (N, T) bool, with both kinds of tokens in it."""
    return Smoothness(values[:, pivot].mean(dim=-1), values[:, ~pivot].mean(dim=-1))


def draw_kv_smoothness(subject: Subject, output: Output) -> Table:
    """Write the figure, its CSV, and the means over layers as JSON; return these means as a table.

    Raises UserError if the text has no pivot token, or nothing else.
    """
    (arm,) = subject.arms
    sites = (Site("K", "K", subject.architecture.key), Site("V", "V", subject.architecture.value))
    blocks = len(subject.architecture.blocks_of(arm.model.model))
    found = {(site.name, name): torch.zeros(blocks, *arm.ids.shape) for site in sites for name in STATISTICS}

    def look(site: Site, layer: int, row: int, x: Tensor) -> None:
        rows = slice(row, row + len(x))
        found[site.name, STATISTICS[0]][layer, rows] = x.float().abs().amax(dim=-1).cpu()
        found[site.name, STATISTICS[1]][layer, rows] = x.float().std(dim=-1).cpu()

    with subject.progress("keys and values", len(arm.ids)) as bar:
        observe(arm.model, arm.ids, sites, look, advance=bar.update)
        pivot = torch.zeros(arm.ids.shape, dtype=torch.bool)
        for row in range(len(arm.ids)):
            pivot[row, pivots_of(arm, row)] = True
            bar.update()
    if not bool(pivot.any()) or bool(pivot.all()):
        raise UserError(
            f"{subject.caption}: {int(pivot.sum())} of {pivot.numel()} tokens are pivot tokens, so there is nothing to "
            "compare; use a text of ordinary tokens with a pivot token in it"
        )
    means = {name: smoothness(values, pivot) for name, values in found.items()}
    pivots = _pivot_names(subject, arm.ids, pivot)
    _draw(subject.caption, pivots, means, output)
    record = {
        "caption": subject.caption,
        "pivots": [{"position": position, "token": token} for position, token in pivots],
        "means_over_layers": [
            {"tensor": tensor, "statistic": name, "pivots": float(m.pivots.mean()), "others": float(m.others.mean()),
             "ratio": m.ratio}
            for (tensor, name), m in means.items()
        ],
    }  # fmt: skip
    write_json(path := output.path("", "json"), record)
    output.written.append(path)
    places = ", ".join(f"{position} ({token})" for position, token in pivots)
    return Table(
        caption=f"{subject.caption}: means over tokens and blocks; pivot tokens at {places}",
        head=("tensor", "over channels", "pivot tokens", "other tokens", "ratio"),
        rows=tuple(
            (tensor, name, Figure(float(m.pivots.mean())), Figure(float(m.others.mean())), Figure(m.ratio))
            for (tensor, name), m in means.items()
        ),
        words=2,
    )


def _pivot_names(subject: Subject, ids: Tensor, pivot: Tensor) -> list[tuple[int, str]]:
    """Positions of pivot tokens and the tokens there, each pair once."""
    places = {(int(t), int(ids[n, t])) for n, t in pivot.nonzero()}
    return [(position, token_name(subject.tokenizer, token)) for position, token in sorted(places)]


def _draw(
    caption: str, pivots: Sequence[tuple[int, str]], means: Mapping[tuple[str, str], Smoothness], output: Output
) -> None:
    figure, panels = plt.subplots(1, len(means), figsize=(3.3 * len(means), 3.4), layout="constrained")
    rows: list[tuple[Any, ...]] = []
    for axes, ((tensor, name), m) in zip(panels, means.items(), strict=True):
        axes.plot(m.pivots.numpy(), color=VANILLA, marker="o", markersize=3, linewidth=1.2, label="pivot tokens")
        axes.plot(m.others.numpy(), color=INTACT, marker="s", markersize=3, linewidth=1.2, label="other tokens")
        axes.set_title(f"{tensor}: {name}\npivots / others: {m.ratio:.2f}", fontsize=9)
        axes.set_xlabel("block")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        rows += [
            (tensor, name, block, f"{p:.6g}", f"{o:.6g}")
            for block, (p, o) in enumerate(zip(m.pivots.tolist(), m.others.tolist(), strict=True))
        ]
    panels[0].set_ylabel("mean over tokens")
    figure.legend(
        *panels[0].get_legend_handles_labels(), ncols=2, loc="outside lower center", frameon=False, fontsize=8
    )
    named = ", ".join(f"{position} ({literal(token)})" for position, token in pivots[:6]) + " …" * (len(pivots) > 6)
    figure.suptitle(f"{caption}\nover the channels of a token; pivot tokens at {named}",
                    fontsize=9)  # fmt: skip
    output.save(figure, ("tensor", "statistic", "block", "pivots", "others"), rows)
