"""KIVI (Liu et al., ICML 2024, arXiv:2402.02750): asymmetric KV cache of 2 or 4 bits, without calibration.

    keys: a group is G consecutive tokens of one channel;   values: G consecutive channels of one token
    m = min,  s = (max − m)/(2^b − 1),  q = round((x − m)/s),  x̂ = q·s + m

Keys have a few channels that are large for every token; values have none. A group of tokens can only be closed when
they are there, so the newest tokens stay exact: the query at index i sees the key at j rounded iff ⌊i/R⌋ > ⌊j/R⌋, and
the value at j iff i − j > R. Indices count from the first token behind the prefix, which is in no group. Scale and
minimum are float16, rounded before codes are computed. Keys come after RoPE.

Departs from the reference: what the tokens of one pass see is a choice (`prefill`), and by default the same as token by
token, so a pass may come in any parts; a group of one value is that value in float16 (there: 0/0); a padded batch is
refused, because its pads would shift the groups (there: they count).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from corpora.errors import UserError
from intactkv.rope import Places
from intactkv.store import Codes, Rounding
from quantization.grids.packing import pack_codes, unpack_codes
from quantization.kernels.kv_codes import Coded
from quantization.kv_cache.base import Policy, check_prefill

__all__ = ["KIVI", "TokenGroups", "asymmetric", "from_codes"]

PARAMETER = torch.float16  # of scale and minimum


def asymmetric(groups: Tensor, bits: int) -> dict[str, Tensor]:
    """Codes (…, G) of groups (…, G) float32, packed, and their scale and minimum, (…) in 16 bits."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    half = torch.finfo(PARAMETER)
    minimum = low.clamp(half.min, half.max).to(PARAMETER)
    scale = ((high - minimum.float()) / (2**bits - 1)).clamp(0, half.max).to(PARAMETER)
    step = torch.where(scale == 0, 1.0, scale.float())
    codes = torch.round((groups - minimum.float()) / step).clamp(0, 2**bits - 1)
    return {
        "codes": pack_codes(codes.to(torch.uint8), bits),
        "scale": scale.squeeze(-1),
        "minimum": minimum.squeeze(-1),
    }


def from_codes(packed: Codes, bits: int, size: int) -> Tensor:
    """Undo `asymmetric`: (…, size) float32."""
    codes = unpack_codes(packed["codes"], bits, size).float()
    return codes * packed["scale"].float()[..., None] + packed["minimum"].float()[..., None]


@dataclass(frozen=True, eq=False)
class KIVIKeys(Rounding):
    """Groups of G tokens of a channel. codes (B, KV heads, n/G, D, G·b/8); scale, minimum (B, KV heads, n/G, D)."""

    bits: int
    residual: int
    block: int

    def rounded(self, query: int) -> int:
        """R⌊i/R⌋: whole blocks of R tokens that are past."""
        return query // self.residual * self.residual

    def encode(self, states: Tensor, places: Places) -> Codes:
        """n must be a multiple of G."""
        return asymmetric(states.unflatten(2, (-1, self.block)).transpose(3, 4), self.bits)

    def decode(self, codes: Codes, places: Places) -> Tensor:
        """Undo `encode`, but for the rounding."""
        return from_codes(codes, self.bits, self.block).transpose(3, 4).flatten(2, 3)

    def products(self, codes: Codes) -> Coded:
        """What attention's products take."""
        return Coded(self.bits, codes["codes"], codes["scale"], codes["minimum"], block=self.block)


@dataclass(frozen=True, eq=False)
class TokenGroups(Rounding):
    """Groups of G channels of a token, or all of a head. codes (B, KV heads, n, D·b/8); scale, minimum (B, KV heads, n,
    D/G)."""

    bits: int
    group_size: int | None = None

    def encode(self, states: Tensor, places: Places) -> Codes:
        """The codes of a token's groups are packed one behind the other."""
        found = asymmetric(states.unflatten(-1, (-1, self.group_size or states.shape[-1])), self.bits)
        return {**found, "codes": found["codes"].flatten(-2)}

    def decode(self, codes: Codes, places: Places) -> Tensor:
        """Undo `encode`, but for the rounding."""
        groups = codes["scale"].shape[-1]
        by_group = {**codes, "codes": codes["codes"].unflatten(-1, (groups, -1))}
        return from_codes(by_group, self.bits, by_group["codes"].shape[-1] * 8 // self.bits).flatten(-2)

    def products(self, codes: Codes) -> Coded:
        """What attention's products take."""
        return Coded(self.bits, codes["codes"], codes["scale"], codes["minimum"])


@dataclass(frozen=True, eq=False)
class KIVIValues(TokenGroups):
    """Groups of a token that R newer ones have followed."""

    residual: int = 0

    def rounded(self, query: int) -> int:
        """All but the R tokens before the query, and itself."""
        return max(query - self.residual, 0)


@dataclass(frozen=True)
class KIVI(Policy):
    """bits, v_bits: 2, 4 or 8. group_size: G, of keys and values; a multiple of 8. residual: R, a multiple of G.

    prefill: what the tokens of one pass see: `exact`, what they would see one by one; `final`, all of them what the end
    of the pass leaves, as the reference with quantized prefill; `fp`, each other's exact form, as the paper.
    """

    bits: int
    group_size: int = 32
    residual: int = 128
    prefill: str = "exact"
    allowed_bits: ClassVar[tuple[int, ...]] = (2, 4, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prefill(self.prefill)
        if self.group_size < 8 or self.group_size % 8:
            raise UserError(
                f"kv_cache.group_size={self.group_size} is not allowed; give a multiple of 8, such as 32, by which "
                "codes fill bytes"
            )
        if self.residual < 1 or self.residual % self.group_size:
            raise UserError(
                f"kv_cache.residual={self.residual} is not allowed; give a multiple of the {self.group_size} tokens of "
                "a group"
            )

    @property
    def what_passes_see(self) -> str:
        """Its own choice."""
        return self.prefill

    def in_heads(self, head_size: int) -> Self:
        """Raises UserError if groups do not fill a head."""
        if head_size % self.group_size:
            raise UserError(
                f"kv_cache.group_size={self.group_size} does not divide the {head_size} channels of a head; use "
                f"--kv-group-size {head_size} or a divisor of it"
            )
        return super().in_heads(head_size)

    def roundings(self, tensors: Mapping[str, Tensor] | None = None) -> tuple[Rounding, Rounding]:
        """Keys by channel, values by token."""
        return (
            KIVIKeys(self.bits, self.residual, self.group_size),
            KIVIValues(self.values_bits, self.group_size, self.residual),
        )

    def bits_per_element(self, tokens: int, head_size: int, heads: int) -> tuple[float, float]:
        """b + 32/G of the tokens that are rounded, 16 of the others."""
        found = []
        for bits, rounding in zip((self.bits, self.values_bits), self.roundings(), strict=True):
            share = min(rounding.rounded(tokens), tokens) / tokens if tokens else 0.0
            found.append(share * (bits + 32 / self.group_size) + (1 - share) * 16)
        return found[0], found[1]
