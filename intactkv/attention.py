"""The one attention function of models that run here: everything that attention does differently, and else torch's.

    a short prefix      no mask: P dummy queries in front make queries and keys equally long
    two forms of keys   S = where(column < limit(i), q·k̂ᵀ, q·kᵀ),   O = (P ⊙ [column < limit(i)])·v̂ + (P ⊙ [else])·v
    rounded products    queries and softmax rows on grids (`quantization.model.attention`)
    packed codes        one query attends to the codes as they are, by the products of its KV policy
    what sdpa lacks     S = cap·tanh(S / cap) in front of the mask (Gemma 2), a sink's column that softmax counts and
                        nothing reads (GPT-OSS), biases by position

torch's `is_causal` aligns the causal triangle to the upper left, so with P cached tokens and T new ones transformers
builds an explicit (T, P + T) mask, and the kernels lose their causal fast path (on CPUs a fifth of the time of a
2048-token pass). With dummy queries the fast path applies; their rows are cut off. The result is the same.

What a pass must know besides its tensors (`Read`) comes with the keys, from the layer's cache. The function is
registered with transformers, with a mask function, under two names, and a model is told once (`take_over`); no model
code is touched. Models that compute attention in code of their own (Falcon, BLOOM) never ask for a function: what needs
this one is refused there (`check_asked`).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from corpora.errors import UserError
from intactkv.store import Store, TwoForms

__all__ = [
    "EXPLICIT",
    "NAME",
    "NEEDED",
    "PRODUCTS",
    "ROWS",
    "Products",
    "Read",
    "asks",
    "check_asked",
    "masked",
    "take_over",
]

NAME = "intact"  # torch's function where it can be
ROWS = "intact_with_rows"  # softmax rows computed explicitly, and returned
# Attention functions that compute their weights explicitly and return them.
EXPLICIT = {"eager", ROWS}
# Attribute of an attention module: what rounds in its products, or nothing.
PRODUCTS = "intactkv_products"

# What KV policies need a function of here, and what goes without, for messages.
NEEDED = (
    "a KV policy that keeps its newest tokens exact",
    "choose one that rounds every token at once, such as --kv per_head",
)

# What some models ask of attention between its products, and torch's function refuses or passes over.
BETWEEN = ("softcap", "s_aux", "position_bias")

# Dummy queries cost as much as real ones: worth it while the cached part is small against the new tokens.
LARGEST_CACHED_SHARE = 0.25
SCORES_AT_ONCE = 1 << 25  # of a pass in two forms; more queries are done one after the other


class Products(Protocol):
    """What rounds in attention's two products."""

    def queries(self, query: Tensor) -> Tensor:
        """Queries (…, D) as they enter the first product."""
        ...

    def softmax(self, rows: Tensor, prefix: int) -> Tensor:
        """Softmax rows (…, columns) as they enter the second; the first `prefix` columns are an intact prefix's."""
        ...


@dataclass
class Read:
    """What one layer's cache tells attention. prefix: leading columns that are the intact prefix. keys, values: their
    exact forms, where queries of the pass see some tokens rounded and others do not. store: keys and values were not
    decoded, and the tensors handed over only have their shapes; it attends to them, or decodes them."""

    prefix: int = 0
    keys: TwoForms | None = None
    values: TwoForms | None = None
    store: Store | None = None
    taken: bool = False

    @property
    def needed(self) -> bool:
        """Whether attention is wrong without it."""
        return self.keys is not None or self.values is not None or self.store is not None


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


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores (…, T, S) that are as low as they can be where a query must not look.

    mask: as transformers hands it over: None (causal, the last query sees all), boolean, or to be added.
    """
    tokens, seen = scores.shape[-2:]
    if mask is None:
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=scores.device).tril(seen - tokens)
    mask = mask[..., :seen]
    if mask.dtype != torch.bool:
        return scores + mask
    # Not −∞: a pad's row may see nothing, and its NaN would reach other rows as 0 · NaN.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """query (B, heads, T, D), key and value (B, KV heads, P + T, D) to (B, T, heads, D)."""
    read = getattr(key, "intactkv_read", None) or Read()
    plain = PRODUCTS not in module.__dict__ and all(kwargs.get(name) is None for name in BETWEEN)
    shared = attention_mask is None or attention_mask.shape[1] == 1  # by all heads
    if read.store is not None and shared and plain and not kwargs.get("dropout"):
        read.taken = True
        mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return read.store.attended(query, scaling, mask).transpose(1, 2), None
    if read.needed or not plain:
        return _explicit(module, query, key, value, attention_mask, read, rows=False, **kwargs)
    cached = key.shape[2] - query.shape[2]
    if attention_mask is not None or query.shape[2] == 1 or cached == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    output, _ = sdpa_attention_forward(
        module, torch.nn.functional.pad(query, (0, 0, cached, 0)), key, value, None, **kwargs
    )
    return output[:, cached:], None


def _attention_with_rows(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The same, and the softmax rows, (B, heads, T, P + T)."""
    read = getattr(key, "intactkv_read", None) or Read()
    return _explicit(module, query, key, value, attention_mask, read, rows=True, **kwargs)


