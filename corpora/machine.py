"""What a figure was made with: versions, commit, machine, memory."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["commit", "device_name", "environment", "peak_memory_mb"]


def environment() -> dict[str, Any]:
    """What a figure was made with: versions, commit, machine."""
    from importlib.metadata import version

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors", "accelerate")}
    return packages | {
        "python": platform.python_version(),
        "commit": commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
    }


def commit() -> str:
    """Commit of the code, with `+changes` if the work tree differs; `unknown` outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "-C", here, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip()[:12] + ("+changes" if changes.stdout.strip() else "")


def _processor() -> str:
    """The processor's name."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Name of the GPU, or of the processor."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()


def peak_memory_mb(device_type: str) -> float:
    """Peak memory of this process so far in MB: GPU memory on a GPU, resident memory on a CPU."""
    import torch

    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes * 1024 / 1e6
