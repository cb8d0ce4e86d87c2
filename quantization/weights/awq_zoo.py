"""Files of the AWQ model zoo: the scales and clip limits of a search, without the weights.

One `torch.save` of {"scale": [(producer, (consumer, …), s of shape (channels,)), …],
                     "clip": [(linear, m of shape (out, groups, 1)), …]}, names complete from the model's root, in the
order in which they are applied. A router reads what experts read, so it is a consumer, too. Read with the safe loader
only, and compared with the model name by name and shape by shape before any work.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from corpora.errors import UserError, built
from corpora.files import plain_file
from corpora.writing import write_beside
from quantization.grids.uniform import UniformGrid
from quantization.model.blocks import DecoderBlock
from quantization.model.rescale import Rescaling

__all__ = ["ZooBlock", "read_zoo", "save_zoo"]

MADE_FOR = re.compile(r"-w(?P<bits>\d+)-g(?P<group_size>-?\d+)\.pt$")  # llama-2-7b-w3-g128.pt

ScaleEntry = tuple[str, tuple[str, ...], Tensor]
ClipEntry = tuple[str, Tensor]


@dataclass(frozen=True)
class ZooBlock:
    """What a file says of one block. limits: (out, groups, 1) float32, by the linear's name within the block."""

    steps: tuple[Rescaling, ...]
    limits: Mapping[str, Tensor]


def read_zoo(
    path: Path, block: DecoderBlock, grid: UniformGrid, scales_of: Sequence[str], limits_of: Sequence[str]
) -> ZooBlock:
    """The entries of a block, in the file's order; the block needs no weights.

    scales_of, limits_of: producers and linears that must be there; others of the block may be.
    Raises UserError if the file cannot be read, or was made for another model, number of bits or group size.
    """
    stated = MADE_FOR.search(path.name)
    if stated and (int(stated["bits"]), int(stated["group_size"])) != (grid.bits, grid.group_size):
        raise UserError(
            f"{path} is by its name a search for {stated['bits']} bits in groups of {stated['group_size']}, but the "
            f"recipe has {grid.bits} bits in groups of {grid.group_size}; --set weights.grid.bits={stated['bits']} "
            f"--set weights.grid.group_size={stated['group_size']}, or give the file of that grid"
        )
    scales, clips = _load(plain_file(path), path.stat().st_mtime_ns)
    own = f"{block.name}."
    blocks = tuple(f"{block.architecture.block_name(i)}." for i in range(block.config.num_hidden_layers))
    names = [name for producer, consumers, _ in scales for name in (producer, *consumers)]
    for name in (*names, *(linear for linear, _ in clips)):
        if not name.startswith(blocks):
            raise UserError(f"{path} names {name!r}, which is in no block of this model; it was made for another one")
    steps = [
        Rescaling(producer.removeprefix(own), tuple(name.removeprefix(own) for name in consumers), scale.float())
        for producer, consumers, scale in scales
        if producer.startswith(own)
    ]
    twice = [step.producer for i, step in enumerate(steps) if step.producer in [other.producer for other in steps[:i]]]
    if twice:
        raise UserError(f"{path} scales {block.name}.{twice[0]} twice; the file is damaged, fetch it again")
    limits = {name.removeprefix(own): limit.float() for name, limit in clips if name.startswith(own)}
    for step in steps:
        _check_step(path, block, step)
    for name, limit in limits.items():
        _check_limits(path, block, name, limit, grid)
    lacking = [name for name in scales_of if name not in [step.producer for step in steps]]
    lacking += [name for name in limits_of if name not in limits]
    if lacking:
        raise UserError(
            f"{path} has nothing for {', '.join(lacking)} of {block.name}; it is not whole, or made for another model"
            + ("" if limits else ", or without clipping (--set weights.clip=false)")
        )
    return ZooBlock(tuple(steps), limits)


