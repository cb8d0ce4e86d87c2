"""The conversations on qllm's page: one question to each setting, asked to no past, and what came of it.

A published cell is our verdict on the answer that the page prints; its sentences are not copied.
"""

from eval.tables.declared import BOS, Measure, Method, Paper, Row, with_arms
from eval.tables.papers.columns import FULL, LLAMA31
from eval.tables.papers.gptq import gptq, rtn
from eval.tables.papers.kivi import KIVI_2, KIVI_4
from eval.tables.papers.kvquant import FOUR, THREE, TWO
from eval.tables.papers.lutgemm import bcq
from eval.tables.papers.smoothquant import rtn as rtn_both
from eval.tables.papers.smoothquant import smooth
from eval.tables.papers.spqr import SPQR_3, SPQR_4
from eval.tables.papers.zeroquant import W4_8A8, W4_8A16, W4A4, W8A8

__all__ = ["TABLES"]

RIDDLE = Measure("riddle", "chat", "riddle", better="words", generates=True)
DISTILLATION = Measure("distillation", "chat", "distillation", better="words", generates=True)
PROTOCOL = "one question, no past, the model's own chat template; greedy, at most 128 new tokens"
RIGHT, DEFINED, REPEATED = "right (3rd, 4th)", "a definition", "repetition"
NOTES = (
    "published: our verdict on the answer that the page prints; ours: what the model says, to be judged by the reader",
    "the question is that of the page in other words, and no system message is given, where the page has one of a line",
    "the page's prompts open with two [BOS] on Llama-3, the chat template's and the tokenizer's; ours have one",
)


def _table(name: str, project: str, title: str, measure: Measure, *lines: tuple[str, Method, str]) -> Paper:
    """A conversation. lines: of a label, a method, and the verdict."""
    rows = [Row(label, method, published={LLAMA31[0]: (verdict,)}) for label, method, verdict in lines]
    source = f"qllm, {project}, Conversational Abilities"
    return Paper(name, project, title, source, PROTOCOL, LLAMA31, (measure,), with_arms(rows, BOS), NOTES)


TABLES = (
    _table(
        "smoothquant-chat", "SmoothQuant", "a riddle, W8A8 and W6A6 with and without smoothing", RIDDLE,
        ("16 bits", FULL, RIGHT), ("W8A8", rtn_both(8), RIGHT), ("W8A8, smoothed", smooth(8), RIGHT),
        ("W6A6", rtn_both(6), "wrong (2nd, 3rd)"), ("W6A6, smoothed", smooth(6), RIGHT),
    ),
    _table(
        "zeroquant-chat", "ZeroQuant", "a riddle, by bits", RIDDLE,
        ("16 bits", FULL, RIGHT), ("W8A8", W8A8, "wrong (4th)"), ("W4/8A16", W4_8A16, RIGHT),
        ("W4/8A8", W4_8A8, RIGHT), ("W4A4", W4A4, "nonsense"),
    ),
    _table(
        "gptq-chat", "GPTQ", "a definition, weights with one grid per row", DISTILLATION,
        ("16 bits", FULL, DEFINED), ("RTN, 4 bits", rtn(4), DEFINED), ("GPTQ, 4 bits", gptq(4), DEFINED),
        ("RTN, 3 bits", rtn(3), REPEATED), ("GPTQ, 3 bits", gptq(3), REPEATED),
    ),
    _table(
        "lutgemm-chat", "LUT-GEMM", "a definition, weights of 4 bits", DISTILLATION,
        ("16 bits", FULL, DEFINED), ("RTN, rows", rtn(4), DEFINED), ("GPTQ, rows", gptq(4), DEFINED),
        ("LUT-GEMM, groups", bcq(4, groups=True), DEFINED),
    ),
    _table(
        "spqr-chat", "SpQR", "a definition", DISTILLATION,
        ("16 bits", FULL, DEFINED), ("SpQR, 3.99 bits", SPQR_4, DEFINED), ("SpQR, 3.07 bits", SPQR_3, DEFINED),
    ),
    _table(
        "kivi-chat", "KIVI", "a definition, KV cache rounded", DISTILLATION,
        ("16 bits", FULL, DEFINED), ("KIVI, 4 bits", KIVI_4, DEFINED), ("KIVI, 2 bits", KIVI_2, DEFINED),
    ),
    _table(
        "kvquant-chat", "KVQuant", "a definition, KV cache rounded", DISTILLATION,
        ("16 bits", FULL, DEFINED), ("KVQuant, 4 bits", FOUR, DEFINED), ("KVQuant, 3 bits", THREE, DEFINED),
        ("KVQuant, 2 bits", TWO, DEFINED),
    ),
)  # fmt: skip
