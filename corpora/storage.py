"""Files that are never half written, and identities that leave nothing out.

Every artefact of the project (token cache, prefix, quantized checkpoint, run record) is written beside its final name
and renamed, and is found again by `identity`: a hash of everything that made it.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from corpora.errors import UserError

__all__ = [
    "checkpoint_fingerprint",
    "directory_beside",
    "disk_errors",
    "identity",
    "indexed_files",
    "is_finite",
    "not_finite",
    "read_json",
    "sha256_of_file",
    "sha256_of_tensor",
    "weight_files",
    "write_beside",
    "write_json",
    "write_tensors",
]


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` on success, delete it on any failure.

    The name holds the process id, so two processes that write the same artefact do not meet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def directory_beside(directory: Path) -> Iterator[Path]:
    """The same for a new directory: it has its name only when it is whole."""
    beside = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    beside.mkdir(parents=True)
    try:
        yield beside
        beside.rename(directory)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises UserError for a number that JSON has no word for."""
    if found := not_finite(value):
        raise UserError(f"{path} is not written, because it would hold {found}; what made it has no result")
    with write_beside(path) as beside:
        beside.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def not_finite(value: Any) -> str | None:
    """The first NaN or infinite number within lists and dictionaries, as "its.place = nan"; None if there is none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else f"= {value}"
    members: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        members = value.items()
    elif isinstance(value, (list, tuple)):
        members = enumerate(value)
    for name, member in members:
        if found := not_finite(member):
            return f"{name} {found}" if found.startswith("=") else f"{name}.{found}"
    return None


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file that is expected to be whole. Raises UserError, naming `what` it should have been."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} {path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} is not readable JSON ({error}); delete the file and make it again") from None


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what safetensors raises when the disk refuses (full, read-only) into an OSError with the name of `path`."""
    try:
        yield
    except SafetensorError as error:  # the system's error, wrapped in a class of its own
        raise OSError(None, f"cannot write: {error}", str(path)) from None


def is_finite(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a tensor, cast to a dtype, holds neither NaN nor infinity. One pass, and no copy of it."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # NaN is the lowest and the highest of what holds one; 8-bit floats have no order in torch.
    low, high = torch.aminmax(tensor.detach() if tensor.element_size() > 1 else tensor.detach().half())
    return bool(torch.isfinite(torch.stack([low, high]).to(dtype)).all())


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, as_is: bool = False
) -> None:
    """Write a safetensors file, atomically. Tensors are moved to the CPU and made contiguous.

    as_is: write NaN and infinity, too: a copy of what others wrote is checked where it is read.
    Raises OSError when the disk refuses (full, read-only), with the file's name, and UserError, with the tensor's, for
    values that are not finite.
    """
    for name, tensor in tensors.items():
        if not (as_is or is_finite(tensor)):
            raise UserError(
                f"{path.name} is not written: its tensor {name!r} holds values that are not finite; what it was "
                "computed from is damaged, or the dtype too narrow: use bfloat16 or float32"
            )
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with write_beside(path) as beside, disk_errors(path):
        save_file(plain, beside, metadata=dict(metadata) if metadata else None)
        beside.chmod(0o644)  # safetensors writes for the owner alone; colleagues on a cluster read these files


def identity(made_of: Mapping[str, Any], digits: int = 8) -> str:
    """Hash of all that made an artefact: the first hexadecimal digits of the SHA-256 of its canonical JSON."""
    canonical = json.dumps(made_of, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:digits]


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def indexed_files(index: Path) -> dict[str, Path]:
    """The file of every tensor, as a checkpoint's index names it. Raises UserError if the index is damaged."""
    content = read_json(index, "the index of the checkpoint")
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} has no weight_map from tensors to files; fetch the checkpoint again")
    return {tensor: index.parent / name for tensor, name in names.items()}


INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold a dense checkpoint's weights, and no others that lie beside them.

    Those that model.safetensors.index.json names; without an index model.safetensors; without both model*.safetensors;
    without any of these every *.safetensors that is no prefix file. Hidden files (`._*` of a Mac) never count.
    Raises UserError if there is none, if one that the index names is missing, or if model.safetensors lies beside an
    index that does not name it: every program would choose another of the two.
    """
    index = directory / INDEX
    if index.is_file():
        file_of = indexed_files(index)
        for tensor, file in file_of.items():
            if not file.is_file():
                raise UserError(
                    f"{directory} lacks the tensor {tensor!r}: its index names {file.name}, which is missing; the "
                    "checkpoint is incomplete, fetch it again"
                )
        files = sorted(set(file_of.values()))
        if files and (directory / SINGLE).is_file() and directory / SINGLE not in files:
            raise UserError(
                f"{directory} holds two sets of weights: {SINGLE}, and the files that {INDEX} names; remove the one "
                "that is not the model's"
            )
    elif (directory / SINGLE).is_file():
        files = [directory / SINGLE]
    else:
        shown = [file for file in sorted(directory.glob("*.safetensors")) if not file.name.startswith(".")]
        files = [file for file in shown if file.name.startswith("model")]
        files = files or [file for file in shown if not _is_prefix(file)]
    if not files:
        raise UserError(
            f"{directory} holds no *.safetensors file with weights; convert the checkpoint with save_pretrained, or "
            "fetch it in safetensors format"
        )
    return files


def _is_prefix(file: Path) -> bool:
    """Whether a safetensors file is one that IntactKV wrote."""
    with _reading(file), safe_open(file, framework="pt") as tensors:
        return "intactkv" in (tensors.metadata() or {})


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}); fetch or prepare it again") from None


def checkpoint_fingerprint(directory: Path) -> str:
    """Identity of a dense checkpoint's content, whatever the directory is called: 16 hexadecimal digits.

    Covers the configuration and, for every tensor of its `weight_files`, the name, shape, dtype and a sample: the first
    128 values of 8 rows spread over the tensor and, of a matrix, of its first 8 rows too, where most vocabularies have
    their special tokens. Two training runs differ in every tensor, so they never meet, and a 70B checkpoint is read in
    seconds; but an edit of a few single values can escape the sample and leaves the fingerprint as it was.
    Raises UserError if a file is missing, truncated or not safetensors.
    """
    digest = hashlib.sha256()
    config = read_json(directory / "config.json", "the model configuration")
    if not isinstance(config, dict):
        raise UserError(f"{directory / 'config.json'} is not a model configuration; fetch the checkpoint again")
    # Which library version wrote the file, and under which path it was loaded, does not change the function.
    digest.update(
        identity({k: v for k, v in config.items() if k not in ("transformers_version", "_name_or_path")}, 64).encode()
    )
    for file in weight_files(directory):
        with _reading(file), safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                view = tensors.get_slice(name)
                shape = view.get_shape()
                digest.update(f"{name}{shape}{view.get_dtype()}".encode())
                digest.update(_sample(view, shape).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(view: Any, shape: list[int]) -> torch.Tensor:
    """Up to 128 values from each of at most 16 rows of a tensor, read without loading the rest."""
    if not shape or 0 in shape:
        return view[...].flatten()
    rows = set(torch.linspace(0, shape[0] - 1, min(8, shape[0])).long().tolist())
    if len(shape) == 2:
        rows.update(range(min(8, shape[0])))
    return torch.cat([view[row : row + 1].flatten()[:128] for row in sorted(rows)])


def sha256_of_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's shape, dtype and values, in hexadecimal."""
    plain = tensor.detach().cpu().contiguous()
    head = f"{tuple(plain.shape)}{plain.dtype}".encode()
    return hashlib.sha256(head + plain.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
