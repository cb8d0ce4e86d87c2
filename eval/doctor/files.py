"""What a published table needs of local files: models, texts, questions, judges. Nothing is made or fetched."""

import os
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from corpora.catalog import CORPORA, FAMILIES, CalibrationText, corpus_files, model_defaults
from corpora.errors import UserError, one_line
from corpora.mmlu import MMLU_ARCHIVE, mmlu_directory
from corpora.paths import CHECKOUT, root
from corpora.prepare import model_is_present
from corpora.task_data import SAMPLE_TASKS, SAMPLE_TASKS_NAME, TASK_DATA, sample_directory, scored_files, task_directory
from eval.doctor.machine import Finding
from eval.tables.asked import Run

__all__ = ["calibrated_on", "model", "refused", "scored", "unnamed_judge"]

PILE = CalibrationText("pile", 512, 1024)  # what `intactkv train-prefix` draws from


def model(directory: Path) -> Finding:
    """Whether a model is there with its tokenizer; what is inside is looked at by whoever plans with it."""
    shown = _place(directory)
    needed = "configuration, tokenizer and all weights"
    if (directory / "quantization.json").is_file() or model_is_present(directory):
        return Finding(f"model {directory.name}", needed, shown)
    family, size = directory.parent.name, directory.name.removeprefix(f"{directory.parent.name}-")
    state = f"{shown} is incomplete" if directory.is_dir() else f"{shown} is missing"
    known = family in FAMILIES and size in FAMILIES[family].sizes
    way_out = f"bash scripts/prepare/model.sh {family} {size}" if known else "put a whole checkpoint there"
    return Finding(f"model {directory.name}", needed, state, "lacks", way_out)


def scored(runs: Iterable[Run]) -> list[Finding]:
    """The texts, questions and judges that runs score with, each once."""
    found: dict[str, Finding] = {}
    for run in runs:
        if run.program == "ppl":
            one = _corpus(run.item, "evaluation")
        elif run.program == "tasks":
            one = _task(run.item, run.option("--data") or model_defaults(run.model.name).default_task_data)
        elif run.program == "mtbench":
            sampled = model_defaults(run.model.name).default_task_data == "sample"
            one = _questions(run.option("--questions") or ("sample" if sampled else "mt_bench"))
        elif run.program == "judge":
            one = _judge(run)
        elif run.program == "latency":
            one = _kernel()
        else:
            continue
        found.setdefault(one.what, one)
    return list(found.values())


def calibrated_on(runs: Iterable[Run], texts: Iterable[str]) -> list[Finding]:
    """The texts that methods calibrate on, and prefixes are trained on. texts: those of recipes that name none."""
    found, conversations = dict.fromkeys(texts), dict[str, None]()
    for run in runs:
        own = model_defaults(run.model.name)
        if run.program == "calibrate":
            conversations[run.option("--conversations") or own.default_conversations] = None
        if run.program == "train-prefix":
            found[run.option("--corpus") or (own.default_calibration or PILE).corpus] = None
        if given := run.option("--calibration"):
            found[given] = None
    return [*(_corpus(text, "calibration") for text in found), *map(_conversations, conversations)]


def _conversations(name: str) -> Finding:
    found = _corpus(name, "calibration")
    way_out = f'{found.way_out}, or others: --training "--conversations sample"' if found.verdict == "lacks" else ""
    return replace(found, what=f"conversations of {name} for training", way_out=way_out)


def _corpus(item: str, role: str) -> Finding:
    name, what = "c4" if item == "c4-old" else item, f"text {item} for {role}"
    if name not in CORPORA:
        there = Path(item).exists()
        way_out = "" if there else f"name a file that is there, or one of {', '.join(CORPORA)}"
        return Finding(what, "a file", "there" if there else "missing", "ok" if there else "lacks", way_out)
    files = corpus_files(name, role)
    if files:
        return Finding(what, "its files", _place(files[0]))
    return Finding(what, "its files", "missing", "lacks", f"bash scripts/prepare/data.sh {name}")


def _place(path: Path) -> str:
    """A path as a reader finds it: from the root, where it is below that."""
    return os.path.relpath(path, root()) if path.is_relative_to(root()) else str(path)


def _task(name: str, source: str) -> Finding:
    what, needed = f"questions of {name}", f"--data {source}"
    if source == "sample":
        folder = mmlu_directory(sample=True) if name == "mmlu" else sample_directory() / name
        if name != "mmlu" and name not in SAMPLE_TASKS:
            return Finding(what, needed, "no sample is made of it", "lacks", "--data local")
        way_out = f"bash scripts/prepare/data.sh {SAMPLE_TASKS_NAME}"
    elif source == "hub":
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        if offline:
            return Finding(what, needed, "HF_HUB_OFFLINE is set", "lacks", "unset it, or --data local")
        return Finding(what, needed, "not looked for", "warning", "the hub must be reached from where it runs")
    elif name == "mmlu":
        folder, way_out = mmlu_directory(sample=False) / "test", f"unpack {MMLU_ARCHIVE} in datasets/mmlu"
    elif name in TASK_DATA:
        folder, way_out = task_directory(TASK_DATA[name]), f"bash scripts/prepare/data.sh {name}"
        if not scored_files(TASK_DATA[name]):
            return Finding(what, needed, "missing", "lacks", way_out)
    else:
        return Finding(what, needed, "not looked for", "warning", "datasets/README.md says where its files belong")
    if folder.is_dir():
        return Finding(what, needed, _place(folder))
    return Finding(what, needed, "missing", "lacks", way_out)


def _questions(word: str) -> Finding:
    path = CHECKOUT / "fastchat" / "data" / word / "question.jsonl" if word in ("sample", "mt_bench") else Path(word)
    if path.is_file():
        return Finding("MT-bench's questions", word, _place(path))
    way_out = "bash scripts/prepare/mtbench.sh, or others: --questions sample|FILE"
    return Finding("MT-bench's questions", word, f"{word} is missing", "lacks", way_out)


def _judge(run: Run) -> Finding:
    name = run.option("--judge-model")
    if name.startswith("local:"):
        there = Path(name.removeprefix("local:")).is_dir()
        return Finding(
            "judge", name, "there" if there else "missing", "ok" if there else "lacks", "" if there else "another model"
        )
    variable = run.option("--key-variable") or "OPENAI_API_KEY"
    if os.environ.get(variable, "").strip():
        return Finding("judge", f"${variable} for {name}", "set")
    way_out = f"export {variable}=…, or --judge-model local:DIR"
    return Finding("judge", f"${variable} for {name}", "not set", "lacks", way_out)


def unnamed_judge() -> Finding:
    """Of a table of judged answers, where nobody was named to judge them."""
    way_out = "its cells stay n/a; add --judge-model, with the key in $OPENAI_API_KEY, or local:DIR"
    return Finding("judge", "--judge-model", "none is named", "warning", way_out)


def _kernel() -> Finding:
    import torch

    there = torch.cuda.is_available() and find_spec("triton") is not None
    found = "both are here" if there else "one of them is not here"
    way_out = "" if there else "its cells stay n/a"
    return Finding("LUT-GEMM's kernel", "a GPU and Triton", found, "ok" if there else "warning", way_out)


def refused(what: str, error: UserError | OSError) -> Finding:
    """What a plan refuses, with its own words: they name the thing and the way out."""
    said, _, way_out = one_line(str(error)).partition("; ")
    return Finding(what, "a plan that can be made", said, "lacks", way_out)
