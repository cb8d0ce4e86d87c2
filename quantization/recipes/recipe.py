"""A recipe says everything that is done to a model (`quantization.named` is the table of the papers' recipes).

Weights, prefix and KV cache are three things: transforms, weights, activations and training (with what they calibrate
on) make the quantized checkpoint and its identity, the KV policy and the prefix are chosen when it runs. What a KV
policy calibrates to is an artefact of its own (`quantization.runs.kv_artefact`), unless weights are trained with it.
"""

import math
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

from corpora import values
from corpora.errors import UserError
from corpora.files import plain_file, sha256_of_file
from intactkv.policy import KVPolicy
from quantization.model.activations import Activations
from quantization.model.attention import AttentionProducts
from quantization.recipes.protocols import BlockTuning, Transform, WeightQuantizer

__all__ = ["Calibration", "Recipe", "added", "describe", "with_settings"]


@dataclass(frozen=True)
class Calibration:
    """What a method calibrates on: `samples` pieces of `length` tokens, drawn from a corpus with a seed.

    draw: "segments" takes random pieces of the text; "documents" packs `samples` whole short documents into pieces.
    """

    corpus: str = "c4"
    samples: int = 128
    length: int = 2048
    seed: int = 42
    draw: str = "segments"

    def __post_init__(self) -> None:
        if self.draw not in ("segments", "documents"):
            raise UserError(f"calibration.draw={self.draw} is not known; choose segments or documents")
        for field_name in ("samples", "length"):
            if getattr(self, field_name) < 1:
                raise UserError(f"calibration.{field_name}={getattr(self, field_name)} is not allowed; give 1 or more")


@dataclass(frozen=True)
class Recipe:
    """transforms: exact rewrites, in this order; those that rescale come last. weights, activations (inputs of the
    linears), attention (what enters its two products), kv_cache: None keeps full precision. tuning: block-wise training
    with these at work.

    calibration: used if anything calibrates. calibrate_behind_prefix: stream that text behind the full-precision prefix
    (`prefix`); what calibrates is then only right with it. prefix: a default for the run time.
    """

    transforms: tuple[Transform, ...] = ()
    weights: WeightQuantizer | None = None
    activations: Activations | None = None
    attention: AttentionProducts | None = None
    tuning: BlockTuning | None = None
    kv_cache: KVPolicy | None = None
    prefix: str = "none"
    calibration: Calibration = Calibration()
    calibrate_behind_prefix: bool = False

    def __post_init__(self) -> None:
        if self.calibrate_behind_prefix and not self.calibrates:
            raise UserError(
                f"calibrate_behind_prefix=true has nothing to act on: {self.method} needs no calibration; leave it out"
            )
        if self.calibrate_behind_prefix and self.prefix == "none":
            raise UserError("calibrate_behind_prefix=true needs a prefix; choose one, for example --prefix bos")
        if self.tuning is not None:
            self.tuning.check(self.weights)
        order = [step.rescales for step in self.transforms]
        if order != sorted(order):
            raise UserError(
                f"the transforms {', '.join(step.name for step in self.transforms)} are in the wrong order: those that "
                "rescale come behind those that rotate"
            )

    @property
    def method(self) -> str:
        """What chooses the weights, in a word."""
        return self.weights.name if self.weights else "full precision"

    @property
    def calibrates(self) -> bool:
        """Whether anything in this recipe looks at calibration text."""
        return self.kv_calibrates or any(
            step.calibrates for step in (*self.transforms, self.weights, self.activations, self.tuning) if step
        )

    @property
    def kv_calibrates(self) -> bool:
        """Whether the KV policy has tensors of its own for every block."""
        return self.kv_cache is not None and self.kv_cache.calibrates

    @property
    def trains_kv(self) -> bool:
        """Whether the weights are trained with the KV policy at work, so that the checkpoint depends on it and keeps
        its tensors."""
        return self.kv_cache is not None and (self.tuning is not None or self.trains_rounded)

    @property
    def checkpoint_part(self) -> "Recipe":
        """Of the recipe, what makes the checkpoint: the rest is chosen when it runs."""
        made = self if self.trains_kv else replace(self, kv_cache=None, calibrate_behind_prefix=False)
        return replace(made, calibrate_behind_prefix=self.calibrate_behind_prefix and made.calibrates)

    @property
    def makes_checkpoint(self) -> bool:
        """Whether the recipe makes another checkpoint; if not, the dense one is run as it is."""
        parts = (self.weights, self.activations, self.attention, self.tuning)
        return bool(self.transforms) or any(part is not None for part in parts)

    @property
    def rescales(self) -> bool:
        """Whether scales move between the full-precision weights in a way that the checkpoint remembers."""
        return any(step.rescales for step in (*self.transforms, self.weights) if step)

    @property
    def trains_rounded(self) -> bool:
        """Whether the weights' training sees rounded inputs, attention products and KV cache, as the model will. Only
        inputs by their own ranges: static ones are those of the finished block."""
        seen = self.tuning is None and self.weights is not None and self.weights.sees_rounding
        return seen and self.activations is not None and not self.activations.static

    @property
    def changes_kv(self) -> bool:
        """Whether keys and values are in another basis than the dense checkpoint's."""
        return any(t.changes_kv for t in self.transforms) or (self.weights is not None and self.weights.rescales)

    @property
    def twin(self) -> "Recipe":
        """The full-precision twin: every exact transform, no quantizer. Its K and V are in the recipe's basis, once it
        is rescaled as the quantized checkpoint was (those transforms are left out here)."""
        kept = tuple(step for step in self.transforms if not step.rescales)
        return Recipe(
            transforms=kept,
            prefix=self.prefix,
            calibration=self.calibration,
            calibrate_behind_prefix=self.calibrate_behind_prefix and any(step.calibrates for step in kept),
        )

    def weights_identity(self) -> dict[str, Any]:
        """All of the recipe that makes the checkpoint, for its identity."""
        made = self.checkpoint_part
        made_of: dict[str, Any] = {"transforms": describe(self.transforms), "weights": describe(self.weights)}
        for name in ("activations", "attention", "tuning"):
            if (part := getattr(self, name)) is not None:
                made_of[name] = describe(part)
        if self.trains_kv:
            made_of["kv_cache"] = describe(self.kv_cache)
        if self.weights is not None and self.weights.files:
            made_of["files"] = [sha256_of_file(plain_file(file)) for file in self.weights.files]
        if made.calibrates:
            made_of["calibration"] = describe(made.calibration)
            made_of["calibrate_behind_prefix"] = made.calibrate_behind_prefix
        return made_of

    def label(self) -> str:
        """Short readable name of the weights: `rtn-w4g64`, or `full` when they are full precision.

        A part of every record's identity, so it stays what it is; `quantization.labels` says more for readers.
        """
        words = [step.name for step in self.transforms]
        words.append("full" if self.weights is None else self.weights.label)
        words += [part.label for part in (self.activations, self.attention) if part is not None]
        if self.tuning is not None:
            words.append(self.tuning.name)
        return "-".join([*words, *(["behind"] if self.checkpoint_part.calibrate_behind_prefix else [])])


