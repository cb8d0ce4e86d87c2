"""One KV cache for every quantizer: `[intact prefix | what the policy leaves of the new tokens]`.

A transformers `Cache` whose layers start with the full-precision keys and values of the prefix and pass every new
token through a KV policy before it is stored, so attention already reads quantized values for the current token
(IntactKV, section on KV-cache quantization). Models need no patch: they call `update` as always.

The prefix has batch 1 and is shared by all sequences; a layer expands it when the first tokens arrive. Concatenation
copies, so the prefix's own tensors are never written to, and every call gets a fresh cache.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from corpora.errors import UserError

__all__ = ["IntactCache", "KVPolicy", "LayerPolicy", "LayeredPolicy"]


class LayerPolicy(Protocol):
    """What happens to new keys and values on their way into the cache. Must not look at other tokens' future.

    A policy with tensors that can be trained has an attribute `differentiable`, true: gradients then go through what it
    computes. Through others they go as if nothing were rounded.
    """

    def keys(self, states: Tensor) -> Tensor:
        """New keys (batch, KV heads, tokens, D), after RoPE, to what attention shall read: same shape and dtype."""
        ...

    def values(self, states: Tensor) -> Tensor:
        """New values (batch, KV heads, tokens, D) to what attention shall read: same shape and dtype."""
        ...


@runtime_checkable
class LayeredPolicy(Protocol):
    """A KV policy that differs from layer to layer."""

    def at(self, layer: int) -> LayerPolicy:
        """The policy of one layer."""
        ...


KVPolicy = LayerPolicy | LayeredPolicy


def _straight_through(policy: LayerPolicy, states: Tensor, seen: Tensor) -> Tensor:
    """What attention shall read; a gradient passes rounding as if there were none, or as the policy itself says."""
    if getattr(policy, "differentiable", False) or not states.requires_grad:
        return seen
    return seen.detach() + (states - states.detach())  # in this order the value is `seen`, bit for bit


class IntactLayer(DynamicLayer):
    """A full-attention layer's cache that starts with the prefix. `prefix`: K and V, each (1, KV heads, P, D)."""

    def __init__(self, prefix: tuple[Tensor, Tensor] | None, policy: LayerPolicy | None, **sliding: Any):
        super().__init__(**sliding)
        self.prefix = prefix
        self.policy = policy
        self.prefix_length = 0 if prefix is None else prefix[0].shape[-2]
        self.quantized_tokens = 0
        self.single_pass = False
        self.passed_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with the prefix, one view per sequence of the batch, in the dtype and on the device of the states."""
        super().lazy_initialization(key_states, value_states)
        if self.prefix is not None:
            batch = key_states.shape[0]
            self.keys, self.values = (x.to(key_states).expand(batch, -1, -1, -1) for x in self.prefix)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, quantized by the policy; return all, the prefix first."""
        if self.policy is not None:
            key_states = _straight_through(self.policy, key_states, self.policy.keys(key_states))
            value_states = _straight_through(self.policy, value_states, self.policy.values(value_states))
            self.quantized_tokens += key_states.shape[-2]
        if not self.single_pass:
            return super().update(key_states, value_states, *args, **kwargs)
        if self.passed_tokens:
            raise RuntimeError("this cache was made for a single pass and holds nothing of the first one")
        states = key_states, value_states
        if self.prefix is not None:
            states = super().update(key_states, value_states, *args, **kwargs)
        quantized = self.quantized_tokens
        self.reset()
        self.passed_tokens, self.quantized_tokens = key_states.shape[-2], quantized
        return states

    @property
    def tokens_behind(self) -> int:
        """Tokens that followed the prefix, held or passed."""
        return self.passed_tokens if self.single_pass else self.get_seq_length() - self.prefix_length

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """K and V of all tokens held, each (batch, KV heads, tokens, D); only after the first update."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens held, the prefix included, also before the first tokens arrive."""
        return super().get_seq_length() if self.is_initialized else self.prefix_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last −tokens_to_remove tokens. Refuses positive ones, and to cut into the prefix (ValueError)."""
        if tokens_to_remove > 0:  # a length, to transformers 5.17
            raise ValueError(
                f"crop({tokens_to_remove}): a positive count is not supported; give minus the tokens to forget"
            )
        if -tokens_to_remove > self.tokens_behind:
            raise ValueError(
                f"crop({tokens_to_remove}) would cut into the intact prefix: only {self.tokens_behind} tokens follow it"
            )
        super().crop(tokens_to_remove)
        self.quantized_tokens = min(self.quantized_tokens, self.tokens_behind)

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
        self.quantized_tokens = self.passed_tokens = 0


class IntactSlidingLayer(IntactLayer, DynamicSlidingWindowLayer):
    """The same for a sliding-window layer: the prefix leaves the window when the text has outgrown it, as in full
    precision."""

    def __init__(self, prefix: tuple[Tensor, Tensor] | None, policy: LayerPolicy | None, sliding_window: int):
        super().__init__(prefix, policy, sliding_window=sliding_window)
        self.cumulative_length = self.prefix_length

    def get_seq_length(self) -> int:
        """Tokens seen, the prefix included."""
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget tokens; nothing to forget before the first ones arrive (transformers would fail)."""
        if self.is_initialized or tokens_to_remove:
            super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Back to the prefix alone."""
        super().reset()
        self.cumulative_length = self.prefix_length


class IntactCache(Cache):
    """The cache of one call: one layer per decoder layer of `config`, behind a prefix, under a KV policy.

    single_pass: give every layer its K and V back and hold none, for a forward pass that nothing follows; a whole
        text's cache would cost more memory than its activations.
    policy: one for all layers, or one that gives each its own.
    layers' prefix: `keys[l]` and `values[l]`, each (1, KV heads, P, D), keys after RoPE at positions 0…P − 1.
    Raises UserError for layers that are no softmax attention over all or a window of the tokens.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        keys: Sequence[Tensor] = (),
        values: Sequence[Tensor] = (),
        policy: KVPolicy | None = None,
        single_pass: bool = False,
    ):
        # Which layer slides, and how far, is transformers' knowledge: ask its own cache.
        layers: list[IntactLayer] = []
        for index, plain in enumerate(DynamicCache(config=config).layers):
            prefix = (keys[index], values[index]) if len(keys) else None
            own = policy.at(index) if isinstance(policy, LayeredPolicy) else policy
            if type(plain) is DynamicSlidingWindowLayer:
                layers.append(IntactSlidingLayer(prefix, own, plain.sliding_window))
            elif type(plain) is DynamicLayer:
                layers.append(IntactLayer(prefix, own))
            else:
                raise UserError(
                    f"layer {index} of this {config.model_type} model keeps a {type(plain).__name__}; a "
                    "prefix needs layers of full or sliding-window attention"
                )
        super().__init__(layers=list(layers))
        self.intact_layers = layers
        for layer in layers:
            layer.single_pass = single_pass
        self.prefix_length = layers[0].prefix_length
        # The token ids that a finished `generate` left here, (1, length): lets a dialogue go on safely.
        self.tokens: Tensor | None = None

    def same_kind(self, other: "IntactCache") -> bool:
        """Whether both stand behind the same prefix and quantize alike, whatever text they hold."""
        return len(self) == len(other) and all(
            ours.policy == theirs.policy
            and len(ours.prefix or ()) == len(theirs.prefix or ())
            and all(x is y or torch.equal(x, y) for x, y in zip(ours.prefix or (), theirs.prefix or (), strict=True))
            for ours, theirs in zip(self.intact_layers, other.intact_layers, strict=True)
        )

    @property
    def quantized_fraction(self) -> float:
        """Share of the tokens behind the prefix that went through the policy, in [0, 1]; 0 while there are none."""
        seen = sum(layer.tokens_behind for layer in self.intact_layers)
        return sum(layer.quantized_tokens for layer in self.intact_layers) / seen if seen else 0.0

    @property
    def smallest_window(self) -> int | None:
        """The smallest sliding window among the layers, in tokens; None if every layer sees everything."""
        windows = [layer.sliding_window for layer in self.intact_layers if isinstance(layer, IntactSlidingLayer)]
        return min(windows) if windows else None
