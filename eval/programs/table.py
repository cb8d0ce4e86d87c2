"""python -m eval table: finished runs as a table, the paper's tables with ours beside them."""

import argparse
import logging
from pathlib import Path
from typing import Any

from corpora import values
from corpora.errors import UserError
from corpora.targets import MARK, check_written
from eval.programs.asked import add_choice, scope_of, scope_of_words

__all__ = ["add", "add_filters", "chosen_grids", "chosen_rows", "run"]

SIGNED = {"markdown": f"\n<!-- {MARK} -->\n", "csv": "", "latex": f"% {MARK}\n"}  # in a file that is written
log = logging.getLogger(__name__)

RUNS = ("tasks", "needle")  # tables of all finished runs; without a name those of perplexity
NUMBERS = ("1", "2", "3", "4", "5")  # IntactKV's tables


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    table = commands.add_parser(
        "table",
        help="finished runs as a table, vanilla beside IntactKV; published tables, ours beside theirs",
        description="Print the figures in outputs/runs/, vanilla beside IntactKV, or a published table with what "
        "`reproduce` made beside the published figures: at every size that was run, or at one that options name.",
    )
    table.add_argument(
        "which",
        nargs="?",
        metavar="TABLE|tasks|needle",
        help="a published table by its name (`reproduce --list`; 1 to 5 are IntactKV's); tasks: all finished tasks; "
        "needle: all grids of needles; without it: all perplexities",
    )
    table.add_argument("--format", default="markdown", choices=["markdown", "csv", "latex"], help="default: markdown")
    table.add_argument(
        "--out",
        type=values.path,
        metavar="FILE",
        help="write the table to a file instead of printing it; replaces only a table or figure of this program",
    )
    table.add_argument(
        "--costs", action="store_true", help="also what quantizing took: bits per weight, seconds, peak memory"
    )
    table.add_argument(
        "--over-seeds",
        action="store_true",
        help="one figure, mean ± standard deviation (n), for runs that differ only in the calibration seed (a "
        "published table: --seeds)",
    )
    add_filters(table, required=False)
    table.add_argument("--task", type=values.name, metavar="NAME", help="only this task, for example arc_easy (tasks)")
    table.add_argument("--data", choices=["sample", "local", "hub"], help="only runs on this data (tasks)")
    table.add_argument("--fewshot", type=values.count(0), metavar="N", help="only runs with so many examples (tasks)")
    add_choice(table.add_argument_group("of a published table, as `reproduce` was told"))


