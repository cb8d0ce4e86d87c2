"""What a model directory says of itself: every damaged value is one line with its file, before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import every

from corpora.convert import bin_to_safetensors
from corpora.errors import UserError, built
from quantization.runs.checkpoint import find_checkpoint
from quantization.runs.dense import DenseCheckpoint, empty_model, read_config, read_generation_config
from quantization.runs.opening import load_tokenizer

SCALED = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose files a test changes and puts back."""
    return shutil.copytree(checkpoint(), tmp_path_factory.mktemp("configured") / "model")


def look(directory: Path) -> None:
    """All that a plan looks at."""
    find_checkpoint(directory)
    read_config(directory)
    DenseCheckpoint(directory).check()
    load_tokenizer(directory)


def refused(model: Path, name: str, content: str | bytes, said: str) -> None:
    """Looking is refused in one line, and goes well before and after."""
    file = model / name
    before = file.read_bytes() if file.exists() else None
    look(model)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        with pytest.raises(UserError, match=said) as caught:
            look(model)
        assert "\n" not in str(caught.value)
    finally:
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)
    look(model)


def changed(model: Path, name: str, **changes: Any) -> str:
    return json.dumps({**json.loads((model / name).read_text()), **changes})


@every(
    "changes",
    [
        *({key: value} for key in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads",
                                   "model_type", "max_position_embeddings", "rms_norm_eps", "intermediate_size")
          for value in ([], {}, "x", -1, 10**22, float("nan"))),
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 2},  # the files hold three
        {"num_hidden_layers": 4},
        {"hidden_size": 0},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"head_dim": 10**9},
        {"rms_norm_eps": "1e-5"},
        {"rms_norm_eps": 0.0},
        {"dtype": {"a": 1}},
        {"dtype": "int8"},
        {"eos_token_id": [1, "a"]},
        {"pad_token_id": 5000},
        {"hidden_act": "none of torch's"},
        {"text_config": {"hidden_size": 3}},
        {"rope_scaling": {"factor": 8.0}},
        {"rope_parameters": "linear"},
        {"rope_parameters": {"rope_type": {}}},
        {"rope_parameters": {"rope_type": "yarn", "factor": "x", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "zz", "factor": 2.0, "rope_theta": 1e4}},
        {"rope_parameters": {**SCALED, "short_factor": [1.0], "long_factor": [1.0]}},
        {"layer_types": ["sliding_attention"] * 3},
        {"layer_types": ["chunked_attention"] * 3},
        {"layer_types": ["full_attention"]},
        {"output_hidden_states": "x"},
        {"return_dict": False},
        {"quantization_config": 3},
        {"intactkv": {"label": 3}},
        {"auto_map": {"AutoConfig": "own.Config"}},
    ],
)  # fmt: skip
def test_a_damaged_configuration_is_one_line(changes: dict[str, Any], model: Path) -> None:
    refused(model, "config.json", changed(model, "config.json", **changes), r"config\.json|model_type 'llama'|tensor")


@every("content", ["", "{", "[]", "3", "[" * 5000 + "]" * 5000, '{"model_type": ' + "9" * 5000 + "}", b"\xff\xfe\x00"])
@every("name", ["config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
def test_what_is_no_table_is_one_line_with_its_file(name: str, content: str | bytes, model: Path) -> None:
    refused(model, name, content, name.replace(".", r"\."))


@every(
    ("name", "changes"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}),
        ("tokenizer_config.json", {"chat_template": 3}),
        ("tokenizer_config.json", {"model_max_length": "long"}),
        ("tokenizer_config.json", {"tokenizer_class": "../own"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": {}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "zz", "special": 3}}}),
        ("tokenizer_config.json", {"bos_token": 3}),
        ("generation_config.json", {"auto_map": {"a": "b"}}),
        ("generation_config.json", {"eos_token_id": "</s>"}),
    ],
)
def test_a_damaged_word_on_the_tokenizer_or_on_generating_is_one_line(
    name: str, changes: dict[str, Any], model: Path
) -> None:
    refused(model, name, changed(model, name, **changes), name.replace(".", r"\."))


@every(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"type": "ByteLevel"', '"type": "ByteLevl"'),
        lambda text: json.dumps({**json.loads(text), "model": 3}),
        lambda text: json.dumps({**json.loads(text), "added_tokens": [{"id": -1}]}),
        lambda text: json.dumps({**json.loads(text), "post_processor": []}),
        lambda text: "[" * 5000 + "]" * 5000,
        lambda text: "\0",
    ],
)
def test_a_damaged_tokenizer_is_one_line(damage: Callable[[str], str], model: Path) -> None:
    text = (model / "tokenizer.json").read_text()
    assert damage(text) != text
    refused(model, "tokenizer.json", damage(text), "holds no tokenizer that transformers can open")


def test_what_is_whole_is_read_as_it_stands(model: Path) -> None:
    config = read_config(model)
    assert (config.num_hidden_layers, config.hidden_size) == (3, 64)
    assert read_generation_config(model).eos_token_id == 2
    assert empty_model(model).generation_config.eos_token_id == 2


def test_a_panic_of_a_library_is_one_line_and_an_interruption_is_none() -> None:
    panic = type("PanicException", (BaseException,), {})  # as pyo3 has it
    with pytest.raises(UserError, match=r"it broke \(called unwrap\); mend it"), built("it broke", "mend it"):
        raise panic("called unwrap\nnote: run with RUST_BACKTRACE=1")
    for passed in (KeyboardInterrupt, PermissionError, MemoryError):
        with pytest.raises(passed), built("it broke", "mend it"):
            raise passed


@every("content", [{1: torch.ones(2)}, {"a": torch.ones(2, 2).to_sparse()}, {"a": [torch.ones(2)]}, [torch.ones(2)]])
def test_a_bin_file_that_holds_more_than_plain_tensors_is_refused(
    content: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("bin")
    torch.save(content, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is no table of plain tensors"):
        bin_to_safetensors(directory)
    assert not list(directory.glob("*model.safetensors"))
