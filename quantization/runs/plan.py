"""From a directory and a recipe to a model that runs: quantize on the way, reuse what exists, bring the prefix.

`plan_run` settles what a run is from configurations and file headers: no weights are loaded, no text is tokenized (its
description is the identity of the run's record). `Plan.load` does the work: the discovery behind `--prefix auto`, the
quantized checkpoint, the prefix (written by the full-precision twin, which is then dropped), each made if it is not
there; and only then the quantized model, so that two models are never held at once.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from corpora.errors import UserError
from corpora.files import sha256_of_file
from corpora.paths import modelzoo_dir
from corpora.storage import identity
from corpora.text import calibration_segments, packed_documents
from corpora.writing import drop_dead_lock
from intactkv.attach import IntactModel, attach
from intactkv.prefix import Prefix
from quantization.labels import full_label
from quantization.recipes.protocols import restored
from quantization.recipes.recipe import Recipe, describe
from quantization.runs.auto_prefix import Search, default_search, find
from quantization.runs.checkpoint import PARTS, Checkpoint, dense_directory, find_checkpoint, read_cost, read_manifest
from quantization.runs.dense import DenseCheckpoint, read_config
from quantization.runs.fitting import (
    check_discovered,
    check_fits,
    check_needed,
    check_prefix,
    fitting,
    name_other_weights,
)
from quantization.runs.identities import Artefact, artefact_of, by_tokens, identity_of_prefix, identity_of_text
from quantization.runs.kept import bound_kv, fitting_kv
from quantization.runs.opening import is_rescaled, load_model, load_tokenizer, rescaled
from quantization.runs.pipeline import identity_at, partial_of, quantize_checkpoint
from quantization.runs.prefixes import (
    PrefixChoice,
    auto_search,
    choose_prefix,
    keep_prefix,
    prefix_file,
    stored_prefix,
)

__all__ = ["Plan", "plan_run"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Everything about a run that is known before a model is loaded. Made by `plan_run`.

    named: the prefix, unless it is `auto`; search: what `auto` looks at. vanilla: the prefix's tokens stand in front,
    but the quantized model computes them itself (the arm to compare with). packed: keep quantized weights packed in
    memory.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    named: PrefixChoice | None
    search: Search | None
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: torch.device
    vanilla: bool
    packed: bool
    context: int | None  # positions the model has, None if its configuration does not say
    spread: bool = False  # over all GPUs, for a model larger than one
    max_memory: int | None = None  # bytes that it may take of each of them, None for all there are
    packed_kv: bool = False  # keep the KV cache's codes, not numbers

    # What is known without running anything ---------------------------------------------------------------------------

    @property
    def has_prefix(self) -> bool:
        """Whether tokens stand in front."""
        return self.named is None or bool(self.named.ids)

    @cached_property
    def artefact(self) -> Artefact:
        """The checkpoint that the recipe makes, by its identity."""
        return self.artefact_of(self.recipe)

    @property
    def basis(self) -> str:
        """The basis of K and V in the model that will run."""
        if self.checkpoint.manifest is not None:
            return str(self.checkpoint.manifest["basis"])
        # That of a rescaled model follows from the quantizing and its text, any other from the twin, which needs none.
        return self.artefact.basis if self.recipe.rescales else self.artefact_of(self.recipe.twin).basis

    def bases_of(self, fingerprint: str) -> list[str]:
        """Those that the keys and values of a prefix from a file may be in, if the model went by that fingerprint; the
        one of what this plan would make first."""
        plan = replace(self, checkpoint=replace(self.checkpoint, fingerprint=fingerprint))
        bases, recipe = [plan.basis], plan.recipe
        if (
            recipe.rescales and plan.text is not None
        ):  # a checkpoint that was named by its tokens has a basis of its own
            made = plan.directory_of(recipe).parent.glob(f"{recipe.label()}-*")
            bases += [read_manifest(directory)["basis"] for directory in made if identity_at(directory) is not None]
        return bases

    def directory_of(self, recipe: Recipe) -> Path:
        """Where a recipe's checkpoint is kept: modelzoo/quantized/{model}/{label}-{identity}, where one of any label
        is found by its identity; its own directory if it makes none."""
        if self.checkpoint.manifest is not None or not recipe.makes_checkpoint:
            return self.checkpoint.directory
        return self._directory(recipe, self.artefact_of(recipe))

    def describe(self) -> dict[str, Any]:
        """What will run, for records and their identity: nothing that changes a figure is left out."""
        manifest, recipe = self.checkpoint.manifest, self.recipe
        if manifest is not None:
            made_of = manifest["made_of"]
        elif recipe.makes_checkpoint:
            made_of = self.artefact.made_of
        else:
            made_of = {"source": self.checkpoint.fingerprint}
        prefix: dict[str, Any] = {"label": "[A]", "ids": None, "file": None}
        if self.search is not None:
            prefix["auto"] = self._auto
        else:
            assert self.named is not None
            file = self.named.file
            prefix = {"label": self.named.label, "ids": list(self.named.ids), "file": file and sha256_of_file(file)}
        return (
            {
                "model": self.checkpoint.family_name,
                "weights": manifest["label"] if manifest is not None else self.checkpoint.exported or recipe.label(),
                "made_of": made_of,
                "recipe": manifest["recipe"] if manifest is not None else describe(recipe),
                "kv": describe(recipe.kv_cache),
                "prefix": prefix | {"intact": self.has_prefix and not self.vanilla},
                "dtype": str(self.dtype).removeprefix("torch."),
                "device": self.device.type,
                "packed": self.packed,
            }
            | ({"spread": True} if self.spread else {})
            | ({"kv_storage": "packed"} if self.packed_kv else {})
        )

    def check_fits(self, option: str, tokens: int) -> None:
        """Raise UserError if so many tokens, with what stands in front of them, are more than the model's positions.

        option: which one to change, with its value.
        """
        check_fits(self.checkpoint, self.context, option, tokens)

    def check_calibration(self, front: int) -> None:
        """Raise UserError for calibration text that does not fit the model. front: tokens of the prefix."""
        length, behind = self.recipe.calibration.length, self.recipe.calibrate_behind_prefix
        self.check_fits(f"--calibration-length {length}", length + (front if behind else 0))

    @cached_property
    def _auto(self) -> str:
        assert self.search is not None
        return identity(self.search.made_of)

    @cached_property
    def _behind(self) -> Mapping[str, Any] | None:
        """What identifies the prefix that calibration runs behind; None if it runs without."""
        if not self.recipe.calibrate_behind_prefix:
            return None
        if self.search is not None:
            return {"prefix": {"auto": self._auto}}
        behind = self.behind
        assert behind is not None
        return identity_of_prefix(behind)

    @cached_property
    def text(self) -> Mapping[str, Any] | None:
        """What identifies the calibration text, None if nothing calibrates. Raises UserError if it is not there; who
        only builds a prefix may never ask."""
        if self.checkpoint.manifest is not None or not self.recipe.calibrates:
            return None
        return identity_of_text(self.recipe.calibration, self.tokenizer)

    def artefact_of(self, recipe: Recipe) -> Artefact:
        """The checkpoint that a recipe makes of this model and this text, by its identity."""
        calibrates = recipe.calibrates
        return artefact_of(
            self.checkpoint.fingerprint, recipe, self.text if calibrates else None, self._behind if calibrates else None
        )

    def _directory(self, recipe: Recipe, artefact: Artefact) -> Path:
        zoo, name = modelzoo_dir() / "quantized" / self.checkpoint.name, artefact.identity
        for known in sorted(zoo.glob(f"*-{name}")) + sorted(zoo.glob(f"*-{name}.partial")):
            if identity_at(known) == name:  # whatever it was called in front of that
                return known.with_name(known.name.removesuffix(".partial"))
        return zoo / f"{full_label(recipe)}-{name}"

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
        if not self.recipe.calibrates or self.checkpoint.manifest is not None:
            return None
        self.check_calibration(len(self.choice.ids) if self.recipe.calibrate_behind_prefix else 0)
        c = self.recipe.calibration
        draw = packed_documents if c.draw == "documents" else calibration_segments
        return draw(self.tokenizer, c.corpus, samples=c.samples, length=c.length, seed=c.seed)

    @cached_property
    def behind(self) -> torch.Tensor | Prefix | None:
        """Ids of the prefix that calibration runs behind, (P,), or a trained prefix; None if it runs without."""
        if not self.recipe.calibrate_behind_prefix:
            return None
        prefix = Prefix.load(self.choice.file) if self.choice.file is not None else None
        return torch.tensor(self.choice.ids) if prefix is None or prefix.calibrated is None else prefix

    def load(self) -> IntactModel:
        """Make what is missing (quantized checkpoint, prefix) and load the model behind its prefix."""
        intact = bool(self.choice.ids) and not self.vanilla  # `auto` is discovered before anything is quantized
        source = self.written(self.recipe)
        prefix, built = self._prefix() if intact else (None, False)
        model = self._open(source, self.packed)
        attached = attach(model, prefix, bound_kv(self.recipe, model, self.packed_kv))
        if prefix is not None and built:  # nothing is kept for a checkpoint that is refused
            self._keep(prefix)
        return attached

    def _open(self, directory: Path, packed: bool = False) -> PreTrainedModel:
        """A dense or quantized checkpoint as a model, where this plan computes."""
        return load_model(directory, self.dtype, self.device, packed, self.spread, self.max_memory)

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
        segments = self.segments if recipe.calibrates else None
        behind = self.behind if recipe.calibrate_behind_prefix else None
        if recipe.calibrates:  # checkpoints were once named by the tokens of their text
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

    def outcome(self) -> dict[str, Any]:
        """What a run's record says of what it found or made: what the quantized checkpoint took (None for a dense
        one), and the tokens that `auto` stands for. Call it after `load`."""
        made = self.checkpoint.manifest is not None or self.recipe.makes_checkpoint
        cost = read_cost(self.written(self.recipe)) if made else None
        told = {"quantization": cost and {name: value for name, value in cost.items() if name != "sha256"}}
        return told if self.search is None else {**told, "prefix_ids": list(self.choice.ids)}

    def intact_prefix(self) -> Prefix:
        """The intact prefix: from its file, or written now by the full-precision twin."""
        prefix, built = self._prefix()
        if built:
            self._keep(prefix)
        return prefix

    def _prefix(self) -> tuple[Prefix, bool]:
        """The intact prefix, and whether it was built now and is not kept yet."""
        basis = self._written_basis
        return stored_prefix(self.choice, self.prefix_file(basis), self._made_of(basis), self.dtype, self.twin)

    def _keep(self, prefix: Prefix) -> None:
        keep_prefix(prefix, self.choice, self.prefix_file(self._written_basis))

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
    packed: bool = False,
    spread: bool = False,
    max_memory: int | None = None,
    packed_kv: bool = False,
    makes: str = "run",
) -> Plan:
    """Look at a dense or quantized checkpoint, or its directory, and settle what a recipe means for it.

    Configurations and file headers are read, and files of text and tokenizer hashed; nothing is loaded, tokenized or
    discovered. spread: put one model on all GPUs; max_memory: bytes of each, None for all. packed_kv: keep the KV
    cache's codes. dtype: None takes float32 on
    a CPU and the checkpoint's own elsewhere. makes: what the plan is for (`quantization.runs.preview.preview`); only a
    run and a checkpoint need the recipe's text, and a prefix that a file holds needs no weights.
    Raises UserError for a combination that cannot be, such as a recipe for weights that are quantized already.
    """
    checkpoint = source if isinstance(source, Checkpoint) else find_checkpoint(source)
    directory, manifest = checkpoint.directory, checkpoint.manifest
    if manifest is not None and replace(recipe, kv_cache=None).makes_checkpoint:
        raise UserError(
            f"{directory} is quantized already ({manifest['label']}); give its dense checkpoint to --recipe "
            f"{recipe.label()}, or leave --recipe out"
        )
    if vanilla and recipe.prefix == "none":
        raise UserError(
            "--vanilla compares with an intact prefix, but none was named; add --prefix bos, or leave it out"
        )
    config = read_config(directory)
    text_config = config.get_text_config(decoder=True)
    recipe = fitting_kv(recipe, checkpoint, text_config)
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float16
    dtype = dtype or (torch.float32 if device.type == "cpu" else own)
    tokenizer = load_tokenizer(directory)
    context = getattr(text_config, "max_position_embeddings", None)
    named, search = None, None
    if (found := auto_search(recipe.prefix)) is not None:
        search = default_search(checkpoint, tokenizer, context, *found)
    else:
        named = choose_prefix(recipe.prefix, tokenizer, checkpoint.family_name)
    # A prefix that a file holds is passed on without the model's weights, which may be in another program's layout.
    if manifest is None and (makes != "prefix" or named is None or named.file is None):
        DenseCheckpoint(directory).check()
    plan = Plan(
        checkpoint,
        recipe,
        named,
        search,
        tokenizer,
        dtype,
        device,
        vanilla,
        packed,
        context,
        spread,
        max_memory,
        packed_kv and recipe.kv_cache is not None,
    )
    if named is not None:
        check_prefix(named, checkpoint, context)
    if makes in ("run", "checkpoint") and plan.text is not None:  # which must be there
        plan.check_calibration(1 if named is None else len(named.ids))
    if named is not None or vanilla:
        check_needed(named or PrefixChoice(recipe.prefix, "[A]", ()), checkpoint, recipe, vanilla)
    if named is not None and named.file is not None:  # now, and not after hours of quantizing
        prefix = Prefix.load(named.file)
        plan = replace(plan, named=fitting(named, prefix, checkpoint, plan.bases_of))
        if makes == "run" or (makes == "checkpoint" and recipe.calibrate_behind_prefix):
            name_other_weights(prefix, named.file, plan.describe())
    return plan
