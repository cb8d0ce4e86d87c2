"""Checkpoints that came as pytorch_model*.bin (Vicuna, OPT, old clones), written again as safetensors.

Everything else in the project reads safetensors: block by block, and without running what a pickle may hold. Names and
values stay as they are, one file at a time, so memory holds one shard.
"""

import logging
from pathlib import Path
from typing import Any

from corpora.errors import UserError, built
from corpora.files import plain_file
from corpora.json_files import write_json
from corpora.storage import indexed_files, write_tensors

__all__ = ["bin_files", "bin_to_safetensors"]

log = logging.getLogger(__name__)


def bin_files(directory: Path) -> list[Path]:
    """The pytorch_model*.bin files of a checkpoint, those that its index names if it has one.

    Raises UserError if the index is damaged.
    """
    index = directory / "pytorch_model.bin.index.json"
    if index.is_file():
        return sorted(set(indexed_files(index).values()))
    return sorted(directory.glob("pytorch_model.bin"))


def bin_to_safetensors(directory: Path) -> None:
    """Write model*.safetensors and its index beside the .bin files of `directory`; the .bin files stay.

    The index is written last: without it, or model.safetensors, the checkpoint does not count as present.
    Raises UserError if a file is missing, damaged, or holds anything but tensors.
    """
    import torch

    files = bin_files(directory)
    weight_map: dict[str, str] = {}
    size = 0
    for number, file in enumerate(files, start=1):
        single = len(files) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        plain_file(file, "the checkpoint's file")
        with built(f"{file} is damaged or holds more than tensors", "fetch it again"):
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and _is_plain(t) for name, t in tensors.items()
        ):
            raise UserError(f"{file} is no table of plain tensors; give the checkpoint's own pytorch_model.bin")
        # Tied weights share memory, which safetensors refuses: each gets its own copy.
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        write_tensors(directory / name, tensors, {"format": "pt"}, as_is=True)
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        log.info("%s -> %s  (%d of %d)", file.name, name, number, len(files))
    if len(files) > 1:
        write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor that safetensors can hold: no sparse, quantized or complex one, and none on meta."""
    import torch

    if not isinstance(value, torch.Tensor):
        return False
    return value.layout == torch.strided and not (value.is_quantized or value.is_meta or value.is_complex())
