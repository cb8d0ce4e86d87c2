"""The options that spell a recipe: a named one, parts of others in place of its own, fields.

They apply in this order: --recipe, the parts, --prefix and --kv, the model's own defaults, --bits, --group-size and the
options of calibration, --set. Two of them that say different things of one field are refused.

Only the standard library is imported here, so that `--help` answers at once.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from corpora import values
from quantization.programs.kv_options import FIELDS, given_fields

if TYPE_CHECKING:
    from quantization.recipes.recipe import Recipe

__all__ = [
    "CALIBRATION",
    "WEIGHTS",
    "add_recipe_options",
    "check_agreement",
    "fields_of",
    "given_parts",
    "with_model_defaults",
]

# Options that are short for a field of the recipe: attribute of the parsed options, field.
WEIGHTS = (("bits", "weights.grid.bits"), ("group_size", "weights.grid.group_size"))
CALIBRATION = (
    ("calibration", "calibration.corpus"),
    ("calibration_samples", "calibration.samples"),
    ("calibration_length", "calibration.length"),
    ("seed", "calibration.seed"),
)
OTHERS = (
    ("prefix", "prefix"),
    ("kv", "kv_cache"),
    *((name, "kv_cache") for name in FIELDS),
    *((name, f"kv_cache.{field}") for name, field in FIELDS.items()),
    ("calibrate_behind_prefix", "calibrate_behind_prefix"),
    ("weights", "weights"),
    ("activations", "activations"),
    ("transform", "transforms"),
)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """--recipe, the parts and fields that are other than its own."""
    group = parser.add_argument_group(
        "recipe",
        "NAME is a named recipe everywhere (python -m quantization --list explains them). --weights, --transform and "
        "--activations take one part of it, in place of the same part of --recipe; none takes the part away. So "
        "--recipe smoothquant-w8a8 --weights gptq-w4 is SmoothQuant with GPTQ's weights.",
    )
    group.add_argument(
        "--recipe",
        type=values.name,
        default=None,
        metavar="NAME",
        help="what is done to the model (default: fp16, nothing quantized)",
    )
    group.add_argument(
        "--weights", type=values.name, metavar="NAME|none", help="quantize the weights as this recipe does"
    )
    group.add_argument(
        "--transform",
        type=values.name,
        action="append",
        metavar="NAME|none",
        help="rewrite the model exactly as this recipe does: smooth, rotate, …; may be repeated, those that rescale "
        "come last",
    )
    group.add_argument(
        "--activations",
        type=values.name,
        metavar="NAME|none",
        help="round the inputs of the linears as this recipe does: rtn-w8a8, …",
    )
    group.add_argument(
        "--bits", type=values.count(1, 16), metavar="B", help="bits of the weights, short for --set weights.grid.bits=B"
    )
    group.add_argument(
        "--group-size",
        type=values.group_size,
        metavar="G",
        help="input channels per scale, -1 for one scale per row (default: the recipe's, or the model's "
        "own where that has one)",
    )
    group.add_argument(
        "--set",
        type=values.name,
        action="append",
        default=[],
        dest="settings",
        metavar="FIELD=VALUE",
        help="any other field by its dotted name, for example weights.grid.convention=gptq-sym; or a whole part: "
        "tuning=NAME|none, likewise attention, kv_cache, weights, activations, transforms",
    )


def fields_of(options: argparse.Namespace, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Those of the options that were given, as settings FIELD=VALUE."""
    given = [(field, getattr(options, name, None)) for name, field in pairs]
    return [f"{field}={value}" for field, value in given if value is not None]


def given_parts(options: argparse.Namespace) -> tuple[dict[str, list[str]], list[str]]:
    """The parts by field, as `put_together` takes them, and the settings that are left: those of single fields."""
    from quantization.named import PARTS

    parts: dict[str, list[str]] = {}
    if options.transform:
        parts["transforms"] = list(options.transform)
    for field in ("weights", "activations"):
        if getattr(options, field) is not None:
            parts[field] = [getattr(options, field)]
    left = []
    for setting in options.settings:
        field, equals, name = setting.partition("=")
        if field not in PARTS or not equals:
            left.append(setting)
        elif field != "transforms":
            parts[field] = [name]
        elif name not in parts.setdefault(field, []):
            parts[field].append(name)
    return {field: parts[field] for field in PARTS if field in parts}, left


def check_agreement(options: argparse.Namespace) -> None:
    """Refuse options that say different things of one field. Raises UserError."""
    from corpora.errors import UserError

    for name, field in (*WEIGHTS, *CALIBRATION, *OTHERS):
        value = getattr(options, name, None)
        if value is None or value is False:
            continue
        said = ["true"] if value is True else list(map(str, value)) if isinstance(value, list) else [str(value)]
        for setting in options.settings:
            of, _, other = setting.partition("=")
            if of == field and other not in said:
                raise UserError(
                    f"--{name.replace('_', '-')} {' '.join(said)} and --set {setting} say different things; leave one "
                    "of them out"
                )
    if getattr(options, "kv", None) == "none":
        for name, value in given_fields(options).items():
            raise UserError(f"--kv none keeps the cache in full precision, but --{name.replace('_', '-')} {value} "
                            "rounds it; leave one of them out")  # fmt: skip


def with_model_defaults(recipe: "Recipe", model: str, settings: list[str]) -> list[str]:
    """Settings with the model's own group size and calibration text in front, where it has other than the published."""
    from corpora.catalog import model_defaults
    from quantization.named import PUBLISHED_GROUP

    own, front = model_defaults(model), []
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
