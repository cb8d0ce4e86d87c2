"""Words of options, of the environment and of --set: what is no value of its kind is refused where it is read."""

import argparse
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common import ROOT, every

from corpora import values
from corpora.__main__ import parser as corpora_parser
from corpora.errors import UserError
from corpora.paths import CHECKOUT, root
from eval.__main__ import main as eval_main
from eval.__main__ import parser as eval_parser
from eval.processes import Processes
from quantization.named import RECIPES, named_recipe
from quantization.programs.export import parser as export_parser
from quantization.programs.prefix import prefix_parser
from quantization.programs.quantize import quantize_parser
from quantization.recipes.recipe import with_settings

HUGE = "1" + "0" * 22
# What Python's int() and float() take, or nearly, and nobody means.
NO_NUMBERS = [
    "",
    " ",
    "x",
    "٣",
    "1_000",
    " 4",
    "4 ",
    "4\n5",
    "0x10",
    "nan",
    "-nan",
    "NaN",
    "1e400",
    "9" * 5000,
    "1" * 400 + "x",
    "1e99999",
]


def refused(read: Any, word: str) -> str:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        read(word)
    (line,) = str(caught.value).splitlines()
    assert len(line) < 400
    assert line.isprintable()
    return line


@every("word", [*NO_NUMBERS, "1.5", "1e3", "inf", HUGE, f"-{HUGE}"])
def test_a_count_a_seed_and_a_group_size_are_whole_numbers_in_plain_digits(word):
    for read in (values.count(), values.seed, values.group_size):
        assert "give a whole number from" in refused(read, word)


def test_whole_numbers_have_the_bounds_of_their_kind():
    assert [values.count()(word) for word in ("1", "+7", "007", "1000000")] == [1, 7, 7, 1_000_000]
    assert refused(values.count(3), "2") == "2 is not allowed; give a whole number from 3 to 1000000"
    for word in ("0", "-3", "1000001"):
        refused(values.count(), word)
    assert [values.group_size(word) for word in ("-1", "64")] == [-1, 64]
    for word in ("0", "-2"):
        refused(values.group_size, word)
    refused(values.seed, "-1")
    refused(values.seed, str(2**63))


def test_the_largest_seed_is_one_that_torch_takes_with_the_epochs_that_are_added():
    largest = values.seed(str(2**63 - 1))
    torch.Generator().manual_seed(largest + values.MANY)
    with pytest.raises((ValueError, RuntimeError, OverflowError)):
        torch.Generator().manual_seed(int(HUGE))


def test_what_slurm_is_told_is_written_as_slurm_writes_it():
    for word in ("90", "4:00:00", "30:00", "1-12", "2-0:30", "0:90"):
        assert values.duration(word) == word
    for word in (*NO_NUMBERS, "0", "0:00", "4h", "1.5", "-1", "1-", ":30", "1:2:3:4", HUGE):
        assert "such as 90, 4:00:00 or 1-12" in refused(values.duration, word)
    for word in ("64G", "512", "500M", "1T"):
        assert values.memory(word) == word
    for word in (*NO_NUMBERS, "0", "64 G", "64GB", "1.5G", "-1", HUGE):
        assert "such as 64G" in refused(values.memory, word)
    assert values.plain("gpu:a100:4,x|y&z") == "gpu:a100:4,x|y&z"
    for word in ("", " ", "a b", "a\nb", "é", "a" * 201):
        assert "one word of plain letters" in refused(values.plain, word)


@every("word", [*NO_NUMBERS, "inf", "-inf", "infinity", "1_0.5", "0x1p3", "1e-", ".", "-1", "0"])
def test_a_rate_is_a_finite_number_above_nothing(word):
    assert "give a number above 0, such as 1e-3" in refused(values.number(above=0, like="1e-3"), word)


def test_numbers_have_their_bounds():
    rate = values.number(above=0, most=10)
    assert [rate(word) for word in ("1e-3", ".5", "2.", "10")] == [0.001, 0.5, 2.0, 10.0]
    refused(rate, "10.1")
    assert values.number(least=0)("0") == 0
    assert math.isinf(values.real("inf"))


