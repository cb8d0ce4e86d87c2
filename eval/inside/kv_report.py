"""KV report: what attention reads in every layer against what full precision would read there, pivot tokens apart.

    K, V SQNR          keys (after RoPE) and values as the cache holds them, against the twin's on the same tokens
    attention SQNR     what attention returns (the output projection's input), per query
    max |Δ logit|      of the model's logits, at the group's positions; of all layers together

Errors are accumulated ones: weights and earlier layers have their part in them; `--recipe fp16` leaves the cache's own.
Groups: pivots (positions that hold a massive activation in full precision), rest (the other tokens of the text), and
prefix (other leading tokens, if there are any). An intact prefix takes the twin's keys and values, so its SQNR is +inf.
No policy here keeps a full-precision tail of recent tokens, so there is no group for one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eval.inside.distances import LogitLoss
from eval.inside.pairs import Pair
from eval.inside.statistics import Loss
from eval.perplexity import Windows
from intactkv.cache import IntactCache
from intactkv.observe import inputs_of
from intactkv.pivots import hidden_magnitudes
from intactkv.store import KVPolicy

__all__ = ["GROUPS", "kv_report", "stored_bits"]

GROUPS = ("pivots", "prefix", "rest")
FULL_BITS = 16.0  # what a cache element takes that no policy touches, in the dtype of published models


def stored_bits(policy: KVPolicy | None, tokens: int, head_size: int, heads: int) -> float:
    """Bits that an element takes once a policy has stored it, mean of keys and values, scales and zero points included,
    once so many tokens are held."""
    if policy is None:
        return FULL_BITS
    return sum(policy.bits_per_element(tokens, head_size, heads)) / 2


@torch.inference_mode()
def kv_report(
    pair: Pair, windows: Windows, report: Callable[[], Any] = lambda: None
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Rows of arm, group, block, k_sqnr, v_sqnr, attention_sqnr, tokens, quantized_fraction, bits_per_element; and by
    group the figures of `LogitLoss`. A group without tokens has no rows; one without queries has attention_sqnr nan.

    Errors are summed over the windows. quantized_fraction: of the group's cached tokens, 0…1. bits_per_element: mean.
    Memory: two models, and of one window both caches and the twin's attention outputs. report: called after a window.
    """
    layers = range(len(pair.blocks(pair.reference)))
    losses = {(group, layer, what): Loss() for group in GROUPS for layer in layers for what in ("k", "v", "attention")}
    tokens, quantized = dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, 0)
    logits = {group: LogitLoss() for group in GROUPS}
    for i in range(len(windows.fed)):
        ids, first = pair.fed(windows, i), pair.quantized.prefix_length
        groups = _groups(pair, windows, i)
        expected, keys, hidden = _run(pair, pair.reference, ids)
        actual, policy_keys, policy_hidden = _run(pair, pair.quantized, ids)
        for group, member in groups.items():
            fed = member[first:]
            tokens[group] += int(member.sum())
            quantized[group] += int(fed.sum()) if pair.quantized.kv is not None else 0
            logits[group].add(pair, hidden[fed], policy_hidden[fed])
            for layer in layers:
                losses[group, layer, "attention"].add(expected[layer][fed], actual[layer][fed])
                for what, exact, held in zip(
                    "kv", keys.intact_layers[layer].held, policy_keys.intact_layers[layer].held, strict=True
                ):
                    # A sliding window has dropped the oldest tokens.
                    mine = member[len(member) - held.shape[-2] :]
                    losses[group, layer, what].add(exact[..., mine, :], held[..., mine, :])
        report()
    heads, _, size = keys.intact_layers[0].held[0].shape[1:]
    bits = stored_bits(pair.quantized.kv, len(ids), size, heads)
    rows = [
        {
            "arm": pair.arm,
            "group": group,
            "block": layer,
            **{f"{what}_sqnr": losses[group, layer, what].sqnr for what in ("k", "v", "attention")},
            "tokens": tokens[group],
            "quantized_fraction": (fraction := quantized[group] / tokens[group]),
            "bits_per_element": fraction * bits + (1 - fraction) * FULL_BITS,
        }
        for group in GROUPS
        if tokens[group]
        for layer in layers
    ]
    return rows, {group: logits[group].figures() for group in GROUPS if tokens[group]}


def _groups(pair: Pair, windows: Windows, row: int) -> dict[str, Tensor]:
    """Which of a window's positions, the leading ones included, belong to which group: (P + T,) bool each."""
    ids = torch.cat([windows.lead, windows.fed[row]])
    pivots = torch.zeros(len(ids), dtype=torch.bool)
    pivots[hidden_magnitudes(pair.reference.model, ids).pivots()] = True
    leading = torch.arange(len(ids)) < len(windows.lead)
    return {"pivots": pivots, "prefix": leading & ~pivots, "rest": ~leading & ~pivots}


def _run(pair: Pair, model: Any, ids: Tensor) -> tuple[list[Tensor], IntactCache, Tensor]:
    """One pass: attention outputs per layer (T, heads · D), the filled cache, final hidden states (T, hidden size)."""
    cache = model.new_cache()
    with inputs_of(block.get_submodule(pair.architecture.output) for block in pair.blocks(model)) as outputs:
        hidden = pair.run(model, ids, cache)
    return [output.flatten(0, -2) for output in outputs], cache, hidden
