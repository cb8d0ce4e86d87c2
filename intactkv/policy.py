"""What a KV policy is to a cache, and a policy with what one model was calibrated to."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from intactkv.rounding import Exact
from intactkv.store import Store

__all__ = ["Bound", "KVPolicy"]


class KVPolicy(Protocol):
    """How a KV cache is rounded: a frozen dataclass, part of a run's identity.

    space: where keys are rounded, after RoPE or before. calibrates: whether a layer has tensors of its own, from
    calibration text.
    """

    calibrates: ClassVar[bool]

    @property
    def space(self) -> str:
        """`post_rope` or `pre_rope`."""
        ...

    def fit_block(self, block: Any) -> dict[str, Tensor]:
        """The tensors of one block, by names without a dot, from its calibration text."""
        ...

    def store(self, layer: int, tensors: Mapping[str, Tensor] | None, packed: bool = False) -> Store:
        """What one layer of one call keeps. tensors: what the layer was calibrated to, None where nothing is."""
        ...

    def behind(self, prefix: int) -> Self:
        """The policy for tokens behind so many of an intact prefix."""
        ...

    def bits_per_element(self, tokens: int, head_size: int, heads: int) -> tuple[float, float]:
        """Bits that an element of keys, and of values, takes in packed storage once so many tokens are held, in a
        model of 16-bit numbers; scales and everything else that is stored for it included."""
        ...

    def __eq__(self, other: Any) -> bool: ...


def _same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours is theirs or (
        ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())
    )


@dataclass(frozen=True, eq=False)
class Bound:
    """A KV policy with what the layers of one model were calibrated to, by their index; a layer without tensors keeps
    full precision. packed: keep codes. It is a policy itself, and needs nothing more."""

    policy: KVPolicy
    tensors: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)
    packed: bool = False
    calibrates: ClassVar[bool] = False

    @property
    def space(self) -> str:
        """Where keys are rounded."""
        return self.policy.space

    def fit_block(self, block: Any) -> dict[str, Tensor]:
        """See `KVPolicy`."""
        return self.policy.fit_block(block)

    def store(self, layer: int, tensors: Mapping[str, Tensor] | None = None, packed: bool = False) -> Store:
        """What one layer of one call keeps."""
        own = self.tensors.get(layer)
        if self.policy.calibrates and own is None:
            return Store(Exact(), Exact(), packed=packed or self.packed)
        return self.policy.store(layer, own, packed or self.packed)

    def behind(self, prefix: int) -> "Bound":
        """See `KVPolicy`."""
        return replace(self, policy=self.policy.behind(prefix))

    def bits_per_element(self, tokens: int, head_size: int, heads: int) -> tuple[float, float]:
        """See `KVPolicy`."""
        return self.policy.bits_per_element(tokens, head_size, heads)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bound) and (
            (self.policy, self.packed) == (other.policy, other.packed)
            and self.tensors.keys() == other.tensors.keys()
            and all(_same(self.tensors[layer], other.tensors[layer]) for layer in self.tensors)
        )

    __hash__ = None  # type: ignore[assignment]
