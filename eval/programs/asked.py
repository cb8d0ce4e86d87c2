"""Which runs of published tables are asked for: the options that `reproduce`, `cluster submit` and `report` share."""

import argparse
import os
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from corpora import values
from corpora.errors import Parser, UserError

if TYPE_CHECKING:
    from eval.tables.asked import Call, Run
    from eval.tables.declared import Paper, Scope

__all__ = ["ALL", "add_asked", "add_choice", "asked_for", "papers_of", "read_call", "scope_of", "scope_of_words",
           "without_models", "words_of"]  # fmt: skip

ALL = "all"
# What a cell says by itself, which more options must not replace.
CELLS = ("--model", "--recipe", "--corpus", "--tasks", "--limit", "--window", "--out", "--device", "--json", "--force",
         "--prefix")  # fmt: skip


def add_asked(reproduce: argparse.ArgumentParser) -> None:
    """Which tables, which runs of them, and at what size; `cluster submit` and `report` have the same."""
    reproduce.add_argument("tables", nargs="*", type=values.name, metavar="TABLE", help="names of --list, or all")
    reproduce.add_argument(
        "--model",
        type=values.path,
        action="append",
        metavar="DIR",
        help="directory of a dense checkpoint; may be given several times (default: every published model of the table "
        "that is in modelzoo/)",
    )
    group = reproduce.add_argument_group("what is run (default: the whole table, at the published size)")
    group.add_argument(
        "--corpus",
        type=values.name,
        action="append",
        metavar="NAME|FILE",
        help="for perplexity, in place of the table's",
    )
    group.add_argument("--protocol", choices=["intactkv", "gptq"], help="of perplexity, in place of the table's")
    group.add_argument("--window", type=values.count(3), metavar="TOKENS", help="of perplexity (default: the table's)")
    group.add_argument(
        "--limit", type=values.count(), metavar="N", help="at most so many windows, or questions of a task"
    )
    group.add_argument("--fewshot", type=values.count(0), metavar="N", help="shots of tasks (default: the table's)")
    group.add_argument("--data", choices=["local", "sample", "hub"], help="where the questions of tasks come from")
    add_choice(group)


def add_choice(group: argparse._ActionsContainer) -> None:
    """Which runs of a table, and how they are made; `eval table` has the same."""
    group.add_argument(
        "--only",
        type=values.name,
        nargs="+",
        action="extend",
        metavar="WORD",
        help="methods, rows, widths (4-bit), models, arms ([B]; alone: without a prefix) or measures; of several "
        "kinds, one of each must fit",
    )
    group.add_argument(
        "--seeds",
        type=values.seed,
        nargs="+",
        metavar="S",
        help="of calibration, a run for each (default: the recipe's)",
    )
    group.add_argument(
        "--tasks",
        type=values.several(values.name),
        metavar="NAME,…",
        help="columns of these tasks in place of the table's; none: without tasks",
    )
    group.add_argument("--mmlu-protocol", choices=["hendrycks", "lm-eval"], help="of MMLU, in place of the table's")
    group.add_argument("--batch-size", type=values.count(), metavar="N", help="rows of a forward pass of tasks")
    group.add_argument(
        "--calibration", type=values.name, metavar="NAME|FILE", help="the text that methods calibrate on"
    )
    group.add_argument("--calibration-samples", type=values.count(), metavar="N", help="pieces of it")
    group.add_argument("--calibration-length", type=values.count(), metavar="T", help="tokens of a piece")
    group.add_argument(
        "--recipe",
        type=values.name,
        nargs="+",
        metavar="NAME",
        help="rows of these named recipes, in place of the table's (python -m quantization --list)",
    )
    group.add_argument(
        "--prefix",
        type=values.text,
        nargs="+",
        metavar="none|bos|…",
        help="with --recipe: what stands in front, a row for each (default: none bos)",
    )
    group.add_argument(
        "--behind", action="store_true", help="methods that calibrate also do so behind the prefix of an arm"
    )
    group.add_argument(
        "--set",
        type=values.name,
        action="append",
        dest="settings",
        metavar="[NAME:]PART.FIELD=VALUE",
        help="a setting of every recipe but full precision, such as weights.damp=0.1, or of the method or recipe NAME",
    )
    group.add_argument(
        "--options", type=values.words, default=(), metavar='"--OPTION …"', help="more options of every such recipe"
    )
    group.add_argument(
        "--training", type=values.words, default=(), metavar='"--OPTION …"', help="more options of what trains a prefix"
    )
    group.add_argument(
        "--questions",
        type=values.name,
        metavar="sample|mt_bench|FILE",
        help="of judged answers (default: mt_bench, but sample for the embedded model)",
    )
    group.add_argument(
        "--judge-model", type=values.name, metavar="NAME|local:DIR", help="judge answers (default: none is asked)"
    )
    group.add_argument(
        "--judge-options", type=values.words, default=(), metavar='"--OPTION …"', help="more options of `eval judge`"
    )


