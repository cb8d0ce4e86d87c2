"""What counts as a checkpoint's weights, and what its fingerprint sees."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import every
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from corpora.errors import UserError
from corpora.storage import checkpoint_fingerprint, disk_errors, read_artefact, weight_files, write_artefact


@pytest.fixture
def dense(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, "llama")


@pytest.fixture
def sharded(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, "llama", max_shard_size="100KB")


def save_prefix(directory: Path) -> Path:
    """A file with the mark of a prefix file."""
    path = directory / "bos.safetensors"
    save_file({"keys": torch.ones(2)}, path, metadata={"intactkv": "{}"})
    return path


def one_file_a_tensor(directory: Path) -> None:
    """A checkpoint as other tools write it: any names, no index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for name, tensor in tensors.items():
        save_file({name: tensor}, directory / f"layers-{name}.safetensors")


@pytest.mark.parametrize("layout", ["one file", "sharded", "any names"])
def test_a_prefix_file_in_the_directory_is_not_the_model(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    options = {"max_shard_size": "100KB"} if layout == "sharded" else {}
    directory = tiny_checkpoint(tmp_path, "llama", **options)
    if layout == "any names":
        one_file_a_tensor(directory)
    before = checkpoint_fingerprint(directory), weight_files(directory)
    assert before[1] == sorted(directory.glob("*.safetensors"))
    save_prefix(directory)
    assert (checkpoint_fingerprint(directory), weight_files(directory)) == before


def test_what_the_index_does_not_name_does_not_count(sharded: Path) -> None:
    before = checkpoint_fingerprint(sharded)
    save_file({"a": torch.ones(2)}, sharded / "model-of-another-day.safetensors")
    assert checkpoint_fingerprint(sharded) == before


def test_a_shard_that_the_index_names_must_be_there(sharded: Path) -> None:
    shard = weight_files(sharded)[1]
    shard.unlink()
    with pytest.raises(UserError, match=rf"lacks the tensor '.*names {shard.name}, which is missing"):
        weight_files(sharded)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_weight_map_is_refused(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is damaged: .*(weight_map|dictionary)"):
        weight_files(sharded)


@pytest.mark.parametrize("with_prefix", [False, True])
def test_a_directory_without_weights_says_so(dense: Path, with_prefix: bool) -> None:
    (dense / "model.safetensors").unlink()
    if with_prefix:
        save_prefix(dense)
    with pytest.raises(UserError, match=r"tiny-llama holds no \*\.safetensors file"):
        weight_files(dense)


def test_a_damaged_file_is_named(dense: Path) -> None:
    (dense / "model.safetensors").rename(dense / "weights.safetensors")
    (dense / "weights.safetensors").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"weights\.safetensors is truncated or not a safetensors file"):
        weight_files(dense)


def large(directory: Path) -> dict[str, torch.Tensor]:
    """A model whose matrices are too large to be read whole: 1,000 tokens, 512 channels."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 1000}}))
    shapes = {"embed": (1000, 512), "head": (1000, 512), "up": (700, 512), "experts": (4, 100, 512), "norm": (512,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    return tensors


@every("row", (0, 7, 8, 20, 21, 500, 998, 999))
@every("name", ("embed", "head"))
def test_the_fingerprint_sees_every_changed_token(
    name: str, row: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("large") / "model"
    tensors = large(directory)
    before = checkpoint_fingerprint(directory)
    assert checkpoint_fingerprint(directory) == before
    tensors[name][row] *= 9
    save_file(tensors, directory / "model.safetensors")
    assert checkpoint_fingerprint(directory) != before


def test_the_fingerprint_sees_every_value_of_small_tensors_and_most_edits_of_large_ones(
    dense: Path, tmp_path: Path
) -> None:
    tensors = load_file(dense / "model.safetensors")
    before = checkpoint_fingerprint(dense)
    for name in tensors:  # all of them are small
        edited = {**tensors, name: tensors[name].clone()}
        edited[name].view(-1)[-2] += 1
        save_file(edited, dense / "model.safetensors")
        assert checkpoint_fingerprint(dense) != before
    tensors = large(tmp_path / "large")
    before = checkpoint_fingerprint(tmp_path / "large")
    for name, part in (("up", slice(100, 130)), ("experts", slice(1, 2))):  # behind the rows of an earlier sample
        edited = {**tensors, name: tensors[name].clone()}
        edited[name][part, ..., 256:] *= 2  # and behind its columns
        save_file(edited, tmp_path / "large" / "model.safetensors")
        assert checkpoint_fingerprint(tmp_path / "large") != before


def test_the_fingerprint_ignores_who_wrote_the_configuration(dense: Path) -> None:
    before = checkpoint_fingerprint(dense)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "transformers_version": "0", "_name_or_path": "/x"}))
    assert checkpoint_fingerprint(dense) == before
    (dense / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    assert checkpoint_fingerprint(dense) != before


def test_what_safetensors_cannot_write_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot write") as caught, disk_errors(tmp_path):
        save_file({"a": torch.ones(1)}, tmp_path / "nowhere" / "a.safetensors")
    assert caught.value.filename == str(tmp_path)


# Artefacts: a header and tensors under one sum ------------------------------------------------------------------------


TENSORS = {"a": torch.arange(6.0).view(2, 3), "ids": torch.tensor([3, 1])}


def read(path: Path) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    return read_artefact(path, "kind", dict[str, int], "the thing", "make it again")


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    write_artefact(path := tmp_path / "a.safetensors", "kind", {"step": 7}, TENSORS)
    return path


def changed(path: Path, change: Callable[[dict[str, str], dict[str, torch.Tensor]], object]) -> None:
    """The same file with other content, as a tool that knows nothing of sums would write it."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(metadata, tensors)
    save_file(tensors, path, metadata=metadata)


def test_an_artefact_reads_back(artefact: Path) -> None:
    header, tensors = read(artefact)
    assert header == {"step": 7}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


CHANGES: dict[str, Callable[[dict[str, str], dict[str, torch.Tensor]], object]] = {
    "a sign": lambda _, tensors: tensors["a"].neg_(),
    "a value": lambda _, tensors: tensors["ids"].add_(1),
    "a name": lambda _, tensors: tensors.update(b=tensors.pop("a")),
    "a shape": lambda _, tensors: tensors.update(a=tensors["a"].view(3, 2)),
    "a dtype": lambda _, tensors: tensors.update(ids=tensors["ids"].int()),
    "one less": lambda _, tensors: tensors.pop("ids"),
    "one more": lambda _, tensors: tensors.update(b=torch.ones(1)),
    "the header": lambda metadata, _: metadata.update(kind=metadata["kind"].replace("7", "8")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_artefact_that_changed_is_refused(artefact: Path, what: str) -> None:
    changed(artefact, CHANGES[what])
    with pytest.raises(UserError, match=r"the thing .* has changed since it was written .*; make it again"):
        read(artefact)


def test_artefacts_of_before_have_no_sum(tmp_path: Path) -> None:
    save_file(TENSORS, path := tmp_path / "a.safetensors", metadata={"kind": '{"step": 7}'})
    assert read(path)[0] == {"step": 7}
    changed(path, lambda _, tensors: tensors["a"].fill_(float("nan")))
    with pytest.raises(UserError, match="'a' holds values that are not finite"):
        read(path)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "another kind of file"),
        ({"kind": "{"}, "not readable JSON"),
        ({"kind": "[]"}, "is not a valid dictionary"),
        ({"kind": '{"step": "7"}'}, "its 'step' '7' is not a valid integer"),
    ],
)
def test_a_header_of_another_form_is_refused(tmp_path: Path, metadata: dict[str, str], said: str) -> None:
    save_file(TENSORS, path := tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=said):
        read(path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(artefact: Path, kept: int) -> None:
    artefact.write_bytes(artefact.read_bytes()[:kept])
    with pytest.raises(UserError, match="truncated"):
        read(artefact)
