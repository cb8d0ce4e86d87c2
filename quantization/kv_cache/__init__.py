"""KV-cache quantizers: policies of the one cache class in `intactkv.cache`, and the table of their names."""

from quantization.kv_cache.per_head import PerHead

__all__ = ["KV_POLICIES", "PerHead"]

# The words of `--kv NAME`. A new policy adds a file and a row.
KV_POLICIES = {"per_head": PerHead}
