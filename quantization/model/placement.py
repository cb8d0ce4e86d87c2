"""A model that is larger than one GPU: its parts spread over all of them, hidden states handed from one to the next."""

from typing import Any

from transformers import PreTrainedModel

from intactkv.architecture import architecture_of

__all__ = ["memory_of_each", "spread"]


def memory_of_each(limit: int) -> dict[Any, Any]:
    """What there is, by GPU index and "cpu", but of no GPU more than `limit` bytes."""
    from accelerate.utils import get_max_memory

    return {place: min(limit, size) if place != "cpu" else size for place, size in get_max_memory().items()}


def spread(
    model: PreTrainedModel, max_memory: dict[Any, Any] | None = None, offload: str | None = None
) -> PreTrainedModel:
    """Spread a loaded model's decoder blocks evenly over the GPUs; returns the model, whose inputs may stay where they
    are.

    max_memory: bytes by GPU index, "cpu" or "disk", filled in this order; by default all GPUs alike, and the CPU where
    there is none. offload: directory for what goes to disk.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    block = type(architecture_of(model.config).blocks_of(model)[0]).__name__
    memory = max_memory or get_balanced_memory(model, no_split_module_classes=[block])
    places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=[block])
    # The cache keeps every layer's keys and values where that layer computes: it must not be moved along.
    return dispatch_model(model, places, offload_dir=offload, skip_keys=model._skip_keys_device_placement)
