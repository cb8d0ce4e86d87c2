"""What is wrong with the tensors of a dense checkpoint: of whole ones there is nothing to say here."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from corpora.errors import UserError
from corpora.storage import is_finite
from intactkv.parts import Architecture

__all__ = ["FLOATS", "check_dtype", "check_finite", "dead", "holds_zeros", "listed", "of_blocks", "warn_once"]

log = logging.getLogger(__name__)

# What dense models are stored in, by safetensors' names. Everything else is some program's quantization.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PARAMETERS = (".weight", ".bias")  # what layers call that with which they compute; other names are buffers and notes


def listed(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


@cache  # a run may look at a checkpoint several times
def warn_once(directory: Path, names: tuple[str, ...], what: str) -> None:
    """Log what a checkpoint's tensors of these names are, if there are any."""
    if names:
        log.warning("%s holds %d %s: %s", directory, len(names), what, listed(names))


def check_dtype(dtype: str, what: str) -> None:
    """Raise UserError for what is not stored as a floating point number of 16 bits or more."""
    if dtype not in FLOATS:
        raise UserError(
            f"{what} is stored as {dtype}, so it is quantized by another program; give the dense checkpoint "
            f"({', '.join(FLOATS)})"
        )


def check_finite(tensor: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """Raise UserError for NaN and infinity. dtype: what it will be cast to, where large values may become infinite."""
    if is_finite(tensor, dtype):
        return
    if dtype is not None and is_finite(tensor):
        raise UserError(
            f"{what} holds {float(tensor.abs().max()):.3g}, which is beyond {str(dtype).removeprefix('torch.')}; "
            "choose --dtype bfloat16 or float32"
        )
    raise UserError(
        f"{what} holds values that are not finite; the checkpoint is damaged, or overflowed its dtype: fetch it again, "
        "or convert it from a wider one"
    )


def of_blocks(architecture: Architecture, used: Collection[str], left: Iterable[str]) -> Iterator[str]:
    """Of stored names that are left over: weights and biases of modules within the blocks to which those in use belong.

    What hangs below a module in use (the parts of an adapter) is no parameter of a block."""
    first_in_block = re.compile(rf"(\w+\.)*?{re.escape(architecture.blocks.partition('.')[2])}\.\d+\.")
    blocks = {found[0] for found in map(first_in_block.match, used) if found}
    owners = {name.rpartition(".")[0] for name in used if name.endswith(PARAMETERS)}
    for name in left:
        found = first_in_block.match(name)
        if found and found[0] in blocks and name.endswith(PARAMETERS):
            above = list(accumulate(name.split(".")[:-2], "{}.{}".format))
            if not owners.intersection(above):
                yield name


def holds_zeros(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers, and all of them are 0. Mostly its first row tells that it does not."""
    return bool(tensor.numel()) and not (bool(tensor[:1].any()) if tensor.ndim else False) and not bool(tensor.any())


def dead(architecture: Architecture, zeros: Collection[str]) -> Iterator[str]:
    """Of parameters that hold nothing but zeros: those for which everything that is computed from them is lost.

    Downloaders that reserve the size of a file leave zeros where they were cut off. Some zeros are meant. Blocks that
    are put in to be trained (LLaMA Pro, arXiv:2401.02415) write nothing to the residual stream at first. An emptied
    expert says nothing, and a norm that multiplies by 1 + w may have w = 0.
    """
    linears = {name for names in architecture.linears for name in names}
    ends = {architecture.embeddings[0], architecture.head, architecture.final_norm}
    needed = linears | {feed.producer for feed in architecture.feeds}
    if architecture.gain_offset:
        needed, ends = needed & linears, ends - {architecture.final_norm}
    needed -= {architecture.output, *architecture.downs}
    first_in_block = re.compile(rf"{re.escape(architecture.blocks)}\.\d+\.")
    experts = Counter[str]()  # of one block and one name: all of them together are needed
    for name in sorted(zeros):
        owner, _, part = name.rpartition(".")
        inner = first_in_block.sub("", owner)
        if part != "weight" or inner not in (ends if inner == owner else needed):
            continue
        index = architecture.expert_of(inner)
        if index is not None:
            assert architecture.experts is not None
            alike = name.replace(f"{architecture.experts.of(index)}.", f"{architecture.experts.module}.*.")
            experts[alike] += 1
            if experts[alike] < architecture.experts.count:
                continue
        yield name
