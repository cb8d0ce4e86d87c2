"""python -m eval mtbench: a model's answers to MT-bench's questions, in the files that the judge reads."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora import values
from corpora.errors import UserError
from eval.programs.start import start
from quantization.programs.options import add_plan_options
from quantization.programs.out_option import check_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from eval.mtbench.answers import Answerer, Question
    from eval.processes import Processes
    from intactkv.attach import IntactModel
    from quantization.runs.plan import Plan

__all__ = ["add", "run"]

EXAMPLES = """\
examples:
  python -m eval mtbench --model modelzoo/vicuna-v1.5/vicuna-v1.5-7b --recipe awq --bits 3 --prefix prompt
  python -m eval mtbench --model modelzoo/smollm2/smollm2-135m --prefix prompt --max-new-tokens 64

The answers are written to outputs/mt_bench/model_answer/ as they are made; a killed run goes on where it was. Under
`accelerate launch` the questions are shared among the processes. python -m eval judge grades the answers.
"""


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    mtbench = commands.add_parser(
        "mtbench",
        help="answers to MT-bench's questions of two turns",
        description="Answers to questions of two turns, in FastChat's files. Each answer depends on --answer-seed, the "
        "question and the turn alone, not on the batch or the order.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_plan_options(mtbench, several=True)
    group = mtbench.add_argument_group("questions and protocol")
    group.add_argument(
        "--questions",
        type=values.name,
        default=None,
        metavar="sample|mt_bench|FILE",
        help="sample: 16 questions written for this project, no benchmark; mt_bench: the published 80 (scripts/prepare/"
        "mtbench.sh fetches them); or a question.jsonl (default: mt_bench, but sample for the embedded model)",
    )
    group.add_argument("--limit", type=values.count(), metavar="N", help="only the first N questions")
    group.add_argument(
        "--template",
        default="auto",
        choices=["auto", "vicuna_v1.1", "tokenizer"],
        help="of the dialogue (default: vicuna_v1.1 for Vicuna, the tokenizer's own for all others)",
    )
    group.add_argument(
        "--prepend",
        action="store_true",
        help="put the prefix in front of prompts that do not start with it; without this they are refused",
    )
    group.add_argument(
        "--max-new-tokens", type=values.count(), default=1024, metavar="T", help="of one turn (default: 1024)"
    )
    group.add_argument("--answer-seed", type=values.seed, default=42, metavar="S", help="of the answers (default: 42)")
    group.add_argument(
        "--batch-size", type=values.count(), default=4, metavar="ROWS", help="dialogues at once (default: 4)"
    )
    group.add_argument(
        "--out", type=values.path, metavar="FILE.jsonl", help="the answers' file (default: named by the run)"
    )
    mtbench.add_argument("--json", action="store_true", help="print the run record instead of the table")
    mtbench.add_argument("--force", action="store_true", help="answer again, even what is answered")


def run(options: argparse.Namespace) -> None:
    """Answer every question that has no answer yet, and print what was done."""
    from contextlib import nullcontext
    from functools import partial

    import torch

    from corpora.catalog import model_defaults
    from corpora.files import sha256_of_data
    from eval.generation import own_generation
    from eval.mtbench.answers import (
        QUESTION_SETS,
        TEMPERATURES,
        Answerer,
        behind_prefix,
        question_file,
        read_questions,
    )
    from eval.mtbench.chat_templates import chat_template
    from eval.mtbench.json_lines import only_writer
    from eval.runs import record_of

    if options.out is not None:
        check_out(options, ".jsonl", _side_file(options.out))
        _refuse_other_files(options.out)
    plan, processes = start(options)
    if options.prepend and not plan.has_prefix:
        raise UserError("--prepend puts a prefix in front, but none was named; add --prefix, or leave it out")
    sampled = model_defaults(plan.checkpoint.family_name).default_task_data == "sample"
    word = options.questions or ("sample" if sampled else "mt_bench")
    file = question_file(word)
    questions = read_questions(file)[: options.limit]
    plain = chat_template(options.template, plan.tokenizer, plan.checkpoint.family_name)
    template = behind_prefix(plain, questions, plan.choice.ids, options.prepend)
    generation = own_generation(plan.checkpoint.directory, plan.tokenizer)
    settings = _settings(plan, prepended=bool(template.lead)) | {
        "questions": word if word in QUESTION_SETS else file.name,
        "questions_sha256": sha256_of_data(file),
        **template.describe(),
        "generation": generation.describe(),
        "temperatures": TEMPERATURES,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.answer_seed,
    }
    path = options.out or _answers_directory() / f"{_model_id(plan, settings)}.jsonl"
    if options.out is None:
        _refuse_other_files(path)
    if not options.force:
        _refuse_other_settings(path, settings)

    def figures() -> dict[str, Any]:
        answerer = partial(
            Answerer,
            template=template,
            generation=generation,
            seed=options.answer_seed,
            max_new_tokens=options.max_new_tokens,
            context=plan.context,
        )
        return _answer(plan, answerer, questions, settings, path, options.batch_size, options.force, processes)

    with only_writer(path) if processes.is_first else nullcontext():
        # What the one that writes finds goes for all.
        held = processes.summed(torch.tensor(int(processes.is_first and _holds(path, questions))))
        record = record_of(
            "mtbench",
            path.stem,
            settings | {"limit": options.limit, "batch_size": options.batch_size},
            figures,
            force=options.force or not held,
            write=processes.is_first,
        )
    if not processes.is_first:
        return
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        _print_table(record)


def _settings(plan: "Plan", *, prepended: bool) -> dict[str, Any]:
    """All that decides an answer besides the protocol. Without an intact prefix its word decides nothing, unless it was
    put in front: every other prompt starts with these tokens anyway."""
    description = plan.describe()
    if not description["prefix"]["intact"] and not prepended:
        description["prefix"] = {"label": "none", "ids": [], "file": None, "intact": False}
        description["recipe"] = {**description["recipe"], "prefix": "none"}
    more: dict[str, Any] = {"prepended": True} if prepended else {}
    if plan.search is not None:  # the description names the search, not what it found
        more["auto_ids"] = list(plan.choice.ids)
    return description | {"context": plan.context} | more


def _answers_directory() -> Path:
    from corpora.paths import outputs_dir

    return outputs_dir() / "mt_bench" / "model_answer"


def _model_id(plan: "Plan", settings: dict[str, Any]) -> str:
    """model-method-w{b}g{g}[-kvN][-intactkv…][-questions]-seed_{s}: [P] is plain intactkv, as published; what is other
    than in the named recipe stands behind the method."""
    from corpora.files import name_part
    from quantization.kv_cache import kv_bits
    from quantization.labels import told

    parts = [settings["model"], told(settings["weights"], settings["recipe"])]
    if settings["kv"] is not None:
        parts.append(f"kv{kv_bits(settings['kv'])}")
    prefix = settings["prefix"]
    if prefix["label"] != "none":  # intact, or put in front
        parts += ["intactkv" if prefix["intact"] else "vanilla", *_kind(prefix["label"])]
    if settings["questions"] != "mt_bench":
        parts.append(Path(settings["questions"]).stem)
    return name_part("-".join([*parts, f"seed_{settings['seed']}"]))


def _kind(label: str) -> list[str]:
    return [] if label == "[P]" else [label.strip("[]")]


def _side_file(path: Path) -> Path:
    return path.with_suffix(".run.json")


def _holds(path: Path, questions: "list[Question]") -> bool:
    """Whether a file holds the answers to all these questions."""
    from eval.mtbench.answers import ANSWERS
    from eval.mtbench.json_lines import LineFile

    return path.is_file() and {question.id for question in questions} <= LineFile(path, ANSWERS).rows.keys()


def _refuse_other_files(path: Path) -> None:
    """Raise UserError if something else than answers and their settings is where these are written, also with --force:
    what is replaced is what this program made."""
    from corpora.writing import refuse_special
    from eval.mtbench.answers import ANSWERS
    from eval.mtbench.json_lines import refuse_other_lines

    refuse_other_lines(path, ANSWERS)
    refuse_special(_side_file(path))
    _settings_of(path)


def _settings_of(path: Path) -> dict[str, Any]:
    """What a file of answers was made with; nothing if it does not say. Raises UserError for a file of another kind."""
    from corpora.json_files import read_json
    from eval.mtbench.forms import AnswerSettings

    side = _side_file(path)
    mend = "name another file with --out FILE.jsonl, or move this one away"
    found: dict[str, Any] = (
        read_json(side, "the settings of answers", AnswerSettings, mend=mend) if side.exists() else {}
    )
    return found


def _refuse_other_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raise UserError if a file holds answers of another run: they are never mixed."""
    from eval.mtbench.json_lines import parts_of

    if not path.is_file() and not parts_of(path):
        return
    theirs = _settings_of(path)
    ours = json.loads(json.dumps(settings))
    if other := [name for name in (*ours, *theirs) if theirs.get(name) != ours.get(name)]:
        raise UserError(
            f"{path} holds answers that were made with another {', '.join(dict.fromkeys(other[:3]))}; keep both with "
            "--out FILE.jsonl, or answer again with --force"
        )


