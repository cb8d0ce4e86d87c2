"""KIVI (Liu et al., ICML 2024, arXiv:2402.02750) on qllm's page: groups of 32, the newest 128 tokens exact.

What a prompt's tokens see of each other: where a text is scored the rounded cache (`prefill=final`), where the model
generates the exact one (`fp`). The page's switch of that name says the opposite of what its code did.
"""

from eval.tables.declared import Method, Paper, Words
from eval.tables.papers.columns import (
    C4_WINDOWS,
    CSQA,
    FULL,
    GSM8K,
    LLAMA31,
    MMLU,
    PERPLEXITY,
    QLLM,
    SIXTEEN_BITS,
    TRUTHFULQA,
    rows,
)

__all__ = ["KV_ACCURACY_16", "KV_GENERATION_16", "KV_PERPLEXITY_16", "SIX", "TABLES"]


def _words(bits: int, prefill: str) -> Words:
    return ("--kv", "kivi", "--kv-bits", str(bits), "--kv-group-size", "32", "--set", "kv_cache.residual=128",
            "--set", f"kv_cache.prefill={prefill}")  # fmt: skip


def _kivi(bits: int) -> Method:
    return Method("KIVI", kv=_words(bits, "final"), kv_generating=_words(bits, "fp"))


KIVI_4, KIVI_2 = _kivi(4), _kivi(2)
# Full precision, which KVQuant's tables repeat.
KV_PERPLEXITY_16 = ("16 bits", FULL, "7.24 10.34")
KV_ACCURACY_16 = ("16 bits", FULL, "84.07 52.05 82.00 59.10 80.03 74.11 71.89 67.92")
KV_GENERATION_16 = ("16 bits", FULL, "76.27 61.32")
SIX = "the page's heading says four tasks; its table has six"

TABLES = (
    Paper(
        "kivi-perplexity", "KIVI", "perplexity, KV cache rounded", "qllm, KIVI", QLLM, LLAMA31, PERPLEXITY,
        rows(LLAMA31, KV_PERPLEXITY_16, ("KIVI, 4 bits", KIVI_4, "7.27 10.38"), ("KIVI, 2 bits", KIVI_2, "8.83 12.40")),
        (C4_WINDOWS, SIXTEEN_BITS),
    ),
    Paper(
        "kivi-accuracy", "KIVI", "six tasks and MMLU, KV cache rounded", "qllm, KIVI", QLLM, LLAMA31, (*CSQA, MMLU),
        rows(
            LLAMA31,
            KV_ACCURACY_16,
            ("KIVI, 4 bits", KIVI_4, "84.07 51.71 81.90 59.11 79.92 73.88 71.77 67.80"),
            ("KIVI, 2 bits", KIVI_2, "83.21 51.71 81.86 59.10 79.82 73.88 71.60 66.92"),
        ),
        (SIX, SIXTEEN_BITS),
    ),
    Paper(
        "kivi-generation", "KIVI", "tasks that generate, KV cache rounded", "qllm, KIVI", QLLM, LLAMA31,
        (GSM8K, TRUTHFULQA),
        rows(
            LLAMA31, KV_GENERATION_16, ("KIVI, 4 bits", KIVI_4, "76.19 61.69"), ("KIVI, 2 bits", KIVI_2, "74.53 63.28")
        ),
        (SIXTEEN_BITS,),
    ),
)  # fmt: skip
