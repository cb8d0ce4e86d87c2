"""ZeroQuant's layer-by-layer knowledge distillation (Yao et al., NeurIPS 2022, arXiv:2206.01861, section 4.2).

    min over the parameters of f̂ₗ   ‖f̂ₗ(hₗ) − fₗ(hₗ)‖² / ‖fₗ(hₗ) − hₗ‖²       hₗ: what full-precision blocks pass on

fₗ is the full-precision block l, f̂ₗ the same with rounded weights and inputs. Blocks do not depend on each other, no
label and no pass through the whole model is needed. Weights are float32 masters that every forward pass rounds anew;
gradients pass rounding and clamping as if there were none (`rounded`, `round_inputs`).

Departs from the published code: any block, not the last alone (`blocks`); the denominator, so that one learning rate
suits blocks whose outputs differ a thousandfold; float32 masters (there: bfloat16, which swallows most steps of such
rates); the causal mask (there: none); the best held-out state is kept, the start included. Behind a prefix, teacher
and student read the prefix's full-precision keys and values, and the loss sees text tokens only.
"""

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import PreTrainedModel

from corpora.errors import UserError
from intactkv.observe import change_input
from intactkv.policy import KVPolicy
from intactkv.training import (
    Schedule,
    in_order,
    matrices_decay,
    mean_loss,
    repeatable,
    split_samples,
    spread,
    train,
)
from quantization.grids.stored import StoredWeight
from quantization.grids.straight_through import straight
from quantization.grids.uniform import TINY
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import InputQuantizer
from quantization.model.stream import CalibrationStream
from quantization.recipes.protocols import WeightQuantizer

__all__ = ["Distill", "Student"]

log = logging.getLogger(__name__)

EVALUATIONS = 10  # of the held-out loss


