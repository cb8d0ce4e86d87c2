"""The published tables, one file a paper: rows, measures and figures as data."""

from collections.abc import Mapping

from eval.tables.declared import Paper
from eval.tables.papers import gptq, intactkv, kivi, kvquant, lutgemm, ours, prefixquant, smoothquant, spqr, zeroquant

__all__ = ["PAPERS"]

MODULES = (intactkv, smoothquant, zeroquant, gptq, lutgemm, spqr, kivi, kvquant, prefixquant, ours)
PAPERS: Mapping[str, Paper] = {paper.name: paper for module in MODULES for paper in module.TABLES}
