"""What KV policies calibrate to, beside checkpoints: made for any weights, found by what made it, refused where it is
not the run's."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from calibration import calibrated, ranges_in_checkpoints
from common import error_line, every, tree
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from corpora.errors import UserError
from corpora.json_files import identity
from corpora.storage import read_artefact, write_artefact
from eval.__main__ import main as evaluate
from intactkv.prefix import Prefix, build_prefix
from intactkv.store import Rounding
from quantization.__main__ import main as quantize
from quantization.grids.uniform import UniformGrid
from quantization.kv_cache import KIVI, ClippedPerHead, KVQuant, PerHead, StaticPerHead
from quantization.kv_cache.base import Policy
from quantization.model.activations import Activations
from quantization.model.attention import AttentionProducts
from quantization.model.blocks import DecoderBlock
from quantization.recipes.recipe import Calibration, Recipe, describe
from quantization.runs import kv_artefact
from quantization.runs.checkpoint import load_quantized
from quantization.runs.kv_artefact import KIND, KVArtefact
from quantization.runs.pipeline import quantize_checkpoint
from quantization.runs.plan import Plan, plan_run
from quantization.transforms.rotate import Rotate
from quantization.tuning.prefixquant import PrefixQuantTuning
from quantization.weights.awq import AWQ
from quantization.weights.gptq import GPTQ
from quantization.weights.rtn import RTN

CPU = torch.device("cpu")
PREFIX = torch.tensor([1, 40, 7])
SEGMENTS = torch.randint(4, 101, (3, 12), generator=torch.Generator().manual_seed(5))
IDS = torch.tensor([[5, 6, 7, 8]])
GRID = UniformGrid(4, 32)
BLOCKS = 3
Program = Callable[..., tuple[int, str, str]]
WEIGHTS = {
    "gptq": Recipe(weights=GPTQ(GRID)),
    "awq": Recipe(weights=AWQ(GRID)),
    "rotated, inputs and attention rounded": Recipe(
        (Rotate(),), RTN(GRID), Activations(UniformGrid(6)), AttentionProducts(UniformGrid(6, convention="gptq-asym"))
    ),
}


@pytest.fixture
def dense(intactkv_root: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(intactkv_root, "llama")


@pytest.fixture
def text(intactkv_root: Path) -> Path:
    file = intactkv_root / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 20)
    return file


def static(text: Path, bits: int = 4, **changes: Any) -> Recipe:
    calibration = Calibration(str(text), samples=2, length=20)
    return replace(Recipe(kv_cache=StaticPerHead(bits), calibration=calibration), **changes)


def refuse(*_args: object, **_options: object) -> None:
    raise AssertionError("this is not done")


def open_model(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory).eval().requires_grad_(False)


def quantized(dense: Path, out: Path, name: str = "gptq", **changes: Any) -> Path:
    recipe = replace(WEIGHTS[name], **changes)
    return quantize_checkpoint(dense, recipe, out, segments=SEGMENTS if recipe.checkpoint_part.calibrates else None)


# what it is -----------------------------------------------------------------------------------------------------------


def by_hand(model: PreTrainedModel, bits: int, prefix: Prefix | None = None) -> list[dict[str, Tensor]]:
    """Scale and zero point of every layer and head, from the keys and values in transformers' own cache."""
    seen: list[dict[str, list[Tensor]]] = [{"keys": [], "values": []} for _ in range(BLOCKS)]
    for segment in SEGMENTS:
        cache, front = DynamicCache(config=model.config), 0
        if prefix is not None:
            front = len(prefix)
            for layer, pair in enumerate(zip(prefix.keys, prefix.values, strict=True)):
                cache.update(*pair, layer)
        model(segment[None], past_key_values=cache, use_cache=True)
        for found, layer in zip(seen, cache.layers, strict=True):
            for name in found:
                found[name].append(getattr(layer, name)[0, :, front:].double())
    tensors = []
    for found in seen:
        own = {}
        for name, samples in found.items():
            states = torch.cat(samples, dim=1).flatten(1)
            low, high = states.amin(1).clamp_max(0), states.amax(1).clamp_min(0)
            scale = (high - low) / (2**bits - 1)
            own |= {f"{name}_scale": scale, f"{name}_zero_point": (-low / scale).round()}
        tensors.append(own)
    return tensors


