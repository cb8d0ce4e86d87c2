"""Every family of the architecture table: its model is transformers' own, and each method runs on it or says why not.

The cells and the laws are those of tests/matrix.py, made from the table: a new row is tested the day it is added.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from common import FOXES
from matrix import FAMILIES, MODELS, PREFIXES, RECIPES, TEXT, Cell, decided, held_to_the_laws, models, row_of
from tiny import random_model, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from corpora.errors import UserError
from intactkv.architecture import ARCHITECTURES, Architecture, architecture_of
from intactkv.attach import attach
from intactkv.families import experts, fused, llama, norms
from intactkv.prefix import build_prefix
from quantization.runs.configuration import check_windows
from quantization.runs.opening import load_model

CELLS = [(recipe, prefix) for recipe in RECIPES for prefix in PREFIXES]
# What a row can be wrong about: the order of linears, feeds, norms, the residual stream; and what turns keys.
OFTEN = [("awq-w4", "bos"), ("quarot", "bos"), ("gptq-w4", "xy"), ("smooth", "xy")]
TURNED = [("kv:kvquant", "xy"), ("omniquant-let", "xy")]
# Of the other cells, every fifth recipe of every family, behind prefixes in turns. `python -m tests.matrix --run` runs
# the whole product.
TURNS = 5


def _cells() -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """The fast cells, and the slow ones."""
    fast, slow, rows = list[tuple[str, str, str]](), list[tuple[str, str, str]](), list[object]()
    for i, family in enumerate(FAMILIES):
        row = row_of(family)
        turned = [TURNED[i % 2], TURNED[(i + 1) % 2]]
        # A family with the row of an earlier one differs from it in the module that turns keys, if at all.
        first, then = ([], []) if any(row is earlier for earlier in rows) else (OFTEN[:2], OFTEN[2:])
        in_turns = [
            (recipe, list(PREFIXES)[(i // TURNS + j // TURNS) % len(PREFIXES)])
            for j, recipe in enumerate(RECIPES)
            if (i + j) % TURNS == 0
        ]
        rows.append(row)
        chosen = [*first, turned[0]]
        fast += [(family, *cell) for cell in chosen]
        slow += [(family, *cell) for cell in dict.fromkeys([*then, turned[1], *in_turns]) if cell not in chosen]
    return fast, slow


FAST, SLOW = _cells()

Opened = Callable[[str], tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root of its own, with a text to calibrate on."""
    root = tmp_path_factory.mktemp("families")
    (root / "text.txt").write_text(FOXES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTACTKV_ROOT", str(root))
        yield root


@pytest.fixture(scope="module")
def opened(place: Path, tiny_checkpoint: Callable[..., Path]) -> Opened:
    """opened(family) -> its tiny checkpoint, and transformers' own model of it."""

    @cache
    def make(family: str) -> tuple[Path, PreTrainedModel]:
        kind, overrides = FAMILIES[family]
        checkpoint = tiny_checkpoint(place / family.replace(" ", "-"), kind, **overrides)
        return checkpoint, AutoModelForCausalLM.from_pretrained(checkpoint).eval().requires_grad_(False)

    return make


# Those that their row does not refuse whole.
OPEN = [family for family in FAMILIES if decided(family, "rtn-w4", "none") is None]


@pytest.mark.parametrize("family", OPEN)
@torch.no_grad()
def test_the_model_that_methods_see_is_transformers_own(family: str, opened: Opened) -> None:
    checkpoint, own = opened(family)
    ours = load_model(checkpoint, torch.float32, torch.device("cpu"))
    expected = own(TEXT, use_cache=False).logits
    torch.testing.assert_close(ours(TEXT).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# tests/test_family_caches.py holds the rows to it.
@pytest.mark.parametrize("family", [family for family in OPEN if family not in ARCHITECTURES])
@torch.no_grad()
def test_text_behind_a_prefix_is_the_whole_text_with_pads_or_without(family: str, opened: Opened) -> None:
    checkpoint, own = opened(family)
    ours = load_model(checkpoint, torch.float32, torch.device("cpu"))
    lead = torch.tensor([1, 40, 7])
    padded, mask = TEXT.clone(), torch.ones_like(TEXT)
    padded[1, :4], mask[1, :4] = 0, 0
    model = attach(ours, build_prefix(ours, lead))
    window = model.new_cache().smallest_window
    if window is not None and window < len(lead) + TEXT.shape[1]:  # pads would push the prefix out of it
        with pytest.raises(UserError, match=f"does not fit the model's sliding window of {window}"):
            model.score(padded, mask)
        found, rows = model.score(TEXT), ((0, 0), (1, 0))
    else:
        found, rows = model.score(padded, mask), ((0, 0), (1, 4))
    for row, pads in rows:
        whole = torch.cat([lead, TEXT[row, pads:]])[None]
        expected = own(whole, use_cache=False).logits[0, len(lead) :]
        torch.testing.assert_close(found[row, pads:], expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def _made(place: Path) -> set[Path]:
    """All files but cached tokens: the text is read before a model is asked."""
    outputs = place / "outputs"
    return {path for path in outputs.rglob("*") if path.is_file() and outputs / "cache" / "tokens" not in path.parents}


def _held(family: str, recipe: str, prefix: str, opened: Opened, place: Path) -> None:
    checkpoint, dense = opened(family)
    cell, reason = Cell(checkpoint, place / "text.txt", recipe, prefix), decided(family, recipe, prefix)
    if reason is None:
        held_to_the_laws(cell, dense)
        return
    before = _made(place)
    with pytest.raises(UserError) as refused:
        cell.plan().load()
    assert str(refused.value) == reason
    assert _made(place) == before


@pytest.mark.parametrize(("family", "recipe", "prefix"), FAST)
def test_a_cell_runs_or_refuses_as_decided(family: str, recipe: str, prefix: str, opened: Opened, place: Path) -> None:
    _held(family, recipe, prefix, opened, place)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "recipe", "prefix"), SLOW)
def test_more_cells_run_or_refuse_as_decided(
    family: str, recipe: str, prefix: str, opened: Opened, place: Path
) -> None:
    _held(family, recipe, prefix, opened, place)


def test_the_chosen_cells_show_every_method_on_every_kind_of_family() -> None:
    """A kind of family is a file of rows; a kind of recipe, what it is made of. Cells that refuse count for nothing."""
    files, shown, met = (llama, fused, norms, experts), defaultdict[str, set[int]](set), defaultdict[str, set[Any]](set)
    prefixes = defaultdict[str, set[str]](set)
    for family, recipe, prefix in [*FAST, *SLOW]:
        if decided(family, recipe, prefix) is None:
            made = RECIPES[recipe]
            parts = (*made.transforms, made.weights, made.activations, made.attention, made.kv_cache)
            shown[recipe] |= {i for i, file in enumerate(files) if FAMILIES[family][0] in file.ROWS}
            met[family].add(tuple(type(part) for part in parts))
            prefixes[recipe].add(prefix)
    assert {recipe for recipe in RECIPES if len(shown[recipe]) < 3} == set()
    assert {family for family in OPEN if len(met[family]) < 4} == set()
    assert {recipe for recipe in RECIPES if not prefixes[recipe] & (PREFIXES.keys() - {"none"})} == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refusal_is_one_line_that_names_the_family_and_the_way_out(family: str) -> None:
    reasons = {reason for cell in CELLS if (reason := decided(family, *cell)) is not None}
    kind, _ = FAMILIES[family]
    named = {kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]}
    for reason in reasons:
        assert "\n" not in reason
        assert named & set(re.findall(r"\w+", reason)), f"names neither the type nor the class: {reason}"
        assert ";" in reason, "what to do instead"
    runs = [cell for cell in CELLS if decided(family, *cell) is None]
    if family in ARCHITECTURES:  # of a variant, all may be refused
        assert {("rtn-w4", "none"), ("gptq-w4", "xy"), ("kv:per_head", "bos")} <= set(runs)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_scale_passes_an_activation_without_a_gate_but_a_relu(kind: str) -> None:
    fields = {"hidden_act", "activation_function", "activation"} & vars(tiny_config(kind)).keys()

    def passed(activation: str) -> set[int]:
        """How many linears stand beside those whose scales move to the last linear of a feed-forward part."""
        row = architecture_of(tiny_config(kind, **dict.fromkeys(fields, activation)))
        beside = {name: len(names) for names in row.linears for name in names}
        return {beside[feed.producer] for feed in row.feeds if feed.producer in beside and feed.inside in row.downs}

    assert passed("gelu") <= {2}  # a gate and what it lets through
    if fields:  # BLOOM has GELU whatever its configuration says
        assert passed("relu") in ({1}, {2})


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_what_has_no_window_is_refused_where_transformers_cannot_run_it(kind: str) -> None:
    config = tiny_config(kind, num_hidden_layers=1, layer_types=["full_attention"], sliding_window=None)
    try:
        random_model(config)(TEXT)
    except ValueError:  # Could not find a `sliding_window` argument in the config
        with pytest.raises(UserError, match=r"^config\.json has no sliding_window, but its model_type asks for one; "):
            check_windows(config, Path("config.json"))
    else:
        check_windows(config, Path("config.json"))


@pytest.mark.parametrize("kind", ["phi3", "gpt_neox", "glm4", "stablelm"])
def test_heads_that_turn_an_odd_number_of_channels_are_refused(kind: str) -> None:
    def row(factor: float) -> Architecture:
        rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": factor}
        return architecture_of(tiny_config(kind, rope_parameters=rope))

    assert row(0.5).turned == 8
    with pytest.raises(UserError, match=rf"^this {kind} turns 9 of the 16 channels .*\(partial_rotary_factor 0\.6\)"):
        row(0.6)


def test_the_page_of_models_says_what_is_decided() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    _, _, behind = page.partition("<!-- models -->\n")
    assert behind.partition("\n<!-- end -->")[0] == models(), "python -m tests.matrix --models prints it"


def test_every_family_of_the_table_has_a_name_that_people_know() -> None:
    assert set(MODELS) == set(ARCHITECTURES), "MODELS of tests/matrix.py names what is published under each type"
