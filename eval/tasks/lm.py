"""A model behind an intact prefix as lm-eval's harness sees it: one wrapper for scores, rolling texts and generation.

Every row that the model reads is `lead + text`. The lead is the prefix, or [BOS] where there is none; it is put there
in one place, and a text's own [BOS] gives way to it. With an intact prefix the lead's keys and values come from the
cache; in the vanilla arm the model computes them. Both arms see the same tokens.

Departs from lm-eval's HFLM: a row that is too long for the context loses tokens *behind* the lead, not the lead
(without it the prefix would be missed), and is counted; [BOS] is there also for tokenizers that add none; of the logits
only those of the continuations are computed.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from corpora.errors import UserError
from corpora.tokens import encode, start_token_id
from eval.generation import Generation
from eval.tasks.scoring import score_continuations
from intactkv.attach import IntactModel

__all__ = ["IntactLM", "Request"]

# A request of lm-eval: its texts (None for a piece of a rolling text), ids of the context, ids of the continuation.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class IntactLM(HFLM):
    """lm-eval's view of a model, a prefix and a KV policy.

    lead: ids that open every row; behind an intact prefix they must be the prefix's.
    generation: the model's own settings, the only ones that it generates by; None if it is to score alone.
    context: positions that the model has, the lead included.
    counts: what happened to the rows: `rows`, `behind_prefix`, `truncated` (too long for the context).
    """

    def __init__(
        self,
        model: IntactModel,
        tokenizer: PreTrainedTokenizerBase,
        lead: Sequence[int],
        *,
        batch_size: int,
        context: int,
        generation: Generation | None = None,
        accelerator: Any = None,
    ):
        if model.prefix is not None and model.prefix.ids.tolist() != list(lead):
            raise ValueError("the lead must be the prefix's own ids")
        if context <= len(lead) + 1:
            raise UserError(
                f"a context of {context} tokens has no room behind a prefix of {len(lead)}; use a shorter prefix"
            )
        super().__init__(
            pretrained=model.model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=context
        )
        self.intact, self.generation = model, generation
        if generation is not None:
            generation.rule(model.model)
        self.lead = list(lead)
        self.counts: Counter[str] = Counter()
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def behind_lead(self, ids: Sequence[int]) -> list[int]:
        """A row's ids with the lead in front, once; its own [BOS] gives way to one anywhere in the lead."""
        ids, start = list(ids), start_token_id(self.tokenizer)
        if not self.lead or ids[: len(self.lead)] == self.lead:
            return ids
        return self.lead + (ids[1:] if ids[:1] == [start] and start in self.lead else ids)

    def _shortened(self, ids: list[int], room: int) -> list[int]:
        """A row that starts with the lead, cut to `room` tokens behind the lead; counts what it cuts."""
        if len(ids) <= room:
            return ids
        self.counts["truncated"] += 1
        return self.lead + ids[len(ids) - (room - len(self.lead)) :]

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        """Ids of a text, the lead in front unless `add_special_tokens` is False."""
        ids = encode(self.tokenizer, string)
        ids = ids if add_special_tokens is False else self.behind_lead(ids)
        return self._shortened(ids, left_truncate_len) if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask of several texts, (B, L), padded on the left, the lead in front of each."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        self.counts["rows"] += len(rows)
        longest = max(len(row) for row in rows)
        assert self.generation is not None
        ids = torch.full((len(rows), longest), self.generation.pad)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, longest - len(row) :] = torch.tensor(row)
            mask[index, longest - len(row) :] = 1
        return ids, mask

    def score(self, requests: list[Request]) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of continuations that are given as ids."""
        return self._loglikelihood_tokens(requests)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of every continuation, in the order of the requests.

        Requests that read the same ids (the four letters behind one question) share a forward pass.
        """
        reads: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            row = self.behind_lead(context) + list(continuation)
            if len(continuation) > self.max_length - len(self.lead):
                raise UserError(
                    f"a continuation of {len(continuation)} tokens does not fit the context of {self.max_length}; this "
                    "task needs a model with a longer context"
                )
            reads.setdefault(tuple(row[:-1]), []).append(index)
        # Longest first: little padding, and what memory is needed shows early.
        order = sorted(reads, key=lambda row: (-len(row), row))
        size = override_bs or int(self.batch_size)
        results: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="scoring", unit="request", disable=disable_tqdm or self.rank > 0) as bar:
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                members = [reads[row] for row in rows]
                texts = [self._shortened(list(row), self.max_length) for row in rows]
                continuations = [[requests[index][2] for index in mine] for mine in members]
                for mine, answers in zip(members, score_continuations(self.intact, texts, continuations), strict=True):
                    for index, answer in zip(mine, answers, strict=True):
                        results[index] = answer.log_likelihood, answer.greedy
                        if requests[index][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
                    bar.update(len(mine))
                self.counts["rows"] += len(rows)
                self.counts["behind_prefix"] += len(rows) if self.intact.prefix is not None else 0
        return [results[index] for index in range(len(requests))]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of a continuation, given its context (of which there may be none)."""
        pairs: list[Request] = []
        for request in requests:
            context, continuation = request.args
            if context:
                pairs.append((request.args, *self._encode_pair(context, continuation)))
            else:
                ids = self.tok_encode(continuation, add_special_tokens=False)
                pairs.append((request.args, [self.prefix_token_id], ids))
        return self._loglikelihood_tokens(pairs, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that each stand behind the lead and predict every token once."""
        pieces: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows: Iterable[tuple[list[int], list[int]]] = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - len(self.lead),
                context_len=1,
            )
            for window in windows:
                context, continuation = make_disjoint_window(window)
                pieces.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(pieces, disable_tqdm), strict=True):
            totals[owner] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers by generation. Raises UserError where the answers alone would fill the model's context."""
        longest = max((int(request.args[1].get("max_gen_toks", self.max_gen_toks)) for request in requests), default=0)
        if longest >= self.max_length - len(self.lead):
            raise UserError(
                f"this task generates up to {longest} tokens, which do not fit the model's context of "
                f"{self.max_length}; take a model with a longer one"
            )
        return super().generate_until(requests, disable_tqdm)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Generate behind the prefix; greedy where the task names no temperature. (B, L) to (B, L + new tokens)."""
        pads = (options["attention_mask"] == 0).sum(dim=1).tolist()
        if self.intact.pads_shift and any(pads):
            return self._row_by_row(context, pads, max_length, stop, **options)
        temperature = options.pop("temperature", 0.0)
        sample = options.pop("do_sample", None)
        sample = temperature > 0 if sample is None else bool(sample)
        if sample:
            assert self.generation is not None
            options = self.generation.sampling() | options
            if temperature > 0:
                options["temperature"] = temperature
        self.counts["behind_prefix"] += len(context) if self.intact.prefix is not None else 0
        return self.intact.generate(
            context,
            options.pop("attention_mask"),
            max_length=max_length,
            do_sample=sample,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, context.shape[1], len(context)),
            **options,
        )

    def _row_by_row(self, context: Tensor, pads: list[int], max_length: int, stop: list[str], **options: Any) -> Tensor:
        """`_model_generate` for a model that stands no pads: each row alone, laid out as if they had shared a batch."""
        assert self.generation is not None
        options.pop("attention_mask")
        rows = []
        for row, count in zip(context, pads, strict=True):
            alone, mask = row[None, count:], torch.ones(1, len(row) - count, dtype=torch.long, device=row.device)
            answer = self._model_generate(alone, max_length - count, stop, attention_mask=mask, **options)[0]
            rows.append(torch.cat([row[:count], answer.to(row)]))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.generation.pad)
