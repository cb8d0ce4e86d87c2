"""python -m quantization: write a quantized checkpoint, list the recipes; `prefix …`, `kv …`, `export …`: those
programs."""

import sys

from corpora.errors import run_program
from quantization.programs.export import export
from quantization.programs.kv import kv_program
from quantization.programs.prefix import prefix_program
from quantization.programs.quantize import quantize


def main() -> None:
    """Choose the program by its first word."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["prefix"]:
        prefix_program(arguments[1:])
    elif arguments[:1] == ["kv"]:
        kv_program(arguments[1:])
    elif arguments[:1] == ["export"]:
        export(arguments[1:])
    else:
        quantize(arguments)


if __name__ == "__main__":
    run_program(main)
