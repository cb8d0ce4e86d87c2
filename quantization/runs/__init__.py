"""Artefacts: from a directory and a recipe to checkpoints, prefixes and a model that runs."""
