"""Tasks of lm-eval's harness, with data from local files: which tasks a name stands for, and what they score.

lm-eval's own task files say how a question becomes a prompt and an answer a score; nothing of them is copied. Only
where the data come from is replaced: `local` (files of `datasets/`), `sample` (made by rule, no benchmark), or `hub`.
"""

import contextlib
import difflib
import functools
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate as fetched_metrics
import lm_eval.tasks
from jinja2 import TemplateError
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from corpora.errors import UserError, said_by
from corpora.fetch import check_endpoint
from corpora.files import sha256_of_data
from corpora.mmlu import LETTERS, SUBCATEGORIES, Subject, mmlu_directory, read_mmlu
from corpora.storage import identity
from corpora.task_data import TASK_DATA, task_rows, unlisted_task
from eval.tasks.groups import GROUPS
from eval.tasks.lm import IntactLM

__all__ = ["TaskRun", "check_answers", "lm_eval_index", "load_tasks", "run_tasks", "task_runs"]

datasets.disable_progress_bars()  # one bar a program: ours


def _refuse_code(name: str, *_: Any, **__: Any) -> None:
    raise UserError(f"the metric {name!r} is a program on the hub, which is not run here; choose another task")


fetched_metrics.load = _refuse_code  # it fetches a program and runs it, and several of lm-eval's tasks call it

YAMLS = Path(lm_eval.tasks.__file__).parent
BOOTSTRAP = 1000  # draws for the standard errors that have no closed form (perplexity, BLEU)

# Where lm-eval keeps the tasks that the published tables need: reading all its 14,000 names takes ten seconds.
FILES = {
    "openbookqa": "openbookqa/openbookqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "piqa": "piqa/piqa.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "truthfulqa_gen": "truthfulqa/truthfulqa_gen.yaml",
}


@dataclass(frozen=True)
class TaskRun:
    """What one record holds: a task, or a group of lm-eval's (mmlu, bbh) whose members are weighted by their size."""

    name: str
    leaves: tuple[tuple[str, Path], ...]  # name and lm-eval's file of every task


def task_runs(names: Sequence[str]) -> list[TaskRun]:
    """The runs that some names stand for, in order, each once. Raises UserError, with the nearest names, for unknown
    ones."""
    runs = {}
    for name in names:
        for member in GROUPS.get(name, (name,)):
            runs[member] = TaskRun(member, _leaves(member))
    return list(runs.values())


def _leaves(name: str) -> tuple[tuple[str, Path], ...]:
    if name in FILES:
        return ((name, YAMLS / FILES[name]),)
    if name == "mmlu":
        folder = YAMLS / "mmlu" / "default"
        return tuple((f"mmlu_{subject}", folder / f"mmlu_{subject}.yaml") for subject in SUBCATEGORIES)
    index = lm_eval_index()
    if name not in index:
        known = [*GROUPS, *index]
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or sorted(GROUPS)
        raise UserError(f"there is no task {name!r}; the nearest names are {', '.join(near)}")
    return tuple(_members(name, index))


@functools.cache
def lm_eval_index() -> dict[str, Any]:
    """All tasks, tags and groups that lm-eval brings, by name. Reading them takes seconds, once in a process."""
    return TaskManager().task_index


def _members(name: str, index: dict[str, Any]) -> list[tuple[str, Path]]:
    """All tasks of a task, tag or group name, with their files."""
    entry = index[name]
    kind = entry.kind.name
    if kind == "TASK" and entry.yaml_path is not None:
        return [(name, entry.yaml_path)]
    if kind == "TAG":
        return [leaf for task in sorted(entry.tags) for leaf in _members(task, index)]
    members = (entry.cfg or {}).get("task") if kind == "GROUP" else None
    if not isinstance(members, list) or not all(isinstance(member, str) and member in index for member in members):
        raise UserError(
            f"the task {name!r} is defined by code or by a group with settings of its own, which cannot be given local "
            "data; name its single tasks instead (lm_eval ls tasks)"
        )
    return [leaf for member in members for leaf in _members(member, index)]


