"""What a program prints, at one boundary: a stranger's text never steers the terminal, and a program whose output goes
nowhere ends as any other tool.

Names of files, models and labels, answers and messages of servers are printed as they come, so control characters in
them (ESC sequences, carriage returns, C1, bidirectional overrides) are spelled as JSON does (\\u001b) on their way out.
All else that Unicode has passes unchanged.
"""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, NoReturn

__all__ = ["Unheard", "as_other_tools_end", "printable", "tell", "terminal"]

# C0 without \t and \n, DEL and C1, two line ends, what turns the direction of text, half characters.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MOVES = re.compile(r"(?:\r|\n|\x1b\[A)*")  # how tqdm moves the cursor


def printable(text: str) -> str:
    """The text with each character that would steer a terminal spelled out."""
    return STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Unheard(BaseException):
    """Nobody reads what is printed any more; no Exception, so that no library goes on without a reader."""


class _Clean:
    """A text stream that only prints. name: for the error of a device that takes no more."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name
        self._failed: OSError | None = None  # argparse takes no notice of it
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows no é shows \xe9

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Print a text; a bar starts its line anew with the first character."""
        start = text[:1] if self._name == "stderr" and text.startswith("\r") else ""
        clean = text if MOVES.fullmatch(text) else start + printable(text[len(start) :])
        with self._told():
            self._stream.write(clean)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Print several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Raises OSError if the device did not take what was printed."""
        with self._told():
            self._stream.flush()
        if self._failed is not None:
            raise self._failed

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise Unheard from None
        except OSError as error:
            self._failed = OSError(error.errno, f"cannot print: {error.strerror}", self._name)
            raise self._failed from None


@contextmanager
def terminal() -> Iterator[None]:
    """Let all that is printed here pass through the boundary. What is left in a buffer is out at the end.

    Raises OSError if stdout is closed or its device takes no more, `Unheard` if its reader has gone.
    """
    # A file that is opened while one of the first three numbers is free becomes what C libraries print into.
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(free)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it is open as long as the program runs)
    if sys.stdout is None:
        raise OSError(None, "stdout is closed; send it to a file, or to /dev/null")
    with redirect_stdout(_Clean(sys.stdout, "stdout")), redirect_stderr(_Clean(sys.stderr, "stderr")):
        try:
            yield
        except BaseException as error:
            if isinstance(error, SystemExit) and not error.code:  # --help
                _empty(sys.stdout)
            else:
                with suppress(OSError, Unheard):  # what ended the program is to be told, not this
                    _empty(sys.stdout)
            raise
        _empty(sys.stdout)


def tell(message: str) -> None:
    """A line on stderr. Where that takes no more, the exit code alone says it."""
    with suppress(OSError):
        _empty(sys.stderr, f"{message}\n")


def _empty(stream: Any, more: str = "") -> None:
    """Print what a stream's buffer holds, and more. A device that takes no more gets no second try, of which Python
    would complain."""
    try:
        stream.write(more)
        stream.flush()
    except BaseException:
        with suppress(OSError, ValueError):  # a stream of a test has no number
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        raise


def as_other_tools_end() -> NoReturn:
    """End by SIGPIPE, without a word, as `yes | head -1` does: the shell sees 141."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPIPE])
    os.kill(os.getpid(), signal.SIGPIPE)
    os._exit(128 + signal.SIGPIPE)
