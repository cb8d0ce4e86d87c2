"""What a quantized checkpoint brings to a run that does not say otherwise: its prefix and its calibrated KV policy."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from intactkv.architecture import architecture_of, heads_of
from intactkv.attention import NEEDED, check_asked
from intactkv.cache import IntactCache
from intactkv.policy import Bound, KVPolicy
from quantization.kv_cache import Policy
from quantization.recipes.protocols import restored
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import PARTS, Checkpoint

__all__ = ["bound_kv", "check_layers", "fitting_kv", "held_kv", "needed_prefix", "stored_kv"]

log = logging.getLogger(__name__)


def needed_prefix(checkpoint: Checkpoint) -> str:
    """The word of the prefix that a quantized checkpoint was calibrated behind, `none` if there is none; it is told."""
    manifest = checkpoint.manifest
    if manifest is None or manifest["needs_prefix"] is None:
        return "none"
    word = str(manifest["recipe"]["prefix"])
    log.info("%s was calibrated behind --prefix %s, and runs behind it", checkpoint.name, word)
    return word


def held_kv(checkpoint: Checkpoint) -> Policy | None:
    """The calibrated KV policy whose tensors a quantized checkpoint holds, in its blocks' files; None if it holds none.
    What its weights were made of names it; the recipe may name one that was left to the run time."""
    described = checkpoint.manifest["made_of"].get("kv_cache") if checkpoint.manifest is not None else None
    policy = None if described is None else restored(described, PARTS)
    return policy if policy is not None and policy.calibrates else None


def stored_kv(checkpoint: Checkpoint) -> Policy | None:
    """The same; a policy that the recipe names and the checkpoint has no tensors for is told."""
    held = held_kv(checkpoint)
    described = checkpoint.manifest["recipe"].get("kv_cache") if checkpoint.manifest is not None else None
    if held is None and described is not None:
        log.info(
            "%s comes from a recipe with the KV policy %s; without --kv and --kv-bits the cache has full precision",
            checkpoint.name,
            restored(described, PARTS),
        )
    return held


def fitting_kv(recipe: Recipe, checkpoint: Checkpoint, config: PreTrainedConfig) -> Recipe:
    """The recipe with its KV policy said for the model's heads; one that a quantized checkpoint holds tensors for is
    said as there. For a checkpoint that was calibrated behind a prefix, its text runs behind it, too.

    config: of the text model. Raises UserError for groups that do not fit, and for what the model's layers cannot do.
    """
    kv = recipe.kv_cache
    if not isinstance(kv, Policy):
        return recipe
    _, head_size = heads_of(config)
    wanted, held = kv.in_heads(head_size), held_kv(checkpoint)
    check_layers(wanted, config)
    if held is not None:
        # Its name and bits alone do not say how keys are rotated, for example; the checkpoint does.
        kind: Any = type(held)
        short = kind(bits=held.bits, v_bits=held.v_bits)
        if wanted in (short.in_heads(head_size), held.in_heads(head_size)):
            return replace(recipe, kv_cache=held)
    manifest = checkpoint.manifest
    if kv.calibrates and manifest is not None and manifest["needs_prefix"] is not None and recipe.prefix != "none":
        recipe = replace(recipe, kv_cache=wanted, calibrate_behind_prefix=True)
    return replace(recipe, kv_cache=wanted)


def check_layers(kv: KVPolicy, config: PreTrainedConfig) -> None:
    """Raise UserError for a policy that cannot run in a model: its windows, its rotation or its attention. config: of
    the text model."""
    if kv.calibrates:
        architecture_of(config)
    layers = IntactCache(config, policy=Bound(kv)).intact_layers
    if any(layer.store.waits for layer in layers):
        model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        check_asked(model, *NEEDED)


def bound_kv(
    recipe: Recipe,
    model: PreTrainedModel,
    packed: bool = False,
    tensors: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> KVPolicy | None:
    """The recipe's KV policy, if it calibrates with what it was calibrated to. tensors: that, by layer; by default what
    the model's checkpoint holds. packed: keep codes."""
    kv = recipe.kv_cache
    if kv is None or not (kv.calibrates or packed):
        return kv
    if kv.calibrates and tensors is None:
        tensors = dict(enumerate(model.__dict__["intactkv_kv"]))
    return Bound(kv, tensors or {}, packed)
