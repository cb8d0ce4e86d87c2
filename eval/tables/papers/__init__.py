"""The published tables, one file a paper: rows, measures and figures as data."""

from collections.abc import Mapping

from eval.tables.declared import Paper

__all__ = ["PAPERS"]

PAPERS: Mapping[str, Paper] = {}
