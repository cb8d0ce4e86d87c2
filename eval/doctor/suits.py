"""What a model directory holds and which methods run on it: from its configuration and the headers of its files.

The same checks as before a run decide (`quantization.runs.suited`); no weight is read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from corpora.errors import UserError, one_line
from corpora.storage import weight_files
from eval.tables.departures import WINDOW
from intactkv.architecture import ARCHITECTURES, Architecture, architecture_of, heads_of
from intactkv.cache import IntactCache
from intactkv.peft import is_adapter
from quantization.export.fused import check_packed
from quantization.export.writer import FORMATS, check_format, check_weights_alone
from quantization.grids.uniform import UniformGrid
from quantization.kv_cache import KV_POLICIES
from quantization.named import RECIPES
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import is_quantized, read_manifest
from quantization.runs.configuration import CONFIG
from quantization.runs.damage import FLOATS, listed
from quantization.runs.dense import DenseCheckpoint, empty_model_of, read_config, tied_names
from quantization.runs.fitting import check_fits
from quantization.runs.opening import load_tokenizer
from quantization.runs.pipeline import check_makes_something
from quantization.runs.prefixes import AUTO, choose_prefix
from quantization.runs.suited import refusal, unlike_blocks
from quantization.weights.rtn import RTN

__all__ = ["KINDS", "Checked", "Method", "check", "laid_out"]

Kind = Literal["recipe", "kv", "prefix", "export", "eval"]
KINDS = {
    "recipe": "recipes",
    "kv": "KV policies",
    "prefix": "prefixes",
    "export": "exports of quantized weights",
    "eval": "measurements",
}
KV_BITS = 4
WHOLE = "whole, by their headers: every tensor is there, in its shape"


@dataclass(frozen=True)
class Method:
    """One thing that could be done with the model. reason: why it cannot, in one line; None for what runs."""

    kind: Kind
    name: str
    reason: str | None


@dataclass(frozen=True)
class Checked:
    """A model directory. facts: what it is, in words, by their names. damage: what is wrong with its files, in one
    line; None for whole ones."""

    directory: str
    facts: dict[str, str | int] = field(default_factory=dict)
    damage: str | None = None
    methods: tuple[Method, ...] = ()

    @property
    def files(self) -> str:
        """How far the headers of the files were compared."""
        if "quantized" in self.facts:
            return "of a quantized checkpoint of ours, whose sums are compared whenever it is opened"
        return WHOLE if self.facts["family"] in ARCHITECTURES else "readable; only a row tells whether all are there"

    @property
    def runs(self) -> bool:
        """Whether anything does."""
        return self.damage is None and any(method.reason is None for method in self.methods)


def check(directory: Path) -> Checked:
    """Look at a directory. Raises UserError for what is no causal language model that transformers knows."""
    dense, damage = _opened(directory)
    model = empty_model_of(read_config(directory))
    left: tuple[str, ...] = ()
    if dense is not None:
        try:
            if _has_row(model):
                left = dense.weights(model).left
            else:
                dense.refuse_layout()
        except UserError as error:
            damage = one_line(str(error))
    facts = _facts(directory, model, dense)
    if left:
        facts["not read"] = f"{len(left)} tensor{'s' * (len(left) > 1)} of the files: {listed(left)}"
    return Checked(str(directory), facts, damage, tuple(_methods(directory, model, dense)))


def _opened(directory: Path) -> tuple[DenseCheckpoint | None, str | None]:
    """The files of a dense checkpoint, or what is wrong with them; neither for a quantized checkpoint of ours. Raises
    UserError for no model."""
    if directory.is_dir() and is_quantized(directory):
        return None, None
    try:
        return DenseCheckpoint(directory), None
    except UserError as error:
        if is_adapter(directory) or not (directory / CONFIG).is_file():
            raise
        return None, one_line(str(error))


def _has_row(model: PreTrainedModel) -> bool:
    return model.config.model_type in ARCHITECTURES


def _said(look: Callable[[], object]) -> str | None:
    """What a check raises, in one line."""
    try:
        look()
    except UserError as error:
        return one_line(str(error))
    return None


# What it is -----------------------------------------------------------------------------------------------------------


def _facts(directory: Path, model: PreTrainedModel, dense: DenseCheckpoint | None) -> dict[str, str | int]:
    config = model.config.get_text_config(decoder=True)
    heads, size = heads_of(model.config)
    tied = tied_names(model)
    count = sum(p.numel() for name, p in model.named_parameters() if name not in tied)
    facts: dict[str, str | int] = {"family": model.config.model_type}
    if _has_row(model):
        facts["laid out"] = laid_out(architecture_of(model.config))
    else:
        facts["laid out"] = "unknown: the family has no row in the architecture table"
    facts |= {"parameters": count, "blocks": int(config.num_hidden_layers), "hidden size": int(config.hidden_size)}
    facts |= {"KV heads": heads, "channels of a head": size, "vocabulary": int(config.vocab_size)}
    if (context := getattr(config, "max_position_embeddings", None)) is not None:
        facts["positions"] = int(context)
    if (window := _window(model)) is not None:
        facts["sliding window"] = window
    if is_quantized(directory):
        manifest = read_manifest(directory)
        facts["quantized"] = str(manifest["label"])
        if manifest["needs_prefix"] is not None:
            facts["calibrated behind"] = f"--prefix {manifest['recipe']['prefix']}; every program needs it"
    item = model.dtype.itemsize
    if dense is not None:
        stored = sorted({dtype for _, dtype in dense.headers(dense.names()).values()})
        facts["stored as"] = ", ".join(stored)
        facts["bytes of weights"] = sum(file.stat().st_size for file in weight_files(directory))
        item = max((FLOATS[word].itemsize for word in stored if word in FLOATS), default=item)
    if _has_row(model):
        block = max(sum(p.numel() for p in one.parameters()) for one in architecture_of(model.config).blocks_of(model))
        facts["bytes of one block"] = block * item
    return facts


def laid_out(row: Architecture) -> str:
    """What methods see in place of transformers' own modules, in words."""
    return "; ".join(_parts(row)) or "nothing: every matrix is a linear"


