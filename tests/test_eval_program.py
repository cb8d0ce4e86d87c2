"""The program `python -m eval` and its scripts, from the outside."""

import csv
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from common import ROOT, SMOLLM2, refusals

from corpora.errors import UserError
from eval.__main__ import main
from eval.processes import Processes

# `accelerate launch` starts one process where there is no GPU.
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture
def model(intactkv_root, tiny_checkpoint) -> Path:
    """A tiny dense checkpoint in its own zoo."""
    return tiny_checkpoint(intactkv_root / "modelzoo", "llama")


@pytest.fixture
def program(run_main):
    """program(arguments…) -> (exit code, stdout, stderr), run in this process."""
    return partial(run_main, main)


def test_a_text_file_a_recipe_and_a_prefix_give_a_record(program, model, text, intactkv_root):
    """The call of the README, on a tiny model."""
    arguments = ("ppl", "--model", model, "--corpus", text, "--window", 64, "--limit", 8, "--recipe", "rtn", "--bits",
                 4, "--group-size", 32, "--prefix", "bos")  # fmt: skip
    code, out, _ = program(*arguments, "--json")
    assert code == 0
    record = json.loads(out)
    assert record["perplexity"] > 1
    assert record["windows"] == 8
    assert record["targets"] == 8 * 62
    settings = record["settings"]
    assert settings["weights"] == "rtn-w4g32"
    assert settings["prefix"] == {"label": "[B]", "ids": [1], "file": None, "intact": True}
    assert settings["corpus"] == "some text.txt"
    assert len(list((intactkv_root / "outputs" / "runs").iterdir())) == 1
    # Asked again, the record is read back: the same start, no second file.
    again = json.loads(program(*arguments, "--json")[1])
    assert again == record
    # The written artefacts have readable names with the identity behind.
    quantized = list((intactkv_root / "modelzoo" / "quantized" / "tiny-llama").glob("rtn-w4g32-*"))
    assert len([q for q in quantized if q.is_dir()]) == 1


def test_vanilla_and_intact_share_the_quantized_checkpoint_and_a_row(program, model, text, intactkv_root):
    common = ("--model", model, "--corpus", text, "--window", 64, "--limit", 4, "--recipe", "rtn-w3",
              "--group-size", 32)  # fmt: skip
    for prefix in ("none", "bos"):
        assert program("ppl", *common, "--prefix", prefix)[0] == 0
    places = list((intactkv_root / "modelzoo" / "quantized" / "tiny-llama").glob("rtn*"))
    assert len(places) == 1
    code, out, _ = program("table", "--format", "csv")
    assert code == 0
    (row,) = csv.DictReader(out.splitlines())
    assert (row["weights"], row["prefix"]) == ("rtn-w3g32", "[B]")
    assert float(row["vanilla"]) != float(row["IntactKV"])


def test_a_quantized_directory_gives_the_figures_of_its_recipe(program, model, text, intactkv_root):
    common = ("--corpus", text, "--window", 64, "--limit", 4, "--json")
    on_the_way = json.loads(program("ppl", "--model", model, "--recipe", "rtn-w4", "--group-size", 32, "--prefix",
                                    "bos", *common)[1])  # fmt: skip
    (place,) = (intactkv_root / "modelzoo" / "quantized" / "tiny-llama").glob("rtn*")
    for packed in ((), ("--kernel", "unpack")):
        record = json.loads(program("ppl", "--model", place, "--prefix", "bos", *packed, *common)[1])
        assert record["perplexity"] == on_the_way["perplexity"]
        assert record["settings"]["weights"] == "rtn-w4g32"


def test_the_vanilla_arm_of_a_text_prefix_sees_its_tokens(program, model, text):
    common = ("--model", model, "--corpus", text, "--window", 64, "--limit", 4, "--prefix", "A fox.", "--json")
    intact, vanilla = json.loads(program("ppl", *common)[1]), json.loads(program("ppl", *common, "--vanilla")[1])
    assert intact["settings"]["prefix"]["ids"] == vanilla["settings"]["prefix"]["ids"]
    # In full precision the two arms are the same function of the same tokens.
    assert intact["perplexity"] == pytest.approx(vanilla["perplexity"], rel=1e-4)


def test_a_prefix_file_serves_the_quantized_model(program, model, text, intactkv_root, monkeypatch, capsys):
    from quantization.__main__ import main as quantization_main

    file = intactkv_root / "bos.safetensors"
    monkeypatch.setattr(sys, "argv", ["quantization", "prefix", "build", "--model", str(model), "--prefix", "bos",
                                      "--out", str(file)])  # fmt: skip
    quantization_main()
    capsys.readouterr()
    common = ("ppl", "--model", model, "--corpus", text, "--window", 64, "--limit", 4, "--recipe", "rtn-w3",
              "--group-size", 32, "--json")  # fmt: skip
    by_word, by_file = (json.loads(program(*common, "--prefix", prefix)[1]) for prefix in ("bos", file))
    assert by_file["perplexity"] == by_word["perplexity"]


