"""A matrix whose groups are equal runs of all its values, row after row, wherever rows end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from corpora.errors import UserError
from quantization.grids.uniform import QuantizedTensor, UniformGrid, quantize

__all__ = ["FlatTensor", "quantize_flat", "split_runs"]


@dataclass(frozen=True)
class FlatTensor:
    """runs: (groups, run length), every run on a grid of its own. rows: of the matrix."""

    runs: QuantizedTensor
    rows: int
    kind: ClassVar[str] = "flat"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Real values, (rows, channels)."""
        return self.runs.dequantize(dtype).reshape(self.rows, -1)

    def tensors(self) -> dict[str, Tensor]:
        """Those of the runs."""
        return self.runs.tensors()

    def header(self) -> dict[str, Any]:
        """That of the runs, whose `channels` are a run's length, and the number of rows."""
        return self.runs.header() | {"rows": self.rows}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> "FlatTensor":
        """Undo `tensors` and `header`."""
        fields = dict(header)
        rows = fields.pop("rows")
        return cls(QuantizedTensor.restore(tensors, fields), rows)


def split_runs(weight: Tensor, groups: int, name: str = "weight") -> Tensor:
    """A (rows, channels) matrix as (groups, values of a run).

    Raises UserError if the runs would not be of one length.
    """
    if weight.numel() % groups:
        raise UserError(
            f"{name}: its {weight.shape[0]} × {weight.shape[1]} values make no {groups} runs of one length; set "
            "weights.groups to a divisor of their number for every linear, or to 0 and weights.grid.group_size instead"
        )
    return weight.reshape(groups, -1)


def quantize_flat(weight: Tensor, groups: int, grid: UniformGrid, name: str = "weight") -> FlatTensor:
    """Cut a (rows, channels) matrix into equal runs and put each on its grid. Raises UserError as `quantize` does."""
    return FlatTensor(quantize(split_runs(weight, groups, name), grid, name), weight.shape[0])
