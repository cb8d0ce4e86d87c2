"""Columns that several published tables share, and how their figures are written down.

qllm (github.com/aiha-lab/qllm-infer): plain windows of 2048 tokens, C4's old draw; tasks of lm-eval without shots, MMLU
by the harness' own prompts. IntactKV: [BOS] in every window, C4's first 1100 validation texts.
"""

from collections.abc import Mapping, Sequence

from eval.tables.declared import Figure, Measure

__all__ = [
    "BIGBENCH",
    "C4",
    "C4_OLD",
    "CSQA",
    "GSM8K",
    "LLAMA31",
    "MMLU",
    "QLLM",
    "TASKS",
    "TRUTHFULQA",
    "WIKITEXT",
    "acc",
    "by_models",
    "figures",
    "mean",
]  # fmt: skip

LLAMA31 = "llama-3.1-instruct-8b"  # the model of most of qllm's tables
QLLM = (
    "plain windows of 2048 tokens, C4's old draw of 256 windows; tasks of lm-eval, acc in % of all questions, no shots"
)

GPTQ_PROTOCOL = ("--protocol", "gptq")
WIKITEXT = Measure("WikiText-2", item="wikitext2", options=GPTQ_PROTOCOL)
C4_OLD = Measure("C4", item="c4-old", options=GPTQ_PROTOCOL)
C4 = Measure("C4", item="c4", options=("--protocol", "intactkv"))

NAMES: Mapping[str, str] = {
    "boolq": "BoolQ", "arc_challenge": "ARC-C", "arc_easy": "ARC-E", "hellaswag": "HellaSwag", "piqa": "PIQA",
    "winogrande": "WinoGrande",
}  # fmt: skip


def acc(*tasks: str) -> tuple[Measure, ...]:
    """Columns of plain accuracy."""
    return tuple(Measure(NAMES[task], "tasks", task, metric="acc", better="higher") for task in tasks)


def mean(head: str, of: Sequence[Measure]) -> Measure:
    """The column that is the plain mean of others."""
    return Measure(head, "tasks", better="higher", average_of=tuple(measure.head for measure in of))


TASKS = acc(*NAMES)
CSQA = (*TASKS, mean("CSQA average", TASKS))
MMLU = Measure("MMLU", "tasks", "mmlu", ("--protocol", "lm-eval", "--fewshot", "0"), "acc", "higher")
GSM8K = Measure("GSM8K", "tasks", "gsm8k", (), "exact_match,strict-match", "higher", generates=True)
TRUTHFULQA = Measure("TruthfulQA", "tasks", "truthfulqa_gen", (), "bleu_acc", "higher", generates=True)
BIGBENCH = Measure("BigBench", "tasks", "bbh", (), "exact_match,get-answer", "higher", generates=True)


def figures(text: str) -> tuple[Figure, ...]:
    """Figures in the order of the columns: `84.16 5.8e3 –`, where – is one that is not given."""
    return tuple(None if word == "–" else float(word) for word in text.split())


def by_models(models: Sequence[str], text: str) -> dict[str, tuple[Figure, ...]]:
    """Figures by model, from a table whose columns are models: `7.36 6.82 | 6.97 6.47`, a part for every measure."""
    parts = [figures(part) for part in text.split("|")]
    return dict(zip(models, zip(*parts, strict=True), strict=True))
