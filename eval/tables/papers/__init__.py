"""The published tables, one file a paper: rows, measures and figures as data."""

from collections.abc import Mapping

from eval.tables.declared import Paper
from eval.tables.papers import (
    conversations,
    gptq,
    intactkv,
    kivi,
    kvquant,
    latency,
    lutgemm,
    needles,
    ours,
    prefixquant,
    smoothquant,
    spqr,
    zeroquant,
)

__all__ = ["PAPERS"]

MODULES = (intactkv, smoothquant, zeroquant, gptq, lutgemm, latency, spqr, kivi, kvquant, conversations, needles,
           prefixquant, ours)  # fmt: skip
PAPERS: Mapping[str, Paper] = {paper.name: paper for module in MODULES for paper in module.TABLES}
