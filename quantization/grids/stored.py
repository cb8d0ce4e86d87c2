"""Quantized weights as checkpoints keep them: one protocol, one class per kind of grid."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from corpora.errors import UserError
from quantization.grids.binary_coding import BinaryCoded
from quantization.grids.flat import FlatTensor
from quantization.grids.sparse import SpQRWeight
from quantization.grids.uniform import QuantizedTensor

__all__ = ["KINDS", "Grid", "StoredWeight", "restore"]


class Grid(Protocol):
    """What every grid of weights has, whatever its levels are."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        ...

    @property
    def group_size(self) -> int:
        """Input channels that share their scales; −1 for a whole row."""
        ...


class StoredWeight(Protocol):
    """A quantized (out, in) matrix in the form that a checkpoint keeps."""

    kind: ClassVar[str]

    def tensors(self) -> dict[str, Tensor]:
        """The parts to store, packed, by a name without a dot that is not `bias`."""
        ...

    def header(self) -> dict[str, Any]:
        """Plain JSON: what the tensors do not tell."""
        ...

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> "StoredWeight":
        """Undo `tensors` and `header`, bit for bit."""
        ...

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Real values, (out, in)."""
        ...


KINDS: Mapping[str, type[StoredWeight]] = {
    kind.kind: kind for kind in (QuantizedTensor, FlatTensor, BinaryCoded, SpQRWeight)
}


def restore(kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> StoredWeight:
    """A stored weight from its parts. Raises UserError for a kind that this version does not know."""
    if kind not in KINDS:
        raise UserError(f"weights of the kind {kind!r} are not known here; choose from {', '.join(KINDS)}")
    return KINDS[kind].restore(tensors, header)
