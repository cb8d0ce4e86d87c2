"""A recipe says everything that is done to a model; the table of named recipes says what each paper did.

Weights, prefix and KV cache are three things: transforms and weights (with what they calibrate on) make the quantized
checkpoint and its identity, the KV policy and the prefix are chosen when it runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_type_hints

from corpora.errors import UserError
from corpora.storage import sha256_of_file
from intactkv.cache import KVPolicy
from quantization.binary_coding import BinaryGrid
from quantization.blocks import DecoderBlock
from quantization.grids import UniformGrid
from quantization.kv_cache import KV_POLICIES, PerHead
from quantization.stored import Grid, StoredWeight
from quantization.weights.awq import AWQ
from quantization.weights.bcq import BCQ, GPTQToBCQ
from quantization.weights.gptq import GPTQ
from quantization.weights.omniquant import OmniQuant
from quantization.weights.rtn import RTN
from quantization.weights.spqr import SpQR

__all__ = [
    "RECIPES",
    "Calibration",
    "NamedRecipe",
    "Recipe",
    "Transform",
    "WeightQuantizer",
    "describe",
    "kv_policy",
    "named_recipe",
    "with_settings",
]

PUBLISHED_GROUP = 128  # gives way to a model's own default where 128 does not divide its channels


class Transform(Protocol):
    """An exact rewrite of a block: scales, rotations. Must not change the model's function in full precision."""

    name: ClassVar[str]
    calibrates: ClassVar[bool]

    def transform_block(self, block: DecoderBlock) -> None:
        """Rewrite the block's weights in place."""
        ...


class WeightQuantizer(Protocol):
    """Chooses the points on the grid for the linears of one block.

    A frozen dataclass; every field is part of the checkpoint's identity and can be set with --set weights.FIELD=VALUE.
    """

    name: ClassVar[str]
    # The calibration text that it wants: passed on by quantized blocks (errors accumulate, the method can repair them),
    # by full-precision blocks, or both.
    reads: ClassVar[Literal["quantized", "full", "both"]]

    @property
    def grid(self) -> Grid:
        """The grid of the weights."""
        ...

    @property
    def calibrates(self) -> bool:
        """Whether it looks at calibration text."""
        ...

    @property
    def rescales(self) -> bool:
        """Whether it rewrites the full-precision weights (DecoderBlock.rescale), so that the twin is another model."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that decide the result; their content is part of the identity."""
        ...

    def check(self, block: DecoderBlock) -> None:
        """Raise UserError for a block without weights (meta device) whose shapes it cannot do."""
        ...

    def quantize_block(self, block: DecoderBlock) -> Mapping[str, StoredWeight]:
        """Every linear of the block in its stored form, by the linear's name within the block.

        Leaves the block in full precision (rescaled, if it does that).
        """
        ...


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


@dataclass(frozen=True)
class Recipe:
    """transforms: exact rewrites, in this order. weights: None keeps full precision. kv_cache: None likewise.

    calibration: used if a transform or the weights calibrate. calibrate_behind_prefix: stream that text behind the
    full-precision prefix (`prefix`); the checkpoint is then only right with it. prefix: a default for the run time.
    """

    transforms: tuple[Transform, ...] = ()
    weights: WeightQuantizer | None = None
    kv_cache: KVPolicy | None = None
    prefix: str = "none"
    calibration: Calibration = Calibration()
    calibrate_behind_prefix: bool = False

    def __post_init__(self) -> None:
        if self.calibrate_behind_prefix and not self.calibrates:
            method = self.weights.name if self.weights else "full precision"
            raise UserError(
                f"calibrate_behind_prefix=true has nothing to act on: {method} needs no calibration; leave it out"
            )
        if self.calibrate_behind_prefix and self.prefix == "none":
            raise UserError("calibrate_behind_prefix=true needs a prefix; choose one, for example --prefix bos")

    @property
    def calibrates(self) -> bool:
        """Whether anything in this recipe looks at calibration text."""
        return any(step.calibrates for step in (*self.transforms, self.weights) if step is not None)

    @property
    def changes_weights(self) -> bool:
        """Whether the recipe makes another checkpoint; if not, the dense one is run as it is."""
        return self.weights is not None or bool(self.transforms)

    @property
    def twin(self) -> "Recipe":
        """The full-precision twin: every exact transform, no quantizer. Its K and V are in the recipe's basis."""
        calibrated = any(step.calibrates for step in self.transforms)
        return replace(
            self, weights=None, kv_cache=None, calibrate_behind_prefix=self.calibrate_behind_prefix and calibrated
        )

    def weights_identity(self) -> dict[str, Any]:
        """All of the recipe that changes weights, for the checkpoint's identity."""
        made_of: dict[str, Any] = {"transforms": describe(self.transforms), "weights": describe(self.weights)}
        if self.weights is not None and self.weights.files:
            made_of["files"] = [sha256_of_file(file) for file in self.weights.files]
        if self.calibrates:
            made_of["calibration"] = describe(self.calibration)
            made_of["calibrate_behind_prefix"] = self.calibrate_behind_prefix
        return made_of

    def label(self) -> str:
        """Short readable name of the weights: `rtn-w4g64`, or `full` when they are full precision."""
        steps = [step.name for step in self.transforms]
        if self.weights is None:
            return "-".join([*steps, "full"])
        grid = self.weights.grid
        group = "row" if grid.group_size == -1 else f"g{grid.group_size}"
        behind = ["behind"] if self.calibrate_behind_prefix else []
        return "-".join([*steps, self.weights.name, f"w{grid.bits}{group}", *behind])


