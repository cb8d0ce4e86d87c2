"""Nonsense for every option of every program, and for a variable of the environment that some read: the wrong type,
beyond the range, paths of something else.

The options are those that the programs' own parsers declare, so a new one is tried the day it is added.
"""

import argparse
import os
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from common import tree

from corpora.errors import Parser
from eval.tasks.lm_tasks import lm_eval_index
from fuzz.engine import Call, Scratch, call, judge
from fuzz.worlds import CHAT, MODEL, NEEDLE, RTN, copied, mtbench, quantized, ran, records, talked

__all__ = ["NONSENSE", "PROGRAMS", "option_cases", "run_option", "run_options"]

NONSENSE = (
    "abc", "", "nan", "inf", "-inf", "-1", "0", "1.5", "-0", "1e400", str(10**22), "9" * 5000, "nowhere/at/all",
    ".", "binary.bin", "/dev/null", "a\x1b[31m\x07b", "a\nerror: b", "\udcff", "\ud83d", "../../x", "a" * 300, "☃",
    "text.txt", "1,2", "true", "None",
)  # fmt: skip
TEXT = ("--corpus", "text.txt")
PIECES = ("--samples", "1", "--tokens", "24")
FIGURE = ("--format", "svg", "--dpi", "40", "--out", "f.svg")
PPL = ("eval", "ppl", "--model", MODEL, *RTN, *TEXT, "--window", "32", "--limit", "1")
PROGRAMS: dict[str, tuple[str, ...]] = {
    "ppl": PPL,
    "tasks": ("eval", "tasks", "--model", MODEL, "--data", "local", "--tasks", "piqa", "--limit", "1"),
    "mtbench": ("eval", "mtbench", "--model", MODEL, "--questions", "questions.jsonl", "--max-new-tokens", "2",
                "--limit", "1", "--out", "a.jsonl"),
    "judge": ("eval", "judge", "--questions", "questions.jsonl", "--prompts", "prompts.jsonl", "--references",
              "references.jsonl", "--judge-model", f"local:{MODEL}", "--max-tokens", "2", "--answers", "given.jsonl"),
    "needle": NEEDLE,
    "chat": (*CHAT[:-1], "u.json"),
    "table-needle": ("eval", "table", "needle"),
    "plot-needle": ("eval", "plot", "needle", "--model", "tiny-llama", *FIGURE),
    "table": ("eval", "table"),
    "report": ("eval", "report", "intactkv-1", "--out", "r.html"),
    "table-tasks": ("eval", "table", "tasks"),
    **{f"stats-{kind}": ("eval", "stats", kind, "--model", MODEL, *RTN, *TEXT, "--window", "32", "--limit", "1",
                         "--out", "s.csv") for kind in ("linears", "distance", "kv", "pivots")},
    "plot-perplexity": ("eval", "plot", "perplexity", "--model", "tiny-llama", *FIGURE),
    "plot-calibration": ("eval", "plot", "calibration", "--curves", "curve.jsonl", *FIGURE),
    **{f"plot-{kind}": ("eval", "plot", kind, "--model", MODEL, *TEXT, "--tokens", "24", *FIGURE)
       for kind in ("act", "attn", "pivots")},
    **{f"plot-{kind}": ("eval", "plot", kind, "--model", MODEL, *TEXT, *PIECES, *FIGURE)
       for kind in ("linear-input", "linear-output", "outlier-count")},
    "quantization": ("quantization", "--model", MODEL, "--recipe", "gptq", "--group-size", "32", "--calibration",
                     "text.txt", "--calibration-samples", "1", "--calibration-length", "16", "--out", "z"),
    "kv": ("quantization", "kv", "--model", MODEL, "--kv", "static", "--kv-bits", "4", "--calibration", "text.txt",
           "--calibration-samples", "1", "--calibration-length", "16", "--out", "k.safetensors"),
    "export": ("quantization", "export", "--model", "q", "--out", "x"),
    "reproduce": ("eval", "reproduce", "intactkv-1", "--model", MODEL, *TEXT, "--dry-run"),
    "build": ("intactkv", "build", "--model", MODEL, "--prefix", "hello", "--out", "p.safetensors"),
    "peft": ("intactkv", "export", "--model", MODEL, "--prefix", "hello", "--out", "a"),
    "discover": ("intactkv", "discover", "--model", MODEL, *TEXT, "--samples", "1", "--length", "16"),
    "train-prefix": ("intactkv", "train-prefix", "--model", MODEL, *TEXT, "--prefix", "bos", "--samples", "2",
                     "--held-out", "1", "--length", "16", "--prefix-len", "2", "--prefix-epochs", "1",
                     "--batch-size", "1", "--out", "t.safetensors"),
    "retry": ("eval", "cluster", "retry", "n"),
    "doctor": ("corpora", "doctor", "gptq-llama", "--model", MODEL, "--device", "cpu", "--only", "RTN"),
    "calibrate": ("intactkv", "calibrate", "--model", MODEL, *RTN, "--prefix", "A chat", "--conversations", "sharegpt",
                  "--samples", "1", "--held-out", "1", "--max-length", "200", "--min-assistant", "5", "--steps", "1",
                  "--batch-size", "1", "--evaluate-every", "1", "--out", "c.safetensors"),
}  # fmt: skip
VARIABLES = {"INTACTKV_CALIBRATION_BATCH": ("quantization", "kv")}  # of the environment, and who reads them
# What is no nonsense after all, by the option: literal texts, numbers that are in range, names to filter by.
NUMBERS = {"0", "-0", "-1", "1.5", "1e400", "nan", "inf", "-inf"}
FINE: dict[str, set[str]] = {
    "--prefix": {"abc", "nan", "inf", "-inf", "-1", "0", "1.5", "-0", "1e400", "1,2", "true", "None", "☃", "a" * 300,
                 str(10**22), "a\nerror: b", "a\x1b[31m\x07b", "9" * 5000},
    "--seed": {"0", "-0"}, "--seeds": {"0", "-0"},
    "--training-seed": {"0", "-0"}, "--text-seed": {"0", "-0"}, "--answer-seed": {"0", "-0"},
    "--retries": {"0", "-0"}, "--fewshot": {"0", "-0"}, "--min-assistant": {"0", "-0"},
    "--group-size": {"-1"}, "--kv-group-size": {"-1"}, "--ablate": {"0", "-0"},
    "--price-in": {"0", "-0", "1.5"}, "--price-out": {"0", "-0", "1.5"}, "--timeout": {"1.5"},
    "--learning-rate": {"1.5"}, "--prefix-lr": {"1.5"}, "--prefix-kd-weight": {"0", "-0", "1.5"},
    "--threshold": {"1.5"}, "--outlier-threshold": {"1.5"},
    "--corpus": {"text.txt"}, "--calibration": {"text.txt"}, "--layers": {"0", "-0"},
    "--temperature": {"0", "-0", "1.5"}, "--depths": {"0", "-0", "1,2"}, "--max-memory": set(),
    "--key-variable": {"abc", "None", "true"}, "INTACTKV_CALIBRATION_BATCH": {""},
}  # fmt: skip


