"""Hadamard and Hartley rotations: an orthonormal M of every order, and its product with activations at low cost.

    H Hᵀ = n I, entries ±1        y = H x / √n spreads an outlier evenly over all n channels        QuaRot, Sec. 3

M is a Kronecker product F₁ ⊗ F₂ ⊗ … ⊗ S of small factors, S = Sylvester's matrix of a power of two. Each factor
follows from a formula, so that no table of matrices is stored: Paley I and II (1933), Williamson (1944). A `Plan` names
the factors. Where no Hadamard matrix exists (its order is 1, 2 or a multiple of 4), or none is known here, the odd part
of n gets the Hartley matrix, whose largest entry is at most √2 times that of a Hadamard matrix.

`apply` reshapes and multiplies by a few narrow dense matrices, one per block of neighbouring factors. Narrow products
are faster than a butterfly of additions, which touches all of x once for each factor of two.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from corpora.errors import UserError

__all__ = [
    "KINDS",
    "MODES",
    "Plan",
    "apply",
    "apply_heads",
    "exists",
    "hartley",
    "matrix",
    "paley_first",
    "paley_second",
    "plan",
    "random_rotation",
    "random_signs",
    "sylvester",
    "williamson",
]

KINDS = ("auto", "hadamard", "hartley")
MODES = ("hadamard", "random")

# First rows of Williamson's four symmetric circulants, by order 4n: +1 except −1 at ±i mod n for the i listed.
WILLIAMSON = {
    52: ((1, 5), (1, 4, 5, 6), (1, 4, 5, 6), (2, 3, 4, 6)),
    92: ((1, 2, 4, 6), (1, 2, 5, 7, 9), (3, 4, 5, 8, 9), (1, 2, 4, 5, 9, 10, 11)),
    100: ((1, 4, 5, 6), (1, 3, 4, 5, 7, 8, 9), (1, 3, 4, 6, 9, 10), (2, 3, 5, 6, 9, 11, 12)),
    172: (
        (1, 2, 3, 6, 7, 12, 14, 18, 21),
        (2, 3, 4, 9, 11, 12, 14, 15, 18, 19, 20, 21),
        (3, 5, 8, 9, 11, 13, 18, 20, 21),
        (2, 9, 10, 11, 12, 14, 16, 17, 20),
    ),
}

# What one more product costs beside the columns of its matrix, and how much more any costs if fewer channels than a
# vector register holds lie behind it. Measured on a CPU with AVX-512, in float32.
PASS_COST, SHORT_ROW, SHORT_COST = 48, 16, 8
# Values that a CPU takes at a time, so that what lies between two products stays in its cache.
CPU_VALUES = 2**19


# constructions --------------------------------------------------------------------------------------------------------


def sylvester(n: int) -> Tensor:
    """Hadamard matrix of a power of two: S₁ = [1], S₂ₙ = [[S, S], [S, −S]]. Returns (n, n) of ±1, float64."""
    result = torch.ones(1, 1, dtype=torch.float64)
    while len(result) < n:
        result = torch.cat([torch.cat([result, result], 1), torch.cat([result, -result], 1)])
    return result


def paley_first(q: int) -> Tensor:
    """Hadamard matrix of order q + 1 for a prime q ≡ 3 (mod 4): I + S, S = [[0, 1ᵀ], [−1, J]], J_ij = χ(i − j).

    Returns (q + 1, q + 1) of ±1, float64.
    """
    core = _bordered(q)
    core[1:, 0] = -1
    return torch.eye(q + 1, dtype=torch.float64) + core


def paley_second(q: int) -> Tensor:
    """Hadamard matrix of order 2(q + 1) for a prime q ≡ 1 (mod 4): S ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]].

    S = [[0, 1ᵀ], [1, J]], J_ij = χ(i − j). Returns (2q + 2, 2q + 2) of ±1, float64.
    """
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(_bordered(q), plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)


def williamson(n: int) -> Tensor:
    """Hadamard matrix of an order in `WILLIAMSON`: [[A, B, C, D], [−B, A, −D, C], [−C, D, A, −B], [−D, −C, B, A]].

    A to D: symmetric circulants with A² + B² + C² + D² = n I. Returns (n, n) of ±1, float64.
    """
    size = n // 4
    a, b, c, d = (_circulant(size, minus) for minus in WILLIAMSON[n])
    rows = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(row, 1) for row in rows])


def hartley(n: int) -> Tensor:
    """The Hartley matrix C_ij = cos(2πij/n) + sin(2πij/n), for every n: symmetric, C C = n I, entries within ±√2.

    Returns (n, n), float64.
    """
    index = torch.arange(n)
    angle = (index[:, None] * index % n).double() * (2 * math.pi / n)  # reduced first: no large arguments
    return angle.cos() + angle.sin()


def _bordered(q: int) -> Tensor:
    """[[0, 1ᵀ], [1, J]] with J_ij = χ(i − j), the quadratic character mod the prime q: (q + 1, q + 1)."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(q) ** 2 % q] = 1
    character[0] = 0
    index = torch.arange(q)
    result = torch.ones(q + 1, q + 1, dtype=torch.float64)
    result[0, 0] = 0
    result[1:, 1:] = character[(index[:, None] - index) % q]
    return result


