"""The table of named recipes: what each paper did, one row each (`python -m quantization --list` prints it).

`put_together` takes parts of several rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from corpora.errors import UserError
from intactkv.policy import KVPolicy
from quantization.grids.binary_coding import BinaryGrid
from quantization.grids.uniform import UniformGrid
from quantization.kv_cache import KV_POLICIES, ClippedPerHead, PerHead, Rotated, StaticPerHead, TurboQuant
from quantization.model.activations import Activations
from quantization.model.attention import AttentionProducts
from quantization.recipes.recipe import Calibration, Recipe
from quantization.transforms.rotate import Rotate
from quantization.transforms.smooth import Smooth
from quantization.tuning.distill import Distill
from quantization.tuning.prefixquant import PrefixQuantTuning
from quantization.weights.awq import AWQ
from quantization.weights.bcq import BCQ, GPTQToBCQ
from quantization.weights.gptq import GPTQ
from quantization.weights.omniquant import OmniQuant
from quantization.weights.rtn import RTN
from quantization.weights.spqr import SpQR
from quantization.weights.zeroquant import ZeroQuant

__all__ = ["PARTS", "PUBLISHED_GROUP", "RECIPES", "NamedRecipe", "kv_policy", "named_recipe", "put_together"]

PUBLISHED_GROUP = 128  # gives way to a model's own default where 128 does not divide its channels
# Fields of a recipe that `put_together` fills from others.
PARTS = ("transforms", "weights", "activations", "attention", "tuning", "kv_cache")
NONE = "none"


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


def _spqr(bits: int, group_size: int = 16, threshold: float = 0.25, damp: float = 0.01) -> Recipe:
    weights = SpQR(UniformGrid(bits, group_size, "spqr-asym"), threshold=threshold, damp=damp)
    return Recipe(weights=weights, calibration=Calibration(seed=0))


def _awq(bits: int) -> Recipe:
    text = Calibration(corpus="pile", samples=128, length=512, seed=42, draw="documents")
    return Recipe(weights=AWQ(UniformGrid(bits, PUBLISHED_GROUP)), calibration=text)


def _omniquant(bits: int, group_size: int = PUBLISHED_GROUP, **settings: Any) -> Recipe:
    weights = OmniQuant(UniformGrid(bits, group_size, "intactkv-asym"), **settings)
    return Recipe(weights=weights, calibration=Calibration(corpus="wikitext2", samples=128, length=2048, seed=2))


def _omniquant_w_and_a(bits: int, **settings: Any) -> Recipe:
    """OmniQuant's W4A4 and W6A6: one grid per row of the weights, per token of every input, per head of q, k and v; the
    ranges of the weights contain 0, all others are taken as they are."""
    tokens = UniformGrid(bits, -1, "minmax-asym")
    return replace(
        _omniquant(bits, -1, let=True, **settings),
        activations=Activations(tokens),
        attention=AttentionProducts(tokens, rows=False),
        kv_cache=PerHead(bits),
    )


def _zeroquant(bits: int, attention_bits: int, input_bits: int | None, tuning: Distill | None = None) -> Recipe:
    inputs = None if input_bits is None else Activations(UniformGrid(input_bits, convention="deepspeed-sym"))
    weights = ZeroQuant(UniformGrid(bits, convention="deepspeed-sym"), attention_bits)
    return Recipe(weights=weights, activations=inputs, tuning=tuning, calibration=Calibration(seed=0))


def _quarot(weights: type[GPTQ] | type[RTN], rotated: bool = True, weights_only: bool = False) -> Recipe:
    """QuaRot's W4A4KV4: symmetric grids per row and per token, weights with a clip search; also without rotations."""
    activations = None if weights_only else Activations(UniformGrid(4, convention="quarot-sym"), keep=0.9)
    return Recipe(
        transforms=(Rotate(),) if rotated else (),
        weights=weights(UniformGrid(4, convention="quarot-sym", clip_search=True)),
        activations=activations,
        kv_cache=None if weights_only else Rotated(4) if rotated else PerHead(4),
        calibration=Calibration(corpus="wikitext2", samples=128, length=2048, seed=0),
    )


def _prefixquant(input_bits: int, static: bool, epochs: int = 0) -> Recipe:
    """PrefixQuant's W4A4KV4 or W4A8KV4 behind the tokens that it discovers: rotated, symmetric grids per row, per input
    tensor (static) or token, per KV head."""
    return Recipe(
        transforms=(Rotate(head_mix="none"),),
        weights=RTN(UniformGrid(4, convention="gptq-sym")),
        activations=Activations(
            UniformGrid(input_bits, convention="gptq-sym"), static=static, keep=1.0 if static else 0.95
        ),
        tuning=PrefixQuantTuning(epochs=epochs),
        kv_cache=StaticPerHead(4, "gptq-sym", rotate_keys=True) if static else ClippedPerHead(4, rotate_keys=True),
        prefix="auto",
        calibration=Calibration("pile", samples=576 if epochs else 64, length=1024, seed=2),
        calibrate_behind_prefix=True,
    )


