"""Laws that every recipe obeys, on tiny models: a new row of the table is tested the day it is added.

saved = loaded          the checkpoint's model computes what the blocks computed that were written to it
packed = dequantized    the same bits either way
passed on = computed    calibration text leaves the last block as it does in the checkpoint's model
resumed = the same      a run that was killed between two blocks ends with the same files
near at eight bits      logits move, but little, where nothing is rounded to less
twin = dense            without rounding the model is the dense one, also behind the prefix
"""

import json
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import quantization.runs.one_block
import quantization.runs.pipeline
from corpora.errors import UserError
from intactkv.architecture import architecture_of
from intactkv.attach import IntactModel, attach
from intactkv.observe import outputs_of
from intactkv.policy import Bound, KVPolicy
from intactkv.prefix import Prefix, build_prefix
from quantization.grids.stored import restore
from quantization.grids.uniform import UniformGrid
from quantization.kernels.linear import QuantLinear
from quantization.kv_cache import PerHead, StaticPerHead
from quantization.model.activations import Activations
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import InputPath
from quantization.model.stream import CalibrationStream
from quantization.named import PUBLISHED_GROUP, RECIPES, named_recipe, put_together
from quantization.recipes.recipe import Recipe, with_settings
from quantization.runs.checkpoint import CHECKSUMS, block_file, load_quantized, read_block
from quantization.runs.kept import bound_kv
from quantization.runs.opening import rescaled
from quantization.runs.pipeline import quantize_checkpoint
from quantization.runs.plan import plan_run
from quantization.transforms.rotate import Rotate
from quantization.transforms.smooth import Smooth
from quantization.tuning.distill import Distill
from quantization.weights.rtn import RTN

SIZES = {
    "llama": {"num_hidden_layers": 2, "hidden_size": 32, "head_dim": 8, "intermediate_size": 96},
    "opt": {"num_hidden_layers": 2, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 96},
}
# Biases, norms of queries and keys, half precision: with one recipe each, where they meet what is special to it.
SIZES |= {"qwen2": SIZES["llama"], "qwen3": SIZES["llama"], "bfloat16": SIZES["llama"] | {"dtype": torch.bfloat16}}
KINDS = ("llama", "opt")
SEGMENTS = torch.randint(4, 101, (2, 10), generator=torch.Generator().manual_seed(5))
LEAD = torch.tensor([1, 40, 7])  # what calibration and models run behind
TEXT = torch.cat([LEAD.expand(2, -1), torch.randint(4, 101, (2, 9), generator=torch.Generator().manual_seed(6))], dim=1)
# Training takes a step or two here: the laws hold for any number of them.
SMALL = {
    "OmniQuant": ["weights.epochs=1"],
    "Distill": ["tuning.steps=2", "tuning.batch=1", "tuning.held_out=1"],
    "PrefixQuantTuning": ["tuning.batch=1", "tuning.held_out=0.5", "tuning.mse_init_size=1"],
}


def small(recipe: Recipe) -> Recipe:
    """The recipe at the size of a tiny model; its own prefix is left out, because the laws choose one."""
    settings = [s for part in (recipe.weights, recipe.tuning) for s in SMALL.get(type(part).__name__, [])]
    if getattr(recipe.tuning, "epochs", 0):
        settings.append("tuning.epochs=1")
    if recipe.weights is not None and recipe.weights.grid.group_size == PUBLISHED_GROUP:
        settings.append("weights.grid.group_size=16")
    return with_settings(replace(recipe, prefix="none", calibrate_behind_prefix=False), settings)


def named(makes_checkpoint: bool) -> dict[str, Recipe]:
    """Recipes by all their names: some rows are alike, or differ only in how long they train."""
    names: dict[Recipe, list[str]] = {}
    for name, row in RECIPES.items():
        names.setdefault(small(row.recipe), []).append(name)
    return {"=".join(same): recipe for recipe, same in names.items() if recipe.makes_checkpoint == makes_checkpoint}


