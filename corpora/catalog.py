"""Which corpora and models the project knows: where they lie, under which names files come, where they come from.

A corpus has two roles, calibration and evaluation, and for each a list of patterns: every form in which the hub serves
the data today (parquet, json.gz, json.zst) or an older local copy holds it (save_to_disk folders, arrow, plain text).
The first pattern that matches any file is read. Models lie in modelzoo/{family}/{family}-{size}.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath

from corpora.errors import UserError
from corpora.files import data_files
from corpora.paths import datasets_dir, modelzoo_dir

__all__ = ["CORPORA", "FAMILIES", "TEXT_FILE", "Corpus", "Family", "ModelDefaults", "catalog_name", "corpus_directory",
           "corpus_files", "model_defaults", "model_directory", "split_patterns"]  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """One data set. Patterns are relative to `folder`, which is relative to datasets/."""

    folder: str
    hub_id: str | None  # None: prepared from a package
    fetch: tuple[str, ...]  # files of the hub repository that are needed, no others are fetched
    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]
    content: str
    revision: str | None = None  # branch of the hub repository
    field: str = "text"
    joiner: str = "\n\n"
    documents: int | None = None  # evaluation reads this many from the start, None: all
    windows: int | None = None  # evaluation keeps at most this many windows' worth of tokens, None: all
    line: Callable[[str], str] = str.strip  # plain text files: the document that a line is
    stripped: bool = False  # evaluation strips white space around each document
    per_document: bool = False  # calibration draws a document, then a segment inside it; else one stream of all
    calibration_text: bool = True  # False: its calibration needs a method's own reader (ShareGPT)


def _wikitext_line(line: str) -> str:
    """The row that the hub's copy has for a line of the raw file: line ends stay, blank lines are empty."""
    return line if line.strip() else ""


def split_patterns(config: str, split: str) -> tuple[str, ...]:
    """The names under which the hub, its parquet branch, caches and save_to_disk keep one split of a configuration."""
    return (
        f"{config}/{split}-*.parquet",
        f"{config}/{split}/*.parquet",
        f"{config}/*-{split}.parquet",
        f"{config}/{split}/*.arrow",
        f"{config}/*-{split}.arrow",
        f"{split}-*.parquet",
        f"{split}/*.parquet",
        f"{split}/*.arrow",
        f"*-{split}.arrow",
        f"{config}/**/*-{split}.arrow",
    )


def _first_shard(file: str, split: str) -> tuple[str, ...]:
    """The names under which clones, caches and save_to_disk keep the one file of C4 that is used for a split."""
    return (f"en/{file}.json*", f"{file}.json*", f"{split}/*.arrow", f"**/*-{split}.arrow")


PILE_FILES = ("val.jsonl", "val.jsonl.gz", "val.jsonl.zst", "**/validation*.parquet", "**/*-validation.arrow",
              "validation/*.arrow")  # fmt: skip

CORPORA: dict[str, Corpus] = {
    "wikitext2": Corpus(
        folder="wikitext",
        hub_id="Salesforce/wikitext",
        fetch=("wikitext-2-raw-v1/*",),
        calibration=(*split_patterns("wikitext-2-raw-v1", "train"), "wikitext-2-raw/wiki.train.raw", "wiki.train.raw"),
        evaluation=(*split_patterns("wikitext-2-raw-v1", "test"), "wikitext-2-raw/wiki.test.raw", "wiki.test.raw"),
        content="WikiText-2 (raw), train and test",
        line=_wikitext_line,
    ),
    "ptb": Corpus(
        folder="ptb_text_only",
        hub_id="ptb-text-only/ptb_text_only",
        fetch=("penn_treebank/train/*", "penn_treebank/test/*"),
        revision="refs/convert/parquet",  # the main branch holds a loading script, which no library runs any more
        calibration=(*split_patterns("penn_treebank", "train"), "ptb.train.txt", "data/ptb.train.txt"),
        evaluation=(*split_patterns("penn_treebank", "test"), "ptb.test.txt", "data/ptb.test.txt"),
        content="Penn Treebank, train and test sentences",
        field="sentence",
        joiner=" ",
    ),
    "c4": Corpus(
        folder="allenai/c4",
        hub_id="allenai/c4",
        fetch=("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"),
        calibration=_first_shard("c4-train.00000-of-01024", "train"),
        evaluation=_first_shard("c4-validation.00000-of-00008", "validation"),
        content="C4 (English), first train and first validation file",
        joiner=" ",
        documents=1100,
        windows=256,
        per_document=True,
    ),
    "pile": Corpus(
        folder="pile-val-backup",
        hub_id="mit-han-lab/pile-val-backup",
        fetch=("val.jsonl.zst",),
        calibration=PILE_FILES,
        evaluation=PILE_FILES,
        content="Pile, validation (one file for both roles)",
        documents=1000,
        windows=256,
        stripped=True,
        per_document=True,
    ),
    "sharegpt": Corpus(
        folder="ShareGPT_Vicuna_unfiltered",
        hub_id="Aeala/ShareGPT_Vicuna_unfiltered",
        fetch=("ShareGPT_V4.3_unfiltered_cleaned_split.json",),
        calibration=("ShareGPT_V4.3_unfiltered_cleaned_split.json*",),
        evaluation=(),
        content="ShareGPT conversations, for calibrating the prefix",
        field="conversations",
        calibration_text=False,
    ),
    "sample": Corpus(
        folder="sample",
        hub_id=None,
        fetch=(),
        calibration=("calibration.jsonl",),
        evaluation=("evaluation.jsonl",),
        content="92 articles of the English Wikipedia, from a package",
    ),
}

