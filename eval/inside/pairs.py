"""A quantized model beside its full-precision twin, fed the same tokens: what every error report starts from.

The reference is a model of its own, with no quantizer on weights, inputs or cache. It is the *twin*: where a method
rescales exactly, it is rescaled alike, so that its weights, keys and values are in the basis of the quantized ones.

    arm        the quantized model                                       the reference
    vanilla    computes [BOS] or the prefix's tokens itself              does the same
    intact     reads their keys and values as the twin wrote them        does the same
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eval.perplexity import Windows
from intactkv.architecture import Architecture, architecture_of
from intactkv.attach import IntactModel, attach
from intactkv.cache import IntactCache
from intactkv.observe import run_decoder
from quantization.kernels.linear import QuantLinear
from quantization.runs.plan import Plan

__all__ = ["Pair", "pairs_of", "weight_of"]


@dataclass(frozen=True, eq=False)
class Pair:
    """One arm of a comparison: `quantized` and `reference` take the same tokens in the same way."""

    arm: str
    quantized: IntactModel
    reference: IntactModel

    @property
    def architecture(self) -> Architecture:
        """Where the parts of both models are."""
        return architecture_of(self.quantized.model.config)

    @property
    def intact(self) -> bool:
        """Whether the leading tokens are in the cache, rather than computed."""
        return self.quantized.prefix is not None

    def fed(self, windows: Windows, row: int) -> Tensor:
        """The ids of a window as both models are fed them, (1, T), the leading ones in front if they are computed."""
        text = windows.fed[row]
        return (text if self.intact else torch.cat([windows.lead, text]))[None]

    def lead(self, windows: Windows) -> int:
        """How many of the fed ids are leading tokens, not text."""
        return 0 if self.intact else len(windows.lead)

    def run(self, model: IntactModel, ids: Tensor, cache: IntactCache | None = None) -> Tensor:
        """One pass of one of the two models: final hidden states (T, hidden size), which its head would read."""
        return run_decoder(model, ids, cache)[0]

    def blocks(self, model: IntactModel) -> list[nn.Module]:
        """The decoder blocks of one of the two models."""
        return self.architecture.blocks_of(model.model)

    def linears(self, everywhere: bool = False) -> Iterator[tuple[int, str, nn.Module, nn.Linear]]:
        """Block, name within it, the quantized model's linear (of any class) and the reference's, in model order.

        everywhere: only those that every token reaches, not the experts'.
        """
        blocks = self.blocks(self.quantized)
        for index, twin in enumerate(self.blocks(self.reference)):
            linears = self.architecture.linears_of(twin, self.architecture.block_name(index))
            for name, linear in linears.items():
                if everywhere and self.architecture.expert_of(name) is not None:
                    continue
                yield index, name, blocks[index].get_submodule(name), linear


def pairs_of(plan: Plan) -> list[Pair]:
    """The arms of a plan, vanilla first: both where a prefix is named, unless one of them is asked for or refused.

    Memory: two models. Raises UserError if the twin is not at hand.
    """
    loaded, twin = plan.load(), plan.twin()
    pairs = []
    if getattr(loaded.model, "intactkv_needs_prefix", None) is None:
        pairs.append(Pair("vanilla", attach(loaded.model, None, loaded.kv), attach(twin, None)))
    if loaded.prefix is not None:
        pairs.append(Pair("intact", loaded, attach(twin, loaded.prefix)))
    return pairs


def weight_of(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight that a linear of any class multiplies with, (out, in)."""
    if isinstance(linear, QuantLinear):
        return linear.dequantize(dtype)
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight
