"""python -m quantization: write a quantized checkpoint, or list the recipes."""

import argparse
import json
import logging

from corpora import values
from corpora.errors import Parser
from quantization.programs.kv_options import given_kv
from quantization.programs.options import add_plan_options, plan_of, show_log
from quantization.programs.out_option import check_out

__all__ = ["quantize"]

log = logging.getLogger(__name__)


def quantize_parser(listing: bool) -> argparse.ArgumentParser:
    """The options of the program."""
    parser = Parser(
        prog="python -m quantization",
        description="Quantize a dense checkpoint, one decoder block at a time. A killed run goes on where it stopped.",
        epilog="example: python -m quantization --model modelzoo/smollm2/smollm2-135m --recipe rtn --bits 4 "
        "--out modelzoo/my-w4.   `python -m quantization prefix --help` is about prefixes, "
        "`python -m quantization kv --help` about KV caches that calibrate, `python -m quantization export --help` "
        "about the layouts of other runtimes.",
    )
    if not listing:
        add_plan_options(parser, run=False, dtype=False)
        parser.add_argument(
            "--out",
            type=values.path,
            metavar="DIR",
            help="where to write (default: modelzoo/quantized/MODEL/RECIPE-IDENTITY)",
        )
        parser.add_argument("--json", action="store_true", help="print where it lies and what it took as JSON")
        parser.add_argument("--verbose", action="store_true", help="one log line per block on stderr")
    parser.add_argument(
        "--list", action="store_true", help="print the named recipes with their parts, one a line, and stop"
    )
    return parser


def quantize(arguments: list[str]) -> None:
    """The program."""
    options = quantize_parser("--list" in arguments and "--help" not in arguments).parse_args(arguments)
    if options.list:
        list_recipes()
        return
    show_log(options.verbose)
    if not options.plan:  # which shows what is there
        check_out(options, "checkpoint")
    plan = plan_of(options, makes="checkpoint")
    asked = given_kv(options)
    if asked and plan.recipe.kv_cache is not None and not plan.recipe.trains_kv:
        log.warning(
            "%s: nothing of it is in this checkpoint; such a cache is chosen when the model runs, so give it to that "
            "program, too",
            ", ".join(asked),
        )

    from quantization.labels import full_label
    from quantization.model.routed import experts_said
    from quantization.runs.checkpoint import read_cost

    out = plan.written(plan.recipe, options.out)
    cost = read_cost(out)
    if options.json:
        print(json.dumps({"directory": str(out), "label": full_label(plan.recipe), **cost}, indent=2))
        return
    bits = "" if cost["bits_per_weight"] is None else f"{cost['bits_per_weight']:.2f} bits per weight  "
    repaired = int(cost["figures"].get("repaired_hessians", 0))
    if (line := experts_said(cost["figures"])) is not None:
        print(line)
    print(
        f"{full_label(plan.recipe)}  {bits}{cost['seconds']:.0f} s  {cost['peak_memory_mb']:.0f} MB  "
        + (f"{repaired} Hessians needed more damping  " if repaired else "")
        + str(out)
    )


def list_recipes() -> None:
    """One recipe a line: name, paper, note, and the parts that other recipes can take of it."""
    from quantization.named import PARTS, RECIPES

    width = max(map(len, RECIPES))
    papers = max(len(row.paper) for row in RECIPES.values())
    for name, row in RECIPES.items():
        parts = ", ".join(part for part in PARTS if getattr(row.recipe, part)) or "no parts"
        print(f"{name:<{width}}  {row.paper:<{papers}}  {row.note}  [{parts}]")
