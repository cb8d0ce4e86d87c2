"""From a directory and a recipe to a model that runs: quantize on the way, reuse what exists, bring the prefix.

`plan_run` settles what a run is from configurations and file headers: no weights are loaded, no text is tokenized (its
description is the identity of the run's record). `Plan.load` does the work: the discovery behind `--prefix auto`, the
quantized checkpoint, the prefix (written by the full-precision twin, which is then dropped), what the KV policy
calibrates to, each made if it is not there; and only then the quantized model, so that two models are never held at
once.
"""

import logging
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from corpora.errors import UserError
from corpora.storage import identity
from corpora.text import calibration_segments, packed_documents
from corpora.writing import drop_dead_lock, refuse_special
from intactkv.attach import IntactModel, attach
from intactkv.prefix import Prefix, identity_of
from quantization.kernels.linear import products_of
from quantization.kv_cache import Policy
from quantization.recipes.protocols import restored
from quantization.recipes.recipe import Recipe
from quantization.runs.auto_prefix import default_search, find
from quantization.runs.checkpoint import PARTS, Checkpoint, dense_directory, find_checkpoint, read_cost, read_manifest
from quantization.runs.dense import DenseCheckpoint, empty_model_of, read_config
from quantization.runs.fitting import (
    check_discovered,
    check_needed,
    check_prefix,
    check_storage,
    fitting,
    model_of,
    name_other_weights,
)
from quantization.runs.fitting_kv import check_kv
from quantization.runs.identities import by_tokens
from quantization.runs.kept import bound_kv, fitting_kv
from quantization.runs.known import Known
from quantization.runs.kv_artefact import KVArtefact, calibrate_kv, tidy
from quantization.runs.opening import is_rescaled, load_model, load_tokenizer, rescaled
from quantization.runs.pipeline import check_makes_something, identity_at, partial_of, quantize_checkpoint
from quantization.runs.prefixes import (
    PrefixChoice,
    auto_search,
    choose_prefix,
    keep_prefix,
    prefix_file,
    stored_prefix,
)
from quantization.runs.suited import check_suited

__all__ = ["Plan", "plan_run"]

log = logging.getLogger(__name__)


