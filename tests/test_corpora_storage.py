"""What counts as a checkpoint's weights, and what its fingerprint sees."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from corpora.errors import UserError
from corpora.storage import checkpoint_fingerprint, disk_errors, weight_files


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
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json has no weight_map"):
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


@pytest.mark.parametrize("row", range(8))
def test_the_fingerprint_sees_each_of_the_first_embeddings(dense: Path, row: int) -> None:
    before = checkpoint_fingerprint(dense)
    tensors = load_file(dense / "model.safetensors")
    tensors["model.embed_tokens.weight"][row] += 1
    save_file(tensors, dense / "model.safetensors")
    assert checkpoint_fingerprint(dense) != before


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
