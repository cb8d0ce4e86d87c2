"""AWQ's GEMM format, which AutoAWQ introduced and GPTQModel, transformers and vLLM read. 4 bits only.

    qweight (in, out/8) int32    codes; eight neighbouring output channels in one word, in the order 0 2 4 6 1 3 5 7
    qzeros (groups, out/8) int32 zero points, packed alike, stored as they are
    scales (groups, out) float16

The order is the kernel's: the channels 0 and 1 of a word lie 16 bits apart, where one instruction widens both to half
precision. Symmetric grids go out with the zero point 8. The rescaling that AWQ does before it rounds is in the norms
and weights already, so this file is no different for checkpoints of other methods.
"""

from typing import Any

from torch import Tensor

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

__all__ = ["config", "pack"]

BITS = 4
GROUP_SIZES = (-1, 16, 32, 64, 128)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word, lowest first, holds this channel


def pack(weight: StoredWeight, name: str) -> Packed:
    """A linear in this format. Exact up to the rounding of its scales. Raises UserError for what it cannot hold."""
    grid, codes, zero_point, scheme = integers(weight, name)
    check_known(scheme, name, "AWQ's format", (BITS,), GROUP_SIZES)
    if scheme.act_order:
        raise refuse(
            name,
            "its groups follow the activation order (static_groups=false), which AWQ's format has no place for",
            "use --format gptq, or quantize with --set weights.static_groups=true",
        )
    if len(codes) % 8:
        raise refuse(name, f"its {len(codes)} output channels are no multiple of 8, of which AWQ's format makes a word")
    scales, change = half_scale(grid, name)
    tensors = {
        "qweight": _interleaved(codes.T),
        "qzeros": _interleaved(zero_point.T),
        "scales": scales.T.contiguous(),
    }
    return Packed(tensors, scheme, change)


def _interleaved(values: Tensor) -> Tensor:
    """Pack (rows, out) nibbles along the output channels, eight in the kernel's order: (rows, out/8) int32."""
    ordered = values.unflatten(1, (-1, 8))[..., list(ORDER)].flatten(1)
    return pack_words(ordered, BITS, axis=1)


def config(contents: Contents) -> dict[str, Any]:
    """`quantization_config` of config.json. Raises UserError if linears have several grids."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": common_scheme(contents.schemes, "AWQ's format").group_size,
        "zero_point": True,
        "modules_to_not_convert": list(contents.plain) or None,
    }