def load_tasks(run: TaskRun, source: str, fewshot: int | None) -> tuple[dict[str, Task], str]:
    """lm-eval's tasks of a run, ready to evaluate, and the identity of their data.

    source: `local`, `sample` or `hub`. fewshot: examples shown, None for each task's own number.
    Raises UserError if data are missing, or examples are asked for that are not there.
    """
    if source == "hub" and os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(
            f"--data hub: the data of {run.name} would come from the hub, but HF_HUB_OFFLINE is set; unset it, or give "
            "local files (--data local)"
        )
    if source == "hub":
        check_endpoint()
    tasks, files, fetched = {}, [], []
    subjects = {f"mmlu_{subject}" for subject in SUBCATEGORIES}
    mmlu = _hendrycks(source) if any(name in subjects for name, _ in run.leaves) else {}
    for name, path in run.leaves:
        authors = bool(mmlu) and name in subjects
        if authors and name not in mmlu:
            if source == "sample" and len(run.leaves) > 1:
                continue  # it has some of the subjects
            raise UserError(
                f"{name}: {mmlu_directory(sample=source == 'sample')} has no questions of this subject; it has "
                f"{', '.join(mmlu)}"
            )
        if load_yaml(path, resolve_func=False).get("unsafe_code"):  # before its functions are imported
            raise UserError(
                f"the task {name} runs programs that the model writes, which is not done here; choose another"
            )
        with _needs(name):
            config = load_yaml(path)
        for key in ("tag", "group", "task_list"):
            config.pop(key, None)
        if "class" in config:
            raise UserError(f"the task {name} is defined by code and reads the hub by itself; it cannot be run here")
        shots = (config.get("num_fewshot") or 0) if fewshot is None else fewshot
        if source != "hub":
            splits, origin = mmlu[name] if authors else _rows(name, config, source)
            files += origin
            if shots:
                _check_examples(name, config, splits, shots)
            _with_rows(config, splits)
        with _needs(name), _usable(f"the data of {name}"):
            task = ConfigurableTask(config=config)
        lacking = [metric for metric, of in getattr(task, "_metric_fn_list", {}).items() if of is None]
        if lacking and task.config.process_results is None:  # else the task computes its figures itself
            raise UserError(f"the task {name} is scored by {lacking[0]!r}, which lm-eval itself lacks; choose another")
        if shots and shots > (there := _examples(task)):
            raise UserError(f"{name}: --fewshot {shots} is more than the {there} examples that its data have to show")
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=1234)  # lm-eval's own default
        if source == "hub":
            fetched.append(str(getattr(task.eval_docs, "_fingerprint", "")))
        tasks[name] = task
    if not tasks:
        raise UserError(f"the sample has no questions of {run.name}; it has those of {', '.join(mmlu)}")
    return tasks, identity({"files": [sha256_of_data(file) for file in files], "fetched": fetched})


