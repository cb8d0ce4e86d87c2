"""The model families that prefix tests run through, and the plain model as their truth."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from intactkv.architecture import ARCHITECTURES

WINDOW = 48  # wider than every text of the general laws; tests beyond the window choose a smaller one

# name -> (model type, overrides of the configuration)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "mistral-sliding": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2-mixed": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("qwen3", {}),
    "opt": ("opt", {}),
}
# Longrope, in the heads of Phi-3 that turn in part.
LONG: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
        "long_factor": [3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    },
    "original_max_position_embeddings": 64,
    "max_position_embeddings": 256,
}
# The families of the table, and variants of them that a row tells apart.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in ARCHITECTURES} | {
    "phi3-longrope": ("phi3", LONG),
    "gemma3-two-kinds": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            }
        },
    ),
    "stablelm-normed": ("stablelm", {"qk_layernorm": True}),
    "cohere-normed": ("cohere", {"use_qk_norm": True}),
    "falcon-many-heads": ("falcon", {"new_decoder_architecture": True, "alibi": False}),
    "falcon-one-head": ("falcon", {"multi_query": True, "new_decoder_architecture": False, "alibi": False}),
    "falcon-alibi": (
        "falcon",
        {"multi_query": False, "num_kv_heads": 4, "new_decoder_architecture": False, "alibi": True},
    ),
}
SLIDING = [name for name, (_, overrides) in FAMILIES.items() if "sliding_window" in overrides]


def random_ids(count: int, seed: int = 0) -> Tensor:
    """`count` ids of ordinary tokens, (count,): none of <pad>, <s>, </s>."""
    return torch.randint(3, 101, (count,), generator=torch.Generator().manual_seed(1000 + seed))


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the model says about one unpadded text (T,), without any cache: (T, vocabulary)."""
    return model(input_ids=ids[None], use_cache=False).logits[0].float()


@torch.no_grad()
def plain_cache(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    """transformers' own cache after one pass over (B, T) ids."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache
