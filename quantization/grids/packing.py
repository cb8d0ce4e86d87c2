"""Codes of a few bits in bytes, without gaps."""

import torch
from torch import Tensor

__all__ = ["pack_codes", "unpack_codes"]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes 0…2^bits − 1 of any shape (..., n) without gaps: eight codes become `bits` bytes.

    Little-endian bit stream per row: code i occupies bits i·bits … (i+1)·bits − 1. A row whose length is no multiple
    of eight is padded with zeros. Returns uint8 (..., ceil(n/8)·bits).
    """
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8)).long()
    word = sum(padded[..., i] << (bits * i) for i in range(8))  # (..., n/8), up to 64 bits
    assert isinstance(word, Tensor)
    return torch.stack([(word >> (8 * j)) & 255 for j in range(bits)], dim=-1).flatten(-2).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_codes`: uint8 (..., ceil(count/8)·bits) to uint8 codes (..., count)."""
    if 8 % bits == 0:  # a byte holds whole codes
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)[..., :count]
    octets = packed.unflatten(-1, (-1, bits)).to(torch.int32 if bits == 3 else torch.int64)
    word = sum(octets[..., j] << (8 * j) for j in range(bits))
    assert isinstance(word, Tensor)
    codes = torch.stack([(word >> (bits * i)) & (2**bits - 1) for i in range(8)], dim=-1)
    return codes.flatten(-2)[..., :count].to(torch.uint8)
