"""PrefixQuant's `mse_init` (Chen et al. 2024, 2410.05265): one quantizer at a time, by the error that it alone makes.

    static inputs      scale · f        f of {0.25, 0.35, …, 0.95}, then best ± 0.05 in 10 points   output of the block
    dynamic ranges     share kept       of {0.6, 0.65, …, 1}, both ends where the grid has two      output of the block
    static values      scale · (1 − i/20), i < 10, per KV head                                      the values
    static keys        likewise                                               rows of softmax(q kᵀ/√D), per KV head
    weights            likewise, per group of a row                           that group's part of the linear's output

f is always on the scale that the range gave, 1 is always a candidate, and queries meet the prefix and the causal mask.
Departs from the published code: it multiplies the best scale so far; its fine search of static inputs and its search of
keys attend to everything, without mask and prefix; its search of weights in groups views the groups transposed, so that
each is weighed by channels of others (ours makes 0.22 to 0.43 × its error).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from intactkv.attention import masked
from intactkv.rope import Places
from intactkv.store import Exact, Store
from quantization.grids.uniform import Fit, UniformGrid, encode, split_groups
from quantization.kv_cache import ClippedPerHead, StaticPerHead
from quantization.kv_cache.base import split_heads
from quantization.model.blocks import DecoderBlock
from quantization.model.routed import sum_of, with_unseen
from quantization.tuning.quantizers import Quantizers, at_work, output_error, stream_of

__all__ = [
    "Attended",
    "attended",
    "attention_rows",
    "best_factor",
    "best_scales",
    "best_shares",
    "grams",
    "group_errors",
    "initialize",
]

COARSE = (0.25, 0.95, 8)  # lowest, highest, points
FINE = (0.05, 10)  # on both sides of the best, points
SHARES = (0.6, 1.0, 9)
SHRUNK = tuple(1 - i / 20 for i in range(10))
CATCHING = "intactkv_catching"  # attention function that leaves the model with what it was called with


def best_factor(error: Callable[[float], float]) -> float:
    """The factor of a scale with the smallest error, 1 included; of equal ones the later."""
    best, lowest = 1.0, error(1.0)

    def look(lower: float, upper: float, points: int) -> None:
        nonlocal best, lowest
        for factor in torch.linspace(lower, upper, points).tolist():
            if (found := error(factor)) <= lowest:
                best, lowest = factor, found

    look(*COARSE)
    look(best - FINE[0], best + FINE[0], FINE[1])
    return best


def best_shares(error: Callable[[float, float], float], symmetric: bool) -> tuple[float, float]:
    """The shares of the lower and the upper end of ranges with the smallest error; one for both if `symmetric`."""
    grid = torch.linspace(*SHARES).flip(0).tolist()  # all of the range first
    pairs = [(share, share) for share in grid] if symmetric else [(low, high) for low in grid for high in grid]
    errors = [error(low, high) for low, high in pairs]
    return pairs[errors.index(min(errors))]


def best_scales(scale: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
    """The multiple of every element of `scale` that has the smallest error; error: scales to errors, same shape."""
    best, lowest = scale, error(scale)
    for factor in SHRUNK[1:]:
        found = error(scale * factor)
        better = found < lowest
        best, lowest = torch.where(better, scale * factor, best), torch.where(better, found, lowest)
    return best


def grams(block: DecoderBlock, group_size: int) -> dict[str, Tensor]:
    """X_gᵀ X_g of every group's input channels, (groups, size, size) float32, by the first linear of every set that
    shares an input; summed over the text."""
    wanted = {names[0] for names in block.architecture.linears}
    found: dict[str, Tensor] = {}

    def look(name: str, x: Tensor) -> None:
        if name in wanted:
            groups = split_groups(x.flatten(0, 1).float(), group_size).transpose(0, 1)  # (groups, tokens, size)
            product = groups.transpose(1, 2) @ groups
            found[name] = found[name] + product if name in found else product

    block.observe(look)
    return with_unseen(block, found, sum_of)


def group_errors(groups: Tensor, fitted: Fit, grid: UniformGrid, gram: Tensor) -> Tensor:
    """Squared error of each group's part of the output, ‖X_g (ŵ_g − w_g)‖², summed over the text.

    groups: weights (out, groups, size), float32. gram: see `grams`. Returns (out, groups, 1).
    """
    change = ((encode(groups, fitted, grid) - fitted.zero_point) * fitted.scale - groups).transpose(0, 1)
    return ((change @ gram) * change).sum(-1).T[..., None]


@dataclass(frozen=True)
class Attended:
    """What attention computes with, for one sample: query (1, heads, T, D), key (1, KV heads, P + T, D) with the
    prefix's first, mask as transformers hands it over (None: causal)."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float


class _Caught(Exception):
    """Carries the arguments of attention out of the model's forward."""

    def __init__(self, attended: Attended):
        super().__init__()
        self.attended = attended


def _catch(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    _value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **_rest: Any,
) -> tuple[Tensor, None]:
    raise _Caught(Attended(query, key, mask, query.shape[-1] ** -0.5 if scaling is None else scaling))


AttentionInterface.register(CATCHING, _catch)


@contextmanager
def _catching(block: DecoderBlock) -> Iterator[None]:
    config = block.module.get_submodule(block.architecture.attention).config
    assert isinstance(config, PreTrainedConfig)
    before = config._attn_implementation
    config._attn_implementation = CATCHING
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def attended(block: DecoderBlock) -> list[Attended]:
    """What attention is called with for every sample of the stream; the block is left as soon as it is known."""
    assert block.stream is not None
    found = []
    with _catching(block):
        for hidden in block.stream.hidden:
            try:
                block.stream.forward(block, hidden)
            except _Caught as caught:
                found.append(caught.attended)
    return found


