"""python -m intactkv build: make prefix files.

The program needs recipes, which live one package above; it is imported when it runs, and the library never needs it.
"""

import sys

from corpora.errors import run_program


def main() -> None:
    """Hand the command to the program that knows recipes."""
    from quantization.__main__ import build_prefix

    build_prefix(sys.argv[1:], "python -m intactkv")


if __name__ == "__main__":
    run_program(main)
