"""Recipes: what they refuse, how settings change them, what their identity holds; the table of architectures."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any, ClassVar

import pytest
import torch
from transformers import PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import ARCHITECTURES, architecture_of, heads_of
from intactkv.layout import lay_out
from quantization.grids.uniform import QuantizedTensor, UniformGrid
from quantization.kv_cache import KV_POLICIES, PerHead, StaticPerHead
from quantization.model.blocks import DecoderBlock
from quantization.named import RECIPES, kv_policy, named_recipe
from quantization.recipes.recipe import Calibration, Recipe, describe, with_settings
from quantization.runs.identities import by_tokens
from quantization.transforms.base import BlockTransform
from quantization.weights.base import GridQuantizer
from quantization.weights.gptq import GPTQ
from quantization.weights.rtn import RTN
from quantization.weights.spqr import SpQR

GRID = UniformGrid(4, 32)


@dataclass(frozen=True)
class Looking(GridQuantizer):
    """A weight quantizer that calibrates."""

    grid: UniformGrid
    damp: float = 0.01
    name: ClassVar[str] = "looking"
    calibrates: ClassVar[bool] = True

    def quantize_block(self, block: DecoderBlock) -> dict[str, QuantizedTensor]:
        return {}


@dataclass(frozen=True)
class Smoothing(BlockTransform):
    """A transform that calibrates."""

    alpha: float = 0.5
    name: ClassVar[str] = "smoothing"
    calibrates: ClassVar[bool] = True

    def transform_block(self, block: DecoderBlock) -> None:
        return None


# the table of recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_named_recipe_is_described_in_plain_json(name: str) -> None:
    recipe = named_recipe(name)
    text = json.dumps(describe(recipe))
    assert json.loads(text) == describe(recipe)
    assert json.loads(text)["kind"] == "Recipe"
    assert RECIPES[name].paper
    assert RECIPES[name].note


@pytest.mark.parametrize("name", RECIPES)
def test_a_named_recipe_is_its_own_checkpoint_if_any_part_changes_the_model(name: str) -> None:
    recipe = named_recipe(name)
    bare = replace(recipe, transforms=(), weights=None, activations=None, attention=None, tuning=None)
    assert recipe.makes_checkpoint == (recipe != bare)
    assert not bare.makes_checkpoint


def test_an_unknown_recipe_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'gptw'; choose from fp16, rtn.*--list"):
        named_recipe("gptw")


def test_the_description_names_every_field_of_every_part() -> None:
    recipe = Recipe((Smoothing(),), RTN(GRID), kv_cache=PerHead(4))
    described = describe(recipe)
    assert set(described) == {"kind", *(f.name for f in fields(Recipe))}
    assert described["weights"] == {"kind": "RTN", "grid": {"kind": "UniformGrid", **vars(GRID)}}
    assert described["transforms"] == [{"kind": "Smoothing", "alpha": 0.5}]
    assert described["kv_cache"] == {"kind": "PerHead", "bits": 4, "convention": "minmax-asym"}  # grids follow from it


# refusals -------------------------------------------------------------------------------------------------------------


def test_calibrating_behind_a_prefix_is_refused_for_a_method_without_calibration() -> None:
    with pytest.raises(UserError, match="rtn needs no calibration"):
        Recipe(weights=RTN(GRID), prefix="bos", calibrate_behind_prefix=True)
    with pytest.raises(UserError, match="full precision needs no calibration"):
        Recipe(prefix="bos", calibrate_behind_prefix=True)


def test_calibrating_behind_a_prefix_needs_one() -> None:
    with pytest.raises(UserError, match="needs a prefix"):
        Recipe(weights=Looking(GRID), calibrate_behind_prefix=True)
    assert Recipe(weights=Looking(GRID), prefix="bos", calibrate_behind_prefix=True).calibrates


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_kv_bits_outside_two_to_eight_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match=f"KV bits={bits} .* 2 to 8"):
        PerHead(bits)


def test_kv_policies_are_found_by_name_and_need_their_bits() -> None:
    assert kv_policy("none", None) is None
    assert kv_policy("per_head", 3) == PerHead(3)
    with pytest.raises(UserError, match=r"unknown KV policy 'kivy'; choose from none, per_head"):
        kv_policy("kivy", 2)
    for name in KV_POLICIES:
        with pytest.raises(UserError, match="needs its bits"):
            kv_policy(name, None)


# settings -------------------------------------------------------------------------------------------------------------


def test_settings_are_read_as_the_type_of_their_field() -> None:
    recipe = with_settings(
        Recipe(weights=Looking(GRID), kv_cache=PerHead(4)),
        [
            "weights.grid.bits=3",
            "weights.grid.group_size=-1",
            "weights.grid.convention=gptq-sym",
            "weights.grid.clip_search=true",
            "weights.damp=1e-3",
            "kv_cache.bits=2",
            "prefix=bos",
            "calibration.samples=16",
            "calibrate_behind_prefix=true",
        ],
    )
    assert recipe == Recipe(
        weights=Looking(UniformGrid(3, -1, "gptq-sym", True), 0.001),
        kv_cache=PerHead(2),
        prefix="bos",
        calibration=Calibration(samples=16),
        calibrate_behind_prefix=True,
    )
    assert recipe.kv_cache is not None
    assert recipe.kv_cache.grid.bits == 2


def test_of_two_settings_of_one_field_the_later_wins() -> None:
    recipe = with_settings(named_recipe("rtn"), ["weights.grid.bits=5", "weights.grid.bits=6", "prefix=a=b"])
    assert recipe.weights is not None
    assert recipe.weights.grid.bits == 6
    assert recipe.prefix == "a=b"  # only the first sign separates


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("weights.grid.bits", "expected FIELD=VALUE"),
        ("weights.grid.bits=three", "give a whole number"),
        ("weights.grid.bits=3.5", "give a whole number"),
        ("weights.grid.bits=", "give a whole number"),
        ("weights.grid.bits=9", "bits=9 is not supported"),
        ("weights.grid.clip_search=yes", "expected true or false"),
        ("weights.grid.clip_search=True", "expected true or false"),
        ("weights.grid.wbits=3", "UniformGrid has no field 'wbits'; it has bits, group_size"),
        ("weight.grid.bits=3", "Recipe has no field 'weight'; it has transforms, weights"),
        ("weights.grid.bits.low=3", "nothing below that field"),
        ("weights=rtn", "set one of those"),
        ("weights.grid=w4", "set one of those"),
        ("kv_cache.bits=4", "nothing below that field"),  # this recipe has no KV policy
        ("calibrates=true", "Recipe has no field 'calibrates'"),
        ("calibrate_behind_prefix=true", "rtn needs no calibration"),
        ("=3", "Recipe has no field ''"),
    ],
)
def test_a_wrong_setting_is_refused_in_words(setting: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        with_settings(named_recipe("rtn"), [setting])


def test_the_field_that_a_policy_derives_cannot_be_set() -> None:
    with pytest.raises(UserError, match="PerHead has no field 'grid'; it has bits"):
        with_settings(named_recipe("kv4"), ["kv_cache.grid.bits=3"])


# identity -------------------------------------------------------------------------------------------------------------

SEGMENTS, PREFIX = torch.arange(12).view(2, 6), torch.tensor([1])


def identity_of(recipe: Recipe, segments: Any = SEGMENTS, prefix: Any = PREFIX) -> str:
    return json.dumps(by_tokens("0" * 16, recipe, segments, prefix).made_of, sort_keys=True)


OTHER = {"bits": 3, "group_size": 16, "convention": "gptq-sym", "clip_search": True, "scale_dtype": "float16"}


@pytest.mark.parametrize("field", [f.name for f in fields(UniformGrid)])
def test_every_field_of_the_grid_changes_the_identity_of_the_weights(field: str) -> None:
    changed = replace(GRID, **{field: OTHER[field]})
    assert identity_of(Recipe(weights=RTN(changed))) != identity_of(Recipe(weights=RTN(GRID)))


@pytest.mark.parametrize("field", [f.name for f in fields(Calibration)])
def test_every_field_of_the_calibration_changes_the_identity_if_something_calibrates(field: str) -> None:
    other = {"corpus": "pile", "samples": 4, "length": 64, "seed": 1, "draw": "documents"}
    changed = Calibration(**{field: other[field]})
    looking = Recipe(weights=Looking(GRID))
    assert identity_of(replace(looking, calibration=changed)) != identity_of(looking)
    assert identity_of(Recipe(weights=RTN(GRID), calibration=changed)) == identity_of(Recipe(weights=RTN(GRID)))


def test_what_is_calibrated_on_and_behind_changes_the_identity() -> None:
    recipe = Recipe(weights=Looking(GRID), prefix="bos")
    behind = replace(recipe, calibrate_behind_prefix=True)
    identities = [
        identity_of(recipe),
        identity_of(recipe, segments=SEGMENTS + 1),
        identity_of(replace(recipe, weights=Looking(GRID, damp=0.1))),
        identity_of(replace(recipe, weights=RTN(GRID))),
        identity_of(replace(recipe, transforms=(Smoothing(),))),
        identity_of(replace(recipe, transforms=(Smoothing(0.6),))),
        identity_of(replace(recipe, transforms=(Smoothing(), Smoothing(0.6)))),
        identity_of(replace(recipe, transforms=(Smoothing(0.6), Smoothing()))),
        identity_of(behind),
        identity_of(behind, prefix=torch.tensor([1, 5])),
    ]
    assert len(set(identities)) == len(identities)
    assert behind.weights_identity() != recipe.weights_identity()  # by the switch alone, before any ids are known


@pytest.mark.parametrize("quantizer", [RTN(GRID), Looking(GRID)])
def test_the_kv_policy_and_a_prefix_of_the_run_time_do_not_change_the_identity(quantizer: Any) -> None:
    plain = Recipe(weights=quantizer)
    for run_time in ({"kv_cache": PerHead(2)}, {"prefix": "bos"}, {"prefix": "prompt", "kv_cache": PerHead(4)},
                     {"kv_cache": StaticPerHead(4)}):  # fmt: skip
        assert identity_of(replace(plain, **run_time)) == identity_of(plain)
        assert replace(plain, **run_time).label() == plain.label()


def test_calibrating_a_cache_behind_a_prefix_is_none_of_the_weights_that_read_no_text() -> None:
    plain = Recipe(weights=RTN(GRID))
    behind = replace(plain, kv_cache=StaticPerHead(4), prefix="bos", calibrate_behind_prefix=True)
    assert (identity_of(behind), behind.label()) == (identity_of(plain), plain.label())
    assert replace(behind, weights=Looking(GRID)).label() == Recipe(weights=Looking(GRID)).label() + "-behind"


def test_the_twin_keeps_the_transforms_and_drops_every_quantizer() -> None:
    recipe = Recipe((Smoothing(),), Looking(GRID), kv_cache=PerHead(4), prefix="bos", calibrate_behind_prefix=True)
    assert recipe.twin == Recipe((Smoothing(),), prefix="bos", calibrate_behind_prefix=True)
    # Without a transform that looks at text, the twin does not depend on how the weights are calibrated.
    assert replace(recipe, transforms=()).twin == Recipe(prefix="bos")
    assert not replace(recipe, transforms=()).twin.makes_checkpoint


def test_labels_say_method_bits_and_group() -> None:
    assert Recipe().label() == "full"
    assert Recipe(weights=RTN(GRID)).label() == "rtn-w4g32"
    assert Recipe((Smoothing(),), RTN(UniformGrid(8))).label() == "smoothing-rtn-w8row"
    assert Recipe((Smoothing(),)).label() == "smoothing-full"


# architectures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_lists_the_linears_in_the_order_of_computation(
    model_type: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = lay_out(tiny_model(model_type))
    architecture = architecture_of(model.config)
    blocks = architecture.blocks_of(model)
    assert len(blocks) == model.config.num_hidden_layers
    groups = [group for group in architecture.linears if architecture.expert_of(group[0]) is None]
    routers = {name for feed in architecture.feeds for name in feed.routers}
    seen: list[tuple[str, torch.Tensor]] = []
    for index, block in enumerate(blocks):
        assert model.get_submodule(architecture.block_name(index)) is block
        linears = architecture.linears_of(block, architecture.block_name(index))
        there = {n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear) and n not in routers}
        assert there == linears.keys()
        for name, linear in linears.items():
            if architecture.expert_of(name) is None:  # experts see some tokens each, in any order
                linear.register_forward_pre_hook(lambda _module, args, name=name: seen.append((name, args[0])))
    heads: list[torch.Tensor] = []
    model.get_submodule(architecture.head).register_forward_pre_hook(lambda _module, args: heads.append(args[0]))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        model(ids)
        decoded = model.get_submodule(architecture.decoder)(ids).last_hidden_state

    order = [linear for group in groups for linear in group]
    count = len(order) * len(blocks)
    assert [name for name, _ in seen[:count]] == order * len(blocks)
    inputs = dict(seen[: len(order)])
    for group in groups:
        assert all(torch.equal(inputs[linear], inputs[group[0]]) for linear in group)
    fed = [{group[0] for group in groups} & set(feed.consumers) for feed in architecture.feeds]
    for a, b in combinations([group[0] for group in groups], 2):
        same = inputs[a].shape == inputs[b].shape and torch.equal(inputs[a], inputs[b])
        assert same == any({a, b} <= names for names in fed)  # attention and feed-forward side by side
    torch.testing.assert_close(heads[0], decoded)  # the decoder returns what the head reads


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [*((kind, {}) for kind in ARCHITECTURES), ("llama", {"num_key_value_heads": 4, "head_dim": 8})],
)
def test_heads_are_those_of_the_keys_that_the_model_writes(
    model_type: str, sizes: dict[str, int], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(model_type, **sizes)
    with torch.no_grad():
        keys = model(torch.tensor([[1, 5, 7]]), use_cache=True).past_key_values.layers[0].keys
    assert (1, heads_of(model.config)[0], 3, heads_of(model.config)[1]) == keys.shape


def test_an_unknown_model_type_is_refused_with_the_nearest_one(tiny_config: Callable[..., Any]) -> None:
    config = tiny_config("llama")
    config.model_type = "mamba"
    with pytest.raises(
        UserError, match=r"'mamba' is not in the architecture table.*Nearest by its blocks: llama, .*models\.md"
    ):
        architecture_of(config)


def test_a_block_with_other_linears_than_the_table_says_is_refused(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    block = model.get_submodule("model.layers.1")
    block.extra_proj = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"model\.layers\.1 holds the linears .*extra_proj.* is not supported"):
        architecture_of(model.config).linears_of(block, "model.layers.1")


# beside the authors' own code -----------------------------------------------------------------------------------------


def test_the_published_settings_have_rows_beside_the_defaults() -> None:
    """AutoGPTQ's BaseQuantizeConfig(group_size=128, desc_act=True) leaves static_groups off and true_sequential on;
    IntactKV drew 128 × 2048 tokens of C4, seed 42. SpQR's README: --wbits 4 --groupsize 16 --qq_scale_bits 3
    --qq_zero_bits 3 --qq_groupsize 16 --outlier_threshold=0.2 --permutation_order act_order --percdamp 1e0."""
    grid = UniformGrid(3, 128)
    published = GPTQ(grid, damp=0.01, act_order=True, static_groups=False, true_sequential=True)
    text = Calibration("c4", samples=128, length=2048, seed=42)
    assert named_recipe("gptq-autogptq") == Recipe(weights=published, calibration=text)
    assert named_recipe("gptq") == Recipe(weights=replace(published, static_groups=True), calibration=text)
    authors = SpQR(UniformGrid(4, 16, "spqr-asym"), 3, 3, 16, threshold=0.2, damp=1.0, act_order=True)
    assert named_recipe("spqr-authors").weights == authors
    assert named_recipe("spqr-w4").weights == replace(authors, threshold=0.25, damp=0.01)  # qllm's
