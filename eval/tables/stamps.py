"""Which files a run reads, and whether they are still the ones that it read: what an entry of the ledger rests on.

    files_of(run)        the model's, texts, task data, prefixes and answers that it names, and those of what it needs
    stamps_of(files)     of each its size, when it was changed last, and, up to LARGE, the hash of its content
    same(kept, now)      size and time are the same, or size and content

Asking a program again is always safe: it reads its own record back by its exact identity. To show the figure of another
file is not. So a file counts as changed where that cannot be told.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.catalog import CORPORA, corpus_files, model_defaults
from corpora.errors import UserError
from corpora.files import data_files, sha256_of_file, version_of
from corpora.json_files import read_json
from corpora.mmlu import mmlu_directory
from corpora.paths import CHECKOUT, datasets_dir, root
from corpora.task_data import TASK_DATA, sample_directory, task_directory
from eval.tables.asked import PLACE, Run

__all__ = ["GPU", "Stamp", "Stamps", "Versions", "corpora_of", "files_of", "gpu_names", "has_model", "same",
           "stamps_of", "told_by_checkpoint", "versions_of"]  # fmt: skip

Versions = Mapping[Path, tuple[int, ...] | None]
LARGE = 512 << 20  # bytes: a second to hash
CHANGED = -1  # in place of the size of what changed while it was read: no file is this one
MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".tiktoken")
SECOND = 10**9  # ns; copies and archives round times to it
GPU = "gpu"


class Stamp(TypedDict):
    """Of a file that was read. size: in bytes. changed: when, in ns. sha256: empty for one that is LARGE."""

    size: int
    changed: int
    sha256: str


Stamps = dict[str, Stamp]


def files_of(run: Run, made: Iterable[Path] = ()) -> dict[str, Path]:
    """The files that a run reads and that are here, by the name that their stamp is kept under.

    A model's are named without its directory, which may move; others from the root or the checkout on, if they are
    below one. made: what runs that it needs left behind, files or directories.
    """
    found: dict[str, Path] = {}
    if run.program != "latency":
        found |= {f"model/{file.name}": file for file in _model_files(run.model)}
    runs = [run, *_needed(run)]
    words = dict.fromkeys(word for one in runs for word in _words(one))
    texts = (file for word in words for file in _named(word))
    tasks = (file for one in runs for file in _task_files(one))
    base, here = os.path.abspath(root()), os.getcwd()
    for file in (*texts, *tasks, *(file for path in made for file in _below(path))):
        found[_name_below(file, base, here)] = file
    return found


def _needed(run: Run) -> Iterator[Run]:
    for needed in run.needs:
        yield needed
        yield from _needed(needed)


def has_model(run: Run) -> bool:
    """Whether its model's weights are at hand."""
    return any(file.suffix in (".safetensors", ".bin") for file in _model_files(run.model))


def _name(file: Path) -> str:
    return _name_below(file, os.path.abspath(root()), os.getcwd())


@lru_cache(maxsize=10_000)
def _name_below(file: Path, base: str, here: str) -> str:
    path = os.path.normpath(os.path.join(here, file))
    for start, word in ((base, ""), (str(CHECKOUT), "checkout/")):
        if path.startswith(start + os.sep):
            return word + path[len(start) + 1 :]
    return path


def _model_files(directory: Path) -> tuple[Path, ...]:
    return _listed(directory, _changed(directory))


def _changed(directory: Path) -> int:
    try:
        return directory.stat().st_mtime_ns
    except (OSError, ValueError):
        return 0


@lru_cache(maxsize=1000)
def _listed(directory: Path, changed: int) -> tuple[Path, ...]:
    """Files of a model's or checkpoint's directory. changed: when it was, so that it is listed once."""
    return tuple(sorted(f for f in directory.glob("[!.]*") if f.suffix in MODEL_FILES)) if changed else ()


def _below(path: Path) -> tuple[Path, ...]:
    """What stands for something that was made: of a checkpoint with sums of its files, those sums and other words."""
    if not path.is_dir():
        return (path,)
    files = _model_files(path)
    summed = any(file.name == "checksums.json" for file in files)
    return tuple(file for file in files if not (summed and file.suffix == ".safetensors"))


def _words(run: Run) -> Iterator[str]:
    """What may name a corpus, a file or a model's directory, whatever the option; and the defaults of those."""
    defaults = model_defaults(run.model.name)
    if defaults.default_calibration is not None:
        yield defaults.default_calibration.corpus
    if run.program in ("train-prefix", "calibrate"):
        yield defaults.default_conversations
    for word in (run.item, *run.words):
        yield word
        for sign in "=:":
            if sign in word:
                yield word.partition(sign)[2]


