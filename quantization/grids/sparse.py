"""SpQR's stored form: codes on grids whose own scales and zero points are codes, plus a sparse matrix of corrections.

    ŵ = s·(q − z) + r,    s = s₂·(q_s − z_s),  z = s₃·(q_z − z_z)         sections 3.2 and 4 of 2306.03078

q: per weight. q_s, q_z: per row and group of channels. s₂, z_s, s₃, z_z: half precision, per tile of `scale_group` rows
and one group. r: half precision, in compressed sparse rows, zero for all but the outliers. Channels, and with them the
groups and the columns of r, are in the order in which they were processed.

Departs from the reference, which stores an outlier's value beside a dense code: its loader replaces the dense value,
its kernel adds to it, and with a real zero point the dense value of an outlier is not 0. A correction is always added.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantization.grids.packing import pack_codes, unpack_codes
from quantization.grids.uniform import Fit, merge_groups, split_groups

__all__ = ["SMALLEST_SCALE", "SecondLevel", "SpQRWeight", "SparseRows", "first_level"]

SMALLEST_SCALE = 1e-9  # what the reference divides by at least
# Parts of a checkpoint that the paper's average bits leave out: 32/in and 16/out bits per weight.
UNCOUNTED = ("row_pointers", "order")


def index_dtype(channels: int) -> torch.dtype:
    """The narrowest type for channel numbers: 16 bits, as the paper counts them, as long as they suffice."""
    return torch.uint16 if channels <= 2**16 else torch.int32


@dataclass(frozen=True)
class SparseRows:
    """A sparse (rows, channels) matrix.

    row_pointers: (rows + 1,) int32; row i owns entries row_pointers[i] … row_pointers[i + 1] − 1.
    columns: (entries,) uint16, or int32 above 65536 channels; rising within a row. values: (entries,) float16.
    """

    row_pointers: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, dense: Tensor) -> "SparseRows":
        """Keep the entries of a (rows, channels) float16 matrix that are not zero."""
        rows, columns = dense.nonzero(as_tuple=True)  # row after row
        counts = torch.bincount(rows, minlength=len(dense))
        pointers = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        return cls(pointers, columns.to(index_dtype(dense.shape[1])), dense[rows, columns])

    def add_to(self, dense: Tensor) -> None:
        """Add every entry to a dense float32 matrix of the same shape, in place."""
        counts = self.row_pointers.diff().long()
        rows = torch.repeat_interleave(torch.arange(len(counts), device=dense.device), counts)
        dense[rows, self.columns.long()] += self.values.float()  # no entry occurs twice

    def rows(self, start: int, stop: int) -> "SparseRows":
        """The matrix of some consecutive rows."""
        first, last = int(self.row_pointers[start]), int(self.row_pointers[stop])
        pointers = self.row_pointers[start : stop + 1] - first
        return SparseRows(pointers, self.columns[first:last], self.values[first:last])


@dataclass(frozen=True)
class SecondLevel:
    """Numbers of the first level (scales, or zero points), one per row, on a grid per tile of consecutive rows.

    codes: (..., rows) uint8. scale, zero_point: (..., tiles) float16.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def dequantize(self) -> Tensor:
        """Real values in float32, (..., rows)."""
        tiles = self.codes.unflatten(-1, (self.scale.shape[-1], -1)).float()
        return merge_groups((tiles - self.zero_point.float()[..., None]) * self.scale.float()[..., None])

    def rows(self, start: int, stop: int) -> "SecondLevel":
        """The part of some consecutive rows, which must be whole tiles."""
        size = self.codes.shape[-1] // self.scale.shape[-1]
        tiles = slice(start // size, stop // size)
        return SecondLevel(self.codes[..., start:stop], self.scale[..., tiles], self.zero_point[..., tiles])


def first_level(scales: SecondLevel, zero_points: SecondLevel) -> Fit:
    """The grid that weights are rounded to and read back on: both (..., rows) float32, scales positive."""
    return Fit(scales.dequantize().clamp_min(SMALLEST_SCALE), zero_points.dequantize())


@dataclass(frozen=True)
class SpQRWeight:
    """A matrix in SpQR's form.

    codes: (out, in) uint8. scales, zero_points: codes (groups, out), grids (groups, tiles). corrections: (out, in).
    order: (in,) channel numbers in processing order, uint16 or int32 as the columns; None if nothing was permuted.
    """

    codes: Tensor
    scales: SecondLevel
    zero_points: SecondLevel
    corrections: SparseRows
    order: Tensor | None
    bits: int
    scale_bits: int
    zero_bits: int
    kind: ClassVar[str] = "spqr"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Real values s·(q − z) + r, computed in float32: (out, in), channels in the model's order."""
        grid = first_level(self.scales, self.zero_points)  # (groups, out)
        codes = split_groups(self.codes, self.codes.shape[1] // len(grid.scale)).float()
        dense = merge_groups((codes - grid.zero_point.T[..., None]) * grid.scale.T[..., None])
        self.corrections.add_to(dense)
        if self.order is not None:
            dense = dense[:, torch.argsort(self.order.long())]
        return dense.to(dtype)

    def rows(self, start: int, stop: int) -> "SpQRWeight":
        """The matrix of some consecutive rows, which must be whole tiles."""
        return replace(
            self,
            codes=self.codes[start:stop],
            scales=self.scales.rows(start, stop),
            zero_points=self.zero_points.rows(start, stop),
            corrections=self.corrections.rows(start, stop),
            order=None if self.order is None else self.order.clone(),  # safetensors refuses tensors that share memory
        )

    def counted_bits(self) -> int:
        """Stored bits, as the paper counts them: without row pointers and channel order."""
        return sum(8 * part.nbytes for name, part in self.tensors().items() if name not in UNCOUNTED)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; `second_level` holds s₂, z_s, s₃ and z_z, (4, groups, tiles)."""
        scales, zero_points = self.scales, self.zero_points
        parts = {
            "codes": pack_codes(self.codes, self.bits),
            "scale_codes": pack_codes(scales.codes, self.scale_bits),
            "zero_codes": pack_codes(zero_points.codes, self.zero_bits),
            "second_level": torch.stack([scales.scale, scales.zero_point, zero_points.scale, zero_points.zero_point]),
            "row_pointers": self.corrections.row_pointers,
            "columns": self.corrections.columns,
            "values": self.corrections.values,
        }
        return parts if self.order is None else parts | {"order": self.order}

    def header(self) -> dict[str, Any]:
        """What `tensors` does not tell."""
        return {
            "bits": self.bits,
            "scale_bits": self.scale_bits,
            "zero_bits": self.zero_bits,
            "channels": self.codes.shape[1],
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> "SpQRWeight":
        """Undo `tensors` and `header`."""
        codes = unpack_codes(tensors["codes"], header["bits"], header["channels"])
        scale_codes = unpack_codes(tensors["scale_codes"], header["scale_bits"], len(codes))
        zero_codes = unpack_codes(tensors["zero_codes"], header["zero_bits"], len(codes))
        second_level = tensors["second_level"]
        return cls(
            codes,
            SecondLevel(scale_codes, second_level[0], second_level[1]),
            SecondLevel(zero_codes, second_level[2], second_level[3]),
            SparseRows(tensors["row_pointers"], tensors["columns"], tensors["values"]),
            tensors.get("order"),
            header["bits"],
            header["scale_bits"],
            header["zero_bits"],
        )
