"""KV report: what attention reads in every layer against what full precision would read there, pivot tokens apart.

    K, V SQNR          keys (after RoPE) and values as the cache holds them, against the twin's on the same tokens
    attention SQNR     what attention returns (the output projection's input), per query
    max |Δ logit|      of the model's logits, at the group's positions; of all layers together

Errors are accumulated ones: weights and earlier layers have their part in them; `--recipe fp16` leaves the cache's own.
Groups: pivots (positions that hold a massive activation in full precision), rest (the other tokens of the text), tail
(those of them whose keys or values a policy still keeps exact at the end), and prefix (other leading tokens, if there
are any). An intact prefix takes the twin's keys and values, so its SQNR is +inf.
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
from intactkv.policy import KVPolicy
from intactkv.store import FAR

__all__ = ["GROUPS", "kv_report", "stored_bits"]

GROUPS = ("pivots", "prefix", "rest", "tail")
FULL_BITS = 16.0  # what a cache element takes that no policy touches, in the dtype of published models


def stored_bits(policy: KVPolicy | None, head_size: int, heads: int) -> tuple[float, float]:
    """Bits that an element of keys, and of values, takes once a policy has rounded it, scales and zero points
    included."""
    if policy is None:
        return FULL_BITS, FULL_BITS
    return policy.bits_per_element(FAR, head_size, heads)


@torch.inference_mode()
def kv_report(
    pair: Pair, windows: Windows, report: Callable[[], Any] = lambda: None
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Rows of arm, group, block, k_sqnr, v_sqnr, attention_sqnr, tokens, quantized_fraction, bits_per_element; and by
    group the figures of `LogitLoss`. A group without tokens has no rows; one without queries has attention_sqnr nan.

    Errors are summed over the windows. quantized_fraction: of the group's elements, those that the cache holds rounded
    at a window's end, 0…1 (not of what attention read, which records call rounded). bits_per_element: mean.
    Memory: two models, and of one window both caches and the twin's attention outputs. report: called after a window.
    """
    layers = range(len(pair.blocks(pair.reference)))
    losses = {(group, layer, what): Loss() for group in GROUPS for layer in layers for what in ("k", "v", "attention")}
    tokens, quantized = dict.fromkeys(GROUPS, 0), {group: [0, 0] for group in GROUPS}  # of keys, of values
    logits = {group: LogitLoss() for group in GROUPS}
    for i in range(len(windows.fed)):
        ids, first = pair.fed(windows, i), pair.quantized.prefix_length
        expected, keys, hidden = _run(pair, pair.reference, ids)
        actual, policy_keys, policy_hidden = _run(pair, pair.quantized, ids)
        coded = rounded_tokens(policy_keys) if pair.quantized.kv is not None else None
        groups = _groups(pair, windows, i, first + min(coded) if coded else None)
        for group, member in groups.items():
            fed = member[first:]
            tokens[group] += int(member.sum())
            for side, count in enumerate(coded or ()):
                quantized[group][side] += int(fed[:count].sum())
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
    bits = stored_bits(pair.quantized.kv, size, heads)
    shares = {group: [n / tokens[group] for n in quantized[group]] for group in GROUPS if tokens[group]}
    rows = [
        {
            "arm": pair.arm,
            "group": group,
            "block": layer,
            **{f"{what}_sqnr": losses[group, layer, what].sqnr for what in ("k", "v", "attention")},
            "tokens": tokens[group],
            "quantized_fraction": sum(shares[group]) / 2,
            "bits_per_element": sum(f * b + (1 - f) * FULL_BITS for f, b in zip(shares[group], bits, strict=True)) / 2,
        }
        for group in GROUPS
        if tokens[group]
        for layer in layers
    ]
    return rows, {group: logits[group].figures() for group in GROUPS if tokens[group]}


def rounded_tokens(cache: IntactCache) -> tuple[int, int]:
    """How many of the first tokens behind the prefix a cache holds with rounded keys, and with rounded values."""
    layer = cache.intact_layers[0]
    layer.held  # noqa: B018 (which settles what is rounded)
    return layer.store.keys.coded, layer.store.values.coded


def _groups(pair: Pair, windows: Windows, row: int, exact: int | None) -> dict[str, Tensor]:
    """Which of a window's positions, the leading ones included, belong to which group: (P + T,) bool each. exact: the
    first position that is not rounded, None without a policy."""
    ids = torch.cat([windows.lead, windows.fed[row]])
    pivots = torch.zeros(len(ids), dtype=torch.bool)
    pivots[hidden_magnitudes(pair.reference.model, ids).pivots()] = True
    places = torch.arange(len(ids))
    leading, text = places < len(windows.lead), (places >= len(windows.lead)) & ~pivots
    tail = text & (places >= (len(ids) if exact is None else exact))
    return {"pivots": pivots, "prefix": leading & ~pivots, "rest": text & ~tail, "tail": tail}


def _run(pair: Pair, model: Any, ids: Tensor) -> tuple[list[Tensor], IntactCache, Tensor]:
    """One pass: attention outputs per layer (T, heads · D), the filled cache, final hidden states (T, hidden size)."""
    cache = model.new_cache()
    with inputs_of(block.get_submodule(pair.architecture.output) for block in pair.blocks(model)) as outputs:
        hidden = pair.run(model, ids, cache)
    return [output.flatten(0, -2) for output in outputs], cache, hidden
