"""GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323) on qllm's page: one grid per row, seed 0.

With groups of columns they are of the columns in their order by act-order, as qllm has them.
"""

from eval.tables.declared import BOS, Method, Paper, Row, with_arms
from eval.tables.papers.columns import C4_OLD, QLLM, WIKITEXT, by_models

__all__ = ["FULL", "TABLES", "gptq", "rtn"]

FULL = Method("FP16")


def rtn(bits: int, group_size: int = -1) -> Method:
    """Round to nearest."""
    return Method("RTN", "rtn", ("--bits", str(bits), "--group-size", str(group_size)), quantizes=True)


def gptq(bits: int, group_size: int = -1, act_order: bool = True) -> Method:
    """GPTQ as qllm runs it."""
    dynamic = () if group_size == -1 else ("--set", "weights.static_groups=false")
    order = ("--set", f"weights.act_order={str(act_order).lower()}")
    words = ("--bits", str(bits), "--group-size", str(group_size), *dynamic, *order)
    return Method("GPTQ", "gptq-row", words, calibrates=True, quantizes=True)


LLAMAS = ("llama-2-7b", "llama-2-13b", "llama-3-8b", "llama-3.1-instruct-8b")


def _rows(models: tuple[str, ...], act_order: bool, *texts: str) -> tuple[Row, ...]:
    """Full precision, RTN and GPTQ at 4 bits, the same at 3. texts: of each row, WikiText-2 | C4, a figure a model."""
    methods = (FULL, rtn(4), gptq(4, act_order=act_order), rtn(3), gptq(3, act_order=act_order))
    labels = ("FP16", "RTN, 4 bits", "GPTQ, 4 bits", "RTN, 3 bits", "GPTQ, 3 bits")
    rows = [
        Row(name, method, published=by_models(models, text))
        for name, method, text in zip(labels, methods, texts, strict=True)
    ]
    return with_arms(rows, BOS)


TABLES = (
    Paper(
        "gptq-llama", "GPTQ", "perplexity, weights of one grid per row, with act-order", "qllm, GPTQ, LLaMA models",
        QLLM, LLAMAS, (WIKITEXT, C4_OLD),
        _rows(
            LLAMAS, True,
            "5.47 4.88 6.14 7.22 | 6.97 6.47 8.88 10.39",
            "6.12 5.20 8.53 9.46 | 7.72 6.83 12.04 13.64",
            "5.84 5.15 7.29 8.59 | 7.36 6.70 10.46 12.49",
            "542.82 10.68 2193.32 897.85 | 404.47 12.50 476.54 466.50",
            "8.66 6.52 27.31 25.64 | 10.09 8.07 29.96 29.48",
        ),
    ),
)  # fmt: skip
