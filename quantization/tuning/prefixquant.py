"""PrefixQuant's quantizers (Chen et al. 2024, 2410.05265): grids by the error they make, then block-wise fine-tuning.

    min over W, s, z, clips  L(F(X_q; Ŵ, Q(x), k̂, v̂), F(X_fp; W))   fp_input;  quant_input: F(X_q; W);  both: their mean

F is one decoder block behind the full-precision prefix, X_fp and X_q what full-precision and quantized blocks before it
pass on. `search.initialize` finds every grid alone, `_fine_tune` trains all weights (`weight_lr`), scales, zero
points and shares of ranges (`quant_lr`); `Quantizers.stored` puts the weights on their
grids.

Departs from the reference: float32 instead of fp16 autocast; gradients are clipped, as its option says; the best
held-out state is kept, the start included; ranges are those of the text, not a moving average of its maxima.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss
from transformers import PreTrainedModel

from corpora.errors import UserError
from intactkv.attention import check_asked
from intactkv.policy import KVPolicy
from intactkv.training import Group, Schedule, every, in_order, mean_loss, repeatable, split_samples, train
from quantization.grids.uniform import QuantizedTensor, UniformGrid
from quantization.kv_cache import StaticPerHead
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import InputQuantizer
from quantization.recipes.protocols import WeightQuantizer
from quantization.recipes.recipe import added
from quantization.tuning.quantizers import Quantizers, at_work, first_samples, joint_error, min_max, stream_of
from quantization.tuning.search import initialize

__all__ = ["LOSSES", "PrefixQuantTuning"]

log = logging.getLogger(__name__)

SKIPPED = 3  # tokens of a sequence that skip_mse leaves out
CLAMP = 10.0  # of clamp_mse
FLOOR = 0.01  # of its first value: no scale or share of a range falls below that


def _skip_mse(output: Tensor, target: Tensor) -> Tensor:
    """The squared error without the 3 tokens of every sequence whose targets are largest; the mean is over all."""
    largest = target.abs().mean(-1).topk(min(SKIPPED, target.shape[1]), dim=1).indices
    kept = torch.ones(target.shape[:2], device=target.device).scatter(1, largest, 0.0)
    return ((output - target).square() * kept[..., None]).mean()


def _normalized_mse(output: Tensor, target: Tensor) -> Tensor:
    size = target.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(target.dtype).tiny)
    return ((output - target) / size).square().mean()


# Distances of a block's output from its target, both (B, T, channels).
LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse_loss,
    "skip_mse": _skip_mse,
    "clamp_mse": lambda output, target: (output.clamp(-CLAMP, CLAMP) - target.clamp(-CLAMP, CLAMP)).square().mean(),
    "normalized_mse": _normalized_mse,
    "cosine": lambda output, target: (1 - cosine_similarity(output, target, dim=-1)).mean(),
}
TARGETS = ("fp_input", "quant_input", "both")


@dataclass(frozen=True)
class PrefixQuantTuning:
    """mse_init, on `mse_init_size` samples, then fine-tuning for `epochs` (0: none) over the calibration text.

    skip_qk_weight_init: weights of q and k keep min-max grids. loss: a row of `LOSSES`. target: see above. batch:
    samples of a step. held_out: share of the samples, the last of them, that choose the state that is kept (published:
    64 of 576, which choose nothing). min_lr_factor: learning rates fall to this part of the first. clip_grad: norm of
    all gradients together, 0 for none.
    """

    mse_init: bool = True
    mse_init_size: int = 8
    skip_qk_weight_init: bool = False
    epochs: int = 0
    loss: str = "mse"
    target: str = "fp_input"
    weight_lr: float = 5e-6
    quant_lr: float = 5e-5
    batch: int = 4
    held_out: float = 1 / 9
    min_lr_factor: float = added(10.0)
    clip_grad: float = added(0.3)
    name: ClassVar[str] = "prefixquant"

    def __post_init__(self) -> None:
        for field, value, known in (("loss", self.loss, LOSSES), ("target", self.target, TARGETS)):
            if value not in known:
                raise UserError(f"tuning.{field}={value} is not known; choose from {', '.join(known)}")
        for field, count, least in (
            ("mse_init_size", self.mse_init_size, 1), ("epochs", self.epochs, 0), ("batch", self.batch, 1)
        ):  # fmt: skip
            if count < least:
                raise UserError(f"tuning.{field}={count} is not allowed; give {least} or more")
        for field, rate in (("weight_lr", self.weight_lr), ("quant_lr", self.quant_lr)):
            if not rate >= 0:
                raise UserError(f"tuning.{field}={rate:g} is not allowed; give a rate such as 5e-5, or 0 to keep them")
        if not self.min_lr_factor >= 1:
            raise UserError(
                f"tuning.min_lr_factor={self.min_lr_factor:g} is not allowed; give 1 (constant rates) or more"
            )
        if not self.clip_grad >= 0:
            raise UserError(f"tuning.clip_grad={self.clip_grad:g} is not allowed; give a norm, or 0 for none")
        if not 0 < self.held_out < 1:
            raise UserError(f"tuning.held_out={self.held_out:g} is not allowed; give a share between 0 and 1")

    @property
    def calibrates(self) -> bool:
        """Text passes on through quantized blocks in any case."""
        return True

    @property
    def reads(self) -> Literal["quantized", "both"]:
        """The full-precision blocks' text, too, where the target is made of it."""
        return "both" if self.epochs and self.target != "quant_input" else "quantized"

    def check(self, weights: WeightQuantizer | None) -> None:
        """Weights must be chosen by their grid alone. Raises UserError."""
        if weights is None:
            return
        grid = weights.grid
        if weights.name != "rtn" or not isinstance(grid, UniformGrid):
            raise UserError(
                f"prefixquant chooses the weights itself, on a grid that only rtn leaves to it; {weights.name} cannot "
                "stand in front of it: use --weights rtn-w4, or take the search away (--set tuning=none)"
            )
        if grid.rule.zero_point == "real" or grid.clip_search or grid.scale_dtype != "float32":
            raise UserError(
                "prefixquant searches and trains float32 scales with zero points that are codes; this grid has "
                f"convention={grid.convention}, clip_search={str(grid.clip_search).lower()}, "
                f"scale_dtype={grid.scale_dtype}: set weights.grid.convention=gptq-sym or gptq-asym"
            )

    def check_model(self, model: type[PreTrainedModel], kv: KVPolicy | None) -> None:
        """The search of static keys runs attention's scores through a function of its own."""
        if self.mse_init and isinstance(kv, StaticPerHead):
            check_asked(model, "the search for scales of keys", "leave it out with --set tuning.mse_init=false")

    def tune_block(
        self,
        block: DecoderBlock,
        weights: WeightQuantizer | None,
        inputs: Mapping[tuple[str, ...], InputQuantizer],
        kv: KVPolicy | None,
    ) -> Mapping[str, QuantizedTensor]:
        """Every linear on its grid; the quantizers of inputs, keys and values keep what was found for them.

        `figures` gets the block's output error, all quantizers at work, with min-max grids and with what was searched,
        and the held-out loss before and after training.
        """
        grid = None if weights is None else weights.grid
        assert grid is None or isinstance(grid, UniformGrid)
        quantizers = Quantizers(grid, {} if grid is None else min_max(block, grid), inputs, kv)
        if self.mse_init:
            few = first_samples(block, self.mse_init_size)
            targets = stream_of(few).passed(few)
            before = joint_error(few, quantizers, targets)
            initialize(few, quantizers, targets, self.skip_qk_weight_init)
            after = joint_error(few, quantizers, targets)
            block.report(error_min_max=before, error_searched=after)
            log.debug("%s  output error %.4e with min-max grids, %.4e with searched ones", block.name, before, after)
        trained = self._fine_tune(block, quantizers) if self.epochs else _weights(block)
        return {name: quantizers.stored(name, trained[f"{name}.weight"]) for name in quantizers.fits}

    def _fine_tune(self, block: DecoderBlock, quantizers: Quantizers) -> dict[str, Tensor]:
        """Train in place what the quantizers learn, and return the block's trained parameters, float32."""
        stream, parameters = stream_of(block), {name: x.clone() for name, x in _weights(block).items()}
        targets: list[Sequence[Tensor]] = [stream.targets] if self.target != "quant_input" else []
        if self.target != "fp_input":
            targets.append(stream.passed(block))
        count = len(stream.hidden)
        training, held_out = split_samples(count, max(1, round(self.held_out * count)), block.name)
        batches = [part[i : i + self.batch] for part in (training, held_out) for i in range(0, len(part), self.batch)]
        steps_per_epoch = -(-len(training) // self.batch)
        steps = self.epochs * steps_per_epoch
        positive, others = quantizers.learned(block)
        floors = [FLOOR * tensor for tensor in positive]
        policy, distance = quantizers.kv, LOSSES[self.loss]

        def loss(batch: int) -> Tensor:
            with torch.no_grad():  # a step may have overshot
                for tensor, floor in zip(positive, floors, strict=True):
                    tensor.copy_(torch.maximum(tensor, floor))
            weights = dict(parameters)
            for name in quantizers.fits:
                weights[f"{name}.weight"] = quantizers.rounded(name, parameters[f"{name}.weight"])
            hidden = torch.cat([stream.hidden[i] for i in batches[batch]]).float()
            with repeatable(hidden.device):
                output = stream.forward(block, hidden, weights, stream.new_cache(block, policy))
            wanted = [torch.cat([samples[i] for i in batches[batch]]).float() for samples in targets]
            return torch.stack([distance(output, target) for target in wanted]).mean()

        # Norms are weights, too; without a grid for the linears they all stay as they are.
        moved = [x for name, x in parameters.items() if name.endswith("weight")] if quantizers.fits else []
        if not (moved or positive):
            return parameters  # nothing is quantized
        with at_work(block, quantizers.inputs):
            descent = train(
                [Group(moved, self.weight_lr), Group([*positive, *others], self.quant_lr)],
                Schedule(
                    steps,
                    every(steps_per_epoch, steps),
                    last_rate=1 / self.min_lr_factor,
                    clip=self.clip_grad or math.inf,
                ),
                in_order(loss, range(steps_per_epoch), 1),
                lambda: mean_loss(loss, range(steps_per_epoch, len(batches))),
                block.name,
            )
        block.report(loss_before=descent.held_out[0], loss_after=min(descent.held_out))
        for name, parameter in block.module.named_parameters():
            parameter.data = parameters[name].to(parameter.dtype)
        return parameters


def _weights(block: DecoderBlock) -> dict[str, Tensor]:
    return {name: parameter.detach().float() for name, parameter in block.module.named_parameters()}
