"""The published tables, one file a paper: rows, measures and figures as data."""

from collections.abc import Mapping

from eval.tables.declared import Paper
from eval.tables.papers import gptq, intactkv, ours

__all__ = ["PAPERS"]

PAPERS: Mapping[str, Paper] = {paper.name: paper for module in (intactkv, gptq, ours) for paper in module.TABLES}
