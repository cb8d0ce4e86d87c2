"""MMLU's files: read as the published scores read them, grouped as published, and our own sample questions."""

import csv
import io
from collections import Counter
from pathlib import Path

import pandas
import pytest

from corpora.errors import UserError
from corpora.mmlu import CATEGORIES, LETTERS, SUBCATEGORIES, mmlu_directory, read_mmlu

GOOD = [["2 + 2?", "1", "2", "3", "4", "D"], ["1 + 1?", "2", "3", "4", "5", "A"]]
# Options that pandas takes for something else than text, in columns that stay text and in one of numbers only.
ODD = [
    ["Which is no value?", "None", "NA", "zero", "1.50", "A"],
    ["Which is no number, “ever”?", "null", "n/a", "", "2.00", "B"],
    ["Which, then?", "one", 'say "two"', "a, b", "30", "D"],
]


def write(folder: Path, subject: str, rows: list[list[str]], dev: list[list[str]] | None = None) -> Path:
    """A subject's two files below `folder`; returns the test file."""
    for part, content in (("dev", dev or GOOD), ("test", rows)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        csv.writer(text).writerows(content)
        (folder / part / f"{subject}_{part}.csv").write_text(text.getvalue(), encoding="utf-8")
    return folder / "test" / f"{subject}_test.csv"


def test_subjects_come_by_name_with_their_questions_in_order(tmp_path: Path) -> None:
    for name in ("virology", "anatomy"):
        write(tmp_path, name, GOOD)
    subjects = read_mmlu(tmp_path)
    assert [subject.name for subject in subjects] == ["anatomy", "virology"]
    assert subjects[0].files == (tmp_path / "dev/anatomy_dev.csv", tmp_path / "test/anatomy_test.csv")
    questions = [[q.question, *q.options, q.answer] for q in subjects[0].test]
    assert questions == GOOD
    assert subjects[0].dev == subjects[0].test


def test_strict_reading_keeps_the_text_as_the_csv_module_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path, "anatomy", ODD)
    with path.open(encoding="utf-8", newline="") as file:
        truth = list(csv.reader(file))
    (subject,) = read_mmlu(tmp_path, strict=True)
    assert [[q.question, *q.options, q.answer] for q in subject.test] == truth == ODD


def test_default_reading_gives_what_the_published_code_formats(tmp_path: Path) -> None:
    """hendrycks/test: "\\n{}. {}".format(letter, df.iloc[row, column]) on pandas.read_csv(path, header=None)."""
    path = write(tmp_path, "anatomy", ODD)
    frame = pandas.read_csv(path, header=None)
    (subject,) = read_mmlu(tmp_path)
    for row, question in enumerate(subject.test):
        assert list(question.options) == [f"{frame.iloc[row, column]}" for column in range(1, 5)]
    assert subject.test[0].options == ("nan", "nan", "zero", "1.5")
    assert subject.test[1].options == ("nan", "nan", "nan", "2.0")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("answer", ["E", "a", "AB", "", "1", "None"])
def test_an_answer_that_is_no_letter_is_named(tmp_path: Path, strict: bool, answer: str) -> None:
    path = write(tmp_path, "anatomy", [GOOD[0], [*GOOD[1][:5], answer]])
    with pytest.raises(UserError, match=rf"{path}: the answer of question 2 is .*expected one of A, B, C, D"):
        read_mmlu(tmp_path, strict=strict)


