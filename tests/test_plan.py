"""Plans: what they read and what they do not, what they name, and what `--plan` prints."""

import gc
import json
import shutil
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import corpora.text
import quantization.runs.auto_prefix
import quantization.runs.plan
from corpora.errors import UserError
from corpora.storage import identity, sha256_of_tensor
from eval.__main__ import main as eval_main
from intactkv.__main__ import main as intactkv_main
from quantization.__main__ import main as quantize_main
from quantization.grids.uniform import UniformGrid
from quantization.kv_cache import StaticPerHead
from quantization.named import RECIPES, named_recipe
from quantization.recipes.recipe import Calibration, Recipe, added, describe
from quantization.runs.auto_prefix import Search
from quantization.runs.checkpoint import find_checkpoint
from quantization.runs.fitting import check_fits
from quantization.runs.identities import artefact_of, by_tokens
from quantization.runs.kept import stored_kv
from quantization.runs.pipeline import quantize_checkpoint
from quantization.runs.plan import plan_run
from quantization.runs.preview import preview
from quantization.transforms.rotate import Rotate
from quantization.tuning.prefixquant import PrefixQuantTuning
from quantization.weights.awq import AWQ
from quantization.weights.gptq import GPTQ
from quantization.weights.rtn import RTN

CPU = torch.device("cpu")
GRID = UniformGrid(4, 16)


@pytest.fixture
def text(intactkv_root):
    file = intactkv_root / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 90)
    return file


@pytest.fixture
def dense(intactkv_root, tiny_checkpoint):
    return tiny_checkpoint(intactkv_root, "llama")


def gptq(text, **changes) -> Recipe:
    recipe = Recipe(weights=GPTQ(GRID), calibration=Calibration(str(text), samples=2, length=32))
    return replace(recipe, **changes)


def refuse(*_args, **_keywords):
    raise AssertionError("a plan does not do this")


def forbid(monkeypatch) -> None:
    """Reading a text, tokenizing, opening weights and quantizing fail from now on."""
    for name in ("encode", "read_documents", "cached_ids"):
        monkeypatch.setattr(corpora.text, name, refuse)
    monkeypatch.setattr(quantization.runs.plan, "calibration_segments", refuse)
    monkeypatch.setattr(quantization.runs.plan, "quantize_checkpoint", refuse)
    monkeypatch.setattr(quantization.runs.plan, "load_model", refuse)
    monkeypatch.setattr(quantization.runs.auto_prefix, "discover", refuse)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", refuse)


# what a plan reads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["none", "bos", "AUTO"])
def test_a_plan_runs_nothing_and_names_what_a_run_makes(dense, text, monkeypatch, prefix):
    prefix = prefix.replace("AUTO", f"auto:{text}")
    recipe = gptq(text, prefix=prefix, calibrate_behind_prefix=prefix != "none")
    with monkeypatch.context() as patched:
        forbid(patched)
        plan = plan_run(dense, recipe, device=CPU)
        described, place = plan.describe(), plan.directory_of(recipe)
        assert not place.exists()
    plan_run(dense, recipe, device=CPU).load()
    assert place.is_dir()
    assert plan_run(dense, recipe, device=CPU).describe() == described
    manifest = json.loads((place / "quantization.json").read_text())
    assert place.name.endswith(manifest["identity"])
    assert manifest["identity"] == identity(described["made_of"])


def test_the_text_is_its_bytes_and_its_draw_and_not_its_place(dense, text, intactkv_root):
    def made_of(file: Path, **calibration) -> str:
        recipe = gptq(file)
        recipe = replace(recipe, calibration=replace(recipe.calibration, **calibration))
        return identity(plan_run(dense, recipe, device=CPU).describe()["made_of"])

    moved = intactkv_root / "elsewhere.txt"
    moved.write_bytes(text.read_bytes())
    first = made_of(text)
    assert made_of(moved) == first
    others = [made_of(text, **change) for change in ({"seed": 1}, {"samples": 3}, {"length": 33})]
    as_json = intactkv_root / "text.jsonl"  # the same bytes, read in another way
    as_json.write_bytes(text.read_bytes())
    others.append(made_of(as_json))
    moved.write_bytes(text.read_bytes() + b".")
    others.append(made_of(moved))
    assert len({first, *others}) == 6


def test_another_tokenizer_is_another_text(dense, text, tiny_tokenizer):
    first = plan_run(dense, gptq(text), device=CPU).describe()["made_of"]["text"]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(dense)
    assert plan_run(dense, gptq(text), device=CPU).describe()["made_of"]["text"] != first


