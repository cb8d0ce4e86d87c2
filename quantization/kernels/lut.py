"""LUT-GEMM (Park et al., ICLR 2024, arXiv:2206.09557): multiply by binary-coded weights without rebuilding them.

    T[c] = Σ_s ±x_s over eight inputs, + where bit s of c is 1:    T[0] = −Σ x,   T[2^s + i] = T[i] + 2·x_s  for i < 2^s
    y_n = Σ_groups [ Σ_i α_(n,i) · Σ_tables T[byte_(n,i)] + z₀_n · Σ_tables T[255] ]

Of N outputs and q sign planes each reads q·K/8 entries instead of doing K multiplications; the 2^8·K/8 additions that
build the tables are shared by all outputs. `lut_matmul` is the plain form, which says what a kernel has to compute; the
kernels are in `lut_triton.py`, and `Lut` chooses.

Departs from the kernel: sums are float32 and always in the same order (it adds halves atomically, in any order). A
batch goes through the same tables, up to `ROWS`; a larger one dequantizes the matrix, with its offset (it forgets it).
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from corpora.errors import UserError
from quantization.grids.binary_coding import WORD, BinaryCoded, pad_groups
from quantization.kernels.launch import runs_triton
from quantization.kernels.protocols import Prepared, Stored

__all__ = ["CPU_ROWS", "INPUTS", "ROWS", "Lut", "lut_matmul", "tables"]

INPUTS = 8  # of a table: one byte of a word
ROWS = 4  # of x that the kernels multiply one by one; with more it is cheaper to make the matrix
CPU_ROWS = 16  # the same on a CPU
ENTRIES = 2**22  # that are looked up, or tabulated, at a time; bounds the memory


def tables(x: Tensor) -> Tensor:
    """All 256 signed sums of every eight inputs: (..., 8·n) to (..., n, 256), float32. T[255 − c] = −T[c]."""
    x = x.float().unflatten(-1, (-1, INPUTS))
    table = -x.sum(-1, keepdim=True)
    for s in range(INPUTS):
        table = torch.cat([table, table + 2 * x[..., s : s + 1]], dim=-1)
    return table


def lut_matmul(x: Tensor, weight: BinaryCoded) -> Tensor:
    """x Ŵᵀ of inputs (..., in) and a binary-coded (out, in) matrix: (..., out), in the dtype of x, summed in float32.

    Raises UserError if x has another number of channels than the matrix.
    """
    if x.shape[-1] != weight.channels:
        raise UserError(f"the input has {x.shape[-1]} channels, the binary-coded matrix takes {weight.channels}")
    inputs = pad_groups(x.reshape(-1, weight.channels), weight.grid.group_size).flatten(1)  # (batch, 32·words)
    rows = max(1, ENTRIES // (inputs.shape[1] // INPUTS * 256))
    y = [_product(tables(part), weight) for part in inputs.split(rows)]
    return torch.cat(y).view(*x.shape[:-1], weight.planes.shape[2]).to(x.dtype)


def _product(table: Tensor, weight: BinaryCoded) -> Tensor:
    """One product with ready tables (batch, tables, 256): (batch, out) float32, some outputs at a time."""
    bits, out = weight.planes.shape[1:]
    batch, count = table.shape[:2]
    groups, per_group = len(weight.alpha), count // len(weight.alpha)
    columns = max(1, ENTRIES // (max(1, batch) * count * bits))
    y = torch.empty(batch, out, device=table.device)
    for start in range(0, out, columns):
        chunk = slice(start, start + columns)
        word = weight.planes[:, :, chunk]
        byte = torch.stack([(word >> shift) & 255 for shift in range(0, WORD, 8)], dim=1).to(torch.uint8)
        index = byte.flatten(0, 1).flatten(1).long()  # (tables, q·columns); torch gathers by 64-bit indices only
        found = table.gather(2, index.expand(batch, -1, -1))  # (batch, tables, q·columns)
        sums = found.view(batch, groups, per_group, bits, word.shape[2]).sum(2)  # (batch, groups, q, columns)
        y[:, chunk] = (sums * weight.alpha[:, :, chunk].float()).sum((1, 2))
    if weight.offset is not None:
        y += table[..., 255].view(batch, groups, per_group).sum(2) @ weight.offset.float()
    return y


class Lut:
    """x Ŵᵀ + b of binary-coded weights: by tables for a few rows of x, else with the matrix made anew.

    By Triton's kernels on a GPU, by `lut_matmul` on a CPU, where it is also faster than making the matrix.
    """

    name: ClassVar[str] = "lut"

    def takes(self, stored: Stored, device: torch.device) -> bool:
        """Binary-coded matrices on a CPU, or on a CUDA device if Triton serves it."""
        return stored.kind == BinaryCoded.kind and (device.type == "cpu" or runs_triton(device))

    def prepare(self, stored: Stored) -> Prepared:
        """The tensors as they are stored: planes, alpha and offset already lie as the kernels read them."""
        header, channels = dict(stored.header), stored.header["channels"]
        size = channels if header["group_size"] == -1 else header["group_size"]

        def multiply(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
            kernels, inputs = runs_triton(x.device), x.reshape(-1, channels)
            most = ROWS if kernels else CPU_ROWS
            by_tables = 0 < len(inputs) <= most and not (x.requires_grad and torch.is_grad_enabled())
            if not by_tables:
                return nn.functional.linear(x, dequantize(tensors, x.dtype), bias)
            if not kernels:
                y = lut_matmul(x, BinaryCoded.restore(tensors, header))
                return y if bias is None else y + bias
            from quantization.kernels.lut_triton import product

            parts = tensors["planes"], tensors["alpha"], tensors.get("offset")
            padded = inputs if size % WORD == 0 else pad_groups(inputs, size).flatten(1)
            return product(padded, *parts, bias).view(*x.shape[:-1], parts[0].shape[2])

        def dequantize(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
            planes = tensors["planes"]
            if not runs_triton(planes.device):
                return BinaryCoded.restore(tensors, header).dequantize(dtype)
            from quantization.kernels.lut_triton import dequantized

            return dequantized(planes, tensors["alpha"], tensors.get("offset"), channels, size, dtype)

        return Prepared({name: part.contiguous() for name, part in stored.parts.items()}, multiply, dequantize)
