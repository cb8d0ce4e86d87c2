"""An AWQ checkpoint's search as a file of the AWQ model zoo, for other programs or to be applied again.

The scales are in the checkpoint. It does not keep the clip limits: they are recovered from its codes, which the dense
weights give again under few limits.
"""

from pathlib import Path

import torch
from torch import Tensor

from corpora.errors import UserError
from intactkv.architecture import architecture_of
from quantization.export.writer import read_source
from quantization.grids.stored import restore
from quantization.grids.uniform import QuantizedTensor, merge_groups, quantize, split_groups
from quantization.model.blocks import DecoderBlock
from quantization.model.rescale import rescale_all
from quantization.runs.checkpoint import block_file, dense_directory, find_checkpoint, read_block
from quantization.runs.dense import DenseCheckpoint, empty_model
from quantization.weights.awq import clip_candidates, is_clipped
from quantization.weights.awq_zoo import ZooBlock, save_zoo

__all__ = ["export_search", "recovered_limits"]


def recovered_limits(weight: Tensor, rounded: QuantizedTensor) -> Tensor:
    """The limits with which a search rounded a matrix to this: (out, groups, 1), NaN for a group that none explains.

    Only ten are possible per group. Of those that give the same codes, scale and zero point the largest is taken.
    """
    groups = split_groups(weight.float(), rounded.grid.group_size)
    limits = torch.full_like(groups[..., :1], float("nan"))
    for candidate in reversed(clip_candidates(groups)):
        again = quantize(merge_groups(groups.clamp(-candidate, candidate)), rounded.grid)
        same = (again.scale == rounded.scale) & (again.zero_point == rounded.zero_point)
        same &= split_groups(again.codes == rounded.codes, rounded.grid.group_size).all(-1)
        limits = torch.where(same[..., None], candidate, limits)
    return limits


def export_search(source: Path, out: Path) -> str:
    """Write the search behind an AWQ checkpoint as the file `out`, which gives the same checkpoint again.

    Returns what it holds and how to apply it. Raises UserError if AWQ's own search did not make the checkpoint, it ran
    behind a prefix, the dense checkpoint is not at hand, or `out` exists.
    """
    if out.suffix != ".pt":
        raise UserError(f"--out {out}: a search is a file that ends in .pt")
    manifest = read_source(source, out)
    if (manifest["recipe"]["weights"] or {}).get("kind") != "AWQ" or manifest["recipe"]["transforms"]:
        raise UserError(f"{source} ({manifest['label']}) was not made by AWQ alone, so it holds no search to export")
    if manifest["needs_prefix"] is not None:
        raise UserError(
            f"{source} was searched behind the prefix {manifest['needs_prefix']}, without which its scales are wrong, "
            "and a search's file cannot name one; export a search that ran without --calibrate-behind-prefix"
        )
    dense = dense_directory(find_checkpoint(source), "its weights tell the clip limits", "export where it is")
    model, results = empty_model(dense), {}
    weights = DenseCheckpoint(dense).weights(model)
    architecture = architecture_of(model.config)
    for index, module in enumerate(architecture.blocks_of(model)):
        block = DecoderBlock(index, module, architecture, model.config)
        stored = read_block(block_file(source, index))
        weights.load_into(module, block.name, torch.device("cpu"))
        rescale_all(module, stored.rescalings, block.head_size)
        limits = {}
        for name, linear in block.linears().items():
            if is_clipped(block, name):
                rounded = restore(*stored.linears[f"{block.name}.{name}"])
                assert isinstance(rounded, QuantizedTensor)
                limits[name] = recovered_limits(linear.weight, rounded)
                if limits[name].isnan().any():
                    raise UserError(
                        f"{source}: no clip limit of a search gives the codes of {block.name}.{name}; if it was "
                        "made from a file (weights.file), use that one"
                    )
        results[block.name] = ZooBlock(tuple(stored.rescalings), limits)
        module.to_empty(device="meta")
    save_zoo(out, results)
    scales, clips = sum(len(b.steps) for b in results.values()), sum(len(b.limits) for b in results.values())
    grid = {field: str(value).lower() for field, value in manifest["recipe"]["weights"]["grid"].items()}
    settings = [f"weights.grid.{field}={value}" for field, value in grid.items() if field != "kind"]
    words = " ".join(f"--set {setting}" for setting in (*settings, f"weights.file={out}"))
    return f"{scales} scales, clip limits of {clips} linears. Apply them with --recipe awq {words}"
