"""python -m eval mtbench: a model's answers to MT-bench's questions, in the files that the judge reads."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora.errors import UserError
from quantization.options import add_calibration_options, add_model_options, add_recipe_options, add_run_options

if TYPE_CHECKING:
    from eval.chat_templates import ChatTemplate
    from eval.mtbench import Question
    from quantization.loading import Plan

__all__ = ["add", "run"]

EXAMPLES = """\
examples:
  python -m eval mtbench --model modelzoo/vicuna-v1.5/vicuna-v1.5-7b --recipe awq --bits 3 --prefix prompt
  python -m eval mtbench --model modelzoo/smollm2/smollm2-135m --prefix prompt --max-new-tokens 64

The answers are written to outputs/mt_bench/model_answer/ one by one; a killed run goes on where it was. python -m eval
judge grades them.
"""


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    mtbench = commands.add_parser(
        "mtbench",
        help="answers to MT-bench's questions of two turns",
        description="Answers to questions of two turns, in FastChat's files. Each answer depends on the seed, the "
        "question and the turn alone, not on the batch or the order.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",  # --seed is the answers' here; --set calibration.seed=S reaches the other one
    )
    add_model_options(mtbench, several=True)
    add_recipe_options(mtbench)
    add_calibration_options(mtbench)
    add_run_options(mtbench)
    group = mtbench.add_argument_group("questions and protocol")
    group.add_argument(
        "--questions",
        default=None,
        metavar="sample|mt_bench|FILE",
        help="sample: 16 questions written for this project, no benchmark; mt_bench: the published 80 (scripts/prepare/"
        "mtbench.sh fetches them); or a question.jsonl (default: mt_bench, but sample for the embedded model)",
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    group.add_argument(
        "--template",
        default="auto",
        choices=["auto", "vicuna_v1.1", "tokenizer"],
        help="of the dialogue (default: vicuna_v1.1 for Vicuna, the tokenizer's own for all others)",
    )
    group.add_argument("--max-new-tokens", type=int, default=1024, metavar="T", help="of one turn (default: 1024)")
    group.add_argument(
        "--seed", type=int, default=42, metavar="S", dest="answer_seed", help="of the answers (default: 42)"
    )
    group.add_argument("--batch-size", type=int, default=4, metavar="ROWS", help="dialogues at once (default: 4)")
    group.add_argument("--out", type=Path, metavar="FILE.jsonl", help="the answers' file (default: named by the run)")
    mtbench.add_argument("--json", action="store_true", help="print the run record instead of the table")
    mtbench.add_argument("--force", action="store_true", help="answer again, even what is answered")


def run(options: argparse.Namespace) -> None:
    """Answer every question that has no answer yet, and print what was done."""
    from corpora.catalog import model_defaults
    from corpora.storage import sha256_of_file
    from eval.chat_templates import chat_template
    from eval.json_lines import only_writer
    from eval.mtbench import QUESTION_SETS, TEMPERATURES, check_prompts, question_file, read_questions
    from eval.runs import record_of
    from quantization.loading import find_checkpoint, plan_run
    from quantization.options import ALL_GPUS, chosen_device, chosen_dtype, chosen_recipe, show_log

    show_log()
    for option, value in (("--limit", options.limit), ("--max-new-tokens", options.max_new_tokens),
                          ("--batch-size", options.batch_size)):  # fmt: skip
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: give 1 or more")
    if options.out is not None and options.out.suffix != ".jsonl":
        raise UserError(f"--out {options.out}: give a file that ends in .jsonl")
    device = chosen_device(options.device, several=True)
    checkpoint = find_checkpoint(options.model)
    sampled = model_defaults(checkpoint.family_name).default_task_data == "sample"
    word = options.questions or ("sample" if sampled else "mt_bench")
    file = question_file(word)
    questions = read_questions(file)[: options.limit]
    plan = plan_run(
        options.model,
        chosen_recipe(options, checkpoint),
        device=device,
        vanilla=options.vanilla,
        dtype=chosen_dtype(options.dtype),
        packed=options.packed,
        spread=options.device == ALL_GPUS,
    )
    template = chat_template(options.template, plan.tokenizer, plan.checkpoint.family_name)
    check_prompts(template, questions, plan.choice.ids)
    settings = _settings(plan) | {
        "questions": word if word in QUESTION_SETS else file.name,
        "questions_sha256": sha256_of_file(file),
        "template": template.name,
        "temperatures": TEMPERATURES,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.answer_seed,
    }
    path = options.out or _answers_directory() / f"{_model_id(plan, settings)}.jsonl"

    def figures() -> dict[str, Any]:
        return _answer(plan, template, questions, settings, path, options.batch_size, options.force)

    wanted = {question.id for question in questions}
    with only_writer(path):
        record = record_of(
            "mtbench",
            path.stem,
            settings | {"limit": options.limit, "batch_size": options.batch_size},
            figures,
            force=options.force or not _holds(path, settings, wanted),
        )
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        _print_table(record)


def _settings(plan: "Plan") -> dict[str, Any]:
    """All that decides an answer besides the protocol. Without an intact prefix its word decides nothing: every prompt
    starts with these tokens anyway."""
    description = plan.describe()
    if not description["prefix"]["intact"]:
        description["prefix"] = {"label": "none", "ids": [], "file": None, "intact": False}
        description["recipe"] = {**description["recipe"], "prefix": "none"}
    file = plan.checkpoint.directory / "generation_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config.pop("transformers_version", None)
    return description | {"generation_config": config, "context": plan.context}


def _answers_directory() -> Path:
    from corpora.paths import outputs_dir

    return outputs_dir() / "mt_bench" / "model_answer"


def _model_id(plan: "Plan", settings: dict[str, Any]) -> str:
    """model-method-w{b}g{g}[-kvN][-intactkv…][-questions]-seed_{s}: [P] is plain intactkv, as published."""
    parts = [settings["model"], settings["weights"]]
    if (policy := plan.recipe.kv_cache) is not None:
        parts.append(f"kv{getattr(policy, 'bits', type(policy).__name__.lower())}")
    if settings["prefix"]["intact"]:
        kind = settings["prefix"]["label"].strip("[]")
        parts.append("intactkv" if kind == "P" else f"intactkv-{kind}")
    if settings["questions"] != "mt_bench":
        parts.append(Path(settings["questions"]).stem)
    return "-".join([*parts, f"seed_{settings['seed']}"]).replace("/", "-")


def _side_file(path: Path) -> Path:
    return path.with_suffix(".run.json")


def _holds(path: Path, settings: dict[str, Any], wanted: set[int]) -> bool:
    """Whether a file holds the answers to all these questions, made with these settings."""
    from eval.json_lines import LineFile
    from eval.mtbench import answer_key

    _refuse_other_settings(path, settings)
    return path.is_file() and wanted <= LineFile(path, answer_key).rows.keys()


def _refuse_other_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raise UserError if a file holds answers of another run: they are never mixed."""
    from corpora.storage import read_json

    if not path.is_file():
        return
    side = _side_file(path)
    theirs = read_json(side, "the settings of these answers,") if side.is_file() else {}
    ours = json.loads(json.dumps(settings))
    if other := [name for name in ours if not isinstance(theirs, dict) or theirs.get(name) != ours[name]]:
        raise UserError(
            f"{path} holds answers that were made with another {', '.join(other[:3])}; keep both with --out "
            "FILE.jsonl, or answer again with --force"
        )