# What --corpus takes beside these names: any file, read as one stream of its documents.
TEXT_FILE = Corpus(folder=".", hub_id=None, fetch=(), calibration=(), evaluation=(), content="a file")


@dataclass(frozen=True)
class CalibrationText:
    """How much of which corpus a model calibrates on: `samples` pieces of `length` tokens."""

    corpus: str
    samples: int
    length: int


@dataclass(frozen=True)
class ModelDefaults:
    """What a program uses for a model when the user names nothing else.

    default_calibration: None takes what each method's paper calibrated on. default_task_data: where the questions of
    tasks come from, `local` or `sample`. default_conversations: what prefixes are calibrated on.
    """

    default_corpora: tuple[str, ...] = ("wikitext2", "c4")
    default_group_size: int = 128
    default_calibration: CalibrationText | None = None
    default_task_data: str = "local"
    default_conversations: str = "sharegpt"

    def corpora_of(self, protocol: str) -> tuple[str, ...]:
        """What a protocol of perplexity scores by default: GPTQ's has a draw of C4 of its own."""
        return tuple("c4-old" if (protocol, name) == ("gptq", "c4") else name for name in self.default_corpora)


@dataclass(frozen=True)
class Family:
    """Models that share an architecture and a release: hub id by size."""

    sizes: dict[str, str | None]  # None: prepared from a package
    defaults: ModelDefaults = ModelDefaults()


def _named(pattern: str, *sizes: str) -> dict[str, str | None]:
    """Hub ids by size; `{}` in the pattern is the size as the hub writes it ("8b" here, "8B" there)."""
    return {size.lower(): pattern.format(size) for size in sizes}


FAMILIES: dict[str, Family] = {
    "smollm2": Family(
        {"135m": None}, ModelDefaults(("sample",), 64, CalibrationText("sample", 16, 512), "sample", "sample")
    ),
    "llama": Family(_named("huggyllama/llama-{}", "7b", "13b", "30b", "65b")),
    "llama-2": Family(_named("meta-llama/Llama-2-{}-hf", "7b", "13b", "70b")),
    "llama-3": Family(_named("meta-llama/Meta-Llama-3-{}", "8B", "70B")),
    "llama-3-instruct": Family(_named("meta-llama/Meta-Llama-3-{}-Instruct", "8B", "70B")),
    "llama-3.1-instruct": Family(_named("meta-llama/Llama-3.1-{}-Instruct", "8B")),
    "vicuna-v1.3": Family(_named("lmsys/vicuna-{}-v1.3", "7b", "13b", "33b")),
    "vicuna-v1.5": Family(_named("lmsys/vicuna-{}-v1.5", "7b", "13b")),
    "mistral": Family(_named("mistralai/Mistral-{}-v0.1", "7B")),
    "qwen2": Family(_named("Qwen/Qwen2-{}", "0.5B", "1.5B", "7B")),
    "qwen2.5": Family(_named("Qwen/Qwen2.5-{}", "0.5B", "1.5B", "3B", "7B")),
    "qwen3": Family(_named("Qwen/Qwen3-{}", "0.6B", "1.7B", "4B", "8B")),
    "opt": Family(_named("facebook/opt-{}", "125m", "350m", "1.3b", "2.7b", "6.7b", "13b")),
}


@lru_cache(maxsize=1000)
def catalog_name(model: str) -> str:
    """A model's name in the catalogue: the hub's `Llama-2-7b-hf` is `llama-2-7b`; others stay as they are."""
    for family, known in FAMILIES.items():
        for size, hub_id in known.sizes.items():
            if hub_id is not None and model.lower() == hub_id.rpartition("/")[2].lower():
                return f"{family}-{size}"
    return model


def model_defaults(name: str) -> ModelDefaults:
    """Defaults of a model, found by the parts of its path: "smollm2-135m/rtn-w4g64-1f3a9c02" is a smollm2.

    A part belongs to the family that remains after dropping its last dash parts ("SmolLM2-135M-Instruct" too). A model
    of no known family gets the published settings.
    """
    for part in reversed(PurePath(name).parts):
        family = part.lower()
        while family:
            if family in FAMILIES:
                return FAMILIES[family].defaults
            family = family.rpartition("-")[0]
    return ModelDefaults()


def model_directory(family: str, size: str) -> Path:
    """Where a model of the catalogue lies. Raises UserError, with what exists, for an unknown family or size."""
    if family not in FAMILIES:
        raise UserError(f"unknown model family {family!r}; known are {', '.join(FAMILIES)}")
    size = size.lower().removeprefix(f"{family}-")
    if size not in FAMILIES[family].sizes:
        raise UserError(f"unknown size {size!r} of {family}; known are {', '.join(FAMILIES[family].sizes)}")
    return modelzoo_dir() / family / f"{family}-{size}"


def corpus_directory(name: str) -> Path:
    """Where a corpus of the catalogue lies. Raises UserError, with the names, for an unknown one."""
    if name not in CORPORA:
        raise UserError(f"unknown data set {name!r}; known are {', '.join(CORPORA)}")
    return datasets_dir() / CORPORA[name].folder


def corpus_files(name: str, role: str) -> list[Path]:
    """Files that hold one role of a corpus, in reading order; empty if they are not there.

    role: "calibration" or "evaluation". Raises UserError for an unknown name.
    """
    directory = corpus_directory(name)
    patterns = {"calibration": CORPORA[name].calibration, "evaluation": CORPORA[name].evaluation}[role]
    for pattern in patterns:
        files = data_files(directory, pattern)
        if files:
            return files
    return []
