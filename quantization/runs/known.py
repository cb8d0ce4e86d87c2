"""What is known of a run before anything runs: names, identities and places, from configurations and file headers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from corpora.files import sha256_of_file
from corpora.paths import modelzoo_dir
from corpora.storage import identity
from intactkv.prefix import Prefix
from quantization.kv_cache import Policy
from quantization.labels import full_label
from quantization.model.text import given_batch
from quantization.recipes.recipe import Recipe, describe
from quantization.runs.auto_prefix import Search
from quantization.runs.checkpoint import Checkpoint, read_manifest
from quantization.runs.fitting import check_calibration, check_fits
from quantization.runs.identities import Artefact, artefact_of, identity_of_prefix, identity_of_text, kv_made_of
from quantization.runs.kept import held_kv
from quantization.runs.kv_artefact import KVArtefact, label_of
from quantization.runs.pipeline import identity_at
from quantization.runs.prefixes import PrefixChoice

__all__ = ["Known"]


@dataclass(frozen=True)
class Known:
    """Everything about a run that is known before a model is loaded. Made by `plan_run`.

    named: the prefix, unless it is `auto`; search: what `auto` looks at. vanilla: the prefix's tokens stand in front,
    but the quantized model computes them itself (the arm to compare with). kernel: keep quantized weights packed in
    memory, and multiply by this product. given_kv: what the KV policy was calibrated to, where a file of it was given.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    named: PrefixChoice | None
    search: Search | None
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: torch.device
    vanilla: bool
    kernel: str | None
    context: int | None  # positions the model has, None if its configuration does not say
    spread: bool = False  # over all GPUs, for a model larger than one
    max_memory: int | None = None  # bytes that it may take of each of them, None for all there are
    packed_kv: bool = False  # keep the KV cache's codes, not numbers
    given_kv: KVArtefact | None = None

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
                "weights": self.weights_label,
                "made_of": self.weights_made_of,
                "recipe": manifest["recipe"] if manifest is not None else describe(recipe),
                "kv": describe(recipe.kv_cache),
                "prefix": prefix | {"intact": self.has_prefix and not self.vanilla},
                "dtype": str(self.dtype).removeprefix("torch."),
                "device": self.device.type,
                "packed": self.kernel is not None,
            }
            # What unpacks computes the bits of the dequantized weights. Which products `auto` means is known once the
            # weights are read: here it stands beside the device, and `Plan.outcome` names the products.
            | ({} if self.kernel in (None, "unpack") else {"kernel": self.kernel})
            | ({"spread": True} if self.spread else {})
            | ({"kv_storage": "packed"} if self.packed_kv else {})
            | ({"kv_made_of": dict(made_of)} if (made_of := self.kv_made_of) is not None else {})
        )

    @property
    def weights_label(self) -> str:
        """Short readable name of the weights that run."""
        manifest = self.checkpoint.manifest
        return manifest["label"] if manifest is not None else self.checkpoint.exported or self.recipe.label()

    @property
    def weights_made_of(self) -> dict[str, Any]:
        """What identifies the weights that run."""
        if self.checkpoint.manifest is not None:
            return dict(self.checkpoint.manifest["made_of"])
        return self.artefact.made_of if self.recipe.makes_checkpoint else {"source": self.checkpoint.fingerprint}

    def check_fits(self, option: str, tokens: int, value: int | None = None) -> None:
        """`quantization.runs.fitting.check_fits`, of this model."""
        check_fits(self.checkpoint.name, self.context, option, tokens, value)

    def check_calibration(self, front: int) -> None:
        """Raise UserError for calibration text that does not fit the model, and for a batch of it that is no number.
        front: tokens of the prefix."""
        given_batch()
        check_calibration(self.recipe, front, self.checkpoint.name, self.context)

    @cached_property
    def _auto(self) -> str:
        assert self.search is not None
        return identity(self.search.made_of)

    def behind_of(self, choice: PrefixChoice) -> torch.Tensor | Prefix | None:
        """Ids of the prefix that calibration runs behind, (P,), or a trained prefix; None if it runs without."""
        if not self.recipe.calibrate_behind_prefix:
            return None
        prefix = Prefix.load(choice.file) if choice.file is not None else None
        return torch.tensor(choice.ids) if prefix is None or prefix.calibrated is None else prefix

    @cached_property
    def _behind(self) -> Mapping[str, Any] | None:
        """What identifies the prefix that calibration runs behind; None if it runs without."""
        if not self.recipe.calibrate_behind_prefix:
            return None
        if self.search is not None:
            return {"prefix": {"auto": self._auto}}
        assert self.named is not None
        behind = self.behind_of(self.named)
        assert behind is not None
        return identity_of_prefix(behind)

    @property
    def makes_kv(self) -> bool:
        """Whether the KV policy's tensors are an artefact that this run finds or makes: no file of it was given, and no
        checkpoint has or gets them."""
        recipe, manifest = self.recipe, self.checkpoint.manifest
        if not recipe.kv_calibrates or self.given_kv is not None:
            return False
        return not recipe.trains_kv if manifest is None else recipe.kv_cache != held_kv(self.checkpoint)

    @property
    def makes_weights_of_text(self) -> bool:
        """Whether the checkpoint that this run finds or makes is made of the calibration text."""
        return self.checkpoint.manifest is None and self.recipe.checkpoint_part.calibrates

    @cached_property
    def text(self) -> Mapping[str, Any] | None:
        """What identifies the calibration text, None if nothing calibrates. Raises UserError if it is not there; who
        only builds a prefix may never ask."""
        if not (self.makes_weights_of_text or self.makes_kv):
            return None
        return identity_of_text(self.recipe.calibration, self.tokenizer)

    @cached_property
    def kv_made_of(self) -> Mapping[str, Any] | None:
        """What identifies the artefact of the KV policy's tensors; None for a policy without, or one whose tensors are
        the checkpoint's."""
        if self.given_kv is not None:
            return self.given_kv.made_of
        if not self.makes_kv:
            return None
        policy, text = self.recipe.kv_cache, self.text
        assert policy is not None
        assert text is not None
        return kv_made_of(policy, self.weights_made_of, text, self._behind)

    @property
    def kv_file(self) -> Path:
        """Where this run's artefact of the KV policy's tensors lies, or will: under any label."""
        policy, made_of = self.recipe.kv_cache, self.kv_made_of
        assert isinstance(policy, Policy)
        assert made_of is not None
        zoo, name = modelzoo_dir() / "kv" / self.checkpoint.family_name, identity(dict(made_of))
        new = zoo / f"{label_of(policy, self.weights_label)}-{name}.safetensors"
        return next(iter(sorted(zoo.glob(f"*-{name}.safetensors"))), new)

    def artefact_of(self, recipe: Recipe) -> Artefact:
        """The checkpoint that a recipe makes of this model and this text, by its identity."""
        calibrates = recipe.checkpoint_part.calibrates
        return artefact_of(
            self.checkpoint.fingerprint, recipe, self.text if calibrates else None, self._behind if calibrates else None
        )

    def _directory(self, recipe: Recipe, artefact: Artefact) -> Path:
        zoo, name = modelzoo_dir() / "quantized" / self.checkpoint.name, artefact.identity
        for known in sorted(zoo.glob(f"*-{name}")) + sorted(zoo.glob(f"*-{name}.partial")):
            if identity_at(known) == name:  # whatever it was called in front of that
                return known.with_name(known.name.removesuffix(".partial"))
        return zoo / f"{full_label(recipe)}-{name}"
