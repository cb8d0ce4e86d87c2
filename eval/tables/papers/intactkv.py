"""IntactKV's Tables 1 to 5 (Liu et al., Findings of ACL 2024, arXiv:2403.01241).

Tables 1 to 4: weights of 3 bits in groups of 128, nothing else quantized, in fp16; each quantizer alone and behind
IntactKV_[B], [BOS] alone; in Table 4 behind IntactKV_[P], the system prompt, and behind the same calibrated. Table 5:
weights and activations of 4 bits, and QuaRot's KV cache of 4 bits.
"""

from collections.abc import Sequence

from eval.tables.declared import ALONE, BOS, Arm, Measure, Method, Paper, Row
from eval.tables.papers.columns import C4, FULL, by_models, task_averages

__all__ = ["TABLES"]

PROMPT, TRAINED = Arm("[P]", "prompt"), Arm("[P] + Cal", "prompt", trains=("calibrate",))


def _method(name: str, recipe: str, *by_model: tuple[str, tuple[str, ...]], calibrates: bool = True) -> Method:
    return Method(name, recipe, by_model=by_model, calibrates=calibrates, quantizes=True)


RTN = _method("RTN", "rtn-w3", calibrates=False)
GPTQ = _method("GPTQ", "gptq-autogptq")
OMNIQUANT = _method("OmniQuant", "omniquant-w3")
AWQ = _method("AWQ", "awq-w3")
LLAMA2_LET = ("--set", "weights.let_lr=1e-3", "--set", "weights.alpha=0.75", "--set", "weights.aug_loss=false")
OMNIQUANT_W4A4 = _method("OmniQuant", "omniquant-w4a4", *((f"llama-2-{size}", LLAMA2_LET) for size in ("7b", "13b")))
QUAROT = _method("QuaRot", "quarot")


def _rows(models: Sequence[str], full: str, *lines: tuple[Method, tuple[str, ...]], arms: Sequence[Arm] = (ALONE, BOS),
          measures: int = 1) -> tuple[Row, ...]:  # fmt: skip
    """Full precision alone, then every method with a text of figures for every arm; only the first measure has any."""

    def row(method: Method, arm: Arm, text: str) -> Row:
        published = {model: figures + (None,) * (measures - 1) for model, figures in by_models(models, text).items()}
        return Row(method.name, method, arm, published)

    return (row(FULL, ALONE, full), *(row(method, arm, text) for method, texts in lines
                                      for arm, text in zip(arms, texts, strict=True)))  # fmt: skip


LLAMAS = ("llama-7b", "llama-13b", "llama-30b", "llama-65b", "llama-2-7b", "llama-2-13b", "llama-2-70b")
VICUNAS = ("vicuna-v1.5-7b", "vicuna-v1.5-13b", "vicuna-v1.3-7b", "vicuna-v1.3-13b", "vicuna-v1.3-33b")
JUDGED = VICUNAS[:2]
W4A4_MODELS = ("llama-7b", "llama-13b", "llama-2-7b", "llama-2-13b", "llama-3-8b")
PERPLEXITY = "C4 (first 1100 validation texts), windows of 2048 tokens that all start with [BOS], at most 256, fp16"
MMLU = Measure("MMLU", "tasks", "mmlu", ("--protocol", "hendrycks", "--fewshot", "5"), metric="acc", better="higher")
QA = task_averages(
    "QA average", "openbookqa", "winogrande", "arc_challenge", "arc_easy", "boolq", "hellaswag", "lambada_openai"
)
GRADE = Measure("MT-bench", "judge", better="higher")

