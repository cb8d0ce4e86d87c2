"""ZeroQuant (Yao et al., NeurIPS 2022, arXiv:2206.01861) on qllm's page, beside SmoothQuant, RTN and GPTQ.

Every matrix of Llama-3.1-8B is cut into 4096 runs; other models get one grid per row.
"""

from dataclasses import replace

from eval.tables.declared import Method, Paper
from eval.tables.papers.columns import C4_WINDOWS, CSQA, FULL, LLAMA31, MMLU, PERPLEXITY, QLLM, SIXTEEN_BITS, rows
from eval.tables.papers.gptq import gptq, rtn
from eval.tables.papers.smoothquant import SMOOTH_W8A8

__all__ = ["TABLES"]


def _zeroquant(bits: str) -> Method:
    cut = (LLAMA31[0], ("--set", "weights.groups=4096"))
    return Method("ZeroQuant", f"zeroquant-{bits}", by_model=(cut,), quantizes=True)


def _distilled(bits: str, lr: str, steps: int) -> Method:
    """The last block alone, 4 samples a step, on the page's text."""
    fields = ("blocks=last", f"lr={lr}", f"steps={steps}", "batch=4")
    words = tuple(word for field in fields for word in ("--set", f"tuning.{field}"))
    text = ("--calibration", "wikitext2", "--calibration-samples", "128", "--calibration-length", "2048", "--seed", "0")
    return replace(_zeroquant(f"{bits}-lkd"), name="LKD", options=words, text=text, calibrates=True)


DISTILLED = (
    "the page trains on all pieces and keeps the weights of the last step; ours hold 4 pieces out and keep the weights "
    "that are best on those"
)
W8A8, W4_8A16, W4_8A8, W4A4 = map(_zeroquant, ("w8a8", "w4-8a16", "w4-8a8", "w4a4"))
LABELS = ("16 bits", "SmoothQuant, W8A8", "RTN, W4A16", "GPTQ, W4A16", "ZeroQuant, W8A8", "ZeroQuant, W4/8A16",
          "ZeroQuant, W4/8A8", "ZeroQuant, W4A4")  # fmt: skip
METHODS = (FULL, SMOOTH_W8A8, rtn(4), gptq(4), W8A8, W4_8A16, W4_8A8, W4A4)

TABLES = (
    Paper(
        "zeroquant-perplexity", "ZeroQuant", "perplexity by bits, without distillation", "qllm, ZeroQuant", QLLM,
        LLAMA31, PERPLEXITY,
        rows(LLAMA31, *zip(
            LABELS, METHODS,
            ("7.22 10.39", "7.28 10.41", "9.46 13.64", "8.59 12.49", "7.34 10.48", "8.97 12.63", "9.17 12.87",
             "278.39 288.77"), strict=True,
        )),
        ("W4/8 has weights of 4 bits in the MLP and of 8 in attention, 4.77 in the mean; its 8.97 is better than RTN's "
         "9.46, where the page's text says worse", C4_WINDOWS, SIXTEEN_BITS),
    ),
    Paper(
        "zeroquant-accuracy", "ZeroQuant", "six tasks and MMLU by bits, without distillation", "qllm, ZeroQuant", QLLM,
        LLAMA31, (*CSQA, MMLU),
        rows(LLAMA31, *zip(
            LABELS, METHODS,
            ("84.16 51.96 81.82 59.12 79.87 73.95 71.81 67.81", "84.22 52.22 82.37 59.25 79.65 73.95 71.94 67.44",
             "80.09 49.15 79.04 56.14 77.69 72.30 69.07 59.74", "81.53 42.92 74.66 57.08 77.20 70.09 67.25 62.78",
             "84.31 51.96 81.06 59.01 80.08 72.93 71.56 67.03", "83.18 50.51 80.09 56.95 78.67 71.67 70.18 62.56",
             "82.94 49.49 80.64 56.72 77.80 70.96 69.76 61.89", "44.86 19.88 30.26 28.05 55.01 50.12 38.03 23.81"),
            strict=True,
        )),
        (SIXTEEN_BITS,),
    ),
    Paper(
        "zeroquant-distillation", "ZeroQuant", "perplexity, the last block distilled", "qllm, ZeroQuant, LKD", QLLM,
        LLAMA31, tuple(replace(measure, digits=3) for measure in PERPLEXITY),
        rows(
            LLAMA31,
            ("W4/8A16", W4_8A16, "8.972 12.633"),
            ("W4/8A16, lr 5e-6, 100 steps", _distilled("w4-8a16", "5e-6", 100), "8.969 –"),
            ("W4/8A16, lr 5e-6, 200 steps", _distilled("w4-8a16", "5e-6", 200), "8.944 12.608"),
            ("W4/8A16, lr 5e-6, 400 steps", _distilled("w4-8a16", "5e-6", 400), "8.909 12.580"),
            ("W4/8A16, lr 5e-6, 600 steps", _distilled("w4-8a16", "5e-6", 600), "8.890 12.564"),
            ("W4A4", W4A4, "278.39 288.77"),
            ("W4A4, lr 1e-6, 100 steps", _distilled("w4a4", "1e-6", 100), "258.00 269.39"),
            ("W4A4, lr 1e-6, 200 steps", _distilled("w4a4", "1e-6", 200), "251.18 261.74"),
            ("W4A4, lr 1e-6, 400 steps", _distilled("w4a4", "1e-6", 400), "246.28 256.30"),
        ),
        ("distilled on 128 pieces of 2048 tokens of WikiText-2's training text, 4 of them a step; C4 of the run with "
         "100 steps is not given", DISTILLED, C4_WINDOWS),
    ),
)  # fmt: skip
