"""KVQuant (Hooper et al., NeurIPS 2024, arXiv:2401.18079): keys per channel before RoPE, values per token, in levels
that fit the layer, with the outliers and the first tokens kept.

    keys:   ŷ = (y − z_c)/r_c,  z, r of a channel, fixed       values: ŷ = (y − z_t)/r_t,  z, r of a token's inliers
    code = nearest level of ŷ,   y ≈ level·r + z               outliers and the first `sinks` tokens: y

A vector is all C = H·D channels of a token, as their linears give it. What a key was before RoPE is computed from the
one that the cache is handed, so that norms and biases in front of RoPE are in it. Calibration: `kvquant_fit`, with
weights from `fisher`; outliers: `dense_sparse`.

    codes (B, H, n, D·b/8) uint8     of values: middle, half (B, 1, n, 1) float16
    index (B, 1, n, slots) int16     values (B, 1, n, slots) float16          outliers
    sinks (B, H, first tokens, D)    float32, whole columns of the batch, in front of everything

Departs from the published code: a sink is a token at an absolute position below `sinks`, and not the first row of every
call, which left all generated tokens exact there; parameters of a token take 16 bits before codes are computed; a key
has as many slots for outliers as a value, or `key_slots` (published: any number, in its scores, and 42 in its kernels).
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from corpora.errors import UserError
from corpora.files import plain_file, sha256_of_file
from intactkv.rope import Places, ropes_of
from intactkv.store import Codes, Rounding
from quantization.grids.nonuniform import nearest
from quantization.grids.packing import pack_codes, unpack_codes
from quantization.kv_cache.base import Policy, merge_heads, split_heads
from quantization.kv_cache.dense_sparse import (
    Sparse,
    index_bits,
    key_outliers,
    outliers_per_side,
    put_back,
    take_out,
    value_split,
)
from quantization.kv_cache.kvquant_files import read_quantizers
from quantization.kv_cache.kvquant_fit import LEVELS, WEIGHTINGS, centred, centred16, fit_keys, fit_values
from quantization.model.blocks import DecoderBlock

__all__ = ["KVQuant"]


class Ranges(NamedTuple):
    """Where the levels of some tokens lie: middle z and half width r, broadcastable to (B, n, C); channels of their
    outliers, (B, n, slots); and what of it is stored with every token."""

    middle: Tensor
    half: Tensor
    outliers: Tensor
    stored: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class OnLevels(Rounding, ABC):
    """Keys or values of a layer. levels: (2^b,), sorted. images: what they are decoded to, before r and z."""

    bits: int
    levels: Tensor
    images: Tensor
    sinks: int

    def exact_first(self, prefix: int) -> int:
        """The sinks that do not stand in the prefix."""
        return max(self.sinks - prefix, 0)

    @abstractmethod
    def flat(self, states: Tensor, places: Places, back: bool = False) -> Tensor:
        """(B, H, n, D) as attention reads them, in the basis that they are rounded in; or from there back."""

    @abstractmethod
    def ranges(self, y: Tensor) -> Ranges:
        """Of tokens (B, n, C)."""

    @abstractmethod
    def stored_ranges(self, codes: Codes) -> tuple[Tensor, Tensor]:
        """Middle and half width of stored tokens."""

    @torch.no_grad()
    def numbers(self, states: Tensor, places: Places) -> Tensor:
        """The same bits as `decode` of `encode`; codes are not packed in between."""
        return self._decoded(self._coded(states, places), places)

    @torch.no_grad()
    def encode(self, states: Tensor, places: Places) -> Codes:
        """What is stored; see the head of this file."""
        coded = self._coded(states, places)
        return coded | {"codes": pack_codes(coded["codes"], self.bits)}

    @torch.no_grad()
    def decode(self, codes: Codes, places: Places) -> Tensor:
        """Undo `encode`, but for what was lost."""
        packed = codes["codes"]
        return self._decoded(
            {**codes, "codes": unpack_codes(packed, self.bits, packed.shape[-1] * 8 // self.bits)}, places
        )

    def _coded(self, states: Tensor, places: Places) -> dict[str, Tensor]:
        y = split_heads(self.flat(states, places), -1)[:, :, 0]  # (B, n, C)
        middle, half, outliers, stored = self.ranges(y)
        codes = nearest((y - middle) / half, self.levels.to(y.device)).to(torch.uint8)
        coded = {"codes": merge_heads(codes[:, :, None], states.shape[-1]), **stored}
        if outliers.shape[-1]:
            sparse = take_out(y, outliers)
            coded |= {"index": sparse.channels[:, None], "values": sparse.values[:, None]}
        if self.sinks:
            pads = 0 if places.pads is None else int(places.pads.max())
            coded["sinks"] = states[:, :, : max(self.sinks + pads - places.first, 0)].clone()
        return coded

    def _decoded(self, coded: Codes, places: Places) -> Tensor:
        codes = coded["codes"]
        images = self.images.to(codes.device)[codes.int()]
        middle, half = self.stored_ranges(coded)
        y = split_heads(images, -1)[:, :, 0] * half + middle
        if "index" in coded:
            y = put_back(y, Sparse(coded["index"][:, 0], coded["values"][:, 0]))
        states = self.flat(merge_heads(y[:, :, None], codes.shape[-1]), places, back=True)
        if "sinks" not in coded or not (first := coded["sinks"].shape[2]):
            return states
        is_sink = (places.positions(codes.device) < self.sinks)[:, None, :first, None]
        return torch.cat([torch.where(is_sink, coded["sinks"], states[:, :, :first]), states[:, :, first:]], 2)


@dataclass(frozen=True, eq=False)
class Keys(OnLevels):
    """Before RoPE, in the ranges of their channels. low, high: (C,)."""

    low: Tensor
    high: Tensor
    slots: int

    def flat(self, states: Tensor, places: Places, back: bool = False) -> Tensor:
        """Before RoPE."""
        return places.turned(states) if back else places.unturned(states)

    def ranges(self, y: Tensor) -> Ranges:
        """Those of the channels; nothing is stored."""
        low, high = self.low.to(y.device), self.high.to(y.device)
        return Ranges(*centred(low, high), key_outliers(y, low, high, self.slots), {})

    def stored_ranges(self, codes: Codes) -> tuple[Tensor, Tensor]:
        """Those of the channels."""
        return centred(self.low.to(codes["codes"].device), self.high.to(codes["codes"].device))


@dataclass(frozen=True, eq=False)
class Values(OnLevels):
    """As they are, in the ranges of their tokens' inliers. share: of outliers."""

    share: float

    def flat(self, states: Tensor, places: Places, back: bool = False) -> Tensor:
        """As they are."""
        return states

    def ranges(self, y: Tensor) -> Ranges:
        """Those of the inliers, stored in 16 bits."""
        split = value_split(y, outliers_per_side(y.shape[-1], self.share))
        middle, half = centred16(split.low, split.high)
        return Ranges(middle.float(), half.float(), split.channels, {"middle": middle[:, None], "half": half[:, None]})

    def stored_ranges(self, codes: Codes) -> tuple[Tensor, Tensor]:
        """Those that were stored."""
        return codes["middle"][:, 0].float(), codes["half"][:, 0].float()


