"""KV-cache quantizers: policies of the one cache class in `intactkv.cache`, and the table of their names."""

from collections.abc import Mapping

from quantization.kv_cache.clipped import ClippedPerHead
from quantization.kv_cache.per_head import PerHead
from quantization.kv_cache.rotated import Rotated
from quantization.kv_cache.static import StaticPerHead

__all__ = ["KV_POLICIES", "ClippedPerHead", "PerHead", "Rotated", "StaticPerHead"]

# The words of `--kv NAME`. A new policy adds a file and a row.
KV_POLICIES: Mapping[str, type[ClippedPerHead] | type[PerHead] | type[Rotated] | type[StaticPerHead]] = {
    "per_head": PerHead,
    "rotated": Rotated,
    "static": StaticPerHead,
    "clipped": ClippedPerHead,
}
