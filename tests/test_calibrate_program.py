"""`python -m intactkv calibrate` and the motivation curve, from the outside, on tiny models."""

import csv
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from common import ROOT, kill_training
from matplotlib import pyplot as plt

from corpora.sharegpt import VICUNA_PROMPT
from corpora.storage import write_artefact
from corpora.writing import locked
from intactkv.prefix import Prefix
from quantization.programs.training_files import training_bar

PARAGRAPH = "A paragraph about {} says one thing, then the other one, and so on. " * 4
TEMPLATE = (
    "{{ bos_token }}[kind]{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SMALL = ("--samples", "4", "--held-out", "2", "--max-length", "120", "--steps", "4", "--batch-size", "2",
         "--evaluate-every", "2", "--conversations", "sample")  # fmt: skip


@pytest.fixture
def model(intactkv_root, tiny_checkpoint, tiny_tokenizer) -> Path:
    """A tiny checkpoint with a chat template, and a sample text to talk about."""
    folder = intactkv_root / "datasets" / "sample"
    folder.mkdir(parents=True)
    for role in ("calibration", "evaluation"):
        rows = [{"title": f"{role} {i}", "text": "\n".join([PARAGRAPH.replace("{}", str(i))] * 4)} for i in range(4)]
        (folder / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    directory = tiny_checkpoint(intactkv_root / "modelzoo", "llama")
    tiny_tokenizer(chat_template=TEMPLATE).save_pretrained(directory)
    return directory


@pytest.fixture
def program(run_main):
    """program(package, arguments…) -> (exit code, stdout, stderr)."""

    def call(package: str, *arguments: object) -> tuple[int, str, str]:
        return run_main(import_module(f"{package}.__main__").main, *arguments)

    return call


def recipe(model: Path) -> tuple[str, ...]:
    return ("--model", str(model), "--recipe", "rtn-w3", "--group-size", "32", "--prefix", "prompt")


def test_a_prefix_that_was_trained_for_other_weights_is_told_of_both(program, model, intactkv_root, caplog):
    out, corpus = intactkv_root / "cal.safetensors", intactkv_root / "text.txt"
    corpus.write_text("some text " * 40)
    code, _, errors = program("intactkv", "calibrate", *recipe(model), *SMALL, "--out", out)
    assert code == 0, errors
    run = ("ppl", "--model", model, "--recipe", "rtn-w3", "--group-size", 32, "--prefix", out, "--corpus", corpus,
           "--window", 32, "--limit", 1)  # fmt: skip
    for options, said in (
        ((), None),
        (("--set", "weights.grid.convention=gptq-sym"), "rtn-w3g32"),  # by the same label
        (("--bits", 4), "rtn-w4g32"),
    ):
        caplog.clear()
        code, _, errors = program("eval", *run, *options)
        assert code == 0, errors
        lines = [line for line in caplog.messages if "was trained for the weights" in line]
        assert len(lines) == (said is not None)
        if said is not None:
            assert f"{out} was trained for the weights rtn-w3g32 (" in lines[0]
            assert f"those that run now are {said} (" in lines[0]


def test_a_trained_prefix_is_written_with_its_curve_and_can_be_used(program, model, intactkv_root):
    out = intactkv_root / "cal.safetensors"
    code, said, errors = program("intactkv", "calibrate", *recipe(model), *SMALL, "--out", out)
    assert code == 0, errors
    prefix = Prefix.load(out)
    assert prefix.calibrated is not None
    assert prefix.calibrated["training"]["steps"] == 4
    assert prefix.calibrated["for"]["weights"] == "rtn-w3g32"
    rows = [json.loads(line) for line in (intactkv_root / "cal.curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "held_out" in row] == [0, 2, 4]
    losses = prefix.calibrated["held_out"]
    assert losses.keys() == {"vanilla", "bos", "before", "best", "last"}
    for arm, words in (("vanilla", "vanilla"), ("bos", "[B] intact"), ("before", "[P] before training"),
                       ("best", "(kept)")):  # fmt: skip
        (line,) = [line for line in said.splitlines() if words in line]
        assert line.endswith(f" {losses[arm]:.5g}")
    assert losses["before"] == rows[0]["held_out"]
    assert losses["best"] == min(row["held_out"] for row in rows if "held_out" in row)
    assert rows[-1]["peak_memory_mb"] > 1
    assert f"peak memory {rows[-1]['peak_memory_mb']:.0f} MB" in said
    assert f"(median of {len(rows) - 1})" in said
    assert not (intactkv_root / "cal.state.safetensors").exists()
    drawn = intactkv_root / "drawn.png"
    assert program("eval", "plot", "calibration", "--curves", intactkv_root / "cal.curve.jsonl", "--out", drawn)[0] == 0
    table = list(csv.DictReader(drawn.with_suffix(".csv").open()))
    assert [float(row["held-out loss"]) for row in table if row["held-out loss"]] == [
        row["held_out"] for row in rows if "held_out" in row
    ]
    code, _, errors = program("eval", "plot", "calibration", "--curves", out, "--out", drawn)
    assert code == 2
    assert "is no curve of a calibration" in errors
    assert plt.get_fignums() == []
    (intactkv_root / "text.txt").write_text(PARAGRAPH * 8)
    ppl = ("ppl", "--model", model, "--recipe", "rtn-w3", "--group-size", 32, "--corpus", intactkv_root / "text.txt",
           "--window", 64, "--limit", 2, "--json", "--prefix")  # fmt: skip
    trained, plain = (json.loads(program("eval", *ppl, word)[1]) for word in (out, "prompt"))
    assert trained["settings"]["prefix"]["ids"] == plain["settings"]["prefix"]["ids"]
    assert trained["identity"] != plain["identity"]


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(program, model, intactkv_root):
    """A real SIGKILL, once the first state is on disk."""
    call = ("calibrate", *recipe(model), *SMALL, "--steps", "8")
    environment = os.environ | {"INTACTKV_ROOT": str(intactkv_root), "OMP_NUM_THREADS": "1"}
    whole, killed = intactkv_root / "whole.safetensors", intactkv_root / "killed.safetensors"
    assert program("intactkv", *call, "--out", whole)[0] == 0
    command = [sys.executable, "-m", "intactkv", *map(str, call), "--out", killed]
    kill_training(*map(str, call), "--out", str(killed))
    assert not killed.exists()
    code, _, errors = program("intactkv", *call, "--bits", "4", "--out", killed)
    assert code == 2
    assert "killed.state.safetensors belongs to a run with other texts" in errors
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert "going on from step 2 of" in done.stderr
    a, b = Prefix.load(whole), Prefix.load(killed)
    assert all(torch.equal(x, y) for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True))
    curves = [
        [{name: value for name, value in json.loads(line).items() if name not in ("seconds", "peak_memory_mb")}
         for line in (intactkv_root / f"{name}.curve.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]  # fmt: skip
    assert curves[0] == curves[1]
    assert whole.read_bytes() == killed.read_bytes()
    kinds = ("safetensors", "curve.jsonl")  # and no state, no lock and nothing hidden
    left = {path.name for path in intactkv_root.iterdir() if path.is_file()}
    assert left == {f"{name}.{kind}" for name in ("whole", "killed") for kind in kinds}


def test_two_that_train_the_same_file_are_told_of_each_other(program, model, intactkv_root):
    out = intactkv_root / "cal.safetensors"
    call = ("calibrate", *recipe(model), *SMALL, "--out", out)
    with locked(out.with_suffix(".state.safetensors")):
        code, _, errors = program("intactkv", *call)
    assert code == 2
    assert f"--out {out}: another process is training it; wait for that one, or name another" in errors
    assert not out.exists()
    assert program("intactkv", *call)[0] == 0
    assert {path.name for path in intactkv_root.iterdir() if path.is_file()} == {"cal.safetensors", "cal.curve.jsonl"}


def test_a_pipe_that_blocks_within_a_training_is_no_other_process(tmp_path):
    with pytest.raises(BlockingIOError, match="a pipe of the work"), training_bar("x", 1, tmp_path / "p.safetensors"):
        raise BlockingIOError("a pipe of the work")
    assert not list(tmp_path.iterdir())


def test_a_state_that_changed_is_refused_before_anything_is_made(program, model, intactkv_root):
    out = intactkv_root / "cal.safetensors"
    write_artefact(state := intactkv_root / "cal.state.safetensors", "run", {"step": 1}, {"a": torch.ones(3)})
    content = state.read_bytes()
    before = sorted(intactkv_root.rglob("*"))
    for damage in (content, content[:-1] + b"\x00", content[:40]):  # no state's header, another value, truncated
        state.write_bytes(damage)
        code, _, errors = program("intactkv", "calibrate", *recipe(model), *SMALL, "--out", out)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert errors.startswith("error: ")
        assert f"{state}" in errors
        assert errors.endswith("delete it to train from the start\n")
        assert sorted(intactkv_root.rglob("*")) == before


@pytest.mark.parametrize(("changes", "named"), [
    (("--out", "cal.pt"), "a prefix file ends in .safetensors"),
    (("--prefix", "none"), "calibrate trains an intact prefix"),
    (("--max-length", "5"), "--max-length 5 leaves no token behind the prefix"),
    (("--steps", "0"), "--steps: 0 is not allowed"),
    (("--samples", "999"), "999 are asked for"),
    (("--conversations", "sharegpt"), "ShareGPT conversations are missing"),
])  # fmt: skip
def test_a_mistake_is_one_line(program, model, intactkv_root, changes, named):
    out = ("--out", intactkv_root / "cal.safetensors")
    code, _, errors = program("intactkv", "calibrate", *recipe(model), *SMALL, *out, *changes)
    assert code == 2
    assert named in errors.splitlines()[-1]


def test_a_model_without_a_chat_format_is_drawn_on_vicunas_as_published(program, model, intactkv_root, tiny_tokenizer):
    """LLaMA-2, of the published call, is one; a prefix with which the conversations do not start gives no curve."""
    turns = [{"from": role, "value": text} for role, text in (("human", "hi"), ("gpt", "abc " * 40))]
    folder = intactkv_root / "datasets" / "ShareGPT_Vicuna_unfiltered"
    folder.mkdir(parents=True)
    file = folder / "ShareGPT_V4.3_unfiltered_cleaned_split.json"
    file.write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(3)]))
    tiny_tokenizer().save_pretrained(model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    stem = intactkv_root / "curve.png"
    call = ("plot", "motivation", "--model", model, "--samples", 1, "--tokens", 240, "--group-size", 32, "--out", stem)
    code, _, errors = program("eval", *call)
    assert code == 0, errors
    prefix = [1, *tiny_tokenizer()(VICUNA_PROMPT, add_special_tokens=False)["input_ids"]]
    assert len(list(csv.DictReader(stem.with_suffix(".csv").open()))) == len(prefix) + 1
    code, _, errors = program("eval", *call, "--prefix", "Hello")
    assert code == 2
    assert "the conversations of sharegpt do not start with its 6 tokens" in errors.splitlines()[-1]


def test_the_motivation_curve_scores_every_size_on_the_same_tokens(program, model, intactkv_root):
    """Its ends are the vanilla model and the whole prefix; with nothing quantized all losses are 0."""
    stem = intactkv_root / "curve.png"
    call = ("plot", "motivation", "--model", model, "--samples", 2, "--tokens", 200, "--out", stem)
    # The tiny model is of no known family, so its conversations are the published ones, which are not here.
    code, _, errors = program("eval", *call, "--group-size", 32)
    assert code == 2
    assert "ShareGPT conversations are missing" in errors
    smollm = model.rename(model.with_name("smollm2-tiny"))
    call = ("plot", "motivation", "--model", smollm, "--samples", 2, "--tokens", 200, "--out", stem)
    assert program("eval", *call, "--group-size", 32)[0] == 0
    rows = list(csv.DictReader(stem.with_suffix(".csv").open()))
    prefix = len(rows) - 1
    assert [int(row["size"]) for row in rows] == list(range(prefix + 1))
    assert all(float(row["sum over blocks"]) > float(row["loss of the last block"]) > 0 for row in rows)
    assert stem.stat().st_size > 1000
    assert program("eval", *call, "--recipe", "fp16")[0] == 0
    assert all(float(row["sum over blocks"]) < 1e-6 for row in csv.DictReader(stem.with_suffix(".csv").open()))
