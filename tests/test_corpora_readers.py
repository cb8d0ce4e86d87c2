"""Readers: files that other libraries wrote come back as the documents they hold; damaged ones never pass for whole."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from corpora.errors import UserError
from corpora.readers import read_documents, read_records

TEXTS = ["one", " two \n", "", "drei “vier” \u2028 \N{GRINNING FACE}"]


def write_parquet(path: Path) -> Path:
    import pandas

    pandas.DataFrame({"id": range(len(TEXTS)), "text": TEXTS}).to_parquet(path)
    return path


def write_json_list(path: Path) -> Path:
    path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1), encoding="utf-8")
    return path


def write_json_lines(path: Path) -> Path:
    lines = "".join(json.dumps({"text": text, "url": "x"}, ensure_ascii=False) + "\n" for text in TEXTS)
    data = lines.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def write_save_to_disk(path: Path) -> Path:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path, num_shards=2)
    return path


def write_arrow_stream(path: Path) -> Path:
    return next(write_save_to_disk(path.with_suffix("")).glob("data-00000*.arrow"))


def write_feather(path: Path) -> Path:
    import pandas

    pandas.DataFrame({"text": TEXTS}).to_feather(path, compression="uncompressed")
    return path


WRITERS = {
    "a.parquet": write_parquet,
    "a.json": write_json_list,
    "lines.json": write_json_lines,
    "a.jsonl": write_json_lines,
    "a.json.gz": write_json_lines,
    "a.jsonl.gz": write_json_lines,
    "a.jsonl.zst": write_json_lines,
    "folder": write_save_to_disk,
    "feather.arrow": write_feather,
}


@pytest.mark.parametrize("name", WRITERS)
def test_documents_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    assert list(read_documents(WRITERS[name](tmp_path / name))) == TEXTS


def test_one_shard_of_a_saved_data_set_is_read(tmp_path: Path) -> None:
    assert list(read_documents(write_arrow_stream(tmp_path / "a.arrow"))) == TEXTS[:2]


def test_several_files_are_read_in_the_given_order(tmp_path: Path) -> None:
    files = []
    for i in (2, 1):
        files.append(tmp_path / f"{i}.jsonl")
        files[-1].write_text(json.dumps({"text": str(i)}))
    assert list(read_documents(files)) == ["2", "1"]


def test_plain_text_is_one_document_as_it_is_or_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"a\r\nb \n")
    assert list(read_documents(file)) == ["a\r\nb \n"]
    assert list(read_documents(file, line=str.strip)) == ["a", "b"]


def test_reading_is_lazy(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "first"}\nnot json\n')
    assert next(iter(read_documents(file))) == "first"


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.json.gz", "a.jsonl.zst", "feather.arrow"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    file = WRITERS[name](tmp_path / name)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{name} is truncated or damaged .*fetch it again"):
        list(read_documents(file))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.json.gz", "a.jsonl.zst", "a.jsonl"])
def test_what_is_not_of_the_format_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)  # a clone without git-lfs
    with pytest.raises(UserError, match=f"{name} is truncated or damaged"):
        list(read_documents(tmp_path / name))


def test_a_damaged_line_is_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b\n')
    with pytest.raises(UserError, match="line 3"):
        list(read_records(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "feather.arrow"])
def test_a_missing_field_is_told_with_those_there_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"'sentence'.*text"):
        list(read_documents(WRITERS[name](tmp_path / name), "sentence"))


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.json.gz", "a.txt", "a.arrow"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is missing"):
        list(read_documents(tmp_path / name))


def test_text_in_another_encoding_and_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        list(read_documents(tmp_path / "a.txt"))
    with pytest.raises(UserError, match="save_to_disk"):
        list(read_documents(tmp_path))
