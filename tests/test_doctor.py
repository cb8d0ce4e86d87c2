"""The doctor: what a table and this machine need and lack, with the way out, before anything runs."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import FOXES, error_line, every, tree

from corpora.__main__ import main
from eval.doctor import machine
from eval.doctor.files import scored
from eval.doctor.machine import DRIVERS, driver, memory, space
from eval.tables.asked import Run

SMALL = ("--device", "cpu", "--calibration-samples", 2, "--calibration-length", 16)


@pytest.fixture
def place(intactkv_root: Path, tiny_checkpoint) -> Path:
    """A root with a tiny model, and a text to score and to calibrate on."""
    tiny_checkpoint(intactkv_root / "modelzoo", "llama", max_position_embeddings=512)
    (intactkv_root / "text.txt").write_text(FOXES)
    return intactkv_root


@pytest.fixture
def doctor(run_main, place):
    """doctor(arguments…) -> (exit code, findings by their names) of a table for the tiny model."""

    def run(*arguments, table="gptq-llama"):
        text = place / "text.txt"
        words = ("--model", place / "modelzoo" / "tiny-llama", "--corpus", text, "--calibration", text, *SMALL)
        code, out, err = run_main(main, "doctor", table, *words, *arguments, "--json")
        assert code in (0, 1), err
        return code, {finding["what"]: finding for finding in json.loads(out)}

    return run


# the machine ----------------------------------------------------------------------------------------------------------


@every("built", ["11.8", "12.6", "12.9", "13.0", "13.2"])
@every("found", ["449.1", "450.80.02", "524.99", "525.60.13", "570.86.10", "580.65.06", "590.1"])
def test_a_driver_is_enough_for_the_releases_of_its_time_and_before(built, found):
    number, release = int(found.partition(".")[0]), int(built.partition(".")[0])
    oldest = {11: 450, 12: 525, 13: 580}[release]
    finding = driver(built, found, asked=False)
    assert finding.verdict == ("ok" if number >= oldest else "lacks")
    if number < oldest:
        assert f"update the driver to {oldest}" in finding.way_out
        runs = [cuda for cuda, least in DRIVERS.items() if least <= number]
        assert f"CUDA {max(runs)}" in finding.way_out if runs else "torch" not in finding.way_out


def test_a_gpu_lacks_only_where_it_is_asked_for(monkeypatch):
    for built, found in ((None, None), ("13.0", None)):
        assert driver(built, found, asked=False).verdict == "warning"
        assert driver(built, found, asked=True).verdict == "lacks"
    assert driver("99.0", "580.1", asked=True).verdict == "warning"  # of another time than the table
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = {finding.what: finding.verdict for finding in machine.machine("cuda")}
    assert found["GPU"] == "lacks"
    assert {finding.what: finding.verdict for finding in machine.machine("cpu")}["GPU"] == "ok"


def test_gpus_that_answer_need_no_driver_table(monkeypatch):
    card = SimpleNamespace(name="a card", total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: card)
    monkeypatch.setattr(machine, "_driver_version", lambda: None)
    for device, verdict in (("auto", "ok"), ("cuda", "ok"), ("cuda:1", "ok"), ("cuda:all", "ok"), ("cuda:2", "lacks")):
        found = {finding.what: finding for finding in machine.machine(device)}
        assert found["GPU"].verdict == verdict
        assert "2" in found["GPU"].needed if verdict == "lacks" else "a card (80.0 GB)" in found["GPU"].found
        assert {finding.verdict for what, finding in found.items() if what in ("NVIDIA driver", "torch for CUDA")} == {
            "ok"
        }
    assert memory(79e9, "to run", "cuda:1").verdict == "ok"
    assert memory(81e9, "to run", "cuda").verdict == "lacks"
    assert memory(79e9, "to run", "cuda:2").verdict == "warning"  # which is not here to ask


def test_the_driver_is_what_nvidia_smi_says(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._driver_version() is None
    program.write_text("#!/bin/sh\necho 570.86.10\necho 570.86.10\n")
    program.chmod(0o755)
    assert machine._driver_version() == "570.86.10"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert machine._driver_version() is None


def test_packages_are_held_against_their_pins(monkeypatch, tmp_path):
    pins = tmp_path / "requirements.txt"
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    installed = torch.__version__.partition("+")[0]
    for text, verdict, said in ((f"torch=={installed}\n", "ok", "as pinned"), ("torch==0.1\n", "warning", "pinned 0.1"),
                                ("torch==0.1\nno-such-thing==1.0\n", "lacks", "no-such-thing")):  # fmt: skip
        pins.write_text(text)
        found = machine._packages()
        assert (found.verdict, said in found.found) == (verdict, True)


def test_memory_and_disk_lack_where_more_is_needed_than_there_is(place, monkeypatch):
    assert memory(1e6, "to run", "cpu").verdict == "ok"
    assert memory(1e15, "to run", "cpu").verdict == "lacks"
    free = shutil.disk_usage(place).free
    assert space(free / 2).verdict == "ok"
    assert space(2.0 * free + 1e12).verdict == "lacks"


def test_a_place_that_cannot_be_written_lacks(place, run_main):
    (place / "outputs").write_text("a file")
    code, out, _ = run_main(main, "doctor", "--device", "cpu", "--json")
    found = {finding["what"]: finding for finding in json.loads(out)}
    assert code == 1
    assert found["outputs/"]["verdict"] == "lacks"
    assert "INTACTKV_ROOT" in found["outputs/"]["way_out"]


# tables ---------------------------------------------------------------------------------------------------------------


def test_a_table_that_lacks_nothing_ends_with_0_and_nothing_is_written(doctor, place):
    before = tree(place)
    code, found = doctor()
    assert code == 0
    assert tree(place) == before
    assert found["model tiny-llama"]["verdict"] == "ok"
    assert found["main memory"]["needed"].startswith("about ")


def test_what_lacks_is_named_with_the_way_to_get_it(doctor, run_main, place):
    (place / "text.txt").unlink()
    code, found = doctor()
    assert code == 1
    assert {found[f"text {place / 'text.txt'} for {role}"]["verdict"] for role in ("evaluation", "calibration")} == {
        "lacks"
    }
    code, out, _ = run_main(main, "doctor", "gptq-llama", "--device", "cpu", "--json")
    found = {finding["what"]: finding["way_out"] for finding in json.loads(out) if finding["verdict"] == "lacks"}
    assert code == 1
    assert found["model llama-2-7b"] == "bash scripts/prepare/model.sh llama-2 7b"
    assert found["text c4-old for evaluation"] == "bash scripts/prepare/data.sh c4"
    assert found["text wikitext2 for evaluation"] == "bash scripts/prepare/data.sh wikitext2"


def test_a_model_is_looked_into_by_the_plans_of_its_runs(doctor, place):
    shard = place / "modelzoo" / "tiny-llama" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-40])
    code, found = doctor("--only", "FP16")
    assert code == 1
    (refused,) = [finding for what, finding in found.items() if what.startswith("ppl tiny-llama")]
    assert "model.safetensors" in refused["found"]
    shutil.rmtree(shard.parent)
    code, found = doctor("--only", "FP16")
    assert code == 1
    assert found["model tiny-llama"]["found"].endswith("is missing")


def test_what_a_plan_refuses_is_told_once_in_its_own_words(doctor):
    code, found = doctor("--only", "RTN, 4 bits, groups", table="lutgemm-perplexity")  # of 128, the model has 64
    assert code == 1
    (refused,) = [finding for finding in found.values() if finding["needed"] == "a plan that can be made"]
    assert "128" in refused["found"]
    assert refused["verdict"] == "lacks"


def test_what_stands_behind_a_prefix_that_is_trained_first_is_not_planned(doctor):
    words = ("--only", "[P] + Cal", "RTN", "--judge-model", "local:.", "--questions", "sample")
    _, found = doctor(*words, "--options", "--group-size 32", table="intactkv-4")
    assert found["conversations of sharegpt for training"]["verdict"] == "lacks"
    assert found["MT-bench's questions"]["verdict"] == "ok"
    assert not [one["what"] for one in found.values() if one["needed"] == "a plan that can be made"]


def test_questions_and_judges_are_looked_for_where_their_programs_look(place, monkeypatch):
    model = Path("modelzoo/llama-2/llama-2-7b")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def verdicts(*runs):
        return [(finding.what, finding.verdict) for finding in scored(runs)]

    judge = Run("judge", model, "", ("--answers", "{0}", "--judge-model", "gpt-4"))
    assert verdicts(judge, judge) == [("judge", "lacks")]
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    assert verdicts(judge) == [("judge", "ok")]
    assert verdicts(Run("tasks", model, "piqa", ())) == [("questions of piqa", "lacks")]
    assert verdicts(Run("tasks", model, "mmlu", ("--data", "sample"))) == [("questions of mmlu", "ok")]
    assert verdicts(Run("tasks", model, "truthfulqa_gen", ("--data", "sample"))) == [
        ("questions of truthfulqa_gen", "lacks")
    ]
    assert verdicts(Run("mtbench", model, "", ("--questions", "sample"))) == [("MT-bench's questions", "ok")]
    assert verdicts(Run("latency", model, "", ())) == [("LUT-GEMM's kernel", "warning")]


def test_mistakes_are_one_line(run_main, place):
    cases = {
        ("nothing",): "unknown table nothing", ("--limit", "4"): "name one, or leave them out",
        ("--device", "tpu"): "tpu is not known", ("gptq-llama", "--limit", "0"): "--limit: 0",
    }  # fmt: skip
    for words, said in cases.items():
        code, _, err = run_main(main, "doctor", *words)
        assert code == 2
        assert said in error_line(err)
