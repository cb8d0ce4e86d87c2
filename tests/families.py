"""The model families that prefix tests run through, and the plain model as their truth."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

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
