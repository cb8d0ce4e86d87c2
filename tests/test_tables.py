"""How tables become text; and the records of runs that tests of tables share."""

import csv
import io
import re
from collections.abc import Mapping
from typing import Any

import pytest

from eval.tables.compare import QUESTIONS
from eval.tables.render import Figure, Table, change_of, mean_of, render, signed
from eval.tables.tasks import QA_METRICS
from quantization.named import named_recipe
from quantization.recipes.recipe import describe

NONE = {"label": "none", "ids": [], "file": None, "intact": False}
BOS = {"label": "[B]", "ids": [1], "file": None, "intact": True}
PROMPT = {"label": "[P]", "ids": [1, 2], "file": None, "intact": True}
CAL = {"label": "[cal]", "ids": [1], "file": "c0ffee", "intact": True}  # --prefix cal.safetensors


def settings(recipe: str, group: int, seed: int | None, weights: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """What every record says of the model and how it was made, as `plan.describe()` does."""
    described = describe(named_recipe(recipe))
    made_of: dict[str, Any] = {"source": "abc"}
    if described["weights"] is not None:
        described["weights"] |= weights
        described["weights"]["grid"] |= {"group_size": group}
        made_of |= {"weights": described["weights"]}
    if seed is not None:
        described["calibration"] |= {"seed": seed}
        made_of |= {"calibration": described["calibration"], "segments": f"text {seed}"}
    return {"model": "llama-2-7b", "weights": recipe, "made_of": made_of, "recipe": described, "kv": None,
            "prefix": NONE, "dtype": "float16", "device": "cuda", "packed": False} | others  # fmt: skip


def perplexity(value: float, recipe: str = "fp16", *, group: int = 128, seed: int | None = None,
               weights: Mapping[str, Any] | None = None, started: str = "2026-01-01", windows: int = 2,
               **others: Any) -> dict[str, Any]:  # fmt: skip
    """A record of `eval ppl`; by itself one by the paper's protocol, but for the number of windows."""
    text = {"corpus": "c4", "tokens_sha256": "aa", "protocol": "intactkv", "window": 2048, "limit": None}
    return {"settings": settings(recipe, group, seed, weights or {}, **{**text, **others}), "identity": "x",
            "started": started, "perplexity": value, "window_nll": [1.0, *[1.1] * (windows - 1)]}  # fmt: skip


def task(name: str, acc: float, recipe: str = "fp16", *, acc_norm: float | None = None, group: int = 128,
         seed: int | None = None, started: str = "2026-01-01", samples: int | None = None,
         **others: Any) -> dict[str, Any]:  # fmt: skip
    """A record of `eval tasks`; acc and acc_norm are fractions. samples: None for all questions of the paper's task."""
    how = {"task_name": name, "protocol": "hendrycks" if name == "mmlu" else "lm-eval",
           "fewshot": 5 if name == "mmlu" else 0, "data": "local", "data_sha256": f"data of {name}", "lead": [1],
           "limit": None, "model": "vicuna-v1.5-7b"}  # fmt: skip
    metrics = {"acc": acc} | ({} if acc_norm is None else {"acc_norm": acc_norm})
    return {"settings": settings(recipe, group, seed, {}, **{**how, **others}), "identity": "x", "started": started,
            "metrics": metrics, "stderr": {"acc": 0.01}, "samples": samples or QUESTIONS.get(name, 100),
            "seconds": 12.3}  # fmt: skip


def seven(acc: float, acc_norm: float, recipe: str = "fp16", **others: Any) -> list[dict[str, Any]]:
    """Records of the seven question answering tasks, all of the same accuracies."""
    return [task(name, acc, recipe, acc_norm=acc_norm if metric == "acc_norm" else None, **others)
            for name, metric in QA_METRICS.items()]  # fmt: skip


# ---- tables as text


def test_one_run_is_a_figure_alone_and_none_is_nothing():
    assert str(mean_of([2.0])) == "2.00"
    assert mean_of([]) is None
    figure = mean_of([1.0, 2.0, 6.0])
    assert figure is not None
    assert str(figure) == f"3.00 ± {7**0.5:.2f} (3)"  # deviations −2, −1, 3: variance 14 / 2


@pytest.mark.parametrize(("relative", "changes"), [(True, "-15.0% ± 7.1% (2)"), (False, "-1.75 ± 1.06 (2)")])
def test_a_change_is_that_of_the_seeds_that_both_have(relative, changes):
    # Seeds 1 and 2: −20 % and −10 %, or −2.5 and −1: deviations 10 / √2 and 1.5 / √2.
    assert str(change_of({1: 12.5, 2: 10.0, 3: 99.0}, {0: 5.0, 2: 9.0, 1: 10.0}, relative)) == changes
    assert change_of({1: 12.5}, {0: 5.0}, relative) is None
    assert str(change_of({None: 8.0}, {None: 10.0}, relative)) == ("+25.0%" if relative else "+2.00")


HOSTILE = Table(
    caption="50 % of_all #1 & {more} ~ ^ \\",
    head=("name_of", "x & y"),
    rows=(("[B] 3 × 4", Figure(-1.5, signed)), ("*\\%$", None), ("a, \"b\"", mean_of([1.0, 2.0]))),
    notes=("`code` < 5 → ±",),
)  # fmt: skip


def test_csv_parses_back_to_the_numbers():
    text = render([HOSTILE, Table("other", ("name_of", "z"), (("c", Figure(1234567.0)),))], "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["table"] for row in rows] == ["50 % of_all #1 & {more} ~ ^ \\"] * 3 + ["other"]
    assert [row["x & y"] for row in rows] == ["-1.5", "", "1.5", ""]
    assert (rows[2]["name_of"], float(rows[2]["x & y sd"]), rows[2]["x & y runs"]) == (
        'a, "b"',
        pytest.approx(0.5**0.5, rel=1e-5),
        "2",
    )
    assert float(rows[3]["z"]) == pytest.approx(1234567, rel=1e-5)


def test_latex_is_escaped_and_balanced():
    text = render([HOSTILE], "latex")
    body = text
    for command in (r"\textbackslash{}", r"\textasciitilde{}", r"\textasciicircum{}", r"\textasciigrave{}"):
        body = body.replace(command, "")
    assert not re.search(r"(?<!\\)[%#_~^]", body)  # none of these is left unescaped
    unescaped = re.sub(r"\\[{}$&%#_]", "", body)
    assert unescaped.count("{") == unescaped.count("}")
    assert unescaped.count("$") % 2 == 0
    assert re.findall(r"\\(begin|end)\{(\w+)\}", text) == [
        ("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table"),
    ]  # fmt: skip
    (columns,) = re.findall(r"\\begin\{tabular\}\{(\w+)\}", text)
    rows = [line for line in unescaped.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + 3
    assert all(row.count("&") == len(columns) - 1 for row in rows)
    assert not re.search(r"^[\[*]", text, re.MULTILINE)  # LaTeX would read an option of the line's end before it
    assert "$-$1.50" in text
    assert r"1.50 $\pm$ 0.71 (2)" in text


def test_markdown_is_aligned_and_carries_the_notes():
    text = render([HOSTILE], "markdown")
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1
    assert text.splitlines()[-1].startswith("- `code`")
    assert "n/a" in text
