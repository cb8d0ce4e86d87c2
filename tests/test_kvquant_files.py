"""Pickled quantizer files of KVQuant's own code: what they say comes out, and what they could run does not."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import every
from torch import Tensor

from corpora.errors import UserError
from quantization.kv_cache.kvquant_files import read_quantizers

NAME = "model.layers.{}.self_attn.{}_proj"


def quantizers(layers: int = 2, bits: int = 3, channels: int = 8, qnorm: bool = False) -> dict[str, tuple[Any, ...]]:
    """A file's content as the reference makes it: torch thresholds, NumPy levels of scikit-learn, in no order."""
    random = np.random.default_rng(0)
    content: dict[str, tuple[Any, ...]] = {}
    for layer in range(layers):
        for side in "kv":
            shape = (1, channels) if side == "k" else (50, 1)
            high = torch.tensor(random.uniform(1, 2, shape), dtype=torch.float64)
            levels = random.uniform(-1, 1, (2**bits, 1)).astype(np.float32)
            entry = (high, -high, [levels])
            content[NAME.format(layer, side)] = (*entry, torch.tensor(1.1), torch.tensor(0.2)) if qnorm else entry
    return content


def written(path: Path, content: Any, protocol: int | None = None) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@every("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@every("qnorm", [False, True])
def test_thresholds_and_levels_come_out_as_they_were_put_in(tmp_path, protocol, qnorm):
    content = quantizers(qnorm=qnorm)
    read = read_quantizers(written(tmp_path / "q.pickle", content, protocol))
    assert len(read) == 2
    for layer, tensors in enumerate(read):
        keys, values = (content[NAME.format(layer, side)] for side in "kv")
        assert tensors.keys() == {"keys_low", "keys_high", "keys_levels", "values_levels"} | (
            {"keys_qnorm", "values_qnorm"} if qnorm else set()
        )
        assert torch.equal(tensors["keys_high"], keys[0][0].float())
        assert torch.equal(tensors["keys_low"], keys[1][0].float())
        assert tensors["keys_levels"].tolist() == sorted(keys[2][0].ravel().tolist())
        assert tensors["values_levels"].tolist() == sorted(values[2][0].ravel().tolist())
        if qnorm:
            assert torch.equal(tensors["keys_qnorm"], torch.tensor([1.1, 0.2]))


@every("form", [
    lambda x: np.asfortranarray(x.reshape(2, 4)), lambda x: x.astype(">f4"), lambda x: x.astype(np.float64),
    lambda x: torch.tensor(x), lambda x: torch.tensor(x).bfloat16(), lambda x: torch.tensor(x).t()[:, :],
])  # fmt: skip
@every("protocol", [2, 4, 5])
def test_arrays_of_either_library_in_any_order_of_bytes_are_read(tmp_path, form, protocol):
    levels = (np.arange(8, dtype=np.float32)[::-1].copy() / 8)[:, None]
    content = {name: (*entry[:2], [form(levels)]) for name, entry in quantizers().items()}
    read = read_quantizers(written(tmp_path / "q.pickle", content, protocol))
    assert read[1]["values_levels"].tolist() == sorted(levels.ravel().tolist())


class Runs:
    """What a hostile file holds: unpickled as usual, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_file_that_would_run_something_is_refused_by_its_name_and_nothing_runs(tmp_path):
    file = written(tmp_path / "q.pickle", quantizers() | {NAME.format(2, "k"): Runs(tmp_path / "ran")})
    with pytest.raises(UserError, match=r"it asks for \w+\.mkdir, which makes no array.*calibrate here"):
        read_quantizers(file)
    inside = torch.ones(2)
    storage = pickle.dumps(quantizers() | {NAME.format(2, "k"): (inside, inside, [Runs(tmp_path / "ran")])})
    with pytest.raises(UserError, match="mkdir"):
        read_quantizers_of(tmp_path / "p.pickle", storage)
    assert not (tmp_path / "ran").exists()


def read_quantizers_of(path: Path, data: bytes) -> list[dict[str, Tensor]]:
    path.write_bytes(data)
    return read_quantizers(path)


def test_a_nested_pickle_inside_a_tensor_runs_nothing_either(tmp_path):
    class Storage:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (pickle.dumps(Runs(tmp_path / "ran"), 2),)

    with pytest.raises(UserError, match="is damaged or holds more than arrays"):
        read_quantizers(written(tmp_path / "q.pickle", {NAME.format(0, "k"): Storage()}))
    assert not (tmp_path / "ran").exists()


@every("name", ["builtins.eval", "numpy.load", "torch.load", "numpy.core.multiarray.frombuffer", "functools.partial"])
def test_every_other_name_is_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    data = f"c{module}\n{attribute}\n.".encode()
    with pytest.raises(UserError, match=f"it asks for {name}"):
        read_quantizers_of(tmp_path / "q.pickle", data)


def test_a_file_that_is_cut_anywhere_is_refused_in_one_line(tmp_path):
    data = pickle.dumps(quantizers(1))
    for length in range(0, len(data), 41):
        with pytest.raises(UserError) as refused:
            read_quantizers_of(tmp_path / "q.pickle", data[:length])
        assert "\n" not in str(refused.value)


def changed(**parts: Any) -> dict[str, tuple[Any, ...]]:
    content = quantizers()
    entry = content[NAME.format(1, "k")]
    content[NAME.format(1, "k")] = parts["entry"](*entry)
    return content


@every(("content", "message"), [
    ([], "holds no table of modules"),
    ({}, "holds no table of modules"),
    ({3: ()}, "lacks model.layers.0.self_attn.k_proj"),
    (quantizers(1) | {3: (), "x\ny": ()}, "lacks model.layers.1.self_attn.k_proj"),
    ({n: x for n, x in quantizers().items() if "1.self_attn.v" not in n}, r"lacks model\.layers\.1\.self_attn\.v_proj"),
    ({n.replace("1", "2"): x for n, x in quantizers().items()}, r"lacks model\.layers\.1\.self_attn\.k_proj"),
    (quantizers(bits=5), "has 32 levels; 4, 8 or 16"),
    (changed(entry=lambda high, low, levels: (high, low)), "has 2 parts, not thresholds and levels"),
    (changed(entry=lambda high, low, levels: "x"), "has a str, not thresholds"),
    (changed(entry=lambda high, low, levels: (low, high, levels)), "do not lie below"),
    (changed(entry=lambda high, low, levels: (high[:, :3], low, levels)), "do not lie below"),
    (changed(entry=lambda high, low, levels: (high, low, [levels[0] * np.nan])), "levels are not finite"),
    (changed(entry=lambda high, low, levels: (high, None, levels)), "thresholds are no numbers but a NoneType"),
    (changed(entry=lambda high, low, levels: (high, 10**400, levels)), "thresholds are no numbers"),
    (changed(entry=lambda high, low, levels: (torch.zeros(1).expand(10**13), low, levels)), "are 10{13} numbers"),
    (changed(entry=lambda high, low, levels: (high, low, [])), "levels are no numbers but a list"),
    (changed(entry=lambda high, low, levels: (high, low, levels, high, low)), "more than a scale and an offset"),
    (changed(entry=lambda high, low, levels: (high, low, [np.array(["a", "b"])])), "numbers of the type 'U1'"),
])  # fmt: skip
def test_what_is_no_quantizer_file_is_refused_with_what_is_wrong(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_quantizers(written(tmp_path / "q.pickle", content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"the quantizer file .*none\.pickle is missing"):
        read_quantizers(tmp_path / "none.pickle")
