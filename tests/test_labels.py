"""Readable labels: what differs reads differently, what was stored under an earlier label is found."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from corpora.errors import UserError
from eval.__main__ import main as eval_main
from eval.tables.perplexities import weights_label
from quantization.grids.uniform import UniformGrid
from quantization.kv_cache import KV_POLICIES
from quantization.labels import full_label, kv_label, told
from quantization.named import RECIPES, named_recipe, put_together
from quantization.recipes.recipe import Recipe, describe, with_settings
from quantization.runs.pipeline import partial_of
from quantization.runs.plan import plan_run
from quantization.transforms.smooth import Smooth
from quantization.weights.gptq import GPTQ
from quantization.weights.rtn import RTN

CPU = torch.device("cpu")
WORDS = ("last", "skip_mse", "both", "random", "none", "hartley", "uniform", "gptq-asym", "gptq-sym", "intactkv-asym",
         "smoothquant-sym", "float16", "quant_input")  # fmt: skip
KV_WORDS = ("2", "8", "64", "0.3", "lloyd", "final", "fp", "nf", "minmax-asym", "x/name")
# Fields that some recipe cannot change alone: one convention fits, another field has to change with it, or a file.
ALONE = {"grid.clip_search", "activations.grid.clip_search", "attention.grid.clip_search", "grid.convention",
         "grid.scale_dtype", "start", "static_groups", "file", "lwc", "shift", "attention.grid.group_size",
         "activations.static", "activations.keep"}  # fmt: skip


def leaves(part: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every field of a part that --set can reach, with its value."""
    for f in fields(part):
        value = getattr(part, f.name)
        if f.init and is_dataclass(value):
            yield from leaves(value, f"{path}.{f.name}")
        elif f.init:
            yield f"{path}.{f.name}", value


def settable(recipe: Recipe) -> list[tuple[str, Any]]:
    found = [leaf for step in recipe.transforms for leaf in leaves(step, f"transforms.{step.name}")]
    for name in ("weights", "activations", "attention", "tuning"):
        part = getattr(recipe, name)
        found += list(leaves(part, name)) if part is not None else []
    return found


def others(value: Any) -> list[str]:
    if isinstance(value, bool):
        return [str(not value).lower()]
    if isinstance(value, int):
        return [str(value + 1), str(value - 1), "64"]
    if isinstance(value, float):
        return [str(value / 2), "0.5", "inf"]
    return [word for word in WORDS if word != value]


def with_value(recipe: Recipe, path: str, word: str) -> Recipe | None:
    """The recipe with another value of a field, None where that is none of its own."""
    try:
        changed = with_settings(recipe, [f"{path}={word}"])
    except UserError:
        return None
    return changed if changed != recipe else None


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_differ_in_any_field_read_differently(name: str) -> None:
    recipe = named_recipe(name)
    for path, value in settable(recipe):
        changed = [other for word in others(value) if (other := with_value(recipe, path, word)) is not None]
        assert changed or path.removeprefix("weights.") in ALONE, path
        for other in changed:
            assert full_label(other) != full_label(recipe), path
            assert full_label(other).split("-")[0] == recipe.label().split("-")[0]


def test_what_the_tables_compare_is_said_in_words() -> None:
    def label(name: str, *settings: str) -> str:
        return full_label(with_settings(named_recipe(name), settings))

    assert label("zeroquant-w8a8-lkd", "tuning.steps=100", "tuning.lr=1e-6").endswith("-lkd-steps100-lr1e-06")
    assert label("smoothquant-w8a8", "transforms.smooth.alpha=0.8") == "smooth-rtn-w8row-a8-alpha0.8"
    assert label("gptq", "weights.act_order=false") == "gptq-w3g128-no-act_order"
    assert label("gptq-autogptq") == "gptq-w3g128-no-static_groups"
    assert label("gptq-row") == "gptq-w4row-no-true_sequential"
    assert label("prefixquant-w4a8kv4-static-ft").endswith("-prefixquant-behind-epochs10")
    assert label("bcq", "weights.rounds=1") == "bcq-w4g128-rounds1"
    assert label("rtn", "weights.grid.clip_search=true") == "rtn-w3g128-clip_search"
    assert label("rtn-w8a8", "activations.static=true").startswith("rtn-w8row-a8static")


def test_a_label_says_whose_convention_differs() -> None:
    for part, mark in (("weights", "w"), ("activations", "a")):
        recipe = with_settings(named_recipe("rtn-w8a8"), [f"{part}.grid.convention=gptq-asym"])
        assert full_label(recipe) == f"rtn-w8row-a8-{mark}-gptq-asym"
    assert (
        full_label(with_settings(named_recipe("rtn-w4"), ["weights.grid.convention=gptq-sym"])) == "rtn-w4g128-gptq-sym"
    )


@pytest.mark.parametrize("name", KV_POLICIES)
def test_kv_policies_that_differ_in_any_field_read_differently(name: str) -> None:
    recipe = Recipe(kv_cache=KV_POLICIES[name](bits=4))
    seen = {kv_label(describe(recipe.kv_cache)): "the default"}
    for path, value in leaves(recipe.kv_cache, "kv_cache"):
        words = [*KV_WORDS, *others(value)]
        words = ["0123456789abcdef" * 4] if path.endswith("sha256") else words
        made = {other.kv_cache for word in words if (other := with_value(recipe, path, word)) is not None}
        assert made, path
        for policy in made:
            label = kv_label(describe(policy))
            assert label not in seen, (label, path, seen.get(label))
            seen[label] = path


