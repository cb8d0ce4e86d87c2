"""Undo and redo the rotation of keys by their positions (RoPE), for KV policies that round keys before it.

    k = p·cos + r(p)·sin,   p = (k·cos − r(k)·sin) / (cos² + sin²)      r(x) = (−x₂, x₁) for every pair x = (x₁, x₂)

Pairs are the channels i and i + n/2 of a head's first n, or 2i and 2i + 1; the rest of a head does not turn.
cos² + sin² is 1, or the square of the factor that YaRN multiplies both with. The frequencies are those of the model's
own configuration, from transformers' functions, and may differ from layer to layer; all math is float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from corpora.errors import UserError
from intactkv.architecture import architecture_of, heads_of
from intactkv.parts import HALVES, NEIGHBOURS

__all__ = ["Places", "Rope", "check_turns", "ropes_of"]

# Kinds of scaled RoPE whose frequencies do not depend on the length of the text.
FIXED = ("default", "linear", "llama3", "yarn")
# Kinds that change them for all tokens of a text that outgrows so many: a field of the kind's own, or None for the
# model's longest text.
STEPPED = {"longrope": "original_max_position_embeddings", "dynamic": None}


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotation of a layer's keys. frequencies: (turned/2,) radians a token; factor: of cosine and sine. pairing:
    which channels turn together. limit: the longest text that these frequencies are for; None for any."""

    frequencies: Tensor
    factor: float = 1.0
    pairing: str = HALVES
    limit: int | None = None

    def _cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin at positions (B, n), each (B, 1, n, turned/2)."""
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
        count = 2 * len(self.frequencies)
        pairs = keys[..., :count].unflatten(-1, (-1, 2) if self.pairing == NEIGHBOURS else (2, -1))
        axis = -1 if self.pairing == NEIGHBOURS else -2
        first, second = pairs.unbind(axis)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=axis).flatten(-2)
        return turned if count == keys.shape[-1] else torch.cat([turned, keys[..., count:]], dim=-1)


@dataclass(frozen=True, eq=False)
class Places:
    """Where some consecutive tokens of a call stand: slots `first` to `first + count − 1`, the prefix counted.

    pads: (B,) pads between the prefix and every row's text, None for none. rope: of the layer; None turns nothing.
    Turning raises UserError for a text that is longer than the rotation's frequencies are for.
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
        return keys if self.rope is None else self._known(self.rope).turned(keys, self.positions(keys.device))

    def unturned(self, keys: Tensor) -> Tensor:
        """`Rope.unturned` at these places."""
        return keys if self.rope is None else self._known(self.rope).unturned(keys, self.positions(keys.device))

    def _known(self, rope: Rope) -> Rope:
        if rope.limit is not None and self.first + self.count > rope.limit:
            raise UserError(
                f"this model turns keys by other frequencies in texts of more than {rope.limit} tokens, which a KV "
                "policy before RoPE cannot follow; use shorter texts, or another policy, such as per_head"
            )
        return rope


def _by_layer(config: PreTrainedConfig) -> list[tuple[str | None, dict[str, Any]]]:
    """Of every layer the key of its rope parameters, None where all layers share them, and these."""
    told = getattr(config, "rope_parameters", None) or {}
    types = getattr(config, "layer_types", None) or ()
    if types and all(isinstance(told.get(name), dict) for name in types):
        return [(name, told[name]) for name in types]
    return [(None, told)] * config.num_hidden_layers


def _limit(config: PreTrainedConfig, told: dict[str, Any]) -> int | None:
    kind = told.get("rope_type")
    if kind not in STEPPED:
        return None
    field = STEPPED[kind]
    return config.max_position_embeddings if field is None else told[field]


def check_turns(config: PreTrainedConfig, slots: int) -> None:
    """Raise UserError for a text of so many tokens, the prefix and new ones counted, whose keys a model turns otherwise
    than those of shorter texts: a cache keeps its keys as they were turned. Of any model type, in the table or not."""
    config = config.get_text_config(decoder=True)
    limits = [_limit(config, told) for _, told in _by_layer(config)]
    limit = min((limit for limit in limits if limit is not None), default=slots)
    if slots > limit:
        raise UserError(
            f"a {config.model_type} model turns all keys by other frequencies in texts of more than {limit} tokens "
            f"(rope_parameters), and {slots} would follow keys of a shorter one; use at most {limit} with the prefix "
            "and what is generated, or no prefix and no KV policy"
        )


def ropes_of(config: PreTrainedConfig) -> list[Rope | None]:
    """The rotation of every layer's keys; None for a layer without one.

    Raises UserError for a kind that nothing here undoes.
    """
    config = config.get_text_config(decoder=True)
    architecture = architecture_of(config)
    if not architecture.rotary:
        return [None] * config.num_hidden_layers
    made: dict[str | None, Rope] = {}
    for key, told in _by_layer(config):
        if key not in made:
            frequencies, factor = _frequencies(config, key, told, architecture.turned)
            made[key] = Rope(frequencies, factor, architecture.pairing, _limit(config, told))
    return [None if i in architecture.unturned else made[key] for i, (key, _) in enumerate(_by_layer(config))]


def _frequencies(
    config: PreTrainedConfig, key: str | None, told: dict[str, Any], turned: int | None
) -> tuple[Tensor, float]:
    """key: of these rope parameters among several. turned: channels of a head, None for all."""
    kind = told.get("rope_type")
    if kind not in (*FIXED, *STEPPED):
        raise UserError(
            f"the rotary embedding of this {config.model_type} model is of the kind {kind!r}, which no KV policy "
            f"before RoPE undoes; it can undo {', '.join((*FIXED, *STEPPED))}; choose another policy, such as per_head"
        )
    if kind != "default":
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=key)
        return frequencies.float(), float(factor)
    size = heads_of(config)[1] if turned is None else turned
    return 1.0 / told["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size), 1.0
