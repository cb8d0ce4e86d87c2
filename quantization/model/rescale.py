"""Equivalent rescaling: scales (and shifts) move between two linear maps and the function stays the same.

    norm or linear → linears     y = x W₂ᵀ, x = f·g      producer: g/s, (β − δ)/s; consumers: W₂·diag(s), b₂ + W₂ δ
    query ↔ key                  q·k                     rows of q over s, rows of k times s

A norm's gain g is its weight, or 1 plus its weight.

AWQ (2306.00978, Eq. 4), SmoothQuant (2211.10438, Eq. 3) and OmniQuant's LET (2308.13137, Eq. 3 to 5) differ only in how
s and δ are found. A quantized checkpoint keeps what was applied, so that its full-precision twin, the model whose keys
and values are in the same basis, is the dense checkpoint with the same rescalings and no rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from corpora.errors import UserError

__all__ = ["Rescaling", "held", "per_column", "rescale", "rescaled"]


@dataclass(frozen=True)
class Rescaling:
    """One pair within a block, by the dotted names of its modules.

    scale: (channels,) float32, positive, one per channel that the producer puts out; per KV channel for v → o and for
    query ↔ key, where the query heads that share a KV head share its scales.
    shift: (channels,) or None; needs a producer and consumers with biases.
    rows: scale the consumers' rows instead of their columns: the query ↔ key pair. offset: the gain of the norms among
    them is so much more than their weight.
    """

    producer: str
    consumers: tuple[str, ...]
    scale: Tensor
    shift: Tensor | None = None
    rows: bool = False
    offset: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Scale and shift, for a checkpoint."""
        return {"scale": self.scale} | ({} if self.shift is None else {"shift": self.shift})

    def header(self) -> dict[str, Any]:
        """What `tensors` does not tell, as plain JSON."""
        offset = {"offset": self.offset} if self.offset else {}  # files that have none stay what they were
        return {"producer": self.producer, "consumers": list(self.consumers), "rows": self.rows} | offset

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> "Rescaling":
        """Undo `tensors` and `header`."""
        producer, consumers, offset = header["producer"], tuple(header["consumers"]), header.get("offset", 0.0)
        return cls(producer, consumers, tensors["scale"], tensors.get("shift"), header["rows"], offset)


def per_column(values: Tensor, columns: int, head_size: int) -> Tensor:
    """Values per KV channel (n_kv·D,) for the columns that read them, (columns,): with grouped queries every KV head is
    read by several query heads in a row. Unchanged where producer and consumer have the same width."""
    if values.numel() == columns:
        return values
    heads, repeats = values.numel() // head_size, columns // values.numel()
    return values.view(heads, 1, head_size).expand(heads, repeats, head_size).reshape(columns)


def held(weight: Tensor, step: Rescaling) -> Rescaling:
    """The step with the scales that a norm of 1 + w can hold, to which the consumers then fit.

    Near 0 a gain of 1 + w is rounded as coarsely as 1 is: in bfloat16 one of 0.1 may be 2% off. weight: w.
    """
    gain = weight.detach().float() + step.offset
    scale = step.scale.to(gain)
    least = torch.finfo(weight.dtype).eps
    wanted = gain / scale
    wanted = torch.where(wanted.abs() < least, torch.copysign(torch.full_like(gain, least), gain), wanted)
    kept = (wanted - step.offset).to(weight.dtype).float() + step.offset
    return replace(step, scale=torch.where(gain == 0, scale, gain / kept))


def _per_row(values: Tensor, like: Tensor, head_size: int) -> Tensor:
    """Values per KV channel as factors of a parameter: of a linear's weight (rows, in), of a bias or a norm, (rows,) or
    (heads, D)."""
    if like.ndim == 2 and like.shape[0] % values.numel() == 0:
        return per_column(values, like.shape[0], head_size)[:, None]
    return per_column(values, like.numel(), head_size).view_as(like)


def rescaled(parameters: Mapping[str, Tensor], step: Rescaling, head_size: int) -> Iterator[tuple[str, Tensor]]:
    """What a rescaling makes of a block's parameters: name and new value of each that it changes, in float32.

    parameters: by their dotted names. Gradients flow to scale and shift. Raises UserError if a shift has no bias to
    live in.
    """
    if step.shift is not None and any(f"{name}.bias" not in parameters for name in (step.producer, *step.consumers)):
        raise UserError(f"{step.producer} → {', '.join(step.consumers)}: a shift needs biases, and some have none")
    weight, bias = _weight_and_bias(parameters, step.producer)
    scale = step.scale.to(weight.device, torch.float32)
    shift = None if step.shift is None else step.shift.to(weight.device, torch.float32)
    # The query heads of a KV head share its scales.
    yield f"{step.producer}.weight", (weight + step.offset) / _per_row(scale, weight, head_size) - step.offset
    if bias is not None:
        yield f"{step.producer}.bias", (bias if shift is None else bias - shift) / _per_row(scale, bias, head_size)
    for name in step.consumers:
        weight, bias = _weight_and_bias(parameters, name)
        if step.rows:
            yield f"{name}.weight", (weight + step.offset) * _per_row(scale, weight, head_size) - step.offset
            if bias is not None:
                yield f"{name}.bias", bias * _per_row(scale, bias, head_size)
            continue
        columns = weight.shape[1]
        if shift is not None and bias is not None:
            yield f"{name}.bias", bias + weight @ per_column(shift, columns, head_size)
        yield f"{name}.weight", weight * per_column(scale, columns, head_size)


@torch.no_grad()
def rescale(block: nn.Module, step: Rescaling, head_size: int) -> None:
    """Apply a rescaling to a block's weights, in place: arithmetic in float32, results in the weights' dtype.

    Raises UserError if a scale is not positive and finite, or if a shift has no bias to live in.
    """
    if not (torch.isfinite(step.scale).all() and (step.scale > 0).all()):
        raise UserError(f"the scales of {step.producer} → {', '.join(step.consumers)} are not all positive and finite")
    parameters = dict(block.named_parameters())
    for name, value in rescaled(parameters, step, head_size):
        parameters[name].data = value.to(parameters[name].dtype)


def rescale_all(block: nn.Module, steps: Sequence[Rescaling], head_size: int) -> None:
    """Apply several rescalings, in their order."""
    for step in steps:
        rescale(block, step, head_size)


def _weight_and_bias(parameters: Mapping[str, Tensor], module: str) -> tuple[Tensor, Tensor | None]:
    """A module's own, in float32; no bias is None."""
    bias = parameters.get(f"{module}.bias")
    return parameters[f"{module}.weight"].float(), None if bias is None else bias.float()
