"""Data of evaluation tasks, from whatever files are here: clones and parquet branches of the hub, save_to_disk folders,
and the raw files that the former loading scripts downloaded.

`task_rows` gives the rows in the form that the hub serves today, which is the form that lm-eval's task files expect.
`sample` rows are made by rule from the sample text (`corpora.cloze`): never the benchmark itself.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corpora.catalog import split_patterns
from corpora.errors import UserError
from corpora.files import data_files
from corpora.paths import datasets_dir
from corpora.readers import read_rows

__all__ = ["SAMPLE_TASKS", "SAMPLE_TASKS_NAME", "TASK_DATA", "TaskData", "TaskRows", "sample_directory",
           "scored_files", "task_directory", "task_rows", "unlisted_task"]  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskData:
    """Where a task's data lie.

    folders: below datasets/; the first one that holds the scored split is read. splits: patterns by the split's name,
    the scored one first. texts: the fields of a row that are text. convert: from a raw file's row to the hub's (a row
    of the hub passes unchanged). check: raises ValueError for a row of the hub's form that has no right answer. Both
    raise KeyError or TypeError for a row of another form.
    """

    hub_id: str
    folders: tuple[str, ...]
    splits: dict[str, tuple[str, ...]]
    texts: tuple[str, ...] = ()
    convert: Callable[[Row], Row] = field(default=lambda row: row)
    check: Callable[[Row], None] = field(default=lambda row: None)


@dataclass(frozen=True)
class TaskRows:
    """Rows by split, and the files they came from."""

    splits: dict[str, list[Row]]
    files: tuple[Path, ...]


def _question_with_stem(row: Row) -> Row:
    """AllenAI's raw form, {"question": {"stem", "choices": [{"text", "label"}]}}, as the hub's columns."""
    if not isinstance(row.get("question"), dict):
        return row
    choices = row["question"]["choices"]
    return {
        "id": row["id"],
        "question": row["question"]["stem"],
        "question_stem": row["question"]["stem"],
        "choices": {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]},
        "answerKey": row["answerKey"],
    }


def _boolq(row: Row) -> Row:
    """The raw answer is true or false; the hub's label 1 or 0."""
    return row | {"label": {False: 0, True: 1}.get(row["label"], row["label"])}


def _hellaswag(row: Row) -> Row:
    """The raw label is a number, the hub's a text."""
    return row | {"label": str(row["label"])}


def _all_texts(values: Any, what: str) -> list[str]:
    """The values themselves. Raises ValueError if they are no list of texts that say something."""
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"its {what} are {repr(values)[:100]}, not a list of texts")
    return values


def _check_choices(row: Row) -> None:
    texts, labels = (_all_texts(row["choices"][part], f"choices' {part}s") for part in ("text", "label"))
    if len(texts) != len(labels):
        raise ValueError(f"it has {len(texts)} choices and {len(labels)} labels")
    _check_answer(row, "answerKey", labels)


def _check_winogrande(row: Row) -> None:
    _check_answer(row, "answer", ("1", "2"))
    if "_" not in row["sentence"]:
        raise ValueError("its sentence has no gap, which is written _")


def _check_hellaswag(row: Row) -> None:
    _check_answer(row, "label", [str(i) for i in range(len(_all_texts(row["endings"], "endings")))])


def _check_label(row: Row) -> None:
    _check_answer(row, "label", (0, 1))


def _check_lambada(row: Row) -> None:
    start, _, word = row["text"].rpartition(" ")  # as lm-eval parts them
    if not start.strip() or not word.strip():
        raise ValueError("its text does not end in a last word behind a space")


def _check_gsm8k(row: Row) -> None:
    if not re.search(r"#### *[^\s#]", row["answer"]):
        raise ValueError("its answer has no result behind ####")


def _check_truthfulqa(row: Row) -> None:
    for key in ("correct_answers", "incorrect_answers"):
        if not isinstance(row[key], list) or not any(answer.strip() for answer in row[key]):
            raise ValueError(f"it has no {key}")


def _check_answer(row: Row, key: str, allowed: Sequence[object]) -> None:
    """Raise ValueError if a row's answer is none of those there are: test splits are published without answers."""
    if isinstance(row[key], bool) or row[key] not in allowed:
        raise ValueError(f"its {key} is {row[key]!r}, but the answers are {', '.join(map(repr, allowed))}")


