"""What this machine has of what programs need: packages, GPUs and their driver, memory, places to write, a cluster.

Nothing is made, fetched or changed.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

from corpora.paths import CHECKOUT, modelzoo_dir, outputs_dir, root
from corpora.writing import refuse_unwritable

__all__ = ["DRIVERS", "Finding", "driver", "gigabytes", "machine", "memory", "space"]

Verdict = Literal["ok", "warning", "lacks"]

# The oldest driver of NVIDIA that runs programs built for a CUDA release, by its first number:
# docs.nvidia.com/deploy/cuda-compatibility, "Minor Version Compatibility", Table 1.
DRIVERS = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True)
class Finding:
    """One thing that is needed. verdict: `warning` is for what only slows down, or what may be meant so."""

    what: str
    needed: str
    found: str
    verdict: Verdict = "ok"
    way_out: str = ""


def gigabytes(size: float) -> str:
    """Bytes, for a reader."""
    return f"{size / 1e9:,.1f} GB"


def machine(device: str = "auto") -> list[Finding]:
    """The computer: Python, packages, GPUs and their driver, memory, places to write, a cluster. device: where it shall
    compute, as --device spells it."""
    return [_python(), _packages(), *_gpu(device), *_places(), _hub(), _cluster()]


def _python() -> Finding:
    """Another Python than setup.sh takes does not come so far."""
    return Finding("Python", "3.11 or newer", platform.python_version())


def _packages() -> Finding:
    """Every package of requirements.txt, beside its pin."""
    pins = re.findall(r"^([\w-]+)==(\S+)", (CHECKOUT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    missing, others = [], []
    for name, pin in pins:
        try:
            found = version(name)
        except PackageNotFoundError:
            missing.append(name)
        else:
            others += [] if found.partition("+")[0] == pin else [f"{name} {found} (pinned {pin})"]
    needed, setup = f"the {len(pins)} of requirements.txt", "bash scripts/setup.sh"
    if missing:
        return Finding("packages", needed, f"not installed: {', '.join(missing)}", "lacks", setup)
    if others:
        return Finding("packages", needed, ", ".join(others), "warning", f"for the pinned ones: {setup}")
    return Finding("packages", needed, "all as pinned")


def _gpu(device: str) -> Iterator[Finding]:
    """The GPU, its driver beside what torch was built for, and Triton."""
    if device == "cpu":
        yield Finding("GPU", "none, as --device cpu says", "not looked for")
        return
    import torch

    asked = device.startswith("cuda")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    one = driver(torch.version.cuda, _driver_version(), asked)
    if gpus and one.verdict != "ok":  # it was not asked, or is newer than our table
        one = replace(one, found=f"{one.found}, but GPUs answer", verdict="ok", way_out="")
    yield one
    if gpus:
        told = ", ".join(f"{gpu.name} ({gigabytes(gpu.total_memory)})" for gpu in gpus)
        index = int(device.rpartition(":")[2]) if device[5:].isdigit() else 0
        if index < len(gpus):
            yield Finding("GPU", "all" if device == "cuda:all" else f"number {index}", told)
        else:
            yield Finding("GPU", f"number {index}", told, "lacks", f"--device cuda:0 to cuda:{len(gpus) - 1}")
        there = find_spec("triton") is not None
        yield Finding(
            "Triton", "for kernels of packed weights and caches", version("triton") if there else "not installed",
            "ok" if there else "warning", "" if there else "slower products run; install triton",
        )  # fmt: skip
    else:
        yield Finding(
            "GPU", "one for published sizes", "none", "lacks" if asked else "warning",
            "the CPU computes: choose small models and --limit, or run where a GPU is",
        )  # fmt: skip


def driver(built: str | None, found: str | None, asked: bool) -> Finding:
    """The driver beside the CUDA release that torch was built for. built: torch.version.cuda; found: the driver's
    version, None without one; asked: a GPU must be used."""
    lacks: Verdict = "lacks" if asked else "warning"
    if built is None:
        way_out = "without one the CPU computes; for a GPU, install torch's CUDA wheel: bash scripts/setup.sh"
        return Finding("torch for CUDA", "a build for CUDA", "a build for CPUs", lacks, way_out)
    release = int(built.partition(".")[0])
    least = DRIVERS.get(release)
    needed = f"{least or '?'} or newer, for torch's CUDA {built}"
    if found is None:
        return Finding("NVIDIA driver", needed, "none (no nvidia-smi)", lacks, "without one the CPU computes")
    number = re.match(r"\d+", found)
    if least is None or number is None:
        return Finding("NVIDIA driver", needed, found, "warning", "this CUDA release is not in our table: see NVIDIA's")
    if int(number[0]) >= least:
        return Finding("NVIDIA driver", needed, found)
    older = max((cuda for cuda, oldest in DRIVERS.items() if oldest <= int(number[0])), default=None)
    way_out = f"update the driver to {least}"
    if older is not None:
        way_out += f", or install a torch that was built for CUDA {older}: download.pytorch.org/whl"
    return Finding("NVIDIA driver", needed, found, "lacks", way_out)


def _driver_version() -> str | None:
    """What nvidia-smi says; None where there is none, or no GPU that it can talk to."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip().partition("\n")[0] or None


