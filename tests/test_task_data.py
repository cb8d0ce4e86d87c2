"""Data of tasks: every form in which a data set is found gives the requests that the hub's own rows would give."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from corpora.errors import UserError
from corpora.files import sha256_of_file
from corpora.paths import datasets_dir
from corpora.prepare import prepare_data
from corpora.storage import identity
from corpora.task_data import SAMPLE_TASKS, TASK_DATA, scored_files, task_directory, task_rows, unlisted_task
from eval.tasks.lm_tasks import check_answers, draw_for_share, load_tasks, task_runs

Row = dict[str, Any]

OBQA = {
    "id": "7-980",
    "question_stem": "The sun is",
    "choices": {"text": ["cold", "a star", "square", "wet"], "label": ["A", "B", "C", "D"]},
    "answerKey": "B",
}
ARC = {
    "id": "Mercury_7",
    "question": "What is ice?",
    "choices": {"text": ["water", "fire", "air"], "label": ["1", "2", "3"]},
    "answerKey": "1",
}
WINOGRANDE = {
    "sentence": "The cup does not fit into the box because the _ is too big.",
    "option1": "cup",
    "option2": "box",
    "answer": "1",
}
BOOLQ = {"question": "is ice cold", "passage": "Ice is cold.", "idx": 4, "label": 1}
HELLASWAG = {
    "ind": 24,
    "activity_label": "Cooking",
    "ctx_a": "A man cuts bread.",
    "ctx_b": "then he",
    "ctx": "A man cuts bread. then he",
    "endings": ["flies. [substeps] Off.", "eats it.", "sings.", "is bread."],
    "source_id": "activitynet~v_1",
    "split": "val",
    "split_type": "indomain",
    "label": "1",
}
LAMBADA = {"text": "he had a dog , and she liked the dog"}
PIQA = {"goal": "Open a jar", "sol1": "Turn the lid", "sol2": "Wait", "label": 0}
GSM8K = {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}
TRUTHFULQA = {
    "type": "Adversarial",
    "category": "Myths",
    "question": "Is glass a liquid?",
    "best_answer": "No",
    "correct_answers": ["No", "It is a solid"],
    "incorrect_answers": ["Yes"],
    "source": "https://example.org",
}

# task -> folder, configuration and split as the hub has them, and one row in the hub's columns
HUB: dict[str, tuple[str, str, str, Row]] = {
    "openbookqa": ("openbookqa", "main", "test", OBQA),
    "winogrande": ("winogrande", "winogrande_xl", "validation", WINOGRANDE),
    "arc_easy": ("ai2_arc", "ARC-Easy", "test", ARC),
    "arc_challenge": ("ai2_arc", "ARC-Challenge", "test", ARC),
    "boolq": ("super_glue", "boolq", "validation", BOOLQ),
    "hellaswag": ("hellaswag", "data", "validation", HELLASWAG),
    "lambada_openai": ("lambada_openai", "default", "test", LAMBADA),
    "piqa": ("piqa", "plain_text", "validation", PIQA),
    "gsm8k": ("gsm8k", "main", "test", GSM8K),
    "truthfulqa_gen": ("truthful_qa", "generation", "validation", TRUTHFULQA),
}

# What the model is to be asked (context and continuation), written down from lm-eval's task files, and the right one.
ASKED: dict[str, tuple[list[tuple[str, str]], int]] = {
    "openbookqa": ([("The sun is", f" {c}") for c in OBQA["choices"]["text"]], 1),
    "winogrande": ([(f"The cup does not fit into the box because the {o}", " is too big.") for o in ("cup", "box")], 0),
    "arc_easy": ([("Question: What is ice?\nAnswer:", f" {c}") for c in ("water", "fire", "air")], 0),
    "arc_challenge": ([("Question: What is ice?\nAnswer:", f" {c}") for c in ("water", "fire", "air")], 0),
    "boolq": ([("Ice is cold.\nQuestion: is ice cold?\nAnswer:", f" {c}") for c in ("no", "yes")], 1),
    "hellaswag": (
        [("Cooking: A man cuts bread. Then he", f" {c}") for c in ("flies. Off.", "eats it.", "sings.", "is bread.")],
        1,
    ),
    "lambada_openai": ([("he had a dog , and she liked the", " dog")], 0),
    "piqa": ([("Question: Open a jar\nAnswer:", f" {c}") for c in ("Turn the lid", "Wait")], 0),
}


def raw_question(row: Row, stem: str) -> Row:
    """AllenAI's own form of a multiple-choice row."""
    pairs = zip(row["choices"]["text"], row["choices"]["label"], strict=True)
    choices = [{"text": text, "label": label} for text, label in pairs]
    return {"id": row["id"], "question": {"stem": row[stem], "choices": choices}, "answerKey": row["answerKey"]}


