"""Finished runs that nobody ran: well-formed records in the ledger, for any declared table."""

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eval.runs import record_of
from eval.tables.asked import Run, cells_of
from eval.tables.declared import Measure, Paper, Row, Scope
from eval.tables.ledger import Entry, keep

ENVIRONMENT = {
    "torch": "2.11.0", "transformers": "5.17.0", "python": "3.12.3", "commit": "0123456789ab", "cores": 2,
    "processor": "A processor", "gpu": "NVIDIA H200",
}  # fmt: skip
WINDOW = 2048
QUESTIONS = 500


def drawn(run: Run) -> float:
    """A number from 0 to 1 that only this run has."""
    return int(hashlib.sha256(run.key.encode()).hexdigest()[:8], 16) / 16**8


def answer(run: Run, value: Any, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keep the record of a run whose figure is `value`; accuracies are shares. others: settings."""
    words = list(run.words)
    option = {word: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}
    prefix = option.get("--prefix", "none")
    label = {"none": "none", "bos": "[B]"}.get(prefix, prefix)
    settings: dict[str, Any] = {
        "model": run.model.name, "weights": option.get("--recipe", "fp16"), "made_of": {"source": run.key}, "kv": None,
        "recipe": {"weights": None}, "dtype": "float16", "device": "cuda",
        "prefix": {"label": label, "ids": [1], "file": None, "intact": prefix != "none"},
    }  # fmt: skip
    if run.program == "ppl":
        settings |= {"corpus": run.item, "tokens_sha256": "aa", "protocol": "intactkv", "limit": None,
                     "window": int(option.get("--window", WINDOW))}  # fmt: skip
        windows = int(option.get("--limit", 166 if run.item == "wikitext2" else 256))
        figures: dict[str, Any] = {"perplexity": value, "window_nll": [math.log(value)] * windows, "windows": windows}
    elif run.program == "tasks":
        settings |= {"task_name": run.item, "protocol": "lm-eval", "fewshot": 0, "data": "local", "lead": [1],
                     "data_sha256": f"of {run.item}", "limit": None}  # fmt: skip
        metric = ("acc", "acc_norm", "exact_match,strict-match", "bleu_acc,none")
        figures = {"metrics": dict.fromkeys(metric, value), "stderr": {"acc": 0.01}, "samples": QUESTIONS,
                   "seconds": 3.0}  # fmt: skip
    elif run.program == "chat":
        settings |= {"prompts": [run.item], "script": "aa", "template": "bb", "max_new_tokens": 128, "temperature": 0.0}
        figures = {"seconds": 1.5, "answers": [{
            "dialogue": 1, "user": run.item, "answer": value, "ids": [1, 2], "stopped": "end", "prompt": 9, "fed": 9,
            "seconds": 1.5, "seconds_to_first": 0.5, "quantized": 0.0, "cache_bytes": 4096,
        }]}  # fmt: skip
    else:
        raise ValueError(f"no record of {run.program} is made up here")
    record = record_of(run.program, run.model.name, settings | dict(others or {}), lambda: figures)
    entry: Entry = {
        "program": run.program, "model": run.model.name, "item": run.item, "seconds": 12.5,
        "command": ["/usr/bin/python3", "-m", "eval", run.program, "--model", str(run.model), *run.words],
        "finished": record["started"], "record": Path(record["path"]).name,
    }  # fmt: skip
    keep(run, entry)
    return record


def answer_all(
    paper: Paper,
    model: Path,
    value: Callable[[Row, Measure, Run], Any],
    scope: Scope | None = None,
    wanted: Callable[[Row, Measure], bool] = lambda row, measure: True,
) -> None:
    """Keep a record for every run of a table's cells that are wanted and of a program that has one here."""
    for cell in cells_of(paper, model, scope or Scope()):
        if wanted(cell.row, cell.measure):
            for run in cell.runs:
                if run.program in ("ppl", "tasks", "chat"):
                    answer(run, value(cell.row, cell.measure, run))
