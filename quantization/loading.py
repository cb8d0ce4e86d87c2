"""From a directory and a recipe to a model that runs: quantize on the way, reuse what exists, bring the prefix.

Order of work: quantized checkpoint (made if it is not there), prefix (written by the full-precision twin, which is
then dropped), and only then the quantized model, so that two models are never held at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from corpora.catalog import model_defaults
from corpora.errors import UserError
from corpora.paths import modelzoo_dir
from corpora.storage import checkpoint_fingerprint, identity, read_json
from corpora.text import calibration_segments
from intactkv.attach import IntactModel, attach
from quantization.checkpoint import MANIFEST, DenseCheckpoint, is_quantized, load_quantized
from quantization.pipeline import artefact_identity, basis_of, quantize_checkpoint
from quantization.prefixes import PrefixChoice, choose_prefix, stored_prefix
from quantization.recipe import PUBLISHED_GROUP, Recipe, describe

__all__ = ["Checkpoint", "Runner", "find_checkpoint", "load_runner", "load_tokenizer", "quantized_directory"]


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
        manifest = read_json(directory / MANIFEST, "quantization manifest")
        name = f"{manifest['source']['name']}/{directory.name}"
        return Checkpoint(directory, name, manifest["source"]["fingerprint"], manifest)
    DenseCheckpoint(directory)
    return Checkpoint(directory, directory.resolve().name, checkpoint_fingerprint(directory), None)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that stands beside the weights. Raises UserError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} holds no tokenizer that transformers can open ({str(error).splitlines()[0]}); "
                        "copy tokenizer.json and tokenizer_config.json beside the weights") from None


def with_model_defaults(recipe: Recipe, checkpoint: Checkpoint, settings: list[str]) -> list[str]:
    """Settings with the model's own group size in front, where the recipe has the published 128."""
    own = model_defaults(checkpoint.family_name).group_size
    if recipe.weights is not None and recipe.weights.grid.group_size == PUBLISHED_GROUP != own:
        return [f"weights.grid.group_size={own}", *settings]
    return settings


@dataclass(frozen=True)
class Runner:
    """A model ready to run behind its prefix, and the record of what it is."""

    model: IntactModel
    tokenizer: PreTrainedTokenizerBase
    choice: PrefixChoice
    vanilla: bool
    description: dict[str, Any]


def describe_run(checkpoint: Checkpoint, recipe: Recipe, choice: PrefixChoice, vanilla: bool, dtype: torch.dtype,
                 device: torch.device, packed: bool) -> dict[str, Any]:
    """What a run's model is, for its record and identity: nothing that changes a figure is left out."""
    weights = checkpoint.manifest["recipe"] if checkpoint.manifest else describe(recipe)
    if checkpoint.manifest:
        made_of = {"checkpoint": checkpoint.manifest["identity"]}
    else:
        made_of = recipe.weights_identity() | {"calibration": describe(recipe.calibration)
                                               if recipe.calibrates else None}
    return {
        "model": checkpoint.family_name,
        "fingerprint": checkpoint.fingerprint,
        "weights": checkpoint.manifest["label"] if checkpoint.manifest else recipe.label(),
        "made_of": made_of,
        "recipe": {k: v for k, v in weights.items() if k not in ("kv_cache", "prefix")},
        "kv": describe(recipe.kv_cache),
        "prefix": {"label": choice.label, "ids": list(choice.ids), "intact": bool(choice.ids) and not vanilla},
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "packed": packed,
    }


def quantized_directory(checkpoint: Checkpoint, recipe: Recipe, segments: torch.Tensor | None,
                        prefix_ids: torch.Tensor | None) -> Path:
    """Where a recipe's checkpoint is kept: modelzoo/quantized/{model}/{label}-{identity}."""
    made_of = artefact_identity(checkpoint.fingerprint, recipe, segments, prefix_ids)
    return modelzoo_dir() / "quantized" / checkpoint.name / f"{recipe.label()}-{identity(made_of)}"


def calibration_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    """The calibration segments that a recipe asks for, (N, T); None if nothing calibrates."""
    if not recipe.calibrates:
        return None
    c = recipe.calibration
    return calibration_segments(tokenizer, c.corpus, samples=c.samples, length=c.length, seed=c.seed)


