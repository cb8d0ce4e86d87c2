"""Checkpoints that other runtimes load: compressed-tensors, GPTQ, AWQ and plain dense ones."""