@every("word", ["", "much", "-5GiB", "0GiB", "nanGiB", "1e400GB", "5 GiB", "5", "٣GiB", f"{HUGE}TB"])
def test_a_size_of_memory_is_a_positive_number_with_a_unit(word):
    if word == "5":  # bytes
        assert values.size(word) == 5
    else:
        assert "give a size such as 65GiB" in refused(values.size, word)
    assert (values.size("65GiB"), values.size("1.5GB"), values.size("2mib")) == (65 * 2**30, 1_500_000_000, 2 * 2**20)


def test_names_and_paths_say_something_in_one_line_that_a_disk_can_hold():
    assert values.path("my models/a*b") == Path("my models/a*b")
    for word in ("", " ", "\t", "a\nb", "a\x1b[31mb", "a" * 4096):
        refused(values.name, word)
        refused(values.path, word)
    assert "up to 255 bytes" in refused(values.path, "é" * 128)
    assert values.text("two\nlines") == "two\nlines"
    refused(values.text, "\n")


# Every option of every program has a reader ---------------------------------------------------------------------------


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    below = [one for action in parser._actions if isinstance(action, argparse._SubParsersAction)
             for one in action.choices.values()]  # fmt: skip
    return [parser, *(deeper for one in below for deeper in parsers(one))]


PROGRAMS = [corpora_parser(), eval_parser(), prefix_parser("intactkv"), quantize_parser(False), export_parser()]
OPTIONS = [(parser.prog, action) for program in PROGRAMS for parser in parsers(program) for action in parser._actions
           if action.option_strings and action.nargs != 0]  # fmt: skip


def test_no_option_reads_its_word_by_itself():
    assert len(OPTIONS) > 300
    kinds = {(prog, action.option_strings[0]): action.type for prog, action in OPTIONS if not action.choices}
    plain = [where for where, kind in kinds.items() if kind in (None, int, float, str, Path)]
    assert plain == []


def test_no_option_takes_nothing_or_several_lines():
    taken = []
    for prog, action in OPTIONS:
        for word in ("", " ", "\x1b[31m\n"):
            try:
                value = action.type(word) if action.type else word
            except argparse.ArgumentTypeError:
                continue
            if action.choices is None or value in action.choices:
                taken.append((prog, action.option_strings[0], word))
    assert {(option, word) for _, option, word in taken} <= {("--prefix", "\x1b[31m\n")}  # a text