def add_filters(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Which finished runs to show. required: of exactly one model (a figure); otherwise of any number of models."""
    several = "" if required else "; may be given several times"
    parser.add_argument(
        "--model",
        type=values.name,
        action="store" if required else "append",
        required=required,
        metavar="NAME",
        help=f"only this one, for example smollm2-135m{several}",
    )
    parser.add_argument("--corpus", type=values.name, metavar="NAME", help="only runs on this corpus or text file")
    parser.add_argument("--protocol", choices=["intactkv", "gptq", "hendrycks", "lm-eval"], help="only by this one")
    parser.add_argument("--window", type=values.count(), metavar="TOKENS", help="only runs with this window")
    parser.add_argument(
        "--limit", type=values.limit, metavar="N|all", help="only runs with this limit, in windows or questions a task"
    )
    parser.add_argument("--dtype", type=values.name, metavar="NAME", help="only runs computed in this dtype")
    parser.add_argument("--device", type=values.name, metavar="cpu|cuda", help="only runs on this kind of device")


# Options that filter, and the setting that they look at.
FILTERS = {
    **{name: name for name in ("corpus", "protocol", "window", "limit", "dtype", "device", "data", "fewshot")},
    "task": "task_name",
}
FITTING = {  # filters that the runs of a kind have, and what these are called
    "ppl": (("corpus", "protocol", "window", "limit", "dtype", "device"), "perplexities"),
    "tasks": (("protocol", "limit", "dtype", "device", "task", "data", "fewshot"), "tasks"),
    "needle": (("dtype", "device"), "needles"),
}


def _shown(value: Any) -> str:
    """A setting as a filter spells it; no limit is `all`."""
    return "all" if value is None else str(value)


def _filters(options: argparse.Namespace) -> dict[str, Any]:
    """The filters that were given, but for --model; figures have fewer of them than tables."""
    return {key: value for key in FILTERS if (value := getattr(options, key, None)) is not None}


def _models(options: argparse.Namespace) -> list[str]:
    return [options.model] if isinstance(options.model, str) else options.model or []


def _words(filters: dict[str, Any]) -> str:
    return " ".join(f"--{key} {value}" for key, value in filters.items())


def _chosen(kind: str, options: argparse.Namespace, left_out: list[str]) -> list[dict[str, Any]]:
    """Records of a kind (of `FITTING`) that the filters leave. left_out: gets a line for each that cannot be read.

    Raises UserError for a filter of another kind of run.
    """
    from corpora.catalog import catalog_name
    from eval.runs import all_records

    filters = _filters(options)
    fitting, runs = FITTING[kind]
    foreign = [key for key in filters if key not in fitting]
    if foreign:
        raise UserError(f"--{foreign[0]} is no setting of {runs}, which this table shows; leave it out")
    models = {name for model in _models(options) for name in (model, catalog_name(model))}
    return [
        record
        for record in all_records(kind, left_out)
        if (not models or models & {record["settings"]["model"], catalog_name(record["settings"]["model"])})
        and all(str(value) == _shown(record["settings"][FILTERS[key]]) for key, value in filters.items())
    ]


def _some(kind: str, options: argparse.Namespace, left_out: list[str]) -> list[dict[str, Any]]:
    """The same. Raises UserError if there are none."""
    from corpora.paths import outputs_dir

    records = _chosen(kind, options, left_out)
    if not records:
        asked = " ".join([*(f"--model {model}" for model in _models(options)), _words(_filters(options))]).strip()
        fits = f" that fits {asked}" if asked else ""
        if left_out:
            fits += f" that can be read ({len(left_out)} {left_out[0]})"
        raise UserError(
            f"{outputs_dir() / 'runs'} holds no finished run{fits}; run `python -m eval {kind}` first"
            + (", or leave a filter out" if asked else "")
        )
    return records


def chosen_rows(options: argparse.Namespace) -> list[Any]:
    """The finished perplexities that the filters leave. Raises UserError if there are none."""
    left_out: list[str] = []
    rows = _rows(options, left_out)
    _tell(left_out)
    return rows


def chosen_grids(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The finished grids of needles that the filters leave. Raises UserError if there are none."""
    left_out: list[str] = []
    records = _some("needle", options, left_out)
    _tell(left_out)
    return records


def _rows(options: argparse.Namespace, left_out: list[str], over_seeds: bool = False) -> list[Any]:
    from eval.tables.perplexities import perplexity_rows

    return perplexity_rows(_some("ppl", options, left_out), over_seeds)


def _tell(left_out: list[str]) -> None:
    """Name on stderr what could not be read."""
    for line in left_out:
        log.warning(line)


def run(options: argparse.Namespace) -> None:
    """Print the table, or write it."""
    foreign = [name for name in CHOICE if getattr(options, name)] if options.which in (None, *RUNS) else []
    if foreign:
        word = "--set" if foreign[0] == "settings" else f"--{foreign[0].replace('_', '-')}"
        raise UserError(f"{word} is of a published table; name one, or leave it out")
    if options.costs and options.which is not None:
        raise UserError(f"--costs belongs to the table of all perplexities, not to table {options.which}; leave it out")
    if options.over_seeds and options.which == "needle":
        raise UserError(
            "--over-seeds is of calibration seeds, which the table of needles shows one by one; leave it out"
        )
    if options.out is None:
        print(_table(options), end="")
        return
    from corpora.writing import write_beside

    check_written([options.out])
    text = _table(options)
    with write_beside(options.out) as beside:
        beside.write_text(text + SIGNED[options.format], encoding="utf-8")
    print(options.out)


def _table(options: argparse.Namespace) -> str:
    """The table as text, with the number of records that it could not read."""
    left_out: list[str] = []
    text = _without_count(options, left_out)
    _tell(left_out)
    if not left_out or options.format == "csv":  # stderr names them in any case
        return text
    count = f"{len(left_out)} run record{'s' if len(left_out) > 1 else ''}"
    return f"{text}\n{'%' if options.format == 'latex' else '-'} left out: {count} that could not be read\n"


def _without_count(options: argparse.Namespace, left_out: list[str]) -> str:
    from eval.tables import render

    if options.which is None:  # the tables of all runs import torch, which a published one does without
        from eval.tables import perplexities

        rows = _rows(options, left_out, options.over_seeds)
        return perplexities.render(rows, options.format, options.costs)
    if options.which == "tasks":
        from eval.tables import tasks

        found = tasks.task_tables(_some("tasks", options, left_out), options.over_seeds)
        return render.render(found, options.format)
    if options.which == "needle":
        from eval.tables import needles

        return render.render([needles.run_table(_some("needle", options, left_out))], options.format)
    return render.render(_published(options, left_out), options.format)


# Options of a published table alone, and what they are without being given.
CHOICE = ("only", "seeds", "tasks", "mmlu_protocol", "batch_size", "calibration", "calibration_samples",
          "calibration_length", "recipe", "prefix", "behind", "settings", "options", "training", "questions",
          "judge_model", "judge_options")  # fmt: skip
NOT_SCOPE = ("dtype", "device", "task")  # filters of records that a table is not asked by


def _published(options: argparse.Namespace, left_out: list[str]) -> list[Any]:
    """A declared table with ours beside it, once for every size that has figures: of the models that were asked for, or
    of all. Without options of a size these are the published one and all that `reproduce` has noted.

    Raises UserError for an unknown name, and if nothing of what was asked for is there.
    """
    from corpora.catalog import catalog_name
    from eval.tables.beside import paper_table
    from eval.tables.compare import filled
    from eval.tables.papers import PAPERS
    from eval.tables.preview import place_of
    from eval.tables.render import render

    name = f"intactkv-{options.which}" if options.which in NUMBERS else options.which
    if name not in PAPERS:
        raise UserError(
            f"table {values.shown(options.which)} is not known; choose 1 to 5 (IntactKV's), a name of "
            f"`python -m eval reproduce --list`, {', '.join(RUNS)}, or nothing for all perplexities"
        )
    paper, scope = PAPERS[name], _scope(options)
    wanted = [Path(model).name for model in _models(options) if paper.models]  # some tables are of no model
    lines: list[str] = []
    tables: dict[str, Any] = {}  # what is published beside several sizes stands once, behind the last
    for size, models in _sizes(name, scope, lines).items():
        cells = []
        for model in models if paper.models else map(place_of, paper.shown_for):
            if not wanted or catalog_name(model.name) in map(catalog_name, wanted):
                mine = filled(paper, model, size, lines)
                cells += mine if any(one.ours is not None for one in mine) else []
        kinds = (paper_table(paper, cells, options.format == "csv", called) for called in ((), size.called))
        for same, table in zip(*kinds, strict=True) if cells else ():
            text = render([same], "markdown")  # of two sizes with the same figures the one that is told in fewer words
            tables[text] = min(tables.pop(text, table), table, key=lambda one: len(one.caption))
    left_out += dict.fromkeys(lines)
    if tables:
        return list(tables.values())
    asked = " ".join([*(f"--model {model}" for model in wanted), _words(_filters(options))]).strip()
    published = [model for model in wanted if catalog_name(model) in paper.models]
    if asked and (_filters(options) or not published):
        raise UserError(
            f"no finished run of {name} fits {asked}; `python -m eval reproduce {name} --model DIR` makes them, with "
            "the same options"
        )
    return paper_table(
        paper, [c for m in published or paper.shown_for for c in filled(paper, place_of(m), scope)], called=scope.called
    )


def _sizes(table: str, scope: Any, left_out: list[str]) -> dict[Any, list[Path]]:
    """The sizes that a table is looked for at, each with the models that something was asked of."""
    from dataclasses import replace

    from eval.tables.declared import PUBLISHED
    from eval.tables.ledger import all_entries
    from eval.tables.noted import all_noted
    from eval.tables.preview import place_of

    found = {scope: [place_of(model) for model in sorted({entry["model"] for entry in all_entries(left_out)})]}
    if replace(scope, only=()) != PUBLISHED:
        return found
    for one in all_noted(left_out):
        if one.table != table:
            continue
        try:
            size = replace(scope_of_words(one.words), only=scope.only)
        except UserError as error:
            left_out.append(f"left out: note of a table {one.file}: {error}")
            continue
        places = found.setdefault(size, [])
        if one.model.name not in [place.name for place in places]:
            places.append(one.model)
    return found


def _scope(options: argparse.Namespace) -> Any:
    """What was asked of `reproduce`. Raises UserError for filters that are not of a published table."""
    for name in NOT_SCOPE:
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name} is no setting of a published table; leave it out (`python -m eval table` and `table tasks` "
                "show runs by it)"
            )
    if options.protocol in ("hendrycks", "lm-eval"):
        raise UserError(f"--protocol {options.protocol} is of MMLU; a published table has --mmlu-protocol for it")
    limit = None if options.limit in (None, "all") else int(options.limit)
    corpus = None if options.corpus is None else [options.corpus]
    return scope_of(argparse.Namespace(**vars(options) | {"limit": limit, "corpus": corpus}))
