"""Attention of one query straight from a packed KV cache: the decode step, without dequantizing a layer.

    q·k̂_j = Σ_g s_jg Σ_(c∈g) q_c f(code_jc) + Σ_g m_jg Σ_(c∈g) q_c        groups g of a token's channels
    q·k̂_j = Σ_c (q_c s_gc) code_jc + Σ_c q_c m_gc                          groups g of consecutive tokens, per channel
    Σ_j p_j v̂_jc = Σ_j (p_j s_jg) f(code_jc) + Σ_j p_j m_jg                (KIVI, 2402.02750)

f: the code itself, minus its group's zero point where that is what is stored, or a level of a table (TurboQuant,
2504.19874). Keys and values that were rounded in a rotated basis stay in it: q is rotated once, the output back once.
Query heads that share a KV head read its codes once.

A side of a layer is [exact prefix | codes | exact tail], and keys may hold more codes than values (KIVI). Here it is
in plain torch, in float32, which says what the kernel of `kv_triton` has to compute; that one runs on CUDA.
"""

import torch
from torch import Tensor

from quantization.kernels.kv_codes import Coded, Side, known
from quantization.kernels.launch import runs_triton

__all__ = ["attend", "attend_reference", "output", "scores"]


def attend(
    query: Tensor, keys: Side, values: Side, scaling: float, mask: Tensor | None = None, kernel: bool | None = None
) -> Tensor:
    """softmax(scaling · q Kᵀ + mask) V of one query per sequence: (B, query heads, 1, D), in the dtype of the query.

    query: (B, query heads, 1, D), any float dtype. mask: (B or 1, 1, 1, tokens), added, or a bool that is true where
    a token is seen. kernel: use Triton; none: on CUDA, where it knows the layout.
    """
    size = query.shape[-1]
    if kernel is None:
        kernel = runs_triton(query.device) and known(keys, size) and known(values, size)
    if kernel:
        from quantization.kernels.kv_triton import attend as triton_attend  # triton is not everywhere

        return triton_attend(query, keys, values, scaling, mask)
    return attend_reference(query, keys, values, scaling, mask)


def attend_reference(query: Tensor, keys: Side, values: Side, scaling: float, mask: Tensor | None = None) -> Tensor:
    """`attend` in plain torch, float32 throughout."""
    pieces = [_exact_scores(query, keys.prefix), _code_scores(query, keys.codes), _exact_scores(query, keys.tail)]
    rows = torch.cat(pieces, dim=-1) * scaling
    if mask is not None:
        rows = rows.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else rows + mask
    rows = rows.softmax(-1)
    sizes = [0 if x is None else x.shape[2] for x in values.exact]
    coded = rows.shape[-1] - sum(sizes)
    before, within, behind = rows.split([sizes[0], coded, sizes[1]], dim=-1)
    result = torch.zeros(query.shape, device=query.device)
    for p, exact in ((before, values.prefix), (behind, values.tail)):
        if exact is not None:
            result += (_heads(p, exact.shape[1]) @ exact.float()).view_as(result)
    if values.codes is not None:
        result += output(within, values.codes, query.shape[-1])
    return result.to(query.dtype)


def scores(query: Tensor, codes: Coded) -> Tensor:
    """q·k̂ of every rounded key: (B, query heads, 1, D) and n tokens to (B, query heads, 1, n), float32."""
    q = _heads(codes.turned(query.float()), codes.codes.shape[1])  # (B, H, queries of a KV head, D)
    numbers, offset = codes.numbers(q.shape[-1]), codes.offset
    scale = None if codes.scale is None else codes.scale.float()
    if codes.block > 1:
        assert scale is not None, "blocks have scales"
        product = (q[:, :, None] * scale[:, :, :, None]) @ numbers  # (B, H, n/G, queries, G)
        if offset is not None:
            product += q[:, :, None] @ offset[..., None]
        product = product.transpose(2, 3).flatten(3)
    else:
        groups = codes.groups
        parts = q.unflatten(-1, (groups, -1)).transpose(2, 3)  # (B, H, groups, queries, channels of a group)
        product = parts @ numbers.unflatten(-1, (groups, -1)).permute(0, 1, 3, 4, 2)  # (B, H, groups, queries, n)
        if scale is not None:
            product *= scale.transpose(2, 3)[:, :, :, None]
        if offset is not None:
            product += parts.sum(-1, keepdim=True) * offset.transpose(2, 3)[:, :, :, None]
        product = product.sum(2)
    return product.flatten(1, 2)[:, :, None]


def output(rows: Tensor, codes: Coded, channels: int) -> Tensor:
    """Σ p_j v̂_j over the rounded values: (B, query heads, 1, n) to (B, query heads, 1, D), float32."""
    assert codes.block == 1, "values are rounded token by token"
    p = _heads(rows.float(), codes.codes.shape[1])[:, :, None]  # (B, H, 1, queries of a KV head, n)
    groups = codes.groups
    numbers = codes.numbers(channels).unflatten(-1, (groups, -1)).transpose(2, 3)  # (B, H, groups, n, channels)
    scaled = p if codes.scale is None else p * codes.scale.float().transpose(2, 3)[:, :, :, None]
    product = scaled @ numbers  # (B, H, groups, queries, channels of a group)
    if codes.offset is not None:
        product += (p * codes.offset.transpose(2, 3)[:, :, :, None]).sum(-1, keepdim=True)
    product = product.transpose(2, 3).reshape(rows.shape[0], rows.shape[1], 1, channels)
    return codes.turned(product, back=True)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, query heads, 1, D) as (B, KV heads, query heads of each, D), float32."""
    return x.float().unflatten(1, (heads, -1)).squeeze(3)


def _exact_scores(query: Tensor, keys: Tensor | None) -> Tensor:
    """q·k of exact keys (1 or B, H, n, D), float32; no tokens without any."""
    if keys is None:
        return query.new_empty(*query.shape[:-1], 0, dtype=torch.float32)
    product = _heads(query, keys.shape[1]) @ keys.float().transpose(2, 3)
    return product.flatten(1, 2)[:, :, None]


def _code_scores(query: Tensor, codes: Coded | None) -> Tensor:
    return _exact_scores(query, None) if codes is None else scores(query, codes)