def check(found: Any, expected: list[dict[str, Tensor]]) -> None:
    assert sorted(found) == list(range(BLOCKS))
    for layer, own in enumerate(expected):
        assert found[layer].keys() == own.keys()
        for name, tensor in own.items():
            assert_close(found[layer][name].flatten().double(), tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("behind", [False, True])
def test_ranges_of_a_dense_model_are_those_of_transformers_own_cache(
    model_type: str, behind: bool, intactkv_root: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    source = tiny_checkpoint(intactkv_root, model_type)
    model = open_model(source)
    prefix = build_prefix(model, PREFIX) if behind else None
    front = PREFIX if behind else None
    found = calibrated(source, StaticPerHead(4), intactkv_root / "kv.safetensors", SEGMENTS, front)
    check(found, by_hand(model, 4, prefix))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("behind", [False, True])
def test_ranges_of_a_quantized_model_are_those_of_what_its_blocks_compute_behind_the_intact_prefix(
    name: str, behind: bool, dense: Path, intactkv_root: Path
) -> None:
    changes: dict[str, Any] = {}
    if behind and (attention := WEIGHTS[name].attention) is not None:
        changes["attention"] = replace(attention, rows=False)  # of their softmax, a plain cache knows no prefix
    out = quantized(dense, intactkv_root / "out", name, **changes)
    files = tree(intactkv_root)
    prefix = None
    if behind:
        plan = plan_run(out, Recipe(prefix="the quick"), device=CPU)
        prefix = plan.intact_prefix()
    found = calibrated(out, StaticPerHead(4), intactkv_root / "kv.safetensors", SEGMENTS, prefix)
    model = load_quantized(out)
    check(found, by_hand(model, 4, prefix))
    assert tree(intactkv_root).items() >= files.items()  # no weight is rewritten


def test_a_model_in_half_precision_is_calibrated_in_it(
    intactkv_root: Path, tiny_checkpoint: Callable[..., Path], text: Path
) -> None:
    half = tiny_checkpoint(intactkv_root / "half", "llama", dtype=torch.bfloat16)
    out = quantized(half, intactkv_root / "out")
    recipe = static(text, prefix="bos", calibrate_behind_prefix=True)
    in_half, in_full = (plan_run(out, recipe, device=CPU, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert in_full.kv_file == in_half.kv_file
    made = in_full.kv_artefact()
    in_full.kv_file.unlink()
    again = in_half.kv_artefact()
    assert all(torch.equal(x, again.tensors[i][name]) for i, own in made.tensors.items() for name, x in own.items())


# finding and making ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "gptq", "recipe"])
def test_a_run_makes_it_once_and_finds_it_by_all_that_made_it(
    kind: str, dense: Path, text: Path, intactkv_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe = dense, static(text)
    if kind == "gptq":
        source = quantized(dense, intactkv_root / "out")
    if kind == "recipe":
        recipe = replace(recipe, weights=GPTQ(GRID))
    files = tree(source)
    plan = plan_run(source, recipe, device=CPU)
    assert not plan.kv_file.exists()
    logits = plan.load().score(IDS)
    assert plan.kv_file.parent == intactkv_root / "modelzoo" / "kv" / dense.name
    assert plan.kv_file.name.startswith("static-kv4-gptq-w4g32-" if kind != "dense" else "static-kv4-")
    assert tree(source) == files
    described = plan.describe()
    assert described["kv_made_of"]["weights"] == described["made_of"]
    with monkeypatch.context() as patch:
        patch.setattr(StaticPerHead, "fit_block", refuse)
        again = plan_run(source, recipe, device=CPU)
        assert torch.equal(again.load().score(IDS), logits)
        assert again.describe() == described
        if kind == "recipe":  # the checkpoint that it made is one like any other
            there = plan_run(plan.directory_of(recipe), static(text), device=CPU)
            assert torch.equal(there.load().score(IDS), logits)
            assert there.kv_file == plan.kv_file
            assert "kv_cache" not in there.describe()["made_of"]
    assert not torch.equal(plan_run(source, replace(recipe, kv_cache=None), device=CPU).load().score(IDS), logits)
    text.write_text(text.read_text() + "dogs and foxes")
    others = [static(text), static(text, 3), static(text, calibration=replace(recipe.calibration, seed=7))]
    made = [plan_run(source, replace(other, weights=recipe.weights), device=CPU).kv_file for other in others]
    assert len({plan.kv_file, *made}) == 4


def test_calibrating_behind_a_prefix_is_another_artefact(dense: Path, text: Path) -> None:
    behind = static(text, prefix="bos", calibrate_behind_prefix=True)
    plans = [plan_run(dense, recipe, device=CPU) for recipe in (static(text), static(text, prefix="bos"), behind)]
    assert plans[0].kv_file == plans[1].kv_file != plans[2].kv_file
    made = plans[2].kv_artefact()
    assert (made.needs_prefix, made.prefix, made.needs_kv) == ((1,), "bos", None)
    model = open_model(dense)
    sizes = [plan.kv_artefact().tensors[0]["keys_scale"] for plan in plans]
    assert torch.equal(sizes[0], sizes[1])
    assert not torch.equal(sizes[1], sizes[2])
    assert plans[2].load().prefix_length == 1
    discovered = replace(behind, prefix=f"auto:{text}")
    plan = plan_run(dense, discovered, device=CPU)
    assert plan.kv_made_of is not None
    assert plan.kv_artefact().needs_prefix == plan.choice.ids
    assert model.config.num_hidden_layers == BLOCKS


def test_a_checkpoint_that_runs_behind_a_prefix_is_calibrated_behind_it(
    dense: Path, text: Path, intactkv_root: Path
) -> None:
    recipe = replace(WEIGHTS["gptq"], prefix="bos", calibrate_behind_prefix=True)
    out = quantize_checkpoint(dense, recipe, intactkv_root / "out", segments=SEGMENTS, behind=torch.tensor([1]))
    plan = plan_run(out, static(text, prefix="bos"), device=CPU)
    assert plan.kv_artefact().needs_prefix == (1,)


class Killed(BaseException):
    pass


@contextmanager
def killed_at(last: int, kind: type[Policy] = StaticPerHead) -> Iterator[list[int]]:
    """Let a run die when a layer is fitted; the layers that are."""
    fit, done = kind.fit_block, list[int]()

    def watched(self: Policy, block: DecoderBlock) -> dict[str, Tensor]:
        if block.index == last:
            raise Killed
        done.append(block.index)
        return fit(self, block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "fit_block", watched)
        yield done


@pytest.mark.parametrize("kind", ["dense", "gptq"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    kind: str, dense: Path, text: Path, intactkv_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = dense if kind == "dense" else quantized(dense, intactkv_root / "out")
    plan = plan_run(source, static(text, prefix="bos", calibrate_behind_prefix=True), device=CPU)
    plan.kv_artefact()
    whole = plan.kv_file.read_bytes()
    plan.kv_file.unlink()
    with killed_at(2), pytest.raises(Killed):
        plan.kv_artefact()
    assert not plan.kv_file.exists()
    partial = plan.kv_file.with_suffix(".partial")
    assert sorted(path.name for path in partial.iterdir()) == ["layer-000.safetensors", "layer-001.safetensors"]
    damaged = partial / "layer-001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))
    with killed_at(BLOCKS) as done:
        plan.kv_artefact()
    assert done == [1, 2]
    assert "layer-001.safetensors is made again" in caplog.text
    assert plan.kv_file.read_bytes() == whole
    assert not partial.exists()


def test_nothing_of_a_stranger_is_removed(dense: Path, text: Path) -> None:
    plan = plan_run(dense, static(text), device=CPU)
    partial = plan.kv_file.with_suffix(".partial")
    partial.mkdir(parents=True)
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no half-finished KV artefact of ours"):
        plan.kv_artefact()
    assert (partial / "thesis.txt").read_text() == "mine"


def test_a_kept_one_that_is_damaged_is_made_again(dense: Path, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_run(dense, static(text), device=CPU)
    plan.load()
    whole = plan.kv_file.read_bytes()
    plan.kv_file.write_bytes(whole[:-7])
    plan_run(dense, static(text), device=CPU).load()
    assert "the KV artefact is made again: KV artefact" in caplog.text
    assert plan.kv_file.read_bytes() == whole


# what a checkpoint keeps ----------------------------------------------------------------------------------------------


def test_ranges_that_are_trained_with_the_weights_stay_in_the_checkpoint(
    dense: Path, text: Path, intactkv_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = static(
        text, weights=RTN(GRID), transforms=(Rotate(head_mix="none"),), tuning=PrefixQuantTuning(mse_init_size=1)
    )
    monkeypatch.setattr(kv_artefact, "calibrate_kv", refuse)
    plan = plan_run(dense, recipe, device=CPU)
    logits = plan.load().score(IDS)
    assert plan.kv_made_of is None
    assert plan.describe()["made_of"]["kv_cache"]["kind"] == "StaticPerHead"
    again = plan_run(plan.directory_of(recipe), static(text), device=CPU)
    assert torch.equal(again.load().score(IDS), logits)
    assert not (intactkv_root / "modelzoo" / "kv").exists()


@pytest.mark.parametrize("kv", [StaticPerHead(3, "gptq-sym", rotate_keys=True), ClippedPerHead(4)])
def test_a_checkpoint_of_before_runs_with_the_ranges_that_it_holds(
    kv: Policy, dense: Path, text: Path, intactkv_root: Path
) -> None:
    recipe = Recipe(weights=RTN(GRID), kv_cache=kv)
    with ranges_in_checkpoints():
        out = quantize_checkpoint(dense, recipe, intactkv_root / "out", segments=SEGMENTS)
    plan = plan_run(out, Recipe(kv_cache=type(kv)(bits=kv.bits)), device=CPU)
    assert plan.recipe.kv_cache == kv
    assert plan.kv_made_of is None
    assert torch.isfinite(plan.load().score(IDS)).all()
    other = plan_run(out, static(text, 5), device=CPU)
    assert other.kv_made_of is not None
    assert torch.isfinite(other.load().score(IDS)).all()


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(dense: Path, text: Path) -> Plan:
    return plan_run(dense, static(text, prefix="bos", calibrate_behind_prefix=True), device=CPU)


def run_with(source: Path, given: KVArtefact, kv: Policy | None = None, prefix: str = "bos", **more: Any) -> Plan:
    return plan_run(source, Recipe(kv_cache=kv or given.policy, prefix=prefix), device=CPU, given_kv=given, **more)


def test_a_given_artefact_is_that_of_the_model_the_policy_and_the_prefix(
    plan: Plan, dense: Path, text: Path, intactkv_root: Path, tiny_checkpoint: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    given = plan.kv_artefact()
    run = run_with(dense, given)
    assert torch.equal(run.load().score(IDS), plan.load().score(IDS))
    assert run.describe() == plan.describe() | {"recipe": run.describe()["recipe"]}
    for kv, said in ((StaticPerHead(3), "bits=3"), (StaticPerHead(4, "gptq-sym"), "gptq-sym"), (PerHead(4), "PerHead")):
        with pytest.raises(UserError, match=f"is for StaticPerHead.* not for .*{said}"):
            run_with(dense, given, kv)
    for prefix, more in (("none", {}), ("the quick", {}), ("bos", {"vanilla": True})):
        with pytest.raises(UserError, match="calibrated behind a prefix of 1 tokens, and only fits behind it"):
            run_with(dense, given, prefix=prefix, **more)
    found = run_with(dense, replace(given, needs_prefix=(9,)), prefix=f"auto:{text}")  # known once it is discovered
    with pytest.raises(UserError, match="only fits behind it"):
        found.load()
    other = tiny_checkpoint(intactkv_root / "other", "llama", seed=3)
    with pytest.raises(UserError, match="this KV artefact belongs to another model or basis: fingerprint"):
        run_with(other, given)
    rotated = quantized(dense, intactkv_root / "rotated", "rotated, inputs and attention rounded")
    with pytest.raises(UserError, match="this KV artefact belongs to another model or basis: basis is 'plain'"):
        run_with(rotated, given)
    with pytest.raises(UserError, match="calibrate_behind_prefix=true has nothing to act on"):
        plan_run(dense, replace(plan.recipe), device=CPU, given_kv=given)
    caplog.clear()
    gptq = run_with(quantized(dense, intactkv_root / "gptq"), given)  # weights of the same model, in the same basis
    assert "was calibrated on the weights full" in caplog.text
    assert gptq.describe()["kv_made_of"] == plan.describe()["kv_made_of"]


def test_one_behind_a_trained_prefix_wants_its_keys_and_values(dense: Path, text: Path, intactkv_root: Path) -> None:
    file = intactkv_root / "trained.safetensors"
    plain = build_prefix(open_model(dense), PREFIX)
    trained = replace(plain, values=tuple(3 * v for v in plain.values), calibrated={"best_step": 1})
    trained.save(file)
    plan = plan_run(dense, static(text, prefix=str(file), calibrate_behind_prefix=True), device=CPU)
    given = plan.kv_artefact()
    assert given.needs_kv == trained.digest()
    assert torch.isfinite(run_with(dense, given, prefix=str(file)).load().score(IDS)).all()
    other = intactkv_root / "other.safetensors"
    replace(trained, values=plain.values).save(other)
    with pytest.raises(UserError, match="other keys and values"):
        run_with(dense, given, prefix=str(other)).load()


def test_the_vanilla_arm_has_no_ranges_from_behind_the_intact_prefix(dense: Path, text: Path) -> None:
    recipe = static(text, prefix="bos", calibrate_behind_prefix=True)
    with pytest.raises(UserError, match="calibrated behind the intact prefix, and only fits behind it"):
        plan_run(dense, recipe, device=CPU, vanilla=True)
    assert plan_run(dense, static(text, prefix="bos"), device=CPU, vanilla=True).kv_made_of is not None


def test_what_is_no_whole_artefact_is_refused(plan: Plan, dense: Path, intactkv_root: Path) -> None:
    made, file = plan.kv_artefact(), plan.kv_file
    loaded = KVArtefact.load(file)
    assert (loaded.identity, loaded.policy, loaded.owner) == (made.identity, made.policy, made.owner)
    header, tensors = read_artefact(file, KIND, dict, "", "")
    whole = file.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            KVArtefact.load(file)

    content = bytearray(whole)
    content[-3] ^= 4
    file.write_bytes(bytes(content))
    refused("has changed since it was written")
    file.write_bytes(whole[: len(whole) // 2])
    refused("truncated or not a safetensors file")
    write_artefact(file, KIND, header | {"format": 2}, tensors)
    refused("has format 2, this version reads 1")
    write_artefact(file, KIND, header | {"made_of": header["made_of"] | {"kv": {"kind": "Mine", "bits": 4}}}, tensors)
    refused("names the part 'Mine', which is not known here")
    for changed, match in (
        ({"layers.0.keys_scale.more": torch.zeros(())}, "it has a tensor 'layers.0.keys_scale.more' beyond its own"),
        ({"layers.x.keys_scale": torch.zeros(())}, "it has a tensor 'layers.x.keys_scale' beyond its own"),
        ({"keys_scale": torch.zeros(())}, "it has a tensor 'keys_scale' beyond its own"),
        ({"layers.3.keys_scale": torch.zeros(2, 1, 1)}, "it has a tensor 'layers.3.keys_scale' beyond its own"),
        (
            {"layers.1.keys_scale": torch.zeros(1, 1, 1)},
            r"is float32 of shape \(1, 1, 1\), expected floats of \(2, 1, 1\)",
        ),
        ({"layers.1.keys_scale": torch.zeros(2, 1, 1, dtype=torch.int32)}, "is int32 of shape"),
        ({"layers.2.values_zero_point": None}, "it lacks the tensor 'layers.2.values_zero_point'"),
    ):
        write_artefact(file, KIND, header, {name: x for name, x in (tensors | changed).items() if x is not None})
        refused(f"is damaged: .*{match}.*; make it again with `python -m quantization kv`")
    write_artefact(file, KIND, header | {"identity": "01234567"}, tensors)
    refused("its identity is not that of what made it")
    write_artefact(file, KIND, header, tensors)
    assert KVArtefact.load(file).identity == made.identity
    save_file(tensors, file, {KIND: json.dumps(header)})
    refused("has changed since it was written")  # no file of this kind is without a sum
    build_prefix(open_model(dense), PREFIX).save(file)
    refused("is another kind of file")


@every("policy", [StaticPerHead(4), StaticPerHead(4, group_size=-1), StaticPerHead(4, group_size=8), ClippedPerHead(4),
                  KVQuant(3, v_bits=2, weighting="none"), KVQuant(2, qnorm=True, weighting="none")])  # fmt: skip
def test_what_a_policy_keeps_has_the_shapes_that_it_tells(policy: Policy, dense: Path, intactkv_root: Path) -> None:
    kept = calibrated(dense, policy, intactkv_root / f"{identity(describe(policy))}.safetensors", SEGMENTS)
    for tensors in kept.values():
        assert {name: tuple(x.shape) for name, x in tensors.items()} == policy.shapes(16, 2, tensors)


def test_a_policy_that_the_model_cannot_have_is_refused_by_the_plan(
    intactkv_root: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    sliding = tiny_checkpoint(intactkv_root / "sliding", "mistral", sliding_window=8)
    for kv, packed in ((KIVI(2, group_size=8, residual=8), False), (PerHead(4), True)):
        with pytest.raises(
            UserError, match="attends to a window of 8 tokens, where a KV policy must round every token"
        ):
            plan_run(sliding, Recipe(kv_cache=kv), device=CPU, packed_kv=packed)
    plan_run(sliding, Recipe(kv_cache=PerHead(4)), device=CPU)


# gradients ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BeforeRope(Policy):
    """Calibrates to the sums of the squared gradients that it is given."""

    space: ClassVar[str] = "pre_rope"
    calibrates: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True  # type: ignore[misc]

    def roundings(self, tensors: Any = None) -> tuple[Rounding, Rounding]:
        raise NotImplementedError

    def bits_per_element(self, tokens: int, head_size: int, heads: int) -> tuple[float, float]:
        return self.bits, self.bits

    def fit_block(self, block: DecoderBlock) -> dict[str, Tensor]:
        assert block.squared_gradients is not None
        return {name: x.sum() for name, x in block.squared_gradients.items()}

    def shapes(self, head_size: int, heads: int, names: Any = ()) -> dict[str, tuple[int, ...]]:
        return {"keys": (), "values": ()}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A pass of gradients whose layer i gives i + 1 and 10 (i + 1); its calls."""
    calls: list[Any] = []

    def squared_gradients(model: PreTrainedModel, segments: Tensor, behind: Any, out: Path) -> list[Path]:
        calls.append((model, segments, behind))
        files = [out / f"layer-{index:03d}.safetensors" for index in range(BLOCKS)]
        for index, file in enumerate(files):
            save_file({"keys": torch.tensor([index + 1.0]), "values": torch.tensor([10.0 * (index + 1)])}, file)
        return files

    monkeypatch.setattr(kv_artefact.fisher, "squared_gradients", squared_gradients)
    return calls


def test_a_policy_that_asks_gets_the_gradients_of_its_layer_once(
    dense: Path, intactkv_root: Path, passes: list[Any]
) -> None:
    file = intactkv_root / "kv.safetensors"
    with killed_at(1, BeforeRope), pytest.raises(Killed):
        calibrated(dense, BeforeRope(bits=4), file, SEGMENTS, PREFIX)
    tensors = calibrated(dense, BeforeRope(bits=4), file, SEGMENTS, PREFIX)
    assert [(float(own["keys"]), float(own["values"])) for own in tensors.values()] == [(1, 10), (2, 20), (3, 30)]
    ((model, segments, behind),) = passes  # the resumed run found them
    assert torch.equal(segments, SEGMENTS)
    assert torch.equal(behind, PREFIX)
    assert torch.equal(model.get_input_embeddings().weight, open_model(dense).get_input_embeddings().weight)
    assert not file.with_suffix(".partial").exists()


@pytest.mark.parametrize("name", ["dense", *WEIGHTS])
@pytest.mark.parametrize("behind", [False, True])
def test_levels_that_fit_the_gradients_go_on_any_weights(
    name: str, behind: bool, dense: Path, text: Path, intactkv_root: Path
) -> None:
    source = dense if name == "dense" else quantized(dense, intactkv_root / "out", name)
    recipe = static(text, kv_cache=KVQuant(bits=3), prefix="bos" if behind else "none", calibrate_behind_prefix=behind)
    logits = plan_run(source, recipe, device=CPU).load().score(IDS)
    exact = plan_run(source, replace(recipe, kv_cache=None, calibrate_behind_prefix=False), device=CPU).load()
    assert 0 < (logits - exact.score(IDS)).norm() < 0.5 * logits.norm()
    assert not list(intactkv_root.rglob("*.partial"))


# programs -------------------------------------------------------------------------------------------------------------


def test_the_program_makes_a_file_that_a_run_takes(
    dense: Path, text: Path, intactkv_root: Path, run_main: Program
) -> None:
    source = quantized(dense, intactkv_root / "out")
    calibration = ("--calibration", text, "--calibration-samples", 2, "--calibration-length", 20)
    policy = ("--kv", "static", "--kv-bits", 4, "--set", "kv_cache.rotate_keys=true")
    behind = ("--prefix", "bos", "--calibrate-behind-prefix")
    call = ("kv", "--model", source, *policy, *behind, *calibration)
    code, said, err = run_main(quantize, *call, "--plan")
    assert code == 0, err
    assert "KV artefact" in said
    assert "missing" in said
    assert "memory to calibrate" in said
    assert not (intactkv_root / "modelzoo").exists()
    file = intactkv_root / "mine.safetensors"
    code, said, err = run_main(quantize, *call, "--out", file)
    assert code == 0, err
    assert len(said.splitlines()) == 1
    assert said.startswith("static-kv4-gptq-w4g32  4.00 bits per element  ")
    assert said.endswith(f" s  {file}\n")
    assert run_main(quantize, *call)[0] == 0
    (kept,) = (intactkv_root / "modelzoo" / "kv").rglob("*.safetensors")
    assert kept.read_bytes() == file.read_bytes()

    run = ("ppl", "--model", source, "--corpus", text, "--window", 16, "--limit", 2, "--json", "--prefix", "bos")
    arms = [(*policy, *calibration, "--calibrate-behind-prefix"), ("--kv", file), ("--kv", file, "--kv-bits", 4)]
    records = []
    for arm in arms:
        code, out, err = run_main(evaluate, *run, *arm, "--force")
        assert code == 0, err
        records.append(json.loads(out))
    assert len({record["perplexity"] for record in records}) == 1
    assert len({record["identity"] for record in records}) == 1
    assert records[0]["settings"]["kv_made_of"]["kv"]["rotate_keys"] is True
    code, out, err = run_main(evaluate, *run, *arms[0], "--seed", 5)
    assert (code, json.loads(out)["identity"] != records[0]["identity"]) == (0, True), err

    for options, word in (
        (("--kv", file, "--kv-bits", 3), "is for StaticPerHead"),
        (("--kv", file, *calibration), "calibrates on no text"),
        (("--kv", file, "--calibrate-behind-prefix"), "has nothing to act on"),
        (("--kv", file, "--vanilla"), "only fits behind it"),
        (("--kv", intactkv_root / "none.safetensors"), "is missing"),
    ):
        code, _, err = run_main(evaluate, *run, *options)
        assert (code, word in error_line(err)) == (2, True), err


def test_what_the_program_cannot_make_is_refused(
    dense: Path, text: Path, intactkv_root: Path, run_main: Program
) -> None:
    calibration = ("--calibration", text, "--calibration-samples", 2, "--calibration-length", 20)
    static = ("--kv", "static", "--kv-bits", 4)
    mine = intactkv_root / "mine.safetensors"
    assert run_main(quantize, "kv", "--model", dense, *static, *calibration, "--out", mine)[0] == 0
    prefix = intactkv_root / "prefix.safetensors"
    build_prefix(open_model(dense), PREFIX).save(prefix)
    for options, said in (
        ((), "a KV cache in full precision calibrates on no text, so there is nothing to make"),
        (("--kv", "per_head", "--kv-bits", 4), "PerHead calibrates on no text"),
        ((*static, *calibration, "--prefix", "bos"), "--prefix bos has nothing to act on"),
        (("--kv", mine), "is calibrated already"),
        ((*static, *calibration, "--out", prefix), "is there and no whole KV artefact"),
        ((*static, *calibration, "--out", intactkv_root / "x.pt"), "a KV artefact's file ends in .safetensors"),
        (("--recipe", "prefixquant-w4a4kv4-static", "--prefix", "none", *calibration), "calibrated with the weights"),
    ):
        code, _, err = run_main(quantize, "kv", "--model", dense, *options)
        assert (code, said in error_line(err)) == (2, True), (options, err)