def test_a_kv_policy_is_called_by_bits_groups_word_and_what_is_not_its_default() -> None:
    def label(name: str, bits: int, *settings: str) -> str:
        told = with_settings(Recipe(kv_cache=KV_POLICIES[name](bits=bits)), [f"kv_cache.{one}" for one in settings])
        return kv_label(describe(told.kv_cache))

    assert kv_label(None) == "16"
    defaults = ("4 per_head", "4 rotated", "4 static", "4 clipped", "4g32 kivi", "4 kvquant", "4 turboquant")
    assert tuple(label(name, 4) for name in KV_POLICIES) == defaults
    assert label("kivi", 2, "prefill=final") == "2g32 kivi final"
    assert label("kivi", 2, "residual=32") == "2g32 kivi residual32"
    assert label("kvquant", 4, "outliers=0", "levels=uniform") == "4 kvquant outliers0 uniform"
    assert label("rotated", 4, "keep=1") == "4 rotated keep1"
    assert label("static", 4, "rotate_keys=true") == "4 static rotate_keys"
    assert kv_label({"kind": "Unheard", "bits": 3}) == "3 Unheard"


def test_no_two_named_recipes_of_different_checkpoints_have_one_label() -> None:
    made: dict[str, Any] = {}
    for row in RECIPES.values():
        parts = describe(replace(row.recipe, kv_cache=None, prefix="none", calibrate_behind_prefix=False))
        parts.pop("calibration")
        assert made.setdefault(full_label(row.recipe), parts) == parts


def test_the_first_recipe_of_a_kind_keeps_the_label_that_it_had() -> None:
    for name in ("rtn", "gptq", "awq", "spqr", "bcq-row", "omniquant", "quarot", "quarot-rtn", "rotate", "gptq-w4a4kv4",
                 "smoothquant-w8a8-qllm", "zeroquant-w4-8a16-lkd", "prefixquant-w4a4kv4-dynamic"):  # fmt: skip
        assert full_label(named_recipe(name)) == named_recipe(name).label()


def test_parts_that_no_row_has_together_are_compared_one_by_one() -> None:
    made = put_together(named_recipe("smoothquant-w8a8"), {"weights": ["gptq-w4"]})
    assert full_label(made).startswith("smooth-gptq-w4g128-a8")
    changed = with_settings(made, ["transforms.smooth.alpha=0.7", "weights.damp=0.1"])
    assert full_label(changed) != full_label(made)
    assert "alpha0.7" in full_label(changed)
    assert "damp0.1" in full_label(changed)


def test_an_older_description_without_a_later_field_reads_as_its_default() -> None:
    described = describe(named_recipe("smoothquant-w8a8-qllm"))
    assert "rows" not in described["attention"]
    assert told("x", described) == "x"
    described["weights"] = {"kind": "Unheard", "grid": {"kind": "UniformGrid", "bits": 3, "group_size": 8}}
    assert told("unheard-w3g8", described).startswith("unheard-w3g8-alpha0.55")


# where checkpoints lie ------------------------------------------------------------------------------------------------


@pytest.fixture
def dense(tiny_checkpoint: Callable[..., Path], intactkv_root: Path) -> Path:
    return tiny_checkpoint(intactkv_root, "llama")


def test_a_checkpoint_of_any_label_is_found_by_its_identity(dense: Path) -> None:
    recipe = Recipe(weights=RTN(UniformGrid(4, 32, "gptq-sym")))
    plan = plan_run(dense, recipe, device=CPU)
    place = plan.written(recipe)
    assert place.name == f"rtn-w4g32-gptq-sym-{plan.artefact.identity}"
    earlier = place.rename(place.with_name(f"{recipe.label()}-{plan.artefact.identity}"))
    before = {file.name: file.stat().st_mtime_ns for file in earlier.iterdir()}
    again = plan_run(dense, recipe, device=CPU)
    assert again.written(recipe) == again.directory_of(recipe) == earlier
    assert {file.name: file.stat().st_mtime_ns for file in earlier.iterdir()} == before
    # A half-finished one is taken up where it is.
    (earlier / "block-002.safetensors").unlink()
    earlier.rename(partial_of(earlier))
    assert again.written(recipe) == earlier
    assert (earlier / "block-002.safetensors").is_file()
    # A directory that only ends like it is not it.
    shutil.rmtree(earlier)
    (earlier.with_name(f"other-{plan.artefact.identity}")).mkdir()
    assert again.directory_of(recipe) == place


def test_records_are_still_named_by_the_label_that_they_were_stored_under(dense: Path) -> None:
    recipe = Recipe((Smooth(0.7),), GPTQ(UniformGrid(4, 32), act_order=False))
    bare = replace(recipe, transforms=(), weights=RTN(UniformGrid(4, 32, "gptq-sym")))
    assert plan_run(dense, bare, device=CPU).describe()["weights"] == "rtn-w4g32"
    settings = {"weights": "smooth-gptq-w4g32-behind", "recipe": describe(recipe)}
    assert weights_label(settings) == "smooth-gptq-w4g32-alpha0.7-no-act_order"


def test_a_table_says_what_differs(dense: Path, text: Path, run_main: Callable[..., tuple[int, str, str]]) -> None:
    for alpha in (0.5, 0.6):
        code, _, err = run_main(
            eval_main, "ppl", "--model", dense, "--recipe", "smoothquant-w8a8",
            "--set", f"transforms.smooth.alpha={alpha}",
            "--calibration", text, "--calibration-samples", 2, "--calibration-length", 24, "--corpus", text,
            "--window", 32, "--limit", 2,
        )  # fmt: skip
        assert code == 0, err
    code, out, err = run_main(eval_main, "table")
    assert code == 0, err
    assert re.search(r"\| smooth-rtn-w8row-a8 +\|", out)
    assert re.search(r"\| smooth-rtn-w8row-a8-alpha0.6 +\|", out)
