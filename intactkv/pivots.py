"""Find pivot tokens: the few positions whose activations are hundreds of times larger than everybody else's.

Massive activations (Sun et al. 2024, 2402.17762): a value counts as massive if it exceeds 100 in magnitude and 1000
times the median magnitude of its layer's hidden state.
Outlier tokens (PrefixQuant, 2410.05265, section 4): M_t = max_c |X_tc| is a token's largest input of the
feed-forward part's last linear, and the token an outlier of that layer if M_t / median_t(M) > η. Position 0 is
reported apart: any first token attracts attention, so its identity says nothing. Computed in float32, where half
precision would overflow.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv.architecture import blocks_of
from intactkv.cache import IntactCache
from intactkv.finite import finite
from intactkv.observe import outputs_of
from intactkv.vocabulary import known_ids

__all__ = ["EPS", "MASSIVE", "MASSIVE_RATIO", "OUTLIER_RATIO", "Magnitudes", "OutlierTokens", "hidden_magnitudes",
           "outlier_ratios", "outlier_tokens"]  # fmt: skip

MASSIVE = 100.0  # smallest magnitude that counts (2402.17762, section 2)
MASSIVE_RATIO = 1000.0  # times the median magnitude of the layer
OUTLIER_RATIO = 64.0  # PrefixQuant's η
EPS = 1e-9  # smallest median that anything is divided by


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """Activation magnitudes of one text. largest: (L + 1, T), max over channels of |hidden state|, row 0 the
    embeddings, row l the output of block l. median: (L + 1,), over all tokens and channels."""

    largest: Tensor
    median: Tensor

    def pivots(self) -> list[int]:
        """Positions that hold a massive activation in any layer, in ascending order."""
        massive = (self.largest > MASSIVE) & (self.largest > MASSIVE_RATIO * self.median[:, None])
        return massive.any(dim=0).nonzero().flatten().tolist()


@torch.inference_mode()
def hidden_magnitudes(model: PreTrainedModel, ids: Tensor, cache: IntactCache | None = None) -> Magnitudes:
    """Run a model over (T,) ids and measure its residual stream.

    cache: holds a prefix that the ids follow (`IntactModel.new_cache`); its own tokens are not among the T measured.
    The last row is the output of the last block: transformers reports it after the final norm, which would hide the
    pivots. Raises UserError for numbers that are none.
    """
    with outputs_of(blocks_of(model)[-1:]) as last:
        output = model.base_model(
            input_ids=known_ids(ids, model)[None].to(model.device),
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
        )
    states = [*output.hidden_states[:-1], last[-1]]
    magnitudes = [state[0].float().abs().cpu() for state in states]
    largest = torch.stack([m.amax(dim=-1) for m in magnitudes])
    finite(largest, f"hidden states of {model.name_or_path or model.config.model_type}, by layer and token")
    return Magnitudes(largest, torch.stack([m.flatten().median() for m in magnitudes]))


def outlier_ratios(largest: Tensor) -> Tensor:
    """M_t / median_t(M), the lower of two medians: (…, T) token-wise maxima, any float dtype, to (…, T) float32."""
    largest = largest.float()
    return largest / largest.median(dim=-1, keepdim=True).values.clamp_min(EPS)


@dataclass(frozen=True)
class OutlierTokens:
    """PrefixQuant's outlier tokens of a set of sequences.

    number: o = ceil(max over layers of the mean count per sequence), position 0 included; 0 if there is none.
    first: how often position 0 is an outlier, over layers and sequences. ids: the same by token id for all others, the
    most frequent first (equally frequent ones in ascending order).
    """

    number: int
    first: int
    ids: dict[int, int]


def outlier_tokens(largest: Tensor, ids: Tensor, threshold: float = OUTLIER_RATIO, start: int = 0) -> OutlierTokens:
    """Which tokens are outliers, and how many a sequence has.

    largest: (L, N, T) token-wise maxima of L layers and N sequences. ids: (N, T). threshold: η. start: position of the
    first column: behind a prefix of P tokens it is P, and no column is left out as position 0.
    """
    outlier = outlier_ratios(largest) > threshold
    mean_count = outlier.sum(dim=-1).double().mean(dim=-1)  # (L,)
    others = outlier if start else outlier[..., 1:]
    counts = Counter(ids[:, -others.shape[-1] :].expand_as(others)[others].tolist() if others.shape[-1] else [])
    return OutlierTokens(
        number=int(mean_count.max().ceil()),
        first=0 if start else int(outlier[..., 0].sum()),
        ids=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
    )