def test_a_text_that_is_not_there_is_told_by_the_plan(dense, intactkv_root):
    with pytest.raises(UserError, match="neither a file nor a known corpus"):
        plan_run(dense, gptq(intactkv_root / "absent.txt"), device=CPU)
    with pytest.raises(UserError, match=r"calibration.samples=0 is not allowed; give 1 or more"):
        Calibration("sample", samples=0, length=32)


# what was made before ---------------------------------------------------------------------------------------------


def test_a_checkpoint_that_was_named_by_its_tokens_is_found(dense, text, intactkv_root, monkeypatch):
    recipe = gptq(text, prefix="bos", calibrate_behind_prefix=True)
    plan = plan_run(dense, recipe, device=CPU)
    earlier = by_tokens(plan.checkpoint.fingerprint, recipe, plan.segments, torch.tensor([1]))
    place = plan.directory_of(recipe).with_name(f"{recipe.label()}-{earlier.identity}")
    quantize_checkpoint(dense, recipe, place, segments=plan.segments, behind=torch.tensor([1]))
    (place / "checksums.json").rename(place / "cost.json")  # its name then
    monkeypatch.setattr(GPTQ, "quantize_block", refuse)
    model = plan_run(dense, recipe, device=CPU).load()
    assert torch.isfinite(model.feed(torch.tensor([[5, 6, 7]])).logits).all()
    assert plan_run(dense, recipe, device=CPU).outcome()["quantization"]["bits_per_weight"] > 4
    assert not plan.directory_of(recipe).exists()
    (place / "block-001.safetensors").write_bytes((place / "block-000.safetensors").read_bytes())
    with pytest.raises(UserError):  # its sums are still looked at
        plan_run(dense, recipe, device=CPU).load()


def test_a_discovery_that_was_named_by_its_tokens_is_found(dense, text, monkeypatch):
    plan = plan_run(dense, Recipe(prefix=f"auto:{text}"), device=CPU)
    found = plan.choice.ids
    search = plan.search
    assert isinstance(search, Search)
    key = {"source": plan.checkpoint.fingerprint, "text": sha256_of_tensor(search.pieces()), "start": 1,
           "threshold": 64.0}  # fmt: skip
    search.file.rename(search.file.with_name(f"auto-{identity(key)}.json"))
    monkeypatch.setattr(quantization.runs.auto_prefix, "discover", refuse)
    assert plan_run(dense, Recipe(prefix=f"auto:{text}"), device=CPU).choice.ids == found


def test_a_directory_that_was_named_by_its_tokens_is_taken_up_where_it_is(dense, text, intactkv_root, monkeypatch):
    recipe, out = gptq(text), intactkv_root / "mine"
    plan = plan_run(dense, recipe, device=CPU)
    quantize_checkpoint(dense, recipe, out, segments=plan.segments)
    files = {file.name: file.read_bytes() for file in out.iterdir() if file.name != "checksums.json"}
    assert plan.written(recipe, out) == out
    out.rename(intactkv_root / "mine.partial")  # a run that was killed
    (intactkv_root / "mine.partial" / "block-002.safetensors").unlink()
    done, original = [], GPTQ.quantize_block

    def counted(self, block):
        done.append(block.index)
        return original(self, block)

    monkeypatch.setattr(GPTQ, "quantize_block", counted)
    assert plan_run(dense, recipe, device=CPU).written(recipe, out) == out
    assert done == [2]
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.name != "checksums.json"} == files


def test_a_prefix_goes_with_the_checkpoint_that_is_there(dense, text):
    """A rescaled basis is named after its checkpoint: quantized anew under another name, it gets another prefix."""
    recipe = Recipe(weights=AWQ(GRID), calibration=gptq(text).calibration, prefix="bos")
    plan = plan_run(dense, recipe, device=CPU)
    earlier = by_tokens(plan.checkpoint.fingerprint, recipe, plan.segments)
    place = plan.directory_of(recipe).with_name(f"{recipe.label()}-{earlier.identity}")
    quantize_checkpoint(dense, recipe, place, segments=plan.segments)
    first = plan.load()
    assert first.prefix is not None
    file = place.parent / "mine.safetensors"
    replace(first.prefix, calibrated={"best_step": 1}).save(file)  # whose keys and values cannot be built anew
    assert plan_run(dense, replace(recipe, prefix=str(file)), device=CPU).load().prefix is not None
    shutil.rmtree(place)
    again = plan_run(dense, recipe, device=CPU).load()
    assert again.prefix is not None
    assert again.prefix.model.basis != first.prefix.model.basis
    with pytest.raises(UserError, match="basis"):
        plan_run(dense, replace(recipe, prefix=str(file)), device=CPU)


