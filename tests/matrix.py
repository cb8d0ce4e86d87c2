"""Every family of the architecture table with every method, behind every prefix: what runs, and what is refused.

    python -m tests.matrix [--families NAME …] [--recipes NAME …] [--run]

prints a row a recipe and a column a family, how many cells run and refuse, and each refusal's line once. With --run the
cells that shall run do, on tiny models, and are held to the laws below. tests/test_families.py is made of the same.

A new row of the table, or a new named recipe in `RECIPES`, is a row or a column here. A row needs its models' usual
name in `MODELS` too.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as pytest does

import torch
from common import FOXES
from tiny import VARIANTS, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from corpora.errors import UserError
from eval.doctor.suits import laid_out
from intactkv.architecture import ARCHITECTURES, Architecture, architecture_of
from intactkv.attach import IntactModel, attach
from quantization.grids.stored import restore
from quantization.kv_cache import KV_POLICIES
from quantization.named import named_recipe
from quantization.recipes.recipe import Calibration, Recipe, with_settings
from quantization.runs.checkpoint import block_file, read_block
from quantization.runs.dense import empty_model_of
from quantization.runs.plan import Plan, plan_run
from quantization.runs.suited import refusal

__all__ = ["FAMILIES", "PREFIXES", "RECIPES", "Cell", "decided", "held_to_the_laws", "models", "row_of"]

LAYERS = 2  # of the tiny models
LENGTH = 16  # tokens that methods calibrate on
TEXT = torch.randint(4, 101, (2, 11), generator=torch.Generator().manual_seed(6))
# The words of --prefix, by the tokens that the tiny tokenizer makes of them. Where a method calibrates, its text runs
# behind the three tokens too.
PREFIXES: Mapping[str, int] = {"none": 0, "bos": 1, "xy": 3}
BEHIND = "xy"
# What is published under a model type.
MODELS: Mapping[str, str] = {
    "llama": "LLaMA 1 to 3, Vicuna, SmolLM2, Yi",
    "mistral": "Mistral 7B, Small 3",
    "qwen2": "Qwen 1.5 to 2.5",
    "qwen3": "Qwen3",
    "opt": "OPT",
    "phi3": "Phi-3, Phi-3.5, Phi-4",
    "gpt_neox": "GPT-NeoX-20B, Pythia",
    "glm4": "GLM-4-0414",
    "gpt2": "GPT-2",
    "bloom": "BLOOM",
    "falcon": "Falcon 7B, 40B, RW, 11B",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text alone (270M, 1B)",
    "olmo2": "OLMo 2",
    "cohere": "Command R, R+",
    "cohere2": "Command R7B, A",
    "stablelm": "StableLM 2, 3B",
    "granite": "Granite 3",
    "smollm3": "SmolLM3",
    "ministral": "Ministral 8B",
    "ministral3": "Ministral 3, text alone",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "olmoe": "OLMoE",
}
GROUPS, TRAINED = "weights.grid.group_size=16", "tuning.held_out=1"
# A named recipe and settings that fit a tiny model. Where it can be, everything has eight bits: then the logits must be
# near the dense model's, and a fault shows.
NAMED: Mapping[str, tuple[str, ...]] = {
    "rtn-w4": (GROUPS, "weights.grid.bits=8"),
    "gptq-w4": (GROUPS, "weights.grid.bits=8"),
    "awq-w4": (GROUPS, "weights.grid.bits=8"),
    "omniquant-w4": (GROUPS, "weights.grid.bits=8", "weights.epochs=1"),
    "omniquant-let": ("weights.grid.bits=8", "weights.epochs=1"),
    "omniquant-w6a6": ("weights.epochs=1",),
    "spqr": (),
    "bcq-w3": (GROUPS, "weights.rounds=2"),
    "gptq-bcq": (GROUPS,),
    "smooth": (),
    "smoothquant-w8a8": (),
    "smoothquant-w8a8-qllm": (),
    "rotate": (),
    "quarot": ("weights.grid.bits=8", "activations.grid.bits=8", "kv_cache.bits=8"),
    "zeroquant-w8a8": (),
    "zeroquant-w8a8-lkd": ("tuning.steps=2", "tuning.batch=1", TRAINED),
    "prefixquant-w4a8kv4-static": (
        "weights.grid.bits=8", "kv_cache.bits=8", "tuning.batch=1", "tuning.held_out=0.5", "tuning.mse_init_size=1",
    ),
}  # fmt: skip


def _small(recipe: Recipe, settings: tuple[str, ...]) -> Recipe:
    return with_settings(replace(recipe, prefix="none", calibrate_behind_prefix=False), settings)


RECIPES: Mapping[str, Recipe] = {name: _small(named_recipe(name), settings) for name, settings in NAMED.items()} | {
    f"kv:{name}": _small(Recipe(kv_cache=kind(bits=8 if 8 in kind.allowed_bits else 4)), settings)
    for name, kind in KV_POLICIES.items()
    for settings in [{"kivi": ("kv_cache.group_size=8", "kv_cache.residual=8"),
                      "kvquant": ("kv_cache.sinks=0", "kv_cache.weighting=none")}.get(name, ())]
}  # fmt: skip


# Every row of the table, and variants of some: the configuration's type, and what it says.
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {"num_hidden_layers": LAYERS}) for family in ARCHITECTURES},
    **{name: (family, {"num_hidden_layers": LAYERS, **overrides}) for name, (family, overrides) in VARIANTS.items()},
}


@cache
def _empty(family: str) -> PreTrainedModel | str:
    """A model without weights; why not, of a variant that its row does not know."""
    kind, overrides = FAMILIES[family]
    try:
        return empty_model_of(tiny_config(kind, **overrides))
    except UserError as error:
        return str(error)


def row_of(family: str) -> Architecture | None:
    """Where its parts are; None if the row does not know this variant."""
    model = _empty(family)
    return None if isinstance(model, str) else architecture_of(model.config)


def decided(family: str, recipe: str, prefix: str) -> str | None:
    """Why a cell refuses, in one line; None if it shall run. Nothing is loaded."""
    model = _empty(family)
    asked = replace(RECIPES[recipe], calibration=Calibration(length=LENGTH))
    return model if isinstance(model, str) else refusal(model, asked, PREFIXES[prefix])


@dataclass
class Cell:
    """A family's tiny checkpoint with a recipe, behind a prefix. text: a file to calibrate on."""

    checkpoint: Path
    text: Path
    recipe: str
    prefix: str

    @property
    def asked(self) -> Recipe:
        """The recipe as a command line would spell it."""
        recipe = replace(RECIPES[self.recipe], prefix=self.prefix)
        recipe = replace(recipe, calibration=Calibration(str(self.text), samples=2, length=LENGTH))
        return replace(recipe, calibrate_behind_prefix=self.prefix == BEHIND and recipe.calibrates)

    def plan(self) -> Plan:
        """Its plan, as every program makes it."""
        return plan_run(self.checkpoint, self.asked, device=torch.device("cpu"))

    @cached_property
    def whole(self) -> Tensor:
        """Prefix and text, (2, P + T)."""
        lead = torch.tensor(self.plan().choice.ids, dtype=torch.long)
        return torch.cat([lead.expand(2, -1), TEXT], dim=1)


