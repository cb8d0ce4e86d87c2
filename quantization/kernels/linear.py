"""QuantLinear: a linear layer that keeps its weight packed."""

import logging
from collections import Counter

import torch
from torch import Tensor, nn

from corpora.errors import UserError
from quantization.kernels.products import AUTO, choose
from quantization.kernels.protocols import Stored

__all__ = ["QuantLinear", "name_products", "products_of"]

log = logging.getLogger(__name__)


class QuantLinear(nn.Module):
    """y = x Ŵᵀ + b with a packed Ŵ, by the product that was chosen when it was made.

    The buffers are what that product reads. kernel: the name of a product, or `auto`. device: where it will compute,
    if that is not where its tensors are.
    """

    def __init__(
        self,
        stored: Stored,
        shape: torch.Size,
        bias: Tensor | None,
        kernel: str = "unpack",
        device: torch.device | None = None,
    ):
        super().__init__()
        self.kind, self.header = stored.kind, stored.header
        self.out_features, self.in_features = shape
        product = choose(stored, kernel, device or next(iter(stored.parts.values())).device)
        prepared = product.prepare(stored)
        self.kernel = product.name
        self._multiply, self._dequantize = prepared.multiply, prepared.dequantize
        for name, tensor in prepared.tensors.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Ŵ as the product multiplies with it, (out, in)."""
        return self._dequantize(dict(self.named_buffers()), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) to (..., out)."""
        return self._multiply(x, self._buffers, self.bias)  # type: ignore[arg-type]  # buffers may be None, these are not

    def extra_repr(self) -> str:
        """Shape, product and grid, as torch's modules print themselves."""
        grid = ", ".join(f"{key}={value}" for key, value in self.header.items() if key != "channels")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}, {grid}, "
            f"kernel={self.kernel}"
        )


def products_of(model: nn.Module) -> list[str]:
    """Names of the products that multiply by a model's packed weights, sorted."""
    return sorted({module.kernel for module in model.modules() if isinstance(module, QuantLinear)})


def name_products(model: nn.Module, kernel: str, device: torch.device) -> None:
    """Log which products serve a model's weights. Raises UserError if one was named that serves none of them."""
    found = Counter(module.kernel for module in model.modules() if isinstance(module, QuantLinear))
    if kernel not in (AUTO, *found):
        raise UserError(
            f"--kernel {kernel} takes none of this checkpoint's weights on {device.type}; "
            + (f"give --kernel auto, which takes {' and '.join(found)}" if found else "none is quantized: leave it out")
        )
    served = ", ".join(f"{count} by {name}" for name, count in found.items())
    if kernel != AUTO and len(found) > 1:
        log.warning("--kernel %s does not take every weight; they are multiplied %s", kernel, served)
    else:
        log.info("packed weights are multiplied %s", served)
