"""What enters attention's two products, quantized: queries and softmax rows (RTN and SmoothQuant of qllm, W8A8), or
queries alone (OmniQuant's W4A4).

    S = softmax(Q(q) k̂ᵀ / √D),   out = Q(S) v̂      one grid per (head, token) of q, one per row of S

Keys and values are the KV policy's: they are rounded on their way into the cache. The columns of S that belong to the
intact prefix keep full precision: they multiply full-precision values, and a sink's share would set the step of the
row (0.8 % of it rounds to 0 with 6 bits). How many columns those are, only the cache knows: a sliding window leaves the
prefix behind. One function, registered with transformers under `NAME`; no model code is touched.

Departs from qllm: values are rounded per token (there: per channel over the whole text, which reads the future).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from corpora.errors import UserError
from intactkv.architecture import architecture_of
from intactkv.attention import EXPLICIT
from quantization.grids.straight_through import straight
from quantization.grids.uniform import UniformGrid, fake_quantize
from quantization.model.blocks import DecoderBlock

__all__ = ["NAME", "AttentionProducts", "masked"]

NAME = "quantized_products"
# Attributes of an attention module: its `AttentionProducts`; how many tokens of the prefix, and in all, its layer of
# the cache has seen when a pass arrives.
PRODUCTS, SEEN = "intactkv_products", "intactkv_seen"


@dataclass(frozen=True)
class AttentionProducts:
    """The grid of queries and, with rows, of softmax rows."""

    grid: UniformGrid
    rows: bool = field(default=True, metadata={"before": (True,)})  # see `recipe.added`

    def __post_init__(self) -> None:
        if self.grid.group_size != -1:
            raise UserError(
                f"attention.grid.group_size={self.grid.group_size} is not allowed; a query and a softmax row have one "
                "grid each: -1"
            )

    @property
    def label(self) -> str:
        """`qs8`: queries and softmax; `q4`: queries alone."""
        return f"{'qs' if self.rows else 'q'}{self.grid.bits}"

    def install(self, model: PreTrainedModel) -> None:
        """Let a model's attention run through these grids."""
        architecture = architecture_of(model.config)
        for block in architecture.blocks_of(model):
            module = block.get_submodule(architecture.attention)
            if PRODUCTS not in module.__dict__:
                module.register_forward_pre_hook(_look_at_cache, with_kwargs=True)
            module.__dict__[PRODUCTS] = self
        model.set_attn_implementation(NAME)

    @contextmanager
    def at_work(self, block: DecoderBlock) -> Iterator[None]:
        """Let one block's attention run through these grids, for a while."""
        module = block.module.get_submodule(block.architecture.attention)
        config: Any = module.config
        before, config._attn_implementation = config._attn_implementation, NAME
        handle = module.register_forward_pre_hook(_look_at_cache, with_kwargs=True)
        module.__dict__[PRODUCTS] = self
        try:
            yield
        finally:
            config._attn_implementation = before
            handle.remove()
            del module.__dict__[PRODUCTS]


def _look_at_cache(module: Any, _args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Before a pass: its new keys are not in the cache yet."""
    cache = keywords.get("past_key_values")
    seen = 0 if cache is None else int(cache.get_seq_length(module.layer_idx))
    module.__dict__[SEEN] = getattr(cache, "prefix_length", 0), seen


def _rounded(x: Tensor, grid: UniformGrid) -> Tensor:
    """The states on the grid; where a prefix is trained, its gradient passes as if nothing were rounded."""
    seen = fake_quantize(x, grid)
    return straight(seen, x) if x.requires_grad else seen


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores (…, T, S) that are −∞ where a query must not look.

    mask: as transformers hands it over: None (causal, the last query sees all), boolean, or to be added.
    """
    tokens, seen = scores.shape[-2:]
    if mask is None:
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=scores.device).tril(seen - tokens)
    mask = mask[..., :seen]
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_rest: Any,
) -> tuple[Tensor, Tensor]:
    """query (B, heads, T, D), key and value (B, KV heads, S, D) to (B, T, heads, D) and the softmax rows."""
    products: AttentionProducts = getattr(module, PRODUCTS)
    grid = products.grid
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = masked(_rounded(query, grid) @ key.transpose(2, 3) * scaling, attention_mask)
    rows = torch.softmax(scores, dim=-1, dtype=torch.float32)
    prefix, before = module.__dict__[SEEN]
    left = before + query.shape[-2] - rows.shape[-1]  # tokens that a sliding window has left behind, the prefix first
    kept = max(0, prefix - left)
    if products.rows:
        rows = torch.cat([rows[..., :kept], _rounded(rows[..., kept:], grid)], dim=-1)
    return (rows.to(value.dtype) @ value).transpose(1, 2).contiguous(), rows


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)
EXPLICIT.add(NAME)
