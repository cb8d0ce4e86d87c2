"""IntactKV's activation surface: |output| of decoder blocks over token and channel, the pivot tokens marked.

Figure 1 of 2403.01241: a flat plane with a spike of hundreds to thousands at each pivot token, in a few fixed channels.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from eval.plots.canvas import Output, literal
from eval.plots.subject import Arm, Subject, token_name
from eval.plots.surfaces import Surface, View, draw_surfaces, surface_of
from intactkv.observe import BLOCK_OUTPUT, Site, observe
from intactkv.pivots import hidden_magnitudes

__all__ = ["draw_activations", "pivots_of"]

PUBLISHED_VIEW = View(elevation=30.0, azimuth=-60.0)


def pivots_of(arm: Arm, row: int = 0) -> list[int]:
    """Positions of the pivot tokens among the fed tokens of one sequence, the prefix counted."""
    found = hidden_magnitudes(arm.model.model, arm.ids[row], arm.model.new_cache(single_pass=True))
    return [arm.start + i for i in found.pivots()]


def draw_activations(subject: Subject, layers: Sequence[int], log: bool, output: Output) -> None:
    """A figure per layer, a surface per arm, of the first sequence."""
    with subject.progress("activations", len(layers)) as bar:
        panels: dict[int, list[tuple[Arm, Surface]]] = {layer: [] for layer in layers}
        spots = []
        for arm in subject.arms:

            def look(_site: Site, layer: int, _row: int, x: Tensor, arm: Arm = arm) -> None:
                panels[layer].append((arm, surface_of(x[0])))

            observe(arm.model, arm.ids[:1], (BLOCK_OUTPUT,), look, layers=layers, advance=bar.update)
            spots.append([(i, _name(subject, arm, i)) for i in pivots_of(arm)])
        marked = "pivot tokens named" if any(spots) else "no pivot tokens found"
        for layer in layers:
            title = f"{subject.caption}\n|{BLOCK_OUTPUT.label}|, block {layer}; {marked}"
            draw_surfaces(panels[layer], title, replace(PUBLISHED_VIEW, log=log), output, f"layer{layer}", spots)
            bar.update()


def _name(subject: Subject, arm: Arm, position: int) -> str:
    """A pivot's position and token."""
    return f"{position}: {literal(token_name(subject.tokenizer, int(arm.ids[0, position - arm.start])))}"
