"""The classes that a loaded checkpoint needs of its recipe, by the names under which manifests keep them."""

from collections.abc import Mapping

from quantization.grids.uniform import UniformGrid
from quantization.kv_cache import KV_POLICIES
from quantization.model.attention import AttentionProducts
from quantization.transforms.rotate import Rotate
from quantization.transforms.smooth import Smooth

__all__ = ["PARTS"]

# Transforms, quantizers of attention's inputs, KV policies. A new one adds a row.
PARTS: Mapping[str, type] = {
    kind.__name__: kind for kind in (UniformGrid, AttentionProducts, Rotate, Smooth, *KV_POLICIES.values())
}
