"""What one layer of one call keeps of its keys and values: `[prefix, exact | rounded tokens | newest tokens, exact]`.

A `Rounding` says how keys, or values, are rounded, and from when on: the query at index i behind the prefix sees the
first `rounded(i)` tokens rounded, and all later ones exact. Everything else follows from that one number:

    held for the next query        rounded(T) of T tokens rounded
    one pass over several queries  exact: every query sees what it would see token by token, so a pass may need both
                                   forms of some tokens (`TwoForms`); final: all see what the last one leaves; fp: all
                                   see the tokens of their own pass exact

In `fake` storage rounded tokens are numbers in the model's dtype, in `packed` storage they are the rounding's codes,
which are decoded for every read, one layer at a time. Both give the same bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from corpora.errors import UserError
from intactkv.growing import Rooms
from intactkv.rope import Places
from intactkv.rounding import Codes, Exact, Rounding

__all__ = ["Codes", "Direct", "Exact", "Memory", "Rounding", "Side", "Store", "TwoForms"]

FAR = 1 << 40  # tokens, more than any text has
PREFILLS = ("exact", "final", "fp")
DIRECT_ON = {"cuda"}  # kinds of devices where products with codes are faster than decoding them


class Direct(Protocol):
    """Attention of one query per sequence over what two sides hold, without decoding their codes."""

    def __call__(self, query: Tensor, keys: "Side", values: "Side", scaling: float, mask: Tensor | None) -> Tensor:
        """softmax(scaling · q Kᵀ + mask) V: query (B, heads, 1, D), mask (B or 1, 1, 1, P + T) to add, or true where a
        token is seen; (B, heads, 1, D) in the dtype of the query."""
        ...


@dataclass(frozen=True)
class TwoForms:
    """A pass whose queries see some tokens in two forms: rounded as attention was handed them, and these exact ones.

    exact: (B, KV heads, P + T, D). limits: for every query, how many leading columns it sees rounded, the prefix (where
    both are the same) included.
    """

    exact: Tensor
    limits: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes of one or several layers' keys or values behind the prefix, and how many of their elements are rounded."""

    codes: int = 0
    exact: int = 0
    rounded_elements: int = 0
    elements: int = 0

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(*(mine + theirs for mine, theirs in zip(self._all, other._all, strict=True)))

    @property
    def _all(self) -> tuple[int, int, int, int]:
        return self.codes, self.exact, self.rounded_elements, self.elements

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.codes + self.exact


def _total(numbers: range) -> int:
    """Their sum."""
    return (numbers.start + numbers.stop - 1) * len(numbers) // 2


