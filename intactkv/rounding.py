"""How the keys, or the values, of a layer are rounded: what a KV policy writes, and `intactkv.store` applies."""

from collections.abc import Mapping

from torch import Tensor

from corpora.errors import UserError
from intactkv.rope import Places

__all__ = ["Codes", "Exact", "Rounding"]

# What a rounding keeps of some tokens: tensors with the batch on axis 0, tokens or groups of tokens on axis 2.
Codes = Mapping[str, Tensor]


class Rounding:
    """How the keys, or the values, of one layer are rounded.

    block: tokens that share what is stored; `rounded` gives multiples of it. differentiable: gradients go through what
    it computes; through others they go as if nothing were rounded.
    """

    block: int = 1
    differentiable: bool = False

    def rounded(self, query: int) -> int:
        """How many leading tokens behind the prefix the query at that index sees rounded; must not fall. By default
        all, its own one included."""
        return query + 1

    def exact_first(self, prefix: int) -> int:
        """How many of the first tokens behind a prefix of that length stay exact, although they have codes."""
        return 0

    def encode(self, states: Tensor, places: Places) -> Codes:
        """What is stored of some consecutive tokens (B, KV heads, n, D), float32; keys come after RoPE."""
        raise UserError(f"{type(self).__name__} rounds numbers but has no codes; leave packed storage out")

    def decode(self, codes: Codes, places: Places) -> Tensor:
        """The tokens that codes stand for, (B, KV heads, n, D) float32; keys after RoPE."""
        raise NotImplementedError

    def numbers(self, states: Tensor, places: Places) -> Tensor:
        """The tokens as `decode` gives them back: same shape, float32."""
        return self.decode(self.encode(states, places), places)


class Exact(Rounding):
    """Rounds nothing."""

    def rounded(self, query: int) -> int:
        """No token is ever rounded."""
        return 0
