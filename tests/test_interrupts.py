"""Ctrl-C and a full memory: one line, whatever the program is doing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from corpora.errors import run_program

ROOT = Path(__file__).parents[1]
HEAD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
from corpora.errors import run_program
def main():
"""
# A module that takes what is raised within it for a missing module, as transformers' lazy imports do.
IN_AN_IMPORT = """
    try:
        import swallows
    except ImportError:
        time.sleep(600)
run_program(main)
"""
AT_WORK = """
    try:
        print("there", flush=True)
        time.sleep(600)
    finally:
        print("tidied", flush=True)
run_program(main)
"""
SWALLOWS = """
import time
try:
    print("there", flush=True)
    time.sleep(600)
except BaseException:
    raise ImportError("no such module")
"""


@pytest.mark.parametrize(("code", "tidied"), [(IN_AN_IMPORT, ""), (AT_WORK, "tidied\n")])
def test_ctrl_c_ends_with_one_line_also_within_an_import(tmp_path: Path, code: str, tidied: str) -> None:
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, tidied)
    assert err.strip() == "interrupted; run the same command to go on"


def test_a_job_in_the_background_goes_on_ignoring_it() -> None:
    code = (
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom corpora.errors import run_program\n"
        "run_program(lambda: print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def too_much() -> None:
    torch.empty(2**62, dtype=torch.uint8)


def too_long() -> None:
    raise MemoryError


@pytest.mark.parametrize("main", [too_much, too_long])
def test_a_memory_that_is_used_up_is_one_line(main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_program(main)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the memory is used up; give less at once")
    assert err.count("\n") == 1


def test_other_errors_of_torch_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="size"):
        run_program(lambda: torch.ones(2) + torch.ones(3))  # type: ignore[arg-type,return-value]
