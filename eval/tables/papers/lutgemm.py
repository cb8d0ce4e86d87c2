"""LUT-GEMM (Park et al., ICLR 2024, arXiv:2206.09557) on qllm's page: binary coding by 30 alternating rounds, beside
round to nearest and GPTQ, per row and in groups of 128."""

from eval.tables.declared import Method, Paper
from eval.tables.papers.columns import (
    C4_WINDOWS,
    FULL,
    GSM8K,
    LLAMA31,
    MMLU,
    PERPLEXITY,
    QLLM,
    SIXTEEN_BITS,
    acc,
    mean,
    rows,
)
from eval.tables.papers.gptq import gptq, rtn

__all__ = ["TABLES", "bcq"]


def bcq(bits: int, groups: bool = False) -> Method:
    """Binary coding per row or, with groups, in groups of 128."""
    words = ("--bits", str(bits), *(() if groups else ("--group-size", "-1")), "--set", "weights.rounds=30")
    return Method("LUT-GEMM", "bcq" if groups else "bcq-row", words, quantizes=True)


FOUR = acc("boolq", "arc_challenge", "piqa", "winogrande")

TABLES = (
    Paper(
        "lutgemm-perplexity", "LUT-GEMM", "perplexity, weights per row and in groups of 128", "qllm, LUT-GEMM", QLLM,
        LLAMA31, PERPLEXITY,
        rows(
            LLAMA31,
            ("16 bits", FULL, "7.22 10.39"),
            ("RTN, 4 bits, rows", rtn(4), "9.46 13.64"),
            ("RTN, 4 bits, groups", rtn(4, groups=True), "7.75 11.07"),
            ("GPTQ, 4 bits, rows", gptq(4), "8.59 12.49"),
            ("GPTQ, 4 bits, groups", gptq(4, groups=True), "7.57 11.35"),
            ("LUT-GEMM, 4 bits, rows", bcq(4), "111.82 166.30"),
            ("LUT-GEMM, 4 bits, groups", bcq(4, groups=True), "8.25 11.88"),
            ("RTN, 3 bits, rows", rtn(3), "897.85 466.50"),
            ("RTN, 3 bits, groups", rtn(3, groups=True), "12.30 16.78"),
            ("GPTQ, 3 bits, rows", gptq(3), "25.64 29.48"),
            ("GPTQ, 3 bits, groups", gptq(3, groups=True), "9.14 12.86"),
            ("LUT-GEMM, 3 bits, rows", bcq(3), "941.25 664.89"),
            ("LUT-GEMM, 3 bits, groups", bcq(3, groups=True), "79.87 54.00"),
        ),
        (C4_WINDOWS, SIXTEEN_BITS),
    ),
    Paper(
        "lutgemm-accuracy", "LUT-GEMM", "four tasks and MMLU, weights per row and in groups of 128", "qllm, LUT-GEMM",
        QLLM, LLAMA31, (*FOUR, mean("CSQA average", FOUR), MMLU),
        rows(
            LLAMA31,
            ("16 bits", FULL, "84.16 51.96 79.87 73.95 72.49 67.81"),
            ("RTN, 4 bits, rows", rtn(4), "80.09 49.15 77.69 72.30 69.81 59.74"),
            ("RTN, 4 bits, groups", rtn(4, groups=True), "82.97 50.34 79.71 73.56 71.65 65.24"),
            ("GPTQ, 4 bits, rows", gptq(4), "81.53 42.92 77.20 70.09 67.94 62.78"),
            ("GPTQ, 4 bits, groups", gptq(4, groups=True), "82.42 50.26 79.60 73.16 71.36 66.42"),
            ("LUT-GEMM, 4 bits, groups", bcq(4, groups=True), "82.41 49.32 79.00 71.74 70.62 62.36"),
            ("RTN, 3 bits, rows", rtn(3), "53.36 19.88 55.60 50.99 44.96 22.88"),
            ("RTN, 3 bits, groups", rtn(3, groups=True), "74.10 42.41 75.68 67.17 64.84 52.46"),
            ("GPTQ, 3 bits, rows", gptq(3), "60.76 22.18 60.45 59.91 50.83 39.51"),
            ("GPTQ, 3 bits, groups", gptq(3, groups=True), "81.56 46.16 77.20 69.22 68.54 59.22"),
            ("LUT-GEMM, 3 bits, groups", bcq(3, groups=True), "47.58 27.82 69.15 56.35 50.23 25.35"),
        ),
        (SIXTEEN_BITS,),
    ),
    Paper(
        "lutgemm-gsm8k", "LUT-GEMM", "GSM8K, weights of 4 bits in groups of 128", "qllm, LUT-GEMM", QLLM, LLAMA31,
        (GSM8K,),
        rows(
            LLAMA31,
            ("16 bits", FULL, "75.97"),
            ("RTN, 4 bits, groups", rtn(4, groups=True), "69.75"),
            ("GPTQ, 4 bits, groups", gptq(4, groups=True), "70.96"),
            ("LUT-GEMM, 4 bits, groups", bcq(4, groups=True), "58.38"),
        ),
        ("the page does not say the groups; the values fit 128, not rows", SIXTEEN_BITS),
    ),
)  # fmt: skip