def scope_of(options: argparse.Namespace) -> "Scope":
    """What the options leave of a table."""
    from eval.tables.declared import Scope

    def told(**given: object) -> tuple[str, ...]:
        return tuple(word for name, value in given.items() if value is not None
                     for word in (f"--{name.replace('_', '-')}", str(value)))  # fmt: skip

    names = ("calibration", "calibration_samples", "calibration_length")
    calibration = told(**{name: getattr(options, name) for name in names})
    if options.prefix and not options.recipe:
        raise UserError("--prefix is of rows that --recipe names; add it, or choose a table's arms with --only")
    judge = () if options.judge_model is None else ("--judge-model", options.judge_model, *options.judge_options)
    if options.judge_options and not judge:
        raise UserError("--judge-options are of a judge, but none is named; add --judge-model, or leave them out")
    for name in ("options", "training", "judge_options"):
        cells = [word for word in CELLS if (name, word) != ("training", "--corpus")]  # no cell says what is trained on
        if taken := [word for word in getattr(options, name) if word.partition("=")[0] in cells]:
            raise UserError(
                f"--{name.replace('_', '-')} {values.shown(taken[0])} would replace what a cell of the table says it "
                "is; leave it out, and use the option of that name of this program if it has one"
            )
    settings = [word for setting in options.settings or () for word in ("--set", setting)]
    return Scope(
        seeds=tuple(dict.fromkeys(options.seeds or ())),
        only=tuple(options.only or ()),
        recipes=tuple(options.recipe or ()),
        prefixes=tuple(options.prefix or Scope().prefixes),
        behind=options.behind,
        corpora=tuple(options.corpus or ()),
        tasks=options.tasks or (),
        limit=options.limit,
        window=options.window,
        data=options.data,
        questions=options.questions,
        scoring=told(protocol=options.protocol),
        asking=told(fewshot=options.fewshot, batch_size=options.batch_size),
        mmlu=told(protocol=options.mmlu_protocol),
        calibration=calibration,
        options=(*settings, *options.options),
        training=options.training,
        judge=judge,
    )


class _Reader(Parser):
    """Of words that stand in a file, whose mistakes are that file's."""

    def __init__(self) -> None:
        super().__init__(add_help=False)
        add_asked(self)

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(message)


def words_of(options: argparse.Namespace) -> list[str]:
    """The options of a size (all but the tables, --model and --only) as a command line has them; what is as by default
    is left out."""
    words: list[str] = []
    for action in _Reader()._actions:
        value = getattr(options, action.dest)
        if not action.option_strings or action.dest in ("model", "only") or value == action.default:
            continue
        name = action.option_strings[-1]
        if isinstance(value, tuple):  # of one word
            words.append(f"{name}={shlex.join(value) if action.type is values.words else ','.join(map(str, value))}")
        elif action.nargs == 0:
            words.append(name)
        elif action.nargs == "+":
            words += [name, *map(str, value)]
        else:
            words += [f"{name}={one}" for one in (value if isinstance(value, list) else [value])]
    return words


