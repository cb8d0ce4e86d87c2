"""A quantized checkpoint is what was written: its bytes have their sums, or it is refused by whoever reads it."""

import hashlib
import json
import logging
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from common import every
from safetensors.torch import load_file, save_file

import quantization.runs.checkpoint
import quantization.runs.manifest
import quantization.runs.pipeline
from corpora.errors import UserError
from corpora.storage import identity, write_tensors
from quantization.export.writer import export_checkpoint
from quantization.grids.uniform import UniformGrid
from quantization.recipes.recipe import Calibration, Recipe
from quantization.runs.checkpoint import (
    CHECKSUMS,
    MANIFEST,
    block_file,
    find_checkpoint,
    load_quantized,
    read_cost,
    read_manifest,
)  # fmt: skip
from quantization.runs.dense import Weights
from quantization.runs.opening import is_rescaled, load_tokenizer
from quantization.runs.pipeline import partial_of, quantize_checkpoint
from quantization.runs.plan import plan_run
from quantization.runs.sums import checked
from quantization.transforms.smooth import Smooth
from quantization.weights.rtn import RTN

RECIPE = Recipe(weights=RTN(UniformGrid(4, 32)))
CALIBRATED = Recipe(transforms=(Smooth(),), weights=RTN(UniformGrid(4, 32)), calibration=Calibration("x", 2, 16))
SEGMENTS = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_checkpoint(checkpoint(), RECIPE, tmp_path_factory.mktemp("whole") / "q")