def _named(word: str) -> Iterable[Path]:
    name = "c4" if word == "c4-old" else word
    if name in CORPORA:
        return _corpus(name, _changed(datasets_dir() / CORPORA[name].folder))
    if word[:1] in ("-", PLACE) or not ("." in word or "/" in word):
        return ()
    try:
        path = Path(word)
        return _model_files(path) if path.is_dir() else (path,) if path.is_file() else ()
    except (OSError, ValueError):  # longer than any name
        return ()


@lru_cache(maxsize=100)
def _corpus(name: str, changed: int) -> tuple[Path, ...]:
    """A corpus' files. changed: when its folder was, so that it is looked through once; a process that lives on does
    not see a file that is added deeper."""
    return tuple(dict.fromkeys(f for role in ("calibration", "evaluation") for f in corpus_files(name, role)))


def _task_files(run: Run) -> tuple[Path, ...]:
    if run.program != "tasks":
        return ()
    data = model_defaults(run.model.name).default_task_data
    if "--data" in run.words[:-1]:
        data = run.words[len(run.words) - 1 - run.words[::-1].index("--data") + 1]
    return () if data == "hub" else _of_task(run.item, data == "sample", datasets_dir())


@lru_cache(maxsize=1000)
def _of_task(task: str, sample: bool, datasets: Path) -> tuple[Path, ...]:
    if task == "mmlu" or task.startswith("mmlu_"):
        return tuple(data_files(mmlu_directory(sample=sample), "*/*.csv"))
    if sample:
        return tuple(data_files(sample_directory() / task, "*.jsonl"))
    if task not in TASK_DATA:
        return tuple(data_files(datasets / task, "**/*"))
    folder, found = task_directory(TASK_DATA[task]), list[Path]()
    for patterns in TASK_DATA[task].splits.values():
        found += next((files for pattern in patterns if (files := data_files(folder, pattern))), [])
    return tuple(dict.fromkeys(found))


def corpora_of(told: Any) -> dict[str, Path]:
    """Files of the corpora that a program's record names anywhere, such as the text that a recipe calibrates on."""
    if isinstance(told, str):
        return {_name(file): file for file in _named(told)} if told in CORPORA else {}
    parts = told.values() if isinstance(told, dict) else told if isinstance(told, list) else ()
    return {name: file for part in parts for name, file in corpora_of(part).items()}


def told_by_checkpoint(directory: Path) -> Any:
    """What a checkpoint says that it is made of; nothing if it cannot be read."""
    try:
        return read_json(directory / "quantization.json", "description of a checkpoint")
    except (UserError, OSError):
        return {}


def versions_of(run: Run, made: Iterable[Path]) -> Versions:
    """Of what a run is about to read, and of every text that its program may choose by itself."""
    files = {**files_of(run, made), **corpora_of(list(CORPORA))}
    return {file: _version(file) for file in files.values()}


def _version(file: Path) -> tuple[int, ...] | None:
    try:
        return version_of(file)
    except (UserError, OSError):
        return None


def stamps_of(files: Mapping[str, Path], before: Versions | None = None) -> Stamps:
    """The stamps of what was read. before: what it was when the program began; what changed since then is marked, as
    nobody knows which of the two was read."""
    found: Stamps = {}
    for name, file in files.items():
        version = _version(file)
        if before is not None and file in before and before[file] != version:
            found[name] = Stamp(size=CHANGED, changed=0, sha256="")
        elif version is not None:
            _, size, changed, _ = version
            found[name] = Stamp(size=size, changed=changed, sha256=sha256_of_file(file) if size <= LARGE else "")
    return found


def same(kept: Mapping[str, Stamp], files: Mapping[str, Path]) -> bool:
    """Whether a run would read what it read: no file is another one, and none is new. Files that are not here any more,
    as on another machine, say nothing."""
    known = {name: files.get(name) or _place(name) for name in kept if name != GPU}
    return files.keys() <= kept.keys() and all(file is None or _same(kept[name], file) for name, file in known.items())


def _place(name: str) -> Path | None:
    """The file that a stamp is of; None for one of a model, whose directory the run says."""
    if name.startswith("model/"):
        return None
    return CHECKOUT / name.removeprefix("checkout/") if name.startswith("checkout/") else root() / name


def _same(kept: Stamp, file: Path) -> bool:
    version = _version(file)
    if version is None:
        return kept["size"] != CHANGED
    _, size, changed, _ = version
    if size != kept["size"]:
        return False
    if changed == kept["changed"]:
        return True
    if kept["sha256"]:
        return sha256_of_file(file) == kept["sha256"]
    return changed // SECOND == kept["changed"] // SECOND


@lru_cache(maxsize=1)
def gpu_names() -> str:
    """The names of this machine's GPUs, without torch; empty if there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ", ".join(sorted({line.strip() for line in said.stdout.splitlines()} - {""})) if not said.returncode else ""