TABLES = (
    Paper(
        "intactkv-1", "IntactKV", "perplexity, weights of 3 bits in groups of 128", "Table 1", PERPLEXITY,
        LLAMAS, (C4,),
        _rows(
            LLAMAS, "7.36 6.82 6.15 5.83 7.28 6.75 5.73",
            (RTN, ("9.15 7.89 6.85 6.33 8.97 7.60 6.27", "8.52 7.66 6.69 6.20 8.61 7.48 6.13")),
            (GPTQ, ("8.59 7.49 6.73 6.29 9.58 7.43 6.33", "8.30 7.42 6.62 6.23 9.27 7.36 6.28")),
            (OMNIQUANT, ("8.26 7.39 6.65 6.18 8.35 7.43 6.12", "8.25 7.39 6.64 6.18 8.33 7.40 6.11")),
            (AWQ, ("8.26 7.38 6.59 6.16 8.31 7.32 6.05", "8.12 7.36 6.54 6.12 8.18 7.29 6.04")),
        ),
    ),
    Paper(
        "intactkv-2", "IntactKV", "MMLU, weights of 3 bits in groups of 128", "Table 2",
        "57 subjects, 14,042 test questions, 5 shots, Hendrycks' prompts of at most 2048 tokens", VICUNAS, (MMLU,),
        _rows(
            VICUNAS, "49.84 55.78 47.12 52.10 59.30",
            (RTN, ("44.62 51.44 39.33 44.56 53.18", "45.93 51.89 41.74 46.73 55.20")),
            (GPTQ, ("43.99 52.95 40.12 47.83 55.84", "44.86 52.49 41.55 48.53 56.32")),
            (OMNIQUANT, ("46.62 52.82 42.95 48.23 55.21", "46.27 52.67 43.85 48.31 55.51")),
            (AWQ, ("46.45 52.92 43.08 48.56 56.09", "46.87 53.58 44.67 49.05 56.91")),
        ),
    ),
    Paper(
        "intactkv-3", "IntactKV", "seven question answering tasks, weights of 3 bits in groups of 128", "Table 3",
        "lm-eval, no shots, whole test or validation splits, % of all questions", VICUNAS, QA,
        _rows(
            VICUNAS, "65.33 68.38 64.52 67.22 69.53",
            (RTN, ("61.36 66.12 59.05 63.43 67.33", "61.94 65.91 61.26 63.94 67.95")),
            (GPTQ, ("58.61 66.34 59.56 65.11 66.66", "59.12 66.53 60.46 65.13 67.93")),
            (OMNIQUANT, ("62.30 65.58 60.89 64.62 67.61", "62.01 65.67 60.66 64.89 67.61")),
            (AWQ, ("62.18 66.51 60.75 64.56 67.67", "62.49 66.93 61.93 65.02 67.90")),
            measures=len(QA),
        ),
        ("QA average: acc_norm where a task defines it, else acc; that the paper averages so is inferred, hence the "
         "mean of acc beside it",),
    ),
    Paper(
        "intactkv-4", "IntactKV", "MT-bench score, weights of 3 bits in groups of 128", "Table 4",
        "80 questions of two turns, judged by gpt-4-0125-preview (inferred from the reference answers)",
        JUDGED, (GRADE,),
        _rows(
            JUDGED, "5.31 5.52",
            (RTN, ("4.34 5.13", "4.72 5.27", "4.73 5.30")),
            (OMNIQUANT, ("4.78 5.05", "4.94 5.10", "4.85 5.24")),
            (AWQ, ("4.74 5.17", "4.68 5.34", "4.84 5.44")),
            arms=(ALONE, PROMPT, TRAINED),
        ),
        ("judged only if a judge is named; scores of different judges do not compare",
         "the published code's three answer seeds change the order of the questions, not the answers: one, 42, is "
         "answered here"),
    ),
    Paper(
        "intactkv-5", "IntactKV", "perplexity, weights and activations of 4 bits, QuaRot with a KV cache of 4 bits",
        "Table 5", PERPLEXITY, W4A4_MODELS, (C4,),
        _rows(
            W4A4_MODELS, "7.36 6.82 7.28 6.75 9.48",
            (OMNIQUANT_W4A4, ("17.03 15.65 21.40 16.24 –", "16.24 13.87 20.01 15.91 –")),
            (QUAROT, ("8.23 7.40 8.30 7.51 13.42", "8.05 7.32 8.12 7.25 12.23")),
        ),
    ),
)  # fmt: skip
