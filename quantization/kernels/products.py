"""Which product multiplies by which packed weight, on which device: asked once, when a model is loaded.

Every product computes what its reference does, `unpack`: dequantize the matrix, then torch's own product. Only `unpack`
gives the bits of the dequantized model; the others are as near to it as the dtype of the inputs allows.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from corpora.errors import UserError
from quantization.grids.stored import restore
from quantization.kernels.lut import Lut
from quantization.kernels.protocols import Prepared, Product, Stored
from quantization.kernels.spqr import Spqr
from quantization.kernels.uniform import Uniform

__all__ = ["AUTO", "PRODUCTS", "check_kernel", "choose"]

AUTO = "auto"  # the first product that takes a weight


class Unpack:
    """x Ŵᵀ + b with Ŵ dequantized on every call: the memory of the codes, not the speed."""

    name: ClassVar[str] = "unpack"

    def takes(self, stored: Stored, device: torch.device) -> bool:
        """Every matrix, everywhere."""
        return True

    def prepare(self, stored: Stored) -> Prepared:
        """The tensors as they are stored."""
        kind, header = stored.kind, stored.header

        def dequantize(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
            return restore(kind, tensors, header).dequantize(dtype)

        def multiply(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
            return nn.functional.linear(x, dequantize(tensors, x.dtype), bias)

        return Prepared(stored.parts, multiply, dequantize)


ROWS = (Uniform(), Lut(), Spqr(), Unpack())  # the faster ones first
PRODUCTS: Mapping[str, Product] = {product.name: product for product in ROWS}


def check_kernel(kernel: str) -> None:
    """Raise UserError for a name that is neither a product's nor `auto`."""
    if kernel != AUTO and kernel not in PRODUCTS:
        raise UserError(f"unknown kernel {kernel!r}; choose from {', '.join((AUTO, *PRODUCTS))}")


def choose(stored: Stored, kernel: str, device: torch.device) -> Product:
    """The product of that name if it takes the matrix on that device, else the first one that does."""
    named = PRODUCTS.get(kernel)
    if named is not None and named.takes(stored, device):
        return named
    return next(product for product in PRODUCTS.values() if product.takes(stored, device))