def _answer(
    plan: "Plan",
    template: "ChatTemplate",
    questions: "list[Question]",
    settings: dict[str, Any],
    path: Path,
    batch_size: int,
    force: bool,
) -> dict[str, Any]:
    """Answer what is not answered yet, line by line, and return the figures of the record."""
    import time

    from tqdm import tqdm

    from corpora.machine import peak_memory_mb
    from corpora.storage import sha256_of_file, write_json
    from eval.json_lines import LineFile
    from eval.mtbench import Answerer, answer_key

    if force:
        path.unlink(missing_ok=True)
    write_json(_side_file(path), settings)  # before the first answer: a file without it is nobody's
    answers = LineFile(path, answer_key)
    left = [question for question in questions if question.id not in answers.rows]
    tokens, seconds = 0, 0.0
    if left:
        answerer = Answerer(
            plan.load(),
            template,
            seed=settings["seed"],
            max_new_tokens=settings["max_new_tokens"],
            context=plan.context,
        )
        started = time.perf_counter()
        with tqdm(total=len(questions), initial=len(questions) - len(left), desc="answers", unit="question") as bar:
            for first in range(0, len(left), batch_size):
                for line in answerer.lines(left[first : first + batch_size], path.stem):
                    answers.append(line)
                    tokens += sum(line["tokens"])
                    bar.update()
        seconds = time.perf_counter() - started
    answers.finish(lambda line: line["question_id"])
    lines = [answers.rows[question.id] for question in questions]
    stops = [stop for line in lines for stop in line["stopped"]]
    return {
        "answers": str(path),
        "answers_sha256": sha256_of_file(path),
        "samples": len(lines),
        "answered_now": len(left),
        "turn_tokens": [sum(counts) / len(lines) for counts in zip(*(line["tokens"] for line in lines), strict=True)],
        "stopped": {name: stops.count(name) for name in ("end", "length", "context")},
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "peak_memory_mb": round(peak_memory_mb(plan.device.type), 1),
        "quantization": plan.cost(),
    }


def _print_table(record: dict[str, Any]) -> None:
    """One row: how many answers, how long they are and what ended them."""
    from eval.render import Figure, Table, render

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
