"""python -m quantization.export: the program `quantization.programs.export`, by the name that it is known under."""

import runpy

if __name__ == "__main__":
    runpy.run_module("quantization.programs.export", run_name="__main__")
