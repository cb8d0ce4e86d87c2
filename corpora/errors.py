"""A user's mistake, and how a program reports it: one line on stderr and exit code 2, no traceback.

Libraries raise `UserError`, a ValueError, wherever a value from outside (an option, a file, a checkpoint) is wrong.
The message names the thing, the value, what is allowed and the way out. Our own bugs stay plain exceptions and keep
their traceback.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from corpora.terminal import Unheard, as_other_tools_end, printable, tell, terminal

__all__ = ["Parser", "UserError", "built", "one_line", "run_program", "said_by"]

INTERRUPTED = "\ninterrupted; run the same command to go on"


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, as all our errors, and name the program that explains the options.

    Options are spelled whole: a beginning would be another option's tomorrow.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """As it stands, but a subcommand's parser complains itself: argparse leaves that to the one above."""
        found, unknown = super().parse_known_args(*arguments, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"error: {one_line(message)}; {self.prog} --help explains the options\n")


class UserError(ValueError):
    """Something that the user gave is wrong; the message is complete as it stands."""


def one_line(text: str) -> str:
    """A text for a message: its line ends are spaces, and what would steer a terminal is spelled out."""
    return printable(" ".join(text.split()))


def said_by(error: BaseException) -> str:
    """What a library's exception says, in one line: its first, with the next where that only announces it."""
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {more[0]}" if first.endswith(":") and more else first


@contextmanager
def built(what: str, way_out: str) -> Iterator[None]:
    """Around a library's own constructor, and nothing of ours: whatever it raises is said in one line.

    Also a panic of a library in Rust, which is no Exception.
    """
    try:
        yield
    except (PermissionError, MemoryError):  # what may not be read, or does not fit, is no damaged file
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({said_by(error)[:300]}); {way_out}") from None


def run_program(main: Callable[[], None]) -> None:
    """Run a program's `main`; end with exit code 2 and one line for a user's mistake or a failing disk.

    A full disk, a missing permission or a file that vanished (OSError) is the user's to mend, too: artefacts are
    written beside and renamed, so nothing is damaged by stopping here. A reader of the output that has gone (`| head`)
    is no mistake: the program ends without a word.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a job in the background ignores it
    if usual and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    try:
        with terminal():
            _check_arguments()
            main()
        return
    except UserError as error:
        code, message = 2, f"error: {one_line(str(error))}"
    except OSError as error:
        # safetensors and the tokenizer library report the operating system's error text without a file name.
        where = f" ({error.filename})" if error.filename else ""
        said = f"{error.strerror or error}{where}; nothing finished was changed: mend it and run the command again"
        code, message = 2, f"error: {one_line(said)}"
    except KeyboardInterrupt:
        code, message = 130, INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        # torch's are RuntimeErrors; that of a GPU has a class of its own.
        used_up = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not used_up and "can't allocate memory" not in str(error):
            raise
        said = "the memory is used up; give less at once (samples, batch size, window), a smaller file or more memory"
        code, message = 2, f"error: {said} ({one_line(said_by(error))[:200]})"
    except Unheard:
        as_other_tools_end()
    tell(message)
    sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: raise KeyboardInterrupt, but end at once within an import.

    transformers' lazy imports would take it for a module that is missing, or lose it. What an import may cut short is
    what a kill may cut short, too.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"{INTERRUPTED}\n".encode())
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _check_arguments() -> None:
    """Raise UserError for bytes on the command line that are no UTF-8: nothing could tokenize, record or print them."""
    for word in sys.argv[1:]:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"the argument {word!r} is no text in UTF-8; write it in UTF-8, or rename the file"
            ) from None