@pytest.mark.parametrize(("row", "named"), [
    (GOOD[0][:5], "has 5 columns; expected 6"),
    ([*GOOD[0], "A"], "has 7 columns; expected 6"),
])  # fmt: skip
def test_a_file_of_other_columns_is_named(tmp_path: Path, row: list[str], named: str) -> None:
    path = write(tmp_path, "anatomy", [row])
    with pytest.raises(UserError, match=f"{path} {named}"):
        read_mmlu(tmp_path)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("content", [b"", b'"open quote\n', b"\xff\xfe\x00", b"Q,1,2,3,4,A\nQ,1,2,3,4,5,B\n"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, strict: bool) -> None:
    path = write(tmp_path, "anatomy", GOOD)
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        read_mmlu(tmp_path, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_a_line_that_lacks_a_cell_is_named(tmp_path: Path, strict: bool) -> None:
    path = write(tmp_path, "anatomy", [GOOD[0], GOOD[1][:4]])
    with pytest.raises(UserError, match=rf"{path}: the answer of question 2"):
        read_mmlu(tmp_path, strict=strict)


def test_missing_files_are_named_with_the_way_out(intactkv_root: Path) -> None:
    folder = mmlu_directory(sample=False)
    assert folder == intactkv_root / "datasets/mmlu/data"
    with pytest.raises(UserError, match=rf"{folder}/test holds no \*_test\.csv; unpack https.*data\.tar into "
                                        rf"{folder.parent}, .*--data sample"):  # fmt: skip
        read_mmlu(folder)
    write(folder, "anatomy", GOOD)
    (folder / "dev/anatomy_dev.csv").unlink()
    with pytest.raises(UserError, match=rf"incomplete: {folder}/dev/anatomy_dev\.csv is missing"):
        read_mmlu(folder)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("end", ["\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_a_byte_order_mark_do_not_change_the_questions(
    tmp_path: Path, strict: bool, end: str, mark: str
) -> None:
    """Also where a question goes over several lines."""
    rows = [["Which line?\nThe first,\nor the last?", "a\nb", "2", "3", "4", "D"], *ODD]
    path = write(tmp_path, "anatomy", rows)
    text = path.read_text(encoding="utf-8")  # in Python's text mode
    path.write_bytes(text.encode())
    plain = read_mmlu(tmp_path, strict=strict)
    assert plain[0].test[0].options[0] == "a\nb"
    path.write_bytes((mark + text.replace("\n", end)).encode())
    assert read_mmlu(tmp_path, strict=strict) == plain


def test_what_a_mac_leaves_beside_a_file_is_no_subject(tmp_path: Path) -> None:
    path = write(tmp_path, "anatomy", GOOD)
    for part in ("dev", "test"):
        (tmp_path / part / f"._anatomy_{part}.csv").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    assert [subject.name for subject in read_mmlu(tmp_path)] == [path.name.removesuffix("_test.csv")]


@pytest.mark.parametrize(("content", "named"), [
    ("naïve,1,2,3,4,A\n".encode("cp1252"), "is not plain text in UTF-8"),
    ("naïve,1,2,3,4,A\n".encode("utf-16"), "is text in UTF-16"),
    (b"only one column\nof text\n", "has 1 columns; expected 6"),
    (b"\n\n\n", "No columns to parse"),
])  # fmt: skip
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes, named: str) -> None:
    path = write(tmp_path, "anatomy", GOOD)
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} .*{named}"):
        read_mmlu(tmp_path)


# the groups -----------------------------------------------------------------------------------------------------------


def test_the_groups_are_those_of_the_harness_but_for_anatomy() -> None:
    """lm-eval has the four categories in its own task files, `mmlu_{category}_tasks`; there anatomy is of STEM, while
    the authors' categories.py has it under health."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    theirs = {}
    for path in folder.glob("mmlu_*.yaml"):
        config = load_yaml(path)
        theirs[path.stem.removeprefix("mmlu_")] = config["tag"].removeprefix("mmlu_").removesuffix("_tasks")
    ours = {
        subject: category.replace(" ", "_").lower()
        for subject, subcategory in SUBCATEGORIES.items()
        for category, members in CATEGORIES.items()
        if subcategory in members
    }
    assert theirs.pop("anatomy") == "stem"
    assert ours.pop("anatomy") == "other"
    assert ours == theirs


def test_there_are_57_subjects_17_subcategories_and_4_categories() -> None:
    assert len(SUBCATEGORIES) == 57
    assert list(SUBCATEGORIES) == sorted(SUBCATEGORIES)
    assert len(CATEGORIES) == 4
    members = [subcategory for group in CATEGORIES.values() for subcategory in group]
    assert len(members) == len(set(members)) == 17
    assert set(SUBCATEGORIES.values()) == set(members)
    # Sizes of the subcategories in the authors' categories.py.
    assert Counter(SUBCATEGORIES.values()) == {
        "math": 5, "health": 8, "physics": 4, "business": 3, "biology": 2, "chemistry": 2, "computer science": 4,
        "economics": 3, "engineering": 1, "philosophy": 6, "other": 3, "history": 4, "geography": 1, "politics": 4,
        "psychology": 2, "culture": 2, "law": 3,
    }  # fmt: skip


# the sample questions -------------------------------------------------------------------------------------------------


def test_the_sample_questions_are_well_formed(intactkv_root: Path) -> None:
    subjects = read_mmlu(mmlu_directory(sample=True), strict=True)  # they come with the code, wherever the data are
    assert len(subjects) == 6
    assert {subject.name for subject in subjects} < set(SUBCATEGORIES)
    asked: list[str] = []
    for subject in subjects:
        assert (len(subject.dev), len(subject.test)) == (5, 8)
        for question in (*subject.dev, *subject.test):
            asked.append(question.question)
            assert len(set(question.options)) == 4
            assert all(option == option.strip() != "" for option in question.options)
    assert len(set(asked)) == len(asked) == 78
    letters = Counter(question.answer for subject in subjects for question in subject.test)
    assert set(letters) == set(LETTERS)
    assert max(letters.values()) - min(letters.values()) <= 6  # no letter alone is much better than chance
    # Every category is among them, and both ways of reading give the same questions.
    groups = {
        category for category, members in CATEGORIES.items() for s in subjects if SUBCATEGORIES[s.name] in members
    }
    assert groups == set(CATEGORIES)
    assert read_mmlu(mmlu_directory(sample=True)) == subjects


def test_the_sample_says_that_it_is_not_the_benchmark() -> None:
    readme = mmlu_directory(sample=True).parent / "README.md"
    assert "not MMLU" in readme.read_text(encoding="utf-8")