def load_runner(directory: Path, recipe: Recipe, *, device: torch.device, dtype: torch.dtype | None = None,
                vanilla: bool = False, packed: bool = False) -> Runner:
    """Load a dense or quantized checkpoint under a recipe, with its KV policy and its prefix.

    dtype: None takes float32 on a CPU and the checkpoint's own elsewhere. vanilla: the prefix's tokens stand in front,
    but the quantized model computes them itself (the arm to compare with).
    """
    checkpoint = find_checkpoint(directory)
    if checkpoint.manifest and recipe.changes_weights:
        raise UserError(f"{directory} is quantized already ({checkpoint.manifest['label']}); give its dense checkpoint "
                        f"to --recipe {recipe.label()}, or leave --recipe out")
    tokenizer = load_tokenizer(directory)
    config = AutoConfig.from_pretrained(directory)
    dtype = dtype or (torch.float32 if device.type == "cpu" else config.dtype or torch.float16)
    choice = choose_prefix(recipe.prefix, tokenizer, checkpoint.family_name)
    _refuse_missing_prefix(checkpoint, recipe, choice, vanilla)
    segments = calibration_of(recipe, tokenizer)
    prefix_ids = torch.tensor(choice.ids) if recipe.calibrate_behind_prefix else None
    source, basis = checkpoint.directory, checkpoint.manifest["basis"] if checkpoint.manifest else "plain"
    if recipe.changes_weights:
        source = quantized_directory(checkpoint, recipe, segments, prefix_ids)
        quantize_checkpoint(checkpoint.directory, recipe, source, segments=segments, prefix_ids=prefix_ids,
                            device=device, fingerprint=checkpoint.fingerprint)
        basis = basis_of(checkpoint.fingerprint, recipe, segments, prefix_ids)

    prefix = None
    if choice.ids and not vanilla:
        prefix = stored_prefix(
            choice, model_name=checkpoint.family_name, dtype=dtype,
            made_of={"source": checkpoint.fingerprint, "basis": basis},
            twin=lambda: _load(_twin_directory(checkpoint, recipe, segments, prefix_ids, device), dtype, device, False),
        )
    model = _load(source, dtype, device, packed)
    return Runner(attach(model, prefix, recipe.kv_cache), tokenizer, choice, vanilla,
                  describe_run(checkpoint, recipe, choice, vanilla, dtype, device, packed))


def _refuse_missing_prefix(checkpoint: Checkpoint, recipe: Recipe, choice: PrefixChoice, vanilla: bool) -> None:
    """Weights calibrated behind a prefix are only right with it: the pivots' own error grew."""
    needed = checkpoint.manifest["needs_prefix"] if checkpoint.manifest else None
    if needed is not None and (vanilla or list(choice.ids) != needed):
        raise UserError(f"{checkpoint.directory} was calibrated behind a prefix of {len(needed)} tokens and is refused "
                        "without it; run it with the same --prefix")
    if recipe.calibrate_behind_prefix and vanilla:
        raise UserError("a checkpoint calibrated behind a prefix has no vanilla arm: without the prefix the pivots' "
                        "own error grows")


def _twin_directory(checkpoint: Checkpoint, recipe: Recipe, segments: torch.Tensor | None,
                    prefix_ids: torch.Tensor | None, device: torch.device) -> Path:
    """The directory of the full-precision twin: the dense checkpoint, or its transformed form."""
    if checkpoint.manifest is not None:
        dense = checkpoint.directory.parent / checkpoint.manifest["source"]["directory"]
        same = (dense / "config.json").is_file() and checkpoint_fingerprint(dense) == checkpoint.fingerprint
        if checkpoint.manifest["basis"] != "plain" or not same:
            raise UserError(f"the full-precision twin of {checkpoint.directory} is not at hand, so its prefix cannot "
                            "be built; build it where the dense checkpoint is (python -m intactkv build) and give "
                            "the file: --prefix FILE.safetensors")
        return dense
    twin = recipe.twin
    if not twin.changes_weights:
        return checkpoint.directory
    target = quantized_directory(checkpoint, twin, segments, prefix_ids)
    return quantize_checkpoint(checkpoint.directory, twin, target, segments=segments, prefix_ids=prefix_ids,
                               device=device, fingerprint=checkpoint.fingerprint)


def _load(directory: Path, dtype: torch.dtype, device: torch.device, packed: bool) -> PreTrainedModel:
    """A dense or quantized checkpoint as a model in evaluation mode."""
    if is_quantized(directory):
        return load_quantized(directory, packed=packed, dtype=dtype, device=device)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)
