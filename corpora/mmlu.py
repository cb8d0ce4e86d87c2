"""MMLU in its authors' files (Hendrycks et al. 2021, arXiv 2009.03300): data/{dev,test}/{subject}_{dev,test}.csv.

CSV without a header: question, A, B, C, D, answer letter. The published scores were read with pandas' defaults, which
turn an option "None" or "NA" into "nan" and a column of numbers into numbers; that is the default here, `strict` reads
the text as it stands.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpora.errors import UserError
from corpora.files import damaged, data_files, open_text
from corpora.paths import CHECKOUT, datasets_dir

__all__ = [
    "CATEGORIES",
    "LETTERS",
    "MMLU_ARCHIVE",
    "SUBCATEGORIES",
    "Question",
    "Subject",
    "mmlu_directory",
    "read_mmlu",
]

LETTERS = "ABCD"
MMLU_ARCHIVE = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"

# Subject to subcategory, subcategory to category: the authors' `categories.py`.
SUBCATEGORIES = {
    "abstract_algebra": "math", "anatomy": "health", "astronomy": "physics", "business_ethics": "business",
    "clinical_knowledge": "health", "college_biology": "biology", "college_chemistry": "chemistry",
    "college_computer_science": "computer science", "college_mathematics": "math", "college_medicine": "health",
    "college_physics": "physics", "computer_security": "computer science", "conceptual_physics": "physics",
    "econometrics": "economics", "electrical_engineering": "engineering", "elementary_mathematics": "math",
    "formal_logic": "philosophy", "global_facts": "other", "high_school_biology": "biology",
    "high_school_chemistry": "chemistry", "high_school_computer_science": "computer science",
    "high_school_european_history": "history", "high_school_geography": "geography",
    "high_school_government_and_politics": "politics", "high_school_macroeconomics": "economics",
    "high_school_mathematics": "math", "high_school_microeconomics": "economics", "high_school_physics": "physics",
    "high_school_psychology": "psychology", "high_school_statistics": "math", "high_school_us_history": "history",
    "high_school_world_history": "history", "human_aging": "health", "human_sexuality": "culture",
    "international_law": "law", "jurisprudence": "law", "logical_fallacies": "philosophy",
    "machine_learning": "computer science", "management": "business", "marketing": "business",
    "medical_genetics": "health", "miscellaneous": "other", "moral_disputes": "philosophy",
    "moral_scenarios": "philosophy", "nutrition": "health", "philosophy": "philosophy", "prehistory": "history",
    "professional_accounting": "other", "professional_law": "law", "professional_medicine": "health",
    "professional_psychology": "psychology", "public_relations": "politics", "security_studies": "politics",
    "sociology": "culture", "us_foreign_policy": "politics", "virology": "health", "world_religions": "philosophy",
}  # fmt: skip
CATEGORIES = {
    "STEM": ("physics", "chemistry", "biology", "computer science", "math", "engineering"),
    "humanities": ("history", "philosophy", "law"),
    "social sciences": ("politics", "culture", "economics", "geography", "psychology"),
    "other": ("other", "business", "health"),
}


@dataclass(frozen=True)
class Question:
    """A question, its four options, and the letter of the right one."""

    question: str
    options: tuple[str, str, str, str]
    answer: str


@dataclass(frozen=True)
class Subject:
    """A subject's examples to show (dev) and questions to score (test), and the files they came from."""

    name: str
    dev: tuple[Question, ...]
    test: tuple[Question, ...]
    files: tuple[Path, Path]


def mmlu_directory(*, sample: bool) -> Path:
    """Where the files lie: the benchmark's, or those of our own sample questions, which come with the code."""
    return CHECKOUT / "datasets" / "sample-mmlu" / "data" if sample else datasets_dir() / "mmlu" / "data"


def read_mmlu(directory: Path, *, strict: bool = False) -> list[Subject]:
    """All subjects of a folder with dev/ and test/, by name.

    Raises UserError if the folder, a subject's dev file or a cell is missing, or an answer is no letter from A to D.
    """
    tests = data_files(directory / "test", "*_test.csv")
    if not tests:
        raise UserError(
            f"MMLU is missing: {directory}/test holds no *_test.csv; unpack {MMLU_ARCHIVE} into {directory.parent}, or "
            "take the sample questions (--data sample)"
        )
    subjects = []
    for test in tests:
        name = test.name.removesuffix("_test.csv")
        dev = directory / "dev" / f"{name}_dev.csv"
        subjects.append(Subject(name, _questions(dev, strict), _questions(test, strict), (dev, test)))
    return subjects


def _questions(path: Path, strict: bool) -> tuple[Question, ...]:
    import pandas

    if not path.is_file():
        raise UserError(f"MMLU is incomplete: {path} is missing; unpack the authors' data.tar again")
    as_text: dict[str, Any] = {"dtype": str, "keep_default_na": False} if strict else {}
    try:
        with open_text(path) as file:
            table = pandas.read_csv(file, header=None, **as_text)
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError) as error:
        raise damaged(path, error) from None
    if table.shape[1] != 6:
        raise UserError(f"{path} has {table.shape[1]} columns; expected 6: question, A, B, C, D, answer letter")
    questions = []
    for number, (question, a, b, c, d, answer) in enumerate(table.itertuples(index=False), start=1):
        if any("\0" in cell for cell in (question, a, b, c, d) if isinstance(cell, str)):
            raise damaged(path, f"question {number} holds a NUL character")
        if answer not in tuple(LETTERS):
            raise UserError(f"{path}: the answer of question {number} is {answer!r}; expected one of A, B, C, D")
        questions.append(Question(str(question), (str(a), str(b), str(c), str(d)), answer))
    return tuple(questions)