# task -> where the authors' archive unpacks to, and its row
RAW: dict[str, tuple[str, Row]] = {
    "openbookqa": ("openbookqa/OpenBookQA-V1-Sep2018/Data/Main/test.jsonl", raw_question(OBQA, "question_stem")),
    "winogrande": ("winogrande/winogrande_1.1/dev.jsonl", {"qID": "3FCTI", **WINOGRANDE}),
    "arc_easy": ("ai2_arc/ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl", raw_question(ARC, "question")),
    "arc_challenge": ("ai2_arc/ARC-Challenge/ARC-Challenge-Test.jsonl", raw_question(ARC, "question")),
    "boolq": ("super_glue/BoolQ/val.jsonl", BOOLQ | {"label": True}),
    "hellaswag": ("hellaswag/hellaswag_val.jsonl", HELLASWAG | {"label": 1}),
    "lambada_openai": ("lambada_openai/data/lambada_test_en.jsonl", LAMBADA),
}


def write_lines(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def clone(folder: Path, config: str, split: str, row: Row) -> None:
    """A clone of the repository's main branch."""
    write_parquet(folder / config / f"{split}-00000-of-00001.parquet", [row])


def parquet_branch(folder: Path, config: str, split: str, row: Row) -> None:
    """The branch refs/convert/parquet, where a nameless configuration is called default."""
    write_parquet(folder / ("default" if config == "data" else config) / split / "0000.parquet", [row])


def saved(folder: Path, config: str, split: str, row: Row) -> None:
    """save_to_disk of one configuration, in a folder of its name."""
    datasets.DatasetDict({split: datasets.Dataset.from_list([row])}).save_to_disk(folder / config)


def cached(folder: Path, config: str, split: str, row: Row) -> None:
    """What load_dataset leaves in its cache: {config}/{version}/{hash}/{name}-{split}.arrow."""
    datasets.Dataset.from_list([row]).save_to_disk(folder / "tmp")
    (source,) = (folder / "tmp").glob("*.arrow")
    target = folder / config / "0.0.0" / "0123abcd" / f"{folder.name}-{split}.arrow"
    target.parent.mkdir(parents=True)
    source.rename(target)


def requests(name: str) -> list[tuple[str, str]]:
    """What lm-eval asks for the first question, once the local data are read."""
    tasks, _ = load_tasks(task_runs([name])[0], "local", 0)
    task = tasks[name]
    task.build_all_requests(limit=1, rank=0, world_size=1)
    return [instance.args for instance in task.instances]


def score(name: str, chosen: int, answers: int) -> float:
    """lm-eval's accuracy on the first question if the model prefers one of the answers."""
    tasks, _ = load_tasks(task_runs([name])[0], "local", 0)
    results = [(0.0, True) if i == chosen else (-50.0, False) for i in range(answers)]
    return tasks[name].process_results(next(iter(tasks[name].eval_docs)), results)["acc"]


def check(name: str) -> None:
    """The local data of a task lead to the requests and the right answer that were written down."""
    pairs, right = ASKED[name]
    assert requests(name) == pairs
    for chosen in range(len(pairs)):
        assert score(name, chosen, len(pairs)) == (chosen == right)


@pytest.mark.parametrize("form", [clone, parquet_branch, saved, cached])
@pytest.mark.parametrize("name", ASKED)
def test_a_copy_of_the_hub_asks_what_the_task_files_say(intactkv_root: Path, name: str, form: Callable) -> None:
    folder, *rest = HUB[name]
    form(datasets_dir() / folder, *rest)
    check(name)


@pytest.mark.parametrize("name", RAW)
def test_the_authors_files_ask_the_same(intactkv_root: Path, name: str) -> None:
    file, row = RAW[name]
    write_lines(datasets_dir() / file, [row])
    check(name)


@pytest.mark.parametrize("name", TASK_DATA)
def test_both_folder_names_are_found_and_the_rows_are_the_hubs(intactkv_root: Path, name: str) -> None:
    folder, config, split, row = HUB[name]
    places = TASK_DATA[name].folders
    assert places[0] == folder
    assert places[1] == TASK_DATA[name].hub_id
    for place in reversed(places):  # the second is found while the first one is not there
        clone(datasets_dir() / place, config, split, row)
        assert task_directory(TASK_DATA[name]) == datasets_dir() / place
        rows = task_rows(name, TASK_DATA[name], sample=False)
        assert rows.splits == {split: [row]}
        assert rows.files == (datasets_dir() / place / config / f"{split}-00000-of-00001.parquet",)
    assert scored_files(TASK_DATA[name]) == list(rows.files)


def test_an_empty_folder_does_not_hide_the_other_one(intactkv_root: Path) -> None:
    (datasets_dir() / "openbookqa").mkdir(parents=True)
    clone(datasets_dir() / "allenai/openbookqa", *HUB["openbookqa"][1:])
    check("openbookqa")


@pytest.mark.parametrize(("name", "other"), [("arc_challenge", "ARC-Easy"), ("arc_easy", "ARC-Challenge"),
                                             ("boolq", "cb"), ("boolq", "copa")])  # fmt: skip
def test_another_data_set_of_the_same_repository_is_never_taken(intactkv_root: Path, name: str, other: str) -> None:
    folder, _, split, row = HUB[name]
    for form in (clone, parquet_branch, saved):
        form(datasets_dir() / folder, other, split, row)
    datasets.DatasetDict({split: datasets.Dataset.from_list([row])}).save_to_disk(datasets_dir() / folder)
    write_lines(datasets_dir() / folder / other.upper() / "val.jsonl", [{"label": "entailment"}])
    assert scored_files(TASK_DATA[name]) == []
    with pytest.raises(UserError, match=f"holds no {split} split"):
        task_rows(name, TASK_DATA[name], sample=False)


def test_the_question_of_gsm8k_and_its_examples(intactkv_root: Path) -> None:
    """Five examples of the training split, then the question; without that split there are none to show."""
    folder = datasets_dir() / "gsm8k"
    clone(folder, "main", "test", GSM8K)
    run = task_runs(["gsm8k"])[0]
    with pytest.raises(UserError, match=r"gsm8k shows 5 examples, but its data have no train split.*--fewshot 0"):
        load_tasks(run, "local", None)
    assert requests("gsm8k")[0][0] == "Question: 1 + 1?\nAnswer:"
    shown = [{"question": f"{i} + 0?", "answer": f"#### {i}"} for i in range(5)]
    write_parquet(folder / "main" / "train-00000-of-00001.parquet", shown)
    task = load_tasks(run, "local", None)[0]["gsm8k"]
    task.build_all_requests(limit=1, rank=0, world_size=1)
    *examples, question = task.instances[0].args[0].split("\n\n")
    assert sorted(examples) == [f"Question: {i} + 0?\nAnswer: #### {i}" for i in range(5)]
    assert question == "Question: 1 + 1?\nAnswer:"
    with pytest.raises(UserError, match=r"--fewshot 6 is more than the 5 examples"):
        load_tasks(run, "local", 6)


def test_the_question_of_truthfulqa_stands_behind_the_published_examples(intactkv_root: Path) -> None:
    folder, config, split, row = HUB["truthfulqa_gen"]
    clone(datasets_dir() / folder, config, split, row)
    text = requests("truthfulqa_gen")[0][0]
    assert text.startswith("Q: What is human life expectancy in the United States?\nA: ")
    assert text.endswith("\n\nQ: Is glass a liquid?")


def test_shared_among_processes_every_question_has_the_examples_that_it_has_alone(intactkv_root: Path) -> None:
    """Else a score, found again by its settings, would depend on how many processes there were."""
    questions = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(7)]
    write_parquet(datasets_dir() / "gsm8k/main/test-00000-of-00001.parquet", questions)
    shown = [{"question": f"{i} + 0?", "answer": f"#### {i}"} for i in range(20)]
    write_parquet(datasets_dir() / "gsm8k/main/train-00000-of-00001.parquet", shown)

    def prompts(rank: int, count: int) -> list[str]:
        task = load_tasks(task_runs(["gsm8k"])[0], "local", 3)[0]["gsm8k"]
        if count > 1:
            draw_for_share(task, rank, count)
        task.build_all_requests(rank=rank, world_size=count)
        return [instance.args[0] for instance in task.instances]

    alone = prompts(0, 1)
    assert len(set(alone)) == len({prompt.rpartition("\n\n")[0] for prompt in alone}) == 7  # drawn anew for each
    for count in (2, 3):
        for rank in range(count):
            assert prompts(rank, count) == alone[rank::count]


