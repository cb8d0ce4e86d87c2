"""What every score is made of: the hidden states of a batch, and the head applied to the positions that count.

The logits of a whole batch are never held: a vocabulary of 49,000 at 2,048 positions would take 400 MB in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv.architecture import ARCHITECTURES, architecture_of
from intactkv.attach import IntactModel
from intactkv.finite import finite
from intactkv.prefix import input_embeddings

__all__ = ["LOGITS_AT_ONCE", "Answer", "decoder_and_head", "score_continuations"]

# Values, 24 MB in float32 whatever the vocabulary: malloc maps blocks over 32 MB anew each time, page by page,
# and smaller ones were the faster by a few per cent where it was tried on a CPU (benchmarks.perplexity).
LOGITS_AT_ONCE = 6 * 2**20


def decoder_and_head(model: PreTrainedModel) -> tuple[nn.Module | None, nn.Linear | None]:
    """Decoder and head, to be called apart; (None, None) for a model that must be called whole: of a type whose logits
    are more than head(hidden), or one that another library keeps packed until the whole model is called."""
    if model.config.model_type not in ARCHITECTURES or getattr(model.config, "quantization_config", None) is not None:
        return None, None
    architecture = architecture_of(model.config)
    if not architecture.plain_logits:
        return None, None
    head = model.get_submodule(architecture.head)
    assert isinstance(head, nn.Linear)
    return model.get_submodule(architecture.decoder), head


@dataclass(frozen=True)
class Answer:
    """A continuation's log-likelihood in nats, and whether every token of it is the one the model would have chosen."""

    log_likelihood: float
    greedy: bool


@torch.inference_mode()
def score_continuations(
    model: IntactModel, texts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
) -> list[list[Answer]]:
    """log p(continuation | what stands before it) for a batch of texts, several continuations of each.

    texts: what is read, without the very last token of the continuation (nothing is predicted from it). Behind a
    prefix every text starts with the prefix's ids; they are taken off, and what the last of them predicts is the
    stored full-precision logits. continuations: per text the alternatives, as token ids; each ends one token behind
    the text, so the first of n tokens is predicted at the text's position −n.
    Texts are padded on the right, where causal attention needs no mask; where a KV policy lets queries see what the end
    of a pass leaves, those of one length share a pass. Raises UserError for numbers that are none.
    """
    lengths = sorted({len(text) for text in texts}, reverse=True)
    if len(lengths) > 1 and getattr(model.kv, "prefill", "exact") == "final":
        answered: dict[int, list[Answer]] = {}
        for length in lengths:
            these = [i for i, text in enumerate(texts) if len(text) == length]
            alike = score_continuations(model, [texts[i] for i in these], [continuations[i] for i in these])
            answered |= dict(zip(these, alike, strict=True))
        return [answered[i] for i in range(len(texts))]
    skipped = model.prefix_length
    device = input_embeddings(model.model).device
    ends = [len(text) - skipped for text in texts]  # positions that are fed
    counts = [max(len(tokens) for tokens in alternatives) for alternatives in continuations]  # predictions that count
    fed = torch.zeros(len(texts), max(1, *ends), dtype=torch.long)
    for row, text in enumerate(texts):
        fed[row, : ends[row]] = torch.tensor(text[skipped:], dtype=torch.long)
    decoder, head = decoder_and_head(model.model)
    cache = model.new_cache(single_pass=True)
    output = model.feed(fed.to(device), through=decoder, cache=cache)
    model.count(cache)
    states = output.logits if head is None else output.last_hidden_state
    counted = torch.cat(
        [states[row, max(0, end - n) : end] for row, (end, n) in enumerate(zip(ends, counts, strict=True))]
    )

    # One row of targets for every counted position: the alternatives' tokens there, 0 where one is shorter.
    width = max(len(alternatives) for alternatives in continuations)
    targets = [torch.zeros(n, width, dtype=torch.long) for n in counts]
    for mine, alternatives in zip(targets, continuations, strict=True):
        for column, tokens in enumerate(alternatives):
            mine[len(mine) - len(tokens) :, column] = torch.tensor(list(tokens), dtype=torch.long)
    from_prefix = [n > end for end, n in zip(ends, counts, strict=True)]  # the first prediction is the prefix's own
    best, chosen = _predictions(
        head, counted, torch.cat([t[int(p) :] for t, p in zip(targets, from_prefix, strict=True)])
    )

    answers, at = [], 0
    for mine, alternatives, first in zip(targets, continuations, from_prefix, strict=True):
        rows = slice(at, at + len(mine) - first)
        top, likelihood = best[rows], chosen[rows]
        at = rows.stop
        if first:
            assert model.prefix is not None
            logits = model.prefix.logits[-1:].float().cpu()
            top = torch.cat([logits.argmax(-1), top])
            likelihood = torch.cat([logits.log_softmax(-1).gather(1, mine[:1]), likelihood])
        finite(likelihood, f"log-likelihoods by {model.name}, by token and continuation")
        answers.append(
            [
                Answer(
                    float(likelihood[len(mine) - len(tokens) :, column].sum()),
                    bool((top == mine[:, column])[len(mine) - len(tokens) :].all()),
                )
                for column, tokens in enumerate(alternatives)
            ]
        )
    return answers


def _predictions(head: nn.Linear | None, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Likeliest token of every position, (N,), and log-likelihood of its targets, (N, K), on the CPU.

    states: (N, hidden), or (N, vocabulary) logits without a head. targets: (N, K) ids.
    """
    best, chosen = [], []
    at_once = max(1, LOGITS_AT_ONCE // (states.shape[-1] if head is None else head.out_features))
    for i in range(0, len(states), at_once):
        logits = (states[i : i + at_once] if head is None else head(states[i : i + at_once])).float()
        best.append(logits.argmax(-1).cpu())
        picked = logits.gather(1, targets[i : i + at_once].to(logits.device))
        chosen.append((picked - logits.logsumexp(-1, keepdim=True)).cpu())
    if not best:
        return targets.new_empty(0), torch.empty(0, targets.shape[1])
    return torch.cat(best), torch.cat(chosen)
