"""Causal attention behind a short prefix at the speed of plain causal attention.

torch's `is_causal` aligns the causal triangle to the upper left, so with P cached tokens and T new ones transformers
builds an explicit (T, P + T) mask, and the kernels lose their causal fast path (on CPUs a fifth of the time of a
2048-token pass). Putting P dummy queries in front makes queries and keys equally long: the fast path applies, and the
dummy rows are cut off. The result is the same.

The pair of functions is registered with transformers under `NAME`; no model code is touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["EXPLICIT", "NAME", "prefix_attention"]

NAME = "sdpa_behind_prefix"
# Attention functions that compute their weights explicitly and return them; another one may enter itself.
EXPLICIT = {"eager"}

# Dummy queries cost as much as real ones: worth it while the cached part is small against the new tokens.
LARGEST_CACHED_SHARE = 0.25


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **rest: Any,
) -> Tensor | None:
    """No mask when every new token sees the whole cache and all earlier new tokens; transformers' own otherwise."""
    whole = attention_mask is None or bool(attention_mask.all())
    windowed = local_size is not None and kv_length >= local_size
    cached = kv_length - q_length
    if (
        q_length > 1
        and isinstance(q_offset, int)
        and 0 < q_offset == cached <= LARGEST_CACHED_SHARE * q_length
        and kv_offset == 0
        and whole
        and not windowed
        and rest.get("allow_is_causal_skip", True)
    ):
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        **rest,
    )


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query (B, heads, T, D), key and value (B, KV heads, P + T, D) to (B, T, heads, D)."""
    cached = key.shape[2] - query.shape[2]
    if attention_mask is not None or query.shape[2] == 1 or cached == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    output, _ = sdpa_attention_forward(
        module, torch.nn.functional.pad(query, (0, 0, cached, 0)), key, value, None, **kwargs
    )
    return output[:, cached:], None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def prefix_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run a model that uses torch's SDPA with these functions for the time of the block; others are left alone."""
    if model.config._attn_implementation != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
