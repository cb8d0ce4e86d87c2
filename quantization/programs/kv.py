"""python -m quantization kv: calibrate a KV-cache policy for a dense or quantized checkpoint."""

import argparse
import time

from corpora import values
from corpora.errors import Parser, UserError
from quantization.programs.kv_options import kv_artefact_of
from quantization.programs.options import add_plan_options, check_out, plan_of, show_log

__all__ = ["kv_program"]

DESCRIPTION = """\
Calibrate a KV-cache policy that has numbers of its own for every layer: ranges (static), shares (clipped), levels.
Calibration text flows through the blocks of a dense or quantized checkpoint, one block in memory; the weights stay as
they are. The numbers become a file, modelzoo/kv/MODEL/LABEL-IDENTITY.safetensors, which every later run with the same
--model, --kv, calibration and prefix finds (or makes, if it is not there); --out writes it elsewhere, for --kv FILE. A
killed run goes on at the layer where it died. With --calibrate-behind-prefix the text runs behind the intact --prefix,
as it will when the model is used; such a file is refused without that prefix.
"""


def kv_parser() -> argparse.ArgumentParser:
    """The options of the program."""
    parser = Parser(
        prog="python -m quantization kv",
        description=DESCRIPTION,
        epilog="example: python -m quantization kv --model modelzoo/smollm2/smollm2-135m --kv static --kv-bits 4 "
        "--prefix bos --calibrate-behind-prefix, and then: python -m eval ppl with the same options",
    )
    add_plan_options(parser, run=False, dtype=False)
    parser.add_argument(
        "--out",
        type=values.path,
        metavar="FILE",
        help="file to write, *.safetensors (default: modelzoo/kv/MODEL/LABEL-IDENTITY.safetensors)",
    )
    parser.add_argument("--verbose", action="store_true", help="log lines on stderr")
    return parser


def kv_program(arguments: list[str]) -> None:
    """The program."""
    options = kv_parser().parse_args(arguments)
    show_log(options.verbose)
    if kv_artefact_of(options) is not None:
        raise UserError(f"--kv {options.kv} is calibrated already; name a policy, such as static")
    if not options.plan:
        check_out(options, "kv")
    plan = plan_of(options, makes="kv")

    from quantization.runs.kv_artefact import label_of

    started = time.perf_counter()
    made = plan.kv_artefact(options.out)
    tokens, owner = plan.recipe.calibration.length, made.owner
    keys, of_values = made.policy.bits_per_element(tokens, owner.head_dim, owner.kv_heads)
    print(
        f"{label_of(made.policy, made.weights)}  {(keys + of_values) / 2:.2f} bits per element  "
        f"{time.perf_counter() - started:.0f} s  {options.out or plan.kv_file}"
    )
