"""Texts, tables and questions that were damaged or made up: read as they stand, or refused in one line by name."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from test_corpora_text import word_tokenizer
from test_task_data import HELLASWAG, OBQA, WINOGRANDE

from corpora import files
from corpora.conversations import sample_turns
from corpora.errors import UserError
from corpora.mmlu import read_mmlu
from corpora.readers import read_documents, read_rows
from corpora.task_data import TASK_DATA, task_rows
from corpora.text import calibration_segments, evaluation_stream, protocol, text_identity
from eval.tasks.lm_tasks import load_tasks, task_runs

ROWS = [{"text": f"some words of row {i} é " * 3, "number": i, "tags": ["a", "b"], "more": {"x": 1.5}}
        for i in range(60)]  # fmt: skip
TABLE = pyarrow.Table.from_pylist(ROWS)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def arrow(new: Callable[..., Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with new(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=20)
    return sink.getvalue().to_pybytes()


def parquet(table: pyarrow.Table = TABLE, **options: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


CONTENTS: dict[str, bytes] = {
    "a.parquet": parquet(),
    "plain.parquet": parquet(use_dictionary=False, compression="none"),
    "stream.arrow": arrow(pyarrow.ipc.new_stream),
    "file.arrow": arrow(pyarrow.ipc.new_file),
    "a.jsonl": LINES,
    "a.json": json.dumps(ROWS).encode(),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstandard.compress(LINES),
    "a.txt": b"words \xc3\xa9 of text\n" * 30,
    "x_test.csv": "".join(f'"question {i}, or not?","one","two",3,"{i}",{"ABCD"[i % 4]}\n' for i in range(20)).encode(),
}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A file cut, or with bytes changed, lost, added, set to zero, or changed near its end, where footers are."""
    data, at, some = bytearray(content), draw.randrange(len(content)), draw.randbytes(draw.randint(1, 20))
    match draw.randrange(7):
        case 0:
            del data[at:]
        case 1:
            data[at : at + len(some)] = some
        case 2:
            data[at : at + 100] = bytes(100)
        case 3:
            del data[at : at + draw.randint(1, 50)]
        case 4:
            data[at:at] = some
        case 5:
            data[at] ^= 1 << draw.randrange(8)
        case 6:
            data[len(data) - draw.randint(1, 60)] = some[0]
    return bytes(data)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_damaged_file_is_read_or_named_and_never_another_error(name, tmp_path):
    path = tmp_path / "test" / name
    path.parent.mkdir()
    reads: list[Callable[[], Any]] = [lambda: list(read_documents(path))]
    if "json" in name or path.suffix in (".parquet", ".arrow"):
        reads.append(lambda: list(read_rows(path)))
    if path.suffix == ".csv":
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev" / "x_dev.csv").write_bytes(CONTENTS[name])
        reads = [lambda: read_mmlu(tmp_path), lambda: read_mmlu(tmp_path, strict=True)]
    draw, said = random.Random(name), []
    for number in range(31):
        path.write_bytes(damaged(CONTENTS[name], draw) if number else CONTENTS[name])
        for read in reads:
            try:
                read()
            except UserError as error:
                said.append(str(error))
        assert number or not said, "the intact control"
    assert len(said) > 5
    assert [line for line in said if str(path) not in line or len(line) > 800] == []


OUTSIDE = {"../x.arrow": "no plain name", "/etc/passwd": "no plain name", "a\nb": "no plain name", 5: "valid string"}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_folders_list_names_files_of_the_folder_alone(name, tmp_path):
    (tmp_path / "x.arrow").write_bytes(CONTENTS["stream.arrow"])
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "in.arrow").write_bytes(CONTENTS["stream.arrow"])
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "in.arrow"}]}))
    assert len(list(read_documents(folder))) == len(ROWS)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match=OUTSIDE[name]):
        list(read_documents(folder))


