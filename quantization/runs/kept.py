"""What a quantized checkpoint brings to a run that does not say otherwise: its prefix and its calibrated KV policy."""

import logging
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from corpora.errors import UserError
from intactkv.store import Bound, KVPolicy
from quantization.kv_cache import Policy
from quantization.recipes.protocols import restored
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import PARTS, Checkpoint

__all__ = ["bound_kv", "fitting_kv", "needed_prefix", "stored_kv"]

log = logging.getLogger(__name__)


def needed_prefix(checkpoint: Checkpoint) -> str:
    """The word of the prefix that a quantized checkpoint was calibrated behind, `none` if there is none; it is told."""
    manifest = checkpoint.manifest
    if manifest is None or manifest["needs_prefix"] is None:
        return "none"
    word = str(manifest["recipe"]["prefix"])
    log.info("%s was calibrated behind --prefix %s, and runs behind it", checkpoint.name, word)
    return word


def stored_kv(checkpoint: Checkpoint) -> Policy | None:
    """The calibrated KV policy whose tensors a quantized checkpoint holds; None if it holds none."""
    described = checkpoint.manifest["recipe"].get("kv_cache") if checkpoint.manifest is not None else None
    policy = None if described is None else restored(described, PARTS)
    if policy is not None and not policy.calibrates:
        log.info(
            "%s comes from a recipe with the KV policy %s; without --kv and --kv-bits the cache has full precision",
            checkpoint.name,
            policy,
        )
        return None
    return policy


def fitting_kv(recipe: Recipe, checkpoint: Checkpoint, config: PreTrainedConfig) -> Recipe:
    """The recipe with its KV policy said for the model's heads; one with ranges is the checkpoint's own, if it has any
    weights of its own. config: of the text model. Raises UserError for groups or ranges that do not fit."""
    kv = recipe.kv_cache
    if not isinstance(kv, Policy):
        return recipe
    heads = getattr(config, "num_attention_heads", None) or 1
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if checkpoint.manifest is not None and kv.calibrates:
        return replace(recipe, kv_cache=_stored_as(kv, checkpoint, head_size))
    return replace(recipe, kv_cache=kv.in_heads(head_size))


def _stored_as(wanted: Policy, checkpoint: Checkpoint, head_size: int) -> Policy:
    """The checkpoint's own policy, which must be of the kind and bits that are asked for. Raises UserError."""
    own = stored_kv(checkpoint)
    if own is None:
        raise UserError(
            f"{type(wanted).__name__} needs ranges of keys and values, which {checkpoint.name} does not hold; quantize "
            "it with that KV policy (for example --kv static --kv-bits 4), or choose another, such as --kv per_head"
        )
    # Its name and bits alone do not say how keys are rotated, for example; the checkpoint does.
    kind: Any = type(own)
    short = kind(own.bits, v_bits=own.v_bits)
    if wanted.in_heads(head_size) not in (short.in_heads(head_size), own.in_heads(head_size)):
        raise UserError(
            f"{checkpoint.name} holds ranges for {own}, not for {wanted}; leave the options of the KV cache out, or "
            "quantize it anew"
        )
    return own


def bound_kv(recipe: Recipe, model: PreTrainedModel, packed: bool = False) -> KVPolicy | None:
    """The recipe's KV policy, with what the model's checkpoint holds for it if it calibrates. packed: keep codes."""
    kv = recipe.kv_cache
    if kv is None or not (kv.calibrates or packed):
        return kv
    return Bound(kv, dict(enumerate(model.__dict__["intactkv_kv"])) if kv.calibrates else {}, packed)
