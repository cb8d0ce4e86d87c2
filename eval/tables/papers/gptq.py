"""GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323) on qllm's page, beside round to nearest.

One grid per row and seed 0; groups of 128, of LUT-GEMM's tables, are of columns in their order by act-order.
"""

from eval.tables.declared import Method, Paper, Words
from eval.tables.papers.columns import (
    BIGBENCH,
    C4_WINDOWS,
    CSQA,
    FULL,
    GSM8K,
    LLAMA31,
    MMLU,
    PERPLEXITY,
    QLLM,
    SIXTEEN_BITS,
    rows,
)

__all__ = ["TABLES", "gptq", "rtn"]


def rtn(bits: int, groups: bool = False) -> Method:
    """Round to nearest, a grid per row or, with groups, for as many channels as the model's own (128)."""
    size = () if groups else ("--group-size", "-1")
    return Method("RTN", "rtn", ("--bits", str(bits), *size), quantizes=True)


def gptq(bits: int, groups: bool = False, act_order: bool = True) -> Method:
    """GPTQ as qllm runs it."""
    words: Words = ("--bits", str(bits), "--set", f"weights.act_order={str(act_order).lower()}")
    if not groups:
        return Method("GPTQ", "gptq-row", (*words, "--group-size", "-1"), calibrates=True, quantizes=True)
    words += ("--set", "weights.static_groups=false", "--set", "weights.true_sequential=false")
    return Method("GPTQ", "gptq", words, text=("--seed", "0"), calibrates=True, quantizes=True)


def _perplexity(name: str, title: str, source: str, models: tuple[str, ...], act_order: bool, *texts: str) -> Paper:
    """texts: of full precision, RTN and GPTQ at 4 bits, RTN and GPTQ at 3 bits."""
    methods = (FULL, rtn(4), gptq(4, act_order=act_order), rtn(3), gptq(3, act_order=act_order))
    labels = ("16 bits", "RTN, 4 bits", "GPTQ, 4 bits", "RTN, 3 bits", "GPTQ, 3 bits")
    notes = (C4_WINDOWS, *((SIXTEEN_BITS,) if LLAMA31[0] in models else ()))
    lines = rows(models, *zip(labels, methods, texts, strict=True))
    return Paper(name, "GPTQ", f"perplexity, {title}", source, QLLM, models, PERPLEXITY, lines, notes)


OPTS = tuple(f"opt-{size}" for size in ("125m", "1.3b", "2.7b", "6.7b", "13b"))
LLAMAS = ("llama-2-7b", "llama-2-13b", "llama-3-8b", *LLAMA31)
FULL_LLAMA = "5.47 4.88 6.14 7.22 | 6.97 6.47 8.88 10.39"
RTN_LLAMA_4 = "6.12 5.20 8.53 9.46 | 7.72 6.83 12.04 13.64"
RTN_LLAMA_3 = "542.82 10.68 2193.32 897.85 | 404.47 12.50 476.54 466.50"