def _w_and_a(bits: int, alpha: float | None, qllm: bool = False) -> Recipe:
    """SmoothQuant, or without alpha what it is compared with: by its own repository, or by qllm's conventions."""
    grid = UniformGrid(bits, convention="gptq-asym" if qllm else "smoothquant-sym")
    return Recipe(
        transforms=() if alpha is None else (Smooth(alpha),),
        weights=RTN(grid),
        activations=Activations(grid),
        attention=AttentionProducts(grid) if qllm else None,
        kv_cache=PerHead(bits, "intactkv-asym") if qllm else None,  # its ranges contain 0
        calibration=Calibration(corpus="pile", samples=512, length=512),
    )


ASHKBOOS = "Ashkboos et al. 2024, 2404.00456"
AFFINE = "Jacob et al. 2018, 1712.05877"
CHEN = "Chen et al. 2024, 2410.05265"
DETTMERS = "Dettmers et al. 2024, 2306.03078"
FRANTAR = "Frantar et al. 2023, 2210.17323"
INTACTKV = "Liu et al. 2024, 2403.01241"
LIN = "Lin et al. 2024, 2306.00978"
PARK = "Park et al. 2024, 2206.09557"
SHAO = "Shao et al. 2024, 2308.13137"
YAO = "Yao et al. 2022, 2206.01861"
ZANDIEH = "Zandieh et al. 2025, 2504.19874"
XIAO = "Xiao et al. 2023, 2211.10438"
RECIPES: Mapping[str, NamedRecipe] = {
    "fp16": NamedRecipe(Recipe(), "-", "nothing quantized; computes in --dtype"),
    "rtn": NamedRecipe(_rtn(3), AFFINE, "round to nearest, 3 bits, IntactKV's weight-only baseline"),
    "rtn-w4": NamedRecipe(_rtn(4), AFFINE, "round to nearest, 4 bits"),
    "rtn-w3": NamedRecipe(_rtn(3), AFFINE, "round to nearest, 3 bits"),
    "rtn-w2": NamedRecipe(_rtn(2), AFFINE, "round to nearest, 2 bits"),
    "gptq": NamedRecipe(_gptq(3), FRANTAR, "GPTQ: act-order with groups of neighbours, true-sequential, 3 bits"),
    "gptq-w4": NamedRecipe(_gptq(4), FRANTAR, "the same, 4 bits"),
    "gptq-w3": NamedRecipe(_gptq(3), FRANTAR, "the same, 3 bits"),
    "gptq-w2": NamedRecipe(_gptq(2), FRANTAR, "the same, 2 bits"),
    "gptq-autogptq": NamedRecipe(
        Recipe(weights=GPTQ(UniformGrid(3, PUBLISHED_GROUP), static_groups=False)),
        FRANTAR,
        "GPTQ of IntactKV's tables, by AutoGPTQ: the same, but groups as act-order brings the channels",
    ),
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
    "spqr": NamedRecipe(_spqr(3), DETTMERS, "SpQR of qllm: 3 bits, groups of 16, about 1 % outliers: 4 bits in all"),
    "spqr-w4": NamedRecipe(_spqr(4), DETTMERS, "the same, 4 bits: 5 in all"),
    "spqr-w2": NamedRecipe(_spqr(2, 32, 0.5), DETTMERS, "the same, 2 bits, groups of 32: 3 in all"),
    "spqr-authors": NamedRecipe(
        _spqr(4, 16, 0.2, 1.0), DETTMERS, "SpQR by its authors' own command: 4 bits, groups of 16, damping 1, τ = 0.2"
    ),
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
    "omniquant-w4a4": NamedRecipe(
        _omniquant_w_and_a(4, aug_loss=True),
        SHAO,
        "learned clipping and scales, trained with rounded inputs, q, k, v: 4 bits, one grid per row and token; for "
        "Llama-2 --set weights.let_lr=1e-3 --set weights.alpha=0.75 --set weights.aug_loss=false",
    ),
    "omniquant-w6a6": NamedRecipe(_omniquant_w_and_a(6), SHAO, "the same, 6 bits, one target"),
    "zeroquant-w8a8": NamedRecipe(_zeroquant(8, 8, 8), YAO, "ZeroQuant: symmetric rows and tokens of 8 bits"),
    "zeroquant-w4-8a16": NamedRecipe(_zeroquant(4, 8, None), YAO, "4 bits in the MLP, 8 in attention; weights only"),
    "zeroquant-w4-8a8": NamedRecipe(_zeroquant(4, 8, 8), YAO, "the same with tokens of 8 bits"),
    "zeroquant-w4a4": NamedRecipe(_zeroquant(4, 4, 4), YAO, "4 bits everywhere in the blocks"),
    "zeroquant-w8a8-lkd": NamedRecipe(_zeroquant(8, 8, 8, Distill()), YAO, "zeroquant-w8a8, distilled block by block"),
    "zeroquant-w4-8a16-lkd": NamedRecipe(
        _zeroquant(4, 8, None, Distill()), YAO, "zeroquant-w4-8a16, distilled; published with tuning.blocks=last"
    ),
    "zeroquant-w4-8a8-lkd": NamedRecipe(_zeroquant(4, 8, 8, Distill()), YAO, "zeroquant-w4-8a8, distilled"),
    "zeroquant-w4a4-lkd": NamedRecipe(
        _zeroquant(4, 4, 4, Distill(steps=400, lr=1e-6)),
        YAO,
        "zeroquant-w4a4, distilled; published with tuning.blocks=last",
    ),
    "rtn-w8a8": NamedRecipe(
        _w_and_a(8, None), XIAO, "symmetric rows and tokens: SmoothQuant without smoothing, 8 bits"
    ),
    "rtn-w6a6": NamedRecipe(_w_and_a(6, None), XIAO, "the same, 6 bits"),
    "rtn-w4a4": NamedRecipe(_w_and_a(4, None), XIAO, "the same, 4 bits"),
    "rtn-w8a8-qllm": NamedRecipe(
        _w_and_a(8, None, True), XIAO, "asymmetric, with attention's q, k, v, softmax, 8 bits"
    ),
    "rtn-w6a6-qllm": NamedRecipe(_w_and_a(6, None, True), XIAO, "the same, 6 bits"),
    "rtn-w4a4-qllm": NamedRecipe(_w_and_a(4, None, True), XIAO, "the same, 4 bits"),
    "smoothquant-w8a8": NamedRecipe(_w_and_a(8, 0.5), XIAO, "SmoothQuant: symmetric rows and tokens, 8 bits"),
    "smoothquant-w6a6": NamedRecipe(_w_and_a(6, 0.5), XIAO, "the same, 6 bits"),
    "smoothquant-w4a4": NamedRecipe(_w_and_a(4, 0.5), XIAO, "the same, 4 bits"),
    "smoothquant-w8a8-qllm": NamedRecipe(
        _w_and_a(8, 0.55, True), XIAO, "SmoothQuant, asymmetric, with attention's q, k, v, softmax, 8 bits"
    ),
    "smoothquant-w6a6-qllm": NamedRecipe(_w_and_a(6, 0.55, True), XIAO, "the same, 6 bits"),
    "smoothquant-w4a4-qllm": NamedRecipe(_w_and_a(4, 0.55, True), XIAO, "the same, 4 bits"),
    "quarot": NamedRecipe(
        _quarot(GPTQ), ASHKBOOS, "QuaRot as IntactKV used it: rotated, GPTQ, W4A4KV4, one grid per row and token"
    ),
    "quarot-rtn": NamedRecipe(_quarot(RTN), ASHKBOOS, "the same, round to nearest"),
    "quarot-w4": NamedRecipe(_quarot(GPTQ, weights_only=True), ASHKBOOS, "rotated, GPTQ, weights of 4 bits only"),
    "gptq-w4a4kv4": NamedRecipe(
        _quarot(GPTQ, rotated=False), ASHKBOOS, "quarot without rotations, with the per-head cache"
    ),
    "rtn-w4a4kv4": NamedRecipe(
        _quarot(RTN, rotated=False), ASHKBOOS, "quarot-rtn without rotations, with the per-head cache"
    ),
    "rotate": NamedRecipe(Recipe((Rotate(),)), ASHKBOOS, "QuaRot's rotations alone, nothing quantized"),
    "smooth": NamedRecipe(
        replace(_w_and_a(8, 0.5), weights=None, activations=None), XIAO, "SmoothQuant's scales alone, nothing quantized"
    ),
    "prefixquant-w4a4kv4-static": NamedRecipe(
        _prefixquant(4, True), CHEN, "PrefixQuant: rotated, static grids by their output error, behind outlier tokens"
    ),
    "prefixquant-w4a4kv4-static-ft": NamedRecipe(_prefixquant(4, True, 20), CHEN, "the same, then 20 epochs a block"),
    "prefixquant-w4a4kv4-dynamic": NamedRecipe(_prefixquant(4, False), CHEN, "grids per token, clip searched"),
    "prefixquant-w4a4kv4-dynamic-ft": NamedRecipe(_prefixquant(4, False, 20), CHEN, "the same, then 20 epochs a block"),
    "prefixquant-w4a8kv4-static": NamedRecipe(_prefixquant(8, True), CHEN, "static, inputs of 8 bits"),
    "prefixquant-w4a8kv4-static-ft": NamedRecipe(_prefixquant(8, True, 10), CHEN, "the same, then 10 epochs a block"),
    "prefixquant-w4a8kv4-dynamic": NamedRecipe(_prefixquant(8, False), CHEN, "dynamic, inputs of 8 bits"),
    "prefixquant-w4a8kv4-dynamic-ft": NamedRecipe(_prefixquant(8, False, 10), CHEN, "the same, then 10 epochs a block"),
    "kv4": NamedRecipe(Recipe(kv_cache=PerHead(4)), INTACTKV, "full-precision weights, per-head KV cache, 4 bits"),
    "kv3": NamedRecipe(Recipe(kv_cache=PerHead(3)), INTACTKV, "full-precision weights, per-head KV cache, 3 bits"),
    "kv2": NamedRecipe(Recipe(kv_cache=PerHead(2)), INTACTKV, "full-precision weights, per-head KV cache, 2 bits"),
    **{
        f"turboquant-{name}": NamedRecipe(Recipe(kv_cache=policy), ZANDIEH, f"full-precision weights, KV cache: {note}")
        for name, policy, note in (
            ("k8v4", TurboQuant(8, v_bits=4), "keys in fp8 (e4m3), values of 4 bits"),
            ("4bit-nc", TurboQuant(4), "rotated keys of 4 bits on the best levels, values of 4 bits"),
            ("k3v4-nc", TurboQuant(3, v_bits=4), "the same, keys of 3 bits"),
            ("3bit-nc", TurboQuant(3), "the same, keys and values of 3 bits"),
        )
    },
}


