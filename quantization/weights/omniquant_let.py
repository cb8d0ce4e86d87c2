"""LET, the learnable equivalent transformation of OmniQuant (Shao et al., ICLR 2024, arXiv:2308.13137, section 3.3).

    x Wᵀ + b = ((x − δ)/s) (W diag(s))ᵀ + (b + W δ)                                              Eq. 3
        norm → q, k, v;  norm → gate, up (fc1);  v → o
    q · k = (q/s) · (s k)                                                                        Eq. 5

A `Pair` holds what is learned, its `step` is the rescaling that it stands for; `quantization.model.rescale` applies
it, while training and when the result is merged. No pair in front of the feed-forward part's last linear. While
queries and keys are not quantized, q ↔ k has nothing to gain (a row's grid scales with the row), and its s moves by
rounding noise only.

Departs from the reference: log s is learned, so s stays positive without truncation; both members of a rotary pair
share one s (otherwise q·k changes with the distance), query heads that share a KV head share theirs, norms of q and k
take one s for all heads; s starts from all linears that share an input (reference: from one of them), and from the text
as the quantized blocks before pass it on; v → o is the same routine as the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corpora.errors import UserError
from intactkv.architecture import Feed
from quantization.model.blocks import DecoderBlock
from quantization.model.rescale import Rescaling, per_column, rescaled
from quantization.transforms.smooth import input_maxima, of_producer, smoothing_scale

__all__ = ["Pair", "check_pairs", "initial_pairs", "learned_feeds", "prefix_in_basis", "transformed"]

REMEMBER = 0.99  # of the centre that the shifts start from, per sample


@dataclass(frozen=True)
class Pair:
    """What is learned for one pair of maps.

    log_scale: (channels,), or (heads, numbers) where channels of a head share them: shared tells whose is whose.
    shift: (channels,), or None. producer, consumers, rows: see `Rescaling`.
    """

    producer: str
    consumers: tuple[str, ...]
    log_scale: Tensor
    shift: Tensor | None = None
    rows: bool = False
    shared: tuple[int, ...] | None = None

    @property
    def step(self) -> Rescaling:
        """The rescaling by what is learned so far, with gradients where they are on."""
        scale = self.log_scale.exp()
        if self.shared is not None:
            scale = scale[:, list(self.shared)].flatten()
        return Rescaling(self.producer, self.consumers, scale, self.shift, self.rows)

    @property
    def learned(self) -> list[Tensor]:
        """The tensors that an optimizer moves."""
        return [self.log_scale] if self.shift is None else [self.log_scale, self.shift]


def learned_feeds(block: DecoderBlock) -> list[Feed]:
    """norm → linears and v → o; nothing is learned for up → down (fc1 → fc2)."""
    attention = f"{block.architecture.attention}."
    linears = block.linears()
    return [feed for feed in block.feeds() if feed.producer not in linears or feed.producer.startswith(attention)]


def check_pairs(block: DecoderBlock, shift: bool) -> None:
    """Raise UserError if the block has no place for the scales, or for the shifts if they are wanted."""
    names = {name for name, _ in block.module.named_parameters()}
    for feed in learned_feeds(block):
        lacking = [name for name in (feed.producer, *feed.consumers) if f"{name}.bias" not in names]
        if shift and lacking:
            raise UserError(
                f"weights.shift=true needs biases, and {block.name}.{lacking[0]} of this {block.config.model_type} "
                "model has none; leave it out (shifts are for models such as OPT)"
            )


@torch.no_grad()
def initial_pairs(block: DecoderBlock, alpha: float, shift: bool) -> tuple[Pair, ...]:
    """The pairs of a block as training starts: SmoothQuant's s = max|x|^α / max|W|^(1−α), 1 for q ↔ k; δ the centre of
    x, if `shift`: (max + min)/2, averaged over samples as they come (.99 old, .01 new)."""
    inputs, centres, pairs = input_maxima(block), _centres(block) if shift else {}, []
    for feed in learned_feeds(block):
        channels = block.module.get_parameter(f"{feed.producer}.weight").shape[0]
        delta = of_producer(centres[feed.witness], channels, block.head_size) if shift else None
        scale = smoothing_scale(block, feed, inputs, alpha)
        pairs.append(Pair(feed.producer, feed.readers, scale.log(), delta))
    return (*pairs, *_query_and_key(block))


def _centres(block: DecoderBlock) -> dict[str, Tensor]:
    """(max + min)/2 of every input channel of every linear, (channels,), averaged over samples as they come."""
    centres: dict[str, Tensor] = {}

    def look(name: str, x: Tensor) -> None:
        for sample in x:
            low, high = sample.amin(0).float(), sample.amax(0).float()
            middle = (high + low) / 2
            centres[name] = REMEMBER * centres.get(name, middle) + (1 - REMEMBER) * middle

    block.observe(look)
    return centres


def _query_and_key(block: DecoderBlock) -> Iterator[Pair]:
    """q ↔ k with s = 1: one per channel that the key map puts out, or for all that RoPE turns together. None where
    every head has a norm of its own, in a module of its own."""
    architecture, size = block.architecture, block.head_size
    key = dict(block.module.named_parameters()).get(f"{architecture.rope_key}.weight")
    if key is not None:
        channels = key.shape[0] if architecture.rope_key in block.linears() else key.numel()
        shared = architecture.pairs_of(block.index, size)
        zeros = torch.zeros(channels // size, max(shared) + 1, device=key.device)
        yield Pair(architecture.rope_query, (architecture.rope_key,), zeros, rows=True, shared=shared)


def transformed(block: DecoderBlock, steps: Sequence[Rescaling]) -> dict[str, Tensor]:
    """The block's parameters after the steps, by their dotted names; what no step touches is the block's own."""
    parameters = {name: parameter.detach() for name, parameter in block.module.named_parameters()}
    for step in steps:
        parameters |= dict(rescaled(parameters, block.of_family(step), block.head_size))
    return parameters


def prefix_in_basis(
    seeded: tuple[Tensor, Tensor], block: DecoderBlock, steps: Sequence[Rescaling]
) -> tuple[Tensor, Tensor]:
    """K·s and (V − δ)/s: what the transformed block would have written where the block itself wrote K and V.

    seeded: each (1, KV heads, P, D), keys after RoPE, which scaling pairs of channels alike commutes with.
    """
    keys, values = (x.float() for x in seeded)
    linears, size = block.linears(), block.head_size

    def of_heads(x: Tensor) -> Tensor:
        """(heads, 1, D): heads may share a norm, and a cache may hold what heads share once for each of them."""
        return per_column(x, keys.shape[1] * size, size).view(-1, 1, size)

    for step in steps:
        if step.rows:
            keys = keys * of_heads(step.scale)
        elif step.producer in linears:  # v; the other producers are norms, whose scales the linears undo
            values = (values if step.shift is None else values - of_heads(step.shift)) / of_heads(step.scale)
    return keys, values