def _answer(
    plan: "Plan",
    answerer: "Callable[[IntactModel], Answerer]",
    questions: "list[Question]",
    settings: dict[str, Any],
    path: Path,
    batch_size: int,
    force: bool,
    processes: "Processes",
) -> dict[str, Any]:
    """Answer what is not answered yet, line by line, and return the figures of the record."""
    import time

    import torch
    from tqdm import tqdm

    from corpora.files import sha256_of_file
    from corpora.json_files import write_json
    from corpora.machine import peak_memory_mb
    from eval.mtbench.answers import ANSWERS
    from eval.mtbench.json_lines import LineFile, part_of, parts_of

    if processes.is_first:
        if force:
            for old in (path, *parts_of(path)):
                old.unlink(missing_ok=True)
        write_json(_side_file(path), settings)  # before the first answer: a file without it is nobody's
        LineFile(path, ANSWERS).join()
    processes.wait()
    answers = LineFile(path, ANSWERS)
    left = [question for question in questions if question.id not in answers.rows]
    mine = [left[first : first + batch_size] for first in processes.mine(range(0, len(left), batch_size))]
    tokens, started = 0, time.perf_counter()
    if mine:
        loaded = answerer(plan.load())
        file = answers if processes.count == 1 else LineFile(part_of(path, processes.index), ANSWERS)
        done = len(questions) - sum(map(len, mine))  # before this run, or by other processes
        started = time.perf_counter()
        with tqdm(total=len(questions), initial=done, desc="answers", unit="question",
                  disable=not processes.is_first) as bar:  # fmt: skip
            for batch in mine:
                for line in loaded.lines(batch, path.stem):
                    file.append(line)
                    tokens += sum(line["tokens"])
                    bar.update()
    tokens = int(processes.summed(torch.tensor(tokens)))
    seconds = time.perf_counter() - started if left else 0.0
    if processes.is_first:
        answers.join()
        answers.finish(lambda line: line["question_id"])
    processes.wait()
    answers = LineFile(path, ANSWERS)
    lines = [answers.rows[question.id] for question in questions]
    stops = [stop for line in lines for stop in line["stopped"]]
    return {
        "arm": _arm(plan),
        "answers": str(path),
        "answers_sha256": sha256_of_file(path),
        "samples": len(lines),
        "answered_now": len(left),
        "turn_tokens": [sum(counts) / len(lines) for counts in zip(*(line["tokens"] for line in lines), strict=True)],
        "stopped": {name: stops.count(name) for name in ("end", "length", "context")},
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "peak_memory_mb": round(peak_memory_mb(plan.device.type), 1),
        **plan.outcome(),
    }


