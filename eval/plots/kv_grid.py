"""Keys and values of a layer over tokens and channels, and the error that a KV policy makes of them.

left: |x| in full precision;  right: |x̂ − x| of what the policy keeps, with the newest tokens that it leaves exact
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from corpora.errors import UserError
from eval.plots.canvas import Output, plt
from eval.plots.subject import Arm, Subject
from intactkv.attach import attach
from intactkv.cache import IntactLayer

__all__ = ["draw_kv_grid"]


def draw_kv_grid(subject: Subject, layers: Sequence[int], output: Output) -> None:
    """A figure per layer: keys above values; for every arm its magnitudes and errors, of the first sequence.

    Channels of all KV heads side by side. The intact prefix is drawn, too: its error is 0. Raises UserError without a
    KV policy.
    """
    if subject.arms[0].model.kv is None:
        raise UserError("the KV cache has full precision, so there is no error to draw; add --kv NAME and --kv-bits N")
    with subject.progress("keys and values", len(layers)) as bar:
        found = [_keys_and_errors(arm, layers, bar.update) for arm in subject.arms]
        for number, layer in enumerate(layers):
            _draw(subject, layer, [panels[number] for panels in found], output)
            bar.update()


Panel = tuple[Tensor, Tensor]  # magnitudes and errors, (tokens, channels) each


def _keys_and_errors(arm: Arm, layers: Sequence[int], advance: object) -> list[tuple[Panel, Panel]]:
    """Of every layer, keys and values: each what full precision holds, and how far the policy's is from it."""
    intact = arm.model
    plain = attach(intact.model, intact.prefix)
    cache = plain.new_cache()
    with torch.inference_mode():
        plain.feed(arm.ids[:1].to(intact.model.device), cache=cache)
        found = []
        for layer in layers:
            rounding = intact.new_cache().intact_layers[layer]
            exact = cache.intact_layers[layer].held
            if not isinstance(rounding, IntactLayer):
                raise UserError(f"layer {layer} attends to a window; choose --layers with full attention")
            length = intact.prefix_length
            rounding.update(*(x[:, :, length:] for x in exact))
            found.append(tuple(_panel(x, held) for x, held in zip(exact, rounding.held, strict=True)))
    if callable(advance):
        advance()
    return [(keys, values) for keys, values in found]


def _panel(exact: Tensor, held: Tensor) -> Panel:
    x, rounded = (states[0].transpose(0, 1).flatten(1).float().cpu() for states in (exact, held))
    return x.abs(), (rounded - x).abs()


def _draw(subject: Subject, layer: int, arms: Sequence[tuple[Panel, Panel]], output: Output) -> None:
    columns = 1 + len(arms)
    figure, axes = plt.subplots(2, columns, figsize=(3.4 * columns, 5.6), layout="constrained", squeeze=False)
    rows = []
    for line, name in enumerate(("keys, after RoPE", "values")):
        magnitudes = arms[0][line][0]
        largest = max(float(errors.max()) for _, errors in (arm[line] for arm in arms)) or 1.0
        panels = [(f"|{name}|", magnitudes, float(magnitudes.max()))]
        for arm, (_, errors) in zip(subject.arms, (a[line] for a in arms), strict=True):
            rounded = errors[errors.any(dim=1)]  # tokens that stay exact are in no mean
            mean = float(rounded.mean()) if len(rounded) else 0.0
            title = f"|error| {arm.title}\nof {len(rounded)} rounded tokens: mean {mean:.3g}"
            panels.append((title, errors, largest))
            rows += [
                (name, arm.label, channel, f"{float(m):.6g}", f"{float(e):.6g}")
                for channel, (m, e) in enumerate(zip(arms[0][line][0].mean(0), rounded.mean(0), strict=True))
            ]
        for place, (title, x, top) in zip(axes[line], panels, strict=True):
            drawn = place.imshow(x.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
            place.set_title(title, fontsize=8)
            place.tick_params(labelsize=7)
            figure.colorbar(drawn, ax=place, shrink=0.85).ax.tick_params(labelsize=7)
        axes[line][0].set_ylabel("token", fontsize=8)
    for place in axes[1]:
        place.set_xlabel("channel of all KV heads", fontsize=8)
    figure.suptitle(f"{subject.caption}, block {layer}", fontsize=9)
    output.save(figure, ("tensor", "prefix", "channel", "mean magnitude", "mean error"), rows, part=f"layer{layer}")
