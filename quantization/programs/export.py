"""python -m quantization.export: a quantized checkpoint in the files of other runtimes and programs."""

import argparse
import sys

from corpora import values
from corpora.errors import Parser, UserError, run_program
from quantization.programs.options import (
    add_plan_option,
    chosen_device,
    chosen_dtype,
    show_log,
    stop_at_plan,
)
from quantization.programs.out_option import check_out

FORMATS = ("compressed-tensors", "gptq", "gptq-v2", "awq", "dense")
SEARCH = "awq-search"


def parser() -> argparse.ArgumentParser:
    """The options of the program."""
    made = Parser(
        prog="python -m quantization.export",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a quantized checkpoint of ours as a Hugging Face directory that other runtimes load, or the "
        "search behind one as a file.",
        epilog="""formats:
  compressed-tensors  2 to 8 bits, any groups, exact; read by transformers (any device) and vLLM
  gptq                2, 3, 4 or 8 bits, version 1; read by GPTQModel (also through transformers), vLLM, ExLlama
  gptq-v2             the same with zero points as they are; read by GPTQModel
  awq                 4 bits, GEMM layout; read by GPTQModel (also through transformers) and vLLM
  dense               plain weights on the quantizer's levels, of any method; read by everything
  awq-search          not the weights, but the scales and clip limits of an AWQ search, as one file in the layout of the
                      AWQ model zoo: --recipe awq --set weights.file=FILE gives the same checkpoint again, and other
                      programs read it; needs the dense checkpoint at its place
GPTQ's and AWQ's formats keep scales in float16; quantize with --set weights.grid.scale_dtype=float16 to lose nothing.

examples:
  python -m quantization.export --model modelzoo/my-w4 --out modelzoo/my-w4-ct --prefix bos --verify
  python -m quantization.export --model modelzoo/my-awq --out my-model-w3-g64.pt --format awq-search""",
    )
    made.add_argument("--model", type=values.path, required=True, metavar="DIR", help="a quantized checkpoint of ours")
    made.add_argument(
        "--out",
        type=values.path,
        required=True,
        metavar="DIR",
        help="directory (with awq-search: *.pt) to write; must not exist yet",
    )
    made.add_argument(
        "--format",
        choices=(*FORMATS, SEARCH),
        default=FORMATS[0],
        help="what to write, see below (default: %(default)s)",
    )
    made.add_argument(
        "--prefix",
        type=values.text,
        default="none",
        metavar='none|bos|prompt|FILE|"text"',
        help="an intact prefix to put beside the weights as intactkv-prefix.safetensors, for our own attach(); other "
        "runtimes cannot take it (default: none)",
    )
    made.add_argument(
        "--device",
        type=values.device,
        default="auto",
        metavar="auto|cpu|cuda[:N]",
        help="where the full-precision model computes the prefix (default: auto, a GPU if there is one)",
    )
    made.add_argument(
        "--dtype",
        default=None,
        choices=["float32", "float16", "bfloat16"],
        help="of everything that is not packed: norms, embeddings, head, and the weights of dense (default: as stored)",
    )
    made.add_argument(
        "--verify",
        action="store_true",
        help="load the result in a fresh process, without this project, and compare its logits with ours (float32, on "
        "the CPU); ends with 1 if they differ",
    )
    made.add_argument(
        "--verify-python",
        type=values.name,
        metavar="PATH",
        help="the interpreter for --verify, for example one with gptqmodel and optimum (default: this one)",
    )
    add_plan_option(made)
    return made


def export(arguments: list[str]) -> None:
    """The program."""
    options = parser().parse_args(arguments)
    check_out(options, ".pt" if options.format == SEARCH else "directory")
    if options.format == SEARCH:
        export_awq_search(options)
        return
    from quantization.export.verify import VerificationFailed, check_reader, verify
    from quantization.export.writer import FORMATS as FORMAT_TABLE
    from quantization.export.writer import export_checkpoint, read_source
    from quantization.recipes.recipe import Recipe
    from quantization.runs.plan import plan_run

    show_log()
    if options.verify_python is not None and not options.verify:
        raise UserError(f"--verify-python {options.verify_python} is for --verify; add that, or leave it out")
    reader = options.verify_python or sys.executable
    if options.plan:
        read_source(options.model, options.out)
        recipe = Recipe(prefix=options.prefix)
        stop_at_plan(options, plan_run(options.model, recipe, device=chosen_device(options.device)))
    kind = FORMAT_TABLE[options.format]
    try:
        if options.verify:
            check_reader(kind, reader)
        done = export_checkpoint(
            options.model,
            options.out,
            options.format,
            prefix=options.prefix,
            dtype=chosen_dtype(options.dtype),
            device=chosen_device(options.device),
        )
        print(f"{done.format.name}  {done.size / 1e6:.1f} MB  {done.directory}\n{done.facts}")
        if done.prefix is not None:
            print(f"prefix  {len(done.prefix)} tokens {done.prefix.ids.tolist()}  basis {done.prefix.model.basis}")
        if options.verify:
            found = verify(options.model, done, reader)
            print(
                f"verified  largest logit difference {found.largest:.3g}  relative {found.relative:.1e} (allowed "
                f"{found.tolerance:.0e})  read by {found.reader}"
            )
    except VerificationFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(1)


def export_awq_search(options: argparse.Namespace) -> None:
    """One file in place of a directory."""
    if options.prefix != "none" or options.dtype is not None or options.verify or options.plan:
        raise UserError(f"--format {SEARCH} writes no weights; leave out --prefix, --dtype, --verify and --plan")
    from quantization.export.awq_search import export_search

    found = export_search(options.model, options.out)
    print(f"{SEARCH}  {options.out.stat().st_size / 1e6:.1f} MB  {options.out}\n{found}")


def main() -> None:
    """The program, on the command line's words."""
    export(sys.argv[1:])


if __name__ == "__main__":
    run_program(main)