def scope_of_words(words: Sequence[str]) -> "Scope":
    """The size that such options ask for. Raises UserError for a mistake in them."""
    return scope_of(_Reader().parse_args(list(words)))


def asked_for(options: argparse.Namespace) -> "tuple[list[Run], list[tuple[Paper, list[Path]]], Scope]":
    """Every run that the options of `add_asked` ask for, once; the tables with their models, and what is left of them.

    Raises UserError if no run is left, and for options of recipes that cannot be.
    """
    from eval.tables.asked import cells_of, runs_of

    if options.model:
        options.model = _directories(options.model)
    papers, scope = papers_of(options.tables), scope_of(options)
    if not scope.judge and all(measure.program == "judge" for paper in papers for measure in paper.measures):
        names = ", ".join(paper.name for paper in papers)
        raise UserError(f"{names}: judged answers need a judge; add --judge-model NAME|local:DIR")
    chosen, scope = _models(papers, options, scope)
    _check_settings(papers, scope)
    asked = runs_of([cell for paper, models in chosen for model in models for cell in cells_of(paper, model, scope)])
    if not asked:
        raise UserError(_nothing(chosen, scope))
    if scope.options or scope.scoring or scope.asking or scope.training or scope.judge:
        _check_words(asked, bool(scope.options))
    return asked, chosen, scope


def _directories(models: "Sequence[Path]") -> list[Path]:
    """Models by their absolute paths, links as they are, each once. Raises UserError for two of one name, by which
    runs and what they make are called."""
    found: dict[str, Path] = {}
    for model in map(Path, map(os.path.abspath, models)):
        if found.setdefault(model.name, model) != model:
            raise UserError(
                f"--model {found[model.name]} and --model {model} have one name, by which runs are told apart; give "
                "one of them at a time, or another name (a link will do)"
            )
    return list(found.values())


def _check_settings(papers: "Sequence[Paper]", scope: "Scope") -> None:
    """Raise UserError for a setting NAME:PART.FIELD=VALUE whose name is no method or recipe of the tables."""
    from eval.tables.asked import rows_of

    names = [name for setting in scope.settings if (name := scope.method_of(setting))]
    methods = [row.method for paper in papers for row in rows_of(paper, scope)] if names else []
    known = dict.fromkeys(word for method in methods for word in (method.name, method.recipe))
    for name in names:
        if name.lower() not in {word.lower() for word in known}:
            raise UserError(
                f"--set {values.shown(name)}:… is of no method or recipe of {', '.join(paper.name for paper in papers)}"
                f"; known are {', '.join(known)}"
            )


def _check_words(asked: "Sequence[Run]", recipes: bool) -> None:
    """Refuse now what the programs would refuse one run after the other. recipes: also recipes that cannot be, which
    loads torch. Raises UserError; argparse exits."""
    from eval.tables.asked import Call

    for run in {(run.model, run.program, run.words): run for run in asked}.values():
        options = read_call(Call((run,)), "auto")
        if recipes and options is not None and hasattr(options, "recipe"):
            from quantization.programs.options import chosen_recipe
            from quantization.runs.checkpoint import Checkpoint

            chosen_recipe(options, Checkpoint(run.model, run.model.name, "", None))


def read_call(call: "Call", device: str) -> argparse.Namespace | None:
    """The options of a call as its program's own parser reads them; None for one whose words no user gives."""
    if call.first.program == "latency":
        return None
    package, *words = call.command(device)[2:]  # behind `python -m`
    return _parser_of(package).parse_args(words)


