"""A number that is none goes no further than where it arises: into no score, no answer, no figure and no record.

What a model computes leaves it in five places: losses (`eval.perplexity`), log-likelihoods (`eval.tasks.scoring`),
hidden states to look at (`intactkv.observe`), logits and generated tokens (`intactkv.attach`). Each calls `finite`.
Training looks at its own losses (`intactkv.training`).
"""

from typing import Any

from torch import Tensor
from transformers import LogitsProcessor

from corpora.errors import UserError

__all__ = ["FiniteLogits", "finite"]

WAY_OUT = (
    "either the weights are damaged, or the numbers outgrow their dtype; compute with --dtype float32, or fetch or "
    "quantize the checkpoint again"
)


def finite(values: Tensor, what: str) -> Tensor:
    """The values as they are. Raises UserError, with `what` they are, if one of them is NaN or infinite."""
    good = values.isfinite()
    if bool(good.all()):
        return values
    bad = values.detach()[~good]
    word = "NaN" if bool(bad.isnan().all()) else "infinite" if bool(bad.isinf().all()) else "NaN or infinite"
    first = ", ".join(map(str, (~good).nonzero()[0].tolist()))
    raise UserError(f"{what}: {len(bad)} of {good.numel()} are {word}, the first at [{first}]; {WAY_OUT}")


class FiniteLogits(LogitsProcessor):
    """Lets logits pass from which a token can be chosen. Those of single tokens may be −inf, which forbids them."""

    def __init__(self, model: str) -> None:
        self._what = f"logits of the next token of {model}, by row"

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """input_ids: (B, L); scores: (B, vocabulary). Returns the scores."""
        finite(scores.amax(dim=-1), self._what)  # a NaN is the largest of all
        return scores
