"""From a directory and a recipe to a model that runs: quantize on the way, reuse what exists, bring the prefix.

`plan_run` settles what a run is without loading weights (its description is the identity of the run's record);
`Plan.load` does the work: quantized checkpoint (made if it is not there), prefix (written by the full-precision twin,
which is then dropped), and only then the quantized model, so that two models are never held at once.
"""

import logging
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from corpora.catalog import model_defaults
from corpora.errors import UserError
from corpora.paths import modelzoo_dir
from corpora.storage import checkpoint_fingerprint, identity, sha256_of_file
from corpora.text import calibration_segments, packed_documents
from intactkv.architecture import architecture_of
from intactkv.attach import IntactModel, attach
from intactkv.cache import KVPolicy
from intactkv.prefix import Prefix
from quantization.model.blocks import DecoderBlock
from quantization.model.placement import spread
from quantization.model.rescale import rescale_all
from quantization.named import PUBLISHED_GROUP
from quantization.recipes.protocols import CalibratedKV, restored
from quantization.recipes.recipe import Recipe, describe
from quantization.runs.auto_prefix import default_search, find
from quantization.runs.checkpoint import (
    DenseCheckpoint,
    block_file,
    is_quantized,
    load_quantized,
    read_block,
    read_config,
    read_cost,
    read_manifest,
)
from quantization.runs.parts import PARTS
from quantization.runs.pipeline import artefact_identity, basis_of, quantize_checkpoint
from quantization.runs.prefixes import PrefixChoice, check_belongs, choose_prefix, stored_prefix

__all__ = [
    "Checkpoint",
    "Plan",
    "calibration_of",
    "find_checkpoint",
    "load_tokenizer",
    "plan_run",
    "quantized_directory",
    "stored_kv",
    "with_model_defaults",
]


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A model directory and what it is. manifest: of a quantized checkpoint, None for a dense one."""

    directory: Path
    name: str
    fingerprint: str  # of the dense checkpoint, also for a quantized one
    manifest: dict[str, Any] | None

    @property
    def family_name(self) -> str:
        """The dense model's name, whose defaults apply: `smollm2-135m`."""
        return self.manifest["source"]["name"] if self.manifest else self.name


def find_checkpoint(directory: Path) -> Checkpoint:
    """Look at a model directory. Raises UserError if it is missing, truncated or no checkpoint."""
    if directory.is_dir() and is_quantized(directory):
        manifest = read_manifest(directory)
        name = f"{manifest['source']['name']}/{directory.name}"
        return Checkpoint(directory, name, manifest["source"]["fingerprint"], manifest)
    DenseCheckpoint(directory)
    return Checkpoint(directory, Path(os.path.abspath(directory)).name, checkpoint_fingerprint(directory), None)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that stands beside the weights. Raises UserError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} holds no tokenizer that transformers can open ({str(error).splitlines()[0]}); "
            "copy tokenizer.json and tokenizer_config.json beside the weights"
        ) from None


def with_model_defaults(recipe: Recipe, checkpoint: Checkpoint, settings: list[str]) -> list[str]:
    """Settings with the model's own group size and calibration text in front, where it has other than the published."""
    own, front = model_defaults(checkpoint.family_name), []
    if recipe.weights is not None and recipe.weights.grid.group_size == PUBLISHED_GROUP != own.default_group_size:
        front.append(f"weights.grid.group_size={own.default_group_size}")
    if recipe.calibrates and own.default_calibration is not None:
        text = own.default_calibration
        front += [
            f"calibration.corpus={text.corpus}",
            f"calibration.samples={text.samples}",
            f"calibration.length={text.length}",
            "calibration.draw=segments",
        ]
    return [*front, *settings]


def quantized_directory(
    checkpoint: Checkpoint, recipe: Recipe, segments: torch.Tensor | None, prefix_ids: torch.Tensor | Prefix | None
) -> Path:
    """Where a recipe's checkpoint is kept: modelzoo/quantized/{model}/{label}-{identity}."""
    made_of = artefact_identity(checkpoint.fingerprint, recipe, segments, prefix_ids)
    return modelzoo_dir() / "quantized" / checkpoint.name / f"{recipe.label()}-{identity(made_of)}"


