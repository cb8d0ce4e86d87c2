"""What attention from a packed KV cache reads: the codes of one side of a layer, between an exact prefix and tail."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from quantization.grids.packing import unpack_codes

__all__ = ["Coded", "Side", "known"]


@dataclass(frozen=True, eq=False)
class Coded:
    """The rounded tokens of one side of a layer: n tokens of H heads with D channels.

    block 1 (a token alone): codes (B, H, n, ⌈D/8⌉·bits) uint8, packed along channels; scale, minimum and zero_point
        (B, H, n, D/g) for groups of g channels, any of them expanded where tokens, heads or sequences share one.
    block G (tokens that share a grid): codes (B, H, n/G, D, ⌈G/8⌉·bits) packed along tokens; scale and minimum
        (B, H, n/G, D). Keys only.
    levels: (2^bits,) float32, what codes stand for; none: themselves. What is none of scale, minimum and zero_point
        does nothing: x̂ = s·(f − z) + m.
    turn: (x, back) → x in the basis that codes are in, or from there back; a linear orthonormal map of the last axis.
    """

    bits: int
    codes: Tensor
    scale: Tensor | None = None
    minimum: Tensor | None = None
    zero_point: Tensor | None = None
    levels: Tensor | None = None
    block: int = 1
    turn: Callable[[Tensor, bool], Tensor] | None = None

    def __len__(self) -> int:
        """Tokens."""
        return self.codes.shape[2] * self.block

    def numbers(self, channels: int) -> Tensor:
        """f of every code, float32: (B, H, n, D), or (B, H, n/G, D, G)."""
        codes = unpack_codes(self.codes, self.bits, channels if self.block == 1 else self.block)
        return codes.float() if self.levels is None else self.levels[codes.long()]

    def turned(self, x: Tensor, back: bool = False) -> Tensor:
        """x (…, D) in the basis of the codes, or from there back."""
        return x if self.turn is None else self.turn(x, back)

    @property
    def groups(self) -> int:
        """Groups of channels that a token has."""
        grid = next((x for x in (self.scale, self.minimum, self.zero_point) if x is not None), None)
        return 1 if grid is None or self.block > 1 else grid.shape[-1]

    @property
    def offset(self) -> Tensor | None:
        """What is added to s·f, m − s·z, float32: of the shape of the scale."""
        if self.zero_point is None:
            return None if self.minimum is None else self.minimum.float()
        assert self.minimum is None, "a grid has a minimum or a zero point"
        zero = self.zero_point.float()
        return -zero if self.scale is None else -zero * self.scale.float()


@dataclass(frozen=True, eq=False)
class Side:
    """What attention reads of keys, or of values, in the order of the tokens.

    prefix: (1 or B, H, P, D), exact. codes: the tokens behind it that are rounded. tail: (B, H, t, D), the newest ones,
    exact. Any of them may be absent, or empty.
    """

    prefix: Tensor | None = None
    codes: Coded | None = None
    tail: Tensor | None = None

    @property
    def exact(self) -> tuple[Tensor | None, Tensor | None]:
        """Prefix and tail."""
        return self.prefix, self.tail


def known(side: Side, channels: int) -> bool:
    """Whether the kernel has this layout: pieces of 2, 3, 4 or 8 bits, blocks of whole bytes, groups of a power of two
    or of a whole head."""
    of = side.codes
    if of is None:
        return True
    if of.block > 1:
        whole = of.block % 8 == 0 and of.levels is None and of.zero_point is None
        return of.bits in (2, 3, 4, 8) and whole and of.scale is not None and of.minimum is not None
    group = channels // of.groups
    return of.bits in (2, 3, 4, 8) and (of.groups == 1 or group & (group - 1) == 0)
