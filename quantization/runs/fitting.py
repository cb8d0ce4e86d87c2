"""What fits a model, settled before any work: a prefix, also one from a file, and the tokens that weights need."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from corpora.errors import UserError
from corpora.storage import checkpoint_fingerprint, identity
from intactkv.cache import IntactCache
from intactkv.prefix import Prefix
from quantization.kernels.products import check_kernel
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import Checkpoint, read_manifest
from quantization.runs.configuration import CONFIG
from quantization.runs.dense import empty_model_of, read_config
from quantization.runs.prefixes import PrefixChoice

__all__ = [
    "check_calibration",
    "check_discovered",
    "check_fits",
    "check_length",
    "check_needed",
    "check_prefix",
    "check_storage",
    "fitting",
    "model_of",
    "name_other_weights",
]

log = logging.getLogger(__name__)


def check_fits(name: str, context: int | None, option: str, tokens: int, value: int | None = None) -> None:
    """Raise UserError if so many tokens, with what stands in front of them, are more than a model's positions.

    name: of the model. context: its positions, None if nothing says. option: which one to change. value: of the option,
    where it is a number of tokens; then the message says the largest that fits.
    """
    if context is None or tokens <= context:
        return
    given, fits = option if value is None else f"{option} {value}", context - tokens + (value or 0)
    raise UserError(
        f"{given}: {tokens} tokens with what stands in front do not fit the {context} positions of {name}; use "
        + (f"{option} {fits} or fewer" if fits > 0 and value else "fewer")
    )


def check_calibration(recipe: Recipe, front: int, name: str, context: int | None) -> None:
    """Raise UserError for calibration text that does not fit a model. front: tokens of the prefix; the rest as in
    `check_fits`."""
    length = recipe.calibration.length
    tokens = length + (front if recipe.calibrate_behind_prefix else 0)
    check_fits(name, context, "--calibration-length", tokens, length)


def check_storage(kernel: str | None, packed_kv: bool, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """How weights and the KV cache are kept: raise UserError for a kernel that nobody knows, or that has no quantized
    weight to multiply by, and for a packed cache of exact numbers."""
    if packed_kv and recipe.kv_cache is None:
        raise UserError(
            "--kv-storage packed has nothing to act on: the KV cache has full precision; add --kv-bits N, or leave "
            "it out"
        )
    if kernel is None:
        return
    check_kernel(kernel)
    manifest = checkpoint.manifest
    if (recipe.weights if manifest is None else manifest["recipe"]["weights"]) is None:
        raise UserError(
            f"--kernel {kernel} has nothing to act on: the weights have full precision; name a recipe that quantizes "
            "them, for example --recipe rtn-w4, or leave it out"
        )


def check_prefix(choice: PrefixChoice, checkpoint: Checkpoint, context: int | None) -> None:
    """Raise UserError for a prefix that a model cannot hold. context: as in `check_fits`."""
    count = len(choice.ids)
    if not count:
        return
    config, name = read_config(checkpoint.directory), checkpoint.name
    vocabulary = config.get_text_config(decoder=True).vocab_size
    option = f"--prefix {choice.word[:40]}" + "…" * (len(choice.word) > 40)
    if unknown := [token for token in choice.ids if token >= vocabulary]:
        raise UserError(
            f"{option}: the token ids {unknown[:5]} lie outside the vocabulary of {vocabulary} of {name}; its "
            "tokenizer has tokens that the model never got"
        )
    check_length(config, count, context, option, name)


def check_length(config: PreTrainedConfig, count: int, context: int | None, option: str, name: str) -> None:
    """Raise UserError for a prefix of so many tokens that a model's layers cannot hold. name: what messages call it;
    the rest as in `check_fits`."""
    window = IntactCache(config).smallest_window
    if window is not None and count >= window:
        raise UserError(
            f"{option}: {count} tokens do not fit the sliding window of {window} of {name}; use {window - 1} or fewer"
        )
    check_fits(name, context, option, count + 1)  # and one behind them


def check_needed(choice: PrefixChoice, checkpoint: Checkpoint, recipe: Recipe, vanilla: bool) -> None:
    """Raise UserError if the weights were calibrated behind another prefix, or behind one that will not be there."""
    manifest = checkpoint.manifest
    if manifest is not None:
        needed, word = manifest["needs_prefix"], manifest["recipe"]["prefix"]
    else:
        needed, word = list(choice.ids) if recipe.checkpoint_part.calibrate_behind_prefix else None, recipe.prefix
    if needed is not None and (vanilla or list(choice.ids) != [int(i) for i in needed]):
        tokens = f"a prefix of {len(needed)} tokens" if needed else "a prefix"
        calibrated = f"{checkpoint.name} is calibrated behind {tokens}, and its weights only fit behind it"
        if choice.word == word and not vanilla:
            raise UserError(
                f"{calibrated}; --prefix {word} stands for other tokens now ({len(choice.ids)} of them), because "
                "the chat template or the tokenizer has changed or printed another date; put back the old one, "
                "give a prefix file of the old tokens, or quantize again"
            )
        raise UserError(f"{calibrated}; run it with --prefix {word}{' and without --vanilla' * vanilla}")


def check_discovered(ids: Sequence[int], discovery: Path, finished: Path) -> None:
    """Raise UserError if a finished checkpoint was calibrated behind other tokens than those that a discovery's file
    stands for now."""
    needed = read_manifest(finished)["needs_prefix"]
    if needed is not None and list(ids) != needed:
        raise UserError(
            f"{finished} is calibrated behind the discovered prefix {needed}, but {discovery} now says {list(ids)}; "
            "delete that file to discover again, or the checkpoint to quantize again"
        )


def fitting(
    choice: PrefixChoice, prefix: Prefix, checkpoint: Checkpoint, bases_of: Callable[[str], Sequence[str]]
) -> PrefixChoice:
    """A prefix from a file as a model takes it: with its keys and values, which must be in one of the bases, or, if
    nobody trained them, with its tokens alone.

    bases_of: what keys and values may be in, by the model's fingerprint, the basis of what the run would make first. A
    file may name the model by the fingerprint of an earlier version; its basis was named after that one. Raises
    UserError unless the prefix belongs to the model.
    """
    owner, bases = prefix.model, bases_of(checkpoint.fingerprint)
    earlier = owner.fingerprint
    if earlier not in (None, checkpoint.fingerprint) and _is_same_model(checkpoint, earlier):
        owner = replace(owner, fingerprint=checkpoint.fingerprint)
        if owner.basis == bases_of(earlier)[0]:
            owner = replace(owner, basis=bases[0])
        choice = replace(choice, owner=owner)
    basis = owner.basis if owner.basis in bases else bases[0]
    if prefix.calibrated is None and owner.basis != basis:
        log.info(
            "the keys and values of %s are in another basis than the model's; its %d tokens are taken, and theirs are "
            "built anew",
            choice.file,
            len(prefix),
        )
        owner, choice = replace(owner, basis=basis), replace(choice, file=None, owner=None)
    replace(prefix, model=owner).check(model_of(checkpoint.directory, (checkpoint.fingerprint, basis)))
    return choice


def _is_same_model(checkpoint: Checkpoint, fingerprint: str) -> bool:
    """Whether two fingerprints name the dense model behind a checkpoint, its own and one of before, which covered
    less. False if the model is not at hand."""
    dense, manifest = checkpoint.directory, checkpoint.manifest
    if manifest is not None:
        dense = dense.parent / manifest["source"]["directory"]
    names = (checkpoint.fingerprint, fingerprint)
    return (dense / CONFIG).is_file() and all(checkpoint_fingerprint(dense, name) == name for name in names)


def model_of(directory: Path, source: tuple[str, str]) -> PreTrainedModel:
    """The model of a directory without weights, by whose keys and values it has: fingerprint and basis.

    One that is quantized in another program's format has none; an export of ours names them in its configuration.
    """
    model = empty_model_of(read_config(directory))
    if not any(hasattr(model.config, name) for name in ("quantization_config", "intactkv")):
        model.__dict__["intactkv_source"] = source
    return model


def name_other_weights(prefix: Prefix, file: Path, run: Mapping[str, Any]) -> None:
    """Log for which weights and KV policy keys and values were trained on conversations, if those of a described run
    are others."""
    trained = (prefix.calibrated or {}).get("for")
    if trained is None or "conversations" not in (prefix.calibrated or {}):
        return
    if trained["made_of"] != run["made_of"]:
        log.warning(
            "%s was trained for the weights %s (%s); those that run now are %s (%s)",
            file,
            *(word for those in (trained, run) for word in (those["weights"], identity(those["made_of"]))),
        )
    if "kv" in trained and trained["kv"] != run["kv"]:
        policies = (those["kv"] and json.dumps(those["kv"], sort_keys=True) for those in (trained, run))
        log.warning(
            "%s was trained behind the KV policy %s; that of this run is %s", file, *(p or "none" for p in policies)
        )
