"""Quantized linears by the names that transformers' own model has for them: those that it fuses are one matrix again.

Rows of a matrix are quantized on their own, so the codes of its parts, joined, are the codes of the whole. Only the
order of columns is shared: after GPTQ's activation order the parts must have the same, and have, as they read the same
input.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from corpora.errors import UserError
from intactkv.architecture import Architecture, Fused
from intactkv.layout import joined
from quantization.grids.stored import StoredWeight
from quantization.grids.uniform import QuantizedTensor

__all__ = ["as_stored", "check_packed", "join_plain"]

DENSE = "export real values: --format dense"


def as_stored(
    names: Architecture, block: str, weights: Mapping[str, StoredWeight]
) -> Iterator[tuple[str, StoredWeight]]:
    """A block's quantized linears as transformers' own model names them.

    Raises UserError for codes that are no single matrix.
    """
    left = dict(weights)
    for fused in names.fused:
        owner = f"{block}.{fused.module}"
        parts = _parts_of(fused, owner)
        own = {part: left.pop(name) for part, name in parts.items() if name in left}
        if own and (plain := [part for part in parts if part not in own]):
            raise UserError(
                f"{owner}: of its parts {', '.join(plain)} are not quantized, and all are one matrix; {DENSE}"
            )
        if own:
            yield owner, _whole(fused, own, owner)
    yield from left.items()


def join_plain(names: Architecture, block: str, tensors: dict[str, Tensor]) -> None:
    """Exchange a block's weights and biases, in place, for those of transformers' own model."""
    for fused in names.fused:
        owner = f"{block}.{fused.module}"
        for parameter in ("weight", "bias"):
            stored = {part: f"{name}.{parameter}" for part, name in _parts_of(fused, owner).items()}
            if own := {part: tensors.pop(name) for part, name in stored.items() if name in tensors}:
                tensors[f"{owner}.{parameter}"] = joined(fused, own)


def _parts_of(fused: Fused, owner: str) -> dict[str, str]:
    """The linears of a fused module, by part; a module without parts is its only one."""
    return {part: f"{owner}.{part}" for part in fused.parts} or {"": owner}


def check_packed(names: Architecture) -> None:
    """Raise UserError for a family whose matrices no format of codes can hold."""
    for fused in names.fused:
        if fused.transposed:
            raise UserError(
                f"{fused.module} is no linear in transformers' model but a Conv1D, which no packed format holds; "
                f"{DENSE}"
            )
    if names.experts is not None:
        raise UserError(
            f"{names.experts.module}: transformers keeps the experts of a block in one tensor, which it reads in no "
            f"packed format; {DENSE}"
        )


def _whole(fused: Fused, weights: Mapping[str, StoredWeight], name: str) -> StoredWeight:
    first, *others = weights.values()
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
