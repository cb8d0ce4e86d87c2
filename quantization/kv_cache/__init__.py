"""KV-cache quantizers: policies of the one cache class in `intactkv.cache`, and the table of their names."""

from collections.abc import Mapping
from typing import Any

from quantization.kv_cache.base import Grids, Policy
from quantization.kv_cache.clipped import ClippedPerHead
from quantization.kv_cache.kivi import KIVI
from quantization.kv_cache.kvquant import KVQuant
from quantization.kv_cache.per_head import PerHead
from quantization.kv_cache.rotated import Rotated
from quantization.kv_cache.static import StaticPerHead
from quantization.kv_cache.turboquant import TurboQuant

__all__ = ["KIVI", "KV_POLICIES", "ClippedPerHead", "Grids", "KVQuant", "PerHead", "Policy", "Rotated", "StaticPerHead",
           "TurboQuant", "kv_bits"]  # fmt: skip

# The words of `--kv NAME`. A new policy adds a file and a row.
KV_POLICIES: Mapping[str, type[Policy]] = {
    "per_head": PerHead,
    "rotated": Rotated,
    "static": StaticPerHead,
    "clipped": ClippedPerHead,
    "kivi": KIVI,
    "kvquant": KVQuant,
    "turboquant": TurboQuant,
}


def kv_bits(kv: Mapping[str, Any]) -> str:
    """Bits and groups of a described policy in a word: `4`; of keys and values apart `4,2`; with groups `4g64`,
    `4token`."""
    group = {None: "", -1: "token"}.get(size := kv.get("group_size"), f"g{size}")
    return f"{kv['bits']}{',' + str(v_bits) if (v_bits := kv.get('v_bits')) else ''}{group}"
