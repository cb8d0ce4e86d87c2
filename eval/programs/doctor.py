"""python -m corpora doctor: what a published table needs and lacks, before anything runs or is submitted."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from corpora import values
from corpora.errors import UserError
from eval.programs.asked import add_asked, asked_for, read_call, scope_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from eval.doctor.machine import Finding
    from eval.tables.asked import Call, Run
    from quantization.runs.plan import Plan

__all__ = ["add", "run"]

EXAMPLES = """\
examples:
  python -m corpora doctor                           this machine
  python -m corpora doctor gptq-llama                and all that the table needs, for its published models
  python -m corpora doctor kivi-chat --model modelzoo/smollm2/smollm2-135m --device cpu

Exit code 0: nothing lacks. 1: something does; the last column says how to get it.
"""


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    doctor = commands.add_parser(
        "doctor",
        help="what a published table needs and lacks, before anything is submitted",
        description="Looks at this machine and, for published tables, at models, data, judges, memory and disk. Every "
        "method's plan is made, nothing is run. Without a TABLE: the machine alone.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_asked(doctor)
    doctor.add_argument(
        "--device", type=values.device, default="auto", metavar="auto|cpu|cuda[:N]", help="where it shall compute"
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(dry_run=True)  # models need not be here


def run(options: argparse.Namespace) -> None:
    """Print all findings. Exits with 1 if something lacks. Raises UserError for a table that there is not."""
    from dataclasses import asdict

    from eval.doctor.machine import machine, space

    scope = scope_of(options)
    if not options.tables and (options.model or scope.reduced or scope.only):
        raise UserError("--model and what is run are of a table; name one, or leave them out")
    findings = machine(options.device)
    findings += _tables(options) if options.tables else [space(0)]
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        print(_shown(findings), end="")
    if any(finding.verdict == "lacks" for finding in findings):
        raise SystemExit(1)


def _shown(findings: "list[Finding]") -> str:
    from eval.tables.render import Table, render

    head = ("what", "needed", "found", "verdict", "the way out")
    rows = tuple((f.what, f.needed, f.found, f.verdict, f.way_out or "–") for f in findings)
    counts = [f"{sum(f.verdict == word for f in findings)} {word}" for word in ("lacks", "warning", "ok")]
    return render(
        [Table("What is needed, and what is here", head, rows, words=5, notes=(", ".join(counts),))], "markdown"
    )


# tables ---------------------------------------------------------------------------------------------------------------


def _tables(options: argparse.Namespace) -> "list[Finding]":
    """What the tables need, each thing once."""
    from eval.doctor.files import calibrated_on, model, scored, unnamed_judge
    from eval.doctor.lacking import texts_of
    from eval.doctor.machine import memory, space
    from eval.tables.asked import calls_of

    runs, chosen, scope = asked_for(options)
    sizes = _Sizes()
    found = {}
    if not scope.judge and any(measure.program == "judge" for paper, _ in chosen for measure in paper.measures):
        found["judge"] = unnamed_judge()
    for directory in dict.fromkeys(run.model for run in runs if run.program != "latency"):
        found[str(directory)] = model(directory)
    for one in (*scored(runs), *calibrated_on(runs, texts_of(runs))):
        found.setdefault(one.what, one)
    for directory in dict.fromkeys(run.model for run in runs):
        mine = [run for run in runs if run.model == directory]
        if str(directory) in found and found[str(directory)].verdict == "ok":
            print(f"planning {len(mine)} runs of {directory.name} …", file=sys.stderr, flush=True)  # takes seconds each
            for one in _planned(calls_of(mine), options.device, sizes):
                found.setdefault(one.found, one)
        else:
            sizes.guess(directory, mine, options.device)
    if sizes.memory:
        found["memory"] = memory(sizes.memory, sizes.what, sizes.device)
    found["disk"] = space(sum(sizes.files.values()))
    return list(found.values())


class _Sizes:
    """The most memory that a plan takes, and the files that plans would write, by their place."""

    def __init__(self) -> None:
        self.memory, self.what, self.device = 0.0, "", "cpu"
        self.files: dict[str, float] = {}

    def add(self, plan: "Plan", makes: str) -> None:
        """Take in what `--plan` prints of a plan."""
        from quantization.runs.preview import preview

        for line in preview(plan, makes):
            if line.what.startswith("memory") and (line.size or 0) > self.memory:
                self.memory, self.device = float(line.size or 0), str(plan.device)
                self.what = f"{line.what.removeprefix('memory ')}, {plan.checkpoint.name}"
            elif line.state not in ("present", "about"):
                self.files[line.path] = line.size or 0.0

    def guess(self, model: "Path", runs: "Sequence[Run]", device: str) -> None:
        """The same from the size that the name of a model says that is not here: its weights, and what runs write."""
        from eval.tables.estimate import disk_of, size_of

        size = size_of(model)
        if size is None or not runs:
            return
        if size.parameters * size.bytes > self.memory:
            self.memory, self.device = size.parameters * size.bytes, "cpu" if device == "cpu" else "cuda"
            self.what = f"the weights of {model.name} alone"
        self.files |= {run.key: disk_of(run, size) for run in runs}


def _planned(calls: "Iterable[Call]", device: str, sizes: _Sizes) -> "Iterator[Finding]":
    """What plans of calls refuse; each way to make and run a model is planned once."""
    from eval.doctor.files import refused
    from eval.tables.asked import PLACE

    seen: set[str] = set()
    for call in calls:
        if any(word.startswith(PLACE) for word in call.first.words):
            continue  # behind what must be trained first
        options = read_call(call, device)
        if options is None or call.first.program in ("judge", "calibrate", "train-prefix"):
            continue  # they plan otherwise
        try:
            key = _plan_words(options)
            plan = None
            if key not in seen or call.first.program in ("chat", "needle", "mtbench"):
                plan = _plan(options, call.first)
            if plan is not None and key not in seen:
                sizes.add(plan, "checkpoint" if call.first.program == "quantization" else "run")
            seen.add(key)
            if plan is not None:
                _check_prompts(call.first, options, plan)
        except (UserError, OSError) as error:
            yield refused(call.first.label, error)


def _plan_words(options: argparse.Namespace) -> str:
    """All options that make a plan, as a key."""
    from quantization.programs.options import add_plan_options

    parser = argparse.ArgumentParser(add_help=False)
    add_plan_options(parser, several=True)
    makes = "run" if hasattr(options, "command") else "checkpoint"
    return repr([makes, *((a.dest, getattr(options, a.dest, None)) for a in parser._actions)])


def _plan(options: argparse.Namespace, run: "Run") -> "Plan":
    """The plan of a call, for a GPU that need not be here. Raises UserError for what its program would refuse."""
    import torch

    from quantization.programs.options import chosen_device, plan_of

    device: torch.device = chosen_device(options.device, several=True, planned=True)
    makes = "checkpoint" if run.program == "quantization" else "run"
    return plan_of(options, several=makes == "run", device=device, makes=makes)


def _check_prompts(run: "Run", options: argparse.Namespace, plan: "Plan") -> None:
    """Raise UserError for a model without a chat template where it must talk, or without room for the needles."""
    from eval.mtbench.chat_templates import chat_template
    from eval.programs.needle import grid_of

    if run.program in ("chat", "mtbench"):
        chat_template(options.template, plan.tokenizer, plan.checkpoint.family_name)
    if run.program == "needle":
        grid_of(options, plan)
