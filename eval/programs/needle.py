"""python -m eval needle: is a key in a long text found again, by length and depth."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from corpora import values
from corpora.errors import UserError
from eval.programs.start import start
from quantization.programs.options import add_plan_options, add_text_seed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eval.generation import Generation
    from eval.mtbench.json_lines import LineFile
    from eval.needle import Grid
    from eval.processes import Processes
    from quantization.runs.plan import Plan

__all__ = ["add", "grid_of", "run"]

EXAMPLES = """\
examples:
  python -m eval needle --model modelzoo/smollm2/smollm2-135m --kv-bits 2 --prefix bos --lengths 512,1024 --keys 2
  python -m eval needle --model modelzoo/llama-3.1-instruct/llama-3.1-instruct-8b --published --kv-bits 4

A killed run goes on where it was. Under `accelerate launch` the questions are shared among the processes.
python -m eval plot needle draws finished runs, python -m eval table needle lists them.
"""
LENGTHS, DEPTHS = (1024, 2048, 4096), (0, 25, 50, 75, 100)
GRID: dict[str, Any] = {"lengths": LENGTHS, "depths": DEPTHS, "keys": 5, "text_seed": 0}
PUBLISHED: dict[str, Any] = {"units": 5, "lines": 127}
NEW_TOKENS = 16  # of an answer in the grid


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    needle = commands.add_parser(
        "needle",
        help="needle in a haystack: a key in a long text",
        description="A line with a key stands in a long text of no interest, and the model is asked for the key. "
        "Greedy; what counts is the exact key in the answer, and the key's log-probability behind the prompt.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_plan_options(needle, several=True)
    grid = needle.add_argument_group("grid")
    grid.add_argument(
        "--lengths",
        type=values.several(values.count()),
        metavar="TOKENS,…",
        help=f"of the prompts, with what stands in front (default: {_words(LENGTHS)})",
    )
    grid.add_argument(
        "--depths",
        type=values.several(values.count(0, 100)),
        metavar="PERCENT,…",
        help=f"of the needle in the text (default: {_words(DEPTHS)})",
    )
    grid.add_argument("--keys", type=values.count(1, 1000), metavar="N", help="a cell, drawn (default: 5)")
    add_text_seed(grid, GRID["text_seed"], "of the keys' draw")
    needle.set_defaults(text_seed=None)  # whether it was given counts
    grid.add_argument(
        "--max-new-tokens",
        type=values.count(),
        metavar="T",
        help=f"of an answer (default: {NEW_TOKENS}; of the published keys one more than the key has)",
    )
    published = needle.add_argument_group("the published five")
    published.add_argument(
        "--published",
        action="store_true",
        help="the five published keys at half depth, in a text whose length is counted in lines, with a space at the "
        "end of the prompt",
    )
    published.add_argument(
        "--units", type=values.count(), metavar="N", help="of filler on each side of the needle (default: 5)"
    )
    published.add_argument("--lines", type=values.count(), metavar="N", help="of a unit (default: 127)")
    needle.add_argument("--json", action="store_true", help="print the run record instead of the table")
    needle.add_argument("--force", action="store_true", help="run again, even if there is a record")


def _words(numbers: Any) -> str:
    return ",".join(map(str, numbers))


def run(options: argparse.Namespace) -> None:
    """Ask for every key that has no answer yet, and print the grid."""
    from contextlib import nullcontext

    from corpora.paths import outputs_dir
    from corpora.tokens import tokenizer_fingerprint
    from eval.generation import own_generation
    from eval.mtbench.json_lines import only_writer
    from eval.needle import texts_identity
    from eval.runs import identity_of, record_of
    from eval.tables.needles import grid_tables
    from eval.tables.render import render

    _check_options(options)
    plan, processes = start(options)
    lead, grid = grid_of(options, plan)
    generation = own_generation(plan.checkpoint.directory, plan.tokenizer)
    description = plan.describe()
    settings = description | {
        "lengths": list(grid.lengths),
        "depths": list(grid.depths),
        "keys": list(grid.keys),
        "lines": grid.lines,
        "texts": texts_identity(),
        "tokenizer": tokenizer_fingerprint(plan.tokenizer),
        "lead": list(lead),
        "max_new_tokens": options.max_new_tokens,
        "generation": generation.describe(),
    }
    key = identity_of("needle", settings)
    path = outputs_dir() / "needle" / f"{key}.jsonl"

    def figures() -> dict[str, Any]:
        return _figures(plan, generation, lead, grid, options.max_new_tokens, path, key, options.force, processes)

    with only_writer(path) if processes.is_first else nullcontext():
        name = f"{description['model']}-{description['weights']}"
        record = record_of("needle", name, settings, figures, force=options.force, write=processes.is_first)
        if processes.is_first:
            path.unlink(missing_ok=True)  # the record holds what it held
    if not processes.is_first:
        return
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        print(render(grid_tables(record), "markdown"), end="")


def _check_options(options: argparse.Namespace) -> None:
    """Raise UserError for options of the one form beside the other, and fill in the defaults of the one that runs."""
    own, other = (PUBLISHED, GRID) if options.published else (GRID, PUBLISHED)
    for name in other:
        if getattr(options, name) is not None:
            spelled = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{spelled} is of the grid, and --published has five keys at half depth; leave one of them out"
                if options.published
                else f"{spelled} counts the text of the published keys; add --published, or give --lengths"
            )
    for name, value in own.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not options.published and options.max_new_tokens is None:
        options.max_new_tokens = NEW_TOKENS


def grid_of(options: argparse.Namespace, plan: "Plan") -> "tuple[Sequence[int], Grid]":
    """What opens every prompt, and all questions. Raises UserError for options that do not go together, and for a
    length that the needle or the model does not fit."""
    from eval.needle import PUBLISHED_DEPTH, PUBLISHED_KEYS, Grid, drawn_keys, prompt_ids, published_length
    from eval.tasks.task_runner import lead_of

    _check_options(options)
    lead = lead_of(plan)
    if options.published:
        lines = 2 * options.units * options.lines
        length = published_length(plan.tokenizer, lead, lines)
        grid = Grid((length,), (PUBLISHED_DEPTH,), PUBLISHED_KEYS, lines)
        given = f"--units {options.units} --lines {options.lines}"
    else:
        grid = Grid(options.lengths, options.depths, drawn_keys(options.keys, options.text_seed))
        given = f"--lengths {max(options.lengths)}"
    shortest = Grid((min(grid.lengths),), grid.depths[:1], grid.keys, grid.lines)
    longest_key = max(len(prompt_ids(plan.tokenizer, lead, shortest, cell)[1]) for cell in shortest.cells())
    room = max(options.max_new_tokens or longest_key + 1, longest_key)
    plan.check_fits(f"{given} with {room} new tokens", max(grid.lengths) + room)
    return lead, grid


def _figures(
    plan: "Plan",
    generation: "Generation",
    lead: "Sequence[int]",
    grid: "Grid",
    max_new_tokens: int | None,
    path: "Path",
    key: str,
    force: bool,
    processes: "Processes",
) -> dict[str, Any]:
    """Ask for every key whose result is not in the file, line by line, and return the figures of the record."""
    import time
    from statistics import fmean

    from tqdm import tqdm

    from corpora.json_files import with_sum
    from corpora.machine import peak_memory_mb
    from eval.mtbench.json_lines import LineFile, part_of, parts_of
    from eval.needle import RESULTS, look_for

    if processes.is_first:
        if force:
            for old in (path, *parts_of(path)):
                old.unlink(missing_ok=True)
        LineFile(path, RESULTS).join()
    processes.wait()
    kept = _kept(LineFile(path, RESULTS), key)
    cells = grid.cells()
    left = [cell for cell in cells if cell not in kept]
    mine = [left[i] for i in processes.mine(range(len(left)))]
    started = time.perf_counter()
    if mine:
        file = LineFile(path if processes.count == 1 else part_of(path, processes.index), RESULTS)
        model = plan.load()
        started = time.perf_counter()
        with tqdm(total=len(cells), initial=len(cells) - len(mine), desc="needles", unit="key",
                  disable=not processes.is_first) as bar:  # fmt: skip
            for row in look_for(model, plan.tokenizer, generation, lead, grid, mine, max_new_tokens):
                file.append(with_sum({"grid": key, **row}))
                bar.update()
    seconds = time.perf_counter() - started
    processes.wait()
    if processes.is_first:
        LineFile(path, RESULTS).join()
    processes.wait()
    kept = _kept(LineFile(path, RESULTS), key)
    results = [kept[cell] for cell in cells]
    return {
        "found": fmean(row["found"] for row in results),
        "log_likelihood": fmean(row["log_likelihood"] for row in results),
        "quantized": fmean(row["quantized"] for row in results),
        "results": results,
        "answered_now": len(left),
        "seconds": round(seconds, 3),
        "peak_memory_mb": round(peak_memory_mb(plan.device.type), 1),
        **plan.outcome(),
    }


def _kept(file: "LineFile", key: str) -> dict[Any, dict[str, Any]]:
    """The results of a file by their question. Raises UserError for one that was changed or is another run's."""
    from corpora.json_files import without_sum

    mend = "delete the file and run again"
    for row in file.rows.values():
        without_sum(row, f"a result in {file.path}", mend=mend)
        if row["grid"] != key:
            raise UserError(f"{file.path} holds a result of another run; {mend}")
    return {
        cell: {name: value for name, value in row.items() if name not in ("grid", "sha256")}
        for cell, row in file.rows.items()
    }