def named_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises UserError, with the names there are."""
    if name not in RECIPES:
        raise UserError(
            f"unknown recipe {name!r}; choose from {', '.join(RECIPES)} (python -m quantization --list explains them)"
        )
    return RECIPES[name].recipe


def put_together(recipe: Recipe, parts: Mapping[str, Sequence[str]]) -> Recipe:
    """A recipe with parts of named ones in place of its own.

    parts: names by field (`PARTS`); `none` takes a part away. Of transforms there may be several: those that rescale
    come last. The calibration text is the recipe's while a part of its own reads text, else that of the first part put
    in that does.
    Raises UserError for a name without such a part, and for parts that cannot work together.
    """
    given: dict[str, list[Recipe]] = {}
    for field, names in parts.items():
        if NONE in names and len(names) > 1:
            raise UserError(f"{field}: {NONE} takes them all away, so it stands alone; {', '.join(names)} were given")
        given[field] = [named_recipe(name) for name in names if name != NONE]
        for name in names:
            if name != NONE and not getattr(named_recipe(name), field):
                first = next(other for other, row in RECIPES.items() if getattr(row.recipe, field))
                raise UserError(
                    f"the recipe {name} has no {field} to take; name one that has, such as {first} (python -m "
                    f"quantization --list shows the parts of all), or {NONE}"
                )
    bare: dict[str, Any] = {field: () if field == "transforms" else None for field in given}
    calibrating = [row for rows in given.values() for row in rows if row.calibrates] + [
        row for rows in given.values() for row in rows
    ]
    own = replace(recipe, **bare, prefix=NONE, calibrate_behind_prefix=False)
    values: dict[str, Any] = {field: getattr(rows[-1], field) for field, rows in given.items() if rows}
    if "transforms" in values:
        steps = [step for row in given["transforms"] for step in row.transforms]
        twice = [step.name for i, step in enumerate(steps) if step.name in [other.name for other in steps[:i]]]
        if twice:
            raise UserError(f"transforms: {twice[0]} was given twice; give it once")
        values["transforms"] = tuple(sorted(steps, key=lambda step: step.rescales))
    if calibrating and not own.calibrates:
        values["calibration"] = calibrating[0].calibration
    made = replace(own, **values)
    if not made.makes_checkpoint:  # nothing is left that had another text than fp16
        made = replace(made, calibration=Calibration())
    behind = recipe.calibrate_behind_prefix and made.calibrates
    return replace(made, prefix=recipe.prefix, calibrate_behind_prefix=behind)


def kv_policy(name: str, bits: int | None) -> KVPolicy | None:
    """The KV policy of that name; `none` is a full-precision cache. Raises UserError for an unknown name."""
    if name == "none":
        return None
    if name not in KV_POLICIES:
        raise UserError(f"unknown KV policy {name!r}; choose from none, {', '.join(KV_POLICIES)}")
    if bits is None:
        raise UserError(f"the KV policy {name} needs its bits: add --kv-bits 2…8")
    return KV_POLICIES[name](bits=bits)
