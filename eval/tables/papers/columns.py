"""Columns and rows that several published tables share, and how their figures are written down.

qllm (github.com/aiha-lab/qllm-infer) measures perplexity on plain windows of 2048 tokens, C4 in its old draw, and tasks
by lm-eval without shots, MMLU by the harness' own prompts. IntactKV starts every window with [BOS], and takes C4's
first 1100 validation texts.

qllm's lm-eval (0.4.2) put nothing in front of a causal model's prompts, so its tasks are asked without [BOS] where no
prefix stands in front, and once more with it: that is what [B] is compared with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from eval.tables.declared import BOS, BOS_ALONE, Arm, Figure, Measure, Method, Row, with_arms

__all__ = ["BIGBENCH", "C4", "C4_OLD", "C4_WINDOWS", "CSQA", "FULL", "GSM8K", "LLAMA31", "MMLU", "PERPLEXITY",
           "QLLM", "SIX", "SIXTEEN_BITS", "TRUTHFULQA", "WIKITEXT", "acc", "behind_bos", "by_models",
           "mean", "rows", "task_averages"]  # fmt: skip

LLAMA31 = ("llama-3.1-instruct-8b",)  # the model of most of qllm's tables
QLLM = "windows of 2048 tokens of the plain stream, C4's old draw; tasks of lm-eval, % of all questions"
SIXTEEN_BITS = (
    "the 16-bit figures of Llama-3.1-8B-Instruct differ between qllm's sections, why is not said: WikiText-2 and C4 "
    "are 7.22, 10.39 (SmoothQuant, ZeroQuant, GPTQ, LUT-GEMM), 7.24, 10.34 (KIVI, KVQuant) and 7.24, 10.41 (SpQR); the "
    "mean of six tasks is 71.81 or (KIVI, KVQuant, SpQR) 71.89, MMLU 67.81 or 67.92, GSM8K 75.97 or 76.27"
)
C4_WINDOWS = (
    "C4: the page scored as many windows of it as WikiText-2 has (about 141 of 256 with Llama-3's tokenizer, 166 with "
    "Llama-2's); ours are all 256"
)
FULL = Method("FP16")

GPTQ_PROTOCOL = ("--protocol", "gptq")
WIKITEXT = Measure("WikiText-2", item="wikitext2", options=GPTQ_PROTOCOL)
C4_OLD = Measure("C4", item="c4-old", options=GPTQ_PROTOCOL)
C4 = Measure("C4", item="c4", options=("--protocol", "intactkv"))
PERPLEXITY = (WIKITEXT, C4_OLD)

NAMES: Mapping[str, str] = {
    "boolq": "BoolQ", "arc_challenge": "ARC-C", "arc_easy": "ARC-E", "hellaswag": "HellaSwag", "piqa": "PIQA",
    "winogrande": "WinoGrande", "openbookqa": "OBQA", "lambada_openai": "LAMBADA",
}  # fmt: skip
NORMED = ("arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa")  # tasks with acc_norm


NO_BOS = ("--bos", "never")


def acc(*tasks: str) -> tuple[Measure, ...]:
    """Columns of plain accuracy, as qllm asks."""
    return tuple(Measure(NAMES[task], "tasks", task, alone=NO_BOS, metric="acc", better="higher") for task in tasks)


def behind_bos(*measures: Measure) -> tuple[Measure, ...]:
    """The same columns with [BOS] in front of every prompt, as IntactKV asks, and `eval tasks` by default."""
    return tuple(replace(measure, alone=()) for measure in measures)


def mean(head: str, of: Sequence[Measure]) -> Measure:
    """The column that is the plain mean of others."""
    return Measure(head, "tasks", alone=of[0].alone, better="higher", average_of=tuple(m.head for m in of))


def task_averages(head: str, *tasks: str) -> tuple[Measure, ...]:
    """The mean with acc_norm where a task has it, called `head`, the mean of plain acc, then the tasks' own columns."""
    plain = behind_bos(*acc(*tasks))
    normed = [replace(m, metric="acc_norm") if m.item in NORMED else m for m in plain]
    also = [replace(m, head=f"{m.head}, acc") if m.item in NORMED else m for m in plain]
    return (mean(head, normed), mean("mean of acc", also), *dict.fromkeys((*normed, *also)))


SIX = acc("boolq", "arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande")
CSQA = (*SIX, mean("CSQA average", SIX))
MMLU = Measure("MMLU", "tasks", "mmlu", ("--protocol", "lm-eval", "--fewshot", "0"), NO_BOS, "acc", "higher")
GSM8K = Measure("GSM8K", "tasks", "gsm8k", (), NO_BOS, "exact_match,strict-match", "higher", generates=True)
TRUTHFULQA = Measure("TruthfulQA", "tasks", "truthfulqa_gen", (), NO_BOS, "bleu_acc", "higher", generates=True)
BIGBENCH = Measure("BigBench", "tasks", "bbh", (), NO_BOS, "exact_match,get-answer", "higher", generates=True)


def by_models(models: Sequence[str], text: str) -> dict[str, tuple[Figure, ...]]:
    """Figures by model. text: `7.36 6.82 | 6.97 6.47`, of every measure a figure for each model; of one model alone its
    figures, `84.16 51.96 –`; – is one that is not given."""
    parts = [[None if word == "–" else float(word) for word in part.split()] for part in text.split("|")]
    columns = [(figure,) for figure in parts[0]] if len(models) == 1 else parts
    return dict(zip(models, zip(*columns, strict=True), strict=True))


def rows(
    models: Sequence[str], *lines: tuple[str, Method, str], arms: Sequence[Arm] = (BOS_ALONE, BOS)
) -> tuple[Row, ...]:
    """Rows of a label, a method and its figures, see `by_models`; each behind our arms, too, where that makes sense."""
    return with_arms([Row(label, method, published=by_models(models, text)) for label, method, text in lines], *arms)
