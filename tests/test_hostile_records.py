"""Run records that were damaged, edited or made up: left out of tables by name, refused to the run that wants them."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_eval_records import SETTINGS, figures
from test_tables import BOS, perplexity, task

from corpora import machine
from corpora.errors import UserError, run_program
from corpora.files import name_part
from corpora.storage import identity
from eval import runs
from eval.__main__ import main
from eval.runs import all_records, record_of
from eval.tables.asked import cells_of
from eval.tables.declared import Scope
from eval.tables.ledger import Entry
from eval.tables.ledger import keep as keep_entry
from eval.tables.papers import PAPERS


@pytest.fixture
def program(run_main, caplog):
    """program(arguments…) -> (exit code, stdout, stderr with the warnings) of `eval table`, run in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        caplog.clear()
        code, out, err = run_main(main, "table", *arguments)
        return code, out, err + "".join(f"{line}\n" for line in caplog.messages)

    return run


def keep(kind: str, record: dict[str, Any]) -> Path:
    """Write a record as a run does."""
    found = {key: value for key, value in record.items() if key not in ("settings", "identity", "started")}
    return Path(record_of(kind, "some", record["settings"], lambda: found)["path"])


def asked(path: Path, table: str = "intactkv-1", item: str = "") -> None:
    """Say that a record answers a run of full precision of a published table."""
    scope = Scope(judge=("--judge-model", "j"))
    for cell in cells_of(PAPERS[table], Path(PAPERS[table].models[0]), scope):
        for run in cell.runs:
            if cell.row.label == "FP16" and (not item or run.item == item):
                keep_entry(run, Entry(program=run.program, model=run.model.name, item=run.item, command=[],
                                      record=path.name, seconds=1.0, finished="2026-01-01"))  # fmt: skip


def edited(path: Path, edit: Callable[[dict[str, Any]], None], rewrite: Callable[[str], str] = str) -> None:
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(rewrite(json.dumps(record)))


def no_sum(record: dict[str, Any]) -> None:
    del record["sha256"]