def test_a_damaged_checkpoint_beside_that_of_a_run_does_not_stop_it(dense, text):
    recipe = Recipe(weights=AWQ(GRID), calibration=gptq(text).calibration, prefix="bos")
    file = dense.parent / "bos.safetensors"
    plan_run(dense, Recipe(prefix="bos"), device=CPU).intact_prefix().save(file)
    place = plan_run(dense, recipe, device=CPU).directory_of(recipe)
    neighbour = place.with_name(f"{recipe.label()}-deadbeef")
    neighbour.mkdir(parents=True)
    (neighbour / "quantization.json").write_text("{")
    assert plan_run(dense, replace(recipe, prefix=str(file)), device=CPU).directory_of(recipe) == place


def test_the_twin_of_a_checkpoint_needs_no_text(dense, text):
    """Its calibration text is not there any more; ranges of keys and values are in the checkpoint."""
    recipe = Recipe(
        (Rotate(head_mix="none"),), RTN(UniformGrid(8)), tuning=PrefixQuantTuning(mse_init=False),
        kv_cache=StaticPerHead(8), calibration=gptq(text).calibration, prefix="bos",
    )  # fmt: skip
    made = plan_run(dense, recipe, device=CPU).written(recipe)
    text.unlink()
    stored = stored_kv(find_checkpoint(made))
    assert stored == StaticPerHead(8)
    plan = plan_run(made, Recipe(prefix="bos", kv_cache=stored), device=CPU)
    assert torch.isfinite(plan.load().feed(torch.tensor([[5, 6, 7]])).logits).all()


def test_a_folder_of_text_is_its_files(dense, intactkv_root):
    folder = intactkv_root / "folder"
    datasets.Dataset.from_dict({"text": ["the quick brown fox jumps over it " * 60]}).save_to_disk(str(folder))
    first = plan_run(dense, gptq(folder), device=CPU)
    assert first.segments is not None
    (folder / "cache-1.arrow").write_bytes(b"left there")
    assert plan_run(dense, gptq(folder), device=CPU).artefact == first.artefact
    datasets.Dataset.from_dict({"text": ["another text " * 200]}).save_to_disk(str(folder))
    assert plan_run(dense, gptq(folder), device=CPU).artefact != first.artefact


def test_another_discovery_under_the_same_name_is_refused_with_its_file(dense, text):
    recipe = gptq(text, prefix=f"auto:{text}", calibrate_behind_prefix=True)
    plan = plan_run(dense, recipe, device=CPU)
    plan.load()
    assert plan.search is not None
    found = json.loads(plan.search.file.read_text()) | {"prefix": [9, 1]}
    plan.search.file.write_text(json.dumps(found))
    with pytest.raises(UserError, match=f"{plan.search.file.name} has changed since it was written"):
        plan_run(dense, recipe, device=CPU).load()
    del found["sha256"]  # as another machine's discovery of before would be
    plan.search.file.write_text(json.dumps(found))
    with pytest.raises(UserError, match=f"{plan.search.file.name} now says"):
        plan_run(dense, recipe, device=CPU).load()


# identities ---------------------------------------------------------------------------------------------

TEXT = {"text": {"corpus": "sample", "files": ["0" * 64], "tokenizer": "1" * 16, "start": 1}}
PINNED = {"rtn-w4": "67f6c57d", "gptq-w3": "c4e45ca9", "quarot": "3d4632d5"}


@pytest.mark.parametrize("name", PINNED)
def test_three_identities_are_what_stored_checkpoints_are_called(name):
    assert artefact_of("0" * 16, named_recipe(name), TEXT).identity == PINNED[name]


def test_names_by_tokens_are_those_of_checkpoints_that_were_stored_so():
    """Taken from the release that named them so."""
    ids = torch.zeros(2, 4, dtype=torch.long)
    pinned = {"gptq-w3": "5ead7208", "quarot": "ca73032a", "awq-w3": "15d48505"}
    assert {name: by_tokens("0" * 16, named_recipe(name), ids).identity for name in pinned} == pinned
    behind = replace(named_recipe("gptq-w3"), prefix="bos", calibrate_behind_prefix=True)
    assert by_tokens("0" * 16, behind, ids, torch.tensor([1])).identity == "e43803be"


def test_every_named_recipe_is_described_as_its_stored_checkpoints_say():
    """A new field of a part of a recipe is declared with `added`, or every checkpoint made before is orphaned."""
    pinned = json.loads((Path(__file__).parent / "identities.json").read_text())
    assert {name: identity(describe(row.recipe)) for name, row in RECIPES.items()} == pinned


