"""Run any causal language model behind an intact prefix: scoring, generation, batches, padding, dialogues.

    ids that start with the prefix lose it, the rest is fed at positions P, P + 1, … with the prefix as cache
    logits = [stored prefix logits | new logits], the last L_in columns        (IntactKV, arXiv 2403.01241, section 3)

Physical layout of a padded batch: [prefix | pads | text], attention mask [1…1 | 0…0 | 1…1], positions counted by the
mask. With `prefix=None` rows are run as they are, through the same code.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import decoder_of, heads_of, pads_shift
from intactkv.attention import asks, take_over
from intactkv.cache import IntactCache
from intactkv.finite import FiniteLogits, finite
from intactkv.policy import KVPolicy
from intactkv.prefix import Prefix, input_embeddings
from intactkv.rope import check_turns
from intactkv.rows import FedRows, Usage, left_padded, refuse_holes, to_columns
from intactkv.store import Store
from intactkv.vocabulary import known_ids

__all__ = ["IntactModel", "attach", "default_batch_size"]

DEFAULT_NEW_TOKENS = 20  # what transformers appends when nobody says how many
# Tokens of a batch of sequences: 2048 fill a GPU (a published window is a batch of one); on a CPU 512 are as fast as
# any, and more only leave its caches.
TOKENS_AT_ONCE = {"cpu": 512, "cuda": 2048}
ASSISTANTS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")


def attach(model: PreTrainedModel, prefix: Prefix | None, kv: KVPolicy | None = None) -> "IntactModel":
    """Put an intact prefix in front of a model, and a KV policy on its cache; both are optional.

    kv: one that calibrates comes with its tensors (`intactkv.policy.Bound`), which also says what is kept. The
    model's attention runs through `intactkv.attention` from now on; else it is not changed. Raises UserError if the
    prefix belongs to another model or another basis.
    """
    if kv is not None and kv.calibrates:
        raise UserError(f"{kv} needs the tensors that it was calibrated to; see python -m quantization kv")
    exported = getattr(model.config, "intactkv", None) or {}
    needed = getattr(model, "intactkv_needs_prefix", exported.get("needs_prefix"))
    if needed is not None and (prefix is None or prefix.ids.tolist() != needed):
        raise UserError(
            f"this model was calibrated behind a prefix of {len(needed)} tokens and is refused without it, because the "
            "pivots' own error grew; attach that prefix"
        )
    trained = getattr(model, "intactkv_needs_kv", exported.get("needs_kv"))
    if trained is not None and (prefix is None or prefix.digest() != trained):
        raise UserError(
            "this model was calibrated behind a trained prefix, and the given one has other keys and values for its "
            "tokens; attach that prefix"
        )
    if prefix is not None:
        prefix.check(model)
    return IntactModel(model, prefix, kv)


def default_batch_size(window: int, device_type: str) -> int:
    """Sequences per forward pass: as many as make about `TOKENS_AT_ONCE` tokens, at least one."""
    return max(1, TOKENS_AT_ONCE[device_type] // window)


@dataclass(frozen=True, eq=False)
class IntactModel:
    """A causal LM behind a prefix. Made by `attach`; `model` stays usable on its own. usage: of passes that `count`."""

    model: PreTrainedModel
    prefix: Prefix | None
    kv: KVPolicy | None = None
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        take_over(self.model, needed=self.waits or any(store.direct is not None for store in self._stores()))

    @cached_property
    def waits(self) -> bool:
        """Whether the KV policy keeps the newest tokens exact for a while."""
        return any(store.waits for store in self._stores())

    @cached_property
    def _first_exact(self) -> bool:
        return any(r.exact_first(self.prefix_length) for store in self._stores() for r in store.roundings)

    def count(self, cache: IntactCache) -> None:
        """Add what attention read of a cache, once. Raises RuntimeError if a policy that rounds every token at once has
        rounded none: then the model does not use the cache."""
        rounded, pairs = cache.reads()
        if self.kv is not None and not rounded and not self.waits and not self._first_exact:
            raise RuntimeError(f"{self.kv} was asked for, but no token of the cache went through it")
        self.usage.rounded += rounded
        self.usage.pairs += pairs

    def kv_figures(self, tokens: int) -> dict[str, Any] | None:
        """What a record says of the KV cache: the share rounded of what attention read (`usage`), and the bits of an
        element of keys and of values in packed storage once so many tokens are held. None for full precision."""
        if self.kv is None:
            return None
        heads, size = heads_of(self.model.config)
        bits = self.kv.behind(self.prefix_length).bits_per_element(tokens, size, heads)
        return {"rounded": self.usage.share, "bits_per_element": list(bits), "tokens": tokens}

    def _stores(self) -> list[Store]:
        return [layer.store for layer in self.new_cache().intact_layers]

    @property
    def prefix_length(self) -> int:
        """P, the number of prefix tokens; 0 without a prefix."""
        return 0 if self.prefix is None else len(self.prefix)

    @property
    def name(self) -> str:
        """What messages call the model: where it came from, or its type."""
        return self.model.name_or_path or f"the {self.model.config.model_type} model"

    @property
    def pads_shift(self) -> bool:
        """Whether this model runs its rows without pads: those of one length share a batch."""
        return pads_shift(self.model.config, self.prefix is not None) or self._groups_tokens

    @cached_property
    def _groups_tokens(self) -> bool:
        return any(rounding.block > 1 for store in self._stores() for rounding in store.roundings)

    def new_cache(self, single_pass: bool = False) -> IntactCache:
        """A fresh cache that holds the prefix and applies the KV policy; `single_pass` if one pass is all it is for."""
        if self.prefix is None:
            cache = IntactCache(self.model.config, policy=self.kv, single_pass=single_pass)
        else:
            cache = self.prefix.cache(self.model.config, self.kv, single_pass)
        if not asks(type(self.model)):
            for layer in cache.intact_layers:
                layer.store.direct = None  # codes are decoded for attention of its own code
        return cache

    def feed(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        through: torch.nn.Module | None = None,
        cache: IntactCache | None = None,
    ) -> Any:
        """One forward pass over tokens that follow the prefix; returns the module's own output.

        ids: (B, T), without the prefix. mask: 0 at padding, or None; (B, T), or longer where the cache holds earlier
        tokens: it covers everything behind the prefix. through: a part of the model that takes the same arguments,
        such as its decoder without the head; the whole model by default. cache: one made by `new_cache`, for a caller
        that wants to look at it afterwards, or to feed a text in several calls; by default nothing is kept.
        """
        cache = self.new_cache(single_pass=True) if cache is None else cache
        if self.prefix is not None:
            check_turns(self.model.config, cache.get_seq_length() + ids.shape[1])
        full, positions, held = None, None, cache.get_seq_length() - self.prefix_length
        if not held:
            cache.rows.pads = None
        elif mask is None and cache.rows.pads is not None:  # those of earlier calls are still there
            columns = torch.arange(held + ids.shape[1], device=cache.rows.pads.device)
            mask = (columns >= cache.rows.pads[:, None]).long().to(ids.device)
        if mask is not None and not bool(mask.all()):
            full = torch.cat([mask.new_ones(mask.shape[0], self.prefix_length), mask], dim=1)
            if full.shape[1] != cache.get_seq_length() + ids.shape[1]:
                raise UserError(
                    f"mask has {mask.shape[1]} columns; expected one for each of the "
                    f"{cache.get_seq_length() + ids.shape[1] - self.prefix_length} tokens behind the prefix"
                )
            if self.pads_shift:
                raise UserError(self._no_pads())
            # Default positions count physical slots; with pads between prefix and text they would be wrong for RoPE.
            positions = (full.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            cache.rows.pads = (mask == 0).sum(dim=1)
        arguments: dict[str, Any] = {"attention_mask": full, "use_cache": True}
        if positions is not None:
            arguments["position_ids"] = positions
        output = (through or self.model)(input_ids=known_ids(ids, self.model), past_key_values=cache, **arguments)
        cache.check_read()
        return output

    def score(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits for every column of `input_ids`: (B, L, vocabulary), float32.

        Rows that start with the prefix ids lose them, and their first columns are the stored full-precision logits.
        Rows without it get the prefix in front (their own [BOS] is dropped when the prefix brings one). Rows may be
        padded on the left or on the right; logits at pads are 0.
        Raises UserError if only some rows contain the prefix, or if nothing is left to feed.
        """
        rows = self._take_apart(input_ids, attention_mask)
        self._refuse_pushed_out(rows, 0)
        logits = self._logits(rows)
        own = None if self.prefix is None else self.prefix.logits.to(logits)
        logits = to_columns(logits, rows, own, input_ids, attention_mask)
        finite(logits.amax(dim=-1), f"logits of {self.name}, by row and column")
        return logits

    def _logits(self, rows: FedRows) -> Tensor:
        """Logits of the fed columns, (B, T, V) float32; what stands at pads means nothing."""
        if not (self.pads_shift and bool(rows.pads.any())):
            return self.feed(rows.feed, rows.mask).logits.float()
        logits = torch.empty(0)
        for pads in rows.pads.unique().tolist():
            alike = rows.pads == pads
            part = self.feed(rows.feed[alike, pads:]).logits.float()
            if not len(logits):  # the fewest pads come first
                logits = part.new_zeros(*rows.feed.shape, part.shape[-1])
            logits[alike, pads:] = part
        return logits

    def _no_pads(self) -> str:
        return (
            f"a {self.model.config.model_type} model places tokens by their slot in the batch, so pads would shift "
            "them; give it rows of equal length, or a batch of one"
        )

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prepend: bool = False,
        past_key_values: IntactCache | None = None,
        **options: Any,
    ) -> Any:
        """`model.generate` behind the prefix: greedy, sampling, beams; returns [prompt | new tokens] like it.

        input_ids: (B, L) prompts, each starting with the prefix ids (after left padding); attention_mask: (B, L).
        prepend: put the prefix in front of prompts that lack it (the returned rows lack it, too).
        past_key_values: the cache of an earlier answer (`return_dict_in_generate=True`), to go on with a dialogue
            without feeding it again; the prompt must start with the tokens which that cache has seen.
        Raises UserError for prompts without the prefix, a prompt that equals the prefix (nothing to feed), a mixed
        batch, a cache of another dialogue, padding that would push the prefix out of a sliding window, any padding for
        a model that places tokens by their slots, or more tokens than whose keys the model turns alike.
        """
        self._refuse_options(options)
        rows = self._take_apart(input_ids, attention_mask)
        if self.prefix is not None and not rows.had_prefix and not prepend:
            raise UserError(
                "the prompt does not start with the prefix's tokens; put them in front, or pass "
                "prepend=True to have that done"
            )
        self._refuse_pushed_out(rows, self._new_tokens(options, self.prefix_length + rows.feed.shape[1]))
        if self.pads_shift and bool(rows.pads.any()):
            raise UserError(self._no_pads())

        if self.prefix is not None or self.kv is not None:
            slots = self.prefix_length + rows.feed.shape[1]
            check_turns(self.model.config, slots + self._new_tokens(options, slots))

        batch = rows.feed.shape[0]
        lead = rows.feed.new_empty(batch, 0)
        if self.prefix is not None:
            lead = self.prefix.ids.to(rows.feed)[None].expand(batch, -1)
        ids = torch.cat([lead, known_ids(rows.feed, self.model)], dim=1)
        mask = torch.cat([torch.ones_like(lead), rows.mask], dim=1)
        cache = self.new_cache() if past_key_values is None else self._continued(past_key_values, ids)
        cache.tokens = None  # until it is known what an answer that may be interrupted leaves here
        if chunk := self._option(options, "prefill_chunk_size"):
            # Fed here: transformers 5.17 would feed what the cache holds once more.
            held = cache.get_seq_length() - self.prefix_length
            with torch.no_grad():
                for end in range(held + chunk, rows.feed.shape[1], chunk):
                    part = rows.feed[:, end - chunk : end]
                    self.feed(part, rows.mask[:, :end], through=decoder_of(self.model), cache=cache)
            options["prefill_chunk_size"] = None
        cache.rows.pads = rows.pads if bool(rows.pads.any()) else None
        repeats = max(self._option(options, "num_beams") or 1, self._option(options, "num_return_sequences") or 1)
        cache.batch_repeat_interleave(repeats)
        given = options.pop("logits_processor", None) or ()
        processors = LogitsProcessorList([FiniteLogits(self.name), *given])
        generate: Any = self.model.generate
        output = generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, logits_processor=processors,
            **{"use_cache": True, **options},
        )  # fmt: skip

        sequences = output if isinstance(output, Tensor) else output.sequences
        self.count(cache)
        if batch * repeats == 1:  # beams leave their last state, not the sequence that won
            cache.tokens = sequences[:, : cache.get_seq_length()]
        given = input_ids.to(sequences).repeat_interleave(sequences.shape[0] // batch, dim=0)
        if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):  # right padding moved left
            given = left_padded(input_ids, attention_mask)[0].to(sequences)
            given = given.repeat_interleave(sequences.shape[0] // batch, dim=0)
        sequences = torch.cat([given, sequences[:, ids.shape[1] :]], dim=1)
        if isinstance(output, Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _take_apart(self, input_ids: Tensor, attention_mask: Tensor | None) -> FedRows:
        """Find the prefix in every row and lay the rest out behind it, padded on the left."""
        if input_ids.ndim != 2:
            raise UserError(f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, tokens)")
        device = input_embeddings(self.model).device
        input_ids = input_ids.to(device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
        texts = [row[keep.bool()] for row, keep in zip(input_ids, mask, strict=True)]
        refuse_holes(mask)
        had_prefix, dropped = True, [0] * len(texts)
        if self.prefix is not None:
            lead = self.prefix.ids.to(device)
            has = [bool(text.numel() >= lead.numel() and (text[: lead.numel()] == lead).all()) for text in texts]
            if any(has) != all(has):
                raise UserError(
                    f"{sum(has)} of {len(has)} rows of the batch start with the prefix; split the batch so "
                    "that all rows do or none does"
                )
            had_prefix = all(has)
            # Whoever brings the prefix brings its [BOS]: a row's own one would be the second.
            start = self._start_token()
            dropped = [
                lead.numel() if h else int(text.numel() > 0 and int(text[0]) == start)
                for h, text in zip(has, texts, strict=True)
            ]
        texts = [text[count:] for text, count in zip(texts, dropped, strict=True)]
        if any(text.numel() == 0 for text in texts):
            raise UserError(
                "a prompt equals the prefix (or is empty), which leaves no token to feed; give at least "
                "one token after the prefix"
            )
        longest = max(text.numel() for text in texts)
        pads = torch.tensor([longest - text.numel() for text in texts], device=device)
        # Any id will do that the embedding has, which a configuration's pad_token_id may not be.
        feed = torch.stack(
            [torch.nn.functional.pad(text, (int(pad), 0)) for text, pad in zip(texts, pads, strict=True)]
        )
        columns = torch.arange(longest, device=device)
        return FedRows(feed, (columns >= pads[:, None]).long(), pads, had_prefix, dropped)

    def _start_token(self) -> int:
        """The prefix's [BOS]: its first token, or its last one where only that is one of the model's special tokens, as
        in the prefixes that PrefixQuant discovers."""
        assert self.prefix is not None
        special: set[Any] = set()
        for config in (self.model.config, self.model.generation_config):
            for ids in (getattr(config, "bos_token_id", None), getattr(config, "eos_token_id", None)):
                special.update(ids if isinstance(ids, list) else [ids])
        first, last = int(self.prefix.ids[0]), int(self.prefix.ids[-1])
        return last if last in special and first not in special else first

    def _option(self, options: dict[str, Any], name: str) -> Any:
        """An option as `generate` will read it: passed itself, in a given configuration, or the model's own."""
        given = options.get("generation_config")
        values = (options.get(name), getattr(given, name, None), getattr(self.model.generation_config, name, None))
        return next((value for value in values if value is not None), None)

    def _new_tokens(self, options: dict[str, Any], fed: int) -> int:
        """How many tokens `generate` will append at most, `fed` being the prompt's length with prefix and pads."""
        if (count := self._option(options, "max_new_tokens")) is not None:
            return count
        length = self._option(options, "max_length")
        return DEFAULT_NEW_TOKENS if length is None else max(length - fed, 0)

    def _refuse_options(self, options: dict[str, Any]) -> None:
        """Refuse what transformers does not combine, or combines wrongly and silently, with tokens in the cache."""
        if self._option(options, "cache_implementation") is not None:
            raise UserError("cache_implementation cannot be combined with a prefix: the prefix is the cache")
        given = options.get("use_cache", getattr(options.get("generation_config"), "use_cache", None))
        if given is False:
            raise UserError("use_cache=False cannot be combined with a prefix: the prefix is in the cache")
        for name in ASSISTANTS:
            if self.waits and self._option(options, name):
                raise UserError(
                    f"{name} cannot be combined with a KV policy that keeps its newest tokens exact: it takes tokens "
                    "back, and what is rounded stays so; choose another policy, such as --kv per_head"
                )
            if self.prefix is not None and self._option(options, name):
                raise UserError(
                    f"{name} cannot be combined with a prefix: assisted decoding starts with an empty cache"
                )

    def _refuse_pushed_out(self, rows: FedRows, new_tokens: int) -> None:
        """A sliding window counts physical slots: pads behind the prefix would push it out too early."""
        if self.prefix is None:
            return  # pads in front of everything shift nothing
        window = self.new_cache().smallest_window
        slots = self.prefix_length + rows.feed.shape[1] + new_tokens
        if window is not None and bool(rows.pads.any()) and slots > window:
            raise UserError(
                f"a padded batch of {slots} slots does not fit the model's sliding window of {window}: the "
                "pads would push the prefix out; use rows of equal length or a batch of one"
            )

    def _continued(self, cache: IntactCache, ids: Tensor) -> IntactCache:
        """Check that a kept cache holds the beginning of this prompt, behind the same prefix, quantized alike."""
        seen = cache.tokens if isinstance(cache, IntactCache) and cache.same_kind(self.new_cache()) else None
        seen = ids if seen is None else seen[:, : cache.get_seq_length()]  # a cropped cache has forgotten the last
        if ids.shape[0] != 1 or seen.shape[1] >= ids.shape[1] or not torch.equal(seen, ids[:, : seen.shape[1]]):
            raise UserError(
                "past_key_values does not hold the beginning of this prompt; pass the cache of the answer "
                "that the prompt continues (batch of one), or leave it out to feed the dialogue again"
            )
        return cache
