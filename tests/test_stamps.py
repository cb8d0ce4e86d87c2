"""The ledger calls finished only what would read the same files today: every kind of file, copies, other models."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_tables import perplexity

from corpora.json_files import write_json
from corpora.paths import datasets_dir, modelzoo_dir, outputs_dir
from eval.runs import record_of
from eval.tables import stamps
from eval.tables.asked import PLACE, Run
from eval.tables.ledger import Entry, answer_of, entry_of, is_done, keep, open_runs, read_before

LATER = 5 * 10**9  # ns


@pytest.fixture
def world(intactkv_root: Path) -> Path:
    """A model, a text, a task, and a prefix file; returns the model's directory."""
    model = modelzoo_dir() / "mine"
    for file, text in {
        model / "config.json": "{}",
        model / "tokenizer.json": "words",
        datasets_dir() / "sample" / "calibration.jsonl": "one",
        datasets_dir() / "sample" / "evaluation.jsonl": "two",
        datasets_dir() / "sample-tasks" / "boolq" / "validation.jsonl": "is it?",
        intactkv_root / "prefix.safetensors": "a prefix",
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    save_file({"a": torch.zeros(50_000), "b": torch.zeros(8)}, model / "model.safetensors")
    return model


def finished(run: Run, when: str = "2026", **more: Any) -> None:
    entry: Entry = {"program": run.program, "model": run.model.name, "item": run.item, "command": [], "seconds": 1.0,
                    "finished": when, **more}  # type: ignore[typeddict-item]  # fmt: skip
    keep(run, entry)


def changed(file: Path, text: str) -> None:
    """Write a file anew, as long as it was or not, at a later time."""
    before = file.stat().st_mtime_ns
    file.write_text(text)
    os.utime(file, ns=(before + LATER, before + LATER))


def kept(record: dict[str, Any]) -> str:
    """Write a record; returns its name."""
    figures = {key: record[key] for key in ("perplexity", "window_nll")}
    return Path(record_of("ppl", "m", {**record["settings"], "value": figures}, lambda: figures)["path"]).name


def scored(model: Path, *words: str, program: str = "ppl", item: str = "sample") -> Run:
    return Run(program, model, item, ("--recipe", "rtn", *words))


@pytest.mark.parametrize(
    ("words", "program", "item", "name"),
    [
        ((), "ppl", "sample", "modelzoo/mine/tokenizer.json"),
        ((), "ppl", "sample", "modelzoo/mine/config.json"),
        ((), "ppl", "sample", "datasets/sample/evaluation.jsonl"),
        (("--calibration", "sample"), "tasks", "boolq", "datasets/sample/calibration.jsonl"),
        (("--data", "sample"), "tasks", "boolq", "datasets/sample-tasks/boolq/validation.jsonl"),
        (("--prefix", "PREFIX"), "ppl", "sample", "prefix.safetensors"),
    ],
)
def test_what_reads_another_file_now_is_not_finished(
    world: Path, intactkv_root: Path, words: tuple[str, ...], program: str, item: str, name: str
) -> None:
    prefix = str(intactkv_root / "prefix.safetensors")
    run = scored(world, *(prefix if word == "PREFIX" else word for word in words), program=program, item=item)
    finished(run)
    assert is_done(run)
    file = intactkv_root / name
    text = file.read_text()
    changed(file, text[::-1])  # of the same size
    assert not is_done(run)
    changed(file, text)  # another time, the same content: as after a copy
    assert is_done(run)
    changed(file, f"{text}+")
    assert not is_done(run)


@pytest.mark.parametrize("large", [stamps.LARGE, 1000])
def test_one_tensor_that_is_edited_in_place_is_another_model(
    world: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    monkeypatch.setattr(stamps, "LARGE", large)
    run, file = scored(world), world / "model.safetensors"
    finished(run)
    before = file.stat().st_mtime_ns
    with file.open("r+b") as opened:
        opened.seek(100_003)
        opened.write(b"\x01")
    os.utime(file, ns=(before + LATER, before + LATER))
    assert not is_done(run)


def test_a_model_that_moved_is_the_same_and_a_new_file_of_it_makes_another(world: Path) -> None:
    finished(scored(world))
    other = world.parent / "elsewhere" / "mine"
    shutil.copytree(world, other)
    assert is_done(scored(other))
    (other / "model-2.safetensors").write_bytes(b"more")
    assert not is_done(scored(other))


def test_what_changes_while_a_program_runs_is_not_covered(world: Path) -> None:
    run = scored(world)
    before = read_before(run)
    changed(datasets_dir() / "sample" / "evaluation.jsonl", "TWO")
    keep(run, Entry(program="ppl", model="mine", item="", command=[], seconds=1.0, finished="2026"), before)
    assert not is_done(run)


def test_the_text_that_only_the_record_names_is_covered(world: Path) -> None:
    record = perplexity(9.0)
    record["settings"]["recipe"]["calibration"] = {"corpus": "pile", "samples": 1, "length": 8, "seed": 1}
    text = datasets_dir() / "pile-val-backup" / "val.jsonl.zst"
    text.parent.mkdir()
    text.write_text("pile")
    run = scored(world)
    finished(run, record=kept(record))
    assert is_done(run)
    changed(text, "PILE")
    assert not is_done(run)


def test_a_file_that_was_made_again_makes_its_figures_open_and_one_that_is_gone_does_not(
    world: Path, intactkv_root: Path
) -> None:
    made = Run("quantization", world, "", ("--recipe", "rtn"))
    figure = Run("ppl", world, "sample", ("--recipe", "rtn", "--prefix", f"{PLACE}0"), (made,))
    place = intactkv_root / "made"
    place.mkdir()
    (place / "ends.safetensors").write_text("weights")
    finished(made, made="made")
    finished(figure)
    assert open_runs([made, figure]) == set()
    changed(place / "ends.safetensors", "WEIGHTS")
    assert not is_done(figure)
    shutil.rmtree(place)
    assert is_done(figure)
    assert not is_done(made)
    assert open_runs([made, figure]) == set()  # nobody reads the checkpoint any more
    assert open_runs([made]) == {made.key}
    later = Run("ppl", world, "other.txt", figure.words, (made,))
    assert open_runs([later, figure, made]) == {later.key, made.key}


def record(value: float, source: str) -> str:
    told = perplexity(value)
    told["settings"]["made_of"] = {**told["settings"]["made_of"], "source": source}
    return kept(told)


def test_without_the_model_one_model_of_the_name_is_shown_and_the_other_noted(world: Path) -> None:
    here, there = scored(world), scored(world, "--seed", "1")
    finished(here, "2026-01", record=record(5.0, "a" * 16))
    finished(there, "2026-01", record=record(5.5, "a" * 16))
    changed(world / "tokenizer.json", "WORDS")
    finished(here, "2026-02", record=record(6.0, "b" * 16))
    shutil.rmtree(world)
    left_out: list[str] = []
    found = [answer_of(run, left_out) for run in (here, there)]
    assert found[0] is not None
    assert (found[0]["perplexity"], found[1]) == (6.0, None)
    (line,) = left_out
    assert "another model that is called mine" in line


def test_a_damaged_entry_counts_as_nothing_says_so_and_is_mended_by_the_next_run(world: Path) -> None:
    run = scored(world)
    finished(run)
    (file,) = (outputs_dir() / "asked").glob(f"{run.key}-*.json")
    broken = file.with_name(f"{run.key}-00000000.json")
    for damage in (file, broken):
        damage.write_text("{")
    left_out: list[str] = []
    assert entry_of(run, left_out) is None
    assert [file.name in line for line, file in zip(sorted(left_out), sorted([file, broken]), strict=True)] == [
        True
    ] * 2
    finished(run)
    assert is_done(run)
    assert not broken.exists()
    assert json.loads(file.read_text())["program"] == "ppl"


def test_a_latency_is_of_one_gpu(intactkv_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("latency", Path("no-model"), "", ())

    def card(name: str) -> None:
        monkeypatch.setattr("eval.tables.ledger.gpu_names", lambda: name)

    card("NVIDIA A")
    finished(run)
    assert is_done(run)
    card("NVIDIA B")
    assert not is_done(run)
    card("")  # a machine to look at tables on
    assert is_done(run)


def test_an_entry_of_before_says_nothing_of_what_it_read(world: Path) -> None:
    run = scored(world)
    write_json(
        outputs_dir() / "asked" / f"{run.key}-12345678.json",
        {"program": "ppl", "model": "mine", "item": "sample", "command": [], "seconds": 1.0, "finished": "2026"},
    )
    assert not is_done(run)