def world_of_options(world: Path, scratch: Scratch) -> None:
    """All that the programs' calls read."""
    copied(world, scratch, mtbench)
    for build in (quantized, records, talked):
        copied(world, scratch, build)
    (world / "binary.bin").write_bytes(bytes(range(256)) * 4)
    turns = [{"from": role, "value": text} for role, text in (("human", "hi"), ("gpt", "abc " * 20))]
    folder = world / "datasets" / "ShareGPT_Vicuna_unfiltered"
    folder.mkdir(parents=True)
    import json

    rows = [{"id": str(i), "conversations": turns} for i in range(4)]
    (folder / "ShareGPT_V4.3_unfiltered_cleaned_split.json").write_text(json.dumps(rows))
    (folder.parent / "sample").mkdir()
    (world / "curve.jsonl").write_text('{"step": 0, "held_out": 1.0}\n{"step": 1, "loss": 0.5, "held_out": 0.5}\n')
    ran(world, *PROGRAMS["build"][:-1], "kept.safetensors")


class _Found(Exception):
    """The parser that a program would have used."""


def options_of(words: tuple[str, ...]) -> list[argparse.Action]:
    """The options that the parser of a call declares, those of its subcommands among them."""

    def caught(self: Parser, *_: Any, **__: Any) -> None:
        raise _Found(self)

    with mock.patch.object(Parser, "parse_args", caught), mock.patch.object(sys, "argv", ["program", *words[1:]]):
        try:
            import_module(f"{words[0]}.__main__").main()
        except _Found as found:
            parser: argparse.ArgumentParser = found.args[0]
    while commands := [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]:
        inner = [commands[0].choices[word] for word in words if word in commands[0].choices]
        parser = inner[0]
    return [action for action in parser._actions if action.option_strings and action.nargs != 0]