def describe(value: Any) -> Any:
    """Plain JSON of a recipe or a part of it: dataclasses become {"kind": class name, field: value, …}."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__} | {
            f.name: describe(getattr(value, f.name)) for f in fields(value) if f.init
        }
    if isinstance(value, tuple | list):
        return [describe(item) for item in value]
    return value


@dataclass(frozen=True)
class NamedRecipe:
    """A row of the table: the recipe, the paper that it comes from, and what to know about it."""

    recipe: Recipe
    paper: str
    note: str


def _rtn(bits: int) -> Recipe:
    return Recipe(weights=RTN(UniformGrid(bits, PUBLISHED_GROUP)))


def _gptq(bits: int) -> Recipe:
    return Recipe(weights=GPTQ(UniformGrid(bits, PUBLISHED_GROUP)))


def _spqr(bits: int, group_size: int = 16, threshold: float = 0.25) -> Recipe:
    weights = SpQR(UniformGrid(bits, group_size, "spqr-asym"), threshold=threshold)
    return Recipe(weights=weights, calibration=Calibration(seed=0))


def _awq(bits: int) -> Recipe:
    text = Calibration(corpus="pile", samples=128, length=512, seed=42, draw="documents")
    return Recipe(weights=AWQ(UniformGrid(bits, PUBLISHED_GROUP)), calibration=text)


def _omniquant(bits: int, group_size: int = PUBLISHED_GROUP, **settings: Any) -> Recipe:
    weights = OmniQuant(UniformGrid(bits, group_size, "intactkv-asym"), **settings)
    return Recipe(weights=weights, calibration=Calibration(corpus="wikitext2", samples=128, length=2048, seed=2))


AFFINE = "Jacob et al. 2018, 1712.05877"
DETTMERS = "Dettmers et al. 2024, 2306.03078"
FRANTAR = "Frantar et al. 2023, 2210.17323"
INTACTKV = "Liu et al. 2024, 2403.01241"
LIN = "Lin et al. 2024, 2306.00978"
PARK = "Park et al. 2024, 2206.09557"
SHAO = "Shao et al. 2024, 2308.13137"
RECIPES: Mapping[str, NamedRecipe] = {
    "fp16": NamedRecipe(Recipe(), "-", "nothing quantized; computes in --dtype"),
    "rtn": NamedRecipe(_rtn(3), AFFINE, "round to nearest, 3 bits, IntactKV's weight-only baseline"),
    "rtn-w4": NamedRecipe(_rtn(4), AFFINE, "round to nearest, 4 bits"),
    "rtn-w3": NamedRecipe(_rtn(3), AFFINE, "round to nearest, 3 bits"),
    "rtn-w2": NamedRecipe(_rtn(2), AFFINE, "round to nearest, 2 bits"),
    "gptq": NamedRecipe(_gptq(3), FRANTAR, "GPTQ as IntactKV used it: act-order, groups, true-sequential, 3 bits"),
    "gptq-w4": NamedRecipe(_gptq(4), FRANTAR, "the same, 4 bits"),
    "gptq-w3": NamedRecipe(_gptq(3), FRANTAR, "the same, 3 bits"),
    "gptq-w2": NamedRecipe(_gptq(2), FRANTAR, "the same, 2 bits"),
    "gptq-row": NamedRecipe(
        Recipe(
            weights=GPTQ(UniformGrid(4), true_sequential=False),
            calibration=Calibration(seed=0),
        ),
        FRANTAR,
        "GPTQ's own tables: act-order, one grid per row, 4 bits",
    ),
    "awq": NamedRecipe(_awq(3), LIN, "AWQ as IntactKV used it: scales and clip limits, 3 bits"),
    "awq-w4": NamedRecipe(_awq(4), LIN, "the same, 4 bits"),
    "awq-w3": NamedRecipe(_awq(3), LIN, "the same, 3 bits"),
    "bcq": NamedRecipe(
        Recipe(weights=BCQ(BinaryGrid(4, PUBLISHED_GROUP))), PARK, "LUT-GEMM's binary coding, 30 rounds, 4 bits"
    ),
    "bcq-w3": NamedRecipe(Recipe(weights=BCQ(BinaryGrid(3, PUBLISHED_GROUP))), PARK, "the same, 3 bits"),
    "bcq-row": NamedRecipe(Recipe(weights=BCQ(BinaryGrid(4))), PARK, "the same, 4 bits, one group per row"),
    "gptq-bcq": NamedRecipe(
        Recipe(weights=GPTQToBCQ(UniformGrid(4, PUBLISHED_GROUP))), PARK, "GPTQ, stored in binary coding, 4 bits"
    ),
    "spqr": NamedRecipe(_spqr(3), DETTMERS, "SpQR: 3 bits, groups of 16, about 1 % outliers: 4 bits in all"),
    "spqr-w4": NamedRecipe(_spqr(4), DETTMERS, "the same, 4 bits: 5 in all"),
    "spqr-w2": NamedRecipe(_spqr(2, 32, 0.5), DETTMERS, "the same, 2 bits, groups of 32: 3 in all"),
    "omniquant": NamedRecipe(_omniquant(3), SHAO, "OmniQuant as IntactKV used it: learned clipping, 3 bits"),
    "omniquant-w4": NamedRecipe(_omniquant(4), SHAO, "the same, 4 bits"),
    "omniquant-w3": NamedRecipe(_omniquant(3), SHAO, "the same, 3 bits"),
    "omniquant-w2": NamedRecipe(
        _omniquant(2, epochs=40, aug_loss=True), SHAO, "the same, 2 bits, 40 epochs, two targets"
    ),
    "omniquant-let": NamedRecipe(
        _omniquant(4, -1, let=True, aug_loss=True),
        SHAO,
        "learned clipping and scales, W4A4 without its A4: 4 bits, one grid per row",
    ),
    "kv4": NamedRecipe(Recipe(kv_cache=PerHead(4)), INTACTKV, "full-precision weights, per-head KV cache, 4 bits"),
    "kv3": NamedRecipe(Recipe(kv_cache=PerHead(3)), INTACTKV, "full-precision weights, per-head KV cache, 3 bits"),
    "kv2": NamedRecipe(Recipe(kv_cache=PerHead(2)), INTACTKV, "full-precision weights, per-head KV cache, 2 bits"),
}


def named_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises UserError, with the names there are."""
    if name not in RECIPES:
        raise UserError(
            f"unknown recipe {name!r}; choose from {', '.join(RECIPES)} (python -m quantization --list explains them)"
        )
    return RECIPES[name].recipe


