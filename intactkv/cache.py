"""One KV cache for every quantizer: `[intact prefix | what the policy keeps of the new tokens]`.

A transformers `Cache` whose layers start with the full-precision keys and values of the prefix and hand every new token
to the store of a KV policy (`intactkv.store`), so attention already reads quantized values where the policy says so.
Models need no patch: they call `update` as always. What attention must know besides the tensors (`Read`) travels with
the keys, to the attention function of `intactkv.attention`.

The prefix has batch 1 and is shared by all sequences; it is never written to, and every call gets a fresh cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from corpora.errors import UserError
from intactkv.attention import Read
from intactkv.copies import Copies
from intactkv.policy import KVPolicy
from intactkv.rope import Places, Rope, ropes_of
from intactkv.rows import Rows
from intactkv.store import Exact, Memory, Store

__all__ = ["IntactCache", "KVPolicy"]

Prefix = tuple[Tensor, Tensor] | None


class _Intact(CacheLayerMixin):
    """What layers behind a prefix share. prefix: K and V, each (1, KV heads, P, D). copies: of it, by layer."""

    copies: Copies | None = None
    index = 0

    def _start(self, prefix: Prefix, store: Store, rows: Rows, rope: Rope | None, single_pass: bool) -> None:
        self.prefix, self.store, self.rows, self.rope = prefix, store, rows, rope
        self.prefix_length = 0 if prefix is None else prefix[0].shape[-2]
        self.single_pass = single_pass
        self.passed_tokens = 0
        self.unread: Read | None = None
        store.begin(prefix, self._places)

    def _near(self, like: Tensor) -> Prefix:
        return self.prefix and (self.copies or Copies()).near(self.index, self.prefix, like)

    def _places(self, first: int, last: int) -> Places:
        length = self.prefix_length
        return Places(first + length, last - first, self.rows.pads, self.rope)

    def _handed(self, keys: Tensor, read: Read) -> None:
        """Let the keys bring `read` to attention. Raises RuntimeError where the last pass's never arrived."""
        self.check_read()
        keys.__dict__["intactkv_read"] = read
        if read.needed:
            self.unread = read

    def check_read(self) -> None:
        """Raise RuntimeError if attention has not looked at all that it was handed."""
        if self.unread is not None and not self.unread.taken:
            raise RuntimeError(
                "this KV policy needs the attention function of intactkv.attention, and another one ran; run the model "
                "through intactkv.attach.attach"
            )
        self.unread = None

    @property
    def tokens_behind(self) -> int:
        """Tokens that followed the prefix, held or passed."""
        return self.passed_tokens if self.single_pass else self.get_seq_length() - self.prefix_length

    def _single(self, count: int) -> None:
        if self.passed_tokens:
            raise RuntimeError("this cache was made for a single pass and holds nothing of the first one")
        self.passed_tokens = count

    def _refuse_crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:  # a length, to transformers 5.17
            raise ValueError(
                f"crop({tokens_to_remove}): a positive count is not supported; give minus the tokens to forget"
            )
        if -tokens_to_remove > self.tokens_behind:
            raise ValueError(
                f"crop({tokens_to_remove}) would cut into the intact prefix: only {self.tokens_behind} tokens follow it"
            )