def _splits(config: str, *, alone: bool = True, **raw: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Patterns of each split: the hub's files of a configuration, then the raw ones.

    alone: files that name no configuration count, too. Not so where one repository holds several data sets: a `test`
    folder of ai2_arc may be the easy questions or the hard ones.
    """
    return {
        split: (*(p for p in split_patterns(config, split) if alone or p.startswith(f"{config}/")), *names)
        for split, names in raw.items()
    }


TASK_DATA: dict[str, TaskData] = {
    "openbookqa": TaskData(
        "allenai/openbookqa",
        ("openbookqa", "allenai/openbookqa"),
        _splits("main", test=("**/Main/test.jsonl", "test.jsonl"), train=("**/Main/train.jsonl", "train.jsonl")),
        ("question_stem",),
        _question_with_stem,
        _check_choices,
    ),
    "winogrande": TaskData(
        "allenai/winogrande",
        ("winogrande", "allenai/winogrande"),
        _splits("winogrande_xl", validation=("**/dev.jsonl",), train=("**/train_xl.jsonl",)),
        ("sentence", "option1", "option2"),
        check=_check_winogrande,
    ),
    "arc_easy": TaskData(
        "allenai/ai2_arc",
        ("ai2_arc", "allenai/ai2_arc"),
        _splits("ARC-Easy", alone=False, test=("**/ARC-Easy-Test.jsonl",), train=("**/ARC-Easy-Train.jsonl",)),
        ("question",),
        _question_with_stem,
        _check_choices,
    ),
    "arc_challenge": TaskData(
        "allenai/ai2_arc",
        ("ai2_arc", "allenai/ai2_arc"),
        _splits(
            "ARC-Challenge",
            alone=False,
            test=("**/ARC-Challenge-Test.jsonl",),
            train=("**/ARC-Challenge-Train.jsonl",),
        ),
        ("question",),
        _question_with_stem,
        _check_choices,
    ),
    "boolq": TaskData(
        "aps/super_glue",
        ("super_glue", "aps/super_glue"),
        _splits("boolq", alone=False, validation=("**/BoolQ/val.jsonl",), train=("**/BoolQ/train.jsonl",)),
        ("question", "passage"),
        _boolq,
        _check_label,
    ),
    "hellaswag": TaskData(
        "Rowan/hellaswag",
        ("hellaswag", "Rowan/hellaswag"),
        {
            split: (*split_patterns("data", split), f"default/{split}/*.parquet", f"**/hellaswag_{raw}.jsonl")
            for split, raw in (("validation", "val"), ("train", "train"))
        },
        ("activity_label", "ctx_a", "ctx_b"),
        _hellaswag,
        _check_hellaswag,
    ),
    "lambada_openai": TaskData(
        "EleutherAI/lambada_openai",
        ("lambada_openai", "EleutherAI/lambada_openai"),
        _splits("default", test=("**/lambada_test_en.jsonl", "**/lambada_test.jsonl")),
        ("text",),
        check=_check_lambada,
    ),
    "piqa": TaskData(
        "baber/piqa",
        ("piqa", "baber/piqa"),
        _splits("plain_text", validation=("data/validation-*.parquet",), train=("data/train-*.parquet",)),
        ("goal", "sol1", "sol2"),
        check=_check_label,
    ),
    "gsm8k": TaskData(
        "openai/gsm8k",
        ("gsm8k", "openai/gsm8k"),
        _splits("main", test=("**/test.jsonl",), train=("**/train.jsonl",)),
        ("question", "answer"),
        check=_check_gsm8k,
    ),
    "truthfulqa_gen": TaskData(
        "truthfulqa/truthful_qa",
        ("truthful_qa", "truthfulqa/truthful_qa"),
        _splits("generation", validation=()),
        ("question",),
        check=_check_truthfulqa,
    ),
}
SAMPLE_TASKS_NAME = "sample-tasks"
SAMPLE_TASKS = tuple(name for name in TASK_DATA if name != "truthfulqa_gen")  # no rule makes a false belief


def task_directory(data: TaskData) -> Path:
    """Where a task's data lie, or belong if they are not here: the first folder with the scored split, or any."""
    folders = [datasets_dir() / folder for folder in data.folders]
    scored = next(iter(data.splits.values()))
    there = [folder for folder in folders if folder.is_dir()]
    return next((folder for folder in there if _first(folder, scored)), (there or folders)[0])


def scored_files(data: TaskData) -> list[Path]:
    """Files of the split that a task is scored on; empty if not all of them are here."""
    files = _first(task_directory(data), next(iter(data.splits.values())))
    return [] if _missing_shards(files) else files


def sample_directory() -> Path:
    """Where the items made by rule lie."""
    return datasets_dir() / SAMPLE_TASKS_NAME


def unlisted_task(hub_id: str, config: str | None, splits: tuple[str, ...]) -> TaskData:
    """Where the data of a task that is not in the table lie: a clone in a folder of the repository's name.

    splits: their names, the one that the task is scored on first.
    """
    folders = tuple(dict.fromkeys((hub_id.rpartition("/")[2], hub_id)))
    if config not in (None, "default"):
        return TaskData(hub_id, folders, _splits(config, alone=False, **dict.fromkeys(splits, ())))
    return TaskData(
        hub_id,
        folders,
        {split: tuple(p for c in ("data", "default") for p in split_patterns(c, split)) for split in splits},
    )


def task_rows(name: str, data: TaskData, *, sample: bool) -> TaskRows:
    """Rows of a task's local data, or of its sample.

    Raises UserError, with the folder, what it should hold and where to get it, if the data are not here or the split
    that the task is scored on is missing.
    """
    if sample:
        if name not in SAMPLE_TASKS:
            raise UserError(f"no sample is made of {name}; samples are {', '.join(SAMPLE_TASKS)}; use --data local")
        folder, hint = sample_directory() / name, f"run 'bash scripts/prepare/data.sh {SAMPLE_TASKS_NAME}'"
        splits: dict[str, tuple[str, ...]] = {split: (f"{split}.jsonl",) for split in data.splits}
    else:
        folder, splits = task_directory(data), data.splits
        how = f"run 'bash scripts/prepare/data.sh {name}' or " if name in TASK_DATA else ""
        hint = f"{how}copy {data.hub_id} of the hub there (datasets/README.md names all forms), or use --data hub"
    rows: dict[str, list[Row]] = {}
    files: list[Path] = []
    for split, patterns in splits.items():
        found = _first(folder, patterns)
        missing = _missing_shards(found)
        if missing:
            raise UserError(f"data of {name}: {folder} is incomplete, {missing[0]} is missing; {hint}")
        here = [row for file in found for row in _converted(file, data)]
        if found and not here:
            raise UserError(f"data of {name}: {found[0]} holds no rows; {hint}")
        if here:
            rows[split] = here
            files += found
    scored = next(iter(data.splits))
    if scored not in rows:
        state = "is missing" if not folder.is_dir() else f"holds no {scored} split (for example {splits[scored][0]})"
        raise UserError(f"data of {name}: {folder} {state}; {hint}")
    return TaskRows(rows, tuple(files))


def _converted(file: Path, data: TaskData) -> list[Row]:
    """Rows of a file in the hub's form. Raises UserError, with the file and the row, for one of an unknown form, or
    without a right answer: lm-eval would stop at it, or count it as answered wrongly."""
    rows: list[Row] = []
    for row in read_rows(file):
        try:
            converted = data.convert(row)
            for key in data.texts:
                if not isinstance(converted[key], str):
                    raise ValueError(f"its {key} is {converted[key]!r}, not text")
            data.check(converted)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{file}: row {len(rows) + 1} is of no form that this task can use ({reason}); its fields are "
                f"{', '.join(row)[:200]}; datasets/README.md names all forms"
            ) from None
        rows.append(converted)
    return rows


def _missing_shards(files: list[Path]) -> list[Path]:
    """What is not here of the files of a split that count themselves, NAME-00000-of-00002.parquet."""
    wanted = []
    for file in files:
        parts = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(\.\w+)", file.name)
        if parts:
            start, count, suffix = parts.groups()
            wanted += [file.with_name(f"{start}-{i:05d}-of-{count}{suffix}") for i in range(int(count))]
    return [file for file in dict.fromkeys(wanted) if file not in files]


def _first(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Files of the first pattern that finds any, in reading order."""
    for pattern in patterns:
        files = data_files(folder, pattern)
        if files:
            return files
    return []