REFUSED = {
    "samples below none": (
        ["calibrate", "--samples=-3", "--held-out", "-1"],
        "--samples: -3 is not allowed; give a whole",
    ),
    "nothing held out": (["calibrate", "--held-out", "0"], "--held-out: 0 is not allowed"),
    "a seed that torch has not": (["calibrate", "--training-seed", HUGE], f"--training-seed: {HUGE} is not allowed"),
    "a rate that is none": (
        ["calibrate", "--learning-rate", "nan"],
        "--learning-rate: nan is not allowed; give a number",
    ),
    "no epochs": (["train-prefix", "--prefix-epochs", "0"], "--prefix-epochs: 0 is not allowed"),
    "a ratio below one": (["discover", "--threshold", "1"], "--threshold: 1 is not allowed; give a number above 1"),
    "no bits": (["build", "--bits", "0"], "--bits: 0 is not allowed"),
    "a model without a name": (["build", "--model", ""], "--model: '' is not allowed; give a name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nonsense_ends_with_two_and_one_line_that_names_option_value_and_what_is_allowed(run_main, case):
    from intactkv.__main__ import main

    words, said = REFUSED[case]
    code, out, err = run_main(main, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: argument ")
    assert said in err


@pytest.mark.parametrize("words", [["judge", "--timeout", word] for word in ("nan", "inf", "-1", "0", "1e400")]
                         + [["judge", option, HUGE] for option in ("--retries", "--concurrency", "--max-tokens")]
                         + [["ppl", option, HUGE] for option in ("--limit", "--window", "--batch-size", "--seed")]
                         + [["plot", "act", "--dpi", word] for word in ("9", "1201")]
                         + [["table", "--limit", "many"]])  # fmt: skip
def test_the_evaluations_refuse_it_too(run_main, words):
    code, _, err = run_main(eval_main, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{words[-2]}: {words[-1]} is not allowed; give" in err


def test_a_wrong_word_is_refused_before_torch_is_imported():
    code = "import sys; sys.argv[1:] = ['ppl', '--model', 'm', '--window', 'nan']\n" \
           "from eval.__main__ import main\ntry: main()\nexcept SystemExit as end: assert end.code == 2\n" \
           "assert 'torch' not in sys.modules"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--window: nan is not allowed" in done.stderr


# Fields ---------------------------------------------------------------------------------------------------------------


SETTINGS = [
    *(f"weights.damp={word}" for word in ("nan", "inf", "1e300", "", "x", "0x1")),
    *(f"calibration.samples={word}" for word in ("-1", "0", HUGE, "٣", "1_0", "")),
    *(f"calibration.length={word}" for word in ("-1", "0", HUGE)),
    *(f"calibration.seed={word}" for word in ("-1", HUGE, "x")),
    *(f"weights.grid.bits={word}" for word in ("0", HUGE, "4.0", " 4")),
    "calibration.corpus=", "calibration.corpus=a\nb", "weights.no=1", "weights=", "weights.grid=4",
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_field_takes_only_values_of_its_kind(setting):
    with pytest.raises(UserError) as caught:
        with_settings(named_recipe("gptq-w3"), [setting])
    assert len(str(caught.value)) < 400


def test_infinity_is_a_value_only_where_it_means_something():
    assert math.isinf(with_settings(RECIPES["spqr"].recipe, ["weights.threshold=inf"]).weights.threshold)
    for field in ("weights.damp", "weights.average_bits"):
        with pytest.raises(UserError, match="inf is not allowed; give a number"):
            with_settings(RECIPES["spqr"].recipe, [f"{field}=inf"])


def test_values_of_no_bits_are_no_default():
    with pytest.raises(UserError, match="KV bits=0 is not supported"):
        with_settings(RECIPES["kv4"].recipe, ["kv_cache.v_bits=0"])


# The environment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["x", "-1", "0", "1.5", HUGE, "٣"])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch, word):
    monkeypatch.setenv("WORLD_SIZE", word)
    with pytest.raises(UserError, match=r"the environment variable WORLD_SIZE=.* is not allowed; give a whole number"):
        Processes()


@pytest.mark.parametrize(("variable", "word"), [("RANK", "2"), ("RANK", "x"), ("LOCAL_RANK", "-1"),
                                                ("MASTER_PORT", "65536"), ("LOCAL_WORLD_SIZE", "3")])  # fmt: skip
def test_processes_that_no_launcher_started_are_refused(monkeypatch, variable, word):
    set_all = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (set_all | {variable: word}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: SimpleNamespace(process_index=0, num_processes=2))
    with pytest.raises(UserError, match=f"the environment variable {variable}={word} is not allowed"):
        Processes(on_cpu=True)
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.setenv(variable, set_all.get(variable, "2"))
        monkeypatch.delenv(name)
        with pytest.raises(UserError, match=f"{name} is not set; start them with `accelerate launch`"):
            Processes(on_cpu=True)
        monkeypatch.setenv(name, set_all[name])
    assert Processes(on_cpu=True).count == 2


def test_the_root_is_a_directory_that_is_there_or_the_checkout(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for word in (tmp_path / "nowhere", tmp_path / "file"):
        monkeypatch.setenv("INTACTKV_ROOT", str(word))
        with pytest.raises(UserError, match=r"INTACTKV_ROOT=.* is no directory; make it, name another, or unset it"):
            root()
    monkeypatch.setenv("INTACTKV_ROOT", "")
    assert root() == CHECKOUT
    monkeypatch.setenv("INTACTKV_ROOT", str(tmp_path))
    assert root() == tmp_path