@pytest.fixture
def quantized(whole: Path, checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A quantized checkpoint to break, which finds its dense one."""
    copy = shutil.copytree(whole, tmp_path / "q")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["source"]["directory"] = os.path.relpath(checkpoint(), tmp_path)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    sums = json.loads((copy / CHECKSUMS).read_text())
    del sums["sha256"][MANIFEST], sums["sum"]
    (copy / CHECKSUMS).write_text(json.dumps(sums))
    return copy


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != CHECKSUMS}


READERS: dict[str, Callable[[Path, Path], object]] = {
    "load": lambda q, out: load_quantized(q),
    "packed": lambda q, out: load_quantized(q, kernel="unpack"),
    "export": lambda q, out: export_checkpoint(q, out, "dense"),
    "twin": lambda q, out: plan_run(q, Recipe(prefix="bos"), device=CPU).twin(),
    "rescaled": lambda q, out: is_rescaled(q),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("place", [3, 40, -5], ids=["length", "header", "value"])
def test_every_reader_refuses_a_changed_block_before_it_is_parsed(
    quantized: Path, tmp_path: Path, reader: str, place: int, intactkv_root: Path
) -> None:
    READERS[reader](quantized, tmp_path / "control")
    flip(block_file(quantized, 0), place)
    with pytest.raises(UserError, match=r"block-000\.safetensors has changed since it was written"):
        READERS[reader](quantized, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_without_its_sums_a_checkpoint_is_refused(quantized: Path) -> None:
    load_quantized(quantized)
    (quantized / CHECKSUMS).unlink()
    with pytest.raises(UserError, match=r"q has no checksums\.json, so nothing tells whether its files are whole"):
        load_quantized(quantized)


@every(
    ("change", "said"),
    [
        ({"sha256": {}}, "has no sum"),
        ({"sha256": {"../block-000.safetensors": "0" * 64}}, "is no plain name"),
        ({"sha256": {"block-000.safetensors": 3}}, "is not a valid string"),
        ({"sha256": []}, "sha256"),
        (None, "sha256"),
    ],
)
def test_a_damaged_list_of_sums_is_named(change: Any, said: str, whole: Path, tmp_path_factory: Any) -> None:
    copy = shutil.copytree(whole, tmp_path_factory.mktemp("sums") / "q")
    sums = json.loads((copy / CHECKSUMS).read_text())
    del sums["sum"]
    (copy / CHECKSUMS).write_text(json.dumps(sums | change if change else {"seconds": 1}))
    with pytest.raises(UserError, match=rf"(checksums\.json|q/block).*{said}"):
        load_quantized(copy)


def test_a_changed_cost_is_not_shown(whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole, tmp_path / "q")
    cost = read_cost(copy)
    (copy / CHECKSUMS).write_text(json.dumps(json.loads((copy / CHECKSUMS).read_text()) | {"seconds": 1.0}))
    assert cost["seconds"] != 1.0
    with pytest.raises(UserError, match=r"checksums\.json has changed since it was written"):
        read_cost(copy)


def test_one_load_reads_every_sum_once(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    hash_of = hashlib.file_digest

    def counted(file: BinaryIO, name: str) -> Any:
        hashed.append(Path(file.name).name)
        return hash_of(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    load_quantized(quantized)
    assert sorted(hashed) == [*(f"block-00{i}.safetensors" for i in range(3)), "config.json", "ends.safetensors"]


def test_sums_are_taken_several_at_once(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread hashes 1 GB a second, a disk gives several."""
    both, waiting = threading.Barrier(2), {"block-000.safetensors", "block-001.safetensors"}

    def meeting(file: Path) -> Path:
        if file.name in waiting:
            waiting.remove(file.name)
            both.wait(60)
        return checked(file)

    monkeypatch.setattr(quantization.runs.checkpoint, "checked", meeting)
    load_quantized(quantized)
    assert not waiting


@pytest.mark.parametrize("name", ["config.json", MANIFEST])
def test_a_configuration_that_changed_since_is_refused(whole: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(whole, tmp_path / "q")
    find_checkpoint(copy)
    (copy / name).write_text((copy / name).read_text() + " ")
    with pytest.raises(UserError, match=rf"{name} has changed since it was written"):
        find_checkpoint(copy)


def _renamed(manifest: dict[str, Any]) -> dict[str, Any]:
    made_of = {**manifest["made_of"], "source": "0" * 16}
    return {**manifest, "made_of": made_of, "identity": identity(made_of)}


@every(
    "change",
    [
        lambda m: {**m, "source": {**m["source"], "name": "../../../../ESCAPED"}},
        lambda m: {**m, "source": {**m["source"], "name": ".."}},
        lambda m: {**m, "source": {**m["source"], "fingerprint": "x"}},
        lambda m: {**m, "source": {**m["source"], "fingerprint": "0" * 16}},
        lambda m: {**m, "source": []},
        lambda m: {**m, "identity": "12345678"},
        lambda m: {**m, "identity": 3},
        lambda m: {**m, "label": None},
        lambda m: {**m, "basis": 3},
        lambda m: {**m, "needs_prefix": ["a"]},
        lambda m: {**m, "needs_prefix": [-1]},
        lambda m: {**m, "needs_kv": 3},
        lambda m: {**m, "made_of": {}},
        lambda m: _renamed(m),
        lambda m: {**m, "recipe": {**m["recipe"], "weights": {"kind": "GPTQ"}}},
        lambda m: {**m, "recipe": {**m["recipe"], "transforms": [{"kind": "Rotate"}]}},
        lambda m: {**m, "recipe": {**m["recipe"], "transforms": None}},
        lambda m: {**m, "recipe": {**m["recipe"], "prefix": 3}},
        lambda m: {**m, "recipe": {**m["recipe"], "kv_cache": {"kind": "None of ours"}}},
        lambda m: {**m, "recipe": {**m["recipe"], "kv_cache": {"kind": "PerHead", "bits": "4"}}},
        lambda m: {**m, "recipe": {**m["recipe"], "kv_cache": {"kind": "PerHead", "bits": 4, "colour": 1}}},
        lambda m: {**m, "recipe": {**m["recipe"], "kv_cache": {"kind": "PerHead"}}},
        lambda m: {**m, "recipe": {**m["recipe"], "attention": {"kind": "AttentionProducts", "grid": 3}}},
        lambda m: {name: value for name, value in m.items() if name != "needs_prefix"},
    ],
)
def test_a_manifest_that_says_what_none_could_is_refused(
    change: Callable[[Any], Any], whole: Path, tmp_path_factory: Any
) -> None:
    copy = shutil.copytree(whole, tmp_path_factory.mktemp("manifest") / "q")
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / CHECKSUMS).unlink()  # its sum would tell first
    assert read_manifest(copy) == manifest
    (copy / MANIFEST).write_text(json.dumps(change(manifest)))
    with pytest.raises(UserError, match=r"quantization\.json"):
        read_manifest(copy)


def test_a_model_directory_whose_name_makes_no_path_of_an_artefact_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    odd = shutil.copytree(checkpoint(), tmp_path / ".hidden")
    with pytest.raises(UserError, match=r"is no plain name of a file.*rename it"):
        quantize_checkpoint(odd, RECIPE, tmp_path / "q")
    assert os.listdir(tmp_path) == [".hidden"]


# resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "segments"), [(RECIPE, None), (CALIBRATED, SEGMENTS)], ids=["plain", "calibrated"])
@pytest.mark.parametrize("lost", ["a bit", "the sum", "all sums", "damaged sums"])
def test_a_block_that_changed_between_kill_and_resume_is_made_again(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    recipe: Recipe,
    segments: torch.Tensor | None,
    lost: str,
) -> None:
    expected = contents(quantize_checkpoint(checkpoint(), recipe, tmp_path / "whole", segments=segments))
    partial = shutil.copytree(tmp_path / "whole", tmp_path / "out.partial")
    block_file(partial, 2).unlink()
    sums = json.loads((partial / CHECKSUMS).read_text())["sha256"]
    if lost == "a bit":
        flip(block_file(partial, 0), -2000)
    elif lost == "the sum":
        (partial / CHECKSUMS).write_text(
            json.dumps({"sha256": {n: s for n, s in sums.items() if "block-000" not in n}})
        )
    else:
        (partial / CHECKSUMS).write_text("{}" if lost == "all sums" else "{")
    with caplog.at_level(logging.WARNING):
        out = quantize_checkpoint(checkpoint(), recipe, tmp_path / "out", segments=segments)
    assert contents(out) == expected
    assert "block-000.safetensors" in caplog.text
    assert ("has changed since" in caplog.text) == (lost == "a bit")
    assert json.loads((out / CHECKSUMS).read_text())["blocks_found"] == (1 if lost in ("a bit", "the sum") else 0)
    load_quantized(out)


def test_a_kill_before_the_manifest_has_its_name_blocks_nothing(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    expected = contents(quantize_checkpoint(checkpoint(), RECIPE, tmp_path / "whole"))
    partial = tmp_path / "q.partial"
    partial.mkdir()
    (partial / ".quantization.json.99.partial").write_text("{}")  # of an earlier version
    (partial / ".quantization.json.host-7-0123abcd.partial").mkdir()
    assert contents(quantize_checkpoint(checkpoint(), RECIPE, tmp_path / "q")) == expected
    assert sorted(os.listdir(tmp_path)) == ["q", "whole"]
    partial.mkdir()
    (partial / ".mine.partial").write_text("a user's")
    partial.rename(tmp_path / "q2.partial")
    with pytest.raises(UserError, match=r"q2\.partial exists and is not a half-finished checkpoint"):
        quantize_checkpoint(checkpoint(), RECIPE, tmp_path / "q2")
    assert (tmp_path / "q2.partial" / ".mine.partial").read_text() == "a user's"


# shared places --------------------------------------------------------------------------------------------------------


def test_a_finished_checkpoint_is_used_without_a_lock_or_a_file_beside_it(
    quantized: Path, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTACTKV_ROOT", str(tmp_path))

    def refused(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(arguments[0]))

    monkeypatch.setattr(quantization.runs.pipeline, "locked", refused)
    with pytest.raises(PermissionError):  # the control: a new one needs the right to write
        quantize_checkpoint(checkpoint(), RECIPE, tmp_path / "new")
    before = sorted(tmp_path.rglob("*"))
    assert quantize_checkpoint(checkpoint(), RECIPE, quantized) == quantized
    assert plan_run(checkpoint(), RECIPE, device=CPU).written(RECIPE, quantized) == quantized
    plan_run(quantized, Recipe(), device=CPU).load()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_as_open_as_the_umask_says(
    checkpoint: Callable[..., Path], tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        out = quantize_checkpoint(checkpoint(), RECIPE, tmp_path / "q")
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (*out.iterdir(), tmp_path / "a.safetensors")} == {mode}
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


def test_unreadable_is_not_called_another_checkpoint(
    quantized: Path, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", MANIFEST)

    monkeypatch.setattr(quantization.runs.manifest, "read_json", refused)
    with pytest.raises(PermissionError):
        quantize_checkpoint(checkpoint(), RECIPE, quantized)


def test_a_checkpoint_that_is_refused_leaves_no_prefix(quantized: Path, intactkv_root: Path) -> None:
    plan = plan_run(quantized, Recipe(prefix="bos"), device=CPU)
    flip(block_file(quantized, 2), -5)
    with pytest.raises(UserError, match=r"block-002\.safetensors has changed since it was written"):
        plan.load()
    assert not list(intactkv_root.rglob("*bos*"))


def test_a_value_that_is_not_finite_is_refused_before_any_block(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    dense = shutil.copytree(checkpoint(), tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    said = r"layers\.2\.mlp\.up_proj\.weight' holds values that are not finite"
    with pytest.raises(UserError, match=said):
        quantize_checkpoint(dense, RECIPE, tmp_path / "q")
    assert os.listdir(tmp_path) == ["dense"]


def test_weights_are_read_through_at_the_start_and_not_where_a_killed_run_goes_on(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[Weights] = []
    check = Weights.check
    monkeypatch.setattr(Weights, "check", lambda weights: (passes.append(weights), check(weights)))
    out = tmp_path / "smooth"
    quantize_checkpoint(checkpoint(), CALIBRATED, out, segments=SEGMENTS)
    assert len(passes) == 1
    out.rename(partial_of(out))  # as a killed run leaves it, but for the last block
    block_file(partial_of(out), 2).unlink()
    quantize_checkpoint(checkpoint(), CALIBRATED, out, segments=SEGMENTS)
    assert len(passes) == 1


def test_what_stands_beside_quantized_weights_is_compared_before_it_is_used(quantized: Path) -> None:
    """Another tokenizer gives other figures: swapped ids of two letters read as another text."""
    file = quantized / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    before = load_tokenizer(quantized)("ab")["input_ids"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json has changed since it was written"):
        load_tokenizer(quantized)
    sums = json.loads((quantized / CHECKSUMS).read_text())  # as checkpoints of before, which list no tokenizer
    for name in [name for name in sums["sha256"] if not name.endswith(".safetensors")]:
        del sums["sha256"][name]
    (quantized / CHECKSUMS).write_text(json.dumps(sums))
    assert load_tokenizer(quantized)("ba")["input_ids"] == before


def test_sums_that_lie_beside_a_dense_model_are_not_the_checkpoints(
    checkpoint: Callable[..., Path], whole: Path, tmp_path: Path
) -> None:
    dense = shutil.copytree(checkpoint(), tmp_path / "tiny")
    (dense / CHECKSUMS).write_text("{}")
    made = quantize_checkpoint(dense, RECIPE, tmp_path / "q")
    assert {**contents(made), MANIFEST: b""} == {**contents(whole), MANIFEST: b""}
    load_quantized(made)
