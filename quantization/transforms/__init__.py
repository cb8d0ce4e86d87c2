"""Exact rewrites of a model: rotations and rescalings that leave its full-precision function as it is."""