def attention_rows(sample: Attended, key: Tensor) -> Tensor:
    """softmax(q kᵀ · scaling) of one sample with these keys (1, KV heads, P + T, D): (heads, T, P + T), float32."""
    query, key = sample.query[0].float(), key[0].float()
    scores = query @ key.repeat_interleave(len(query) // len(key), dim=0).transpose(1, 2) * sample.scaling
    return masked(scores, None if sample.mask is None else sample.mask[0]).softmax(-1)


@torch.no_grad()
def initialize(block: DecoderBlock, quantizers: Quantizers, targets: Sequence[Tensor], skip_qk_weights: bool) -> None:
    """Search every grid alone, the others off; targets: the full-precision block's outputs."""
    if quantizers.grid is not None:
        names = block.architecture
        skipped = set(names.linears[0]) - {names.value} if skip_qk_weights else set()
        _search_weights(block, quantizers.grid, quantizers.fits, skipped)
    for linears, quantizer in quantizers.inputs.items():
        with at_work(block, {linears: quantizer}):
            if quantizer.static:
                _search_scale(quantizer.scale, lambda: output_error(block, targets))
            else:
                _search_shares(quantizer.low, quantizer.high, quantizer.grid, lambda: output_error(block, targets))
    if isinstance(quantizers.kv, StaticPerHead):
        _search_heads(block, quantizers.kv)
    elif isinstance(quantizers.kv, ClippedPerHead):
        only_values = _ValuesOnly(quantizers.kv)
        low, high = block.kv["values_low"], block.kv["values_high"]
        _search_shares(low, high, quantizers.kv.grid, lambda: output_error(block, targets, only_values))


def _search_weights(block: DecoderBlock, grid: UniformGrid, fits: dict[str, Fit], skipped: set[str]) -> None:
    of_input = grams(block, grid.group_size)
    for names in block.architecture.linears:
        gram = of_input.pop(names[0])
        for name in names:
            if name in skipped:
                continue
            groups = split_groups(block.linears()[name].weight.data.float(), grid.group_size)
            scale, zero_point = fits[name]

            def error(scale: Tensor, groups: Tensor = groups, zero: Tensor = zero_point, gram: Tensor = gram) -> Tensor:
                return group_errors(groups, Fit(scale, zero), grid, gram)

            fits[name] = Fit(best_scales(scale, error), zero_point)


def _search_scale(scale: Tensor, error_now: Callable[[], float]) -> None:
    """Set a static scale to the best multiple of what it is."""
    start = scale.clone()

    def error(factor: float) -> float:
        scale.copy_(start * factor)
        return error_now()

    scale.copy_(start * best_factor(error))


def _search_shares(low: Tensor, high: Tensor, grid: UniformGrid, error_now: Callable[[], float]) -> None:
    """Set the shares of dynamic ranges to the best ones."""

    def error(lower: float, upper: float) -> float:
        low.fill_(lower)
        high.fill_(upper)
        return error_now()

    best = best_shares(error, grid.rule.zero_point == "constant")
    low.fill_(best[0])
    high.fill_(best[1])


def _search_heads(block: DecoderBlock, kv: StaticPerHead) -> None:
    """Scales of every group: of the values by their own error, of the keys by that of attention's rows, one for all
    groups of a head."""
    samples = [values for _, values in block.keys_and_values()]
    attention = attended(block)
    exact = [attention_rows(sample, sample.key) for sample in attention]
    length = stream_of(block).prefix_length
    groups_of_head = len(block.kv["keys_scale"]) // attention[0].key.shape[1]  # 0: one group of all heads

    def values_error(scale: Tensor) -> Tensor:
        _, rounding = kv.roundings(block.kv | {"values_scale": scale})
        errors = [(rounding.numbers(x.float(), Places(0, x.shape[2])) - x.float()).square() for x in samples]
        return torch.stack([split_heads(x, kv.group_size).mean((0, 1, 3)) for x in errors]).mean(0)[:, None, None]

    def keys_error(scale: Tensor) -> Tensor:
        (rounding, _), errors = kv.roundings(block.kv | {"keys_scale": scale}), []
        for sample, rows in zip(attention, exact, strict=True):
            new = sample.key[:, :, length:]
            rounded = rounding.numbers(new.float(), Places(0, new.shape[2])).to(new)
            key = torch.cat([sample.key[:, :, :length], rounded], dim=2)
            of_heads = (attention_rows(sample, key) - rows).square().mean((1, 2)).view(key.shape[1], -1).mean(1)
            errors.append(of_heads.repeat_interleave(groups_of_head) if groups_of_head else of_heads.mean(0, True))
        return torch.stack(errors).mean(0)[:, None, None]

    for name, error in (("values_scale", values_error), ("keys_scale", keys_error)):
        block.kv[name].copy_(best_scales(block.kv[name], error))


@dataclass(frozen=True)
class _ValuesOnly:
    """A policy whose keys keep full precision."""

    policy: ClippedPerHead
    space: ClassVar[str] = "post_rope"
    calibrates: ClassVar[bool] = True

    def store(self, layer: int, tensors: Mapping[str, Tensor] | None, packed: bool = False) -> Store:
        return Store(Exact(), self.policy.roundings(tensors)[1])

    def fit_block(self, block: DecoderBlock) -> dict[str, Tensor]:
        return self.policy.fit_block(block)

    def behind(self, prefix: int) -> Self:
        return self

    def bits_per_element(self, tokens: int, head_size: int, heads: int) -> tuple[float, float]:
        return 16.0, self.policy.bits_per_element(tokens, head_size, heads)[1]
