"""PrefixQuant's discovery of a prefix (Chen et al. 2024, arXiv 2410.05265, section 4): which tokens to keep in front.

    1. o = ceil(max over layers of the mean number of outlier tokens per sequence), position 0 included
    2. outlier tokens of all sequences and layers are counted by id, position 0 apart
    3. a single id that fewer than a tenth of the sequences show is chance: it is dropped, and o is one less
    4. prefix = the o most frequent ids, then [BOS]

The text runs behind nothing: random pieces, whose first token is whatever stands there, so what is an outlier is one
for what it says, not for where it stands. Runs on the full-precision model; an exact transform of the residual stream
does not change the input of the feed-forward part's last linear, where it looks, so one discovery serves every recipe.
Departs from the published code: a model without outlier tokens gets [BOS] alone (theirs stops); a [BOS] among the ids
found is not put there twice; of ids with equal counts the smaller goes first (there: the one seen first).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.observe import Site, down_input, token_maxima
from intactkv.pivots import OUTLIER_RATIO, OutlierTokens, outlier_ratios, outlier_tokens
from intactkv.prefix import Prefix

__all__ = ["Discovery", "check_threshold", "chosen_tokens", "discover", "down_maxima", "largest_ratios"]

CHANCE = 0.1  # of the sequences; a single id that is rarer is dropped (step 3)
TOKENS_AT_ONCE = 2048  # of one pass


@dataclass(frozen=True)
class Discovery:
    """What was found. prefix: the tokens to keep in front, [BOS] last. outliers: the counts behind it.
    ratios: per layer the largest M_t / median_t(M) of any token, without a prefix."""

    prefix: tuple[int, ...]
    outliers: OutlierTokens
    ratios: tuple[float, ...]


def discover(
    model: PreTrainedModel,
    ids: Tensor,
    start: int,
    *,
    threshold: float = OUTLIER_RATIO,
    linear: str | None = None,
    advance: Callable[[int], Any] = lambda rows: None,
) -> Discovery:
    """Find the prefix of a full-precision model.

    ids: (N, T) pieces of text as they stand, without [BOS]. start: [BOS], or the token that a text starts with where a
    tokenizer has none. threshold: η. linear: dotted name within a block; by default the feed-forward part's last.
    advance: told how many sequences are done.
    Raises UserError for a threshold that no ratio to a median means, or an unknown linear.
    """
    check_threshold(threshold)
    maxima = down_maxima(model, ids, linear=linear, advance=advance)
    found = outlier_tokens(maxima, ids, threshold)
    return Discovery(chosen_tokens(found, len(ids), start), found, largest_ratios(maxima))


def check_threshold(threshold: float) -> None:
    """Raise UserError for what is no outlier's ratio to the median."""
    if not 1 < threshold < math.inf:
        raise UserError(
            f"outlier threshold {threshold:g}: a ratio to the median is a number above 1; PrefixQuant's is 64"
        )


def chosen_tokens(found: OutlierTokens, sequences: int, start: int) -> tuple[int, ...]:
    """Steps 3 and 4 above: the tokens of the prefix, at least [BOS] (`start`)."""
    number, ids = found.number, list(found.ids)
    if len(ids) == 1 and found.ids[ids[0]] < CHANCE * sequences:
        number, ids = number - 1, []
    return (*(token for token in ids[:number] if token != start), start)


def down_maxima(
    model: PreTrainedModel,
    ids: Tensor,
    prefix: Prefix | None = None,
    *,
    linear: str | None = None,
    advance: Callable[[int], Any] = lambda rows: None,
) -> Tensor:
    """M_t = max_c |X_tc| of every token behind the prefix, X the input of `linear`: (L, N, T) float32.

    In front of an online rotation, where a rotated twin has one. ids: (N, T), without the prefix. A few sequences run
    at once, and of their activations only the maxima are kept.
    Raises UserError if a block has no such linear, or a value is not finite.
    """
    names = architecture_of(model.config)
    linear = linear or names.down
    site = (
        Site("down", f"inputs of {linear}", linear, output=False, first=True)
        if linear
        else replace(down_input(names), name="down", first=True)
    )
    at_once = max(1, TOKENS_AT_ONCE // ids.shape[1])
    return token_maxima(attach(model, prefix), ids, (site,), batch_size=at_once, advance=advance)[site.name]


def largest_ratios(maxima: Tensor) -> tuple[float, ...]:
    """Per layer, the largest M_t / median_t(M) of any token of any sequence; maxima: (L, N, T)."""
    return tuple(outlier_ratios(maxima).amax(dim=(1, 2)).tolist())
