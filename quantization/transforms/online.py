"""Rotations that a model applies while it runs, in front of a linear whose weight holds their inverse.

x ← x Mᵀ over all channels (QuaRot's R4 in front of down_proj), or over the heads of (heads, D) (in front of o_proj)
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from quantization.transforms.hadamard import Plan, apply, apply_heads, plan

__all__ = ["OnlineRotation"]


@dataclass(frozen=True)
class OnlineRotation:
    """x to x Mᵀ, M orthonormal of order `size`.

    head_size: None rotates all channels; otherwise channels are (size heads, head_size), and the heads are mixed.
    kind: see `hadamard.plan`.
    """

    size: int
    head_size: int | None = None
    kind: str = "auto"

    @cached_property
    def plan(self) -> Plan:
        """How M is made of factors."""
        return plan(self.size, self.kind)

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., channels), same shape and dtype."""
        return apply(x, self.plan) if self.head_size is None else apply_heads(x, self.plan, self.head_size)

    def header(self) -> dict[str, Any]:
        """Plain JSON, the fields of this class."""
        return asdict(self)
