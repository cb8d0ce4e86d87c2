"""Make a model low-bit: grids, weight quantizers, KV-cache policies, the block pipeline and its checkpoints."""
