"""Equivalent rescaling: scales (and shifts) move between two linear maps and the function stays the same.

    norm or linear → linears     y = x W₂ᵀ, x = f·g      producer: g/s, (β − δ)/s; consumers: W₂·diag(s), b₂ + W₂ δ
    query ↔ key                  q·k                     rows of q over s, rows of k times s

AWQ (2306.00978, Eq. 4), SmoothQuant (2211.10438, Eq. 3) and OmniQuant's LET (2308.13137, Eq. 3 to 5) differ only in how
s and δ are found. A quantized checkpoint keeps what was applied, so that its full-precision twin, the model whose keys
and values are in the same basis, is the dense checkpoint with the same rescalings and no rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corpora.errors import UserError

__all__ = ["Rescaling", "per_column", "rescale"]


@dataclass(frozen=True)
class Rescaling:
    """One pair within a block, by the dotted names of its modules.

    scale: (channels,) float32, positive, one per channel that the producer puts out (per KV channel for v → o).
    shift: (channels,) or None; needs a producer and consumers with biases.
    rows: scale the consumers' rows instead of their columns: the query ↔ key pair.
    """

    producer: str
    consumers: tuple[str, ...]
    scale: Tensor
    shift: Tensor | None = None
    rows: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Scale and shift, for a checkpoint."""
        return {"scale": self.scale} | ({} if self.shift is None else {"shift": self.shift})

    def header(self) -> dict[str, Any]:
        """What `tensors` does not tell, as plain JSON."""
        return {"producer": self.producer, "consumers": list(self.consumers), "rows": self.rows}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> "Rescaling":
        """Undo `tensors` and `header`."""
        return cls(
            header["producer"], tuple(header["consumers"]), tensors["scale"], tensors.get("shift"), header["rows"]
        )


def per_column(values: Tensor, columns: int, head_size: int) -> Tensor:
    """Values per KV channel (n_kv·D,) for the columns that read them, (columns,): with grouped queries every KV head is
    read by several query heads in a row. Unchanged where producer and consumer have the same width."""
    if values.numel() == columns:
        return values
    heads, repeats = values.numel() // head_size, columns // values.numel()
    return values.view(heads, 1, head_size).expand(heads, repeats, head_size).reshape(columns)


@torch.no_grad()
def rescale(block: nn.Module, step: Rescaling, head_size: int) -> None:
    """Apply a rescaling to a block's weights, in place: arithmetic in float32, results in the weights' dtype.

    Raises UserError if a scale is not positive and finite, or if a shift has no bias to live in.
    """
    producer = block.get_submodule(step.producer)
    weight = _parameter(producer, "weight")
    scale = step.scale.to(weight.device, torch.float32)
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise UserError(f"the scales of {step.producer} → {', '.join(step.consumers)} are not all positive and finite")
    biases = [getattr(module, "bias", None) for module in (producer, *map(block.get_submodule, step.consumers))]
    if step.shift is not None and any(bias is None for bias in biases):
        raise UserError(f"{step.producer} → {', '.join(step.consumers)}: a shift needs biases, and some have none")
    shift = None if step.shift is None else step.shift.to(weight.device, torch.float32)
    _set(weight, weight.float() / (scale[:, None] if weight.ndim == 2 else scale))
    if biases[0] is not None:
        _set(biases[0], (biases[0].float() - (0 if shift is None else shift)) / scale)
    for name, bias in zip(step.consumers, biases[1:], strict=True):
        consumer = _parameter(block.get_submodule(name), "weight")
        if step.rows:
            _set(consumer, consumer.float() * (scale[:, None] if consumer.ndim == 2 else scale))
            if bias is not None:
                _set(bias, bias.float() * scale)
            continue
        columns = consumer.shape[1]
        if shift is not None and bias is not None:
            _set(bias, bias.float() + consumer.float() @ per_column(shift, columns, head_size))
        _set(consumer, consumer.float() * per_column(scale, columns, head_size))


def rescale_all(block: nn.Module, steps: Sequence[Rescaling], head_size: int) -> None:
    """Apply several rescalings, in their order."""
    for step in steps:
        rescale(block, step, head_size)


def _parameter(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    return value


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.data = value.to(parameter.dtype)
