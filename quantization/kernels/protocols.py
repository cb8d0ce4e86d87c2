"""What a product with packed weights is: which weights it takes where, what it keeps of them, how it multiplies."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from quantization.grids.stored import StoredWeight, restore

__all__ = ["Dequantize", "Multiply", "Prepared", "Product", "Stored", "in_place"]

# (x, tensors, bias) → x Ŵᵀ + bias: x (..., in) of any float dtype, (..., out) in that dtype; tensors as prepared.
Multiply = Callable[[Tensor, Mapping[str, Tensor], Tensor | None], Tensor]

# (tensors, dtype) → Ŵ (out, in) in that dtype, as the product multiplies with it.
Dequantize = Callable[[Mapping[str, Tensor], torch.dtype], Tensor]


@dataclass(frozen=True, eq=False)
class Stored:
    """A quantized matrix as a checkpoint keeps it: tensors by name, and plain JSON."""

    kind: str
    parts: Mapping[str, Tensor]
    header: Mapping[str, Any]

    @cached_property
    def weight(self) -> StoredWeight:
        """The matrix on its grid, with its codes unpacked."""
        return restore(self.kind, self.parts, self.header)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A matrix as a product reads it.

    tensors: what a module keeps as its buffers, by a name without a dot that is not `bias`; scales stay of a float
    dtype, so that damage is found. multiply, dequantize: get the tensors as they are then, where the module has gone.
    """

    tensors: Mapping[str, Tensor]
    multiply: Multiply
    dequantize: Dequantize


class Product(Protocol):
    """One way to multiply by packed weights, a row of `quantization.kernels.products.PRODUCTS`."""

    name: ClassVar[str]

    def takes(self, stored: Stored, device: torch.device) -> bool:
        """Whether it can multiply by this matrix there: kind, shape, bits, groups, what the device has."""
        ...

    def prepare(self, stored: Stored) -> Prepared:
        """Lay a matrix out for the product, once, on the device that its tensors are on."""
        ...


def in_place(dense: Tensor, order: Tensor | None) -> Tensor:
    """(out, in) with its channels where they belong, of one that has them in another order: channel `order[k]` at k."""
    return dense if order is None else dense.index_select(1, order.argsort())