@dataclass(frozen=True)
class KVQuant(Policy):
    """2, 3 or 4 bits. outliers: their share, 0 for none. levels: nuq fits them to the layer; uniform, nf. weighting: of
    the calibration text's numbers when levels are fitted (`kvquant_fit`). sinks: first positions that stay exact; a
    prefix of as many tokens takes their place. qnorm: correct mean and spread. key_slots: outliers of a key at most;
    none: as many as a value has. file: of KVQuant's own code (`kvquant_files`), whose levels and thresholds are taken
    as they are; file_sha256: of its content, which `in_heads` finds out.
    """

    bits: int
    outliers: float = 0.01
    levels: str = "nuq"
    weighting: str = "fisher"
    sinks: int = 1
    qnorm: bool = False
    key_slots: int | None = None
    file: str | None = None
    file_sha256: str | None = None
    space: ClassVar[str] = "pre_rope"
    calibrates: ClassVar[bool] = True
    allowed_bits: ClassVar[tuple[int, ...]] = (2, 3, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.outliers < 0.5:
            raise UserError(f"kv_cache.outliers={self.outliers:g} is not allowed; give a share in [0, 0.5), 0 for none")
        for name, known in (("levels", LEVELS), ("weighting", WEIGHTINGS)):
            if (word := getattr(self, name)) not in known:
                raise UserError(f"kv_cache.{name}={word} is not known; choose {', '.join(known)}")
        for name in ("sinks", "key_slots"):
            if (number := getattr(self, name)) is not None and number < 0:
                raise UserError(f"kv_cache.{name}={number} is not allowed; give 0 or more")

    def in_heads(self, head_size: int) -> Self:
        """Levels that do not depend on the text are not weighed by it, and those of a file are those of its content.
        Raises UserError for heads whose codes do not fill bytes, and for a file that is missing or another one."""
        if head_size % 8:
            raise UserError(
                f"kvquant packs eight channels of a head together, and this model's have {head_size}; use --kv per_head"
            )
        found = None
        if self.file is not None:
            found = sha256_of_file(plain_file(Path(self.file), "the quantizer file"))
            if self.file_sha256 not in (None, found):
                raise UserError(f"the quantizer file {self.file} has changed since it was named; name it anew")
            self._layers()  # now, and not behind the first blocks
        weighting = self.weighting if self.needs_gradients else "none"
        return replace(super().in_heads(head_size), weighting=weighting, file_sha256=found)

    def _key_slots(self, channels: int) -> int:
        slots = 2 * outliers_per_side(channels, self.outliers) if self.key_slots is None else self.key_slots
        return min(slots, channels)

    def roundings(self, tensors: Mapping[str, Tensor] | None = None) -> tuple[Rounding, Rounding]:
        """By what `fit_block` found."""
        assert tensors is not None
        levels = [(tensors[f"{name}_levels"], _images(tensors, name), self.sinks) for name in ("keys", "values")]
        low, high = tensors["keys_low"], tensors["keys_high"]
        keys = Keys(self.bits, *levels[0], low, high, self._key_slots(len(low)))
        return keys, Values(self.values_bits, *levels[1], self.outliers)

    def behind(self, prefix: int) -> Self:
        """The first of them are the prefix's."""
        return replace(self, sinks=max(self.sinks - prefix, 0))

    def bits_per_element(self, tokens: int, head_size: int, heads: int) -> tuple[float, float]:
        """b; value and number of every outlier; of values middle and half width. Sinks are kept beside their codes."""
        channels = head_size * heads
        outlier = 16 + index_bits(channels)
        sinks = 32 * min(self.sinks, tokens) / max(tokens, 1)
        values = 2 * outliers_per_side(channels, self.outliers)
        return (
            self.bits + self._key_slots(channels) * outlier / channels + sinks,
            self.values_bits + (values * outlier + 32) / channels + sinks,
        )

    @property
    def needs_gradients(self) -> bool:
        """Whether `fit_block` asks for those of the calibration text."""
        return self.file is None and self.levels == "nuq" and self.weighting != "none"

    def fit_block(self, block: DecoderBlock) -> dict[str, Tensor]:
        """`keys_low`, `keys_high` (C,), `keys_levels`, `values_levels` (2^b,), and with Q-Norm `keys_qnorm` and
        `values_qnorm` (2,). Holds all tokens of the text: 8 bytes of a channel and token, 16 with gradients.

        Raises UserError for a rotation that cannot be undone, for weights without gradients, and for a file of another
        model or other bits."""
        if self.file is not None:
            return self._read(block)
        assert block.stream is not None, "KVQuant calibrates, but no calibration text was given"
        rope, first = ropes_of(block.config)[block.index], block.stream.prefix_length
        skipped = max(self.sinks - first, 0)
        vectors: dict[str, list[Tensor]] = {"keys": [], "values": []}
        for keys, values in block.keys_and_values():
            before = Places(first, keys.shape[2], None, rope).unturned(keys.float())
            for name, states in (("keys", before), ("values", values.float())):
                vectors[name].append(split_heads(states[:, :, skipped:], -1)[0, :, 0])
        weights: dict[str, Tensor] = {}
        if self.needs_gradients:
            if block.squared_gradients is None:
                raise UserError(
                    f"kv_cache.weighting={self.weighting} needs gradients of the loss, which there are none of where "
                    "weights are trained with the KV cache; set kv_cache.weighting=none"
                )
            for name, states in block.squared_gradients.items():
                like = vectors[name][0]
                weights[name] = split_heads(states[:, :, skipped:].to(like), -1)[:, :, 0].flatten(0, 1)
        settings: Any = {"share": self.outliers, "levels": self.levels, "qnorm": self.qnorm}
        settings["ranged"] = self.weighting == "fisher_range"
        if not sum(map(len, vectors["keys"])):
            raise UserError(
                f"kv_cache.sinks={self.sinks} leaves nothing of the calibration text, whose pieces are no longer; give "
                "fewer, or more with --calibration-length"
            )
        found = fit_keys(torch.cat(vectors.pop("keys")), weights.get("keys"), bits=self.bits, **settings)
        all_values = torch.cat(vectors.pop("values"))
        return found | fit_values(all_values, weights.get("values"), bits=self.values_bits, **settings)

    def shapes(self, head_size: int, heads: int, names: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """See `Policy.shapes`; a file of KVQuant's own code may have a Q-Norm or not."""
        channels = (head_size * heads,)
        levels = {"keys_levels": (2**self.bits,), "values_levels": (2**self.values_bits,)}
        qnorms = [name for name in ("keys_qnorm", "values_qnorm")
                  if (self.qnorm if self.file is None else name in names)]  # fmt: skip
        return {"keys_low": channels, "keys_high": channels, **levels, **dict.fromkeys(qnorms, (2,))}

    def _layers(self) -> list[dict[str, Tensor]]:
        """What the file says of every layer, which must be of these bits."""
        layers = read_quantizers(Path(str(self.file)))
        for name, bits in (("keys", self.bits), ("values", self.values_bits)):
            for found in layers:
                if (count := len(found[f"{name}_levels"])) != 2**bits:
                    raise UserError(
                        f"the quantizer file {self.file} has {count} levels of {name}, and {bits} bits make {2**bits}; "
                        f"give the file of {bits} bits"
                    )
        return layers

    def _read(self, block: DecoderBlock) -> dict[str, Tensor]:
        """The tensors of a block from the file, which must be this model's."""
        layers, count = self._layers(), block.config.num_hidden_layers
        if len(layers) != count:
            raise UserError(
                f"the quantizer file {self.file} has {len(layers)} layers, and this model has {count}; give the file "
                "of this model"
            )
        channels, own = block.linears()[block.architecture.value].weight.shape[0], layers[block.index]
        if len(own["keys_low"]) != channels:
            raise UserError(
                f"the quantizer file {self.file} has keys of {len(own['keys_low'])} channels, and this model's have "
                f"{channels}; give the file of this model"
            )
        return own


def _images(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """What levels are decoded to: themselves, or behind Q-Norm."""
    levels, qnorm = tensors[f"{name}_levels"], tensors.get(f"{name}_qnorm")
    return levels if qnorm is None else levels * qnorm[0] + qnorm[1]
