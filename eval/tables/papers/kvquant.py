"""KVQuant (Hooper et al., NeurIPS 2024, arXiv:2401.18079) on qllm's page: non-uniform levels, 1 % of outliers, the
first token exact; levels from 16 pieces of 2048 tokens of WikiText-2."""

from eval.tables.declared import Method, Paper
from eval.tables.papers.columns import (
    C4_WINDOWS,
    CSQA,
    GSM8K,
    LLAMA31,
    MMLU,
    PERPLEXITY,
    QLLM,
    SIXTEEN_BITS,
    TRUTHFULQA,
    rows,
)
from eval.tables.papers.kivi import KV_ACCURACY_16, KV_GENERATION_16, KV_PERPLEXITY_16, SIX

__all__ = ["TABLES"]


def _kvquant(bits: int) -> Method:
    fields = ("outliers=0.01", "sinks=1", "levels=nuq", "qnorm=false", "weighting=fisher")
    words = tuple(word for field in fields for word in ("--set", f"kv_cache.{field}"))
    text = ("--calibration", "wikitext2", "--calibration-samples", "16", "--calibration-length", "2048", "--seed", "0")
    return Method("KVQuant", kv=("--kv", "kvquant", "--kv-bits", str(bits), *words), text=text, calibrates=True)


CALIBRATED = (
    "the page's levels were calibrated with sinks off, so the first token counted in them; ours are calibrated without "
    "it, as they are used"
)
FOUR, THREE, TWO = map(_kvquant, (4, 3, 2))

TABLES = (
    Paper(
        "kvquant-perplexity", "KVQuant", "perplexity, KV cache rounded", "qllm, KVQuant", QLLM, LLAMA31, PERPLEXITY,
        rows(
            LLAMA31,
            KV_PERPLEXITY_16,
            ("KVQuant, 4 bits", FOUR, "7.29 10.41"),
            ("KVQuant, 3 bits", THREE, "7.42 10.58"),
            ("KVQuant, 2 bits", TWO, "8.27 11.69"),
        ),
        (CALIBRATED, C4_WINDOWS, SIXTEEN_BITS),
    ),
    Paper(
        "kvquant-accuracy", "KVQuant", "six tasks and MMLU, KV cache rounded", "qllm, KVQuant", QLLM, LLAMA31,
        (*CSQA, MMLU),
        rows(
            LLAMA31,
            KV_ACCURACY_16,
            ("KVQuant, 4 bits", FOUR, "84.00 52.73 81.81 59.18 79.92 73.24 71.81 67.13"),
            ("KVQuant, 3 bits", THREE, "83.88 51.70 82.03 58.61 78.94 73.09 71.38 65.92"),
            ("KVQuant, 2 bits", TWO, "80.80 48.72 79.25 56.81 78.45 71.03 69.18 59.63"),
        ),
        (SIX, CALIBRATED, SIXTEEN_BITS),
    ),
    Paper(
        "kvquant-generation", "KVQuant", "tasks that generate, KV cache rounded", "qllm, KVQuant", QLLM, LLAMA31,
        (GSM8K, TRUTHFULQA),
        rows(
            LLAMA31,
            KV_GENERATION_16,
            ("KVQuant, 4 bits", FOUR, "76.65 60.95"),
            ("KVQuant, 3 bits", THREE, "75.66 60.59"),
            ("KVQuant, 2 bits", TWO, "56.63 57.41"),
        ),
        (CALIBRATED, SIXTEEN_BITS),
    ),
)  # fmt: skip
