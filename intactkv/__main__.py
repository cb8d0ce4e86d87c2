"""python -m intactkv build|discover|calibrate|train-prefix|export: make prefix files, and PEFT adapters.

The program needs recipes, which live one package above; it is imported when it runs, and the library never needs it.
"""

import sys

from corpora.errors import run_program


def main() -> None:
    """Hand the command to the program that knows recipes."""
    from quantization.programs.prefix import prefix_program

    prefix_program(sys.argv[1:], "python -m intactkv")


if __name__ == "__main__":
    run_program(main)