def _arm(plan: "Plan") -> str:
    """What stands in front: "" nothing that is intact, "[P]" (in front of every prompt anyway), "[P] + Cal" where it
    was trained, and other prefixes by their label."""
    from contextlib import suppress

    from intactkv.prefix import Prefix
    from quantization.runs.prefixes import choose_prefix

    choice = plan.choice
    if not choice.ids or plan.vanilla:
        return ""
    label = choice.label
    with suppress(UserError):  # of a model without a prompt that every conversation starts with
        prompt = choose_prefix("prompt", plan.tokenizer, plan.checkpoint.family_name)
        label = prompt.label if prompt.ids == choice.ids else label
    trained = choice.file is not None and Prefix.load(choice.file).calibrated is not None
    return f"{label} + Cal" if trained else label


def _print_table(record: dict[str, Any]) -> None:
    """One row: how many answers, how long they are and what ended them."""
    from eval.tables.render import Figure, Table, render

    settings, stopped = record["settings"], record["stopped"]
    first, second = record["turn_tokens"]
    counts = [Figure(stopped[name], "{:.0f}".format) for name in ("end", "length", "context")]
    notes = [f"answers: {record['answers']}"]
    if settings["questions"] == "sample":
        notes.append("sample: questions written for this project; their scores are not MT-bench's")
    if stopped["context"]:
        notes.append(f"context: the answer stopped at the {settings['context']} positions that the model has")
    table = Table(
        f"Answers to {settings['questions']}, {record['samples']} questions of two turns, seed {settings['seed']}",
        ("model", "tokens of turn 1", "turn 2", "turns that ended", f"cut at {settings['max_new_tokens']}", "context"),
        ((Path(record["answers"]).stem, Figure(first), Figure(second), *counts),),
        notes=tuple(notes),
    )
    print(render([table], "markdown"), end="")