class Plan(Known):
    """What is known of a run, and what it reads and makes. Made by `plan_run`."""

    # What is read or made when it is asked for ------------------------------------------------------------------------

    @cached_property
    def choice(self) -> PrefixChoice:
        """The prefix with its tokens; `auto` is discovered now, if it never was."""
        if self.named is not None:
            return self.named
        assert self.search is not None
        choice = PrefixChoice(self.recipe.prefix, "[A]", find(self.search, self._open_dense).prefix)
        check_needed(choice, self.checkpoint, self.recipe, self.vanilla)
        check_prefix(choice, self.checkpoint, self.context)
        return choice

    @cached_property
    def segments(self) -> torch.Tensor | None:
        """The calibration segments that the recipe asks for, (N, T); None if nothing calibrates."""
        if self.text is None:
            return None
        self.check_calibration(len(self.choice.ids) if self.recipe.calibrate_behind_prefix else 0)
        c = self.recipe.calibration
        draw = packed_documents if c.draw == "documents" else calibration_segments
        return draw(self.tokenizer, c.corpus, samples=c.samples, length=c.length, seed=c.seed)

    @cached_property
    def behind(self) -> torch.Tensor | Prefix | None:
        """As `behind_of` gives it; `auto` is discovered now, if it never was."""
        return self.behind_of(self.choice) if self.recipe.calibrate_behind_prefix else None

    def load(self) -> IntactModel:
        """Make what is missing (quantized checkpoint, prefix) and load the model behind its prefix."""
        intact = bool(self.choice.ids) and not self.vanilla  # `auto` is discovered before anything is quantized
        source = self.written(self.recipe)
        prefix, built = self._prefix if intact else (None, False)
        calibrated = self.kv_artefact() if self.kv_made_of is not None else None
        if calibrated is not None:
            calibrated.check_front(self.choice.ids if intact else (), prefix)
        model = self._open(source, self.kernel)
        self.__dict__["_products"] = products_of(model)
        tensors = None if calibrated is None else calibrated.tensors
        attached = attach(model, prefix, bound_kv(self.recipe, model, self.packed_kv, tensors))
        if prefix is not None and built:  # nothing is kept for a checkpoint that is refused
            self._keep(prefix)
        return attached

    def _open(self, directory: Path, kernel: str | None = None) -> PreTrainedModel:
        """A dense or quantized checkpoint as a model, where this plan computes."""
        return load_model(directory, self.dtype, self.device, kernel, self.spread, self.max_memory)

    def _open_dense(self, directory: Path) -> PreTrainedModel:
        return self._open(directory)

    def written(self, recipe: Recipe, out: Path | None = None) -> Path:
        """The directory of a recipe's checkpoint, which is made if it is not there. out: where to, if not there."""
        if out is None and (self.checkpoint.manifest is not None or not recipe.makes_checkpoint):
            return self.checkpoint.directory
        target, artefact = out or self.directory_of(recipe), self.artefact_of(recipe)
        if identity_at(target) == artefact.identity:
            drop_dead_lock(target)
            if self.search is not None:
                check_discovered(self.choice.ids, self.search.file, target)
            return target
        made = recipe.checkpoint_part
        segments = self.segments if made.calibrates else None
        behind = self.behind if made.calibrate_behind_prefix else None
        if made.calibrates:  # checkpoints were once named by the tokens of their text
            earlier = by_tokens(self.checkpoint.fingerprint, recipe, segments, behind)
            place = out or self._directory(recipe, earlier)
            if earlier.identity in (identity_at(place), identity_at(partial_of(place))):
                target, artefact = place, earlier
        return quantize_checkpoint(
            self.checkpoint.directory,
            recipe,
            target,
            segments=segments,
            behind=behind,
            artefact=artefact,
            device=self.device,
            fingerprint=self.checkpoint.fingerprint,
        )

    def kv_artefact(self, out: Path | None = None) -> KVArtefact:
        """What the KV policy calibrates to: from its file, or made now if it is not there. out: where to, in the place
        of an older one. Raises UserError if `out` holds something else."""
        if self.given_kv is not None:
            return self.given_kv
        path, made_of = out or self.kv_file, self.kv_made_of
        assert made_of is not None
        if (found := self._kept_kv(path, again=out is None)) is not None and found.identity == identity(dict(made_of)):
            tidy(path)
            return found
        source = self.written(self.recipe)
        segments, front = self.segments, self._front()
        kv = self.recipe.kv_cache
        assert isinstance(kv, Policy)
        assert segments is not None
        wanted = KVArtefact(
            kv,
            made_of,
            identity_of(model_of(source, (self.checkpoint.fingerprint, self._written_basis))),
            self.weights_label,
            self.recipe.prefix if front is not None else "none",
            None if front is None else tuple(self.choice.ids),
            front.digest() if isinstance(front, Prefix) and front.calibrated is not None else None,
        )
        return calibrate_kv(source, wanted, path, segments, front, self.device)

    def _kept_kv(self, path: Path, again: bool) -> KVArtefact | None:
        """The artefact that is there. again: a damaged one is made again, and that is told."""
        if not os.path.lexists(path):
            return None
        refuse_special(path, "the KV artefact")
        try:
            return KVArtefact.load(path)
        except UserError as error:
            if not again:
                raise
            log.warning("the KV artefact is made again: %s", error)
            path.unlink()
            return None

    def _front(self) -> torch.Tensor | Prefix | None:
        """The intact prefix that text of the KV policy runs behind. A dense model's blocks write it themselves, so that
        no model is in memory; in front of others it is the twin's, in the checkpoint's own dtype."""
        if self.checkpoint.manifest is None and not self.recipe.makes_checkpoint:
            return self.behind
        if not self.recipe.calibrate_behind_prefix:
            return None
        own = read_config(self.checkpoint.directory).dtype
        plan = replace(self, dtype=own) if isinstance(own, torch.dtype) and own != self.dtype else self
        return plan._prefix[0]

    def outcome(self) -> dict[str, Any]:
        """What a run's record says of what it found or made: what the quantized checkpoint took (None for a dense
        one), the products that multiply by packed weights, and the tokens that `auto` stands for. Call it after
        `load`."""
        made = self.checkpoint.manifest is not None or self.recipe.makes_checkpoint
        cost = read_cost(self.written(self.recipe)) if made else None
        told: dict[str, Any] = {"quantization": cost and {n: value for n, value in cost.items() if n != "sha256"}}
        if "_products" in self.__dict__ and self.kernel is not None:
            told["products"] = self.__dict__["_products"]
        return told if self.search is None else {**told, "prefix_ids": list(self.choice.ids)}

    def intact_prefix(self) -> Prefix:
        """The intact prefix: from its file, or written now by the full-precision twin."""
        prefix, built = self._prefix
        if built:
            self._keep(prefix)
        return prefix

    @cached_property
    def _prefix(self) -> tuple[Prefix, bool]:
        """The intact prefix, and whether it was built now and is not kept yet."""
        basis = self._written_basis
        return stored_prefix(self.choice, self.prefix_file(basis), self._made_of(basis), self.dtype, self.twin)

    def _keep(self, prefix: Prefix) -> None:
        keep_prefix(prefix, self.choice, self.prefix_file(self._written_basis))
        self.__dict__["_prefix"] = prefix, False  # which is kept once

    @property
    def _written_basis(self) -> str:
        """The basis of the checkpoint as it was written: by what was found when it was quantized."""
        if self.checkpoint.manifest is None and self.recipe.rescales:
            return str(read_manifest(self.written(self.recipe))["basis"])
        return self.basis

    def _made_of(self, basis: str) -> dict[str, Any]:
        return {"source": self.checkpoint.fingerprint, "basis": basis}

    def prefix_file(self, basis: str) -> Path:
        """Where the intact prefix lies, or will. Its name holds its tokens: what `auto` stands for must be known."""
        return prefix_file(self.choice, self.checkpoint.family_name, self._made_of(basis), self.dtype)

    def twin(self) -> PreTrainedModel:
        """The full-precision twin, which writes the prefix and which errors are measured against: the dense checkpoint,
        its transformed form, or itself rescaled as the quantized checkpoint was. Raises UserError if the dense
        checkpoint behind a quantized one is not at hand."""
        manifest, directory, recipe = self.checkpoint.manifest, self.checkpoint.directory, self.recipe
        if manifest is not None:
            dense = dense_directory(self.checkpoint, "it is what writes a prefix, and what errors are measured against")
            kept = tuple(t for t in (restored(t, PARTS) for t in manifest["recipe"]["transforms"]) if not t.rescales)
            there = replace(self, checkpoint=find_checkpoint(dense)).written(Recipe(transforms=kept))
            twin = rescaled(self._open(there), directory) if is_rescaled(directory) else self._open(there)
            # By the names in the manifest, whose fingerprint may be one of before.
            twin.__dict__["intactkv_source"] = (manifest["source"]["fingerprint"], manifest["basis"])
            return twin
        calibrating = [step.name for step in recipe.transforms if step.calibrates and not step.rescales]
        if calibrating and recipe.weights is not None:
            # In the twin's own run the transform would see text that unquantized blocks passed on, and come out
            # different: its K and V would be in another basis than the quantized model's.
            raise UserError(
                f"the prefix of a recipe whose transform {calibrating[0]} calibrates must come from the run that "
                "quantizes, which is not available; leave --prefix out"
            )
        twin = self._open(self.written(recipe.twin))
        return rescaled(twin, self.written(recipe)) if recipe.rescales else twin


