"""compressed-tensors, `pack-quantized`: the format of vLLM and llm-compressor, read by transformers on any device.

    weight_packed (out, ⌈in·b/32⌉) int32    codes, 32 of a row in b words         weight_shape (2,) int64   out, in
    weight_scale (out, groups)              in the dtype that it has here
    weight_zero_point (⌈out·b/32⌉, groups) int32   packed along the rows; asymmetric grids only

The library counts codes and zero points from −2^(b−1) and adds that before packing: what is packed is the unsigned
code. Layout: compressed_tensors 0.20, compressors/pack_quantized.

Two things that transformers 5.23 does on its default route are avoided by `dequantize` in the configuration, which
makes it unpack while loading: it cannot open packed zero points, and it rounds scales to the dtype of the model. So are
linears that read their own weight (Falcon's), which it takes away. Other runtimes do not look at that field. The route
takes one grid for all linears.
"""

from typing import Any

import torch

from quantization.export.layout import Contents, Packed, common_scheme, integers, pack_words, refuse
from quantization.grids.stored import StoredWeight

__all__ = ["config", "pack"]


def pack(weight: StoredWeight, name: str) -> Packed:
    """A linear in this format; exact. Raises UserError for what it cannot hold."""
    grid, codes, zero_point, scheme = integers(weight, name)
    if scheme.act_order:
        raise refuse(
            name,
            "its groups follow the activation order (static_groups=false), which compressed-tensors gave up in 2026",
            "use --format gptq, or quantize with --set weights.static_groups=true",
        )
    tensors = {
        "weight_packed": pack_words(codes, scheme.bits, axis=1),
        "weight_scale": grid.scale,
        "weight_shape": torch.tensor(codes.shape),
    }
    if not scheme.symmetric:
        tensors["weight_zero_point"] = pack_words(zero_point, scheme.bits, axis=0)
    return Packed(tensors, scheme)


def config(contents: Contents) -> dict[str, Any]:
    """`quantization_config` of config.json. Raises UserError if asymmetric linears have several grids."""
    schemes = contents.schemes
    kinds = list(dict.fromkeys(schemes.values()))
    asymmetric = any(not kind.symmetric for kind in kinds)
    if asymmetric or contents.unpacked:
        trait = "is asymmetric" if asymmetric else "has linears that compute by code of their own"
        common_scheme(schemes, f"a compressed-tensors checkpoint that {trait}")
    rounded = any(contents.dtype not in (kind.scale_dtype, torch.float32) for kind in kinds)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(kinds) == 1 else [name for name in schemes if schemes[name] == kind],
            "weights": {
                "num_bits": kind.bits,
                "type": "int",
                "symmetric": kind.symmetric,
                "strategy": "channel" if kind.group_size == -1 else "group",
                "group_size": None if kind.group_size == -1 else kind.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for i, kind in enumerate(kinds)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(contents.plain),
        **({"dequantize": True} if asymmetric or contents.unpacked or (rounded and len(kinds) == 1) else {}),
    }
