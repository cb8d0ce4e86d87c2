"""python -m quantization.export: the program of quantization/programs/export.py."""

from corpora.errors import run_program
from quantization.programs.export import main

if __name__ == "__main__":
    run_program(main)