class Side:
    """The keys, or the values, of one layer of one call.

    prefix: (1, KV heads, P, D), None for none. places: gives the places of the tokens from one index behind the prefix
    up to another.
    """

    def __init__(
        self, rounding: Rounding, prefix: Tensor | None, packed: bool, places: Callable[[int, int], Places]
    ) -> None:
        self.rounding, self.packed, self._places = rounding, packed, places
        self.prefix = prefix
        self.length = 0  # tokens behind the prefix
        self.coded = 0  # leading ones of them that are rounded
        self.read = 0  # pairs of a query and a token that it saw rounded
        self.pairs = 0  # of a query and a token that it saw
        # Fake: prefix, rounded and exact tokens in one; packed: the exact ones alone.
        self._states: Tensor | None = None
        self.codes: dict[str, Tensor] = {}
        self._rooms = Rooms(rounding.block)
        self._never = isinstance(rounding, Exact)
        self._at_once = type(rounding).rounded is Rounding.rounded

    @property
    def _front(self) -> int:
        return 0 if self.packed or self.prefix is None else self.prefix.shape[2]

    def append(self, new: Tensor, prefill: str, decode: bool = True) -> tuple[Tensor, TwoForms | None]:
        """Take new tokens (B, KV heads, t, D). Returns what attention shall read, (B, KV heads, P + T, D); unless
        `decode`, something of that shape alone."""
        first, last = self.length, self.length + new.shape[2]
        self.pairs += _total(range(first + 1, last + 1))
        if self._never and decode and not self.packed:  # full precision: every layer of every call passes here
            front = self._states if self._states is not None else self._prefix_of(new)
            self._states, self.length = new.contiguous() if front is None else torch.cat([front, new], dim=2), last
            return self._states, None
        self.settle()
        upto, limits = self._seen(first, last, prefill)
        two = not isinstance(limits, range) and any(seen < min(upto, i + 1) for i, seen in enumerate(limits, first))
        self.read += self._read_by(limits)
        exact = self._joined([*self._parts(new), new]) if two else None
        self._take(new, upto)
        self.length = last
        prefix = 0 if self.prefix is None else self.prefix.shape[2]
        if not decode:
            return new[:, :, :1].expand(-1, -1, prefix + last, -1), None
        return self.states(), None if exact is None else TwoForms(exact, tuple(prefix + limit for limit in limits))

    def _seen(self, first: int, last: int, prefill: str) -> tuple[int, Sequence[int]]:
        """How many leading tokens are rounded once a pass of these queries ends, and how many each of them sees
        rounded; nothing where none sees any. A range where every query sees all of its tokens so: a text has thousands
        of queries, and every layer asks."""
        queries, sees = range(first, last), self.rounding.rounded
        if len(queries) > 1 and prefill != "exact":
            upto = self._upto(last) if prefill == "final" else self.coded
            return upto, [min(upto, i + 1) for i in queries] if upto else []
        if self._at_once:
            return last, range(first + 1, last + 1)
        upto = min(sees(last - 1), last)
        return upto, [min(sees(i), i + 1) for i in queries] if upto else []

    def states(self) -> Tensor:
        """Prefix, rounded and exact tokens, (B, KV heads, P + T, D)."""
        assert self._states is not None
        return self._joined(self._parts(self._states))

    @property
    def exact(self) -> Tensor | None:
        """The tokens behind those that are rounded, in packed storage: (B, KV heads, t, D)."""
        assert self.packed
        return self._states

    def passed(self, new: Tensor) -> Tensor:
        """New tokens (B, KV heads, t, D), rounded, for a layer that keeps them itself; nothing is held."""
        first, self.length = self.length, self.length + new.shape[2]
        counts = range(first + 1, self.length + 1)
        self.pairs += _total(counts)
        if not self.rounding.rounded(0):
            return new
        self.read, self.coded = self.read + self._read_by(counts), first
        seen = self._numbers(new)
        self.coded = self.length
        return seen

    def forget(self) -> None:
        """Hold nothing of what came; what was read of it stays counted."""
        self._states, self.codes, self.length, self.coded = None, {}, 0, 0

    def crop(self, length: int) -> None:
        """Keep only the first `length` tokens. Raises ValueError where tokens that are rounded would have to become
        exact again."""
        upto = self._upto(length)
        if self.coded > upto and upto != length:
            raise ValueError(
                f"cropping the cache to {length} tokens would need {min(self.coded, length) - upto} of them exact, "
                "which are rounded already; crop less, or feed the text again"
            )
        if self._states is not None:
            kept = self._front + (max(length - self.coded, 0) if self.packed else length)
            self._states = self._states[:, :, :kept]
        if self.coded > upto:
            self.codes = {name: x[:, :, : upto // self.rounding.block] for name, x in self.codes.items()}
            self.coded = upto
        self.length = length
        # As if what is left had come token by token.
        self.read = sum(self._lossy(min(self.rounding.rounded(i), i + 1)) for i in range(length))
        self.pairs = length * (length + 1) // 2

    def select(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Edit the batch: `rows` takes a tensor with the batch on axis 0. The prefix is shared by all rows."""
        if self._states is not None:
            self._states = rows(self._states)
        self.codes = {name: rows(x) for name, x in self.codes.items()}

    def memory(self) -> Memory:
        """What is held behind the prefix now."""
        if self._states is None:
            return Memory()
        self.settle()
        rows, heads, tokens, size = self._states.shape
        of_token = rows * heads * size
        tokens -= self._front
        codes = sum(x.nbytes for x in self.codes.values())
        if not self.packed:
            codes, tokens = self.coded * of_token * self._states.element_size(), tokens - self.coded
        return Memory(
            codes,
            tokens * of_token * self._states.element_size(),
            self._lossy(self.coded) * of_token,
            self.length * of_token,
        )

    def _lossy(self, count: int) -> int:
        """Of so many leading tokens with codes, those that are not exact all the same."""
        return max(count - self._exact_first, 0)

    @property
    def _exact_first(self) -> int:
        return self.rounding.exact_first(0 if self.prefix is None else self.prefix.shape[2])

    def _read_by(self, counts: Sequence[int]) -> int:
        """Tokens that queries see inexact, added up, when they see so many leading ones with codes."""
        if not isinstance(counts, range):
            return sum(map(self._lossy, counts))
        exact = self._exact_first
        return _total(range(max(counts.start - exact, 0), counts.stop - exact))

    def _upto(self, length: int) -> int:
        return min(self.rounding.rounded(length), length)

    def settle(self) -> None:
        """Round what the next query will see rounded."""
        upto = self._upto(self.length)
        if self._states is None or upto <= self.coded:
            return
        states, start = self._states, self._front + self.coded
        closed = states.is_inference() and not torch.is_inference_mode_enabled()
        if self.packed or closed or torch.is_grad_enabled():
            self._take(states[:, :, :0], upto)
        else:  # attention has read it; a copy of the whole for every token would cost as much as attention
            states[:, :, start : self._front + upto] = self._numbers(states[:, :, start : self._front + upto])
            self.coded = upto

    def _prefix_of(self, like: Tensor) -> Tensor | None:
        """The prefix where `like` is, and for its batch."""
        if self.prefix is None:
            return None
        prefix = self.prefix.to(like)
        return prefix if len(like) == 1 else prefix.expand(len(like), -1, -1, -1)

    def _parts(self, like: Tensor) -> list[Tensor]:
        """Prefix, rounded and exact tokens in the dtype and on the device of `like`, and for its batch."""
        if self._states is not None and not self.packed:
            return [self._states]
        prefix = self._prefix_of(like)
        parts = [] if prefix is None else [prefix]
        if self.codes:
            parts.append(self.rounding.decode(self.codes, self._places(0, self.coded)).to(like))
        return parts if self._states is None else [*parts, self._states]

    def _joined(self, parts: list[Tensor]) -> Tensor:
        parts = [x for x in parts if x.shape[2]] or parts[:1]
        # As `cat` leaves it: sums over a model's transposed states come in another order.
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=2)

    def _take(self, new: Tensor, upto: int) -> None:
        """Add new tokens behind those that are held, and let the first `upto` of all be rounded."""
        count = upto - self.coded
        if self.packed:
            exact = new if self._states is None else self._joined([self._states, new])
            if count:
                if torch.is_grad_enabled() and exact.requires_grad:
                    raise UserError("packed storage of the KV cache passes no gradients; train with --kv-storage fake")
                part = exact[:, :, :count]
                codes = self.rounding.encode(part.float(), self._places(self.coded, upto))
                self.codes = {name: self._rooms.joined(name, self.codes.get(name), x) for name, x in codes.items()}
                exact = exact[:, :, count:].clone()  # a view would keep all of them in memory
            self._states = exact
        else:
            held = self._joined([*self._parts(new), new]) if self.coded < self.length and count else None
            if held is None:  # nothing waits: the new tokens are rounded on their way in
                parts = self._parts(new)
                if count:
                    parts.append(self._numbers(new[:, :, :count]))
                self._states = self._joined([*parts, new[:, :, count:] if count else new])
            else:
                start = self._front + self.coded
                rounded = self._numbers(held[:, :, start : start + count])
                self._states = self._joined([held[:, :, :start], rounded, held[:, :, start + count :]])
        self.coded = upto

    def _numbers(self, states: Tensor) -> Tensor:
        """The tokens behind those that are rounded, rounded; a gradient passes as if they were not, or as the rounding
        itself says."""
        places = self._places(self.coded, self.coded + states.shape[2])
        seen = self.rounding.numbers(states.float(), places).to(states.dtype)
        if self.rounding.differentiable or not states.requires_grad:
            return seen
        return seen.detach() + (states - states.detach())  # in this order the value is `seen`, bit for bit


class Store:
    """One layer of one call, everything behind the prefix (and the prefix, which it is put behind by `begin`).

    keys, values: how they are rounded. prefill: what the queries of one pass see (`PREFILLS`). packed: keep codes.
    direct: what attends to them as they are, if anything can.
    """

    def __init__(
        self,
        keys: Rounding,
        values: Rounding,
        prefill: str = "exact",
        packed: bool = False,
        direct: Direct | None = None,
    ) -> None:
        self.roundings, self.prefill, self.packed, self.direct = (keys, values), prefill, packed, direct
        self.begin(None, lambda first, last: Places(first, last - first))

    def begin(self, prefix: tuple[Tensor, Tensor] | None, places: Callable[[int, int], Places]) -> None:
        """Start behind a prefix (keys and values, each (1, KV heads, P, D)); forget everything else."""
        self.places = places
        self.keys, self.values = (
            Side(rounding, prefix and prefix[i], self.packed, places) for i, rounding in enumerate(self.roundings)
        )

    @property
    def sides(self) -> tuple[Side, Side]:
        """Keys and values."""
        return self.keys, self.values

    @property
    def length(self) -> int:
        """Tokens behind the prefix."""
        return self.keys.length

    @property
    def waits(self) -> bool:
        """Whether new tokens are exact for a while, or share what is stored."""
        return any(r.block > 1 or (r.rounded(0) == 0 and r.rounded(FAR) > 0) for r in self.roundings)

    def answers(self, new: Tensor) -> bool:
        """Whether attention of the pass with these new keys (B, KV heads, t, D) goes without decoding: `direct`."""
        alone = self.packed and new.shape[2] == 1 and not new.requires_grad
        return self.direct is not None and alone and new.device.type in DIRECT_ON

    def append(
        self, keys: Tensor, values: Tensor, decode: bool = True
    ) -> tuple[tuple[Tensor, Tensor], tuple[TwoForms | None, TwoForms | None]]:
        """Take new keys and values (B, KV heads, t, D); return what attention reads of all, and the other forms; unless
        `decode`, of one query that will ask `direct`, two stand-ins of that shape."""
        (k, of_keys), (v, of_values) = (
            side.append(new, self.prefill, decode) for side, new in zip(self.sides, (keys, values), strict=True)
        )
        return (k, v), (of_keys, of_values)

    def states(self) -> tuple[Tensor, Tensor]:
        """All keys and values in order, each (B, KV heads, P + T, D), as the last pass's queries see them."""
        return self.keys.states(), self.values.states()

    def attended(self, query: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
        """See `Direct`."""
        assert self.direct is not None
        return self.direct(query, *self.sides, scaling, mask)

    def crop(self, length: int) -> None:
        """Keep only the first `length` tokens behind the prefix. Raises ValueError, before anything is changed, where
        that cannot be exact."""
        kept = [dict(vars(side)) for side in self.sides]
        try:
            for side in self.sides:
                side.crop(length)
        except ValueError:
            for side, before in zip(self.sides, kept, strict=True):
                vars(side).update(before)
            raise
