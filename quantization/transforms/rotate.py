"""QuaRot's rotation (Ashkboos et al., NeurIPS 2024, arXiv:2404.00456): orthogonal matrices between a model's linears.

    x ← x Q, Q = D H_dᵀ    the residual stream: readers W Q, writers Qᵀ W, embeddings E Q                      R1
    v ← H_D v              per KV head, in W_v; the input of W_o then has its heads mixed online by M,
                           and W_o holds the inverse of both: W_o (M ⊗ H_D)ᵀ                            R2
    x ← H_f x              online, in front of W_down: W_down H_fᵀ                                             R4

A rotation spreads an outlier over all channels, and the next matrix undoes it: in full precision the function stays the
same. A norm commutes with Q once its gain is in the linears behind it, and a LayerNorm once the stream has no mean,
where it is an RMSNorm. R3, the rotation of keys, belongs to the KV policy (`quantization.kv_cache.rotated`): keys are
the original model's.

With head_mix="none" this is PrefixQuant's variant (2410.05265): heads are not mixed, and one random rotation serves
v and o of all layers.

Departs from the reference: biases of v are rotated, too; linears get a bias where a norm's shift needs one; the mean is
taken off for LayerNorm models only; a tied head gets a matrix of its own; where no Hadamard matrix exists (odd numbers
of heads), the Hartley matrix stands in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import Architecture, architecture_of
from quantization.hadamard import KINDS, MODES, apply, plan, random_rotation, random_signs
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import put_in_front
from quantization.model.online import OnlineRotation
from quantization.transforms.base import BlockTransform

__all__ = ["Rotate"]

ROWS = 2**14  # of an embedding table that are in float64 at a time


@dataclass(frozen=True)
class Rotate(BlockTransform):
    """Rotate a whole model. Arithmetic in float64; results in the checkpoint's dtype.

    seed: of the random signs D. mode: "hadamard", or "random" for a Q drawn from all orthogonal matrices.
    head_mix: the M that mixes heads in front of W_o: "hadamard", "hartley", "auto" (Hadamard where one exists), or
    "none". online_down: rotate in front of W_down.
    """

    seed: int = 0
    mode: str = "hadamard"
    head_mix: str = "auto"
    online_down: bool = True
    name: ClassVar[str] = "rotate"
    unties: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"a rotation's seed={self.seed} is not allowed; give 0 to 2^63 - 1")
        for field, value, known in (("mode", self.mode, MODES), ("head_mix", self.head_mix, (*KINDS, "none"))):
            if value not in known:
                raise UserError(f"a rotation's {field}={value} is not known; choose from {', '.join(known)}")

    def check(self, block: DecoderBlock) -> None:
        """Raise UserError for norms behind what they should feed, a residual stream with another matrix or no norm at
        its end, or heads without the Hadamard matrix that was asked for."""
        block.linears()  # refuses other ones
        if (why := block.architecture.unrotated) is not None:
            raise UserError(f"this {block.config.model_type} {why}; use a recipe without rotations")
        if self.head_mix != "none":
            plan(_query_heads(block), self.head_mix)

    def rotated_inputs(self, block: DecoderBlock) -> list[str]:
        """W_o, where heads are mixed, and W_down."""
        names = block.architecture
        return [names.output] * (self.head_mix != "none") + [*names.downs] * self.online_down

    def transform_block(self, block: DecoderBlock) -> None:
        """Rewrite the linears, make the norms plain, put the online rotations in front of W_o and W_down."""
        names, size, linears = block.architecture, block.head_size, block.linears()
        for norm, readers in _norms(names):
            module = block.module.get_submodule(norm)
            gain, shift = _gain(getattr(module, "weight", None), names), getattr(module, "bias", None)
            _give_biases(block.module, norm, readers)
            for reader in readers:
                self._read(block.module.get_submodule(reader), gain, shift, size if reader == names.value else None)
            _make_plain(block.module, norm, names, like=linears[readers[0]].weight)
        output = linears[names.output]
        mixing = None
        if self.head_mix != "none":
            mixing = OnlineRotation.of(_query_heads(block), size, self.head_mix)
            put_in_front(block.module, (names.output,), rotation=mixing)
        in_heads = self._in_heads(output.weight.double(), size)
        self._write(output, in_heads if mixing is None else mixing(in_heads), names.centred)
        for down in names.downs:  # of every expert, where there are any
            columns = linears[down].weight.double()
            if self.online_down:
                spread = OnlineRotation.of(linears[down].in_features)
                put_in_front(block.module, (down,), rotation=spread)
                columns = spread(columns)
            self._write(linears[down], columns, names.centred)

    def transform_ends(self, ends: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
        """Embeddings rotated, the final norm plain, its gain and shift in a head that is no longer tied."""
        names, ends = architecture_of(config), dict(ends)
        head, norm = f"{names.head}.weight", f"{names.final_norm}.weight"
        table = ends[f"{names.embeddings[0]}.weight"]
        weight = ends.get(head, table)
        gain, shift = _gain(ends.get(norm), names), ends.pop(f"{names.final_norm}.bias", None)
        if shift is not None:
            ends[f"{names.head}.bias"] = _by_rows(weight, lambda rows: rows @ shift.double())
        ends[head] = _by_rows(weight, lambda rows: self._rotated(rows if gain is None else rows * gain))
        ends[norm] = torch.full_like(table[0], 1 - names.gain_offset)
        for name in names.embeddings:
            ends[f"{name}.weight"] = _by_rows(
                ends[f"{name}.weight"], lambda rows: self._rotated(_without_mean(rows) if names.centred else rows)
            )
        return ends

    def restructure(self, model: PreTrainedModel) -> None:
        """RMSNorms for LayerNorms; linears and a head with biases where the norms in front had some."""
        names = architecture_of(model.config)
        if not names.centred:
            return
        head = model.get_submodule(names.head)
        assert isinstance(head, nn.Linear)
        for block in names.blocks_of(model):
            for norm, readers in _norms(names):
                _give_biases(block, norm, readers)
                _make_plain(block, norm, names, like=head.weight)
        _give_biases(model, names.final_norm, (names.head,))
        _make_plain(model, names.final_norm, names, like=head.weight)

    def _rotated(self, x: Tensor) -> Tensor:
        """x Q for rows x (…, d) in float64."""
        channels = x.shape[-1]
        if self.mode == "hadamard":  # the product that needs no matrix
            return apply(x * random_signs(channels, self.seed).to(x.device), plan(channels))
        return x @ _random(channels, self.seed, self.mode).to(x.device)

    def _in_heads(self, x: Tensor, size: int) -> Tensor:
        """Every head of x (…, heads · size) rotated as v is, in float64."""
        heads = x.unflatten(-1, (-1, size))
        if self.head_mix == "none":
            return (heads @ _random(size, self.seed, self.mode).to(x.device)).flatten(-2)
        return apply(heads, plan(size)).flatten(-2)

    def _read(self, linear: nn.Module, gain: Tensor | None, shift: Tensor | None, head_size: int | None) -> None:
        """A linear or router behind a norm takes over its gain and shift, and the rotation of what it reads.

        head_size: rotate the heads of its output, too.
        """
        weight = linear.get_parameter("weight").double()
        bias = getattr(linear, "bias", None)
        bias = None if bias is None else bias.double()
        if bias is not None and shift is not None:
            bias = bias + weight @ shift.double()
        weight = self._rotated(weight if gain is None else weight * gain)
        if head_size is not None:
            weight = self._in_heads(weight.T, head_size).T
            bias = None if bias is None else self._in_heads(bias, head_size)
        _store(linear, weight, bias)

    def _write(self, linear: nn.Linear, weight: Tensor, centred: bool) -> None:
        """A linear with this weight (out, in), float64, writes to the rotated residual stream.

        centred: and nothing of the mean over channels, which the norms behind it no longer take off.
        """

        def turned(rows: Tensor) -> Tensor:
            return self._rotated(_without_mean(rows) if centred else rows)

        _store(linear, turned(weight.T).T, None if linear.bias is None else turned(linear.bias.double()))


@cache
def _random(channels: int, seed: int, mode: str) -> Tensor:
    return random_rotation(channels, seed, mode)


def _norms(names: Architecture) -> list[tuple[str, tuple[str, ...]]]:
    """The norms of a block, and all that reads what each puts out."""
    linears = {name for names_of_set in names.linears for name in names_of_set}
    return [(feed.producer, feed.readers) for feed in names.feeds if feed.producer not in linears]


def _query_heads(block: DecoderBlock) -> int:
    return block.linears()[block.architecture.output].in_features // block.head_size


def _without_mean(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _by_rows(table: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the rows of a large table in float64, some at a time; in its dtype."""
    return torch.cat([change(rows.double()).to(table.dtype) for rows in table.split(ROWS)])