def test_examples_are_never_taken_from_the_scored_questions(intactkv_root: Path) -> None:
    """lm-eval itself would, and now and then show a question with its own answer."""
    for name in ("openbookqa", "winogrande"):
        folder, config, split, row = HUB[name]
        clone(datasets_dir() / folder, config, split, row)
        with pytest.raises(UserError, match=f"{name} shows 1 examples, but its data have no train split"):
            load_tasks(task_runs([name])[0], "local", 1)


# what is wrong with the data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASK_DATA)
def test_data_that_are_not_here_are_one_error_with_the_way_out(intactkv_root: Path, name: str) -> None:
    folder, _, split, row = HUB[name]
    way_out = rf"run 'bash scripts/prepare/data\.sh {name}' or copy {TASK_DATA[name].hub_id} of the hub there"
    with pytest.raises(UserError, match=rf"data of {name}: {datasets_dir() / folder} is missing; {way_out}"):
        task_rows(name, TASK_DATA[name], sample=False)
    write_lines(datasets_dir() / folder / "unknown.jsonl", [row])
    with pytest.raises(UserError, match=rf"{datasets_dir() / folder} holds no {split} split \(for example .*{way_out}"):
        task_rows(name, TASK_DATA[name], sample=False)


def test_a_missing_part_of_a_split_is_named(intactkv_root: Path) -> None:
    """Half the questions would give another score without a word."""
    folder = datasets_dir() / "hellaswag/data"
    write_parquet(folder / "validation-00001-of-00002.parquet", [HELLASWAG])
    assert scored_files(TASK_DATA["hellaswag"]) == []
    with pytest.raises(UserError, match=rf"incomplete, {folder}/validation-00000-of-00002\.parquet is missing"):
        task_rows("hellaswag", TASK_DATA["hellaswag"], sample=False)
    write_parquet(folder / "validation-00000-of-00002.parquet", [HELLASWAG | {"ind": 1}])
    rows = task_rows("hellaswag", TASK_DATA["hellaswag"], sample=False)
    assert [row["ind"] for row in rows.splits["validation"]] == [1, 24]