@contextlib.contextmanager
def _needs(name: str) -> Iterator[None]:
    """Turn a package or file that a task needs and does not find into a UserError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"the task {name} needs the package {error.name!r}, which is not installed; install it with "
            f".venv/bin/pip install 'lm_eval[{name.partition('_')[0]}]', or choose another task"
        ) from None
    except FileNotFoundError as error:
        raise UserError(
            f"the task {name} needs something that is not here ({said_by(error)}); choose another"
        ) from None
    except RuntimeError as error:  # of a task's own functions
        raise UserError(f"the task {name} cannot be made ready ({said_by(error)}); choose another") from None
    except datasets.exceptions.DatasetsError as error:
        raise UserError(
            f"the data of the task {name} cannot be read ({said_by(error)}); clear what the hub's client keeps of "
            "them, or give local files (--data local)"
        ) from None


# What a task file raises, in Python or in a template, at a row that is not as it expects.
BAD_ROW = (LookupError, ValueError, TypeError, AttributeError, SyntaxError, TemplateError)


@contextlib.contextmanager
def _usable(what: str) -> Iterator[None]:
    """Turn what a task file raises at data of another form into a UserError. what: the task, or a question of it."""
    try:
        yield
    except BAD_ROW as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{what} is of no form that lm-eval's task file can use ({reason}); take such rows out of the data, or "
            "give those of a split or revision that has answers"
        ) from error


def check_answers(name: str, task: ConfigurableTask, limit: int | None) -> None:
    """Raise UserError for a question among the first `limit` that has no right answer, or an empty choice.

    lm-eval stops at some of them with an exception of its own, and counts the others as answered wrongly. Tasks that
    score by a function of their own, and texts whose every token counts, have no answer in this sense.
    """
    if task.config.process_results is not None or task.OUTPUT_TYPE == "loglikelihood_rolling":
        return
    for number, row in enumerate(itertools.islice(task.eval_docs, limit), start=1):
        with _usable(f"{name}: question {number}"):
            gold = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
            choices = task.doc_to_choice(row) if task.OUTPUT_TYPE == "multiple_choice" else None
            if choices is not None and not all(choices):
                raise ValueError(f"one of its choices {choices} is empty")
            for answer in gold if isinstance(gold, list) else [gold]:
                if choices is None:
                    right = bool(str(answer).strip())
                else:
                    right = answer in choices if isinstance(answer, str) else 0 <= answer < len(choices)
                if not right:
                    among = "" if choices is None else f", which is none of its choices {choices}"
                    raise ValueError(f"its answer is {answer!r}{among}")


def _hendrycks(source: str) -> dict[str, tuple[dict[str, list[dict[str, Any]]], list[Path]]]:
    """Rows and files by lm-eval's name, from the authors' files; empty where lm-eval's own form of the data is to be
    read."""
    directory = mmlu_directory(sample=source == "sample")
    if source == "hub" or (source == "local" and not (directory / "test").is_dir()):
        return {}

    def rows(subject: Subject, split: str) -> list[dict[str, Any]]:
        return [
            {"question": q.question, "choices": list(q.options), "answer": LETTERS.index(q.answer)}
            for q in getattr(subject, split)
        ]

    return {
        f"mmlu_{subject.name}": ({split: rows(subject, split) for split in ("test", "dev")}, list(subject.files))
        for subject in read_mmlu(directory, strict=True)
    }


def _rows(name: str, config: dict[str, Any], source: str) -> tuple[dict[str, list[dict[str, Any]]], list[Path]]:
    """Rows of a task's own splits, and their files."""
    data = TASK_DATA.get(name)
    if data is None:
        names = [config.get(f"{role}_split") for role in ("test", "validation", "training", "fewshot")]
        splits = tuple(dict.fromkeys(split for split in names if split))
        data = unlisted_task(str(config.get("dataset_path")), config.get("dataset_name"), splits)
    rows = task_rows(name, data, sample=source == "sample")
    return rows.splits, list(rows.files)


def _check_examples(name: str, config: dict[str, Any], splits: dict[str, list[dict[str, Any]]], shots: int) -> None:
    """Raise UserError if the split that a task takes its examples from is not here.

    lm-eval would take them from the scored questions, and show one with its answer.
    """
    own = config.get("fewshot_config") or {}
    if own.get("samples") is not None:
        return
    roles = (own.get("split"), *(config.get(f"{role}_split") for role in ("fewshot", "training", "validation", "test")))
    split = next((split for split in roles if split), None)
    if split not in splits:
        raise UserError(
            f"{name} shows {shots} examples, but its data have no {split} split to take them from; add that split or "
            "use --fewshot 0"
        )


def _examples(task: ConfigurableTask) -> int:
    """How many examples a task can show: of its scored questions all but the one that is asked."""
    documents = task.fewshot_docs()
    count = 0 if documents is None else len(list(documents))
    return count - 1 if count and task.fewshot_cfg.split == task.config.test_split else count