STRANGE_COLUMNS = {
    "a null": pyarrow.array(["a", None]), "lists": pyarrow.array([["a"], ["b"]]), "numbers": pyarrow.array([1, 2]),
    "bytes": pyarrow.array([b"a", b"\xff"]), "structs": pyarrow.array([{"a": 1}, {"a": 2}]),
    "dates beyond Python's": pyarrow.array([2**62, 1], pyarrow.timestamp("us")),
    "no UTF-8": pyarrow.StringArray.from_buffers(2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"),
                                                 pyarrow.py_buffer(b"\xff\xfe")),
}  # fmt: skip


@pytest.mark.parametrize("what", STRANGE_COLUMNS)
def test_a_column_that_is_no_text_is_named(what, tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(pyarrow.table({"text": STRANGE_COLUMNS[what]})))
    with pytest.raises(UserError, match=r"a\.parquet"):
        list(read_documents(path))


def test_two_columns_of_one_name_are_refused(tmp_path):
    schema = pyarrow.schema([("text", pyarrow.string()), ("text", pyarrow.string())])
    path = tmp_path / "a.arrow"
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pyarrow.record_batch([["a"], ["b"]], schema=schema))
    for read in (read_documents, read_rows):
        with pytest.raises(UserError, match="two columns of one name"):
            list(read(path))


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_bomb_is_refused_before_it_fills_the_memory(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_UNPACKED", 1 << 20)
    path = tmp_path / {gzip.compress: "a.txt.gz"}.get(pack, "a.txt.zst")
    path.write_bytes(pack(b"a sentence that is no bomb. " * 20_000))  # 560 kB
    assert len(next(read_documents(path))) == 560_000
    path.write_bytes(pack(bytes(8 << 20)))
    with pytest.raises(UserError, match="unpacks to more than 1 MB"):
        list(read_documents(path))


@pytest.mark.parametrize(("value", "reason"), [
    ('{"x": ' * 200 + "1" + "}" * 200, "100 levels"), ("9" * 5000, "integer string conversion"),
    ("9" * 4000, "more than 38 digits"), ("NaN", "not finite"), ("1e999", "not finite"), ('"\\ud83d"', "half of a"),
    ("[" * 100_000, "recursion"),
])  # fmt: skip
def test_a_record_of_json_that_nothing_can_use_is_named(value, reason, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 2 + f'{{"text": "a", "x": {value}}}\n')
    with pytest.raises(UserError, match=reason) as error:
        list(read_rows(path))
    assert str(path) in str(error.value)
    assert "3" in str(error.value)


BAD_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "a choice is null": ("openbookqa", OBQA | {"choices": {"text": ["a", None], "label": ["A", "B"]}}),
    "a label is a number": ("openbookqa", OBQA | {"choices": {"text": ["a", "b"], "label": [1, "B"]}}),
    "choices in one text": ("openbookqa", OBQA | {"choices": {"text": "cold", "label": "ABCD"}}),
    "no choices": ("openbookqa", OBQA | {"choices": None}),
    "an ending is null": ("hellaswag", HELLASWAG | {"endings": ["a", None, "c"]}),
    "endings in one text": ("hellaswag", HELLASWAG | {"endings": "abcd"}),
    "an option is null": ("winogrande", WINOGRANDE | {"option2": None}),
    "an answer is a list": ("winogrande", WINOGRANDE | {"answer": ["1"]}),
    "a label is true": ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": True}),
    "a label is a fraction": ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": 0.5}),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_question_with_a_hole_is_named_by_its_row(case, intactkv_root):
    name, row = BAD_ROWS[case]
    good = {"openbookqa": OBQA, "hellaswag": HELLASWAG, "winogrande": WINOGRANDE}.get(name, row | {"label": 1})
    split = next(iter(TASK_DATA[name].splits))
    folder = intactkv_root / "datasets" / TASK_DATA[name].folders[0]
    folder.mkdir(parents=True)
    path = folder / {"openbookqa": "test.jsonl", "winogrande": "dev.jsonl"}.get(name, "hellaswag_val.jsonl")
    if name == "piqa":
        path = folder / "data" / "validation-0.parquet"
        path.parent.mkdir()

    def write(rows: list[dict[str, Any]]) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if name == "piqa":
            path.write_bytes(parquet(pyarrow.Table.from_pylist(rows)))

    write([good])
    assert len(task_rows(name, TASK_DATA[name], sample=False).splits[split]) == 1
    write([row] if name == "piqa" else [good, row])
    with pytest.raises(UserError, match=r"row [12] is of no form that this task can use"):
        task_rows(name, TASK_DATA[name], sample=False)


INTACTKV = protocol("intactkv")


def test_a_text_without_words_is_named(tmp_path):
    for content in ("", "\n \n"):
        (tmp_path / "empty.txt").write_text(content)
        with pytest.raises(UserError, match=r"empty\.txt holds no text"):
            evaluation_stream(word_tokenizer(), str(tmp_path / "empty.txt"), window=8, protocol=INTACTKV)
    (tmp_path / "short.txt").write_text("a b")
    stream = evaluation_stream(word_tokenizer(), str(tmp_path / "short.txt"), window=8, protocol=INTACTKV)
    with pytest.raises(UserError, match=r"short\.txt has 3 tokens, which is less than one window of 8"):
        stream.windows()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_a_corpus_that_is_no_file_is_refused_without_waiting_for_it(kind, tmp_path):
    path = tmp_path / "text"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
    with pytest.raises((UserError, OSError), match=path.name):
        text_identity(word_tokenizer(), str(path), samples=1, length=4)
    with pytest.raises((UserError, OSError), match=path.name):
        evaluation_stream(word_tokenizer(), str(path), window=4, protocol=INTACTKV)


def test_a_text_that_changes_after_its_hash_is_not_calibrated_on(tmp_path):
    path, draw = tmp_path / "a.txt", {"samples": 1, "length": 4}
    path.write_text("a b c d e f g h")
    before = text_identity(word_tokenizer(), str(path), **draw)
    os.utime(path, (1, 1))  # touched, but the same
    calibration_segments(word_tokenizer(), str(path), seed=0, **draw)
    path.write_text("h g f e d c b a")
    with pytest.raises(UserError, match=r"a\.txt has changed since this run began"):
        calibration_segments(word_tokenizer(), str(path), seed=0, **draw)
    assert text_identity(word_tokenizer(), str(path), **draw) != before
    calibration_segments(word_tokenizer(), str(path), seed=0, **draw)


def test_an_article_without_title_or_text_is_named(intactkv_root):
    path = intactkv_root / "datasets" / "sample" / "calibration.jsonl"
    path.parent.mkdir(parents=True)
    for row in ({"text": "a"}, {"title": "a", "text": None}, {"title": 5, "text": "a"}):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=r"article 1 of .*calibration\.jsonl"):
            list(sample_turns("calibration", 0))


