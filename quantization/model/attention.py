"""What enters attention's two products, quantized: queries and softmax rows (RTN and SmoothQuant of qllm, W8A8), or
queries alone (OmniQuant's W4A4).

    S = softmax(Q(q) k̂ᵀ / √D),   out = Q(S) v̂      one grid per (head, token) of q, one per row of S

Keys and values are the KV policy's: they are rounded on their way into the cache. The columns of S that belong to the
intact prefix keep full precision: they multiply full-precision values, and a sink's share would set the step of the
row (0.8 % of it rounds to 0 with 6 bits). How many columns those are, only the cache knows: a sliding window leaves the
prefix behind. The products are those of `intactkv.attention`; no model code is touched.

Departs from qllm: values are rounded per token (there: per channel over the whole text, which reads the future).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import architecture_of
from intactkv.attention import PRODUCTS, ROWS, check_asked
from quantization.grids.straight_through import straight
from quantization.grids.uniform import UniformGrid, fake_quantize
from quantization.model.blocks import DecoderBlock

__all__ = ["AttentionProducts"]


@dataclass(frozen=True)
class AttentionProducts:
    """The grid of queries and, with rows, of softmax rows."""

    grid: UniformGrid
    rows: bool = field(default=True, metadata={"before": (True,)})  # see `recipe.added`

    def __post_init__(self) -> None:
        if self.grid.group_size != -1:
            raise UserError(
                f"attention.grid.group_size={self.grid.group_size} is not allowed; a query and a softmax row have one "
                "grid each: -1"
            )

    @property
    def label(self) -> str:
        """`qs8`: queries and softmax; `q4`: queries alone."""
        return f"{'qs' if self.rows else 'q'}{self.grid.bits}"

    def queries(self, query: Tensor) -> Tensor:
        """Queries (…, D) on their grids."""
        return _rounded(query, self.grid)

    def softmax(self, rows: Tensor, prefix: int) -> Tensor:
        """Softmax rows (…, columns) on their grids, but for the first `prefix` columns."""
        if not self.rows:
            return rows
        return torch.cat([rows[..., :prefix], _rounded(rows[..., prefix:], self.grid)], dim=-1)

    def check(self, model: type[PreTrainedModel]) -> None:
        """Raise UserError for a class of models whose attention cannot run through these grids."""
        check_asked(model, "a grid in attention's products", "leave it out with --set attention=none")

    def install(self, model: PreTrainedModel) -> None:
        """Let a model's attention run through these grids."""
        architecture = architecture_of(model.config)
        for block in architecture.blocks_of(model):
            block.get_submodule(architecture.attention).__dict__[PRODUCTS] = self
        model.set_attn_implementation(ROWS)

    @contextmanager
    def at_work(self, block: DecoderBlock) -> Iterator[None]:
        """Let one block's attention run through these grids, for a while."""
        module = block.module.get_submodule(block.architecture.attention)
        config: Any = module.config
        before, config._attn_implementation = config._attn_implementation, ROWS
        module.__dict__[PRODUCTS] = self
        try:
            yield
        finally:
            config._attn_implementation = before
            del module.__dict__[PRODUCTS]


def _rounded(x: Tensor, grid: UniformGrid) -> Tensor:
    """The states on the grid; where a prefix is trained, its gradient passes as if nothing were rounded."""
    seen = fake_quantize(x, grid)
    return straight(seen, x) if x.requires_grad else seen
