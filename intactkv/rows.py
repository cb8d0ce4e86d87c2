"""A batch of prompts taken apart behind a prefix, its logits brought back to the columns of the given rows, and what
attention read of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corpora.errors import UserError

__all__ = ["FedRows", "Rows", "Usage", "left_padded", "refuse_holes", "to_columns"]


@dataclass
class Usage:
    """How much of what attention read behind the prefix was rounded, in pairs of a query and a token that it saw."""

    rounded: int = 0
    pairs: int = 0

    @property
    def share(self) -> float:
        """In [0, 1]; 0 while nothing was read."""
        return self.rounded / self.pairs if self.pairs else 0.0

    def clear(self) -> None:
        """Begin anew."""
        self.rounded = self.pairs = 0


class Rows:
    """The rows of a call's batch. pads: (B,) pads between the prefix and every row's text; None for none."""

    pads: Tensor | None = None

    def edit(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Follow an edit of the batch."""
        if self.pads is not None:
            self.pads = rows(self.pads)


@dataclass(frozen=True, eq=False)
class FedRows:
    """A batch taken apart: what is fed behind the prefix, and how its columns map back.

    feed, mask: (B, T) ids and 0/1, padded on the left. pads: (B,) pad columns per row of `feed`.
    had_prefix: whether the given rows contained the prefix ids. dropped: leading tokens that are not fed, per row.
    """

    feed: Tensor
    mask: Tensor
    pads: Tensor
    had_prefix: bool
    dropped: list[int] = field(default_factory=list)


def refuse_holes(mask: Tensor) -> None:
    """Padding must be on one side: between two real tokens it would shift positions."""
    changes = (mask[:, 1:] != mask[:, :-1]).sum(dim=1)
    if bool((changes > 1).any()):
        raise UserError("attention_mask has holes; pad every row on the left or on the right only")


def left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with their pads moved to the left: ids and mask, (B, L)."""
    order = mask.argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def to_columns(
    logits: Tensor, rows: FedRows, prefix_logits: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """Bring (B, T, V) logits of the fed tokens back to the (B, L, V) columns of the given rows, 0 at pads.

    A column that was not fed (the prefix's own tokens, or a dropped [BOS]) takes the stored prefix logits, its last
    rows, since they end where the fed tokens begin.
    """
    batch, length = input_ids.shape
    if prefix_logits is None and attention_mask is None:
        return logits
    columns = logits.new_zeros(batch, length, logits.shape[-1])
    for row in range(batch):
        keep = slice(None) if attention_mask is None else attention_mask[row].bool().to(logits.device)
        new = logits[row, int(rows.pads[row]) :]
        count = rows.dropped[row]
        if prefix_logits is not None and count:
            new = torch.cat([prefix_logits[-count:], new])
        columns[row, keep] = new
    return columns
