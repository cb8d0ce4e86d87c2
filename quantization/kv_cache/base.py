"""What KV policies share: bits and grids, groups of channels, codes that stand for them, the rotation of keys.

    keys: k → Mᵀ Q(M k) where they are rotated, M the Hadamard rotation of a head; values: Q(v)
    one group = the D channels of a (sequence, token, KV head); `group_size` of them; or, with −1, the H·D of a token

q·k needs no rotation of q then (PrefixQuant rotates both).
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from corpora.errors import UserError
from intactkv.rope import Places
from intactkv.store import PREFILLS, Codes, Rounding, Store
from intactkv.store import Side as Held
from quantization.grids.packing import pack_codes, unpack_codes
from quantization.grids.straight_through import on_grid
from quantization.grids.uniform import SCALE_DTYPES, Fit, UniformGrid, check_bits, constant_zero_point, encode
from quantization.hadamard import apply, plan
from quantization.kernels.kv_attention import attend
from quantization.kernels.kv_codes import Coded, Side
from quantization.recipes.recipe import added

if TYPE_CHECKING:
    from quantization.model.blocks import DecoderBlock

__all__ = ["Grids", "OnGrids", "Policy", "check_keep", "merge_heads", "split_heads", "turned"]


def check_keep(keep: float) -> None:
    """Raise UserError for what is no share of a range."""
    if not 0 < keep <= 1:
        raise UserError(f"kv_cache.keep={keep:g} is not allowed; give a share in (0, 1], 1 cuts nothing")


def turned(keys: Tensor, rotate: bool = True, back: bool = False) -> Tensor:
    """Keys (…, D) behind the Hadamard rotation of a head, or from there back; as they are unless `rotate`."""
    return apply(keys, plan(keys.shape[-1]), transpose=back) if rotate else keys


def split_heads(states: Tensor, group_size: int | None) -> Tensor:
    """(batch, KV heads, tokens, D) as (batch, tokens, groups, channels of a group)."""
    heads, size = states.shape[1], states.shape[-1]
    return states.transpose(1, 2).flatten(2).unflatten(-1, (-1, channels_of(group_size, size, heads)))


def merge_heads(groups: Tensor, head_size: int) -> Tensor:
    """Undo `split_heads`."""
    return groups.flatten(2).unflatten(-1, (-1, head_size)).transpose(1, 2)


def channels_of(group_size: int | None, head_size: int, heads: int) -> int:
    """Channels that share a grid, of one token."""
    return {None: head_size, -1: heads * head_size}.get(group_size) or group_size or head_size


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """What every policy can be told. bits: of keys, and of values unless `v_bits` says otherwise; 2 to 8.

    space: where keys are rounded. calibrates: whether layers have tensors of their own, which `fit_block` finds.
    needs_gradients: whether it needs `DecoderBlock.squared_gradients` for that.
    """

    bits: int
    v_bits: int | None = added(None)
    space: ClassVar[str] = "post_rope"
    calibrates: ClassVar[bool] = False
    allowed_bits: ClassVar[tuple[int, ...]] = tuple(range(2, 9))

    def __post_init__(self) -> None:
        for bits in (self.bits, self.values_bits):
            lowest, highest = self.allowed_bits[0], self.allowed_bits[-1]
            check_bits("KV bits", bits, "--kv none (16 in a script) for a full-precision cache", lowest, highest)
            if bits not in self.allowed_bits:
                raise UserError(
                    f"KV bits={bits} is not supported by {type(self).__name__}; use "
                    f"{', '.join(str(b) for b in self.allowed_bits)}"
                )

    @property
    def needs_gradients(self) -> bool:
        """Whether calibration needs the loss's gradients."""
        return False

    @property
    def values_bits(self) -> int:
        """Bits of values."""
        return self.bits if self.v_bits is None else self.v_bits

    def in_heads(self, head_size: int) -> Self:
        """The policy for heads of that many channels, each thing said in one way: bits of values that are those of keys
        are not said apart. Raises UserError for what does not fit."""
        return replace(self, v_bits=None if self.v_bits == self.bits else self.v_bits)

    @property
    def what_passes_see(self) -> str:
        """One of `PREFILLS`; policies that round every token at once have no choice."""
        return "exact"

    def behind(self, prefix: int) -> Self:
        """The policy for tokens behind so many of an intact prefix."""
        return self

    @abstractmethod
    def roundings(self, tensors: Mapping[str, Tensor] | None = None) -> tuple[Rounding, Rounding]:
        """How the keys and the values of a layer are rounded. tensors: what it was calibrated to."""

    @abstractmethod
    def bits_per_element(self, tokens: int, head_size: int, heads: int) -> tuple[float, float]:
        """See `intactkv.policy.KVPolicy`."""

    def fit_block(self, block: "DecoderBlock") -> dict[str, Tensor]:
        """The tensors of one block, by names without a dot, from its calibration text."""
        raise NotImplementedError(f"{type(self).__name__} calibrates nothing")

    def shapes(self, head_size: int, heads: int, names: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """Of what `fit_block` gives, by name; all are floats. names: that are there, where some may be or not."""
        raise NotImplementedError(f"{type(self).__name__} calibrates nothing")

    def store(self, layer: int, tensors: Mapping[str, Tensor] | None = None, packed: bool = False) -> Store:
        """What one layer of one call keeps."""
        roundings = self.roundings(tensors)
        direct = _attended if packed and all(hasattr(rounding, "products") for rounding in roundings) else None
        return Store(*roundings, self.what_passes_see, packed, direct)


def _attended(query: Tensor, keys: Held, values: Held, scaling: float, mask: Tensor | None) -> Tensor:
    """See `intactkv.store.Direct`."""

    def side(held: Held) -> Side:
        rounding: Any = held.rounding
        prefix = None if held.prefix is None else held.prefix.to(query)
        return Side(prefix, rounding.products(held.codes) if held.codes else None, held.exact)

    return attend(query, side(keys), side(values), scaling, mask)


def check_prefill(prefill: str) -> None:
    """Raise UserError for a word that is none of `PREFILLS`."""
    if prefill not in PREFILLS:
        raise UserError(f"kv_cache.prefill={prefill} is not known; choose {', '.join(PREFILLS)}")


@dataclass(frozen=True, kw_only=True)
class Grids(Policy):
    """A policy of evenly spaced levels per token. convention: of both grids (`grids.CONVENTIONS`). group_size: channels
    of a head that share a grid; none: all of a head; −1: those of all KV heads.

    scale_dtype: what scales are stored in, rounded before codes are computed; zero points that are no codes take int16
    with float16, float32 with float32.
    """

    bits: int
    convention: str
    group_size: int | None = added(None)
    scale_dtype: str = added("float32")
    grid: UniformGrid = field(init=False, repr=False)  # of keys
    v_grid: UniformGrid = field(init=False, repr=False)
    stores_grids: ClassVar[bool] = False  # with a model, and not with every token

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, bits in (("grid", self.bits), ("v_grid", self.values_bits)):
            object.__setattr__(self, name, UniformGrid(bits, -1, self.convention))
        if self.stores_grids and self.grid.rule.zero_point == "real":
            raise UserError(
                f"kv_cache.convention={self.convention} has zero points that are no codes, which fixed ranges need; "
                "choose intactkv-asym or gptq-sym"
            )
        if self.group_size is not None and self.group_size != -1 and self.group_size < 1:
            raise UserError(
                f"kv_cache.group_size={self.group_size} is not allowed; give a divisor of a head's channels, -1 for "
                "one group over all heads of a token, or none for a head"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise UserError(f"kv_cache.scale_dtype={self.scale_dtype} is not known; choose {' or '.join(SCALE_DTYPES)}")

    def in_heads(self, head_size: int) -> Self:
        """The policy for heads of that many channels; a group of as many is a head. Raises UserError if groups do not
        fill a head."""
        if self.group_size not in (None, -1) and head_size % (self.group_size or 1):
            raise UserError(
                f"kv_cache.group_size={self.group_size} does not divide the {head_size} channels of a head; use "
                f"--kv-group-size {head_size} or a divisor of it, -1 for one group over all heads of a token, or none "
                "for a head"
            )
        return replace(
            super().in_heads(head_size), group_size=None if self.group_size == head_size else self.group_size
        )

    def zero_dtype(self, grid: UniformGrid) -> torch.dtype | None:
        """What zero points are stored in; None where they follow from the bits."""
        kinds = {"constant": None, "code": torch.uint8}
        real = torch.float32 if self.scale_dtype == "float32" else torch.int16
        return kinds.get(grid.rule.zero_point, real)

    def bits_per_element(self, tokens: int, head_size: int, heads: int) -> tuple[float, float]:
        """b, and the share of what is stored for a group: a scale, and a zero point where it does not follow."""
        channels = channels_of(self.group_size, head_size, heads)
        return self._bits(self.grid, channels), self._bits(self.v_grid, channels)

    def _bits(self, grid: UniformGrid, channels: int) -> float:
        stored = [SCALE_DTYPES[self.scale_dtype], self.zero_dtype(grid)]
        more = 0 if self.stores_grids else sum(8 * dtype.itemsize for dtype in stored if dtype is not None)
        return grid.bits + more / channels


@dataclass(frozen=True, eq=False)
class OnGrids(Rounding, ABC):
    """Keys or values on grids per token and group of channels. policy: whose they are. grid: of the levels.

    rotate: round behind the Hadamard rotation of a head.
    """

    policy: Grids
    grid: UniformGrid
    rotate: bool = field(default=False, kw_only=True)

    @abstractmethod
    def fit(self, groups: Tensor) -> Fit:
        """Scale and zero point of groups (batch, tokens, groups, channels), (…, 1), float32, with their gradients."""

    def fitted(self, groups: Tensor) -> Fit:
        """The same as they are stored."""
        scale, zero_point = self.fit(groups)
        if self.policy.scale_dtype == "float32" or self.policy.stores_grids:
            return Fit(scale, zero_point)
        half = torch.finfo(torch.float16)
        scale = scale.clamp(half.smallest_normal, half.max).half().float()
        if self.policy.zero_dtype(self.grid) is torch.int16:
            whole = torch.iinfo(torch.int16)
            zero_point = zero_point.round().clamp(whole.min, whole.max)
        return Fit(scale, zero_point)

    def numbers(self, states: Tensor, places: Places) -> Tensor:
        """Round tokens (batch, KV heads, n, D); the same bits as `decode` of `encode`, with gradients."""
        groups = split_heads(turned(states, self.rotate), self.policy.group_size)
        rounded = merge_heads(on_grid(groups, self.fitted(groups), self.grid), states.shape[-1])
        return turned(rounded, self.rotate, back=True)

    def encode(self, states: Tensor, places: Places) -> Codes:
        """codes (batch, KV heads, n, D·b/8) uint8; scale and zero_point (batch, KV heads, n, groups of a head), with
        one head for groups over all."""
        if states.shape[-1] % 8:
            raise UserError(
                f"packed storage puts the codes of eight channels of a head together, and this model's heads have "
                f"{states.shape[-1]}; use --kv-storage fake"
            )
        groups = split_heads(turned(states, self.rotate), self.policy.group_size)
        fitted = self.fitted(groups)
        codes = merge_heads(encode(groups, fitted, self.grid), states.shape[-1])
        kept = {"codes": pack_codes(codes.to(torch.uint8), self.grid.bits)}
        if self.policy.stores_grids:
            return kept
        dtype, heads = self.policy.zero_dtype(self.grid), self._heads(states)
        kept["scale"] = _by_head(fitted.scale, heads).to(SCALE_DTYPES[self.policy.scale_dtype])
        return kept if dtype is None else kept | {"zero_point": _by_head(fitted.zero_point, heads).to(dtype)}

    def decode(self, codes: Codes, places: Places) -> Tensor:
        """Undo `encode`."""
        size = codes["codes"].shape[-1] * 8 // self.grid.bits
        groups = split_heads(unpack_codes(codes["codes"], self.grid.bits, size).float(), self.policy.group_size)
        fitted = self.restored(codes, groups)
        rounded = merge_heads((groups - fitted.zero_point) * fitted.scale, size)
        return turned(rounded, self.rotate, back=True)

    def products(self, codes: Codes) -> Coded:
        """What attention's products take; the query is rotated in place of keys that were."""
        packed = codes["codes"]
        if self.policy.stores_grids:
            scale, zero_point = (_by_head(x[None, None], self._heads(packed)) for x in self.fitted(packed))
        elif "zero_point" in codes:
            scale, zero_point = codes["scale"], codes["zero_point"]
        else:
            scale = codes["scale"]
            zero_point = constant_zero_point(self.grid).to(scale.device).view(1, 1, 1, 1)
        return Coded(self.grid.bits, packed, scale, zero_point=zero_point, turn=_turned if self.rotate else None)

    def _heads(self, states: Tensor) -> int:
        """Heads of stored grids: one for groups over all heads of a token."""
        return 1 if self.policy.group_size == -1 else states.shape[1]

    def restored(self, codes: Codes, groups: Tensor) -> Fit:
        """Scale and zero point of stored groups, as `fitted` gave them."""
        if self.policy.stores_grids:
            return self.fitted(groups)
        scale = _by_token(codes["scale"].float())
        if "zero_point" in codes:
            return Fit(scale, _by_token(codes["zero_point"].float()))
        return Fit(scale, constant_zero_point(self.grid).to(scale.device))


def _turned(x: Tensor, back: bool) -> Tensor:
    return turned(x, back=back)


def _by_head(fitted: Tensor, heads: int) -> Tensor:
    """(batch, tokens, groups, 1) as (batch, heads, tokens, groups of a head)."""
    return fitted.squeeze(-1).unflatten(-1, (heads, -1)).transpose(1, 2)


def _by_token(stored: Tensor) -> Tensor:
    """Undo `_by_head`."""
    return stored.transpose(1, 2).flatten(2)[..., None]