def test_an_added_field_is_told_only_where_it_is_not_at_its_default():
    @dataclass(frozen=True)
    class Before:
        bits: int = 4

    @dataclass(frozen=True)
    class After(Before):
        clip: float = added(0.3)

    assert describe(After()) == describe(Before()) | {"kind": "After"}
    assert describe(After(clip=1.0))["clip"] == 1.0


# --plan ---------------------------------------------------------------------------------------------


def test_a_plan_of_a_model_without_a_row_ends_as_its_run_does(tiny_checkpoint, tmp_path, text, intactkv_root, run_main):
    model = tiny_checkpoint(tmp_path, "helium", num_hidden_layers=1)
    call = ("ppl", "--model", model, "--corpus", text, "--window", 32, "--limit", 1, "--kv-bits", 4, "--prefix", "bos")
    code, said, _ = run_main(eval_main, *call, "--plan")
    assert (code, "memory to run" in said) == (run_main(eval_main, *call)[0], True) == (0, True)
    for more in (("--recipe", "gptq-w4"), ("--kv", "static")):  # whose text, C4 or the Pile, is not here
        for end in ((), ("--plan",)):
            code, _, errors = run_main(eval_main, *call, *more, *end)
            assert (code, "'helium' is not in the architecture table" in errors) == (2, True), errors


def test_a_family_is_refused_before_its_text_is_asked_for(tiny_checkpoint, tmp_path, intactkv_root, run_main):
    model = tiny_checkpoint(tmp_path, "gemma2", num_hidden_layers=1)
    for end in ((), ("--plan",)):
        code, _, errors = run_main(quantize_main, "--model", model, "--recipe", "quarot", *end)
        assert (code, "the residual stream cannot be rotated" in errors) == (2, True), errors


def test_what_does_not_fit_is_told_the_number_that_does():
    check_fits("GPT-2", 1024, "--window", 1024, 1023)
    with pytest.raises(UserError, match=r"do not fit the 1024 positions of GPT-2; use --window 1023 or fewer"):
        check_fits("GPT-2", 1024, "--window", 2049, 2048)  # behind one token


def test_plan_prints_what_is_missing_and_what_is_there(dense, text, intactkv_root, run_main):
    call = ("ppl", "--model", dense, "--recipe", "gptq", "--bits", 4, "--group-size", 16, "--calibration", text,
            "--calibration-samples", 2, "--calibration-length", 32, "--prefix", f"auto:{text}",
            "--calibrate-behind-prefix", "--corpus", text, "--window", 32, "--limit", 2)  # fmt: skip
    files = sorted(intactkv_root.rglob("*"))
    code, said, _ = run_main(eval_main, *call, "--plan")
    assert code == 0
    assert sorted(intactkv_root.rglob("*")) == files
    states = {line[:24].strip(): line for line in said.splitlines()}
    assert "present" in states["model"]
    for what in ("discovery of the prefix", "quantized checkpoint", "prefix"):
        assert "missing" in states[what]
    assert run_main(eval_main, *call)[0] == 0
    said = run_main(eval_main, *call, "--plan")[1]
    assert "missing" not in said
    assert "memory to quantize" not in said
    place = next((intactkv_root / "modelzoo" / "quantized").rglob("quantization.json")).parent
    assert str(place) in said


@pytest.mark.parametrize("name", ["rtn-w4", "rtn-w8a8", "rotate"])
def test_the_size_of_a_missing_checkpoint_is_foreseen(dense, name):
    recipe = RECIPES[name].recipe
    if recipe.weights is not None and recipe.weights.grid.group_size > 0:
        recipe = replace(recipe, weights=replace(recipe.weights, grid=replace(recipe.weights.grid, group_size=16)))
    plan = plan_run(dense, recipe, device=CPU)
    (line,) = (line for line in preview(plan) if line.what == "quantized checkpoint")
    files = list(plan.written(recipe).glob("*.safetensors"))
    weights = sum(file.stat().st_size for file in files)
    headers = sum(int.from_bytes(file.read_bytes()[:8], "little") for file in files)  # most of a tiny file
    assert line.size == pytest.approx(weights - headers, rel=0.1)


def test_the_size_of_a_checkpoint_is_in_its_own_dtype(intactkv_root, tiny_checkpoint):
    half = tiny_checkpoint(intactkv_root / "half", "llama", dtype=torch.bfloat16)
    recipe = RECIPES["rotate"].recipe
    sizes = [
        line.size
        for dtype in (torch.float32, torch.bfloat16)
        for line in preview(plan_run(half, recipe, device=CPU, dtype=dtype))
        if line.what == "quantized checkpoint"
    ]
    assert sizes[0] == sizes[1]