CHECKPOINTS, RUN_ONLY = named(True), named(False)
A8 = Activations(UniformGrid(8), static=True)
ROTATED_OFFLINE = ("transforms.rotate.head_mix=none", "transforms.rotate.online_down=false")
# What no row of the table stores, or takes up in another way.
CHECKPOINTS |= {
    name: with_settings(small(recipe), settings)
    for name, (recipe, *settings) in {
        "groups in processing order": (named_recipe("gptq"), "weights.static_groups=false"),
        "spqr in sequence": (named_recipe("spqr"), "weights.true_sequential=true", "weights.simplified=true"),
        "weighted bcq": (named_recipe("bcq-w3"), "weights.weighted=true", "weights.rounds=2"),
        "bcq with offsets": (named_recipe("bcq-row"), "weights.grid.offset=true", "weights.grid.scale_dtype=float16"),
        "shared value scales": (named_recipe("awq"), "weights.grouped_values=true"),
        "runs across rows": (named_recipe("zeroquant-w4-8a16"), "weights.groups=64"),
        "the last block distilled": (named_recipe("zeroquant-w4-8a8-lkd"), "tuning.blocks=last"),
        "inputs alone distilled": (Recipe(activations=Activations(UniformGrid(4)), tuning=Distill()),),
        "distilled behind a cache": (Recipe((), RTN(UniformGrid(3)), A8, tuning=Distill(), kv_cache=PerHead(3)),),
        "prefixquant for both targets": (named_recipe("prefixquant-w4a4kv4-dynamic-ft"), "tuning.target=both"),
        "everything smoothed": (Recipe((Smooth(values=True, down=True),), RTN(UniformGrid(8)), A8),),
        "smoothed behind rotations": (Recipe((Rotate(), Smooth()), RTN(UniformGrid(8))),),
        "distilled behind a static cache": (
            Recipe(weights=RTN(UniformGrid(8)), tuning=Distill(), kv_cache=StaticPerHead(4, rotate_keys=True)),
        ),
        "transforms alone": (Recipe((Rotate(mode="random", online_down=False), Smooth())),),
    }.items()
}
# Parts of several rows together, and rows without a part.
CHECKPOINTS |= {
    name: with_settings(small(put_together(named_recipe(start), parts)), settings)
    for name, (start, parts, *settings) in {
        "gptq behind scales": ("smoothquant-w8a8", {"weights": ["gptq-w4"]}),
        "awq behind scales, with inputs": ("awq-w4", {"transforms": ["smooth"], "activations": ["rtn-w8a8"]}),
        "awq behind a rotation": ("awq-w4", {"transforms": ["quarot"]}, *ROTATED_OFFLINE),
        "let behind a rotation": ("omniquant-let", {"transforms": ["prefixquant-w4a4kv4-static"]}),
        "prefixquant unrotated": ("prefixquant-w4a4kv4-static", {"transforms": ["none"]}),
        "prefixquant without weights": ("prefixquant-w4a4kv4-static-ft", {"weights": ["none"]}),
        "prefixquant without inputs": ("prefixquant-w4a4kv4-dynamic-ft", {"activations": ["none"]}),
        "distilled with bits of its own": ("rtn-w8a8", {"tuning": ["zeroquant-w8a8-lkd"]}),
    }.items()
}


