"""Files that are never half written, and identities that leave nothing out.

Every artefact of the project (token cache, prefix, quantized checkpoint, run record) is written beside its final name
and renamed, and is found again by `identity`: a hash of everything that made it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from corpora.errors import UserError

__all__ = [
    "checkpoint_fingerprint",
    "identity",
    "read_json",
    "sha256_of_file",
    "sha256_of_tensor",
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


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with write_beside(path) as beside:
        beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file that is expected to be whole. Raises UserError, naming `what` it should have been."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} {path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} is not readable JSON ({error}); delete the file and make it again") from None


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, atomically. Tensors are moved to the CPU and made contiguous.

    Raises OSError when the disk refuses (full, read-only), with the file's name.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with write_beside(path) as beside:
        try:
            save_file(plain, beside, metadata=dict(metadata) if metadata else None)
            beside.chmod(0o644)  # safetensors writes for the owner alone; colleagues on a cluster read these files
        except SafetensorError as error:  # safetensors wraps the system's error in its own class
            raise OSError(None, f"cannot write: {error}", str(path)) from None


def identity(made_of: Mapping[str, Any], digits: int = 8) -> str:
    """Hash of all that made an artefact: the first hexadecimal digits of the SHA-256 of its canonical JSON."""
    canonical = json.dumps(made_of, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:digits]


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_fingerprint(directory: Path) -> str:
    """Identity of a dense checkpoint's content, whatever the directory is called: 16 hexadecimal digits.

    Covers the configuration and, for every tensor of its safetensors files, the name, shape, dtype and up to 4 KiB of
    values spread over the tensor: two training runs differ in every tensor, and a 70B checkpoint is read in a second.
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
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{directory} holds no *.safetensors file; convert the checkpoint with save_pretrained, or "
            "fetch it in safetensors format"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in sorted(tensors.keys()):
                    view = tensors.get_slice(name)
                    shape = view.get_shape()
                    digest.update(f"{name}{shape}{view.get_dtype()}".encode())
                    digest.update(_sample(view, shape).contiguous().view(torch.uint8).numpy().tobytes())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is truncated or not a safetensors file ({error}); fetch or prepare it again"
            ) from None
    return digest.hexdigest()[:16]


def _sample(view: Any, shape: list[int]) -> torch.Tensor:
    """Up to 1024 values from 8 rows spread over a tensor, read without loading the rest."""
    if not shape:
        return view[:].reshape(1)
    rows = torch.linspace(0, shape[0] - 1, min(8, shape[0])).long().tolist()
    return torch.cat([view[row : row + 1].flatten()[:128] for row in rows])


def sha256_of_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's shape, dtype and values, in hexadecimal."""
    plain = tensor.detach().cpu().contiguous()
    head = f"{tuple(plain.shape)}{plain.dtype}".encode()
    return hashlib.sha256(head + plain.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
