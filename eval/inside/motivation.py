"""IntactKV's motivation (arXiv 2403.01241, figure 2): the loss of a quantized model against the size of its prefix.

For every size m the first m tokens of [P] keep the keys and values of the full-precision twin; the loss of a block is
½ · mean (A_quantized − A_full precision)² over the tokens behind the *whole* prefix, so every size is scored on the
same tokens. Size 0 is the vanilla model. Where the loss falls in steps, a pivot token was taken in.
Departs from the published code: one load of the two models, of which only the prefix changes (theirs loads 35 times).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from corpora.errors import UserError
from corpora.sharegpt import Chat
from intactkv.calibrate import Sample, block_losses, block_targets
from intactkv.policy import KVPolicy
from intactkv.prefix import Prefix

__all__ = ["losses_by_size"]


@torch.no_grad()
def losses_by_size(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    prefix: Prefix,
    chats: Sequence[Chat],
    *,
    kv: KVPolicy | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Tensor:
    """Mean over conversations of every block's loss: (P + 1, L), row m for a prefix of m tokens.

    chats: each starts with the prefix's ids. advance: called after every conversation of every size.
    Raises UserError without any.
    """
    if not chats:
        raise UserError("the motivation curve needs conversations; ask for 1 or more with --samples")
    losses: list[Tensor] = []
    for chat in chats:
        behind = torch.arange(len(chat.ids)) >= len(prefix)
        sample = Sample(chat.ids, behind)
        targets = block_targets(twin, sample)
        rows = []
        for size in range(len(prefix) + 1):
            intact = prefix.first(size) if size else None
            rows.append(torch.stack([loss.cpu() for loss in block_losses(model, intact, sample, targets, kv)]))
            advance()
        losses.append(torch.stack(rows).double())
    return torch.stack(losses).mean(dim=0)