BAD_INPUT = {
    "unknown recipe": (["--recipe", "gptx"], "'gptx'; choose from fp16"),
    "unknown corpus": (["--corpus", "no-such-corpus"], "'no-such-corpus'"),
    "group size that does not divide": (["--recipe", "rtn", "--group-size", "48"], "48 does not divide its 64"),
    "bits without weights": (["--bits", "4"], "--recipe rtn"),
    "too many bits": (["--recipe", "rtn", "--bits", "9"], "bits=9"),
    "KV bits out of range": (["--kv-bits", "1"], "KV bits=1"),
    "unknown KV policy": (["--kv", "magic", "--kv-bits", "4"], "'magic'; choose from none, per_head"),
    "KV policy without bits": (["--kv", "per_head"], "--kv-bits"),
    "no GPU of that index": (["--device", "cuda:7"], "cuda:7"),
    "unknown device": (["--device", "tpu"], "tpu"),
    "unknown field": (["--recipe", "rtn", "--set", "weights.grid.bitz=3"], "'bitz'"),
    "text shorter than a window": (["--window", "100000"], "less than one window of 100000"),
    "no window at all": (["--window", "0"], "--window: 0 is"),
    "window longer than the model": (["--window", "300"], "; use --window 256 or fewer"),
    "window too small": (["--window", "2"], "--window: 2 is"),
    "no windows": (["--limit", "0"], "--limit: 0 is"),
    "no batch": (["--batch-size", "0"], "--batch-size: 0 is"),
    "missing prefix file": (["--prefix", "nowhere.safetensors"], "nowhere.safetensors is missing"),
    "prompt without chat template": (["--prefix", "prompt"], "no chat template"),
    "discovery without its text": (["--prefix", "auto"], "calibration text of pile is missing"),
    "an empty prefix": (["--prefix", ""], "--prefix: '' is not allowed; give a text"),
    "vanilla of nothing": (["--vanilla"], "--prefix bos"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_line_and_exit_code_2(case, program, model, text, intactkv_root):
    arguments, named = BAD_INPUT[case]
    given = ("ppl", "--model", model, "--window", 64, "--limit", 2)
    corpus = () if "--corpus" in arguments else ("--corpus", text)
    code, out, err = program(*given, *corpus, *arguments)
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert named in lines[0]
    assert "Traceback" not in err
    assert not list((intactkv_root / "outputs").glob("runs/*"))


@pytest.mark.parametrize("arguments", [("ppl",), ("ppl", "--window", "wide"), ("dance",), ("plot", "pivots")])
def test_a_wrong_option_is_one_line_too(arguments, program):
    code, out, err = program(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "--help" in err


@pytest.mark.parametrize("words", [("ppl",), ("stats", "kv"), ("plot", "act"), ("tasks", "--tasks", "mmlu")])
def test_the_help_that_is_named_knows_the_option(words, program):
    code, out, err = program(*words, "--model", "m", "--no-such-option", 3)
    named = " ".join(word for word in words if not word.startswith("--") and word != "mmlu")
    assert (code, out) == (2, "")
    assert err == (
        f"error: unrecognized arguments: --no-such-option 3; python -m eval {named} --help explains the options\n"
    )


def test_a_missing_model_and_a_prefix_of_another_model_are_refused(
    program, model, text, tiny_checkpoint, intactkv_root
):
    code, _, err = program("ppl", "--model", intactkv_root / "nothing", "--corpus", text)
    assert (code, "nothing is missing" in err) == (2, True)
    other = tiny_checkpoint(intactkv_root / "others", "llama", seed=5)
    program("ppl", "--model", other, "--corpus", text, "--window", 64, "--limit", 1, "--prefix", "bos")
    (file,) = (intactkv_root / "modelzoo" / "prefixes").rglob("*.safetensors")
    code, _, err = program("ppl", "--model", model, "--corpus", text, "--window", 64, "--limit", 1, "--prefix", file)
    assert code == 2
    assert "belongs to another model" in err


def test_figures_are_pictures_with_their_numbers_beside(program, model, text, intactkv_root):
    for prefix in ("none", "bos"):
        program("ppl", "--model", model, "--corpus", text, "--window", 64, "--limit", 2, "--prefix", prefix)
    bars, pivots = intactkv_root / "figures" / "bars.png", intactkv_root / "figures" / "pivots.png"
    assert program("plot", "perplexity", "--model", "tiny-llama", "--out", bars)[0] == 0
    assert program("plot", "pivots", "--model", model, "--corpus", text, "--tokens", 12, "--out", pivots)[0] == 0
    for picture in (bars, pivots):
        from matplotlib import image

        assert image.imread(picture).std() > 0.05  # something is drawn
    (row,) = csv.DictReader(bars.with_suffix(".csv").open())
    assert float(row["vanilla"]) == pytest.approx(float(row["IntactKV"]), rel=1e-4)
    table = list(csv.reader(pivots.with_suffix(".csv").open()))
    assert len(table) == 1 + 4  # embeddings and three layers
    assert len(table[0]) == 2 + 12


def test_a_figure_of_mixed_protocols_is_refused(program, model, text, intactkv_root):
    for window in (32, 64):
        program("ppl", "--model", model, "--corpus", text, "--window", window, "--limit", 2)
    code, _, err = program("plot", "perplexity", "--model", "tiny-llama", "--out", intactkv_root / "x.png")
    assert code == 2
    assert "--window" in err
    assert program("plot", "perplexity", "--model", "tiny-llama", "--window", 64, "--out",
                   intactkv_root / "x.png")[0] == 0  # fmt: skip


def run(command: list[object], **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | variables, check=False)  # fmt: skip


@pytest.mark.parametrize("program_name", ["eval", "quantization", "intactkv", "corpora"])
def test_help_does_not_wait_for_torch(program_name):
    code = ("import runpy, sys; sys.argv = ['x', '--help']\n"
            f"try:\n    runpy.run_module('{program_name}', run_name='__main__')\n"
            "except SystemExit:\n    pass\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules")  # fmt: skip
    result = run([sys.executable, "-c", code])
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


def test_two_processes_share_the_windows_and_agree_with_one(model, text, intactkv_root):
    call = ["ppl", "--model", model, "--corpus", text, "--window", 64, "--limit", 7, "--batch-size", 2, "--recipe",
            "rtn-w4", "--group-size", 32, "--prefix", "bos", "--device", "cpu", "--json"]  # fmt: skip
    one = run([sys.executable, "-m", "eval", *call, "--force"])
    assert one.returncode == 0, one.stderr
    two = run([*TWO_PROCESSES, "-m", "eval", *call, "--force"])
    assert two.returncode == 0, two.stderr
    first, second = json.loads(one.stdout), json.loads(two.stdout)  # two would be no JSON if both processes printed
    assert second["perplexity"] == pytest.approx(first["perplexity"], rel=1e-6)
    assert second["windows"] == 7


def test_options_are_spelled_whole(run_main):
    code, _, err = run_main(main, "ppl", "--model", "any", "--kv-b", 4)
    assert (code, err) == (
        2,
        "error: unrecognized arguments: --kv-b 4; python -m eval ppl --help explains the options\n",
    )


@pytest.mark.parametrize(("on_cpu", "gpus", "refused"), [(False, 1, True), (False, 2, False), (True, 1, False)])
def test_processes_compute_where_they_were_told_and_never_share_a_gpu(monkeypatch, on_cpu, gpus, refused):
    for variable, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    asked = []
    monkeypatch.setattr(
        "accelerate.PartialState", lambda cpu: asked.append(cpu) or Mock(process_index=0, num_processes=2)
    )
    if refused:
        with pytest.raises(
            UserError, match=r"2 processes were started on a machine that shows 1 CUDA GPUs.*--device cpu"
        ):
            Processes(on_cpu)
    else:
        Processes(on_cpu)
    assert asked == ([] if refused else [on_cpu])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if on_cpu else "0")


@pytest.mark.parametrize(("arguments", "named"), [
    (["smollm2", "135m", "gptx", "3", "16", "ppl", "29500", "cpu"], "unknown recipe 'gptx'; choose from fp16"),
    (["smollm2", "135m", "rtn", "3", "16", "hela swag", "29500", "cpu"], "there is no task 'hela swag'; the nearest"),
    (["llama-2", "7b", "rtn", "3", "16", "ppl"], "got 6 of 8"),
    (["llama-2", "7b", "rtn", "3", "16", "ppl", "29500", "gpu"], "device 'gpu'"),
        (["llama-2", "7b", "rtn", "3", "16", "ppl", "29500", "97,98"], "GPU index 97 is not there"),
    (["no-such", "7b", "rtn", "3", "16", "ppl", "29500", "cpu"], "modelzoo/no-such/no-such-7b is missing"),
])  # fmt: skip
def test_the_published_call_refuses_in_one_line(arguments, named):
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("scripts/setup.sh has not made .venv")
    if "smollm2" in arguments and not (SMOLLM2 / "config.json").is_file():
        pytest.skip("scripts/prepare/model.sh smollm2 135m has not run")
    result = run(["bash", "scripts/eval/eval.sh", *arguments])
    assert result.returncode == 2
    assert len(refusals(result.stderr)) == 1
    assert named in result.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_the_published_call_evaluates_both_arms_of_smollm2(tmp_path):
    for part in ("modelzoo/smollm2", "datasets"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "modelzoo" / "smollm2" / "smollm2-135m").symlink_to(SMOLLM2)
    (tmp_path / "datasets" / "sample").symlink_to(ROOT / "datasets" / "sample")
    result = run(["bash", "scripts/eval/eval.sh", "smollm2", "135m", "rtn", "4", "4", "ppl", "29500", "cpu"],
                 INTACTKV_ROOT=str(tmp_path), WINDOW="128", LIMIT="4")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "| smollm2-135m | rtn-w4g64 | 4 per_head | sample | [B]    |" in result.stdout
    assert len(list((tmp_path / "outputs" / "runs").glob("*.json"))) == 2
