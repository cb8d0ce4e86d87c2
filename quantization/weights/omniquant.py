"""OmniQuant (Shao et al., ICLR 2024, arXiv:2308.13137): learn how far to clip, block by block, with frozen weights.

    min over Θ  ‖F(X_fp; W) − F(X_q; Q(W; Θ))‖²  (+ ‖F(X_q; W) − F(X_q; Q(W; Θ))‖²: aug_loss)      Eq. 1
    h = (σ(γ⁺) max W − σ(γ⁻) min W) / (2^b − 1),   z = round(−σ(γ⁻) min W / h)                      Eq. 2, LWC
    Ŵ = h · (clamp(round(W / h) + z, 0, 2^b − 1) − z)

F is one decoder block, X_fp and X_q are what full-precision and quantized blocks before it pass on. `clipped_fit` is
LWC, `fake_quantize` the straight-through Ŵ, `learn` the optimization of γ and of LET's scales (`omniquant_let`), one
sample a step. The prefix of calibration behind one is converted to LET's basis; the loss sees text tokens only.

Departs from the reference: float32 instead of fp16 autocast; the lowest-loss epoch is kept, the start included; the
range always contains 0, so that z is a code (no change for groups of both signs); gradients pass the rounding of z,
too. Where a recipe rounds inputs (W4A4), F rounds them, queries, keys and values while it learns, as the model will;
static inputs are fitted to the finished block, so training does not see them.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from corpora.errors import UserError
from intactkv.architecture import Feed
from intactkv.training import Group, Schedule, every, in_order, mean_loss, repeatable, train
from quantization.grids.straight_through import fit_through, on_grid, straight
from quantization.grids.uniform import (
    SCALE_DTYPES,
    Fit,
    QuantizedTensor,
    UniformGrid,
    encode,
    finite,
    fit_finite,
    merge_groups,
    split_groups,
)
from quantization.model.blocks import DecoderBlock
from quantization.model.stream import CalibrationStream
from quantization.weights.base import GridQuantizer
from quantization.weights.omniquant_let import (
    Pair,
    check_pairs,
    initial_pairs,
    learned_feeds,
    prefix_in_basis,
    transformed,
)

__all__ = ["Learned", "OmniQuant", "clipped_fit", "fake_quantize", "learn", "start", "student"]

START = 4.0  # of γ⁺ and γ⁻: σ(4) = 0.982 of the range
CONVENTIONS = ("gptq-asym", "intactkv-asym", "quarot-sym")  # those that clipping keeps in their own form


def clipped_fit(groups: Tensor, bounds: tuple[Tensor, Tensor] | None, grid: UniformGrid) -> Fit:
    """Scale and zero point of every group, from its range clipped by σ(γ⁺) above and σ(γ⁻) below (Eq. 2).

    groups: (out, groups, group_size). bounds: γ⁺ and γ⁻, each (out, groups, 1); None clips nothing, which is RTN.
    Returns float32 (out, groups, 1), with gradients for γ and, through the extremes, for the weights.
    """
    # Not aminmax: it has no gradient in torch 2.11.
    low, high = groups.amin(-1, keepdim=True).float(), groups.amax(-1, keepdim=True).float()
    if bounds is not None:
        low, high = torch.sigmoid(bounds[1]) * low, torch.sigmoid(bounds[0]) * high
    scale, zero_point = fit_through(low, high, grid)
    if grid.scale_dtype != "float32":
        dtype = SCALE_DTYPES[grid.scale_dtype]
        scale = straight(scale.to(dtype).float().clamp_min(torch.finfo(dtype).tiny), scale)
    return Fit(scale, zero_point)


def fake_quantize(weight: Tensor, bounds: tuple[Tensor, Tensor] | None, grid: UniformGrid) -> Tensor:
    """Ŵ (out, in) in float32, with gradients for γ and for the weight where they are asked for."""
    groups = split_groups(weight, grid.group_size)
    return merge_groups(on_grid(groups, clipped_fit(groups, bounds, grid), grid))


@dataclass(frozen=True)
class Learned:
    """What is learned for a block. bounds: γ⁺ and γ⁻ of every linear (none without LWC); pairs: of LET."""

    bounds: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()

    @property
    def clipping(self) -> list[Tensor]:
        """All γ."""
        return [gamma for pair in self.bounds.values() for gamma in pair]

    @property
    def equivalence(self) -> list[Tensor]:
        """All of LET's tensors."""
        return [tensor for pair in self.pairs for tensor in pair.learned]

    def quantize(self, block: DecoderBlock, grid: UniformGrid) -> dict[str, QuantizedTensor]:
        """The linears, transformed and on their grids: `dequantize` gives `student`'s weights, bit for bit."""
        parameters, stored = transformed(block, [pair.step for pair in self.pairs]), {}
        for name in block.linears():
            groups = split_groups(parameters[f"{name}.weight"].float(), grid.group_size)
            fitted = clipped_fit(groups, self.bounds.get(name), grid)
            codes = merge_groups(encode(groups, fitted, grid)).to(torch.uint8)
            scale = fitted.scale[..., 0].to(SCALE_DTYPES[grid.scale_dtype])
            stored[name] = QuantizedTensor(codes, scale, fitted.zero_point[..., 0], grid)
        return stored