def calibration_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    """The calibration segments that a recipe asks for, (N, T); None if nothing calibrates."""
    if not recipe.calibrates:
        return None
    c = recipe.calibration
    draw = packed_documents if c.draw == "documents" else calibration_segments
    return draw(tokenizer, c.corpus, samples=c.samples, length=c.length, seed=c.seed)


@dataclass(frozen=True)
class Plan:
    """Everything about a run that is known before a model is loaded. Made by `plan_run`.

    vanilla: the prefix's tokens stand in front, but the quantized model computes them itself (the arm to compare with).
    segments: (N, T) calibration ids, None if nothing calibrates. packed: keep quantized weights packed in memory.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    choice: PrefixChoice
    tokenizer: PreTrainedTokenizerBase
    segments: torch.Tensor | None
    dtype: torch.dtype
    device: torch.device
    vanilla: bool
    packed: bool
    context: int | None  # positions the model has, None if its configuration does not say
    spread: bool = False  # over all GPUs, for a model larger than one

    @cached_property
    def calibration_prefix(self) -> torch.Tensor | Prefix | None:
        """Ids of the prefix that calibration runs behind, (P,), or a trained prefix; None if it runs without."""
        if not self.recipe.calibrate_behind_prefix:
            return None
        prefix = Prefix.load(self.choice.file) if self.choice.file is not None else None
        return torch.tensor(self.choice.ids) if prefix is None or prefix.calibrated is None else prefix

    @property
    def basis(self) -> str:
        """The basis of K and V in the model that will run."""
        if self.checkpoint.manifest is not None:
            return self.checkpoint.manifest["basis"]
        return basis_of(self.checkpoint.fingerprint, self.recipe, self.segments, self.calibration_prefix)

    def describe(self) -> dict[str, Any]:
        """What will run, for records and their identity: nothing that changes a figure is left out."""
        manifest, recipe = self.checkpoint.manifest, self.recipe
        if manifest is not None:
            made_of = manifest["made_of"]
        elif recipe.makes_checkpoint:
            made_of = artefact_identity(self.checkpoint.fingerprint, recipe, self.segments, self.calibration_prefix)
        else:
            made_of = {"source": self.checkpoint.fingerprint}
        return {
            "model": self.checkpoint.family_name,
            "weights": manifest["label"] if manifest is not None else recipe.label(),
            "made_of": made_of,
            "recipe": manifest["recipe"] if manifest is not None else describe(recipe),
            "kv": describe(recipe.kv_cache),
            "prefix": {
                "label": self.choice.label,
                "ids": list(self.choice.ids),
                "file": sha256_of_file(self.choice.file) if self.choice.file else None,
                "intact": bool(self.choice.ids) and not self.vanilla,
            },
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "packed": self.packed,
        } | ({"spread": True} if self.spread else {})

    def load(self) -> IntactModel:
        """Make what is missing (quantized checkpoint, prefix) and load the model behind its prefix."""
        source = self.written(self.recipe)
        prefix = self.prefix() if self.choice.ids and not self.vanilla else None
        model = self._open(source, self.packed)
        return attach(model, prefix, _bound(self.recipe, model))

    def _open(self, directory: Path, packed: bool = False) -> PreTrainedModel:
        """A dense or quantized checkpoint as a model, where this plan computes."""
        return _load(directory, self.dtype, self.device, packed, self.spread)

    def written(self, recipe: Recipe) -> Path:
        """The directory of a recipe's checkpoint, which is made if it is not there."""
        if self.checkpoint.manifest is not None or not recipe.makes_checkpoint:
            return self.checkpoint.directory
        target = quantized_directory(self.checkpoint, recipe, self.segments, self.calibration_prefix)
        return quantize_checkpoint(
            self.checkpoint.directory,
            recipe,
            target,
            segments=self.segments,
            prefix_ids=self.calibration_prefix,
            device=self.device,
            fingerprint=self.checkpoint.fingerprint,
        )

    def cost(self) -> dict[str, Any] | None:
        """What it took to make the quantized checkpoint; None for a dense one. Call it after `load`."""
        if self.checkpoint.manifest is None and not self.recipe.makes_checkpoint:
            return None
        return read_cost(self.written(self.recipe))

    def prefix(self) -> Prefix:
        """The intact prefix: from its file, or written now by the full-precision twin."""
        return stored_prefix(
            self.choice,
            model_name=self.checkpoint.family_name,
            dtype=self.dtype,
            made_of={"source": self.checkpoint.fingerprint, "basis": self.basis},
            twin=self.twin,
        )

    def twin(self) -> PreTrainedModel:
        """The full-precision twin, which writes the prefix and which errors are measured against: the dense checkpoint,
        its transformed form, or itself rescaled as the quantized checkpoint was. Raises UserError if the dense
        checkpoint behind a quantized one is not at hand."""
        manifest, directory, recipe = self.checkpoint.manifest, self.checkpoint.directory, self.recipe
        if manifest is not None:
            dense = self._dense_of(manifest)
            kept = tuple(t for t in (restored(t, PARTS) for t in manifest["recipe"]["transforms"]) if not t.rescales)
            there = replace(self, checkpoint=find_checkpoint(dense)).written(Recipe(transforms=kept))
            return _rescaled(self._open(there), directory) if _is_rescaled(directory) else self._open(there)
        calibrating = [step.name for step in recipe.transforms if step.calibrates and not step.rescales]
        if calibrating and recipe.weights is not None:
            # In the twin's own run the transform would see text that unquantized blocks passed on, and come out
            # different: its K and V would be in another basis than the quantized model's.
            raise UserError(
                f"the prefix of a recipe whose transform {calibrating[0]} calibrates must come from the run that "
                "quantizes, which is not available; leave --prefix out"
            )
        twin = self._open(self.written(recipe.twin))
        return _rescaled(twin, self.written(recipe)) if recipe.rescales else twin

    def _dense_of(self, manifest: dict[str, Any]) -> Path:
        """The dense checkpoint that a quantized one was made from. Raises UserError if it is not at hand."""
        directory = self.checkpoint.directory
        dense = directory.parent / manifest["source"]["directory"]
        known = all(transform["kind"] in PARTS for transform in manifest["recipe"]["transforms"])
        if (
            not known
            or not (dense / "config.json").is_file()
            or checkpoint_fingerprint(dense) != self.checkpoint.fingerprint
        ):
            raise UserError(
                f"the full-precision twin of {directory} is not at hand, so its prefix cannot be built, nor its error "
                "measured; do it where the dense checkpoint is, or give a prefix that was built there "
                "(python -m intactkv build): --prefix FILE.safetensors"
            )
        return dense


