"""The five needles on qllm's page: a pass key at half depth of about 30,000 tokens, answer by answer."""

from eval.tables.declared import BOS, Measure, Method, Paper, Row, with_arms
from eval.tables.papers.columns import FULL, LLAMA31
from eval.tables.papers.kivi import KIVI_2, KIVI_4
from eval.tables.papers.kvquant import FOUR, THREE, TWO

__all__ = ["TABLES"]

KEYS = ("47x291", "8a3605", "1294k8", "590p37", "68v423")
ANSWERS = tuple(
    Measure(key, "needle", options=("--published",), metric=key, better="words", generates=True) for key in KEYS
)
FOUND = Measure("found, %", "needle", options=("--published",), better="higher", generates=True, digits=0)
PROTOCOL = "five keys, each at half depth of 1,270 lines of filler; as many new tokens as the key has, and one"
NOTES = (
    "greedy; the page's answers are drawn as the model's generation_config says, so one of five may differ by luck",
    "the sentences around the keys are this project's own; the keys, their place and the length are the page's",
)


def _table(name: str, project: str, *lines: tuple[str, Method, str, float]) -> Paper:
    """The needles of a method. lines: of a label, a method, five answers, and how many of them are found, in %."""
    rows = [
        Row(label, method, published={LLAMA31[0]: (*answers.split("|"), found)})
        for label, method, answers, found in lines
    ]
    source = f"qllm, {project}, Retrieval Abilities"
    return Paper(name, project, "needles in a haystack, KV cache rounded", source, PROTOCOL, LLAMA31,
                 (*ANSWERS, FOUND), with_arms(rows, BOS), NOTES)  # fmt: skip


FULL_LINE = ("16 bits", FULL, "47x291.|8a3605.|1294k8.|5940. The|68v423.", 80.0)

TABLES = (
    _table(
        "kivi-needle", "KIVI", FULL_LINE,
        ("KIVI, 4 bits", KIVI_4, "47x291.|8a3605.|1294k8.|5940. The|68v423.", 80.0),
        ("KIVI, 2 bits", KIVI_2, "47x. The|8a3605.|1294k.|594p37.|68v423.", 40.0),
    ),
    _table(
        "kvquant-needle", "KVQuant", FULL_LINE,
        ("KVQuant, 4 bits", FOUR, "47x291.|8a3605.|1294k8.|5940. The|68v423.", 80.0),
        ("KVQuant, 3 bits", THREE, "47x291.|8a3605.|1294k8.|594p37.|68v423.", 80.0),
        ("KVQuant, 2 bits", TWO, "47x29.|8a3605.|1294k8.|5940. The|68v43.", 40.0),
    ),
)  # fmt: skip