def _explicit(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    read: Read,
    rows: bool,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """Both products one after the other; the queries in parts whose scores fit the memory, unless rows are wanted.

    softcap: the largest score. s_aux: a score by head, (heads,), of what every query may look at and reads nothing of.
    position_bias: is added to scores, (1 or B, heads, 1 or T, S).
    """
    read.taken = True
    if read.store is not None:
        key, value = read.store.states()
    products: Products | None = module.__dict__.get(PRODUCTS)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if products is not None:
        query = products.queries(query)
    tokens, columns = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(tokens, columns, dtype=torch.bool, device=key.device).tril(columns - tokens)[None, None]
    at_once = tokens if rows else max(1, SCORES_AT_ONCE // (query.shape[0] * query.shape[1] * columns))
    outputs, seen = [], []
    for start in range(0, tokens, at_once):
        part = slice(start, start + at_once)
        # In float32, as torch's own: products of float16 overflow before they are scaled.
        scores = (
            _two(query[:, :, part].float(), key.float().transpose(2, 3), read.keys, part, of_columns=True) * scaling
        )
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if position_bias is not None:
            scores = scores + position_bias.expand(-1, -1, tokens, -1)[:, :, part]
        scores = masked(scores, mask[:, :, part])
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.float()[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
        softmax = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :columns]
        if products is not None:
            softmax = products.softmax(softmax, read.prefix)
        weights = torch.nn.functional.dropout(softmax.to(value.dtype), dropout, module.training)
        outputs.append(_two(weights, value, read.values, part))
        seen.append(softmax)
    output = torch.cat(outputs, dim=2).transpose(1, 2).contiguous()
    return output, torch.cat(seen, dim=2) if rows else None


def _two(left: Tensor, right: Tensor, forms: TwoForms | None, part: slice, of_columns: bool = False) -> Tensor:
    """(B, heads, T, n) times (B, KV heads, n, m), where queries see some tokens in one form and some in the other.

    of_columns: the tokens are the columns of the result, as in scores; otherwise what is summed over.
    """
    if forms is None:
        return _product(left, right)
    limits = torch.tensor(forms.limits[part], device=left.device)
    rounded = torch.arange(forms.exact.shape[2], device=left.device) < limits[:, None]  # (T, tokens)
    if of_columns:
        return torch.where(rounded, _product(left, right), _product(left, forms.exact.to(left).transpose(2, 3)))
    return _product(left * rounded, right) + _product(left * ~rounded, forms.exact)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(B, heads, T, n) times (B, KV heads, n, m): query heads that share a KV head are rows of one product."""
    shared = right.shape[1]
    return (left.reshape(left.shape[0], shared, -1, left.shape[3]) @ right).view(*left.shape[:2], -1, right.shape[3])


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
AttentionInterface.register(ROWS, _attention_with_rows)
AttentionMaskInterface.register(ROWS, eager_mask)


def asks(model: type[PreTrainedModel]) -> bool:
    """Whether models of a class ask transformers for their attention function, so that it can be one of these."""
    return model._can_set_attn_implementation()


def check_asked(model: type[PreTrainedModel], what: str, way_out: str) -> None:
    """Raise UserError if models of a class compute attention in code of their own. what: needs a function of here;
    way_out: what goes without."""
    if not asks(model):
        raise UserError(
            f"{model.__name__} computes attention in code of its own, which {what} would have to change; {way_out}"
        )


def take_over(model: PreTrainedModel, needed: bool = False) -> None:
    """Let a model's attention run through these functions from now on; it computes what it computed.

    A model of torch's SDPA is told once. needed: one with another attention function is told, too, because a KV policy
    needs it; raises UserError for one that asks for no function.
    """
    if needed:
        check_asked(type(model), *NEEDED)
    now = model.config._attn_implementation
    if now == "sdpa" and asks(type(model)):
        model.set_attn_implementation(NAME)
    elif needed and now not in (NAME, ROWS):
        model.set_attn_implementation(ROWS if now in EXPLICIT else NAME)