def _places() -> Iterator[Finding]:
    """Where results and checkpoints are written."""
    for place in (outputs_dir(), modelzoo_dir()):
        try:
            refuse_unwritable(place)
        except OSError as error:
            way_out = "make it writable, or name another place by INTACTKV_ROOT"
            yield Finding(f"{place.name}/", "can be written", error.strerror or str(error), "lacks", way_out)
        else:
            yield Finding(f"{place.name}/", "can be written", str(place))


def _hub() -> Finding:
    word = os.environ.get("HF_HUB_OFFLINE", "")
    if word:
        return Finding("HF_HUB_OFFLINE", "set where there is no network", word)
    way_out = "export HF_HUB_OFFLINE=1 where the hub cannot be reached, or libraries wait for it"
    return Finding("HF_HUB_OFFLINE", "set where there is no network", "not set", "warning", way_out)


def _cluster() -> Finding:
    """Slurm's commands and this site's settings, which only `eval cluster` needs."""
    sbatch, site = shutil.which("sbatch"), root() / "cluster.env"
    needed = "sbatch and cluster.env, for eval cluster alone"
    found = f"{sbatch or 'no sbatch'}, {'' if site.is_file() else 'no '}cluster.env"
    if sbatch is None:
        return Finding("Slurm", needed, found)
    way_out = "" if site.is_file() else "write cluster.env: docs/reproduce.md, Cluster"
    return Finding("Slurm", needed, found, "warning" if way_out else "ok", way_out)


def memory(needed: float, what: str, device: str) -> Finding:
    """Memory that a computation takes at most, beside what the device has. device: cpu, cuda or cuda:N."""
    import torch

    if device == "cpu":
        name, has = "main memory", float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    elif torch.cuda.device_count() > (torch.device(device).index or 0):
        name, has = "GPU memory", float(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    else:
        return Finding("GPU memory", f"about {gigabytes(needed)} ({what})", "no GPU to ask", "warning",
                       "ask again where it will run, or compare with your card")  # fmt: skip
    asked = f"about {gigabytes(needed)} ({what})"
    if needed <= has:
        return Finding(name, asked, gigabytes(has))
    way_out = (
        "--device cuda:all spreads a model that runs; else a larger card" if device != "cpu" else "a smaller model"
    )
    return Finding(name, asked, gigabytes(has), "lacks", way_out)


def space(needed: float) -> Finding:
    """Free disk where checkpoints and records are written, beside what they will take."""
    has = shutil.disk_usage(root()).free
    asked = f"about {gigabytes(needed)}" if needed else "for checkpoints and records"
    if needed <= has:
        return Finding("free disk", asked, f"{gigabytes(has)} at {root()}")
    way_out = "free some, or name another place by INTACTKV_ROOT"
    return Finding("free disk", asked, f"{gigabytes(has)} at {root()}", "lacks", way_out)