@dataclass
class Case:
    """A recipe's checkpoint, and what stood in memory when it was written.

    blocks, kv: of every decoder block, copied when its file was written. ends: the parameters outside the blocks.
    passed: calibration text behind the last block, a tensor a sample.
    """

    recipe: Recipe
    source: Path
    dense: PreTrainedModel
    out: Path
    blocks: list[nn.Module] = field(default_factory=list)
    kv: list[dict[str, Tensor]] = field(default_factory=list)
    ends: dict[str, Tensor] = field(default_factory=dict)
    passed: list[Tensor] = field(default_factory=list)

    def quantize(self, out: Path) -> Path:
        behind = LEAD if self.recipe.calibrate_behind_prefix else None
        return quantize_checkpoint(self.source, self.recipe, out, segments=SEGMENTS, behind=behind)

    def attached(self, model: PreTrainedModel, prefix: Prefix | None) -> IntactModel:
        return attach(model, prefix, bound_kv(self.recipe, model))

    @property
    def policy(self) -> KVPolicy | None:
        """The recipe's KV policy, with the tensors that were written."""
        kv = self.recipe.kv_cache
        return Bound(kv, dict(enumerate(self.kv))) if kv is not None and kv.calibrates else kv

    def in_memory(self) -> PreTrainedModel:
        """The dense model with the blocks and the ends that were written; nothing is read from a file."""
        model = deepcopy(self.dense)
        for transform in self.recipe.transforms:
            transform.restructure(model)
        for index, block in enumerate(map(deepcopy, self.blocks)):
            model.set_submodule(architecture_of(model.config).block_name(index), block)
            for part in block.modules():  # one configuration, as in any model: it names the attention function
                if hasattr(part, "config"):
                    part.config = model.config
        assert not model.load_state_dict(self.ends, strict=False, assign=True).unexpected_keys
        return model

    @cached_property
    def loaded(self) -> PreTrainedModel:
        return load_quantized(self.out)

    @cached_property
    def twin(self) -> PreTrainedModel:
        """The dense model, rotated by its own checkpoint, rescaled by the steps that the quantized one keeps."""
        twin = deepcopy(self.dense)
        if self.recipe.twin.makes_checkpoint:
            where = self.out.with_name("twin")
            twin = load_quantized(quantize_checkpoint(self.source, self.recipe.twin, where))
        else:
            with pytest.raises(UserError, match="leaves the model as it is"):
                quantize_checkpoint(self.source, self.recipe.twin, self.out.with_name("nothing"))
        return rescaled(twin, self.out) if self.recipe.rescales else twin

    @cached_property
    def prefixes(self) -> list[Prefix | None]:
        """What the checkpoint runs behind: nothing, unless it was calibrated behind a prefix, and the twin's."""
        lead = build_prefix(self.twin, LEAD)
        return [lead] if self.recipe.calibrate_behind_prefix else [None, lead]

    @cached_property
    def logits(self) -> list[Tensor]:
        """Of the loaded model, behind each prefix."""
        return [self.attached(self.loaded, prefix).score(TEXT) for prefix in self.prefixes]


@pytest.fixture(scope="session")
def tiny(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, PreTrainedModel]]:
    """Dense checkpoints and their models, by what is special to them."""
    directory, made = tmp_path_factory.mktemp("dense"), {}
    for kind, sizes in SIZES.items():
        source = tiny_checkpoint(directory / kind, "llama" if kind == "bfloat16" else kind, **sizes)
        made[kind] = source, AutoModelForCausalLM.from_pretrained(source).eval().requires_grad_(False)
    return made


EXTRA = [("gptq-w3", "qwen2", True), ("omniquant-let", "qwen3", True), ("quarot", "qwen3", False),
         ("distilled behind a cache", "bfloat16", True)]  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        *((n, k, b) for n, r in CHECKPOINTS.items() for k in KINDS for b in (False, True) if r.calibrates or not b),
        *((next(n for n in CHECKPOINTS if name in n.split("=")), kind, behind) for name, kind, behind in EXTRA),
    ],
    ids=lambda case: f"{case[0]}-{case[1]}{'-behind' if case[2] else ''}",
)
def case(
    request: pytest.FixtureRequest,
    tiny: dict[str, tuple[Path, PreTrainedModel]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Case]:
    """Made once for all laws."""
    name, kind, behind = request.param
    recipe = replace(CHECKPOINTS[name], prefix="bos" if behind else "none", calibrate_behind_prefix=behind)
    directory = tmp_path_factory.mktemp("law")
    made = Case(recipe, *tiny[kind], directory / "whole")
    pipeline = quantization.runs.pipeline
    one_block = quantization.runs.one_block
    write_block, write_ends, advance = one_block.write_block, pipeline.write_ends, CalibrationStream.advance

    def watch_block(partial: Path, block: DecoderBlock, *rest: object) -> None:
        made.blocks.append(deepcopy(block.module))
        made.kv.append({name: tensor.clone() for name, tensor in block.kv.items()})
        write_block(partial, block, *rest)

    def watch_ends(partial: Path, tensors: dict[str, Tensor]) -> None:
        made.ends.update(tensors)
        write_ends(partial, tensors)

    def watch_text(stream: CalibrationStream, *arguments: Any) -> None:
        advance(stream, *arguments)
        made.passed[:] = stream.hidden

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CalibrationStream, "advance", watch_text)
        patch.setattr(one_block, "write_block", watch_block)
        patch.setattr(pipeline, "write_ends", watch_ends)
        made.quantize(made.out)
    yield made
    shutil.rmtree(directory)


