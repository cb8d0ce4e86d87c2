"""Quantized linears by the names that transformers' own model has for them: those that it fuses are one matrix again.

Rows of a matrix are quantized on their own, so the codes of its parts, joined, are the codes of the whole. Only the
order of columns is shared: after GPTQ's activation order the parts must have the same, and have, as they read the same
input.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from corpora.errors import UserError
from intactkv.architecture import Architecture, Fused
from intactkv.layout import joined
from quantization.grids.stored import StoredWeight
from quantization.grids.uniform import QuantizedTensor

__all__ = ["as_stored", "check_packed"]

DENSE = "export real values: --format dense"


@dataclass(frozen=True)
class _Values:
    """Real values, as transformers' module holds them."""

    values: Tensor
    kind: ClassVar[str] = "values"

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def header(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> "_Values":
        return cls(tensors["values"])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.values.to(dtype)


def as_stored(
    names: Architecture, block: str, weights: dict[str, StoredWeight], tensors: dict[str, Tensor], packed: bool
) -> Iterator[tuple[str, StoredWeight]]:
    """A block's quantized linears as transformers' own model names them; what stays plain of them is joined within
    `tensors`. packed: for a format of codes, not of real values.

    Raises UserError for what a format of codes cannot hold as one matrix.
    """
    for fused in names.fused:
        owner = f"{block}.{fused.module}"
        parts = {part: f"{owner}.{part}" for part in fused.parts} or {"": owner}
        own = {part: weights.pop(name) for part, name in parts.items() if name in weights}
        for parameter in ("weight", "bias"):
            plain = {
                part: tensors.pop(f"{name}.{parameter}")
                for part, name in parts.items()
                if f"{name}.{parameter}" in tensors
            }
            if own and plain and parameter == "weight":
                if packed:
                    raise UserError(
                        f"{owner}: of its parts {', '.join(plain)} are not quantized, and all are one matrix; {DENSE}"
                    )
                own = {part: own.get(part) or _Values(plain[part]) for part in parts}
            elif plain:
                tensors[f"{owner}.{parameter}"] = joined(fused, plain)
        if own:
            yield owner, _whole(fused, own, owner, packed)
    for name, weight in weights.items():
        if packed and names.expert_of(name.removeprefix(f"{block}.")) is not None:
            raise UserError(
                f"{name}: transformers keeps the experts of a block in one tensor, which it reads in no packed format; "
                f"{DENSE}"
            )
        yield name, weight


def check_packed(names: Architecture) -> None:
    """Raise UserError for a family whose matrices no format of codes can hold."""
    for fused in names.fused:
        if fused.transposed:
            raise _conv1d(fused.module)


def _conv1d(name: str) -> UserError:
    return UserError(f"{name} is no linear in transformers' model but a Conv1D, which no packed format holds; {DENSE}")


def _whole(fused: Fused, weights: Mapping[str, StoredWeight], name: str, packed: bool) -> StoredWeight:
    first, *others = weights.values()
    if not packed:
        return _Values(joined(fused, {part: weight.dequantize() for part, weight in weights.items()}))
    if fused.transposed:
        raise _conv1d(name)
    if not isinstance(first, QuantizedTensor):
        return first  # the format refuses it in its own words
    for other in others:
        same = isinstance(other, QuantizedTensor) and other.grid == first.grid
        if not same:
            raise UserError(
                f"{name}: its parts {', '.join(weights)} are on different grids, and are one matrix; {DENSE}"
            )
        assert isinstance(other, QuantizedTensor)
        indices = [x for x in (first.group_index, other.group_index) if x is not None]
        if len(indices) == 1 or (indices and not torch.equal(*indices)):
            raise UserError(
                f"{name}: its parts {', '.join(weights)} have their columns in different orders, and are one matrix; "
                f"quantize with --set weights.static_groups=true, or {DENSE}"
            )

    def rows(of: str) -> Tensor:
        return joined(fused, {part: getattr(weight, of) for part, weight in weights.items()})

    return replace(first, codes=rows("codes"), scale=rows("scale"), zero_point=rows("zero_point"))