def added(default: Any, *before: Any) -> Any:
    """A field that a published dataclass gets later: where it says what held before it existed (`before`, or else its
    default), it stays out of descriptions, and so of every identity: what was made then is still found."""
    return field(default=default, metadata={"before": before or (default,)})


def _is_told(f: Field[Any], value: Any) -> bool:
    return f.init and value not in f.metadata.get("before", ())


def describe(value: Any) -> Any:
    """Plain JSON of a recipe or a part of it: dataclasses become {"kind": class name, field: value, …}.

    Identities are hashes of it. A field that was `added` is left out where it says what held before.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__} | {
            f.name: describe(getattr(value, f.name)) for f in fields(value) if _is_told(f, getattr(value, f.name))
        }
    if isinstance(value, tuple | list):
        return [describe(item) for item in value]
    return value


def with_settings(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Apply `field.subfield=value` settings, in order. Raises UserError for a wrong field or value."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: expected FIELD=VALUE, for example weights.grid.group_size=64")
        recipe = _set(recipe, path.split("."), text, setting)
    return recipe


def _set(part: Any, path: list[str], text: str, setting: str) -> Any:
    """A copy of a frozen dataclass with one (nested) field replaced; the text is read as the field's own type.

    A step of several (the transforms) goes by its name.
    """
    if isinstance(part, tuple) and part:
        if path[0] not in (named := [step.name for step in part]):
            raise UserError(f"--set {setting}: there is no {path[0]!r} in this recipe; it has {', '.join(named)}")
        if len(path) > 1:
            return tuple(_set(step, path[1:], text, setting) if step.name == path[0] else step for step in part)
        raise UserError(f"--set {setting}: name one of its fields, for example transforms.smooth.alpha=0.6")
    if not is_dataclass(part) or isinstance(part, type):
        raise UserError(f"--set {setting}: there is nothing below that field in this recipe")
    names = [f.name for f in fields(part) if f.init]
    if path[0] not in names:
        raise UserError(f"--set {setting}: {type(part).__name__} has no field {path[0]!r}; it has {', '.join(names)}")
    if len(path) > 1:
        value = _set(getattr(part, path[0]), path[1:], text, setting)
    else:
        kind, own = get_type_hints(type(part))[path[0]], type(part).__dataclass_fields__[path[0]]
        try:
            value = _read(text, kind, setting, infinite=own.metadata.get("infinite", False))
        except ArgumentTypeError as error:
            raise UserError(f"--set {setting}: {error}") from None
    return replace(part, **{path[0]: value})


LEAST, MOST = -values.MANY, values.MANY  # no field means more


def _read(text: str, kind: Any, setting: str, infinite: bool) -> Any:
    """A word as a field's value. infinite: whether `inf` means something there."""
    if type(None) in get_args(kind):
        if text == "none":
            return None
        kind = next(one for one in get_args(kind) if one is not type(None))
    if kind is bool:
        if text not in ("true", "false"):
            raise UserError(f"--set {setting}: expected true or false")
        return text == "true"
    if kind is int:
        return values.seed(text) if setting.partition("=")[0].endswith("seed") else values.count(LEAST, MOST)(text)
    if kind is float:
        return math.inf if infinite and text == "inf" else values.number(least=LEAST, most=MOST)(text)
    if kind is str:
        return values.name(text)
    raise UserError(
        f"--set {setting}: this field holds parts of its own; set one of those (for example weights.grid.bits)"
    )
