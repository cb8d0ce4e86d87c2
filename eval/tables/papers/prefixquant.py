"""PrefixQuant (Chen et al., 2024, arXiv:2410.05265): static and dynamic grids of 4 or 8 bits behind outlier tokens,
with and without fine-tuning; and the whole command of its fork that trains a prefix (docs/prefixquant.md).

The pages give no figures. Those of W4A4KV4 are the paper's abstract's.
"""

from dataclasses import replace

from eval.tables.declared import ALONE, BOS, Arm, Figure, Measure, Method, Paper, Row, Words
from eval.tables.papers.columns import FULL, GSM8K, PERPLEXITY, behind_bos, task_averages

__all__ = ["TABLES"]

AUTO, AUTO_64 = Arm("[auto]", "auto"), Arm("[auto@64]", "auto@64")
PROTOCOL = "windows of 2048 tokens of the plain stream, C4's old draw; five tasks of lm-eval without shots"
TASKS = task_averages("average, normed", "piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")
COLUMNS = (*PERPLEXITY, *TASKS)
LLAMA3 = "llama-3-8b"
RATES = ("--set", "tuning.quant_lr=2e-5", "--set", "tuning.weight_lr=2e-6")
# What the page gives to large models when they are fine-tuned.
LARGE = (("llama-3-70b", RATES), ("llama-3-instruct-70b", RATES), ("llama-2-70b", ("--set", "tuning.loss=skip_mse")))
ANY_MODEL = "no figures are published for these runs; the page's own call names DeepSeek-R1-Distill-Qwen-7B"
NORMED = "that the paper's mean of five tasks takes acc_norm is inferred from its size, hence the mean of acc beside it"


def _row(label: str, method: Method, arm: Arm, *figures: Figure) -> Row:
    """A row with its first figures of Llama-3-8B, if there are any."""
    published = {LLAMA3: figures + (None,) * (len(COLUMNS) - len(figures))} if figures else {}
    return Row(label, method, arm, published)


def _rows(bits: str, tuned: tuple[Figure, ...] = ()) -> tuple[Row, ...]:
    """Static and dynamic grids without a prefix, behind [B] and behind what is discovered; fine-tuned there. tuned:
    figures of the fine-tuned static ones."""
    rows = []
    for mode in ("static", "dynamic"):
        recipe = f"prefixquant-{bits}-{mode}"
        method = Method(f"PrefixQuant-{mode}", recipe, calibrates=True, quantizes=True, behind=True)
        fine = Method(f"{method.name}-ft", f"{recipe}-ft", by_model=LARGE, calibrates=True, quantizes=True, behind=True)
        rows += [_row(f"PrefixQuant, {mode}", method, arm) for arm in (ALONE, BOS, AUTO)]
        rows += [_row(f"PrefixQuant, {mode}, fine-tuned", fine, AUTO, *(tuned if mode == "static" else ()))]
    return (_row("FP16", FULL, ALONE), *rows)


QUAROT = Method("QuaRot", "quarot", calibrates=True, quantizes=True)


def _trainable(corpus: str, *more: Measure, models: tuple[str, ...]) -> Paper:
    """The fork's whole command with one calibration text: 8 trained embeddings, then ten epochs of every block."""
    fields = (
        "weights.grid.convention=gptq-asym", "activations.grid.bits=8", "activations.grid.group_size=64",
        "activations.grid.convention=minmax-asym", "kv_cache.convention=minmax-asym", "tuning.mse_init_size=8",
    )  # fmt: skip
    tuning = (
        "epochs=10", "weight_lr=5e-6", "quant_lr=5e-5", "min_lr_factor=10", "clip_grad=0.3", "batch=4", "loss=mse",
        "target=fp_input",
    )  # fmt: skip
    words: Words = ("--bits", "4", "--group-size", "128", "--k-bits", "8", "--v-bits", "8", "--kv-group-size", "64")
    words += tuple(word for field in fields for word in ("--set", field))
    fine = tuple(word for field in tuning for word in ("--set", f"tuning.{field}"))
    text = ("--calibration", corpus, "--calibration-samples", "576", "--calibration-length", "1024", "--seed", "42")
    recipe = "prefixquant-w4a8kv4-dynamic"
    plain = Method(
        "PrefixQuant", recipe, words, own_groups=True, text=text, calibrates=True, quantizes=True, behind=True
    )
    tuned = replace(plain, name="PrefixQuant-ft", recipe=f"{recipe}-ft", options=words + fine)
    trained = Arm("[trained]", "auto@64", trains=(
        "train-prefix", "--prefix-len", "8", "--prefix-lr", "1e-3", "--prefix-epochs", "20", "--prefix-loss-type", "l2",
        "--batch-size", "4", "--training-seed", "42",
    ), text=("--corpus", corpus, "--samples", "512", "--held-out", "64", "--length", "1024"))  # fmt: skip
    return Paper(
        f"prefixquant-trainable-{corpus}", "PrefixQuant", "a trained prefix, weights of 4 bits in groups of 128, "
        f"inputs and KV cache of 8 in groups of 64, by {corpus}", "the fork's README", PROTOCOL, models,
        (*COLUMNS, *more),
        (
            Row("FP16", FULL), *(Row(plain.name, plain, arm) for arm in (ALONE, BOS, AUTO_64)),
            *(Row("PrefixQuant, fine-tuned", tuned, arm) for arm in (AUTO_64, trained)),
        ),
        ("the fork publishes no figures; its names of directories say W4A4KV4, its options say W4A8KV8",),
    )  # fmt: skip


TABLES = (
    Paper(
        "prefixquant-w4a4kv4", "PrefixQuant", "perplexity and five tasks, W4A4KV4", "abstract of version 1", PROTOCOL,
        (LLAMA3,), COLUMNS,
        (
            *_rows("w4a4kv4", (7.43, None, 71.08)),
            _row("QuaRot", QUAROT, ALONE, 8.41, None, 65.10), _row("QuaRot", QUAROT, BOS),
        ),
        ("the abstract does not say whether its 7.43 and 71.08 are fine-tuned; they stand at that row", NORMED,
         "the page's own call names DeepSeek-R1-Distill-Qwen-7B and has no figures"),
    ),
    Paper(
        "prefixquant-w4a8kv4", "PrefixQuant", "perplexity and five tasks, W4A8KV4", "the page's README", PROTOCOL,
        (LLAMA3,), COLUMNS, _rows("w4a8kv4"), (ANY_MODEL,),
    ),
    _trainable("c4", models=("llama-2-7b",)),
    _trainable("wikitext2", *behind_bos(GSM8K), models=(LLAMA3, "llama-2-7b")),
)  # fmt: skip
