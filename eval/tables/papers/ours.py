"""Tables of our own, for any model: no published figures, every arm.

`ours-weights`: every weight-only method at 4 and 3 bits in groups and at 4 bits per row. `ours-seeds`: the methods that
calibrate, for `--seeds 42 1 2 3`.
"""

from dataclasses import replace

from eval.tables.declared import ALONE, BOS, Arm, Method, Paper, Row
from eval.tables.papers.columns import C4

__all__ = ["TABLES"]

BEHIND = Arm("behind [B]", "bos", behind=True)
COLUMNS = (replace(C4, head="WikiText-2", item="wikitext2"), C4)
PROTOCOL = "windows of 2048 tokens that all start with [BOS]; the seeds are those of the calibration text"
MODELS = ("smollm2-135m",)


def _rows(label: str, method: Method) -> list[Row]:
    """A method without a prefix, with [B], and, if it calibrates, calibrated behind [B]."""
    return [Row(label, method, arm) for arm in (ALONE, BOS, *([BEHIND] if method.calibrates else []))]


def _weights(name: str) -> list[Row]:
    """A weight-only method on each grid."""
    found = []
    for bits, grid in (("4", ()), ("3", ()), ("4", ("--group-size", "-1"))):
        method = Method(name, name, ("--bits", bits, *grid), calibrates=name not in ("rtn", "bcq"), quantizes=True)
        found += _rows(f"{name}, {bits} bits{', per row' if grid else ''}", method)
    return found


def _named(recipe: str, **fields: object) -> Method:
    """A named recipe that calibrates."""
    return replace(Method(recipe, recipe, calibrates=True, quantizes=True), **fields)  # type: ignore[arg-type]


SPQR = [row for recipe in ("spqr", "spqr-w2") for row in _rows(recipe, _named(recipe, name="spqr"))]
SEEDS = [
    *(_named(recipe) for recipe in ("gptq-w3", "gptq-w4", "smoothquant-w8a8", "quarot", "spqr", "awq-w3")),
    _named("rtn-w8a8", options=("--set", "activations.static=true")),
    *(_named(recipe) for recipe in ("omniquant-w3", "awq-w4")),
    Method("gptq-w4row", "gptq", ("--bits", "4", "--group-size", "-1"), calibrates=True, quantizes=True),
]

TABLES = (
    Paper(
        "ours-weights", "ours", "perplexity, weights alone", "own table", PROTOCOL, MODELS, COLUMNS,
        (Row("full", Method("full")),
         *(row for name in ("rtn", "gptq", "awq", "omniquant") for row in _weights(name)), *SPQR, *_weights("bcq")),
        ("`python -m eval table --costs` has the same runs with standard errors and what quantizing took",),
    ),
    Paper(
        "ours-seeds", "ours", "perplexity over calibration seeds", "own table", PROTOCOL, MODELS, COLUMNS,
        (Row("full", Method("full")), *(row for method in SEEDS for row in _rows(method.name, method))),
        ("`python -m eval table --over-seeds` has the same runs with changes over the seeds",),
    ),
)  # fmt: skip