def _parts(row: Architecture) -> Iterator[str]:
    for fused in row.fused:
        parts = f" as {', '.join(fused.parts)}" if fused.parts else ""
        yield f"{fused.module}{parts}{' (stored as input × output)' if fused.transposed else ''}"
    if row.experts is not None:
        one = row.experts
        yield f"{one.module} as {one.count} experts of {', '.join((*one.inputs, one.output))}"


def _window(model: PreTrainedModel) -> int | None:
    try:
        return IntactCache(model.config).smallest_window
    except UserError:
        return None


# What runs ------------------------------------------------------------------------------------------------------------


def _methods(directory: Path, model: PreTrainedModel, dense: DenseCheckpoint | None) -> Iterator[Method]:
    quantized = is_quantized(directory)
    blocks, no_row = unlike_blocks(model), _said(partial(architecture_of, model.config))
    for name, row in RECIPES.items():
        recipe = row.recipe
        if quantized and recipe == Recipe():
            continue  # full precision, which it has not
        reason = no_row if recipe.makes_checkpoint else None  # said once: the families that are like it take a while
        if reason is None and recipe.makes_checkpoint and (dense is not None or quantized):
            reason = _said(partial(check_makes_something, directory, recipe))
        yield Method("recipe", name, reason or refusal(model, recipe, blocks=blocks))
    for name, kind in KV_POLICIES.items():
        yield Method("kv", name, refusal(model, Recipe(kv_cache=kind(bits=KV_BITS))))
    behind = refusal(model, Recipe(), 1)
    for word in ("bos", "prompt"):
        yield Method("prefix", word, behind or _no_prefix(word, directory))
    yield Method("prefix", AUTO, behind or no_row)
    yield Method("prefix", '"text"', behind)
    if quantized:
        weights = _said(partial(check_weights_alone, directory))
    else:
        weights = no_row or refusal(model, Recipe(weights=RTN(UniformGrid(8, -1))), blocks=blocks)
    for name, form in FORMATS.items():
        packed = None if weights or form.config is None else _said(partial(check_packed, architecture_of(model.config)))
        held = _said(partial(check_format, directory, form)) if quantized and not (weights or packed) else None
        yield Method("export", name, weights or packed or held)
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    fits = partial(check_fits, f"this {model.config.model_type}", context, "--window", WINDOW, WINDOW)
    yield Method("eval", "ppl", _said(fits))


def _no_prefix(word: str, directory: Path) -> str | None:
    """Why the tokenizer has no such prefix."""
    return _said(lambda: choose_prefix(word, load_tokenizer(directory), directory.name))
