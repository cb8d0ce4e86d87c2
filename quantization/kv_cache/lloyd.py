"""TurboQuant's mathematics (Zandieh et al., ICLR 2026, arXiv:2504.19874): a random rotation, then the best levels.

    n = ‖x‖,   y = H D x/n,   code_j = argmin_i |y_j − c_i|,   x̂ = n' · D Hᵀ c[code],   n' = n/‖c[code]‖

H: the orthonormal Hadamard matrix of a head (`quantization/hadamard.py`), D: random signs, one vector a model. A
coordinate of a uniformly random unit vector in dimension d has the density ∝ (1 − t²)^((d−3)/2) on [−1, 1], whatever x
was. So one table of levels serves all layers, heads and tokens: Lloyd-Max, every level the mean of its cell.

With n' (norm correction) the norm of x̂ is that of x; without it n itself is stored, and x̂ is a little short. Norms are
rounded to float16 as they are stored. A vector of zeros stays zeros.

Departs from the paper: levels by numerical integration of the exact density (paper: the normal limit for large d); no
second stage for the residual (`prod`). fp8 keys (e4m3 without a scale) are those of vLLM's preset k8v4.
"""

import math
from functools import cache

import torch
from torch import Tensor

from corpora.errors import UserError
from quantization.hadamard import apply, plan, random_signs

__all__ = ["HIGHEST", "decode_lloyd", "encode_lloyd", "fp8", "fp8_levels", "levels", "rotated", "signs"]

LOWEST, HIGHEST = 2, 4  # bits of a table
NODES = 256  # of the Gauss-Legendre rule of a cell
SETTLED = 1e-13  # of 1/√d: a table that moves less has settled
FP8_LIMIT = 448.0  # largest number of e4m3
HALF_LIMIT = torch.finfo(torch.float16).max
CPU = torch.device("cpu")


# levels ---------------------------------------------------------------------------------------------------------------


@cache
def levels(size: int, bits: int, device: torch.device = CPU) -> Tensor:
    """The 2^bits levels for one coordinate of a random unit vector of `size` dimensions: ascending, float32.

    c_i = E[t | m_(i−1) < t < m_i], m_i = (c_i + c_(i+1))/2, iterated until it stands. Symmetric about 0.
    Raises UserError for other than 2 to 4 bits, or fewer than 4 dimensions.
    """
    if not LOWEST <= bits <= HIGHEST:
        raise UserError(f"Lloyd levels of {bits} bits are not supported; use {LOWEST} to {HIGHEST}")
    if size < 4:
        raise UserError(f"Lloyd levels need heads of at least 4 channels, this one has {size}")
    count = 2 ** (bits - 1)  # positive ones; the others mirror them
    spread = 1 / math.sqrt(size)
    with torch.inference_mode(False):  # the table outlives the call
        half = (torch.arange(count, dtype=torch.float64) + 0.5) * min(3 * spread, 1.0) / count
        moved = math.inf
        while moved > SETTLED * spread:
            new = _cell_means(half, size)
            half, moved = new, float((new - half).abs().max())
        return torch.cat([-half.flip(0), half]).float().to(device)


def _cell_means(half: Tensor, size: int) -> Tensor:
    """E[t | cell] for the cells of ascending positive levels; the first cell starts at 0, the last ends at 1."""
    zero, one = half.new_zeros(1), half.new_ones(1)
    edge = torch.cat([zero, (half[1:] + half[:-1]) / 2, one]).asin()  # t = sin θ: cos^(d−2) θ dθ is smooth at the ends
    node, weight = _gauss_legendre()
    low, high = edge[:-1, None], edge[1:, None]
    angle = (low + high) / 2 + (high - low) / 2 * node  # (cells, nodes)
    mass = weight * angle.cos() ** (size - 2)
    return (mass * angle.sin()).sum(1) / mass.sum(1)


@cache
def _gauss_legendre() -> tuple[Tensor, Tensor]:
    """Nodes in (−1, 1) and weights, float64, by Golub and Welsch: eigenvalues of the Jacobi matrix."""
    k = torch.arange(1, NODES, dtype=torch.float64)
    beside = k / (4 * k * k - 1).sqrt()
    node, vector = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return node, 2 * vector[0] ** 2


def _midpoints(table: Tensor) -> Tensor:
    """The borders between the cells of a table: one fewer than levels."""
    return (table[1:] + table[:-1]) / 2


# rotation -------------------------------------------------------------------------------------------------------------


@cache
def signs(size: int, seed: int, device: torch.device = CPU) -> Tensor:
    """The diagonal of D: (size,) of ±1, float32."""
    with torch.inference_mode(False):
        return random_signs(size, seed).float().to(device)


def rotated(x: Tensor, seed: int, back: bool = False) -> Tensor:
    """H D x on the last axis, or D Hᵀ x with `back`, which undoes it. Float32 or float64; the shape and dtype of x."""
    size = x.shape[-1]
    diagonal = signs(size, seed, x.device).to(x.dtype)
    return apply(x, plan(size), transpose=True) * diagonal if back else apply(x * diagonal, plan(size))


# codes ----------------------------------------------------------------------------------------------------------------


def encode_lloyd(x: Tensor, bits: int, seed: int, norm_correction: bool = True) -> tuple[Tensor, Tensor]:
    """Codes (..., d) uint8 and stored norms (..., 1) float16 of float32 vectors (..., d).

    A norm beyond float16 is stored as the largest number of that type.
    """
    table = levels(x.shape[-1], bits, x.device)
    norm = x.norm(dim=-1, keepdim=True)
    unit = x / torch.where(norm > 0, norm, 1.0)
    codes = torch.bucketize(rotated(unit, seed), _midpoints(table))
    if norm_correction:
        norm = norm / table[codes].norm(dim=-1, keepdim=True)
    return codes.to(torch.uint8), norm.clamp_max(HALF_LIMIT).half()


def decode_lloyd(codes: Tensor, norm: Tensor, bits: int, seed: int) -> Tensor:
    """x̂ of `encode_lloyd`'s codes and norms: (..., d) float32."""
    table = levels(codes.shape[-1], bits, codes.device)
    return rotated(table[codes.long()] * norm.float(), seed, back=True)


def fp8(x: Tensor) -> Tensor:
    """x as e4m3, the nearest number within ±448: codes of its shape, uint8."""
    return x.clamp(-FP8_LIMIT, FP8_LIMIT).to(torch.float8_e4m3fn).view(torch.uint8)


@cache
def fp8_levels(device: torch.device = CPU) -> Tensor:
    """What the 256 bytes of e4m3 stand for, float32; 0 for the two that are no number, and which no code is."""
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0).to(device)
