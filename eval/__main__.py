"""python -m eval: perplexity, tasks, MT-bench, needles, a chat, statistics, tables of finished runs, figures."""

import argparse
import sys

from corpora.errors import Parser, run_program
from eval.programs import chat, cluster, judge, mtbench, needle, plot, ppl, report, reproduce, stats, table, tasks

PROGRAMS = {
    "ppl": ppl,
    "tasks": tasks,
    "mtbench": mtbench,
    "judge": judge,
    "needle": needle,
    "chat": chat,
    "stats": stats,
    "table": table,
    "plot": plot,
    "reproduce": reproduce,
    "report": report,
    "cluster": cluster,
}


def parser() -> argparse.ArgumentParser:
    """Every subcommand's options."""
    top = Parser(
        prog="python -m eval",
        description="Evaluate a model, dense or quantized, with and without an intact prefix.",
        epilog="example: python -m eval ppl --model modelzoo/smollm2/smollm2-135m --recipe rtn-w3 --prefix bos "
        "--window 512 --limit 8",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="|".join(PROGRAMS))
    for program in PROGRAMS.values():
        program.add(commands)
    return top


def main() -> None:
    """Run the chosen program."""
    options = parser().parse_args(sys.argv[1:])
    PROGRAMS[options.command].run(options)


if __name__ == "__main__":
    run_program(main)