@dataclass(frozen=True)
class Distill:
    """Fine-tune every parameter of a block until, rounded, it gives the full-precision block's output.

    steps: of `batch` samples each. lr, weight_decay, eps: of AdamW; lr stays constant. blocks: "all" (the paper) or
    "last" (the published figures). held_out: samples that decide which state is kept; a quarter of a text that has no
    more than those.
    """

    steps: int = 600
    blocks: str = "all"
    lr: float = 5e-6
    batch: int = 4
    held_out: int = 4
    weight_decay: float = 1e-5
    eps: float = 1e-6
    name: ClassVar[str] = "lkd"
    reads: ClassVar[Literal["quantized", "full", "both"]] = "full"
    calibrates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.blocks not in ("all", "last"):
            raise UserError(f"tuning.blocks={self.blocks} is not known; choose all or last")
        for field, count in (("steps", self.steps), ("batch", self.batch), ("held_out", self.held_out)):
            if count < 1:
                raise UserError(f"tuning.{field}={count} is not allowed; give a positive number")
        for field, value in (("lr", self.lr), ("eps", self.eps)):
            if not 0 < value < float("inf"):
                raise UserError(f"tuning.{field}={value:g} is not allowed; give a positive number, such as 1e-6")
        if not self.weight_decay >= 0:
            raise UserError(f"tuning.weight_decay={self.weight_decay:g} is not allowed; give 1e-5, as published, or 0")

    def check(self, weights: WeightQuantizer | None) -> None:
        """Weights must be rounded by themselves alone. Raises UserError for a quantizer that looks at text."""
        if weights is not None and (weights.calibrates or weights.rescales):
            raise UserError(
                f"distillation rounds the weights anew in every step, which {weights.name} cannot do without its text; "
                "use a method that needs none, such as --weights rtn-w4, or do without distillation (--set tuning=none)"
            )

    def check_model(self, model: type[PreTrainedModel], kv: KVPolicy | None) -> None:
        """Every model will do."""

    def tune_block(
        self,
        block: DecoderBlock,
        weights: WeightQuantizer | None,
        inputs: Mapping[tuple[str, ...], InputQuantizer],
        kv: KVPolicy | None,
    ) -> Mapping[str, StoredWeight]:
        """The trained linears on their grids; norms and biases stay in the block, trained.

        `figures` gets the held-out loss before and after, the squared error of the untrained student over the text, and
        how much of that is the first token's: a pivot, where the text has no prefix.
        Raises UserError if a loss is not finite, or no sample is left to train on.
        """
        if self.blocks == "last" and block.index + 1 < block.config.get_text_config(decoder=True).num_hidden_layers:
            return {} if weights is None else weights.quantize_block(block)
        stream = _stream(block)
        count = len(stream.full)
        few = self.held_out >= count  # the published text has 128
        if few:
            log.warning(
                "%s  %d samples: a quarter is held out, not tuning.held_out=%d", block.name, count, self.held_out
            )
        training, held_out = split_samples(count, max(1, count // 4) if few else self.held_out, block.name)
        student = Student(block, weights, inputs, kv)
        error, first = student.squared_error()
        descent = train(
            matrices_decay(student.masters, self.lr, self.weight_decay),
            Schedule(self.steps, spread(EVALUATIONS, self.steps), eps=self.eps),
            in_order(student.loss, training, self.batch),
            lambda: mean_loss(student.loss, held_out),
            block.name,
        )
        before, after = descent.held_out[0], min(descent.held_out)
        log.info(
            "%s  held-out loss %.3e, before %.3e (best of %d steps: %d); the first token had %.1f %% of the error",
            block.name,
            after,
            before,
            self.steps,
            descent.best_step,
            100 * first / max(error, TINY),
        )
        block.report(loss_before=before, loss_after=after, squared_error=error, squared_error_first_token=first)
        return student.finish()


class Student:
    """A float32 copy of a block, on which quantizers are at work and which is trained; the block is its teacher."""

    def __init__(
        self,
        block: DecoderBlock,
        weights: WeightQuantizer | None,
        inputs: Mapping[tuple[str, ...], InputQuantizer],
        kv: KVPolicy | None = None,
    ):
        self._teacher, self._weights = block, weights
        self._kv = kv
        self._block = replace(block, module=deepcopy(block.module).float(), figures={})
        self.masters = tuple(self._block.module.parameters())
        round_inputs(self._block.module, inputs)
        stream = _stream(block)
        added = [mse_loss(y.float(), x.float()) for x, y in zip(stream.full, stream.targets, strict=True)]
        self._size = torch.stack(added).mean().clamp_min(TINY)  # of what the block adds

    def outputs(self, i: int) -> Tensor:
        """The student's output for a sample, (1, T, hidden size), with gradients for the masters where they are on."""
        stream = _stream(self._teacher)
        seeded = None
        if stream.prefix_length:
            keys, values = stream.seeded(self._teacher)
            seeded = keys.float(), values.float()
        cache = stream.new_cache(self._block, self._kv, seeded)
        return stream.forward(self._block, stream.full[i].float(), rounded(self._block, self._weights), cache)

    def loss(self, i: int) -> Tensor:
        """The mean squared difference from the teacher's output for a sample, relative to what the block adds."""
        target = _stream(self._teacher).targets[i].float()
        with repeatable(target.device):
            return mse_loss(self.outputs(i), target) / self._size

    @torch.no_grad()
    def squared_error(self) -> tuple[float, float]:
        """Σ‖f̂(h) − f(h)‖² over all samples, and of their first tokens alone."""
        of_token = [
            (self.outputs(i) - target.float()).double().square().sum(-1)[0]
            for i, target in enumerate(_stream(self._teacher).targets)
        ]
        tokens = torch.stack(of_token)  # (N, T)
        return float(tokens.sum()), float(tokens[:, 0].sum())

    def finish(self) -> Mapping[str, StoredWeight]:
        """Hand what was trained to the teacher's block, but for the linears that are quantized: those are returned."""
        quantized = {} if self._weights is None else self._weights.quantize_block(self._block)
        trained = dict(self._block.module.named_parameters())
        for name, parameter in self._teacher.module.named_parameters():
            if name.removesuffix(".weight") not in quantized:
                parameter.data = trained[name].detach().to(parameter.dtype)
        return quantized


def rounded(block: DecoderBlock, weights: WeightQuantizer | None) -> dict[str, Tensor]:
    """What stands in for the block's linear weights: on their grids, by parameter name; ∂ŵ/∂w = 1 for every weight."""
    if weights is None:
        return {}
    masters = dict(block.module.named_parameters())
    stored = {f"{name}.weight": weight for name, weight in weights.quantize_block(block).items()}
    return {name: straight(weight.dequantize(), masters[name]) for name, weight in stored.items()}


def round_inputs(module: nn.Module, inputs: Mapping[tuple[str, ...], InputQuantizer]) -> None:
    """Put quantizers in front of a block's linears, with ∂x̂/∂x = 1 for every value, clamped or not."""

    def in_front(quantizer: InputQuantizer, x: Tensor) -> Tensor:
        with torch.no_grad():
            seen = quantizer(x)
        return straight(seen, x)

    for names, quantizer in inputs.items():
        for name in names:
            change_input(module.get_submodule(name), partial(in_front, quantizer))


def _stream(block: DecoderBlock) -> CalibrationStream:
    assert block.stream is not None, "distillation needs text, but none was given"
    return block.stream
