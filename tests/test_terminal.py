"""What programs print: a stranger's text never steers the terminal, output that goes nowhere ends them as others."""

import io
import json
import os
import signal
import subprocess
import sys
import unicodedata

import pytest
from common import ROOT
from tqdm import tqdm

from corpora.errors import Parser, UserError, one_line, run_program
from corpora.terminal import printable

PLAIN = "é 中文 😀 👨‍👩‍👧 עברית\tعربي ± → ‰\n"
HOSTILE = "".join(
    map(chr, [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
)


def test_what_steers_a_terminal_is_spelled_as_in_json_and_all_else_passes():
    assert printable(PLAIN) == PLAIN
    told = printable(f"a{HOSTILE}\ud83d\u2028z")
    assert told.isascii()
    assert told.isprintable()
    assert json.loads(f'"{told}"') == f"a{HOSTILE}\ud83d\u2028z"
    steering = {sign for sign in map(chr, range(0x110000)) if unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp")}
    assert {sign for sign in steering if printable(sign) == sign} == {"\t", "\n"}


def test_errors_logs_and_tables_are_clean_and_a_bar_still_moves(run_main):
    def main() -> None:
        print(f"table {HOSTILE}{PLAIN}", end="")
        print(f"log {HOSTILE}", file=sys.stderr)
        with tqdm(total=2, desc="bar \x1b[31m", mininterval=0) as bar:
            bar.update(2)
        raise UserError(f"no such model 'a\r\n\x1b]0;title\x07 {PLAIN}'")

    code, out, err = run_main(main)
    assert code == 2
    assert out == f"table {printable(HOSTILE)}{PLAIN}"
    assert not set(HOSTILE) - {"\r"} & set(err)
    assert err.count("\rbar \\u001b[31m") >= 2
    assert err.splitlines()[-1] == f"error: no such model 'a \\u001b]0;title\\u0007 {' '.join(PLAIN.split())} '"


def test_a_parsers_complaint_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        Parser(prog="p").parse_args(["a\nb\x1b[2J"])
    err = capsys.readouterr().err
    assert err == "error: unrecognized arguments: a b\\u001b[2J; p --help explains the options\n"
    assert one_line("a\r\n\u2028b") == "a b"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("call", "code", "said"), [
    ("{corpora} | true", -signal.SIGPIPE, ""),
    ("{corpora} --help | true", -signal.SIGPIPE, ""),
    ("{corpora} prepare data nope 2>&1 >/dev/null | true", 2, ""),
    ("{corpora} >/dev/full", 2, "error: cannot print: No space left on device (stdout)"),
    ("{corpora} --help >/dev/full", 2, "error: cannot print: No space left on device (stdout)"),
    ("{corpora} prepare data nope 2>/dev/full", 2, ""),
    ("{corpora} >&-", 2, "error: stdout is closed"),
    ("{corpora} 2>&- >/dev/null", 0, ""),
    ("{corpora} >/dev/null", 0, ""),
])  # fmt: skip
def test_output_that_goes_nowhere(call, code, said, unbuffered):
    # Whoever reads has gone before the program prints.
    program = f"{{ sleep 0.2; exec {sys.executable} -m corpora"
    first, *rest = call.replace("{corpora}", program).split(" | ")
    script = " | ".join([f"{first}; }}", *rest]) + "; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.stdout == ""
    assert done.returncode == (128 - code if code < 0 else code), done.stderr
    assert len(done.stderr.splitlines()) == bool(said), done.stderr
    assert done.stderr.startswith(said)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_knows_no_such_letter_shows_its_number(encoding):
    code = f"from corpora.errors import run_program; run_program(lambda: print({PLAIN!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": encoding},
                          capture_output=True, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.rstrip(b"\n") == PLAIN.rstrip("\n").encode(encoding, "backslashreplace")


def test_streams_are_given_back(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["x"])
    run_program(lambda: print("a\x1bb"))
    assert (sys.stdout, sys.stderr, out.getvalue()) == (out, err, "a\\u001bb\n")
