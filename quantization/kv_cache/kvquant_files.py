"""Quantizer files of KVQuant's own code: pickles, read without running what they hold.

    {path of the linear of keys, or of values: (upper, lower, [levels (2^b, 1)], scale, offset), …}

upper, lower: thresholds of a key's channels, (1, C); for values leftovers of the calibration, which nobody reads.
scale, offset: of Q-Norm, if it was on. Levels are not sorted there.

A pickle is a program. This one may build dictionaries, lists, numbers, arrays of NumPy and tensors of torch. Everything
else is refused by its name. NumPy's arrays are built here from their bytes, tensors by `torch.load(weights_only=True)`.
"""

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corpora.errors import UserError, built
from corpora.files import plain_file
from intactkv.families.llama import LLAMA

__all__ = ["read_quantizers"]

MOST = 2**20  # channels of a layer
WAY_OUT = "give a file that KVQuant's quantization step wrote, or calibrate here"


def read_quantizers(file: Path) -> list[dict[str, Tensor]]:
    """The tensors of every layer, as `KVQuant.fit_block` names them, float32.

    Raises UserError if the file is missing, damaged, holds anything but arrays, or no levels of 2 to 4 bits for the
    keys and values of every layer.
    """
    plain_file(file, "the quantizer file")
    with built(f"the quantizer file {file} is damaged or holds more than arrays", WAY_OUT), file.open("rb") as stream:
        content = _Arrays(stream).load()
    if not isinstance(content, dict) or not content:
        raise UserError(f"the quantizer file {file} holds no table of modules; {WAY_OUT}")
    layers: list[dict[str, Tensor]] = []
    for layer in range((len(content) + 1) // 2):
        layers.append({})
        for side, linear in (("keys", LLAMA.rope_key), ("values", LLAMA.value)):
            name = f"{LLAMA.block_name(layer)}.{linear}"
            if name not in content:
                raise UserError(f"the quantizer file {file} lacks {name}; {WAY_OUT}")
            layers[-1] |= _tensors(content[name], side, f"the quantizer file {file}, {name}:")
    return layers


def _tensors(entry: Any, side: str, where: str) -> dict[str, Tensor]:
    if not isinstance(entry, (tuple, list)) or len(entry) not in (3, 5):
        held = f"{len(entry)} parts" if isinstance(entry, (tuple, list)) else f"a {type(entry).__name__}"
        raise UserError(f"{where} has {held}, not thresholds and levels (made without nuq?); {WAY_OUT}")
    levels = entry[2][0] if isinstance(entry[2], (tuple, list)) and entry[2] else entry[2]
    tensors = {f"{side}_levels": _vector(levels, f"{where} levels").sort().values}
    count = len(tensors[f"{side}_levels"])
    if count not in (4, 8, 16):
        raise UserError(f"{where} has {count} levels; 4, 8 or 16 (2 to 4 bits) are read; {WAY_OUT}")
    if side == "keys":
        high, low = (_vector(entry[i], f"{where} thresholds") for i in (0, 1))
        if high.shape != low.shape or not bool((low <= high).all()):
            raise UserError(f"{where} has lower thresholds that do not lie below the upper ones; {WAY_OUT}")
        tensors |= {"keys_low": low, "keys_high": high}
    if len(entry) == 5:
        tensors[f"{side}_qnorm"] = torch.cat([_vector(part, f"{where} Q-Norm") for part in entry[3:]])
        if len(tensors[f"{side}_qnorm"]) != 2:
            raise UserError(f"{where} has more than a scale and an offset of Q-Norm; {WAY_OUT}")
    return tensors


def _vector(value: Any, where: str) -> Tensor:
    """A finite float32 vector. Raises UserError for anything else."""
    if isinstance(value, _Array):
        value = value.content
    if isinstance(value, (np.ndarray, np.generic, float, int)):
        with built(f"{where} are no numbers", WAY_OUT):
            value = torch.tensor(np.array(value, dtype=np.float64))
    if not isinstance(value, Tensor):
        raise UserError(f"{where} are no numbers but a {type(value).__name__}; {WAY_OUT}")
    if not 0 < value.numel() <= MOST:  # a view of one number may claim any shape
        raise UserError(f"{where} are {value.numel()} numbers, and 1 to {MOST} are read; {WAY_OUT}")
    vector = value.detach().float().flatten().clone()
    if not torch.isfinite(vector).all():
        raise UserError(f"{where} are not finite; {WAY_OUT}")
    return vector


# What a pickle may ask for -------------------------------------------------------------------------------------------


class _Type:
    """A number type that a pickle names: its order of bytes comes later, as state."""

    def __init__(self, name: str, *_: Any) -> None:
        if not re.fullmatch(r"[fiu][1248]", name):
            raise pickle.UnpicklingError(f"it holds numbers of the type {name[:20]!r}")
        self.name, self.order = name, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = {">": ">"}.get(state[1], "<")

    def read(self, data: bytes) -> "np.ndarray[Any, Any]":
        return np.frombuffer(data, np.dtype(self.order + self.name))


class _Array:
    """An array that a pickle builds: shape and bytes come later, as state."""

    content: "np.ndarray[Any, Any] | None" = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, kind, in_columns, data = state
        self.content = _Type.read(kind, data).reshape(shape, order="F" if in_columns else "C")


def _of_buffer(data: bytes, kind: _Type, shape: tuple[int, ...], order: str) -> "np.ndarray[Any, Any]":
    return kind.read(bytes(data)).reshape(shape, order="F" if order == "F" else "C")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes bytes as {encoding[:20]!r}")
    return text.encode("latin1")


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


_NUMPY: dict[tuple[str, str], Callable[..., Any]] = {
    ("multiarray", "_reconstruct"): lambda *_: _Array(),
    ("multiarray", "scalar"): lambda kind, data: kind.read(data)[0],
    ("numeric", "_frombuffer"): _of_buffer,
}
_ALLOWED: Mapping[tuple[str, str], Any] = {
    **{(f"numpy.{core}.{part}", name): make for (part, name), make in _NUMPY.items() for core in ("core", "_core")},
    ("numpy", "ndarray"): None,  # only an argument of `_reconstruct`
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,  # as `weights_only` allows it
}


class _Arrays(pickle.Unpickler):
    """An unpickler that knows the table above and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module[:60]}.{name[:60]}, which makes no array")
        return _ALLOWED[module, name]