def start(block: DecoderBlock, grid: UniformGrid) -> dict[str, tuple[Tensor, Tensor]]:
    """γ⁺ and γ⁻ = 4 for every group of every linear, each (out, groups, 1)."""
    bounds = {}
    for name, linear in block.linears().items():
        groups = split_groups(linear.weight, grid.group_size)
        gamma = torch.full((*groups.shape[:2], 1), START, device=groups.device)
        bounds[name] = gamma, gamma.clone()
    return bounds


def student(
    block: DecoderBlock, learned: Learned, grid: UniformGrid
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
    """The block's parameters, transformed and quantized, float32, and the prefix's K and V in their basis.

    They are what `CalibrationStream.forward` and its `new_cache` take; gradients flow to all that is learned, and to
    nothing else.
    """
    steps = [pair.step for pair in learned.pairs]
    parameters = transformed(block, steps)
    for name in block.linears():
        weight = f"{name}.weight"
        parameters[weight] = fake_quantize(parameters[weight], learned.bounds.get(name), grid)
    stream = _stream(block)
    seeded = prefix_in_basis(stream.seeded(block), block, steps) if stream.prefix_length else None
    return {name: parameter.float() for name, parameter in parameters.items()}, seeded


def _stream(block: DecoderBlock) -> CalibrationStream:
    assert block.stream is not None, "OmniQuant calibrates, but no calibration text was given"
    return block.stream


@dataclass(frozen=True)
class OmniQuant(GridQuantizer):
    """Learned clipping (lwc) and learned equivalent scales (let) for every linear of a block.

    epochs: passes over the samples, one sample a step; 0 needs no text and is RTN with σ(4) of the range.
    lwc_lr, let_lr, weight_decay: of AdamW. aug_loss: also match the full-precision block on quantized inputs.
    alpha: how much of an activation's maximum LET's scales start with. shift: learn LET's δ, for models with biases.
    """

    grid: UniformGrid
    lwc: bool = True
    let: bool = False
    epochs: int = 20
    lwc_lr: float = 1e-2
    let_lr: float = 5e-3
    weight_decay: float = 0.0
    aug_loss: bool = False
    alpha: float = 0.5
    shift: bool = False
    name: ClassVar[str] = "omniquant"
    reads: ClassVar[Literal["quantized", "full", "both"]] = "both"
    sees_rounding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.grid.convention not in CONVENTIONS or self.grid.clip_search:
            raise UserError(
                f"omniquant learns its clipping on grids of the convention {', '.join(CONVENTIONS)} without "
                f"clip_search; this one is {self.grid.convention}, clip_search={str(self.grid.clip_search).lower()}"
            )
        if not (self.lwc or self.let):
            raise UserError(
                "omniquant with weights.lwc=false and weights.let=false learns nothing; set the other first, or use rtn"
            )
        if self.epochs < 0 or (self.let and self.epochs == 0):
            raise UserError(
                f"weights.epochs={self.epochs} is not allowed{' with weights.let=true' if self.let else ''}; give a "
                "positive number (or 0 without let, which clips every range to 0.982)"
            )
        for rate, value in (("lwc_lr", self.lwc_lr), ("let_lr", self.let_lr)):
            if not value > 0:
                raise UserError(f"weights.{rate}={value:g} is not allowed; give a positive learning rate, such as 1e-2")
        if not self.weight_decay >= 0:
            raise UserError(f"weights.weight_decay={self.weight_decay:g} is not allowed; give 0, as published, or more")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"weights.alpha={self.alpha:g} is not allowed; give 0 to 1, published are 0.5 and 0.75")
        if self.shift and not self.let:
            raise UserError("weights.shift=true is a part of LET; add weights.let=true, or leave it out")

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        """Whether there is anything to learn."""
        return self.epochs > 0

    @property
    def rescales(self) -> bool:  # type: ignore[override]
        """LET does."""
        return self.let

    def check(self, block: DecoderBlock) -> None:
        """Groups must fill every row; LET needs norms in front of what they feed, and biases for shifts."""
        super().check(block)
        if self.let:
            check_pairs(block, self.shift)

    def rescaled_feeds(self, block: DecoderBlock) -> list[Feed]:
        """LET's, but for query ↔ key, whose scales no rotation of an input touches."""
        return learned_feeds(block) if self.let else []

    def quantize_block(self, block: DecoderBlock) -> dict[str, QuantizedTensor]:
        """Every linear of the block; `figures` gets the loss before and after training, the mean over samples."""
        for name, linear in block.linears().items():
            weight = finite(linear.weight, f"{block.name}.{name}").float()
            fit_finite(split_groups(weight, self.grid.group_size), self.grid, f"{block.name}.{name}")
        learned = Learned(
            start(block, self.grid) if self.lwc else {},
            initial_pairs(block, self.alpha, self.shift) if self.let else (),
        )
        if self.epochs:
            before, after = learn(block, learned, self)
            block.report(loss_before=before, loss_after=after)
        quantized = learned.quantize(block, self.grid)
        for pair in learned.pairs:
            block.rescale(pair.step)
        return quantized


