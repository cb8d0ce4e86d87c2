"""TurboQuant (Zandieh et al., ICLR 2026, arXiv:2504.19874): a random rotation and the best levels, no calibration.

    keys: n' · D Hᵀ c[code], of 2 to 4 bits (`lloyd.py`); of 8 bits: the nearest number of e4m3, as it is
    values: a grid per token and head, scale and minimum float16; or as keys (`lloyd`, the paper's)

Every token is rounded by itself, keys after RoPE. The presets that vLLM serves are k8v4 (bits=8, v_bits=4), 4bit-nc
(4), k3v4-nc (3, v_bits=4) and 3bit-nc (3); nc is norm correction. All layers are rounded alike.

Departs from the paper: see `lloyd.py`; the rotation is Hadamard's, whose result for a vector of few large channels is
not normal. Such vectors err less than random ones, and one of a single channel not at all, under norm correction.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

from torch import Tensor

from corpora.errors import UserError
from intactkv.rope import Places
from intactkv.store import Codes, Rounding
from quantization.grids.packing import pack_codes, unpack_codes
from quantization.kernels.kv_codes import Coded
from quantization.kv_cache.base import Policy
from quantization.kv_cache.kivi import TokenGroups
from quantization.kv_cache.lloyd import HIGHEST, decode_lloyd, encode_lloyd, fp8, fp8_levels, levels, rotated

__all__ = ["TurboQuant"]

FP8 = 8  # bits of keys that are e4m3
VALUES = ("uniform", "lloyd")


@dataclass(frozen=True, eq=False)
class Lloyd(Rounding):
    """Levels of a rotated unit vector. codes (B, KV heads, n, D·b/8); norm (B, KV heads, n, 1) float16."""

    bits: int
    seed: int
    norm_correction: bool

    def encode(self, states: Tensor, places: Places) -> Codes:
        """D must be a multiple of 8."""
        codes, norm = encode_lloyd(states, self.bits, self.seed, self.norm_correction)
        return {"codes": pack_codes(codes, self.bits), "norm": norm}

    def decode(self, codes: Codes, places: Places) -> Tensor:
        """Undo `encode`, but for the rounding."""
        unpacked = unpack_codes(codes["codes"], self.bits, codes["codes"].shape[-1] * 8 // self.bits)
        return decode_lloyd(unpacked, codes["norm"], self.bits, self.seed)

    def products(self, codes: Codes) -> Coded:
        """What attention's products take: the query is rotated in place of the keys."""
        packed = codes["codes"]
        table = levels(packed.shape[-1] * 8 // self.bits, self.bits, packed.device)
        return Coded(self.bits, packed, codes["norm"], levels=table, turn=partial(_turned, seed=self.seed))


def _turned(x: Tensor, back: bool, seed: int) -> Tensor:
    return rotated(x, seed, back)


class Float8(Rounding):
    """Numbers of e4m3, without a scale. codes (B, KV heads, n, D) uint8."""

    def encode(self, states: Tensor, places: Places) -> Codes:
        """Saturates at ±448."""
        return {"codes": fp8(states)}

    def decode(self, codes: Codes, places: Places) -> Tensor:
        """What the bytes stand for."""
        return fp8_levels(codes["codes"].device)[codes["codes"].long()]

    def products(self, codes: Codes) -> Coded:
        """What attention's products take."""
        return Coded(FP8, codes["codes"], levels=fp8_levels(codes["codes"].device))


@dataclass(frozen=True)
class TurboQuant(Policy):
    """bits: of keys, 2 to 4, or 8 for e4m3. v_bits: of values, 2 to 4 or 8. values: uniform or lloyd (2 to 4 bits).

    norm_correction: store norms so that rounded vectors have them. seed: of the rotation's signs, one vector a model.
    """

    bits: int
    values: str = "uniform"
    norm_correction: bool = True
    seed: int = 0
    allowed_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, FP8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values not in VALUES:
            raise UserError(f"kv_cache.values={self.values} is not known; choose {' or '.join(VALUES)}")
        if self.values == "lloyd" and self.values_bits > HIGHEST:
            raise UserError(
                f"values of {self.values_bits} bits have no Lloyd levels; give --v-bits 2 to {HIGHEST}, or "
                "--set kv_cache.values=uniform"
            )
        if self.seed < 0:
            raise UserError(f"kv_cache.seed={self.seed} is not allowed; give 0 or more")

    def in_heads(self, head_size: int) -> Self:
        """Raises UserError for heads whose codes do not fill bytes."""
        if head_size % 8:
            raise UserError(f"TurboQuant needs heads of a multiple of 8 channels, this model's have {head_size}")
        return super().in_heads(head_size)

    def roundings(self, tensors: Mapping[str, Tensor] | None = None) -> tuple[Rounding, Rounding]:
        """Keys and values, each as its bits and field say."""
        keys: Rounding = Float8() if self.bits == FP8 else Lloyd(self.bits, self.seed, self.norm_correction)
        if self.values == "uniform":
            return keys, TokenGroups(self.values_bits)
        return keys, Lloyd(self.values_bits, self.seed, self.norm_correction)

    def bits_per_element(self, tokens: int, head_size: int, heads: int) -> tuple[float, float]:
        """b + 16/D of levels with a norm, b + 32/D of a grid with scale and minimum, 8 of e4m3."""
        keys = self.bits + (0 if self.bits == FP8 else 16 / head_size)
        return keys, self.values_bits + (32 if self.values == "uniform" else 16) / head_size