@cache
def _parser_of(package: str) -> argparse.ArgumentParser:
    """The parser of `python -m PACKAGE`."""
    from eval.programs import chat, judge, mtbench, needle, ppl, tasks
    from quantization.programs.prefix import prefix_parser
    from quantization.programs.quantize import quantize_parser

    if package == "quantization":
        return quantize_parser(False)
    if package == "intactkv":
        return prefix_parser("python -m intactkv")
    parser = Parser(prog="python -m eval")
    commands = parser.add_subparsers(dest="command")
    for module in (ppl, tasks, needle, chat, mtbench, judge):
        module.add(commands)
    return parser


def papers_of(names: Sequence[str]) -> "list[Paper]":
    """The tables of some names, or all. Raises UserError for an unknown name, and for none."""
    from eval.tables.papers import PAPERS

    if not names:
        raise UserError("no table is named; `python -m eval reproduce --list` prints all, `all` stands for every one")
    if ALL in names:
        return list(PAPERS.values())
    names = [f"intactkv-{name}" if f"intactkv-{name}" in PAPERS else name for name in names]  # IntactKV's numbers
    for name in names:
        if name not in PAPERS:
            near = get_close_matches(name, [*PAPERS, ALL], 1, 0.0)[0]
            raise UserError(f"unknown table {values.shown(name)}; the nearest is {near}, `reproduce --list` prints all")
    return [PAPERS[name] for name in dict.fromkeys(names)]


def _models(
    papers: "Sequence[Paper]", options: argparse.Namespace, scope: "Scope"
) -> "tuple[list[tuple[Paper, list[Path]]], Scope]":
    """Every table with the models that it is run for, and the scope without the words of --only that are models.

    Raises UserError if nothing of modelzoo/ is in a table and no model is named.
    """
    from eval.doctor.files import model
    from eval.tables.declared import NO_MODEL
    from eval.tables.preview import place_of

    published = [Path(name) for paper in papers for name in paper.models]
    wanted, scope = without_models(scope, [*published, *(options.model or ())])
    chosen: list[tuple[Paper, list[Path]]] = []
    for paper in papers:
        if not paper.models:
            chosen.append((paper, [NO_MODEL]))
            continue
        places = list(options.model or map(place_of, paper.models))
        if wanted:
            places = [place for place in places if place.name in wanted]
        if not options.dry_run and not options.model:
            there = [place for place in places if (place / "config.json").is_file()]
            if not there and len(papers) == 1:
                names = ", ".join(place.name for place in places)
                raise UserError(
                    f"none of the models of {paper.name} is in modelzoo/ ({names}); "
                    f"name a directory with --model DIR, or fetch one: {model(places[0]).way_out}"
                )
            places = there
        chosen.append((paper, places))
    if not any(places for _, places in chosen):
        raise UserError("no model is left to run; name a directory with --model DIR")
    return chosen, scope


def without_models(scope: "Scope", models: Sequence[Path]) -> "tuple[set[str], Scope]":
    """The names of models that --only chooses (none: it names no model), and the scope without them."""
    from dataclasses import replace

    words = {word.lower() for word in scope.only}
    wanted = {place.name for place in models if place.name.lower() in words}
    lower = {name.lower() for name in wanted}
    return wanted, replace(scope, only=tuple(word for word in scope.only if word.lower() not in lower))


def _nothing(chosen: "Sequence[tuple[Paper, list[Path]]]", scope: "Scope") -> str:
    """Why no run is left, with the words that --only takes of these tables."""
    from eval.tables.asked import words_of

    known: dict[str, None] = {}
    for paper, _ in chosen:
        known |= dict.fromkeys(word for kind in words_of(paper, paper.measures, scope) for word in sorted(kind) if word)
    names = ", ".join(paper.name for paper, _ in chosen)
    if not scope.only:
        return f"{names}: nothing is left to run"
    return f"--only {shlex.join(scope.only)} leaves nothing of {names}; known are models and " + ", ".join(
        map(shlex.quote, known)
    )