class Held(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those that operations made; without what only waits for
    the garbage collector."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        made = call(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        if self.now > self.most:
            gc.collect()
            self.most = max(self.most, self.now)
        return made

    def _freed(self, which: int, size: int) -> None:
        self._alive.discard(which)
        self.now -= size


@pytest.mark.parametrize("name", ["gptq", "gptq at once", "awq", "smoothquant-w8a8"])
@pytest.mark.parametrize(("samples", "length"), [(64, 64), (2, 256)], ids=["text", "batch"])
def test_quantizing_holds_no_more_than_the_plan_says(name, samples, length, dense, text, monkeypatch):
    text.write_text("The fox runs over the hill and back. " * 4000)
    recipe = RECIPES[name.split()[0]].recipe
    if recipe.weights.grid.group_size > 0:
        recipe = replace(recipe, weights=replace(recipe.weights, grid=replace(recipe.weights.grid, group_size=16)))
    if name.endswith("at once"):
        recipe = replace(recipe, weights=replace(recipe.weights, true_sequential=False))
    calibration = Calibration(str(text), samples=samples, length=length)
    plan = plan_run(dense, replace(recipe, calibration=calibration), device=CPU)
    monkeypatch.setattr("quantization.runs.preview.LIBRARIES", {})
    (line,) = (line for line in preview(plan, "checkpoint") if line.what == "memory to quantize")
    assert plan.segments.shape == (samples, length)
    gc.collect()
    gc.freeze()  # the libraries' objects, which would be looked at each time
    try:
        with Held() as held:
            plan.written(plan.recipe)
    finally:
        gc.unfreeze()
    assert held.most <= line.size <= 3 * held.most


def test_text_that_a_gpu_leaves_to_the_host_is_not_counted_there(dense, text, monkeypatch):
    monkeypatch.setenv("INTACTKV_CALIBRATION_BATCH", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    recipe = Recipe(weights=GPTQ(GRID), calibration=Calibration(str(text), samples=1000, length=32))
    plan, copy = plan_run(dense, recipe, device=torch.device("cuda")), 1000 * 32 * 64 * 4
    said = []
    for memory in (8 * copy - 8, 8 * copy):  # a copy stays if it takes an eighth
        monkeypatch.setattr("quantization.model.text.memory_of", lambda _device, memory=memory: memory)
        said += [line.size for line in preview(plan, "checkpoint") if line.what == "memory to quantize"]
    assert said[1] - said[0] == 2 * copy  # in front of the block and behind it


def test_plan_shows_what_the_program_makes_and_nothing_else(dense, text, intactkv_root, run_main):
    calibration = ("--calibration", text, "--calibration-samples", 2, "--calibration-length", 32)
    small = ("--model", dense, "--recipe", "gptq", "--bits", 4, "--group-size", 16, *calibration)
    said = run_main(quantize_main, *small, "--out", intactkv_root / "mine", "--plan")[1]
    assert str(intactkv_root / "mine") in said
    assert "memory to run" not in said
    assert "prefix" not in said
    said = run_main(intactkv_main, "build", *small, "--prefix", "bos", "--out", "x.safetensors", "--plan")[1]
    assert "quantized checkpoint" not in said
    assert "prefix" in said
    said = run_main(intactkv_main, "discover", "--model", dense, "--corpus", text, "--plan")[1]
    assert "discovery of the prefix" in said
    code, _, errors = run_main(intactkv_main, "discover", "--model", dense, "--corpus", "absent.txt", "--plan")
    assert (code, "absent.txt" in errors) == (2, True)
    assert run_main(quantize_main, "--model", dense, "--plan")[0] == 2  # there is nothing to write
    code, said, _ = run_main(quantize_main, *small, "--device", "cuda:3", "--plan")  # a login node shows no GPU
    assert (code, "cuda:3" in said) == (0, True)
    assert run_main(quantize_main, *small, "--device", "gpu", "--plan")[0] == 2
    assert not (intactkv_root / "modelzoo").exists()
    (intactkv_root / "mine").mkdir()
    assert "something else is there" in run_main(quantize_main, *small, "--out", intactkv_root / "mine", "--plan")[1]


def test_a_half_finished_checkpoint_is_told_by_its_blocks(dense, text):
    recipe = gptq(text)
    plan = plan_run(dense, recipe, device=CPU)
    partial = plan.directory_of(recipe).with_name(f"{plan.directory_of(recipe).name}.partial")
    partial.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, partial / "block-000.safetensors")
    assert [line.state for line in preview(plan) if line.what == "quantized checkpoint"] == ["1 of 3 blocks"]