def plan_run(
    directory: Path,
    recipe: Recipe,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    vanilla: bool = False,
    packed: bool = False,
    spread: bool = False,
) -> Plan:
    """Look at a dense or quantized checkpoint and settle what a recipe means for it.

    No weights are loaded, unless the prefix is `auto` and has never been discovered.
    spread: put one model on all GPUs. dtype: None takes float32 on a CPU and the checkpoint's own elsewhere.
    Raises UserError for a combination that cannot be, such as a recipe for weights that are quantized already.
    """
    checkpoint = find_checkpoint(directory)
    manifest = checkpoint.manifest
    if manifest is not None and replace(recipe, kv_cache=None).makes_checkpoint:
        raise UserError(
            f"{directory} is quantized already ({manifest['label']}); give its dense checkpoint to --recipe "
            f"{recipe.label()}, or leave --recipe out"
        )
    if manifest is not None and isinstance(recipe.kv_cache, CalibratedKV):
        recipe = replace(recipe, kv_cache=_stored_as(recipe.kv_cache, checkpoint))
    if vanilla and recipe.prefix == "none":
        raise UserError(
            "--vanilla compares with an intact prefix, but none was named; add --prefix bos, or leave it out"
        )
    config = read_config(directory)
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float16
    dtype = dtype or (torch.float32 if device.type == "cpu" else own)
    tokenizer = load_tokenizer(directory)
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)

    def discovered(corpus: str | None) -> tuple[int, ...]:
        def dense(there: Path) -> PreTrainedModel:
            return plan_run(there, Recipe(), device=device, dtype=dtype, spread=spread).load().model

        return find(checkpoint, tokenizer, default_search(checkpoint.family_name, corpus, context), dense).prefix

    choice = choose_prefix(recipe.prefix, tokenizer, checkpoint.family_name, discovered)
    segments = calibration_of(recipe, tokenizer) if manifest is None else None
    plan = Plan(checkpoint, recipe, choice, tokenizer, segments, dtype, device, vanilla, packed, context, spread)
    if manifest is not None:
        needed, word = manifest["needs_prefix"], manifest["recipe"]["prefix"]
    else:
        needed, word = list(choice.ids) if recipe.calibrate_behind_prefix else None, recipe.prefix
    if needed is not None and (vanilla or list(choice.ids) != [int(i) for i in needed]):
        raise UserError(
            f"{checkpoint.name} is calibrated behind a prefix of {len(needed)} tokens and refused without it, because "
            f"the pivots' own error grew; run it with --prefix {word} and without --vanilla"
        )
    if choice.file is not None:  # now, and not after hours of quantizing
        check_belongs(Prefix.load(choice.file), directory, (checkpoint.fingerprint, plan.basis))
    return plan