def plan_run(
    source: Path | Checkpoint,
    recipe: Recipe,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    vanilla: bool = False,
    kernel: str | None = None,
    spread: bool = False,
    max_memory: int | None = None,
    packed_kv: bool = False,
    makes: str = "run",
    given_kv: KVArtefact | None = None,
) -> Plan:
    """Look at a dense or quantized checkpoint, or its directory, and settle what a recipe means for it.

    Configurations and file headers are read, and files of text and tokenizer hashed; nothing is loaded, tokenized or
    discovered. kernel: keep quantized weights packed, and multiply by it. spread: put one model on all GPUs;
    max_memory: bytes of each, None for all. packed_kv: keep the KV cache's codes. given_kv: what the KV policy is
    calibrated to. dtype: None takes float32 on a CPU and the checkpoint's own elsewhere. makes: what the plan is for
    (`quantization.runs.preview.preview`); only a run, a checkpoint and a KV artefact need the recipe's text, and a
    prefix that a file holds needs no weights.
    Raises UserError for a combination that cannot be, such as a recipe for weights that are quantized already.
    """
    checkpoint = source if isinstance(source, Checkpoint) else find_checkpoint(source)
    directory, manifest = checkpoint.directory, checkpoint.manifest
    if manifest is not None and recipe.makes_checkpoint:
        raise UserError(
            f"{directory} is quantized already ({manifest['label']}); give its dense checkpoint to --recipe "
            f"{recipe.label()}, or leave --recipe out"
        )
    if vanilla and recipe.prefix == "none":
        raise UserError(
            "--vanilla compares with an intact prefix, but none was named; add --prefix bos, or leave it out"
        )
    check_storage(kernel, packed_kv, recipe, checkpoint)
    config = read_config(directory)
    text_config = config.get_text_config(decoder=True)
    recipe = fitting_kv(recipe, checkpoint, text_config)
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float16
    dtype = dtype or (torch.float32 if device.type == "cpu" else own)
    tokenizer = load_tokenizer(directory)
    context = getattr(text_config, "max_position_embeddings", None)
    found = auto_search(recipe.prefix)
    named = choose_prefix(recipe.prefix, tokenizer, checkpoint.family_name) if found is None else None
    # A prefix that a file holds is passed on without the model's weights, which may be in another program's layout.
    if manifest is None and (makes != "prefix" or named is None or named.file is None):
        DenseCheckpoint(directory).check()
    if makes == "checkpoint":
        check_makes_something(directory, recipe)
    if manifest is None and (recipe.makes_checkpoint or recipe.kv_cache is not None):  # before a text is asked for
        check_suited(empty_model_of(config), recipe, reads_text=False)  # which is looked at below, where it is
    search = None if found is None else default_search(checkpoint, tokenizer, context, *found)
    plan = Plan(
        checkpoint,
        recipe,
        named,
        search,
        tokenizer,
        dtype,
        device,
        vanilla,
        kernel,
        context,
        spread,
        max_memory,
        packed_kv and recipe.kv_cache is not None,
        given_kv,
    )
    if named is not None:
        check_prefix(named, checkpoint, context)
    needs_text = plan.makes_weights_of_text and makes in ("run", "checkpoint", "kv")
    if (needs_text or (plan.makes_kv and makes in ("run", "kv"))) and plan.text is not None:  # which must be there
        plan.check_calibration(1 if named is None else len(named.ids))
    if named is not None or vanilla:
        check_needed(named or PrefixChoice(recipe.prefix, "[A]", ()), checkpoint, recipe, vanilla)
    if named is not None and named.file is not None:  # now, and not after hours of quantizing
        prefix = Prefix.load(named.file)
        plan = replace(plan, named=fitting(named, prefix, checkpoint, plan.bases_of))
        if makes == "run" or (makes == "checkpoint" and recipe.calibrate_behind_prefix):
            name_other_weights(prefix, named.file, plan.describe())
    check_kv(plan, config, makes)
    return plan
