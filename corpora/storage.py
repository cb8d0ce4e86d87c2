"""Tensors on disk at one boundary, and identities that leave nothing out.

An artefact of the project (token cache, prefix, block of a checkpoint, training state) is a safetensors file whose one
entry of metadata holds a header of its own and the sum of all that the file says; who reads it compares them. Artefacts
are found again by `identity`: a hash of everything that made them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError, said_by
from corpora.files import plain_file, version_of
from corpora.json_files import SUM, FileName, fitted, identity, parse_json, read_json
from corpora.writing import write_beside

__all__ = [
    "MEND",
    "checkpoint_fingerprint",
    "disk_errors",
    "identity",
    "indexed_files",
    "is_finite",
    "open_tensors",
    "read_artefact",
    "sha256_of_tensor",
    "weight_files",
    "write_artefact",
    "write_tensors",
]


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


def write_artefact(path: Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one of our own safetensors files, atomically: tensors, and a header that ends with the sum of both.

    kind: the name of the metadata's entry (safetensors writes several in an order that changes from run to run). Raises
    as `write_tensors`.
    """
    summed = {**header, SUM: _sum_of(header, tensors)}
    write_tensors(path, tensors, {kind: json.dumps(summed, sort_keys=True)})


def read_artefact(
    path: Path, kind: str, form: Any, what: str, way_out: str, *, finite: bool = True, summed: bool = False
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The header, without its sum, and all tensors of a file that `write_artefact` wrote.

    form: of the header (`corpora.json_files`). what, way_out: what it should have been and how it is made again, for
    messages. finite: whether NaN and infinity are refused. summed: whether all files of the kind have a sum; of others
    those of before had none and are compared with none.
    Raises UserError if the file is missing, truncated, of another kind, of another form, or changed since it was
    written.
    """
    with open_tensors(path, what, way_out) as file:
        metadata = file.metadata() or {}
        if kind not in metadata:
            raise UserError(f"{what} {path} is another kind of file (it has no entry {kind!r}); {way_out}")
        header = parse_json(metadata[kind], f"the header of {what} {path}", dict, mend=way_out)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    found = header.pop(SUM, None)
    if found != _sum_of(header, tensors) and (summed or found is not None):
        raise UserError(f"{what} {path} has changed since it was written (its sum is another); {way_out}")
    fitted(header, form, f"the header of {what} {path}", mend=way_out)
    for name, tensor in tensors.items():
        if finite and not is_finite(tensor):
            raise UserError(f"{what} {path}: its tensor {name!r} holds values that are not finite; {way_out}")
    return header, tensors


def _sum_of(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a header and of the names, shapes, dtypes and values of tensors."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {sha256_of_tensor(tensors[name])}".encode())
    return digest.hexdigest()


MEND = "mend it, or fetch the checkpoint again"


class _Index(TypedDict):
    weight_map: dict[str, FileName]  # the file of every tensor, beside the index


def indexed_files(index: Path) -> dict[str, Path]:
    """The file of every tensor, as a checkpoint's index names it. Raises UserError if the index is damaged."""
    names = read_json(index, "the index of the checkpoint", _Index, mend=MEND)["weight_map"]
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
    with open_tensors(file) as tensors:
        return "intactkv" in (tensors.metadata() or {})


@contextmanager
def open_tensors(file: Path, what: str = "", way_out: str = "fetch or prepare it again") -> Iterator[Any]:
    """A safetensors file, open for reading. what, way_out: as in `read_artefact`.

    Raises UserError if it is missing, no plain file, or truncated, also for what is found while the caller reads;
    OSError where the system does not let it be read.
    """
    name = f"{what} {file}" if what else str(file)
    with plain_file(file, what).open("rb"):  # a missing permission is no damage
        pass
    try:
        with ExitStack() as opened:
            try:
                tensors = opened.enter_context(safe_open(file, framework="pt"))
            except OSError as error:  # those of the caller's own work are not this file's
                raise SafetensorError(said_by(error)) from None
            yield tensors
    except SafetensorError as error:
        raise UserError(f"{name} is truncated or not a safetensors file ({said_by(error)}); {way_out}") from None


def checkpoint_fingerprint(directory: Path, stored: str | None = None) -> str:
    """Identity of a dense checkpoint's content, whatever the directory is called: 16 hexadecimal digits.

    Covers the configuration and, for every tensor of its `weight_files`, the name, shape and dtype, and of the values:
    all of a tensor up to 64 KiB; of a matrix with a row for every token (embeddings, head) 16 values of every row; of
    any other 64 values of each of 32 rows, spread over rows and columns. Two training runs differ in every tensor, and
    an edited token is seen; but an edit of a few single values of a large matrix can escape. Which tensors share a file
    counts, too: the same weights in other shards have another identity.
    stored: what an artefact names. It is the answer where it is what earlier versions, which took a smaller sample,
    called this content.
    A process that asks again reads the files again only if they changed.
    Raises UserError if a file is missing, truncated or not safetensors.
    """
    plain_file(directory / "config.json", "the model configuration")
    files = (directory / "config.json", *weight_files(directory))
    versions = tuple((file, version_of(file)) for file in files)
    found = _fingerprint(versions)
    if stored is not None and stored != found and stored == _fingerprint(versions, earlier=True):
        return stored
    return found


@lru_cache(maxsize=64)
def _fingerprint(versions: tuple[tuple[Path, tuple[int, ...]], ...], earlier: bool = False) -> str:
    """The fingerprint of a configuration and weight files, or the one that earlier versions took."""
    (file, _), *weights = versions
    config: dict[str, Any] = read_json(file, "the model configuration", dict, mend=MEND)
    vocabularies = set(_vocabularies(config))
    digest = hashlib.sha256()
    # Which library version wrote the file, and under which path it was loaded, does not change the function.
    digest.update(
        identity({k: v for k, v in config.items() if k not in ("transformers_version", "_name_or_path")}, 64).encode()
    )
    for file, _ in weights:
        with open_tensors(file) as tensors:
            for name in sorted(tensors.keys()):
                view = tensors.get_slice(name)
                digest.update(f"{name}{view.get_shape()}{view.get_dtype()}".encode())
                tensor = tensors.get_tensor(name)  # of the mapped file: only what is looked at
                values = (_earlier_sample(tensor) if earlier else _sample(tensor, vocabularies)).contiguous()
                digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


SMALL = 1 << 16  # bytes


def _sample(tensor: torch.Tensor, vocabularies: set[int]) -> torch.Tensor:
    """The values of a tensor that its fingerprint covers. vocabularies: the numbers of tokens."""
    if tensor.nbytes <= SMALL or tensor.ndim < 2:
        return tensor
    rows = tensor.flatten(0, -2)
    if len(rows) in vocabularies:
        return rows[:, _spread(rows.shape[1], 16)]
    return rows[_spread(len(rows), 32)][:, _spread(rows.shape[1], 64)]


def _spread(size: int, count: int) -> torch.Tensor:
    """Up to `count` places from the first to the last of `size`."""
    return torch.linspace(0, size - 1, min(count, size)).long().unique()


def _vocabularies(config: Mapping[str, Any]) -> Iterator[Any]:
    for name, value in config.items():
        if name == "vocab_size" and isinstance(value, int):
            yield value
        elif isinstance(value, dict):
            yield from _vocabularies(value)


def _earlier_sample(tensor: torch.Tensor) -> torch.Tensor:
    """What fingerprints covered before: up to 128 values from each of at most 16 rows."""
    shape = tensor.shape
    if not shape or 0 in shape:
        return tensor.flatten()
    rows = set(torch.linspace(0, shape[0] - 1, min(8, shape[0])).long().tolist())
    if len(shape) == 2:
        rows.update(range(min(8, shape[0])))
    return torch.cat([tensor[row].flatten()[:128] for row in sorted(rows)])


def sha256_of_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's shape, dtype and values, in hexadecimal."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(plain.shape)}{plain.dtype}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().data)  # without a copy: a block may be large
    return digest.hexdigest()
