"""IntactKV's Tables 1 to 5 as data (Liu et al., Findings of ACL 2024, arXiv:2403.01241), and what they stand for.

Tables 1 to 4: weights of 3 bits in groups of 128 (INT3-g128, asymmetric), nothing else quantized, computed in fp16.
Tables 1 to 3 compare each quantizer alone with the same weights behind IntactKV_[B] ([BOS] alone); Table 4 with
IntactKV_[P] ([BOS], system prompt and " USER:") and with the same prefix calibrated (+Cal). Table 5: weights and
activations of 4 bits, and QuaRot's KV cache. Models have their names in modelzoo/.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from corpora.catalog import FAMILIES

__all__ = [
    "BITS",
    "FULL",
    "GROUP_SIZE",
    "METHODS",
    "QUESTIONS",
    "TABLES",
    "WHOLE_METHODS",
    "PublishedTable",
    "paper_name",
]

BITS = 3
GROUP_SIZE = 128


FULL = "FP16"
# The quantizers by their names, which are also how a record's recipe spells their kind, and their named recipes.
METHODS: Mapping[str, str] = {"RTN": "rtn-w3", "GPTQ": "gptq-autogptq", "OmniQuant": "omniquant-w3", "AWQ": "awq-w3"}
# Those that quantize more than weights.
WHOLE_METHODS: Mapping[str, str] = {"OmniQuant": "omniquant-w4a4", "QuaRot": "quarot"}

# How many questions the published accuracies are of, by task: MMLU's test files, and the splits that lm-eval scores.
QUESTIONS: Mapping[str, int] = {
    "mmlu": 14042,
    "openbookqa": 500,
    "winogrande": 1267,
    "arc_challenge": 1172,
    "arc_easy": 2376,
    "boolq": 3270,
    "hellaswag": 10042,
    "lambada_openai": 5153,
}


@dataclass(frozen=True)
class PublishedTable:
    """One table. full: figures in full precision, per model. figures: method → arm → model, in their order here.

    arms: what stands behind a method's name; the first is the method alone. protocol: what one figure is.
    better: lower or higher. quantized, grids: to how many bits, and with which groups, in words. recipes: our named
    recipes by method. group_size: of the weights, −1 for whole rows.
    """

    number: int
    title: str
    protocol: str
    better: str
    models: tuple[str, ...]
    arms: tuple[str, ...]
    full: tuple[float, ...]
    figures: Mapping[str, tuple[tuple[float | None, ...], ...]]  # method → arm → model; None: not published
    quantized: str = f"weights of {BITS} bits"
    grids: str = f"groups of {GROUP_SIZE}, fp16"
    recipes: Mapping[str, str] = field(default_factory=lambda: METHODS)
    group_size: int = GROUP_SIZE

    def value(self, model: str, method: str, arm: str) -> float | None:
        """The figure of a place in the table; FULL stands for full precision, whatever the arm."""
        if model not in self.models:
            return None
        column = self.models.index(model)
        return self.full[column] if method == FULL else self.figures[method][self.arms.index(arm)][column]


B_ARMS = ("", "+ IntactKV_[B]")
VICUNA = ("vicuna-v1.5-7b", "vicuna-v1.5-13b", "vicuna-v1.3-7b", "vicuna-v1.3-13b", "vicuna-v1.3-33b")

TABLES: Mapping[int, PublishedTable] = {
    1: PublishedTable(
        number=1,
        title="perplexity",
        protocol="C4 (first 1100 validation texts), windows of 2048 tokens that all start with [BOS], at most 256",
        better="lower",
        models=("llama-7b", "llama-13b", "llama-30b", "llama-65b", "llama-2-7b", "llama-2-13b", "llama-2-70b"),
        arms=B_ARMS,
        full=(7.36, 6.82, 6.15, 5.83, 7.28, 6.75, 5.73),
        figures={
            "RTN": ((9.15, 7.89, 6.85, 6.33, 8.97, 7.60, 6.27), (8.52, 7.66, 6.69, 6.20, 8.61, 7.48, 6.13)),
            "GPTQ": ((8.59, 7.49, 6.73, 6.29, 9.58, 7.43, 6.33), (8.30, 7.42, 6.62, 6.23, 9.27, 7.36, 6.28)),
            "OmniQuant": ((8.26, 7.39, 6.65, 6.18, 8.35, 7.43, 6.12), (8.25, 7.39, 6.64, 6.18, 8.33, 7.40, 6.11)),
            "AWQ": ((8.26, 7.38, 6.59, 6.16, 8.31, 7.32, 6.05), (8.12, 7.36, 6.54, 6.12, 8.18, 7.29, 6.04)),
        },
    ),
    2: PublishedTable(
        number=2,
        title="MMLU, 5 shots, accuracy in % of all questions",
        protocol="57 subjects, 14,042 test questions, Hendrycks' prompts of at most 2048 tokens",
        better="higher",
        models=VICUNA,
        arms=B_ARMS,
        full=(49.84, 55.78, 47.12, 52.10, 59.30),
        figures={
            "RTN": ((44.62, 51.44, 39.33, 44.56, 53.18), (45.93, 51.89, 41.74, 46.73, 55.20)),
            "GPTQ": ((43.99, 52.95, 40.12, 47.83, 55.84), (44.86, 52.49, 41.55, 48.53, 56.32)),
            "OmniQuant": ((46.62, 52.82, 42.95, 48.23, 55.21), (46.27, 52.67, 43.85, 48.31, 55.51)),
            "AWQ": ((46.45, 52.92, 43.08, 48.56, 56.09), (46.87, 53.58, 44.67, 49.05, 56.91)),
        },
    ),
    3: PublishedTable(
        number=3,
        title="seven question answering tasks, no shots, average accuracy in %",
        protocol="lm-evaluation-harness: openbookqa, winogrande, arc_challenge, arc_easy, boolq, hellaswag, "
        "lambada_openai, whole test or validation splits",
        better="higher",
        models=VICUNA,
        arms=B_ARMS,
        full=(65.33, 68.38, 64.52, 67.22, 69.53),
        figures={
            "RTN": ((61.36, 66.12, 59.05, 63.43, 67.33), (61.94, 65.91, 61.26, 63.94, 67.95)),
            "GPTQ": ((58.61, 66.34, 59.56, 65.11, 66.66), (59.12, 66.53, 60.46, 65.13, 67.93)),
            "OmniQuant": ((62.30, 65.58, 60.89, 64.62, 67.61), (62.01, 65.67, 60.66, 64.89, 67.61)),
            "AWQ": ((62.18, 66.51, 60.75, 64.56, 67.67), (62.49, 66.93, 61.93, 65.02, 67.90)),
        },
    ),
    4: PublishedTable(
        number=4,
        title="MT-bench score, 1 to 10",
        protocol="80 questions of two turns, judged by gpt-4-0125-preview (inferred from the reference answers)",
        better="higher",
        models=("vicuna-v1.5-7b", "vicuna-v1.5-13b"),
        arms=("", "+ IntactKV_[P]", "+ IntactKV_[P] + Cal"),
        full=(5.31, 5.52),
        figures={
            "RTN": ((4.34, 5.13), (4.72, 5.27), (4.73, 5.30)),
            "OmniQuant": ((4.78, 5.05), (4.94, 5.10), (4.85, 5.24)),
            "AWQ": ((4.74, 5.17), (4.68, 5.34), (4.84, 5.44)),
        },
    ),
    5: PublishedTable(
        number=5,
        title="perplexity",
        protocol="C4 (first 1100 validation texts), windows of 2048 tokens that all start with [BOS], at most 256",
        better="lower",
        models=("llama-7b", "llama-13b", "llama-2-7b", "llama-2-13b", "llama-3-8b"),
        arms=B_ARMS,
        full=(7.36, 6.82, 7.28, 6.75, 9.48),
        figures={
            "OmniQuant": ((17.03, 15.65, 21.40, 16.24, None), (16.24, 13.87, 20.01, 15.91, None)),
            "QuaRot": ((8.23, 7.40, 8.30, 7.51, 13.42), (8.05, 7.32, 8.12, 7.25, 12.23)),
        },
        quantized="weights and activations of 4 bits, QuaRot with a KV cache of 4 bits",
        grids="one grid per row of weights and per token, fp16",
        recipes=WHOLE_METHODS,
        group_size=-1,
    ),
}


def paper_name(model: str) -> str:
    """A model's name as the tables spell it: the hub's `Llama-2-7b-hf` is `llama-2-7b`; others stay as they are."""
    for family, known in FAMILIES.items():
        for size, hub_id in known.sizes.items():
            if hub_id is not None and model.lower() == hub_id.rpartition("/")[2].lower():
                return f"{family}-{size}"
    return model
