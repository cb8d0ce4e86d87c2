"""IntactKV's Tables 1 to 5 (Liu et al., Findings of ACL 2024, arXiv:2403.01241).

Tables 1 to 4: weights of 3 bits in groups of 128, nothing else quantized, in fp16; each quantizer alone and behind
IntactKV_[B], [BOS] alone; in Table 4 behind IntactKV_[P], the system prompt, and the same calibrated (+Cal). Table 5:
weights and activations of 4 bits, and QuaRot's KV cache.
"""

from eval.tables.declared import ALONE, BOS, Arm, Method, Paper, Row
from eval.tables.papers.columns import C4, by_models

__all__ = ["TABLES"]

FP16 = Method("FP16")
METHODS = {
    name: Method(name, recipe, calibrates=name != "RTN", quantizes=True)
    for name, recipe in {"RTN": "rtn-w3", "GPTQ": "gptq-autogptq", "OmniQuant": "omniquant-w3", "AWQ": "awq-w3"}.items()
}


def _rows(
    models: tuple[str, ...], full: str, methods: dict[str, Method], arms: tuple[Arm, ...], **texts: tuple[str, ...]
) -> tuple[Row, ...]:
    """Full precision alone, then every method behind each arm. texts: by method a text for every arm."""
    rows = [Row("FP16", FP16, published=by_models(models, full))]
    for name, lines in texts.items():
        rows += [Row(name, methods[name], arm, by_models(models, line)) for arm, line in zip(arms, lines, strict=True)]
    return tuple(rows)


LLAMAS = ("llama-7b", "llama-13b", "llama-30b", "llama-65b", "llama-2-7b", "llama-2-13b", "llama-2-70b")

TABLES = (
    Paper(
        "intactkv-1", "IntactKV", "perplexity, weights of 3 bits in groups of 128", "Table 1",
        "C4 (first 1100 validation texts), windows of 2048 tokens that all start with [BOS], at most 256",
        LLAMAS, (C4,),
        _rows(
            LLAMAS, "7.36 6.82 6.15 5.83 7.28 6.75 5.73", METHODS, (ALONE, BOS),
            RTN=("9.15 7.89 6.85 6.33 8.97 7.60 6.27", "8.52 7.66 6.69 6.20 8.61 7.48 6.13"),
            GPTQ=("8.59 7.49 6.73 6.29 9.58 7.43 6.33", "8.30 7.42 6.62 6.23 9.27 7.36 6.28"),
            OmniQuant=("8.26 7.39 6.65 6.18 8.35 7.43 6.12", "8.25 7.39 6.64 6.18 8.33 7.40 6.11"),
            AWQ=("8.26 7.38 6.59 6.16 8.31 7.32 6.05", "8.12 7.36 6.54 6.12 8.18 7.29 6.04"),
        ),
    ),
)  # fmt: skip