# ---- no code of strangers


def test_a_task_file_of_the_users_is_never_read(tmp_path):
    (tmp_path / "utils.py").write_text("raise SystemExit('ran')\n")
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: x\nprocess_docs: !function utils.run\n")
    for name in (str(tmp_path / "mine.yaml"), str(tmp_path), "../mine", "mine"):
        with pytest.raises(UserError, match="there is no task"):
            task_runs([name])


@pytest.mark.parametrize(("name", "reason"), [
    ("humaneval", "runs programs that the model writes"), ("mbpp", "runs programs that the model writes"),
    ("meqsum", "is a program on the hub, which is not run"),
])  # fmt: skip
def test_tasks_that_run_fetched_or_written_programs_are_refused_before_their_functions_are_imported(name, reason):
    for run in task_runs([name]):
        with pytest.raises(UserError, match=reason):
            load_tasks(run, "local", None)


def test_a_cell_with_a_nul_character_is_named(tmp_path):
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"x_{split}.csv").write_text("a,b,c,d,e,A\n")
    assert len(read_mmlu(tmp_path, strict=True)) == 1
    (tmp_path / "test" / "x_test.csv").write_text('a,b,c,d,e,A\n"a\0b",b,c,d,e,A\n')
    with pytest.raises(UserError, match=r"x_test\.csv"):
        read_mmlu(tmp_path)