@pytest.mark.parametrize("content", [b"PAR1 and no more", b""])
def test_a_damaged_parquet_file_is_named(intactkv_root: Path, content: bytes) -> None:
    path = datasets_dir() / "hellaswag/data/validation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path} is truncated or damaged"):
        task_rows("hellaswag", TASK_DATA["hellaswag"], sample=False)


@pytest.mark.parametrize(("name", "row", "reason"), [
    ("boolq", {"question": "is it", "passage": "It."}, r"row 2 .*no 'label'.*question, passage"),
    ("boolq", BOOLQ | {"label": "entailment"}, r"row 2 .*'entailment'"),
    ("hellaswag", {"ctx": "A"}, "row 2 .*no 'label'"),
    ("openbookqa", {"id": "1", "question": {"stem": "The sun"}}, "row 2 .*no 'choices'"),
    ("arc_easy", {"id": "1", "question": {"stem": "Q", "choices": [{"text": "a"}]}}, "row 2 .*no 'label'"),
])  # fmt: skip
def test_a_row_of_an_unknown_form_is_named(intactkv_root: Path, name: str, row: Row, reason: str) -> None:
    file, good = RAW[name]
    path = write_lines(datasets_dir() / file, [good, row])
    with pytest.raises(UserError, match=rf"{path}: {reason}"):
        task_rows(name, TASK_DATA[name], sample=False)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[]"])
