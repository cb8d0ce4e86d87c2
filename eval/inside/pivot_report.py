"""Pivot report: which tokens hold massive activations (Sun et al. 2024, 2402.17762), and what they take for themselves.

    attention mass     Σ over earlier pivots of a query's attention weight; mean over heads and the queries that are no
                       pivots and stand behind one (attention sinks: Xiao et al. 2024, 2309.17453)
    Hessian share      Σ ‖x‖² of the pivots / Σ ‖x‖² of all tokens, per set of linears that read x: their share of tr H
    K, V norm          mean over KV heads of the length of a pivot's key (after RoPE) and value; the same of the others

The model computes all tokens itself, prefix tokens included, and its cache is full precision.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from eval.inside.analysis import position_share
from intactkv.architecture import architecture_of
from intactkv.cache import IntactCache
from intactkv.observe import after, eager_attention, hooked, on_input, on_output
from intactkv.pivots import MASSIVE, MASSIVE_RATIO, Magnitudes, hidden_magnitudes

__all__ = ["pivot_report"]


@torch.inference_mode()
def pivot_report(
    model: PreTrainedModel, texts: Tensor, report: Callable[[], Any] = lambda: None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pivots of some texts, and what they take in every layer. texts: (N, T) ids, leading tokens included.

    Returns rows of window, position, token (its id), layers and channels where massive, largest (signed), layer and
    channel of it, ratio (to that layer's median), attention_mass (its own, mean over layers and all later queries);
    layer l is the hidden state behind l blocks, 0 the embeddings. And rows of block (from 0), attention_mass (of all
    pivots together), hessian_share_{linear} (of all texts' trace), k_pivots, k_rest, v_pivots, v_rest: masses and norms
    are means over the texts that hold pivots, nan if none does.
    Memory: one layer's attention weights (heads, T, T), one text's cache and residual stream.
    """
    magnitudes = [hidden_magnitudes(model, text) for text in texts]
    positions = [found.pivots() for found in magnitudes]
    shares = position_share(model, texts, positions)
    tokens, passes = [], []
    with eager_attention(model):
        for window, (text, found) in enumerate(zip(texts, magnitudes, strict=True)):
            looked = _Pass(model, text, positions[window])
            passes += [looked] if positions[window] else []
            tokens += [{"window": window, **row} for row in looked.pivots(text, found)]
            report()
    layers = []
    for block in range(len(architecture_of(model.config).blocks_of(model))):
        means = [torch.tensor([looked.mass[block], *looked.norms[block]]) for looked in passes]
        mass, *norms = torch.stack(means).mean(dim=0).tolist() if means else [float("nan")] * 5
        row = {"block": block, "attention_mass": mass}
        row |= {f"hessian_share_{name}": float(share[block]) for name, share in shares.items()}
        layers.append(row | dict(zip(("k_pivots", "k_rest", "v_pivots", "v_rest"), norms, strict=True)))
    return tokens, layers


class _Pass:
    """One text through a model with eager attention, reduced layer by layer.

    mass: per block, of all pivots together. own_mass: (blocks, pivots). norms: per block K and V of pivots and others.
    states: (blocks + 1, pivots, hidden size), the residual stream at the pivots.
    """

    def __init__(self, model: PreTrainedModel, text: Tensor, positions: list[int]):
        architecture = architecture_of(model.config)
        blocks = architecture.blocks_of(model)
        self.positions = torch.tensor(positions, dtype=torch.long)
        self.mass: list[float] = []
        self.own_mass: list[Tensor] = []
        states: list[Tensor] = []

        def keep(x: Tensor) -> None:
            states.append(x[0, positions])

        def hooks() -> Iterator[RemovableHandle]:
            yield on_input(blocks[0], keep)
            for block in blocks:
                yield on_output(block, keep)
                attention = block.get_submodule(architecture.attention)
                yield after(attention, lambda _args, _keywords, out: self._attention(out[1][0]))

        cache = IntactCache(model.config)
        with hooked(hooks()):
            decoder = model.get_submodule(architecture.decoder)
            decoder(input_ids=text[None].to(model.device), past_key_values=cache, use_cache=True)
        self.states = torch.stack(states).float().cpu()
        self.norms = [self._norms(*layer.held) for layer in cache.intact_layers]

    def _attention(self, weights: Tensor) -> None:
        """weights: (heads, T, T), rows are queries. Causal: a query's weight on a later pivot is 0."""
        onto = weights.mean(dim=0)[:, self.positions].double().cpu()  # (T, pivots)
        queries = torch.arange(len(onto))
        behind = (queries > self.positions.min()) if len(self.positions) else queries < 0
        behind[self.positions] = False
        self.mass.append(float(onto[behind].sum(-1).mean()))
        self.own_mass.append(torch.stack([onto[p + 1 :, i].mean() for i, p in enumerate(self.positions.tolist())])
                             if len(self.positions) else torch.empty(0))  # fmt: skip

    def _norms(self, keys: Tensor, values: Tensor) -> list[float]:
        """keys, values: (1, KV heads, T, D)."""
        figures = []
        for states in (keys, values):
            lengths = states[0].double().norm(dim=-1).mean(dim=0).cpu()  # (T,)
            pivot = torch.zeros(len(lengths), dtype=torch.bool)
            pivot[self.positions] = True
            figures += [float(lengths[pivot].mean()), float(lengths[~pivot].mean())]
        return figures

    def pivots(self, text: Tensor, magnitudes: Magnitudes) -> Iterator[dict[str, Any]]:
        """One row per pivot."""
        least = (magnitudes.median * MASSIVE_RATIO).clamp_min(MASSIVE)  # (L + 1,)
        for i, position in enumerate(self.positions.tolist()):
            states = self.states[:, i]
            massive = states.abs() > least[:, None]  # (L + 1, channels)
            layer, channel = divmod(int(states.abs().argmax()), states.shape[1])
            yield {
                "position": position,
                "token": int(text[position]),
                "layers": massive.any(dim=1).nonzero().flatten().tolist(),
                "channels": massive.any(dim=0).nonzero().flatten().tolist(),
                "largest": float(states[layer, channel]),
                "layer": layer,
                "channel": channel,
                "ratio": float(states[layer, channel].abs() / magnitudes.median[layer]),
                "attention_mass": float(torch.stack([mass[i] for mass in self.own_mass]).mean()),
            }
