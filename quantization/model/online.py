"""Rotations that a model applies while it runs, in front of a linear whose weight holds their inverse.

x ← x Mᵀ over all channels (QuaRot's R4, in front of the feed-forward part's last linear), or over the heads of
(heads, D) (in front of attention's last)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from quantization.hadamard import Plan, apply, apply_heads, plan

__all__ = ["OnlineRotation"]


@dataclass(frozen=True)
class OnlineRotation:
    """x to x Mᵀ, M orthonormal.

    plan: how M is made of factors; kept with the checkpoint, whose weights hold the inverse of exactly this M.
    head_size: None rotates all channels; otherwise channels are (heads, head_size), and the heads are mixed.
    """

    plan: Plan
    head_size: int | None = None

    @classmethod
    def of(cls, size: int, head_size: int | None = None, kind: str = "auto") -> Self:
        """The rotation of `size` channels, or heads; kind: see `hadamard.plan`."""
        return cls(plan(size, kind), head_size)

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., channels), same shape and dtype."""
        return apply(x, self.plan) if self.head_size is None else apply_heads(x, self.plan, self.head_size)

    def header(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"plan": self.plan.header(), "head_size": self.head_size}

    @classmethod
    def restore(cls, header: Mapping[str, Any]) -> Self:
        """Undo `header`."""
        return cls(Plan.restore(header["plan"]), header["head_size"])