@torch.no_grad()
def test_the_checkpoint_computes_what_the_blocks_computed_that_were_written(case: Case) -> None:
    memory, kv = case.in_memory(), case.policy
    if case.recipe.attention is not None:
        case.recipe.attention.install(memory)
    for prefix, logits in zip(case.prefixes, case.logits, strict=True):
        assert torch.equal(logits, IntactModel(memory, prefix, kv).score(TEXT))
    if case.recipe.calibrate_behind_prefix:
        with pytest.raises(UserError, match="calibrated behind a prefix of 3 tokens and is refused without it"):
            attach(case.loaded, None, kv)


@torch.no_grad()
def test_packed_weights_compute_the_same_bits(case: Case) -> None:
    stored = [name for index in range(2) for name in read_block(block_file(case.out, index)).linears]
    packed = load_quantized(case.out, kernel="unpack" if stored else None)
    assert sorted(name for name, module in packed.named_modules() if isinstance(module, QuantLinear)) == sorted(stored)
    for prefix, logits in zip(case.prefixes, case.logits, strict=True):
        assert torch.equal(logits, case.attached(packed, prefix).score(TEXT))


@torch.no_grad()
def test_calibration_text_leaves_the_last_block_as_in_the_checkpoints_model(case: Case) -> None:
    """Without training, text passes on in full precision but for the weights; methods that read full-precision blocks
    get the twin's."""
    recipe, kv = case.recipe, None
    assert bool(case.passed) == recipe.calibrates
    full = (recipe.tuning or recipe.weights) is not None and (recipe.tuning or recipe.weights).reads == "full"
    if full:
        model = case.twin
    else:
        model = case.in_memory()
        if recipe.trains_rounded:
            kv = case.policy
            if recipe.attention is not None:
                recipe.attention.install(model)
        elif recipe.tuning is None:
            for part in model.modules():
                if isinstance(part, InputPath):
                    part.quantizer = None
        else:
            kv = case.policy
    running = IntactModel(model, case.prefixes[-1] if recipe.calibrate_behind_prefix else None, kv)
    # Where inputs are rounded, one that lies between two levels may fall to either: another order of summation.
    exact = ((recipe.tuning is None and not recipe.trains_rounded) or full) and model.dtype == torch.float32
    for segment, expected in zip(SEGMENTS, case.passed, strict=bool(case.passed)):
        with outputs_of([architecture_of(model.config).blocks_of(model)[-1]]) as seen:
            running.feed(segment[None])
        assert (seen[0] - expected).norm() < (1e-5 if exact else 0.02) * expected.norm()


def contents(directory: Path) -> dict[str, bytes]:
    """Every file's bytes; of the cost, only what is no measurement."""
    files = {file.name: file.read_bytes() for file in directory.iterdir()}
    cost = json.loads(files[CHECKSUMS])
    return files | {CHECKSUMS: repr((cost["bits_per_weight"], cost["figures"], cost["sha256"])).encode()}


