"""GPTQ's checkpoint format, which AutoGPTQ introduced and GPTQModel, transformers, vLLM and ExLlama read.

    qweight (in·b/32, out) int32     codes, 32 input channels of a column in b words
    qzeros (groups, out·b/32) int32  zero points, 32 columns in b words: z − 1 in v1 (`gptq`), z in v2 (`gptq_v2`)
    scales (groups, out) float16     g_idx (in,) int32, the group of every input channel

v1 cannot hold z = 0 for all of its readers: −1 has no b-bit code. Some add 1 to every unpacked field (2^b), some wrap
it to 0, and GPTQModel adds 1 to all fields of a packed word at once, where it carries into the neighbour. v2 stores z
itself, and GPTQModel (with transformers) reads it.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from intactkv.architecture import LM_HEAD
from quantization.export.layout import (
    Contents,
    Packed,
    check_known,
    common_scheme,
    half_scale,
    integers,
    pack_words,
    refuse,
)
from quantization.grids.stored import StoredWeight
from quantization.grids.uniform import QuantizedTensor

__all__ = ["config", "config_v2", "pack", "pack_v2"]

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # what GPTQModel's plain torch kernel takes
MULTIPLE = 32  # of rows and columns, in the published layout


def pack(weight: StoredWeight, name: str) -> Packed:
    """A linear in v1. Exact up to the rounding of its scales. Raises UserError for what it cannot hold."""
    return _pack(weight, name, offset=1)


def pack_v2(weight: StoredWeight, name: str) -> Packed:
    """The same in v2."""
    return _pack(weight, name, offset=0)


def _pack(weight: StoredWeight, name: str, offset: int) -> Packed:
    grid, codes, zero_point, scheme = integers(weight, name)
    check_known(scheme, name, "GPTQ's format", BITS, GROUP_SIZES)
    rows, columns = codes.shape
    if rows % MULTIPLE or columns % MULTIPLE:
        raise refuse(
            name, f"its shape {rows} × {columns} is no multiple of {MULTIPLE} both ways, as GPTQ's format needs"
        )
    count = int((zero_point < offset).sum())
    if count:
        raise refuse(
            name,
            f"{count} of its {zero_point.numel()} groups have the zero point 0, which GPTQ's format v1 stores as -1 "
            "and its readers undo differently",
            "use --format gptq-v2 or compressed-tensors",
        )
    scales, change = half_scale(grid, name)
    tensors = {
        "qweight": pack_words(codes.T, scheme.bits, axis=0),
        "qzeros": pack_words(zero_point.T - offset, scheme.bits, axis=1),
        "scales": scales.T.contiguous(),
        "g_idx": _group_index(grid),
    }
    return Packed(tensors, scheme, change)


def _group_index(weight: QuantizedTensor) -> Tensor:
    """(in,) int32."""
    if weight.group_index is not None:
        return weight.group_index
    channels = weight.codes.shape[1]
    return torch.arange(channels, dtype=torch.int32) // (channels // weight.scale.shape[1])


def _config(version: str, contents: Contents) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Raises UserError if linears have several grids, or if one inside a block is not quantized.
    """
    scheme = common_scheme(contents.schemes, "GPTQ's format")
    for name in contents.plain:
        if name.startswith(f"{contents.blocks}."):
            raise refuse(
                name,
                "it is not quantized, and GPTQ's format expects every linear of a block to be",
            )
    return {
        "quant_method": "gptq",
        "checkpoint_format": version,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": scheme.act_order,
        "block_name_to_quantize": contents.blocks,
        LM_HEAD: False,
    }


config = partial(_config, "gptq")
config_v2 = partial(_config, "gptq_v2")