def _far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def in_chunks(model: IntactModel, text: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Logits of a text behind the prefix, fed in pieces of these sizes: (B, T, V)."""
    cache = model.new_cache()
    return torch.cat([model.feed(part, cache=cache).logits for part in text.split(sizes, dim=1)], dim=1)


@torch.no_grad()
def held_to_the_laws(cell: Cell, dense: PreTrainedModel) -> None:
    """Make the cell's model and assert all of it. dense: the family's own model, as transformers computes it.

    twin = dense        with nothing rounded, text behind the prefix has the logits of the whole text
    loaded = loaded     what is read again computes the same bits
    pieces = one pass   text behind the prefix, in pieces
    near                weights are near the twin's; with eight bits everywhere, logits near the dense model's
    """
    recipe, whole, size = cell.asked, cell.whole, TEXT.shape[1]
    expected = dense(whole, use_cache=False).logits
    plan = cell.plan()
    model = plan.load()
    twin = plan.twin()
    alone = attach(twin, model.prefix).score(whole)
    assert _far(alone, expected) < 1e-4, f"the twin is {_far(alone, expected):.1e} from the dense model"

    logits = model.score(whole)
    assert torch.equal(cell.plan().load().score(whole), logits), "loading it again gives other bits"

    # Where inputs or the cache are rounded, a value between two levels may fall to either side.
    rounds = recipe.kv_cache or recipe.activations or recipe.attention
    pieces = in_chunks(model, TEXT, (4, 1, size - 5))
    one = in_chunks(model, TEXT, (size,))
    moved = _far(pieces, one)
    if rounds and architecture_of(dense.config).experts is not None:
        # There a router near a tie sends this token, and few others, to another expert: three in four stay.
        moved = float(((pieces - one).norm(dim=-1) / one.norm(dim=-1)).quantile(0.75))
    assert moved < (2e-2 if rounds else 1e-4), f"in pieces the logits move by {moved:.1e}"

    if recipe.weights is not None:
        _weights_are_near(plan.written(plan.recipe), twin, recipe.weights.grid.bits)
    parts = [part.grid.bits for part in (recipe.weights, recipe.activations, recipe.attention) if part is not None]
    widths = [*parts, *([recipe.kv_cache.bits] if recipe.kv_cache is not None else [])]
    error = _far(logits, expected)
    if not widths:
        assert error < 1e-4
    elif min(widths) >= 8:
        # Of the middle token: where a router is near a tie, rounding sends a token to other experts (1 to 5 of 22).
        middle = float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
        assert middle < 0.2, f"with eight bits the logits of the middle token are {middle:.2f} from the dense model's"
    assert bool(logits.isfinite().all())


def _weights_are_near(checkpoint: Path, twin: PreTrainedModel, bits: int) -> None:
    # A step takes 2⁻ᵇ of a range of a few deviations. GPTQ adds to its error where the text is short; another basis
    # would be √2 away.
    bound = min(1.0, 6 * 2.0 ** -min(bits, 4))
    for index in range(LAYERS):
        for name, (kind, tensors, header) in read_block(block_file(checkpoint, index)).linears.items():
            exact, found = twin.get_parameter(f"{name}.weight"), restore(kind, tensors, header).dequantize()
            # GPTQ makes columns 0 whose input is 0 on all of the text, behind a ReLU. Binary codes sum to nearly 0.
            read = found.abs().amax(dim=0) > 1e-6 * exact.abs().max()
            error = _far(found[:, read], exact[:, read])
            assert read.float().mean() > 0.5
            assert error < bound, f"{name} is {error:.1e} from the twin's"


def table(families: list[str], recipes: list[str]) -> str:
    """What runs: a digit says behind how many of the prefixes, a dot that it refuses. Then each refusal, once."""
    reasons = {(f, r, p): decided(f, r, p) for r in recipes for f in families for p in PREFIXES}
    runs = Counter((f, r) for (f, r, _), reason in reasons.items() if reason is None)
    width = max(map(len, recipes))
    lines = [" " * width + "".join(f" {f}" for f in families)]
    for recipe in recipes:
        cells = "".join(f" {runs[f, recipe] or '.':>{len(f)}}" for f in families)
        lines.append(f"{recipe:<{width}}{cells}")
    said: dict[str, list[str]] = {}
    for (family, recipe, prefix), reason in reasons.items():
        if reason is not None:
            said.setdefault(reason, []).append(recipe if reasons[family, recipe, "none"] else f"{recipe} {prefix}")
    run = sum(runs.values())
    lines += ["", f"{len(reasons)} cells ({len(families)} families × {len(recipes)} recipes × {len(PREFIXES)} prefixes"
              f" {', '.join(PREFIXES)}): {run} run, {len(reasons) - run} refuse, for {len(said)} reasons"]  # fmt: skip
    lines += [f"- {reason}\n  [{', '.join(dict.fromkeys(cells))}]" for reason, cells in sorted(said.items())]
    return "\n".join(lines)


def models() -> str:
    """The tables of docs/models.md."""
    if missing := set(ARCHITECTURES) - set(MODELS):
        sys.exit(f"error: MODELS of tests/matrix.py does not say what is published as {', '.join(sorted(missing))}")
    lines = ["| model_type | models | laid out | refused |", "|---|---|---|---|"]
    notes: dict[str, int] = {}  # and its number
    for family, (kind, overrides) in FAMILIES.items():
        refused: dict[str, list[str]] = {}
        for recipe in RECIPES:
            if (reason := decided(family, recipe, "none")) is not None:
                refused.setdefault(reason, []).append(recipe)
        places = []
        for reason, recipes in refused.items():
            what = "every method" if len(recipes) == len(RECIPES) else ", ".join(f"`{recipe}`" for recipe in recipes)
            own = reason.replace(f"this {kind} model", "this model").replace(f"this {kind}", "this model")
            first = own[0] if "." in own.split()[0] else own[0].upper()  # a module keeps its name
            text = f"{first}{own[1:]}. Refused: {what}"
            places.append(str(notes.setdefault(text, len(notes) + 1)))
        model = _empty(family)
        own = "" if isinstance(model, str) else laid_out(architecture_of(model.config))
        own = "–" if not own or own.startswith("nothing") else own.replace("4 experts", "experts")
        said = ", ".join(f"{name}={value}" for name, value in overrides.items() if name != "num_hidden_layers")
        lines.append(f"| `{kind}` | {said or MODELS[family]} | {own} | {', '.join(places) or '–'} |")
    lines += ["", *(f"{number}. {text}." for text, number in notes.items())]
    return "\n".join(lines)


def run_all(families: list[str], recipes: list[str]) -> int:
    """Run every cell that is not refused; print what is wrong, and return how often."""
    from conftest import _tiny_checkpoint

    wrong, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["INTACTKV_ROOT"] = folder
        text = Path(folder) / "text.txt"
        text.write_text(FOXES)
        for family in families:
            kind, overrides = FAMILIES[family]
            if isinstance(_empty(family), str):
                continue
            checkpoint = _tiny_checkpoint(Path(folder) / family.replace(" ", "-"), kind, **overrides)
            dense = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
            cells = [(r, p) for r in recipes for p in PREFIXES if decided(family, r, p) is None]
            for recipe, prefix in cells:
                try:
                    held_to_the_laws(Cell(checkpoint, text, recipe, prefix), dense)
                except Exception as error:  # the next cell is not its fault
                    wrong += 1
                    print(f"  WRONG {family} {recipe} {prefix}: {type(error).__name__} {error}", flush=True)
            print(f"{family:<12} {len(cells)} cells, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{wrong} wrong")
    return wrong


def main() -> None:
    """Print the matrix; exit code 1 if a cell that shall run does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--run", action="store_true", help="run the cells too: about half a second each")
    parser.add_argument("--models", action="store_true", help="print the tables of docs/models.md instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.models:
        print(models())
        return
    print(table(options.families, options.recipes))
    if options.run:
        logging.disable()
        sys.exit(bool(run_all(options.families, options.recipes)))


if __name__ == "__main__":
    main()
