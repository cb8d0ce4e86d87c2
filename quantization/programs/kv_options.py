"""The options of the KV cache, and the policy that they make of a recipe's or a checkpoint's own.

Only the standard library is imported here, so that `--help` answers at once.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from corpora import values

if TYPE_CHECKING:
    from quantization.recipes.recipe import Recipe
    from quantization.runs.checkpoint import Checkpoint
    from quantization.runs.kv_artefact import KVArtefact

__all__ = ["FIELDS", "add_kv_options", "given_fields", "given_kv", "kv_artefact_of", "with_kv"]

# Options of the policy's fields: attribute of the parsed options, field.
FIELDS = {"kv_bits": "bits", "k_bits": "bits", "v_bits": "v_bits", "kv_group_size": "group_size"}


def add_kv_options(group: argparse._ActionsContainer) -> None:
    """The KV policy and its fields."""
    group.add_argument(
        "--kv",
        type=values.name,
        default=None,
        metavar="NAME|FILE",
        help="KV-cache policy: none, per_head, rotated, kivi, turboquant; kvquant, static or clipped, which calibrate "
        "once (python -m quantization kv) or take the FILE.safetensors of that (default: the recipe's, or the "
        "checkpoint's); --set kv_cache.FIELD=VALUE sets what it has besides bits",
    )
    group.add_argument(
        "--kv-bits", type=values.count(1, 16), metavar="N", help="bits of the KV cache, 2 to 8; alone it means per_head"
    )
    group.add_argument("--k-bits", type=values.count(1, 16), metavar="N", help="bits of keys, where values have others")
    group.add_argument("--v-bits", type=values.count(1, 16), metavar="N", help="bits of values, where keys have others")
    group.add_argument(
        "--kv-group-size",
        type=values.group_size,
        metavar="G",
        help="channels of a head that share a grid, -1 for one grid over all heads of a token (default: a head; kivi: "
        "32, tokens of a channel for keys)",
    )


def given_fields(options: argparse.Namespace) -> dict[str, int]:
    """The options of the policy's fields that were given, by their attributes."""
    return {name: value for name in FIELDS if (value := getattr(options, name, None)) is not None}


def given_kv(options: argparse.Namespace) -> list[str]:
    """Those of the options that were given, as they are spelled; of --set those that say something of the cache."""
    names = [name for name in ("kv", *FIELDS) if getattr(options, name) is not None]
    settings = [setting for setting in options.settings if setting.startswith(("kv_cache.", "kv_cache="))]
    return [f"--{name.replace('_', '-')}" for name in names] + [f"--set {setting}" for setting in settings]


def kv_artefact_of(options: argparse.Namespace) -> "KVArtefact | None":
    """What --kv FILE holds; None if it is a policy's name. Raises UserError for a file that is none of ours."""
    name = getattr(options, "kv", None)
    if name is None or not name.endswith(".safetensors"):
        return None
    from quantization.runs.kv_artefact import KVArtefact

    return KVArtefact.load(Path(name))


def with_kv(recipe: "Recipe", options: argparse.Namespace, checkpoint: "Checkpoint", chosen: bool) -> "Recipe":
    """The recipe with the KV policy that the options spell: by name, or else its own or the checkpoint's, with the
    fields that are given. chosen: the recipe's own was chosen apart, also none. Raises UserError for what cannot be."""
    from dataclasses import replace

    from corpora.errors import UserError
    from quantization.kv_cache import KV_POLICIES, Policy
    from quantization.named import kv_policy
    from quantization.runs.kept import stored_kv

    name, given = getattr(options, "kv", None), given_fields(options)
    bits = given.pop("kv_bits", None)
    policy = recipe.kv_cache
    if (artefact := kv_artefact_of(options)) is not None:
        policy = artefact.policy if bits is None else replace(artefact.policy, bits=bits, v_bits=None)
    elif name is not None and type(held := stored_kv(checkpoint)) is KV_POLICIES.get(name):
        policy = held if bits is None else replace(held, bits=bits, v_bits=None)
    elif name is not None or bits is not None:
        if bits is None and name not in (None, "none") and len({"k_bits", "v_bits"} & given.keys()) == 1:
            raise UserError(f"--kv {name} needs the bits of keys and of values: give --kv-bits N, or both apart")
        policy = kv_policy(name or "per_head", given.get("k_bits") if bits is None else bits)
    elif policy is None and not chosen:
        policy = stored_kv(checkpoint)
        if policy is None and {"k_bits", "v_bits"} <= given.keys():
            policy = kv_policy("per_head", given["k_bits"])
    if given and not isinstance(policy, Policy):
        told = ", ".join(f"--{field.replace('_', '-')}" for field in given)
        raise UserError(f"{told}: the KV cache has full precision; add --kv-bits N, or give both --k-bits and --v-bits")
    if isinstance(policy, Policy) and given:
        policy = replace(
            policy,
            bits=given.get("k_bits", policy.bits),
            v_bits=given.get("v_bits", policy.values_bits if "k_bits" in given else policy.v_bits),
        )
        if (size := given.get("kv_group_size")) is not None:
            if not hasattr(policy, "group_size"):
                raise UserError(f"--kv-group-size: {type(policy).__name__} has no groups of channels; leave it out")
            policy = replace(policy, group_size=size)  # type: ignore[call-arg]
    return replace(recipe, kv_cache=policy)
