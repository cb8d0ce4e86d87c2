"""SmoothQuant (Xiao et al., ICML 2023, arXiv:2211.10438) on qllm's page: asymmetric grids of rows and tokens, also of
attention's products; alpha 0.55."""

from eval.tables.declared import Measure, Method, Paper
from eval.tables.papers.columns import (
    C4_OLD,
    C4_WINDOWS,
    CSQA,
    FULL,
    LLAMA31,
    MMLU,
    PERPLEXITY,
    QLLM,
    SIXTEEN_BITS,
    WIKITEXT,
    rows,
)

__all__ = ["SMOOTH_W8A8", "TABLES", "rtn", "smooth"]


def smooth(bits: int, alpha: str = "0.55") -> Method:
    """Weights and activations of so many bits, smoothed."""
    words = ("--set", f"transforms.smooth.alpha={alpha}")
    return Method("SmoothQuant", f"smoothquant-w{bits}a{bits}-qllm", words, calibrates=True, quantizes=True)


def rtn(bits: int) -> Method:
    """The same without smoothing."""
    return Method("RTN", f"rtn-w{bits}a{bits}-qllm", quantizes=True)


SMOOTH_W8A8 = smooth(8)
ALPHAS = {
    "0.35": "7.2984 10.4271", "0.40": "7.2936 10.4279", "0.45": "7.2897 10.4163", "0.50": "7.2867 10.4098",
    "0.55": "7.2840 10.4091", "0.60": "7.2907 10.4258", "0.65": "7.3198 10.4438", "0.70": "7.3182 10.4489",
    "0.75": "7.3189 10.4452", "0.80": "7.3130 10.4375", "0.85": "7.3159 10.4408", "0.90": "7.3190 10.4405",
}  # fmt: skip


def _fine(measure: Measure) -> Measure:
    """The column with the four decimals of the page."""
    return Measure(measure.head, item=measure.item, options=measure.options, digits=4)


TABLES = (
    Paper(
        "smoothquant-alpha", "SmoothQuant", "perplexity of W8A8 by alpha", "qllm, SmoothQuant, migration strength",
        QLLM, LLAMA31, (_fine(WIKITEXT), _fine(C4_OLD)),
        rows(LLAMA31, *((f"alpha {alpha}", smooth(8, alpha), text) for alpha, text in ALPHAS.items())),
        ("the page chooses alpha on the texts that it is measured on; all of its figures lie within half a percent",
         C4_WINDOWS),
    ),
    Paper(
        "smoothquant-accuracy", "SmoothQuant",
        "perplexity, six tasks and MMLU, W8A8 and W6A6 with and without smoothing", "qllm, SmoothQuant",
        QLLM, LLAMA31, (*PERPLEXITY, *CSQA, MMLU),
        rows(
            LLAMA31,
            ("16 bits", FULL, "7.22 10.39 84.16 51.96 81.82 59.12 79.87 73.95 71.81 67.81"),
            ("W8A8", rtn(8), "7.30 10.43 84.34 52.56 81.52 59.08 79.22 73.24 71.66 67.41"),
            ("W8A8, smoothed", SMOOTH_W8A8, "7.28 10.41 84.22 52.22 82.37 59.25 79.65 73.95 71.94 67.44"),
            ("W6A6", rtn(6), "8.16 11.67 83.36 50.60 79.50 57.38 76.77 70.40 69.67 63.43"),
            ("W6A6, smoothed", smooth(6), "8.12 11.60 82.87 50.34 78.79 57.88 77.80 71.74 69.90 64.01"),
        ),
        (C4_WINDOWS, SIXTEEN_BITS),
    ),
)  # fmt: skip
