"""Reload an export with the library that it is for, in a fresh process, and compare its logits with ours.

Simulated quantization that looks fine and packed weights that are wrong are the classic failure of exports, so nothing
of this project takes part in the reading. Both sides compute in float32 on the CPU, on the same random tokens, without
a prefix.
"""

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from corpora.errors import UserError
from quantization.export.writer import Export, Format
from quantization.runs.checkpoint import load_quantized

__all__ = ["Comparison", "VerificationFailed", "check_reader", "verify"]

READER = Path(__file__).with_name("reader.py")
ROWS, LENGTH = 2, 32
MISSING = 3  # the reader's exit code for packages that are not there


class VerificationFailed(Exception):
    """The export does not open, or computes something else."""


@dataclass(frozen=True)
class Comparison:
    """largest: max |Δ| of a logit. relative: ‖Δ‖ / ‖logits‖, which must not exceed `tolerance`. reader: what read it,
    with versions."""

    largest: float
    relative: float
    tolerance: float
    reader: str


def check_reader(kind: Format, python: str) -> None:
    """Raise UserError unless the interpreter `python` has the packages that the format needs."""
    _run_reader(kind, python)


def _run_reader(kind: Format, python: str, *files: Path) -> None:
    command = [python, "-P", str(READER), ",".join(kind.packages), *map(str, files)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(
            f"--verify-python {python} cannot be started ({error.strerror}); name a Python 3.11 or newer, or leave it "
            "out"
        ) from None
    if done.returncode == MISSING:
        names = done.stdout.split()
        raise UserError(
            f"--verify needs {' and '.join(names)}, which {python} does not have; pip install {' '.join(names)} there, "
            "or name an interpreter that has it: --verify-python PATH"
        )
    if done.returncode != 0:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise VerificationFailed(f"{python} cannot open {files[0] if files else READER}: {last.strip()}")


@torch.no_grad()
def verify(source: Path, export: Export, python: str) -> Comparison:
    """Compare an export with the checkpoint that it was made from. Raises VerificationFailed beyond the tolerance."""
    kind = export.format
    with tempfile.TemporaryDirectory() as scratch:
        tokens, out = Path(scratch) / "tokens.safetensors", Path(scratch) / "logits.safetensors"
        model = load_quantized(source, dtype=torch.float32)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
        save_file({"ids": ids}, tokens)
        logits = _as_exported(model, export)(input_ids=ids, use_cache=False).logits
        del model  # before another process holds as much
        _run_reader(kind, python, export.directory, tokens, out)
        with safe_open(out, framework="pt") as file:
            theirs: Tensor = file.get_tensor("logits")
            about = json.loads(file.metadata()["reader"])
    difference = theirs - logits
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    found = Comparison(
        float(difference.abs().max()),
        float(difference.norm() / logits.norm()),
        kind.tolerance,
        f"{'+'.join(about['linears'])}, {versions}",
    )
    if not found.relative <= found.tolerance:
        raise VerificationFailed(
            f"{export.directory} computes other logits than {source}: relative difference {found.relative:.1e}, "
            f"allowed {found.tolerance:.0e}, largest {found.largest:.3g} ({found.reader}); do not use it"
        )
    return found


def _as_exported(model: torch.nn.Module, export: Export) -> torch.nn.Module:
    """Round what the export keeps in a narrower dtype, so that only packing and reading are compared."""
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in export.schemes:
            parameter.data = parameter.data.to(export.dtype).float()
    return model