def stored_kv(checkpoint: Checkpoint) -> CalibratedKV | None:
    """The calibrated KV policy whose tensors a quantized checkpoint holds; None if it holds none."""
    described = checkpoint.manifest["recipe"].get("kv_cache") if checkpoint.manifest is not None else None
    policy = None if described is None else restored(described, PARTS)
    if policy is not None and not isinstance(policy, CalibratedKV):
        log.info(
            "%s was first run with the KV policy %s; without --kv and --kv-bits the cache has full precision",
            checkpoint.name,
            policy,
        )
        return None
    return policy


def _stored_as(wanted: CalibratedKV, checkpoint: Checkpoint) -> CalibratedKV:
    """The checkpoint's own policy, which must be of the kind and bits that are asked for. Raises UserError."""
    own = stored_kv(checkpoint)
    if own is None:
        raise UserError(
            f"{type(wanted).__name__} needs ranges of keys and values, which {checkpoint.name} does not hold; quantize "
            "it with that KV policy (for example --kv static --kv-bits 4), or choose another, such as --kv per_head"
        )
    if (type(own), own.bits) != (type(wanted), wanted.bits):
        raise UserError(
            f"{checkpoint.name} holds ranges for {type(own).__name__} with {own.bits} bits, not for "
            f"{type(wanted).__name__} with {wanted.bits}; leave --kv and --kv-bits out, or quantize it anew"
        )
    return own


def _bound(recipe: Recipe, model: PreTrainedModel) -> KVPolicy | None:
    """The recipe's KV policy, with the tensors that the model's checkpoint holds if it is a calibrated one."""
    kv = recipe.kv_cache
    return kv.bound(model.__dict__["intactkv_kv"]) if isinstance(kv, CalibratedKV) else kv


def _load(
    directory: Path, dtype: torch.dtype, device: torch.device, packed: bool = False, spread_over_gpus: bool = False
) -> PreTrainedModel:
    """A dense or quantized checkpoint as a model in evaluation mode."""
    if is_quantized(directory):
        model = load_quantized(directory, packed=packed, dtype=dtype, device="cpu" if spread_over_gpus else device)
        return spread(model) if spread_over_gpus else model
    # With a device map the weights go from the file to their GPU, and the whole model is never in main memory.
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map="auto" if spread_over_gpus else None
    )
    if not spread_over_gpus:
        torch.nn.Module.to(model, device)
    return model.eval().requires_grad_(False)


def _is_rescaled(quantized: Path) -> bool:
    """Whether a quantized checkpoint's weights were rescaled before they were rounded."""
    return bool(read_block(block_file(quantized, 0)).rescalings)


def _rescaled(model: PreTrainedModel, quantized: Path) -> PreTrainedModel:
    """A dense model, rescaled block by block as the quantized checkpoint was before it was rounded."""
    architecture = architecture_of(model.config)
    for index, module in enumerate(architecture.blocks_of(model)):
        block = DecoderBlock(index, module, architecture, model.config)
        rescale_all(module, read_block(block_file(quantized, index)).rescalings, block.head_size)
    manifest = read_manifest(quantized)
    model.__dict__["intactkv_source"] = (manifest["source"]["fingerprint"], manifest["basis"])
    return model