TABLES = (
    _perplexity(
        "gptq-opt", "OPT, one grid per row, no act-order", "qllm, GPTQ, OPT models", OPTS, False,
        "27.65 14.62 12.47 10.86 10.13 | 24.61 14.72 13.16 11.74 11.20",
        "37.28 48.20 16.92 12.10 11.32 | 31.62 24.68 17.52 13.38 12.35",
        "31.52 15.60 12.88 11.38 10.33 | 27.12 15.55 13.76 12.14 11.36",
        "1.3e3 1.3e4 1.6e4 5.8e3 3.4e3 | 7.3e2 6.3e3 1.2e4 4.7e3 2.2e3",
        "54.58 21.34 16.96 15.21 11.72 | 39.57 19.89 16.48 15.60 12.28",
    ),
    _perplexity(
        "gptq-llama-no-act-order", "LLaMA, one grid per row, no act-order",
        "qllm, GPTQ, LLaMA models, gptq_actorder=False",
        LLAMAS, False, FULL_LLAMA, RTN_LLAMA_4, "6.06 5.18 277.95 131.06 | 7.41 6.74 58.11 68.79", RTN_LLAMA_3,
        "10.34 6.75 133.18 1426.07 | 10.42 8.24 54.44 409.27",
    ),
    _perplexity(
        "gptq-llama", "LLaMA, one grid per row, with act-order", "qllm, GPTQ, LLaMA models, gptq_actorder=True",
        LLAMAS, True, FULL_LLAMA, RTN_LLAMA_4, "5.84 5.15 7.29 8.59 | 7.36 6.70 10.46 12.49", RTN_LLAMA_3,
        "8.66 6.52 27.31 25.64 | 10.09 8.07 29.96 29.48",
    ),
    Paper(
        "gptq-opt-accuracy", "GPTQ", "perplexity and six tasks, OPT-6.7B, one grid per row, no act-order",
        "qllm, GPTQ, OPT-6.7B", QLLM, ("opt-6.7b",), (*PERPLEXITY, *CSQA),
        rows(
            ("opt-6.7b",),
            ("16 bits", FULL, "10.86 11.74 66.06 30.46 65.57 50.51 76.28 65.19 59.01"),
            ("RTN, 4 bits", rtn(4), "12.10 13.38 63.30 29.10 65.57 48.76 75.79 64.25 57.80"),
            ("GPTQ, 4 bits", gptq(4, act_order=False), "11.38 12.14 63.24 31.06 64.35 49.43 75.95 63.30 57.89"),
            ("RTN, 3 bits", rtn(3), "5.8e3 4.7e3 40.89 21.25 25.84 25.74 52.88 50.43 36.17"),
            ("GPTQ, 3 bits", gptq(3, act_order=False), "15.21 15.60 62.26 28.07 59.55 44.88 73.18 61.01 54.83"),
        ),
        ("the averages are those of the six columns; printed are 52.87, 50.11, 50.19, 31.43, 47.42, which are not",
         "C4 is that of the page's OPT table; printed are 13.16, 17.52, 13.76, 1.2e4, 16.48, which are OPT-2.7B's",
         C4_WINDOWS),
    ),
    Paper(
        "gptq-accuracy", "GPTQ", "perplexity, six tasks and MMLU, one grid per row, with act-order",
        "qllm, GPTQ, LLaMA3.1-8B-Instruct", QLLM, LLAMA31, (*PERPLEXITY, *CSQA, MMLU),
        rows(
            LLAMA31,
            ("16 bits", FULL, "7.22 10.39 84.16 51.96 81.82 59.12 79.87 73.95 71.81 67.81"),
            ("RTN, 4 bits", rtn(4), "9.46 13.64 80.09 49.15 79.04 56.14 77.69 72.30 69.07 59.74"),
            ("GPTQ, 4 bits", gptq(4), "8.59 12.49 81.53 42.92 74.66 57.08 77.20 70.09 67.25 62.78"),
            ("RTN, 3 bits", rtn(3), "897.85 466.50 53.36 19.88 28.20 28.54 55.60 50.99 39.43 22.88"),
            ("GPTQ, 3 bits", gptq(3), "25.64 29.48 60.76 22.18 41.75 42.21 60.45 59.91 47.88 39.51"),
        ),
        (C4_WINDOWS, SIXTEEN_BITS),
    ),
    Paper(
        "gptq-generation", "GPTQ", "tasks that generate, one grid per row, with act-order",
        "qllm, GPTQ, Generation Tasks", QLLM, LLAMA31, (BIGBENCH, GSM8K),
        rows(
            LLAMA31, ("16 bits", FULL, "69.19 75.97"), ("RTN, 4 bits", rtn(4), "51.60 50.57"),
            ("GPTQ, 4 bits", gptq(4), "60.54 57.54"),
        ),
        ("BigBench is taken for BIG-Bench Hard, three shots: the page names no task, the value fits; GSM8K has five",
         SIXTEEN_BITS),
    ),
)  # fmt: skip
