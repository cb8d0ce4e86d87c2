"""python -m eval plot: figures, each a picture and its numbers as CSV."""

import argparse
from pathlib import Path
from typing import Any

from corpora.errors import UserError
from eval.programs.table import add_filters, chosen_rows
from quantization.options import add_model_options

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    plot = commands.add_parser("plot", help="figures", description="Draw a figure as PNG, with its data as CSV.")
    figures = plot.add_subparsers(dest="figure", required=True, metavar="perplexity|pivots|hessian")
    bars = figures.add_parser(
        "perplexity",
        help="perplexity per setting, with and without IntactKV",
        description="Perplexity per setting, from the records in outputs/runs/.",
    )
    add_filters(bars, required=True)
    pivots = figures.add_parser(
        "pivots",
        help="activation magnitude per token and layer",
        description="Largest activation of every token in every layer: the pivots stand out.",
    )
    add_model_options(pivots)
    pivots.add_argument("--corpus", default=None, metavar="NAME|FILE", help="text to run (default: the model's own)")
    pivots.add_argument("--tokens", type=int, default=48, metavar="T", help="length of the text (default: 48)")
    hessian = figures.add_parser(
        "hessian",
        help="the first token's share of every Hessian",
        description="How much of every Hessian's trace the first token of the calibration text owns, per block.",
    )
    add_model_options(hessian)
    hessian.add_argument("--calibration", metavar="NAME|FILE", help="text to run (default: the model's own, or c4)")
    hessian.add_argument("--calibration-samples", type=int, metavar="N", help="pieces of text (default: 16)")
    hessian.add_argument("--calibration-length", type=int, metavar="T", help="tokens of a piece (default: 512 or 2048)")
    for figure in (bars, pivots, hessian):
        figure.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="file to write")


def run(options: argparse.Namespace) -> None:
    """Draw the chosen figure."""
    if options.out.suffix != ".png":
        raise UserError(f"--out {options.out}: figures are written as .png")
    if options.figure == "perplexity":
        from eval.plots.perplexity import draw

        draw(chosen_rows(options), options.out)
    elif options.figure == "hessian":
        from eval.plots.hessian import draw_hessian

        size = options.calibration_samples, options.calibration_length
        draw_hessian(options.model, options.calibration, *size, options.device, options.out)
    else:
        from eval.plots.pivots import draw_pivots

        draw_pivots(options.model, options.corpus, options.tokens, options.device, options.out)
    print(f"{options.out}  {options.out.with_suffix('.csv')}")
