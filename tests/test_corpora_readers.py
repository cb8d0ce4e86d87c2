"""Readers: files that other libraries wrote come back as the documents they hold; damaged ones never pass for whole."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import zstandard

from corpora.errors import UserError
from corpora.files import data_files, sha256_of_data
from corpora.readers import read_documents, read_records, read_rows

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


def test_plain_text_is_one_document_or_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"a\r\nb \n")
    assert list(read_documents(file)) == ["a\nb \n"]
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


ENDS = {"unix": b"\n", "dos": b"\r\n", "old mac": b"\r"}
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.md", "noname"])
@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_line_ends_and_byte_order_marks_do_not_change_a_text(
    tmp_path: Path, name: str, mark: bytes, end: bytes
) -> None:
    """The truth is Python's text mode."""
    content = mark + "é one\n\ntwo \n".encode().replace(b"\n", end)
    (tmp_path / "plain").write_bytes(content)
    expected = (tmp_path / "plain").read_text(encoding="utf-8-sig")
    assert expected == "é one\n\ntwo \n"
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(content))
    assert list(read_documents(tmp_path / name)) == [expected]
    assert list(read_documents(tmp_path / name, line=str.strip)) == ["é one", "", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_the_hash_of_a_text_file_does_not_depend_on_its_line_ends(tmp_path: Path, name: str) -> None:
    """That of a file with plain line ends is that of its bytes, so that what was made from it is found again."""
    text = b'{"text": "\xc3\xa9"}\n\n' * 100_000
    hashes = set()
    for mark in (b"", MARK):
        for end in ENDS.values():
            (tmp_path / name).write_bytes(mark + text.replace(b"\n", end))
            hashes.add(sha256_of_data(tmp_path / name))
    assert hashes == {hashlib.sha256(text).hexdigest()}


def test_the_hash_of_a_packed_file_or_a_table_is_that_of_its_bytes(tmp_path: Path) -> None:
    for name in ("a.json.gz", "a.jsonl.zst", "a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"1\r\n2\r3")
        assert sha256_of_data(tmp_path / name) == hashlib.sha256(b"1\r\n2\r3").hexdigest()


LAYOUTS = {
    "a list on one line": json.dumps([{"text": text} for text in TEXTS]),
    "a list, indented": json.dumps([{"text": text} for text in TEXTS], indent=2),
    "one a line": "\n".join(json.dumps({"text": text}) for text in TEXTS),
    "one a line, blank lines between": "\n\n".join(json.dumps({"text": text}) for text in TEXTS),
    "objects over several lines": "\n".join(json.dumps({"text": text}, indent=2) for text in TEXTS),
    "objects on one line": " ".join(json.dumps({"text": text}) for text in TEXTS),
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.json.gz", "a.jsonl.zst", "A.JSON"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("start", ["", "\ufeff", "\r\n \n"])
def test_json_is_read_however_it_is_laid_out(tmp_path: Path, name: str, layout: str, start: str) -> None:
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack((start + LAYOUTS[layout]).encode()))
    assert list(read_documents(tmp_path / name)) == TEXTS


def test_a_single_object_over_several_lines_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n "text": "all of it",\n "more": [1, 2]\n}\n')
    assert list(read_records(tmp_path / "a.json")) == [{"text": "all of it", "more": [1, 2]}]
    (tmp_path / "a.json").write_text('{\n "data": [{"text": "a"}]\n}\n')
    with pytest.raises(UserError, match="record 1 has no text in the field 'text'; it has: data"):
        list(read_documents(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"text": "a"}\n\n{"text": "b\n', 3),
        ('[\n{"text": "a"},\n{"text": "b\n', 3),
        ('\n{\n"text": "a"\n}\n{\n"text": b\n}', 6),
        ('[{"text": "a"}]\n{"text": \n', 3),
    ],
)
def test_where_json_is_damaged_is_told(tmp_path: Path, content: str, line: int) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(
        UserError, match=rf"a\.json is truncated or damaged \(line {line}: .*mend it, or fetch it again"
    ):
        list(read_records(tmp_path / "a.json"))


@pytest.mark.parametrize("content", ["[" * 100_000, f'{{"text": {"9" * 5000}}}', f'{{"a": 1}}\n{"[" * 100_000}'])
def test_json_that_python_does_not_parse_is_one_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"a\.jsonl is truncated or damaged"):
        list(read_records(tmp_path / "a.jsonl"))


def test_half_of_a_character_is_named_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "not fine \\ud83d"}\n')
    found = rf"{file}: .*record 2 holds half of a character \(\\ud83d, behind 'not fine '\)"
    with pytest.raises(UserError, match=found):
        list(read_documents(file))
    with pytest.raises(UserError, match=found):
        list(read_rows(file))
    file.write_text('{"choices": [{"label\\udc00": 1}]}')
    with pytest.raises(UserError, match=r"record 1 holds half of a character \(\\udc00, behind 'label'\)"):
        list(read_rows(file))


REFUSED = {
    "utf-16": ("a.txt", "naïve".encode("utf-16"), "is text in UTF-16, which is not read; save it as UTF-8"),
    "utf-16, big-endian": ("a.txt", "\ufeffnaïve".encode("utf-16-be"), "is text in UTF-16"),
    "utf-16 json": ("a.json", '{"text": "a"}'.encode("utf-16"), "is text in UTF-16"),
    "utf-16 without a mark": ("a.txt", "naive".encode("utf-16-le"), "holds NUL characters, so it is no text in UTF-8"),
    "windows-1252": ("a.txt", "naïve “text”".encode("cp1252"), "is not plain text in UTF-8 .*0xef"),
    "windows-1252 in gzip": ("a.txt.gz", gzip.compress("naïve".encode("cp1252")), "is not plain text in UTF-8"),
    "windows-1252 json": ("a.jsonl", '{"text": "é"}'.encode("cp1252"), "is not plain text in UTF-8 .*0xe9"),
    "another packing": ("a.txt.xz", b"\xfd7zXZ", r"is packed as \.xz, which is not read; unpack it"),
    "another packing of json": ("a.json.bz2", b"BZh", r"is packed as \.bz2"),
    "no gzip": ("a.txt.gz", b"plain", "is truncated or damaged"),
    "cells": ("a.csv", b"text\nsome", "is a table of cells, which is not read as text"),
    "packed cells": ("a.tsv.gz", b"", "is a table of cells"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_that_can_be_read_is_named(tmp_path: Path, case: str) -> None:
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} {message}"):
        list(read_documents(tmp_path / name))


def test_hidden_files_and_caches_are_no_data(tmp_path: Path) -> None:
    """A Mac leaves a ._NAME beside every NAME that it copies, the hub's client a folder .cache."""
    for name in ("b.csv", "a.csv", "._a.csv", ".cache/a.csv", "cache-1.csv", ".DS_Store.csv", "in/c.csv", "in/._c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "folder.csv").mkdir()
    assert data_files(tmp_path, "*.csv") == [tmp_path / "a.csv", tmp_path / "b.csv"]
    assert data_files(tmp_path, "**/*.csv") == [tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "in/c.csv"]


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="save_to_disk"):
        list(read_documents(tmp_path))