def learn(block: DecoderBlock, learned: Learned, method: OmniQuant) -> tuple[float, float]:
    """Move what is learned to the lowest loss that an epoch ended with, and return the loss before and after.

    Raises UserError, with the block's name, if the loss is not finite.
    """
    stream = _stream(block)
    targets = [stream.targets]
    if method.aug_loss:
        targets.append(stream.passed(block))
    count = len(stream.hidden)

    def loss(i: int) -> Tensor:
        with repeatable(stream.hidden[i].device):
            return _sample_loss(block, student(block, learned, method.grid), targets, i)

    with nullcontext() if block.rounding is None else block.rounding.at_work(block):
        descent = train(
            [
                Group(learned.equivalence, method.let_lr, method.weight_decay),
                Group(learned.clipping, method.lwc_lr, method.weight_decay),
            ],
            Schedule(method.epochs * count, every(count, method.epochs * count)),
            in_order(loss, range(count), 1),
            lambda: _mean_loss(block, student(block, learned, method.grid), targets),
            block.name,
            way_out="lower weights.lwc_lr or weights.let_lr, or give other text",
        )
    return descent.held_out[0], min(descent.held_out)


def _sample_loss(
    block: DecoderBlock,
    student: tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None],
    targets: Sequence[Sequence[Tensor]],
    i: int,
) -> Tensor:
    """Eq. 1 for one sample: the sum of the mean squared distances to its targets."""
    stream = _stream(block)
    weights, seeded = student
    cache = stream.new_cache(block, None if block.rounding is None else block.rounding.kv, seeded)
    output = stream.forward(block, stream.hidden[i].float(), weights, cache)
    return torch.stack([mse_loss(output, of_sample[i].float()) for of_sample in targets]).sum()


def _mean_loss(
    block: DecoderBlock,
    student: tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None],
    targets: Sequence[Sequence[Tensor]],
) -> float:
    """Eq. 1, the mean over samples."""
    return mean_loss(lambda i: _sample_loss(block, student, targets, i), range(len(targets[0])))
