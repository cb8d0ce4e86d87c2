"""What both peer runners share: options, calibration segments, peak memory, and the result as a dense checkpoint.

Runs inside a peer's environment, whose torch and transformers are not ours: only torch, safetensors and the standard
library are imported, and nothing of this project.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

DAMP = 0.01  # of the mean of the Hessian's diagonal; GPTQ (2210.17323), step 3
RESULT = "peer.json"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; a look-up would only cost time


def runner_options(description: str) -> argparse.Namespace:
    """The command line of a runner."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="dense Hugging Face checkpoint")
    parser.add_argument(
        "--segments", type=Path, required=True, metavar="FILE", help='safetensors file, tensor "segments" (N, T) int64'
    )
    parser.add_argument("--method", choices=["gptq", "awq"], required=True)
    parser.add_argument("--bits", type=int, required=True, metavar="B")
    parser.add_argument(
        "--group-size", type=int, required=True, metavar="G", help="input channels per scale, -1: a row"
    )
    parser.add_argument("--symmetric", action="store_true", help="no zero points")
    parser.add_argument(
        "--act-order",
        choices=["none", "static"],
        default="none",
        help="gptq: columns by falling activation, with groups of neighbours fitted before (default: none)",
    )
    parser.add_argument(
        "--true-sequential", action="store_true", help="gptq: calibrate q/k/v, o, gate/up, down in turn"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="segments per forward pass (default: 1)")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of the computation (default: float32)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the dense checkpoint goes")
    options = parser.parse_args()
    for path in ("model", "segments", "out"):
        setattr(options, path, getattr(options, path).resolve())
    return options


def read_segments(file: Path) -> Tensor:
    """Calibration segments, (N, T) int64: token ids as they are fed."""
    return load_file(file)["segments"]


def device_name() -> str:
    """Where the peers compute: the first GPU if there is one, as in our own programs."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def peak_memory_mb() -> float:
    """Peak memory of this process so far in MB, measured as `corpora.machine` does: resident memory, or GPU memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes * 1024 / 1e6


def write_result(
    options: argparse.Namespace,
    parameters: dict[str, Tensor],
    *,
    name: str,
    packages: tuple[str, ...],
    seconds: float,
    peak_mb: float,
    settings: dict[str, Any],
) -> None:
    """Write the dense checkpoint and `peer.json`.

    parameters: of the quantized model, real values under the names of the source checkpoint. Whatever the source
    stores is written, in the source's dtypes. Raises ValueError if one is missing or has another shape.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for file in sorted(options.model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as source:
            for key in source.keys():  # noqa: SIM118 (not a mapping)
                original = source.get_tensor(key)
                if key not in parameters or parameters[key].shape != original.shape:
                    found = tuple(parameters[key].shape) if key in parameters else "nothing"
                    raise ValueError(f"{name} left {found} for {key}, which has shape {tuple(original.shape)}")
                tensors[key] = parameters[key].detach().to("cpu", original.dtype).contiguous()
    save_file(tensors, options.out / "model.safetensors", {"format": "pt"})
    for file in options.model.iterdir():
        companion = file.suffix in (".json", ".txt", ".model", ".jinja") and "index" not in file.name
        if file.is_file() and companion and file.name != "prepared.json":
            shutil.copyfile(file, options.out / file.name)
    result = {
        "name": name,
        "versions": {package: version(package) for package in ("torch", "transformers", *packages)}
        | {"python": platform.python_version()},
        "seconds": round(seconds, 2),
        "peak_memory_mb": round(peak_mb),
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "method": options.method,
        "settings": settings,
    }
    (options.out / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{name} {options.method}  {seconds:.1f} s  {peak_mb:.0f} MB  {options.out}")