def test_a_file_without_rows_is_named(intactkv_root: Path, content: bytes) -> None:
    """Not taken for a split that is not here."""
    path = write_lines(datasets_dir() / RAW["lambada_openai"][0], [])
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"data of lambada_openai: {path} holds no rows; run 'bash"):
        task_rows("lambada_openai", TASK_DATA["lambada_openai"], sample=False)


# Rows without a right answer, as test splits are published, and rows that lack a part.
UNANSWERED: dict[str, list[tuple[Row, str]]] = {
    "openbookqa": [({"answerKey": ""}, "its answerKey is '', but the answers are 'A', 'B', 'C', 'D'"),
                   ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "it has 2 choices and 1 labels"),
                   ({"question_stem": None}, "its question_stem is None, not text")],
    "winogrande": [({"answer": ""}, "its answer is '', but the answers are '1', '2'"),
                   ({"answer": "0"}, "its answer is '0'"), ({"answer": None}, "its answer is None"),
                   ({"sentence": "No gap."}, "its sentence has no gap"), ({"option2": None}, "its option2 is None")],
    "arc_easy": [({"answerKey": "D"}, "its answerKey is 'D', but the answers are '1', '2', '3'")],
    "arc_challenge": [({"answerKey": "A"}, "its answerKey is 'A', but the answers are '1', '2', '3'"),
                      ({"answerKey": None}, "its answerKey is None")],
    "boolq": [({"label": -1}, "its label is -1, but the answers are 0, 1"), ({"label": None}, "its label is None")],
    "hellaswag": [({"label": ""}, "its label is '', but the answers are '0', '1', '2', '3'"),
                  ({"label": "4"}, "its label is '4'"), ({"label": "-1"}, "its label is '-1'")],
    "lambada_openai": [({"text": "and she liked the "}, "its text does not end in a last word"),
                       ({"text": "dog"}, "its text does not end in a last word"), ({"text": 3}, "its text is 3")],
    "piqa": [({"label": -1}, "its label is -1, but the answers are 0, 1"), ({"label": "0"}, "its label is '0'")],
    "gsm8k": [({"answer": "It is 2."}, "its answer has no result behind ####"),
              ({"answer": "2 ####"}, "its answer has no result")],
    "truthfulqa_gen": [({"correct_answers": []}, "it has no correct_answers"),
                       ({"incorrect_answers": [" "]}, "it has no incorrect_answers")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "changed", "reason"),
                         [(name, *case) for name in TASK_DATA for case in UNANSWERED[name]])  # fmt: skip
