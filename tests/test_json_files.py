"""What the boundary of JSON lets through, and what it says of the rest."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired

import pytest
from typing_extensions import TypedDict

from corpora.errors import UserError
from corpora.files import sha256_of_data, sha256_of_file
from corpora.json_files import Count, FileName, parse_json, read_json, with_sum, without_sum


class Form(TypedDict):
    name: FileName
    ids: list[Count]
    share: NotRequired[float]


GOOD = {"name": "smollm2-135m", "ids": [0, 2**62], "share": 1, "more": None}


def test_what_fits_comes_back_whole() -> None:
    assert parse_json(json.dumps(GOOD), "it", Form) == GOOD


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "../x"}, r"its 'name' '\.\./x' is no plain name"),
        ({"name": "a/b"}, "no plain name"),
        ({"name": "."}, "no plain name"),
        ({"name": ""}, "no plain name"),
        ({"name": "a\x1bb"}, "no plain name"),
        ({"name": "é" * 101}, "longer than 200 bytes"),
        ({"name": 5}, "its 'name' 5 is not a valid string"),
        ({"ids": [1, "2"]}, r"its 'ids\.1' '2' is not a valid integer"),
        ({"ids": [True]}, "not a valid integer"),
        ({"ids": [2.0]}, "not a valid integer"),
        ({"ids": [-1]}, "greater than or equal to 0"),
        ({"ids": [10**22]}, "less than"),
        ({"ids": None}, "its 'ids' None is not a valid list"),
        ({"share": "0.5"}, "not a valid number"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as found:
        parse_json(json.dumps(GOOD | change), "the thing", Form, mend="make it again")
    assert str(found.value).startswith("the thing is damaged: ")
    assert str(found.value).endswith("; make it again")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match="it has no 'ids'"):
        parse_json('{"name": "a"}', "the thing", Form)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not readable JSON"),
        ('{"a": 1', "not readable JSON"),
        ("9" * 5000, "not readable JSON"),
        ("[" * 100_000, "nested deeper"),
        ("[" * 500 + "]" * 500, "nested deeper"),
        ('{"a": ' * 101 + "1" + "}" * 101, "nested deeper"),
        ('{"a": [1, 1e400]}', r"its 'a\.1' is inf"),
        ('{"a": NaN}', "its 'a' is nan"),
        ('{"a": ' + "9" * 39 + "}", "more than 38 digits: its 'a'"),
        ('["\\ud83d"]', "half of a character"),
        ('{"\\ud83d": 1}', "half of a character"),
    ],
)
def test_values_that_no_reader_could_use_are_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_json(text, "the thing")


def test_depths_that_are_read() -> None:
    assert parse_json("[" * 100 + "]" * 100, "it")


def test_a_value_with_a_sum_reads_back_or_is_refused() -> None:
    value = {"a": [1, 2.5, "ä"], "b": None}
    for key in ("sha256", "sum"):
        kept = json.loads(json.dumps(with_sum(value, key)))
        canonical = '{"a":[1,2.5,"\\u00e4"],"b":null}'
        assert kept[key] == hashlib.sha256(canonical.encode()).hexdigest()
        assert without_sum(kept, "the thing", key=key) == value
        for change in ({"a": [1, 2.5, "a"]}, {"c": 1}, {key: "0" * 64}):
            with pytest.raises(UserError, match=r"the thing has changed since it was written .*; mend it"):
                without_sum(kept | change, "the thing", key=key, mend="mend it")
    assert without_sum(value, "a file of before") == value


@pytest.mark.parametrize("hash_of", [sha256_of_file, sha256_of_data])
def test_a_file_is_hashed_once_and_again_when_it_changed(
    hash_of: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text("one")
    assert hash_of(file) == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda *_: pytest.fail("read again"))
        assert hash_of(file) == hashlib.sha256(b"one").hexdigest()
    other.write_text("two")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))  # as `cp --preserve` and rsync leave it
    other.replace(file)
    assert hash_of(file) == hashlib.sha256(b"two").hexdigest()


def test_no_reader_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"the thing .*pipe is a pipe or device"):
        read_json(tmp_path / "pipe", "the thing")
    with pytest.raises(UserError, match="is missing"):
        read_json(tmp_path / "nothing", "the thing")
    with pytest.raises(UserError, match="is a folder"):
        read_json(tmp_path, "the thing")


def test_a_file_that_no_memory_holds_is_not_read(tmp_path: Path) -> None:
    with (path := tmp_path / "config.json").open("wb") as file:
        file.truncate(20 * 10**9)  # takes no place on the disk
    with pytest.raises(UserError, match=r"the thing .*config\.json has 20\.0 GB, which no such file has"):
        read_json(path, "the thing")
