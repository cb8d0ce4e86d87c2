"""Perplexity of a model behind its prefix, by IntactKV's or GPTQ's protocol.

    PPL = exp(mean over windows of the mean NLL of their counted targets)

Both arms see the same tokens. With `lead` the tokens in front (a prefix's, or [BOS]) and `fed` the rest of a window,
the counted targets are fed[1:]: the prediction made *at* the last leading token never counts, because behind an intact
prefix it comes from the full-precision model.

    protocol    prefix    lead          fed               targets of a window of S
    intactkv    none      [BOS]         window[1:]        S − 2
    intactkv    P tokens  the prefix    window[1:]        S − 2      (window[0] is the [BOS] that the prefix brings)
    gptq        none      nothing       window            S − 1
    gptq        P tokens  the prefix    window            S − 1      (windows of the text without its leading [BOS])

Only a slice of the logits exists at any time: the head is applied to a few hundred positions at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from corpora.errors import UserError
from corpora.text import Protocol, TokenStream
from eval.tasks.scoring import LOGITS_AT_ONCE, decoder_and_head
from intactkv.attach import IntactModel
from intactkv.finite import finite
from intactkv.prefix import input_embeddings

__all__ = ["Windows", "cut_windows", "perplexity_of", "token_losses", "window_losses"]


@dataclass(frozen=True, eq=False)
class Windows:
    """What is fed. lead: (P,) tokens in front of every window; fed: (W, T); intact: whether the lead is a prefix in
    the cache, rather than tokens that the model computes."""

    lead: Tensor
    fed: Tensor
    intact: bool

    @property
    def targets(self) -> int:
        """Counted predictions per window."""
        return self.fed.shape[1] - 1


def cut_windows(
    stream: TokenStream, protocol: Protocol, prefix_ids: tuple[int, ...], intact: bool, limit: int | None
) -> Windows:
    """Cut a token stream by the table above. Raises UserError for a text shorter than one window."""
    lead = torch.tensor(prefix_ids, dtype=torch.long)
    if protocol.bos_in_every_window:
        windows = stream.windows(limit)
        return Windows(lead if len(lead) else windows[0, :1], windows[:, 1:], intact)
    ids = stream.ids
    if len(lead) and int(ids[0]) == stream.start_id:
        ids = ids[1:]
    return Windows(lead, stream.split(ids, limit), intact)


def perplexity_of(losses: Tensor) -> float:
    """exp of the mean of finite losses. Raises UserError where that is more than a float64 holds.

    Such a mean is over 709 nats a token. Its logits are finite, but no text tells anything about the model any more.
    """
    mean = losses.double().mean()
    if not math.isfinite(perplexity := float(mean.exp())):
        raise UserError(
            f"the mean loss is {float(mean):.1f} nats a token, beyond what exp can tell; the model is damaged: "
            "check its checkpoint, or quantize with more bits"
        )
    return perplexity


@torch.inference_mode()
def token_losses(model: IntactModel, windows: Windows, rows: slice) -> Tensor:
    """NLL of every counted target of some windows, in nats: (B, T − 1) float32. Raises UserError for what is none."""
    device = input_embeddings(model.model).device
    fed = windows.fed[rows].to(device)
    ids = fed
    if not windows.intact and len(windows.lead):
        ids = torch.cat([windows.lead.to(device).expand(len(fed), -1), fed], dim=1)
    decoder, head = decoder_and_head(model.model)
    cache = model.new_cache(single_pass=True)
    output = model.feed(ids, through=decoder, cache=cache)
    model.count(cache)
    what = f"losses of {model.name}, by window from {rows.start or 0} on and token"
    targets = fed[:, 1:]
    if head is None:
        logits = output.logits[:, -fed.shape[1] : -1].float()
        found = nn.functional.cross_entropy(logits.transpose(1, 2), targets.to(logits.device), reduction="none")
        return finite(found, what)
    hidden = output.last_hidden_state[:, -fed.shape[1] : -1].flatten(0, 1)
    flat = targets.flatten()
    at_once = max(1, LOGITS_AT_ONCE // head.out_features)
    losses = []
    for i in range(0, len(flat), at_once):
        logits = head(hidden[i : i + at_once]).float()
        losses.append(nn.functional.cross_entropy(logits, flat[i : i + at_once].to(logits.device), reduction="none"))
    return finite(torch.cat(losses).view_as(targets), what)


def window_losses(
    model: IntactModel,
    windows: Windows,
    *,
    batch_size: int,
    mine: range | None = None,
    report: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Mean NLL of every window: (W,) float64.

    mine: starts of the batches that this process computes, all by default; the rest stays 0 (several GPUs add up
    their shares). report(windows done, their perplexity) is called after each batch.
    """
    losses = torch.zeros(len(windows.fed), dtype=torch.float64)
    done = torch.zeros(len(losses), dtype=torch.bool)
    for start in mine if mine is not None else range(0, len(losses), batch_size):
        rows = slice(start, min(start + batch_size, len(losses)))
        losses[rows] = token_losses(model, windows, rows).double().mean(dim=1).cpu()
        done[rows] = True
        if report is not None:
            report(rows.stop - rows.start, float(losses[done].mean().exp()))
    return losses