def test_a_row_without_a_right_answer_is_named(intactkv_root: Path, name: str, changed: Row, reason: str) -> None:
    """lm-eval stops at some of them with an exception of its own, and counts others as answered wrongly."""
    folder, config, split, row = HUB[name]
    path = datasets_dir() / folder / config / f"{split}-00000-of-00001.parquet"
    write_parquet(path, [row])
    assert task_rows(name, TASK_DATA[name], sample=False).splits == {split: [row]}
    write_parquet(path, [changed_row := row | changed, changed_row])
    with pytest.raises(UserError, match=rf"{path}: row 1 is of no form that this task can use \({reason}"):
        task_rows(name, TASK_DATA[name], sample=False)


# Tasks outside the table: rows of a split of the hub, and what is said of the second one.
SCIQ = {"question": "What is ice?", "distractor1": "fire", "distractor2": "air", "distractor3": "sand",
        "correct_answer": "water", "support": "Water freezes."}  # fmt: skip
SWAG = {"startphrase": "A man cuts bread and", "label": 1,
        **{f"ending{i}": ending for i, ending in enumerate(["flies.", "eats it.", "sings.", "is bread."])}}  # fmt: skip
ELSEWHERE: dict[str, tuple[str, Row, Row, str]] = {
    "swag": ("swag/regular/validation", SWAG, {"label": -1}, r"its answer is -1, which is none of its choices"),
    "sciq": (
        "sciq/data/test",
        SCIQ,
        {"distractor1": ""},
        r"one of its choices \['', 'air', 'sand', 'water'\] is empty",
    ),
    "triviaqa": (
        "trivia_qa/rc.nocontext/validation",
        {"question": "What is ice?", "answer": {"aliases": ["water"], "value": "water"}},
        {"answer": {"aliases": ["  "], "value": ""}},
        r"its answer is '\s+'",
    ),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_unanswered_question_of_any_task_is_named_before_it_is_scored(intactkv_root: Path, name: str) -> None:
    place, row, changed, reason = ELSEWHERE[name]
    write_parquet(datasets_dir() / f"{place}-00000-of-00001.parquet", [row, row | changed])
    task = load_tasks(task_runs([name])[0], "local", 0)[0][name]
    check_answers(name, task, 1)
    with pytest.raises(UserError, match=rf"{name}: question 2 is of no form .*{reason}"):
        check_answers(name, task, None)


def test_data_that_a_task_file_cannot_read_at_all_are_one_error(intactkv_root: Path) -> None:
    write_parquet(datasets_dir() / "swag/regular/validation-00000-of-00001.parquet", [{"startphrase": "A man"}])
    with pytest.raises(UserError, match=r"the data of swag is of no form that lm-eval's task file can use \("):
        load_tasks(task_runs(["swag"])[0], "local", 0)


def test_a_field_that_only_some_rows_have_is_named(intactkv_root: Path) -> None:
    """A table of them would hold None there, and the prompt the word "None"."""
    path = datasets_dir() / RAW["winogrande"][0]
    write_lines(path, [WINOGRANDE, {key: WINOGRANDE[key] for key in ("sentence", "option1", "answer")}])
    with pytest.raises(UserError, match=rf"{path}: row 2 .*no 'option2'"):
        task_rows("winogrande", TASK_DATA["winogrande"], sample=False)


def test_line_ends_and_hidden_files_do_not_change_a_tasks_data(intactkv_root: Path) -> None:
    path = write_lines(datasets_dir() / RAW["lambada_openai"][0], [LAMBADA])
    run = task_runs(["lambada_openai"])[0]
    plain = load_tasks(run, "local", 0)[1]
    assert plain == identity({"files": [sha256_of_file(path)], "fetched": []})  # records from before are found again
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    (path.parent / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    assert load_tasks(run, "local", 0)[1] == plain
    assert [file.name for file in scored_files(TASK_DATA["lambada_openai"])] == [path.name]


def test_a_damaged_line_is_named(intactkv_root: Path) -> None:
    path = datasets_dir() / RAW["lambada_openai"][0]
    write_lines(path, [LAMBADA])
    path.write_text(path.read_text() + '{"text": "half a')
    with pytest.raises(UserError, match=rf"{path} is truncated or damaged \(line 2"):
        task_rows("lambada_openai", TASK_DATA["lambada_openai"], sample=False)


# other tasks, samples, the hub ----------------------------------------------------------------------------------------


def test_a_task_outside_the_table_is_read_from_a_clone_of_its_name(intactkv_root: Path) -> None:
    row = {"question": "What is ice?", "answer": "water"}
    plain = unlisted_task("allenai/sciq", None, ("test", "train"))
    with pytest.raises(
        UserError, match=rf"data of sciq: {datasets_dir()}/sciq is missing; copy allenai/sciq of the hub"
    ):
        task_rows("sciq", plain, sample=False)
    write_parquet(datasets_dir() / "allenai/sciq/data/test-00000-of-00001.parquet", [row])
    assert task_rows("sciq", plain, sample=False).splits == {"test": [row]}
    # Of a repository with configurations only the one that is asked for counts.
    named = unlisted_task("allenai/sciq", "hard", ("test",))
    with pytest.raises(UserError, match="holds no test split"):
        task_rows("sciq_hard", named, sample=False)
    write_parquet(datasets_dir() / "allenai/sciq/hard/test-00000-of-00001.parquet", [row | {"answer": "steam"}])
    assert task_rows("sciq_hard", named, sample=False).splits["test"][0]["answer"] == "steam"


def test_a_sample_is_read_from_its_own_folder(intactkv_root: Path) -> None:
    assert set(SAMPLE_TASKS) == set(TASK_DATA) - {"truthfulqa_gen"}
    clone(datasets_dir() / "piqa", *HUB["piqa"][1:])
    with pytest.raises(
        UserError, match=r"sample-tasks/piqa is missing; run 'bash scripts/prepare/data\.sh sample-tasks'"
    ):
        task_rows("piqa", TASK_DATA["piqa"], sample=True)
    write_lines(datasets_dir() / "sample-tasks/piqa/validation.jsonl", [PIQA | {"label": 1}])
    assert task_rows("piqa", TASK_DATA["piqa"], sample=True).splits == {"validation": [PIQA | {"label": 1}]}
    with pytest.raises(UserError, match=r"no sample is made of truthfulqa_gen; samples are openbookqa.*--data local"):
        task_rows("truthfulqa_gen", TASK_DATA["truthfulqa_gen"], sample=True)


@pytest.mark.parametrize("name", TASK_DATA)
def test_preparing_fetches_what_is_read(intactkv_root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = []

    def snapshot_download(hub_id: str, **options: Any) -> None:
        asked.append((hub_id, options["repo_type"]))
        clone(options["local_dir"], *HUB[name][1:])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    directory = datasets_dir() / TASK_DATA[name].folders[0]
    assert prepare_data(name) == (directory, True)
    assert prepare_data(name) == (directory, False)
    assert asked == [(TASK_DATA[name].hub_id, "dataset")]


def test_a_repository_without_the_scored_split_is_told(intactkv_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"openai/gsm8k was fetched to .*gsm8k, but no test split is among it"):
        prepare_data("gsm8k")
    with pytest.raises(UserError, match=rf"mmlu is not fetched: unpack https.*data\.tar into {datasets_dir()}/mmlu"):
        prepare_data("mmlu")
    with pytest.raises(UserError, match=r"unknown data set 'helaswag'; known are wikitext2, .*sample-tasks.*hellaswag"):
        prepare_data("helaswag")