def with_settings(record: dict[str, Any], **settings: Any) -> None:
    """Other settings under the identity that they have: what a stranger would write."""
    record["settings"] |= settings
    record["identity"] = identity({"format": 2, "task": record["task"], **record["settings"]})
    no_sum(record)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def put(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set a field (`settings.prefix.label`), in a record of before, which has no sum."""

    def edit(record: dict[str, Any]) -> None:
        *way, last = place.split(".")
        for step in way:
            record = record[step]
        record[last] = value

    return lambda record: (no_sum(record), edit(record))[0]


FIGURES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no losses": (put("window_nll", None), "'window_nll' None is not a valid list"),
    "a loss is null": (put("window_nll", [1.0, None]), "'window_nll.1' None is not a valid number"),
    "a loss is a word": (put("window_nll", [1.0, "1.1"]), "'window_nll.1' '1.1' is not a valid number"),
    "no loss": (put("window_nll", []), "at least 1 item"),
    "too few losses": (put("windows", 3), "2 losses of 3 windows"),
    "a perplexity that is not its losses'": (put("perplexity", 9.5), "its perplexity is not that of its windows'"),
    "a perplexity as a word": (put("perplexity", "9.0"), "'perplexity' '9.0' is not a valid number"),
    "a negative perplexity": (put("perplexity", -9.0), "greater than 0"),
    "nesting": (put("quantization", nested(200)), "deeper than 100 levels"),
    "time as a number": (put("started", 5), "'started' 5"),
    "a format of another time": (put("format", 1), "format 1"),
    "no environment": (lambda record: record.pop("environment"), "no 'environment'"),
    "the figure was edited": (lambda record: record.update(perplexity=8.9, nll=math.log(8.9)), "has changed since"),
    "its windows' losses were edited": (lambda record: record["window_nll"].reverse(), "has changed since"),
    "another task": (put("task", "tasks"), "another run's: it says task 'tasks'"),
    "another identity": (put("identity", "0" * 8), "another run's"),
    "the settings were edited": (put("settings.window", 512), "was changed: its settings have the identity"),
    "the recipe was edited": (put("settings.recipe.weights.grid.bits", 4), "was changed: its settings have"),
}


@pytest.fixture
def two(intactkv_root) -> tuple[Path, Path]:
    """The vanilla record and the intact one of a setting."""
    losses = {"window_nll": [2.0, 2.2], "windows": 2, "nll": 2.1}
    records = [perplexity(math.exp(2.1), "rtn-w3", window=256, prefix=prefix) | losses
               for prefix in ({**BOS, "intact": False}, BOS)]  # fmt: skip
    return keep("ppl", records[0]), keep("ppl", records[1])


@pytest.mark.parametrize("case", FIGURES)
def test_a_bad_record_is_left_out_by_name_and_refused_to_its_run(case, two, program):
    edit, reason = FIGURES[case]
    settings = json.loads(two[1].read_text())["settings"]
    assert program("--format", "csv")[2] == ""  # the intact control
    edited(two[1], edit)
    code, out, err = program()
    assert code == 0
    assert len(err.splitlines()) == 1
    assert f"left out: run record {two[1]} " in err
    assert reason in err
    assert out.endswith("\n\n- left out: 1 run record that could not be read\n")
    assert "8.17" in out  # of the other
    with pytest.raises(UserError, match="--force") as error:
        record_of("ppl", "some", settings, dict)
    assert reason in str(error.value)


SETTINGS_OF_A_STRANGER: dict[str, Any] = {
    "protocol": "unknown", "prefix": {"label": 5, "ids": [], "file": None, "intact": True}, "made_of": {},
    "recipe": {"weights": {"kind": "RTN"}}, "kv": {"kind": "PerHead"}, "model": ["m"], "window": "512", "limit": 1.5,
}  # fmt: skip


@pytest.mark.parametrize("field", SETTINGS_OF_A_STRANGER)
@pytest.mark.parametrize("table", [(), ("1",)])
def test_settings_of_another_form_are_left_out_even_under_their_own_identity(field, table, two, program):
    path = two[1]
    edited(path, lambda record: with_settings(record, **{field: SETTINGS_OF_A_STRANGER[field]}))
    key = json.loads(path.read_text())["identity"]
    path = path.rename(path.with_name(f"ppl-some-{key}.json"))
    asked(path)
    code, _, err = program(*table)
    assert code == 0
    assert f"left out: run record {path} is damaged: it" in err
    assert f"'settings.{field}" in err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"perplexity": 1}', '{"a": ' + "9" * 5000 + "}", "\0",
                                     '{"a": NaN}', "[" * 100_000, '{"a": "\\ud800"}'])  # fmt: skip
def test_a_file_that_is_no_record_kills_no_table(content, two, program):
    two[0].write_text(content)
    asked(two[0])
    code, out, err = program("1", "--format", "latex")
    assert (code, len(err.splitlines())) == (0, 1)
    assert two[0].name in err
    assert out.endswith("% left out: 1 run record that could not be read\n")
    assert two[0].read_text() == content


@pytest.mark.parametrize("which", [(), ("tasks",)])
def test_where_no_record_can_be_read_there_is_one_line(which, program, intactkv_root):
    paths = [keep("ppl", perplexity(9.0)), keep("tasks", task("boolq", 0.5))]
    for path in paths:
        path.write_text("{")
    code, out, err = program(*which)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "holds no finished run that can be read (1 left out: run record" in err
    assert paths[len(which)].name in err


def test_what_is_no_file_or_not_to_be_read_is_left_out_too(two, program):
    two[0].unlink()
    two[0].mkdir()
    two[1].with_name("ppl-gone-00000000.json").symlink_to("nowhere")
    os.mkfifo(two[1].with_name("ppl-pipe-00000000.json"))
    code, out, err = program()
    assert code == 0
    assert [name for name in ("folder", "missing", "pipe") if name not in err] == []
    assert "left out: 3 run records" in out


@pytest.mark.parametrize("edit", [put("metrics", {"acc": None}), put("metrics", {}), put("metrics", {"acc": 1.2}),
                                  put("samples", "100"), put("stderr", None), put("settings", {})])  # fmt: skip
def test_a_bad_task_record_is_left_out_of_every_table_of_tasks(edit, program, intactkv_root):
    bad = keep("tasks", task("boolq", 0.5))
    keep("tasks", task("piqa", 0.75))
    edited(bad, edit)
    asked(bad, "intactkv-3", "boolq")
    for which in (("tasks",), ("3",)):
        code, out, err = program(*which)
        assert (code, len(err.splitlines())) == (0, 1)
        assert bad.name in err
        assert which != ("tasks",) or "75.00" in out


def test_a_bad_judged_record_is_left_out_of_table_4(program, intactkv_root):
    (intactkv_root / "outputs" / "runs").mkdir(parents=True)
    path = intactkv_root / "outputs" / "runs" / "judge-m-00000000.json"
    path.write_text("{}")
    asked(path, "intactkv-4")
    code, out, err = program("4", "--judge-model", "j")
    assert (code, len(err.splitlines())) == (0, 1)
    assert out.endswith("- left out: 1 run record that could not be read\n")


def test_a_damaged_answer_is_left_out_with_the_way_out(two, program, intactkv_root):
    asked(two[0])
    (entry,) = (intactkv_root / "outputs" / "asked").glob("*.json")
    entry.write_text("{")
    code, out, err = program("1", "--model", PAPERS["intactkv-1"].models[0])
    assert code == 0
    assert out.endswith("could not be read\n")
    assert entry.name in err
    assert "delete the file" in err


def test_a_record_of_before_the_sums_is_read(two):
    edited(two[0], no_sum)
    assert len(all_records("ppl")) == 2


def test_words_of_a_stranger_stay_in_their_cell(two, program):
    edited(two[1], lambda record: with_settings(record, model="a\x1b[2Jb|c\nd"))
    key = json.loads(two[1].read_text())["identity"]
    two[1].rename(two[1].with_name(f"ppl-some-{key}.json"))
    code, out, err = program()
    assert (code, err) == (0, "")
    assert "a\\x1b[2Jb\\|c\\nd" in out
    assert "\x1b" not in out


# ---- names and places


@pytest.mark.parametrize("name", ["..", "../../../X", "/etc/passwd", ".hidden", "a\nb", "a\0b", "m" * 300, "長" * 300,
                                  "\ud800", "", "🎉" * 100, "a\\b"])  # fmt: skip
def test_a_name_makes_no_path(name, intactkv_root):
    record = record_of("ppl", name, SETTINGS, lambda: figures(2.0))
    path = Path(record["path"])
    assert path.parent == intactkv_root / "outputs" / "runs"
    assert [file for file in intactkv_root.rglob("*") if file.is_file()] == [path]
    assert path.name.isprintable()
    assert all_records("ppl") == [record]


def test_the_name_of_a_record_stays_what_it_was():
    for name in ("smollm2-135m-rtn-w4g64-sample", "m-full-my text (2).txt", "tiny-llama-rtn-w3g16-corp.txt", "größe"):
        assert name_part(name) == name
    assert name_part("a/b") == "a-b"
    assert len({name_part("m" * 200 + end) for end in "abc"}) == 3


def refused(disk: Path, act: Callable[[], Any], capsys: Any) -> str:
    """The one line of a program that acts on a disk of nothing."""
    with pytest.raises(SystemExit) as stopped:
        run_program(act)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_place_that_takes_no_file_is_found_out_before_the_run(intactkv_root, capsys):
    def never() -> dict[str, Any]:
        raise AssertionError("ran")

    (intactkv_root / "outputs").mkdir()
    (intactkv_root / "outputs" / "runs").write_text("")
    line = refused(intactkv_root, lambda: record_of("ppl", "m", SETTINGS, never), capsys)
    assert str(intactkv_root / "outputs" / "runs") in line
    (intactkv_root / "outputs" / "runs").unlink()
    name = Path(record_of("ppl", "m", SETTINGS, lambda: figures(2.0))["path"])
    name.unlink()
    name.mkdir()
    line = refused(intactkv_root, lambda: record_of("ppl", "m", SETTINGS, never, force=True), capsys)
    assert "is a directory" in line


def test_a_disk_that_is_full_in_the_end_costs_no_figure(intactkv_root, capsys, monkeypatch):
    def full(path: Path, record: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True)  # the folder is made with the record
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as disk:
        disk.setattr(runs, "write_json", full)
        with pytest.raises(UserError, match=r"could not be written \(No space left on device\)"):
            record_of("ppl", "m", SETTINGS, lambda: figures(2.0))
    printed = json.loads(capsys.readouterr().out)
    path = intactkv_root / "outputs" / "runs" / f"ppl-m-{printed['identity']}.json"
    path.write_text(json.dumps(printed))
    assert record_of("ppl", "m", SETTINGS, dict)["perplexity"] == 2.0


def test_a_record_says_with_what_it_was_made(intactkv_root):
    assert record_of("ppl", "m", SETTINGS, lambda: figures(2.0))["environment"] == machine.environment()