def _circulant(n: int, minus: tuple[int, ...]) -> Tensor:
    """Symmetric circulant (n, n) whose first row is +1 except −1 at ±i mod n for i in `minus`."""
    row = torch.ones(n, dtype=torch.float64)
    row[[sign * i % n for i in minus for sign in (1, -1)]] = -1
    index = torch.arange(n)
    return row[(index - index[:, None]) % n]


def _prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _construction(n: int) -> Callable[[], Tensor] | None:
    """What makes the Hadamard matrix of order n that is no product, None if nothing does.

    The order of trial is part of what a stored plan means; it must not change.
    """
    if n % 4 == 0 and _prime(n - 1):
        return partial(paley_first, n - 1)
    if n % 8 == 4 and _prime(n // 2 - 1):
        return partial(paley_second, n // 2 - 1)
    return partial(williamson, n) if n in WILLIAMSON else None


# plans ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """M = F₁ ⊗ F₂ ⊗ … ⊗ S, by the orders of its factors. `kind` says what the F are: Hadamard or Hartley matrices.

    factors: orders that are no power of two, ascending; empty for a power of two, which is always "hadamard".
    sylvester: the order of S, a power of two.
    Raises UserError if there are no such matrices.
    """

    kind: str
    factors: tuple[int, ...]
    sylvester: int

    def __post_init__(self) -> None:
        allowed = {"hadamard": lambda order: _construction(order) is not None, "hartley": lambda order: order > 0}
        made = self.kind in allowed and all(map(allowed[self.kind], self.factors))
        if not made or not _power_of_two(self.sylvester):
            raise UserError(
                f"no rotation is made of kind={self.kind!r}, factors={list(self.factors)}, sylvester={self.sylvester}: "
                "the kind is hadamard or hartley, a Hadamard factor has an order that Paley or Williamson construct, "
                "and sylvester is a power of two; make the plan anew"
            )

    @property
    def order(self) -> int:
        """n, the number of channels."""
        return math.prod(self.factors) * self.sylvester

    def header(self) -> dict[str, Any]:
        """The plan as plain JSON, for a checkpoint."""
        return {"kind": self.kind, "factors": list(self.factors), "sylvester": self.sylvester}

    @classmethod
    def restore(cls, header: Mapping[str, Any]) -> "Plan":
        """Undo `header`."""
        return cls(header["kind"], tuple(header["factors"]), header["sylvester"])


def exists(n: int) -> bool:
    """Whether a Hadamard matrix of order n is known here: a product of Sylvester, Paley I, Paley II, Williamson."""
    return _hadamard_factors(n) is not None


@cache
def plan(n: int, kind: str = "auto") -> Plan:
    """The rotation of n channels.

    kind: "hadamard"; "hartley": Hartley on the odd part of n ⊗ Sylvester; "auto": Hadamard where one is known, else
    Hartley. The factors of a Hadamard matrix have the least sum possible, because an application costs that much.
    Raises UserError for another kind, for n < 1, and for kind="hadamard" where none is known.
    """
    if kind not in KINDS:
        raise UserError(f"rotation {kind!r} is unknown; use one of {', '.join(KINDS)}")
    if n < 1:
        raise UserError(f"{n} channels cannot be rotated; it takes at least 1")
    factors = None if kind == "hartley" else _hadamard_factors(n)
    two = n & -n
    if factors is not None or two == n:
        return Plan("hadamard", factors or (), n // math.prod(factors or ()))
    if kind == "hadamard":
        raise UserError(f"no Hadamard matrix of order {n} is known here; use hartley, or auto, which falls back to it")
    return Plan("hartley", (n // two,), two)


@cache
def _hadamard_factors(n: int) -> tuple[int, ...] | None:
    """Ascending orders, none a power of two, whose product divides n with a power of two left over; least sum, then
    the smallest first factor. None if there are none."""
    if _power_of_two(n):
        return ()
    choices = []
    for order in range(12, n + 1, 4):
        if n % order == 0 and not _power_of_two(order) and _construction(order) is not None:
            rest = _hadamard_factors(n // order)
            if rest is not None:
                choices.append(tuple(sorted((order, *rest))))
    return min(choices, key=lambda orders: (sum(orders), orders), default=None)


def matrix(plan: Plan) -> Tensor:
    """M itself: (n, n), float64, orthonormal."""
    return _kronecker(plan.kind, _items(plan)) / math.sqrt(plan.order)


# fast products --------------------------------------------------------------------------------------------------------


def apply(x: Tensor, plan: Plan, transpose: bool = False) -> Tensor:
    """M x on the last axis: every row vector of x becomes x Mᵀ, or x M if `transpose`, which undoes it.

    x: (..., n), any float dtype. Computed in float32, or float64 if x is float64, also under autocast; returns the
    shape and dtype of x. Differentiable. Raises ValueError for another number of channels.
    """
    return _multiply(x, plan, 1, transpose)


def apply_heads(x: Tensor, plan: Plan, head_size: int, transpose: bool = False) -> Tensor:
    """M mixes heads: (M ⊗ I) x, the head axis of x (..., heads · head_size) multiplied by M, or by Mᵀ if `transpose`.

    plan: of as many channels as there are heads. Otherwise as `apply`.
    """
    return _multiply(x, plan, head_size, transpose)


def _multiply(x: Tensor, plan: Plan, inner: int, transpose: bool) -> Tensor:
    """(M ⊗ I) x or (Mᵀ ⊗ I) x with I of order `inner`, a block of tokens at a time on a CPU."""
    channels = plan.order * inner
    if x.ndim == 0 or x.shape[-1] != channels:
        raise ValueError(f"x of shape {tuple(x.shape)} does not end in the plan's {plan.order} × {inner} channels")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    matrices = [m.T if transpose else m for m in _matrices(plan, x.device, dtype)]
    rows = x.reshape(-1, channels)
    count = max(1, CPU_VALUES // channels) if x.device.type == "cpu" else max(1, len(rows))
    with torch.autocast(x.device.type, enabled=False):
        parts = [_product(part.to(dtype), matrices, inner).to(x.dtype) for part in rows.split(count)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)


def _product(x: Tensor, matrices: list[Tensor], inner: int) -> Tensor:
    """(M₁ ⊗ M₂ ⊗ … ⊗ I) x for x (tokens, channels): the last matrix first, `inner` channels belong together."""
    shape = x.shape
    for m in reversed(matrices):
        width = m.shape[0]
        x = x.reshape(-1, width) @ m.T if inner == 1 else m @ x.reshape(-1, width, inner)
        inner *= width
    return x.view(shape)


@cache
def _matrices(plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The blocks of M, each (width, width), whose Kronecker product it is. The first holds 1/√n; the others of a
    Hadamard matrix are ±1, hence exact in every dtype."""
    _, blocks = _blocks(_items(plan))
    with torch.inference_mode(False):  # a caller's inference mode would make tensors that no gradient can pass
        first, *others = (_kronecker(plan.kind, items) for items in blocks)
        return tuple(m.to(device, dtype) for m in (first / math.sqrt(plan.order), *others))


def _items(plan: Plan) -> tuple[int, ...]:
    """The factors, then S as S₂ ⊗ S₂ ⊗ …: the finest way to write M."""
    return (*plan.factors, *[2] * (plan.sylvester.bit_length() - 1)) or (1,)


def _kronecker(kind: str, items: tuple[int, ...]) -> Tensor:
    """The product of the items' matrices, not yet divided by the root of its order: (width, width), float64."""
    result = torch.ones(1, 1, dtype=torch.float64)
    for order in items:
        construct = _construction(order)
        if order <= 2:
            factor = sylvester(order)
        elif kind == "hadamard" and construct is not None:
            factor = construct()
        else:
            factor = hartley(order)
        result = torch.kron(result, factor)
    return result


@cache
def _blocks(items: tuple[int, ...]) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Cost of `apply`, and the neighbouring items that are multiplied out to make it least.

    A block of width w costs w multiplications a value and one pass over x; a pass is slow if the channels behind the
    block are few.
    """
    if not items:
        return 0, ()
    choices = []
    for end in range(1, len(items) + 1):
        behind = math.prod(items[end:])
        cost, blocks = _blocks(items[end:])
        cost += (math.prod(items[:end]) + PASS_COST) * (SHORT_COST if 1 < behind < SHORT_ROW else 1)
        choices.append((cost, (items[:end], *blocks)))
    return min(choices)


# random rotations -----------------------------------------------------------------------------------------------------


def random_signs(n: int, seed: int) -> Tensor:
    """The diagonal of D: (n,) of ±1, float64, drawn on the CPU so that every machine has the same."""
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def random_rotation(n: int, seed: int, mode: str = "hadamard") -> Tensor:
    """A random orthogonal matrix Q: (n, n), float64.

    mode "hadamard": Q = D Mᵀ with random signs D (QuaRot's randomized Hadamard matrix); x Q is then
    `apply(x * random_signs(n, seed), plan(n))`. Mode "random": Q of a Gaussian matrix's QR, the diagonal of R made
    positive, hence uniform over all rotations and reflections. Raises UserError for another mode.
    """
    if mode == "hadamard":
        return random_signs(n, seed)[:, None] * matrix(plan(n)).T
    if mode == "random":
        gaussian = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        return q * r.diagonal().sign()
    raise UserError(f"rotation mode {mode!r} is unknown; use one of {', '.join(MODES)}")