def _with_rows(config: dict[str, Any], splits: dict[str, list[dict[str, Any]]]) -> None:
    """Let a task's configuration read these rows; splits that are not there are not asked for."""
    config["custom_dataset"] = lambda **_: datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    )
    for role in ("training", "validation", "test", "fewshot"):
        if config.get(f"{role}_split") not in splits:
            config[f"{role}_split"] = None


def draw_for_share(task: ConfigurableTask, rank: int, count: int) -> None:
    """Let one of `count` processes show each question the examples that it has when one process asks them all.

    lm-eval draws them question by question, and each process only for its own: every count-th. So the draws of the
    others' questions are made here, too, and thrown away.
    """
    draw = task.sampler.sample
    skip = itertools.chain([rank], itertools.repeat(count - 1))

    def sample(*arguments: Any, **options: Any) -> Any:
        for _ in range(next(skip)):
            draw(*arguments, **options)
        return draw(*arguments, **options)

    task.sampler.sample = sample


def run_tasks(lm: IntactLM, tasks: dict[str, Task], limit: int | None) -> dict[str, Any] | None:
    """Score tasks and join them: figures weighted by the number of questions. None on all processes but the first.

    A metric's name is lm-eval's, with its filter where that is not the only one: `exact_match,strict-match`.
    """
    if lm.world_size > 1:
        for task in tasks.values():
            if task.config.num_fewshot:
                draw_for_share(task, lm.rank, lm.world_size)
    for name, task in tasks.items():
        check_answers(name, task, limit)
    with contextlib.redirect_stdout(sys.stderr):  # it prints that it bootstraps; ours is the table, or the JSON
        try:
            results = evaluate(
                lm, {"tasks": tasks, "groups": {}}, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False
            )
        except OverflowError as error:  # of exp, in a perplexity
            raise UserError(
                f"a score of {', '.join(list(tasks)[:3])} is beyond float64 ({error}); the model is damaged: check its "
                "checkpoint, or quantize with more bits"
            ) from None
    if results is None:
        return None
    sizes = {name: int(results["n-samples"][name]["effective"]) for name in tasks}
    members = {name: _scores(results["results"][name]) for name in tasks}
    figures = _joined(members, sizes) | {
        "samples": sum(sizes.values()),
        "versions": {name: results["versions"][name] for name in tasks},
    }
    if len(tasks) > 1:
        figures["members"] = {name: {"samples": sizes[name], **scores} for name, (scores, _) in members.items()}
    return figures


Scores = tuple[dict[str, float], dict[str, float]]  # figures by metric, and their standard errors


def _scores(result: dict[str, Any]) -> Scores:
    """One task's metrics and standard errors under our names, out of lm-eval's "metric,filter" and its "_stderr"."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in result.items():
        metric, _, filtered = key.partition(",")
        if not filtered or not isinstance(value, (int, float)):
            continue
        plain = metric.removesuffix("_stderr")
        label = plain if filtered == "none" else f"{plain},{filtered}"
        (errors if metric != plain else metrics)[label] = float(value)
    return metrics, errors


def _joined(members: dict[str, Scores], sizes: dict[str, int]) -> dict[str, Any]:
    """Figures of all tasks together: every metric is the mean over the questions of the tasks that have it."""
    joined: dict[str, dict[str, float]] = {"metrics": {}, "stderr": {}}
    for metric in dict.fromkeys(name for metrics, _ in members.values() for name in metrics):
        having = {name: scores for name, scores in members.items() if metric in scores[0]}
        total = sum(sizes[name] for name in having)
        joined["metrics"][metric] = sum(metrics[metric] * sizes[name] for name, (metrics, _) in having.items()) / total
        if all(metric in errors for _, errors in having.values()):
            squares = ((errors[metric] * sizes[name] / total) ** 2 for name, (_, errors) in having.items())
            joined["stderr"][metric] = sum(squares) ** 0.5
    return joined
