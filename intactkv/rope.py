"""Undo and redo the rotation of keys by their positions (RoPE), for KV policies that round keys before it.

    k = p·cos + r(p)·sin,   p = (k·cos − r(k)·sin) / (cos² + sin²)      r(x) = (−x₂, x₁), x = (x₁, x₂) the two halves

cos² + sin² is 1, or the square of the factor that YaRN multiplies both with. Only the first `rotary` channels of a head
turn. The frequencies are those of the model's own configuration, from transformers' functions; all math is float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from corpora.errors import UserError
from intactkv.architecture import architecture_of, heads_of

__all__ = ["Places", "Rope", "rope_of"]

# Kinds of scaled RoPE whose frequencies do not depend on the length of the text.
FIXED = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotation of a model's keys. frequencies: (rotary/2,) radians a token; factor: of cosine and sine."""

    frequencies: Tensor
    factor: float

    @property
    def rotary(self) -> int:
        """Channels of a head that turn, its first ones."""
        return 2 * len(self.frequencies)

    def _cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin at positions (B, n), each (B, 1, n, rotary/2)."""
        angles = positions.float()[:, None, :, None] * self.frequencies.to(positions.device)
        return angles.cos() * self.factor, angles.sin() * self.factor

    def turned(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys (B, KV heads, n, D) float32 from before RoPE, as attention reads them. positions: (B or 1, n)."""
        cos, sin = self._cos_sin(positions)
        return self._rotated(keys, cos, sin)

    def unturned(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys as attention reads them, (B, KV heads, n, D) float32, as RoPE received them."""
        cos, sin = self._cos_sin(positions)
        return self._rotated(keys, cos / self.factor**2, -sin / self.factor**2)

    def _rotated(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = len(self.frequencies)
        first, second, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


@dataclass(frozen=True, eq=False)
class Places:
    """Where some consecutive tokens of a call stand: slots `first` to `first + count − 1`, the prefix counted.

    pads: (B,) pads between the prefix and every row's text, None for none. rope: of the model; None turns nothing.
    """

    first: int
    count: int
    pads: Tensor | None = None
    rope: Rope | None = None

    def positions(self, device: torch.device) -> Tensor:
        """Absolute positions, (B or 1, n); those of pads mean nothing."""
        slots = torch.arange(self.first, self.first + self.count, device=device)[None]
        return slots if self.pads is None else (slots - self.pads.to(device)[:, None]).clamp_min(0)

    def turned(self, keys: Tensor) -> Tensor:
        """`Rope.turned` at these places."""
        return keys if self.rope is None else self.rope.turned(keys, self.positions(keys.device))

    def unturned(self, keys: Tensor) -> Tensor:
        """`Rope.unturned` at these places."""
        return keys if self.rope is None else self.rope.unturned(keys, self.positions(keys.device))


def rope_of(config: PreTrainedConfig) -> Rope | None:
    """The rotation of a model's keys; None for a model without one.

    Raises UserError for one that depends on the length of the text, or on the layer.
    """
    config = config.get_text_config(decoder=True)
    if not architecture_of(config).rotary:
        return None
    told = getattr(config, "rope_parameters", None) or {}
    kind = told.get("rope_type")
    if kind not in FIXED:
        what = "differs from layer to layer" if kind is None else f"is of the kind {kind!r}"
        raise UserError(
            f"the rotary embedding of this {config.model_type} model {what}, which no KV policy before RoPE undoes; "
            f"it can undo {', '.join(FIXED)}; choose another policy, such as per_head"
        )
    if kind != "default":
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return Rope(frequencies.float(), float(factor))
    size = heads_of(config)[1]
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size  # these families turn whole heads
    return Rope(1.0 / told["rope_theta"] ** exponents, 1.0)