def _store(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            parameter = linear.get_parameter(name)
            parameter.data = value.to(parameter.dtype).contiguous()


def _give_biases(parent: nn.Module, norm: str, readers: Sequence[str]) -> None:
    """Biases of 0 to the linears behind a norm that has a shift for them to take over."""
    if getattr(parent.get_submodule(norm), "bias", None) is not None:
        for linear in map(parent.get_submodule, readers):
            if linear.bias is None:
                weight = linear.get_parameter("weight")
                linear.bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False)


def _gain(weight: Tensor | None, names: Architecture) -> Tensor | None:
    """What a norm of this weight multiplies by, in float64; None for 1."""
    return None if weight is None else weight.double() + names.gain_offset


def _make_plain(parent: nn.Module, name: str, names: Architecture, like: Tensor) -> None:
    """Give a norm a gain of one; one that takes the mean off becomes the RMSNorm that it is on channels without."""
    norm = parent.get_submodule(name)
    if names.centred and not isinstance(norm, nn.RMSNorm):
        eps: Any = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        norm = nn.RMSNorm(like.shape[1], eps, device=like.device, dtype=like.dtype)
        parent.set_submodule(name, norm.requires_grad_(False))
    weight = norm.get_parameter("weight")
    weight.data = torch.full_like(weight, 1 - names.gain_offset)