def option_cases(name: str) -> Iterator[str]:
    """PROGRAM:OPTION:INDEX of every nonsense for every option of a program, and for the variables that it reads."""
    options = [action.option_strings[-1] for action in options_of(PROGRAMS[name])]
    for option in options + [variable for variable, readers in VARIABLES.items() if name in readers]:
        for index in range(len(NONSENSE)):
            yield f"option:{name}:{option}:{index}"


def run_option(scratch: Scratch, name: str) -> Call:
    """One case by its name."""
    _, program, option, index = name.split(":")
    template = scratch.template("options", world_of_options)
    value, words = NONSENSE[int(index)], PROGRAMS[program]
    with scratch.copy(template) as world:
        before = tree(world.parents[2])
        if option in VARIABLES:
            value = value.encode("utf-8", "ignore").decode()  # a variable holds nothing else
            with mock.patch.dict(os.environ, {option: value}):
                outcome = call(world, words)
        else:
            outcome = call(world, (*words, f"{option}={value}"))
        after = tree(world.parents[2])
        told_so = program == "doctor" and outcome.code == 1  # it says what lacks, nonsense among it
        outcome = replace(outcome, code=0) if told_so else outcome

        def same() -> bool:
            fine = value in FINE.get(option, ()) or option in ("--out", "--plot") or _filters(program, option)
            return fine or told_so

        fault, told = judge(outcome, before, after, same, re.compile(r"^outputs|^modelzoo/prefixes"))
        if fault == "silent":
            told = f"exit 0: {outcome.out[-150:]!a}"
        return Call(name, f"{program} {option}={value[:30]!a}", fault, told, outcome)


def _filters(program: str, option: str) -> bool:
    """Any name is a filter; what no record has is told or gives an empty table."""
    if program == "reproduce":  # a plan names what is lacking, and nothing is run
        return option in ("--model", "--corpus", "--only", "--calibration", "--tasks", "--training", "--judge-model")
    return program.startswith(("table", "plot-perplexity", "plot-needle", "report")) and option not in (
        "--window", "--fewshot", "--limit", "--lengths", "--seeds", "--batch-size", "--calibration-samples",
        "--calibration-length",
    )  # fmt: skip


def run_options(scratch: Scratch, seed: int, calls: int, programs: list[str] | None = None) -> Iterator[Call]:
    """So many cases, each option as often as any other, over all programs."""
    lm_eval_index()  # thousands of files, read once in a process; slow, but no hang
    rng = random.Random(f"{seed}:options")
    cases = [case for name in programs or PROGRAMS for case in option_cases(name)]
    for case in rng.sample(cases, min(calls, len(cases))):
        yield run_option(scratch, case)
