"""Recipes that are put together from parts of named ones, and the options that spell them."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from corpora.errors import UserError
from eval.__main__ import main as eval_main
from intactkv.__main__ import main as intactkv_main
from quantization.__main__ import main as quantize_main
from quantization.named import PARTS, RECIPES, named_recipe, put_together
from quantization.programs.export import main as export_main
from quantization.recipes.recipe import Recipe, describe
from quantization.runs.checkpoint import read_manifest
from quantization.transforms.rotate import Rotate
from quantization.transforms.smooth import Smooth

Program = Callable[..., tuple[int, str, str]]


def parts_of(name: str) -> dict[str, list[str]]:
    """All parts of a named recipe, by that name; `none` for those that it lacks."""
    return {part: [name if getattr(named_recipe(name), part) else "none"] for part in PARTS}


def bare(recipe: Recipe) -> Recipe:
    """Without the prefix, which is no part."""
    return replace(recipe, prefix="none", calibrate_behind_prefix=False)


# the library ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("start", ["fp16", "awq", "quarot", "prefixquant-w4a8kv4-static-ft", "zeroquant-w4a4-lkd"])
def test_all_parts_of_a_named_recipe_are_that_recipe(start: str, name: str) -> None:
    made = put_together(bare(named_recipe(start)), parts_of(name))
    assert made == bare(named_recipe(name))
    assert describe(made) == describe(bare(named_recipe(name)))


@pytest.mark.parametrize(
    ("start", "parts", "name"),
    [
        ("rtn-w8a8", {"transforms": ["smooth"]}, "smoothquant-w8a8"),
        ("smoothquant-w8a8", {"transforms": ["none"]}, "rtn-w8a8"),
        ("smooth", {"weights": ["rtn-w8a8"], "activations": ["rtn-w8a8"]}, "smoothquant-w8a8"),
        ("quarot", {"weights": ["quarot-rtn"]}, "quarot-rtn"),
        ("quarot", {"transforms": ["none"], "kv_cache": ["gptq-w4a4kv4"]}, "gptq-w4a4kv4"),
        ("zeroquant-w4-8a8-lkd", {"tuning": ["none"]}, "zeroquant-w4-8a8"),
        ("zeroquant-w4-8a8", {"activations": ["none"]}, "zeroquant-w4-8a16"),
        ("fp16", {"weights": ["awq"]}, "awq"),
        ("awq", {"weights": ["none"]}, "fp16"),
        ("awq", {"weights": ["gptq"]}, "gptq"),
    ],
)
def test_a_combination_that_has_a_name_has_that_names_identity(
    start: str, parts: dict[str, list[str]], name: str
) -> None:
    assert describe(put_together(named_recipe(start), parts)) == describe(named_recipe(name))


def test_no_parts_change_nothing() -> None:
    for row in RECIPES.values():
        assert put_together(row.recipe, {}) == row.recipe


def test_the_text_is_the_recipes_while_it_reads_any_and_else_that_of_the_first_part_that_does() -> None:
    smooth, gptq, awq = (named_recipe(name).calibration for name in ("smoothquant-w8a8", "gptq-w4", "awq"))
    assert len({smooth, gptq, awq}) == 3
    assert put_together(named_recipe("smoothquant-w8a8"), {"weights": ["gptq-w4"]}).calibration == smooth
    assert (
        put_together(named_recipe("rtn-w4"), {"transforms": ["smooth"], "weights": ["gptq-w4"]}).calibration == smooth
    )
    assert put_together(named_recipe("rtn-w4"), {"weights": ["awq"]}).calibration == awq
    assert put_together(named_recipe("awq"), {"weights": ["gptq-w4"]}).calibration == gptq


def test_transforms_come_in_the_one_order_that_works() -> None:
    for names in (["smooth", "rotate"], ["rotate", "smooth"]):
        made = put_together(named_recipe("rtn-w4"), {"transforms": names})
        assert made.transforms == (Rotate(), Smooth())


def test_what_is_behind_a_prefix_stays_behind_it_while_anything_reads_text() -> None:
    static = named_recipe("prefixquant-w4a4kv4-static")
    unrotated = put_together(static, {"transforms": ["none"]})
    assert (unrotated.prefix, unrotated.calibrate_behind_prefix) == ("auto", True)
    nothing = {part: ["none"] for part in ("weights", "activations", "tuning", "kv_cache")}
    assert put_together(static, nothing) == replace(
        Recipe(static.transforms, calibration=static.calibration), prefix="auto"
    )


@pytest.mark.parametrize(
    ("start", "parts", "said"),
    [
        ("rtn-w4", {"weights": ["kv4"]}, "the recipe kv4 has no weights to take; name one that has, such as rtn "),
        (
            "rtn-w4",
            {"transforms": ["gptq"]},
            "the recipe gptq has no transforms to take; name one that has, such as smooth",
        ),
        ("rtn-w4", {"activations": ["rtn-w4"]}, "the recipe rtn-w4 has no activations to take"),
        ("rtn-w4", {"weights": ["gptw"]}, "unknown recipe 'gptw'"),
        ("rtn-w4", {"transforms": ["rotate", "quarot"]}, "rotate was given twice"),
        ("rtn-w4", {"transforms": ["rotate", "none"]}, "none takes them all away, so it stands alone"),
        ("prefixquant-w4a4kv4-static", {"weights": ["gptq-w4"]}, "--weights rtn-w4, or take the search away"),
        ("prefixquant-w4a4kv4-static", {"weights": ["quarot-rtn"]}, "clip_search=true"),
        ("zeroquant-w8a8-lkd", {"weights": ["awq"]}, "--weights rtn-w4, or do without distillation"),
    ],
)
def test_what_cannot_be_put_together_is_refused_when_it_is_built(
    start: str, parts: dict[str, list[str]], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        put_together(named_recipe(start), parts)


# the options ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dense(tiny_checkpoint: Callable[..., Path], intactkv_root: Path) -> Path:
    return tiny_checkpoint(intactkv_root, "llama", num_key_value_heads=4)


@pytest.fixture
def call(dense: Path, text: Path, run_main: Program) -> Callable[..., tuple[int, str, str]]:
    """call(*arguments, main=…, first=…) -> exit code, stdout, stderr of a program on the tiny model, whose text is
    given where the recipe reads any."""

    def run(
        *arguments: object, main: Callable[[], None] = quantize_main, first: tuple[str, ...] = (), reads: bool = True
    ):
        small = ("--calibration", text, "--calibration-samples", 2, "--calibration-length", 24) if reads else ()
        return run_main(main, *first, "--model", dense, *small, *arguments)

    return run


def made_of(said: str) -> dict[str, Any]:
    """The recipe of the checkpoint that a program printed last."""
    return read_manifest(Path(said.split()[-1]))["recipe"]


GROUPS = ("--group-size", 32)
TUNED = ("--set", "tuning.mse_init_size=1")


@pytest.mark.parametrize(
    ("arguments", "label"),
    [
        (("--recipe", "smoothquant-w8a8", "--weights", "gptq-w4", *GROUPS), "smooth-gptq-w4g32-a8"),
        (("--recipe", "smoothquant-w8a8", "--set", "weights=gptq-w4", *GROUPS), "smooth-gptq-w4g32-a8"),
        (("--weights", "gptq-w4", "--transform", "smooth", *GROUPS), "smooth-gptq-w4g32"),
        (("--recipe", "awq-w4", "--activations", "rtn-w8a8", *GROUPS, "--set", "calibration.draw=segments"),
         "awq-w4g32-a8"),
        (("--recipe", "gptq-w4", "--transform", "rotate", "--transform", "smooth", *GROUPS),
         "rotate-smooth-gptq-w4g32"),
        (("--recipe", "smoothquant-w8a8", "--weights", "none"), "smooth-full-a8"),
        (("--recipe", "smoothquant-w8a8", "--activations", "none", "--bits", 4), "smooth-rtn-w4row"),
        (("--recipe", "rtn-w8a8", "--set", "tuning=zeroquant-w8a8-lkd", "--set", "tuning.steps=1", "--set",
          "tuning.held_out=1"), "rtn-w8row-a8-lkd"),
    ],
)  # fmt: skip
def test_a_combination_is_one_command(
    arguments: tuple[object, ...], label: str, call: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = call(*arguments)
    assert (code, err.count("error")) == (0, 0), err
    assert out.split()[0].startswith(label)
    code, out, err = call(*arguments, "--prefix", "bos", "--corpus", "sample", "--plan", main=eval_main, first=("ppl",))
    assert code == 0, err
    assert re.search(r"quantized checkpoint +present", out)


def test_the_parts_come_before_bits_and_fields(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = call(
        "--recipe", "rtn-w8a8", "--weights", "gptq", "--bits", 5, *GROUPS, "--set", "weights.damp=0.1"
    )
    assert code == 0, err
    weights = made_of(out)["weights"]
    assert (weights["kind"], weights["grid"]["bits"], weights["damp"]) == ("GPTQ", 5, 0.1)


PREFIXQUANT = {
    "unrotated": ("--transform", "none"),
    "16-bit weights": ("--weights", "none"),
    "16-bit inputs": ("--activations", "none"),
    "16-bit cache": ("--kv", "none"),
    "the cache alone": ("--weights", "none", "--activations", "none"),
    "weights alone": ("--activations", "none", "--kv", "none"),
}


@pytest.mark.parametrize("what", PREFIXQUANT)
@pytest.mark.parametrize("name", ["static", "dynamic", "static-ft", "dynamic-ft"])
def test_prefixquant_runs_without_any_of_its_parts(
    what: str, name: str, text: Path, call: Callable[..., tuple[int, str, str]], intactkv_root: Path
) -> None:
    recipe = ("--recipe", f"prefixquant-w4a4kv4-{name}", *PREFIXQUANT[what], "--prefix", "bos",
              "--calibrate-behind-prefix", "--set", "tuning.mse_init_size=1", "--set", "tuning.batch=1",
              "--set", "tuning.held_out=0.5",
              *(("--set", "tuning.epochs=1") if name.endswith("ft") else ()))  # fmt: skip
    code, out, err = call(*recipe)
    assert code == 0, err
    place = out.split()[-1]
    code, out, err = call(*recipe, "--corpus", text, "--window", 32, "--limit", 2, main=eval_main, first=("ppl",))
    assert code == 0, err
    code, _, err = call(*recipe, "--out", intactkv_root / "p.safetensors", main=intactkv_main, first=("build",))
    assert code == 0, err
    # Whatever rounds inputs or cache, no other runtime would: refused in one line, but for weights alone.
    for layout in ("compressed-tensors", "dense"):
        code, out, err = call("--model", place, "--format", layout, "--out", intactkv_root / layout, main=export_main,
                              reads=False)  # fmt: skip
        assert code in (0, 2)
        assert code == 0 or err.count("\n") == 1
        assert "Traceback" not in err


CONTRADICTIONS = {
    "bits": (("--recipe", "rtn", "--bits", 4, "--set", "weights.grid.bits=3"),
             "--bits 4 and --set weights.grid.bits=3 say different things"),
    "group size": (("--recipe", "rtn", "--group-size", 32, "--set", "weights.grid.group_size=16"),
                   "--group-size 32 and"),
    "text": (("--recipe", "gptq", "--set", "calibration.corpus=c4"), "and --set calibration.corpus=c4 say"),
    "samples": (("--recipe", "gptq", "--set", "calibration.samples=3"), "--calibration-samples 2 and"),
    "seed": (("--recipe", "gptq", "--seed", 1, "--set", "calibration.seed=2"), "--seed 1 and --set calibration.seed=2"),
    "prefix": (("--recipe", "rtn", "--prefix", "bos", "--set", "prefix=none"), "--prefix bos and --set prefix=none"),
    "behind": (("--recipe", "gptq", "--prefix", "bos", "--calibrate-behind-prefix", "--set",
                "calibrate_behind_prefix=false"), "--calibrate-behind-prefix true and"),
    "cache bits": (("--recipe", "rtn", "--kv-bits", 4, "--set", "kv_cache.bits=3"), "--kv-bits 4 and --set"),
    "bits of values": (("--recipe", "kv4", "--v-bits", 2, "--set", "kv_cache.v_bits=3"), "--v-bits 2 and"),
    "groups": (("--recipe", "kv4", "--kv-group-size", 8, "--set", "kv_cache.group_size=16"), "--kv-group-size 8 and"),
    "cache": (("--recipe", "rtn", "--kv", "static", "--kv-bits", 4, "--set", "kv_cache=kv4"), "and --set kv_cache=kv4"),
    "no cache of bits": (("--recipe", "rtn", "--kv", "none", "--kv-bits", 4), "--kv none keeps the cache"),
    "weights": (("--weights", "rtn", "--set", "weights=gptq"), "--weights rtn and --set weights=gptq"),
    "activations": (("--activations", "rtn-w8a8", "--set", "activations=none"), "--activations rtn-w8a8 and"),
    "transform": (("--transform", "none", "--set", "transforms=rotate"), "--transform none and"),
    "no transform and one": (("--transform", "none", "--transform", "rotate"), "it stands alone"),
    "bits of no weights": (("--recipe", "rtn-w8a8", "--weights", "none", "--bits", 4),
                           "the recipe rtn-w8a8 with weights none quantizes none"),
    "fields of no inputs": (("--recipe", "rtn-w8a8", "--activations", "none", "--set", "activations.grid.bits=6"),
                            "nothing below that field"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_options_that_contradict_each_other_are_refused_in_one_line(
    what: str, call: Callable[..., tuple[int, str, str]]
) -> None:
    arguments, said = CONTRADICTIONS[what]
    code, out, err = call(*arguments, reads=what in ("text", "samples"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_options_that_agree_are_taken(call: Callable[..., tuple[int, str, str]]) -> None:
    twice = ("--recipe", "rtn", "--bits", 4, "--set", "weights.grid.bits=4", "--weights", "rtn-w4", "--set",
             "weights=rtn-w4", *GROUPS)  # fmt: skip
    assert call(*twice, reads=False)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--recipe", "awq-w4", "--transform", "rotate"), "a rotation stands between them"),
        (("--recipe", "omniquant-let", "--transform", "rotate"), "a rotation stands between them"),
        (("--recipe", "smoothquant-w8a8", "--transform", "rotate", "--transform", "smooth", "--set",
          "transforms.smooth.down=true"), "a rotation stands between them"),
        (("--recipe", "prefixquant-w4a4kv4-static", "--weights", "awq-w4"), "awq cannot stand in front of it"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("plan", [(), ("--plan",)])
def test_parts_that_cannot_work_together_are_refused_before_any_text_is_read(
    arguments: tuple[object, ...],
    said: str,
    plan: tuple[str, ...],
    call: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_arguments: object, **_more: object) -> None:
        raise AssertionError("a text was read")

    monkeypatch.setattr("quantization.runs.plan.calibration_segments", refuse)
    monkeypatch.setattr("quantization.runs.plan.packed_documents", refuse)
    monkeypatch.setattr("quantization.runs.plan.find", refuse)
    code, out, err = call(*arguments, *GROUPS, *plan)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


@pytest.mark.parametrize(
    ("main", "first"),
    [
        (quantize_main, ()),
        (intactkv_main, ("build",)),
        (intactkv_main, ("export",)),
        (intactkv_main, ("calibrate",)),
        (intactkv_main, ("train-prefix",)),
        (eval_main, ("ppl",)),
        (eval_main, ("tasks",)),
        (eval_main, ("mtbench",)),
        (eval_main, ("stats", "linears")),
        (eval_main, ("plot", "act")),
    ],
)
def test_every_program_that_quantizes_knows_the_parts_and_the_cache(
    main: Callable[[], None], first: tuple[str, ...], run_main: Program
) -> None:
    said = run_main(main, *first, "--help")[1]
    for option in ("--recipe", "--weights", "--transform", "--activations", "--kv ", "--kv-bits", "--set"):
        assert option in said


def test_a_cache_that_no_checkpoint_holds_is_told(
    call: Callable[..., tuple[int, str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    said = "nothing of it is in this checkpoint"
    of_their_own = ("--k-bits", 8, "--v-bits", 4, "--kv-group-size", -1)
    assert call("--recipe", "rtn-w4", *GROUPS, "--kv-bits", 4, reads=False)[0] == 0
    assert f"--kv-bits: {said}" in caplog.text
    assert call("--recipe", "rtn-w3", *GROUPS, *of_their_own, reads=False)[0] == 0
    assert f"--k-bits, --v-bits, --kv-group-size: {said}" in caplog.text
    assert call("--recipe", "rtn-w2", *GROUPS, "--set", "kv_cache=kv4", reads=False)[0] == 0
    assert f"--set kv_cache=kv4: {said}" in caplog.text
    assert call("--recipe", "rtn-w4", *GROUPS, "--kv", "static", "--kv-bits", 4)[0] == 0  # an artefact of its own
    assert f"--kv, --kv-bits: {said}" in caplog.text
    caplog.clear()
    trained = ("--set", "tuning.mse_init_size=1", "--prefix", "none")
    assert call("--recipe", "prefixquant-w4a8kv4-static", *trained, "--kv", "static", "--kv-bits", 3)[0] == 0
    assert call("--recipe", "quarot", reads=True)[0] == 0  # nobody asked
    assert said not in caplog.text


def test_a_checkpoint_keeps_the_ranges_of_the_cache_that_it_was_quantized_for(
    call: Callable[..., tuple[int, str, str]], text: Path
) -> None:
    code, out, err = call("--recipe", "rtn-w4", *GROUPS, "--kv", "static", "--kv-bits", 4)
    assert code == 0, err
    assert made_of(out)["kv_cache"]["kind"] == "StaticPerHead"
    code, _, err = call("--model", out.split()[-1], "--corpus", text, "--window", 32, "--limit", 1, main=eval_main,
                           first=("ppl",), reads=False)  # fmt: skip
    assert code == 0, err