def kv_policy(name: str, bits: int | None) -> KVPolicy | None:
    """The KV policy of that name; `none` is a full-precision cache. Raises UserError for an unknown name."""
    if name == "none":
        return None
    if name not in KV_POLICIES:
        raise UserError(f"unknown KV policy {name!r}; choose from none, {', '.join(KV_POLICIES)}")
    if bits is None:
        raise UserError(f"the KV policy {name} needs its bits: add --kv-bits 2…8")
    return KV_POLICIES[name](bits)


def with_settings(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Apply `field.subfield=value` settings, in order. Raises UserError for a wrong field or value."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: expected FIELD=VALUE, for example weights.grid.group_size=64")
        recipe = _set(recipe, path.split("."), text, setting)
    return recipe


def _set(part: Any, path: list[str], text: str, setting: str) -> Any:
    """A copy of a frozen dataclass with one (nested) field replaced; the text is read as the field's own type."""
    if not is_dataclass(part) or isinstance(part, type):
        raise UserError(f"--set {setting}: there is nothing below that field in this recipe")
    names = [f.name for f in fields(part) if f.init]
    if path[0] not in names:
        raise UserError(f"--set {setting}: {type(part).__name__} has no field {path[0]!r}; it has {', '.join(names)}")
    if len(path) > 1:
        value = _set(getattr(part, path[0]), path[1:], text, setting)
    else:
        value = _read(text, get_type_hints(type(part))[path[0]], setting)
    return replace(part, **{path[0]: value})


def _read(text: str, kind: Any, setting: str) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise UserError(f"--set {setting}: expected true or false")
        return text == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise UserError(f"--set {setting}: expected a number ({kind.__name__})") from None
    if kind is str:
        return text
    raise UserError(
        f"--set {setting}: this field holds parts of its own; set one of those (for example weights.grid.bits)"
    )