def save_zoo(path: Path, blocks: Mapping[str, ZooBlock]) -> None:
    """Write results by the blocks' full names, in the zoo's layout but in float32, so that reading loses no bit."""
    content: dict[str, list[ScaleEntry] | list[ClipEntry]] = {
        "scale": [
            (f"{block}.{step.producer}", tuple(f"{block}.{name}" for name in step.consumers), step.scale.cpu())
            for block, found in blocks.items()
            for step in found.steps
        ],
        "clip": [(f"{block}.{name}", m.cpu()) for block, found in blocks.items() for name, m in found.limits.items()],
    }
    with write_beside(path) as beside:
        torch.save(content, beside)


@lru_cache(maxsize=1)  # of one run; a zoo file of a 7B model has about 100 MB
def _load(path: Path, modified: int) -> tuple[list[ScaleEntry], list[ClipEntry]]:
    """The entries of a file. modified: its time stamp, so that a file written anew is read anew.

    Raises UserError if it is no zoo file.
    """
    what = f"{path} is no whole file of tensors that torch.save wrote, or holds code, which is not read"
    with built(what, "give a .pt of the AWQ model zoo, or fetch it again"):
        content = torch.load(path, weights_only=True, map_location="cpu")
    try:
        scales = [
            (str(producer), tuple(map(str, consumers)), _floats(s)) for producer, consumers, s in content["scale"]
        ]
        clips = [(str(linear), _floats(m)) for linear, m in content["clip"]]
    except (TypeError, ValueError, KeyError, IndexError):
        raise UserError(
            f'{path} is no file of the AWQ model zoo: a dict of "scale", a list of (producer, consumers, tensor), and '
            '"clip", a list of (linear, tensor)'
        ) from None
    return scales, clips


def _floats(value: object) -> Tensor:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        raise TypeError
    return value


def _check_step(path: Path, block: DecoderBlock, step: Rescaling) -> None:
    """Its modules are a feed of the block, with all that reads it, and there is one positive scale per channel."""
    what = f"{path}: the scale of {block.name}.{step.producer}"
    readers = {feed.producer: feed.readers for feed in block.feeds()}.get(step.producer, ())
    if step.consumers != readers:
        forgotten = [name for name in readers if name not in step.consumers]
        lacks = f" (it leaves out what reads it too: {', '.join(forgotten[:5])})" if forgotten else ""
        raise UserError(
            f"{what} → {', '.join(step.consumers[:5])}{', …' if len(step.consumers) > 5 else ''} belongs to none of "
            f"the block's pairs{lacks}; the file was made for another type of model"
        )
    channels = len(block.module.get_submodule(step.producer).get_parameter("weight"))
    if step.scale.shape != (channels,):
        raise UserError(
            f"{what} has the shape {tuple(step.scale.shape)}, the model has {channels} channels there; the file was "
            "made for another model"
        )
    if not (torch.isfinite(step.scale).all() and (step.scale > 0).all()):
        raise UserError(f"{what} is not positive and finite everywhere; the file is damaged, fetch it again")


def _check_limits(path: Path, block: DecoderBlock, name: str, limits: Tensor, grid: UniformGrid) -> None:
    """It is a linear of the block, and there is one limit per row and group of the grid."""
    what, linear = f"{path}: the clip limits of {block.name}.{name}", block.linears().get(name)
    if linear is None:
        raise UserError(f"{what} are for a linear that the block does not have; the file was made for another model")
    rows, channels = linear.weight.shape
    groups = 1 if grid.group_size == -1 else channels // grid.group_size
    if limits.ndim != 3 or limits.shape[0] != rows or limits.shape[2] != 1 or channels % limits.shape[1]:
        raise UserError(
            f"{what} have the shape {tuple(limits.shape)}, which does not fit its {rows} × {channels} weights; the "
            "file was made for another model"
        )
    if limits.shape[1] != groups:
        made_for = channels // limits.shape[1]
        raise UserError(
            f"{what} are for groups of {made_for}, the recipe has group_size={grid.group_size}; --set "
            f"weights.grid.group_size={made_for}, or give the file of that group size"
        )
    if not (torch.isfinite(limits).all() and (limits >= 0).all()):
        raise UserError(f"{what} are negative or not finite; the file is damaged, fetch it again")