@torch.no_grad()
def test_a_killed_run_ends_with_the_same_bytes(case: Case) -> None:
    out = case.out.with_name("resumed")
    partial = shutil.copytree(case.out, out.with_name("resumed.partial"))
    # Mostly the last block, behind which a finished one passes the text on; else the first, in front of a finished one.
    lost = int(case.recipe.calibrate_behind_prefix or case.dense.config.model_type != "opt")
    for file in (block_file(partial, lost), partial / "ends.safetensors"):
        file.unlink()
    finished = block_file(partial, 1 - lost).stat().st_mtime_ns
    case.quantize(out)
    assert block_file(out, 1 - lost).stat().st_mtime_ns == finished
    assert contents(out) == contents(case.out)


@torch.no_grad()
def test_without_rounding_the_model_is_the_dense_one_and_the_weights_were_rounded_from_it(case: Case) -> None:
    twin, expected, dtype = case.twin, case.dense(TEXT).logits.float(), case.dense.dtype
    # Rewritten weights are rounded to float32 once, 2⁻²⁴ of each, and every sum after them in another order.
    share = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    tolerance = {"rtol": 0, "atol": share * float(expected.abs().max())}
    for prefix in (None, build_prefix(twin, LEAD)):
        torch.testing.assert_close(attach(twin, prefix).score(TEXT), expected, **tolerance)
    # A step takes 2⁻ᵇ of a range of a few deviations, and GPTQ adds to its error; in another basis it would be √2.
    bound = 0.0 if case.recipe.weights is None else min(1.0, 6 * 2.0**-case.recipe.weights.grid.bits)
    for index in range(2):
        for name, (kind, parts, header) in read_block(block_file(case.out, index)).linears.items():
            exact = twin.get_parameter(f"{name}.weight")
            assert (restore(kind, parts, header).dequantize() - exact).norm() < bound * exact.norm()


@torch.no_grad()
def test_with_eight_bits_the_logits_are_near_the_dense_ones_and_not_the_same(case: Case) -> None:
    recipe = case.recipe
    grids = [part.grid for part in (recipe.weights, recipe.activations, recipe.attention) if part is not None]
    widths = [grid.bits for grid in grids] + ([recipe.kv_cache.bits] if recipe.kv_cache is not None else [])
    if not widths or min(widths) < 8 or getattr(recipe.weights, "attention_bits", 8) < 8:
        return  # nothing is rounded, or so coarsely that a random model keeps little
    expected = case.dense(TEXT).logits
    error = (case.logits[-1] - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.2  # 0.14 where values and down projections are smoothed, too


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RUN_ONLY)
def test_a_recipe_that_changes_no_weight_is_run_on_the_dense_model(
    name: str, kind: str, tiny: dict[str, tuple[Path, PreTrainedModel]], tmp_path: Path
) -> None:
    (source, dense), recipe = tiny[kind], RUN_ONLY[name]
    with pytest.raises(UserError, match="leaves the model as it is"):
        quantize_checkpoint(source, recipe, tmp_path / "out")
    expected = dense(TEXT).logits
    for word in ("none", "bos"):
        run = plan_run(source, replace(recipe, prefix=word), device=torch.device("cpu")).load()
        assert (run.kv, run.prefix_length) == (recipe.kv_cache, int(word == "bos"))
        assert torch.equal(run.score(TEXT), attach(dense, run.prefix, recipe.kv_cache).score(TEXT))
        exact = attach(run.model, run.prefix).score(TEXT)
        torch.testing.assert_close(exact, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [n for n, r in (CHECKPOINTS | RUN_ONLY).items() if not r.calibrates])
def test_what_does_not_calibrate_cannot_calibrate_behind_a_prefix(name: str) -> None:
    with pytest.raises(UserError, match="calibrate_behind_prefix=true has nothing to act on"):
        replace((CHECKPOINTS | RUN_ONLY)[name], prefix="bos", calibrate_behind_prefix=True)