class IntactLayer(_Intact, DynamicLayer):
    """A full-attention layer's cache that starts with the prefix. What it holds is in its store."""

    def __init__(self, prefix: Prefix, store: Store, rows: Rows, rope: Rope | None = None, single_pass: bool = False):
        super().__init__()
        self._start(prefix, store, rows, rope, single_pass)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The prefix comes to where the states are; the store begins with the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.store.begin(self._near(key_states), self._places)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Give the store the new keys and values; return what attention reads of all, the prefix first."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.single_pass:
            self._single(key_states.shape[-2])
        direct = not self.single_pass and self.store.answers(key_states)  # a single pass leaves nothing to ask
        (keys, values), forms = self.store.append(key_states, value_states, decode=not direct)
        if keys is key_states:
            keys = keys.view_as(keys)  # the model's own tensor shall not carry anything
        self._handed(keys, Read(self.prefix_length, *forms, store=self.store if direct else None))
        if self.single_pass:
            for side in self.store.sides:
                side.forget()
        return keys, values

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """K and V as the next query will see them, each (batch, KV heads, tokens, D); only after the first update."""
        for side in self.store.sides:
            side.settle()
        return self.store.states()

    def get_seq_length(self) -> int:
        """Tokens held, the prefix included, also before the first tokens arrive."""
        return self.prefix_length + self.store.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the next pass will see, and the first one's index."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last −tokens_to_remove tokens. Refuses positive ones, to cut into the prefix, and what the store
        could not do exactly (ValueError)."""
        self._refuse_crop(tokens_to_remove)
        if tokens_to_remove and self.is_initialized:
            self.store.crop(self.store.length + tokens_to_remove)

    def edit(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Edit the batch; nothing to do while only the shared prefix is held."""
        for side in self.store.sides:
            side.select(rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the sequences for beam search."""
        self.edit(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.edit(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self.edit(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        """Back to the prefix alone."""
        super().reset()
        self.store.begin(self.prefix, self._places)
        self.passed_tokens = 0


class IntactSlidingLayer(_Intact, DynamicSlidingWindowLayer):
    """The same for a sliding-window layer: the prefix leaves the window when the text has outgrown it, as in full
    precision. Its tokens are numbers in transformers' own layer, rounded on their way in."""

    def __init__(self, prefix: Prefix, store: Store, rows: Rows, rope: Rope | None, single_pass: bool, window: int):
        super().__init__(window)
        self._start(prefix, store, rows, rope, single_pass)
        self.cumulative_length = self.prefix_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with the prefix, one view per sequence of the batch, in the dtype and on the device of the states."""
        super().lazy_initialization(key_states, value_states)
        if (prefix := self._near(key_states)) is not None:
            batch = key_states.shape[0]
            self.keys, self.values = (x.expand(batch, -1, -1, -1) for x in prefix)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, rounded; return what attention reads, the prefix first while it is there."""
        if self.single_pass:
            self._single(key_states.shape[-2])
        before = self.cumulative_length
        new = (side.passed(x) for side, x in zip(self.store.sides, (key_states, value_states), strict=True))
        keys, values = super().update(*new, *args, **kwargs)
        left = before + key_states.shape[-2] - keys.shape[-2]  # tokens that the window has left behind
        self._handed(keys, Read(max(0, self.prefix_length - left)))
        if self.single_pass:
            self.keys = self.values = None
            self.is_initialized, self.cumulative_length = False, self.prefix_length
        return keys, values

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """K and V of all tokens held, each (batch, KV heads, tokens, D); only after the first update."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens seen, the prefix included."""
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget tokens; nothing to forget before the first ones arrive (transformers would fail)."""
        self._refuse_crop(tokens_to_remove)
        if self.is_initialized:
            super().crop(tokens_to_remove)
            for side in self.store.sides:
                side.length = self.tokens_behind
                side.read, side.pairs = (side.read, side.pairs) if side.length else (0, 0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the sequences for beam search; nothing to do while only the shared prefix is held."""
        if self.is_initialized:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence; the prefix needs no repeating before the first tokens arrive."""
        if self.is_initialized:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences; nothing to do while only the shared prefix is held."""
        if self.is_initialized:
            super().batch_select_indices(indices)

    def reset(self) -> None:
        """Back to the prefix alone."""
        # Dropped before transformers resets: some releases (5.17) zero in place what `update` has just returned.
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()
        self.store.begin(self.prefix, self._places)
        self.cumulative_length, self.passed_tokens = self.prefix_length, 0


class IntactCache(Cache):
    """The cache of one call: one layer per decoder layer of `config`, behind a prefix, under a KV policy.

    keys, values: of the prefix, `keys[l]` and `values[l]`, each (1, KV heads, P, D), keys after RoPE at positions
        0…P − 1. policy: None keeps full precision; one that calibrates comes with its tensors (`Bound`).
    single_pass: give every layer its K and V back and hold none, for a forward pass that nothing follows; a whole
        text's cache would cost more memory than its activations.
    copies: of the prefix where the model is; whoever makes many caches of one prefix keeps them.
    Raises UserError for layers that are no softmax attention over all or a window of the tokens, or share keys and
    values, and for windows that the policy cannot do.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        keys: Sequence[Tensor] = (),
        values: Sequence[Tensor] = (),
        policy: KVPolicy | None = None,
        single_pass: bool = False,
        copies: Copies | None = None,
    ):
        self.policy, self.rows, copies = policy, Rows(), copies or Copies()
        ropes = ropes_of(config) if policy is not None and policy.space == "pre_rope" else []
        # Which layer slides, and how far, is transformers' knowledge: ask its own cache.
        layers: list[IntactLayer | IntactSlidingLayer] = []
        for index, plain in enumerate(DynamicCache(config=config).layers):
            rope = ropes[index] if ropes else None
            prefix = (keys[index], values[index]) if len(keys) else None
            store = Store(Exact(), Exact()) if policy is None else policy.store(index, None)
            if type(plain) is DynamicSlidingWindowLayer:
                if store.waits or store.packed:
                    raise UserError(
                        f"layer {index} of this {config.model_type} model attends to a window of "
                        f"{plain.sliding_window} tokens, where a KV policy must round every token by itself and keep "
                        "numbers; choose one that does, such as --kv per_head, without packed storage"
                    )
                layers.append(IntactSlidingLayer(prefix, store, self.rows, rope, single_pass, plain.sliding_window))
            elif type(plain) is DynamicLayer:
                layers.append(IntactLayer(prefix, store, self.rows, rope, single_pass))
            else:
                raise UserError(
                    f"layer {index} of this {config.model_type} model keeps a {type(plain).__name__}; a "
                    "prefix needs layers of full or sliding-window attention with keys and values of their own"
                )
            layers[-1].copies, layers[-1].index = copies, index
        super().__init__(layers=list(layers))
        self.intact_layers = layers
        self.prefix_length = layers[0].prefix_length
        self._told = 0, 0
        # The token ids that a finished `generate` left here, (1, length): lets a dialogue go on safely.
        self.tokens: Tensor | None = None

    def same_kind(self, other: "IntactCache") -> bool:
        """Whether both stand behind the same prefix and quantize alike, whatever text they hold."""
        return (len(self), self.policy) == (len(other), other.policy) and all(
            len(ours.prefix or ()) == len(theirs.prefix or ())
            and all(x is y or torch.equal(x, y) for x, y in zip(ours.prefix or (), theirs.prefix or (), strict=True))
            for ours, theirs in zip(self.intact_layers, other.intact_layers, strict=True)
        )

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can always be exact, which assisted decoding relies on."""
        return all(layer.is_croppable and not layer.store.waits for layer in self.intact_layers)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the sequences for beam search."""
        super().reorder_cache(beam_idx)
        self.rows.edit(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        self.rows.edit(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        super().batch_select_indices(indices)
        self.rows.edit(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last −tokens_to_remove tokens of every layer. Raises ValueError where that cannot be exact."""
        now = self._reads()
        untold = now[0] - self._told[0], now[1] - self._told[1]
        super().crop(tokens_to_remove)
        self._edited(untold)

    def reset(self) -> None:
        """Back to the prefix alone."""
        super().reset()
        self._edited((0, 0))

    def _edited(self, untold: tuple[int, int]) -> None:
        """Tokens were forgotten. untold: what `reads` has not told yet, which it still will."""
        if not self.intact_layers[0].tokens_behind:
            self.rows.pads = None
        left = self._reads()
        self._told = left[0] - untold[0], left[1] - untold[1]

    def check_read(self) -> None:
        """Raise RuntimeError if attention has not looked at all that it was handed."""
        for layer in self.intact_layers:
            layer.check_read()

    def _reads(self) -> tuple[int, int]:
        self.check_read()
        sides = [side for layer in self.intact_layers for side in layer.store.sides]
        return sum(side.read for side in sides), sum(side.pairs for side in sides)

    def reads(self) -> tuple[int, int]:
        """Pairs of a query and a token that it saw rounded, and of all that it saw, since this was asked last."""
        before, self._told = self._told, self._reads()
        return max(0, self._told[0] - before[0]), max(0, self._told[1] - before[1])

    @property
    def rounded_share(self) -> float:
        """Share of what attention read behind the prefix that was rounded, in [0, 1]; 0 before it has read anything.

        Over all pairs of a query and a token that it may see, mean of keys and values. Raises RuntimeError if
        attention did not read what it was handed.
        """
        rounded, pairs = self._reads()
        return rounded / pairs if pairs else 0.0

    def memory(self) -> dict[str, Memory | int]:
        """Bytes held: `keys` and `values` behind the prefix, and of the `prefix`, which has batch 1; a sliding window's
        tokens count as codes where a policy rounds them, as if they were kept in it."""
        found: dict[str, Memory | int] = {}
        for index, name in enumerate(("keys", "values")):
            found[name] = sum((layer_memory(layer, index) for layer in self.intact_layers), Memory())
        found["prefix"] = sum(x.nbytes for layer in self.intact_layers for x in layer.prefix or ())
        return found

    @property
    def smallest_window(self) -> int | None:
        """The smallest sliding window among the layers, in tokens; None if every layer sees everything."""
        windows = [layer.sliding_window for layer in self.intact_layers if isinstance(layer, IntactSlidingLayer)]
        return min(windows) if windows else None


def layer_memory(layer: IntactLayer | IntactSlidingLayer, side: int) -> Memory:
    """Bytes of a layer's keys (0) or values (1)."""
    if isinstance(layer, IntactLayer):
        return layer.store.sides[side].memory()
    if not layer.is_initialized:
        return Memory()
    rounded = not isinstance(layer.store.roundings[side], Exact)
    held = layer.held[side]
    first = max(0, layer.prefix_length - (layer.cumulative_length - held.shape[2]))
    count = held[:, :, first:].numel()
    size = count * held.element_size()
    return Memory(size * rounded, size * (not rounded), count * rounded, count)
