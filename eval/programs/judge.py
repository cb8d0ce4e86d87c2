"""python -m eval judge: an LLM grades answers to MT-bench's questions, or compares them with a baseline's."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora import values
from corpora.errors import UserError
from corpora.files import data_files, name_part, sha256_of_data
from corpora.targets import check_written, inputs_of
from eval.mtbench.endpoint import OPENAI

if TYPE_CHECKING:
    from eval.mtbench.judge import Job, Materials
    from eval.mtbench.judge_client import Judge

__all__ = ["add", "run"]

LOCAL = "local:"
KEY = "OPENAI_API_KEY"
EXAMPLES = """\
examples:
  python -m eval judge --answers outputs/mt_bench/model_answer/*.jsonl --judge-model gpt-4-0125-preview
  python -m eval judge --answers A.jsonl --baseline B.jsonl --judge-model my-model --base-url http://localhost:8000/v1
  python -m eval judge --answers A.jsonl --judge-model local:modelzoo/smollm2/smollm2-135m --max-tokens 64

Scores of different judges cannot be compared. A small local model shows the flow, its grades say nothing about quality:
where it names none, the grade that it finds most likely is taken.
The answers are sent to the judge's address. The key is read from $OPENAI_API_KEY, or the variable of --key-variable.
"""


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    judge = commands.add_parser(
        "judge",
        help="an LLM grades MT-bench's answers",
        description="Single-answer grading, or pairwise comparison with --baseline, through any OpenAI-compatible "
        "endpoint or a local model. Judgements are kept one by one and never made twice; failed ones are made again.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    judge.add_argument(
        "--answers", type=values.path, nargs="+", required=True, metavar="FILE", help="of python -m eval mtbench"
    )
    judge.add_argument(
        "--baseline", type=values.path, metavar="FILE", help="compare with these answers, in both orders"
    )
    judge.add_argument(
        "--questions",
        type=values.name,
        default=None,
        metavar="sample|mt_bench|FILE",
        help="what was asked (default: sample or mt_bench, by the ids); prompts and references lie beside it",
    )
    judge.add_argument(
        "--prompts", type=values.path, metavar="FILE", help="judge prompts (default: judge_prompts.jsonl there)"
    )
    judge.add_argument(
        "--references",
        type=values.path,
        metavar="FILE",
        help="reference answers (default: reference_answer/JUDGE.jsonl there, or the only file)",
    )
    group = judge.add_argument_group("judge")
    group.add_argument(
        "--judge-model",
        type=values.name,
        required=True,
        metavar="NAME|local:DIR",
        help="at the endpoint, or a checkpoint",
    )
    group.add_argument(
        "--base-url",
        type=values.unshown,
        metavar="URL",
        help=f"OpenAI-compatible endpoint (default: {OPENAI})",
    )
    group.add_argument(
        "--key-variable", type=values.unshown, metavar="NAME", help=f"that holds the key (default: {KEY})"
    )
    group.add_argument(
        "--concurrency", type=values.count(1, 1000), default=4, metavar="N", help="calls at once (default: 4)"
    )
    group.add_argument(
        "--timeout",
        type=values.number(above=0, most=86400, like="120"),
        default=120,
        metavar="SECONDS",
        help="of a call (default: 120)",
    )
    group.add_argument(
        "--retries", type=values.count(0, 1000), default=5, metavar="N", help="after a failed call (default: 5)"
    )
    group.add_argument(
        "--max-tokens", type=values.count(), default=2048, metavar="T", help="of a judgement (default: 2048)"
    )
    group.add_argument(
        "--device", type=values.device, default="auto", metavar="auto|cpu|cuda[:N]", help="of a local judge"
    )
    group.add_argument(
        "--price-in", type=values.number(least=0), metavar="USD", help="per million prompt tokens: the cost is shown"
    )
    group.add_argument(
        "--price-out", type=values.number(least=0), metavar="USD", help="per million tokens of the judgements"
    )
    judge.add_argument("--plot", type=values.path, metavar="FILE.png", help="scores per category as a radar chart")
    judge.add_argument("--json", action="store_true", help="print the run record instead of the table")


def run(options: argparse.Namespace) -> None:
    """Make the judgements that are missing, print the scores, and write the record if all were made."""
    from corpora.paths import outputs_dir
    from eval.mtbench.answers import QUESTION_SETS, question_file, read_questions
    from eval.mtbench.json_lines import LineFile, only_writer, refuse_other_lines
    from eval.mtbench.judge import COMPARISONS, GRADES, kept_line, read_answers, read_materials
    from eval.mtbench.judge_tables import judge_table, pair_report, single_report
    from eval.runs import record_of
    from eval.tables.render import render
    from quantization.programs.options import show_log

    show_log()
    _check(options)
    answers = {path.stem: read_answers(path) for path in options.answers}
    baseline = None if options.baseline is None else read_answers(options.baseline)
    word = options.questions or _question_set([*answers.values(), baseline or {}])
    questions_file = question_file(word)
    name = _judge_name(options.judge_model)
    prompts = options.prompts or questions_file.parent / "judge_prompts.jsonl"
    references = options.references or _references(questions_file.parent / "reference_answer", name)
    materials = read_materials(read_questions(questions_file), prompts, references)
    jobs = _jobs(options, materials, name, answers, baseline)
    if options.plot is not None:
        from eval.plots.radar import check_categories

        check_categories({materials.questions[number].category for given in answers.values() for number in given})

    kind, kind_of_lines = ("single", GRADES) if baseline is None else ("pair", COMPARISONS)
    path = outputs_dir() / "mt_bench" / "model_judgment" / f"{name_part(name)}_{kind}.jsonl"
    refuse_other_lines(path, kind_of_lines)  # before a local judge is loaded
    judge, protocol = _judge(options, kind)
    with only_writer(path):
        file = LineFile(path, kind_of_lines)
        concurrency = 1 if options.judge_model.startswith(LOCAL) else options.concurrency
        stopped = _with_bar(jobs, judge, file, protocol, concurrency)
        file.finish(
            lambda line: (line["question_id"], line.get("model", line.get("model_1")), line["turn"],
                          line.get("endpoint", ""))
        )  # fmt: skip
    lines = [line for job in jobs if (line := kept_line(job, file, protocol)) is not None]
    report = single_report(lines, materials) if baseline is None else pair_report(lines)
    report |= {
        "judgement_file": str(path),
        "missing": len(jobs) - len(lines),
        "empty": sum(line.get("outcome") == "empty" for line in lines),
        "usage": {count: sum(line.get("usage", {}).get(count, 0) for line in lines)
                  for count in ("prompt_tokens", "completion_tokens")},
    }  # fmt: skip
    settings = {
        "judge": name,
        "mode": kind,
        "questions": word if word in QUESTION_SETS else questions_file.name,
        "questions_sha256": sha256_of_data(questions_file),
        "prompts_sha256": sha256_of_data(prompts),
        "references": references.stem if references else None,
        "references_sha256": sha256_of_data(references) if references else None,
        "answers_sha256": {path.stem: sha256_of_data(path) for path in options.answers},
        "baseline": {options.baseline.stem: sha256_of_data(options.baseline)} if options.baseline else None,
        **{part: value for part, value in protocol.items() if value != OPENAI},  # the default, and no part of names
    }
    failed = sum(line.get("outcome") == "failed" for line in lines)
    whole = not failed and not report["missing"]
    # The judgements are on file; the figures are always counted anew from them.
    record = record_of("judge", f"{name}-{kind}", settings, lambda: report, force=True, write=whole)
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        print(render([judge_table(record, _cost(options, report["usage"]))], "markdown"), end="")
    if options.plot is not None:
        _plot(options.plot, record)
    if not whole:
        reason = stopped or next(line.get("judgment", line.get("g1_judgment")) for line in lines
                                 if line.get("outcome") == "failed")  # fmt: skip
        raise UserError(
            f"{failed + report['missing']} of {len(jobs)} judgements are unscored because the judge gave no usable "
            f"answer ({reason}); the others are kept in {path}: run the same command again to go on"
        )


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for options that cannot be meant."""
    if (options.price_in is None) != (options.price_out is None):
        raise UserError("--price-in and --price-out belong together; give both, or none")
    if options.judge_model.startswith(LOCAL) and (options.base_url is not None or options.key_variable is not None):
        raise UserError(
            f"--base-url and --key-variable are for an endpoint, but the judge {options.judge_model} is local; leave "
            "them out, or name a model of the endpoint"
        )
    if options.key_variable is not None and not options.key_variable.isidentifier():  # it may be the key itself
        raise UserError(
            "--key-variable takes the name of a variable: letters, digits and _; a key is never an argument"
        )
    stems = [path.stem for path in [*options.answers, *([options.baseline] if options.baseline else [])]]
    if odd := [stem for stem in stems if not stem.isprintable()]:
        raise UserError(f"{odd[0]!r} is the model's name, and has characters that no table can show; rename the file")
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise UserError(f"two files of answers are called {twice[0]!r}, which is the model's name; rename one of them")
    if options.plot is not None and (
        options.baseline is not None or options.plot.suffix not in (".png", ".pdf", ".svg")
    ):
        raise UserError(
            f"--plot {options.plot}: the radar chart shows grades, not comparisons, and ends in .png, .pdf or .svg"
        )
    if options.plot is not None:
        reads = inputs_of(value for name, value in vars(options).items() if name != "plot")
        check_written((options.plot, options.plot.with_suffix(".csv")), reads, "--plot")


def _question_set(answers: list[dict[int, list[str]]]) -> str:
    """The named set that all answered ids are of. Raises UserError if there is none."""
    from eval.mtbench.answers import QUESTION_SETS, data_folder, read_questions

    answered = set().union(*answers)
    for word in QUESTION_SETS:
        file = data_folder(word) / "question.jsonl"
        if file.is_file() and answered <= {question.id for question in read_questions(file)}:
            return word
    raise UserError(
        f"the answers are to questions {min(answered)} to {max(answered)}, which are in none of the sets here; "
        "give the file of the questions with --questions, or fetch MT-bench's: bash scripts/prepare/mtbench.sh"
    )


def _judge_name(word: str) -> str:
    """The judge's name in files: of a local one local-DIRECTORY."""
    return f"local-{Path(word.removeprefix(LOCAL)).resolve().name}" if word.startswith(LOCAL) else word


def _references(folder: Path, judge: str) -> Path | None:
    """The judge's own reference answers, else the only ones there are; None without any."""
    files = data_files(folder, "*.jsonl")
    own = folder / f"{name_part(judge)}.jsonl"
    if own in files:
        return own
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{folder} has several sets of reference answers ({names}); choose one with --references FILE")
    return files[0] if files else None


def _jobs(
    options: argparse.Namespace,
    materials: "Materials",
    judge: str,
    answers: dict[str, dict[int, list[str]]],
    baseline: dict[int, list[str]] | None,
) -> "list[Job]":
    """All judgements of the call. Raises UserError for answers to other questions, or nothing to compare."""
    from eval.mtbench.judge import pair_jobs, single_jobs

    for model, given in [*answers.items(), ("the baseline", baseline or {})]:
        if other := sorted(given.keys() - materials.questions.keys()):
            raise UserError(
                f"{model} answers question {other[0]}, which --questions does not have; give the right file"
            )
    if baseline is None:
        return [job for model, given in answers.items() for job in single_jobs(materials, judge, model, given)]
    jobs = [
        job
        for model, given in answers.items()
        for job in pair_jobs(materials, judge, (model, options.baseline.stem), (given, baseline))
    ]
    if not jobs:
        raise UserError(f"{options.baseline} and the answers have no question in common")
    return jobs


def _judge(options: argparse.Namespace, kind: str) -> "tuple[Judge, dict[str, Any]]":
    """The judge that the options name, and what decides its judgements besides its name.

    Raises UserError if its key is missing.
    """
    import os

    from corpora.storage import identity
    from eval.generation import own_generation
    from eval.mtbench.chat_templates import chat_template
    from eval.mtbench.endpoint import endpoint_address
    from eval.mtbench.judge_client import ChatClient, local_judge
    from eval.mtbench.verdicts import ENDINGS, is_decided
    from quantization.programs.options import chosen_device
    from quantization.runs.checkpoint import find_checkpoint
    from quantization.runs.opening import load_tokenizer

    protocol: dict[str, Any] = {"max_tokens": options.max_tokens}
    if options.judge_model.startswith(LOCAL):
        directory = Path(options.judge_model.removeprefix(LOCAL))
        checkpoint, tokenizer = find_checkpoint(directory), load_tokenizer(directory)
        template = chat_template("auto", tokenizer, checkpoint.family_name)
        protocol["judge_fingerprint"] = checkpoint.fingerprint
        protocol["judge_prompting"] = identity(template.describe() | own_generation(directory, tokenizer).describe())
        decided = partial(is_decided, kind)
        device = chosen_device(options.device)
        return local_judge(directory, device, options.max_tokens, ENDINGS[kind], decided), protocol
    address, variable = endpoint_address(options.base_url or OPENAI), options.key_variable or KEY
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"the key of the judge is missing: set ${variable} (any word, if the server asks for none), "
            "name another variable with --key-variable, or use a local model: --judge-model local:DIR"
        )
    client = ChatClient(
        address,
        options.judge_model,
        key,
        timeout=options.timeout,
        retries=options.retries,
        max_tokens=options.max_tokens,
    )
    return client, protocol | {"endpoint": address}


def _with_bar(jobs: "list[Job]", judge: "Judge", file: Any, protocol: dict[str, Any], concurrency: int) -> str | None:
    from tqdm import tqdm

    from eval.mtbench.judge import judge_all

    with tqdm(total=len(jobs), desc="judgements", unit="call") as bar:
        return judge_all(jobs, judge, file, protocol, concurrency=concurrency, report=bar.update)


def _cost(options: argparse.Namespace, usage: dict[str, int]) -> str:
    """What the judgements took, as the endpoint counted it."""
    tokens = f"{usage['prompt_tokens']} prompt tokens, {usage['completion_tokens']} of the judgements"
    if options.price_in is None:
        return tokens
    dollars = (usage["prompt_tokens"] * options.price_in + usage["completion_tokens"] * options.price_out) / 1e6
    return f"{tokens}: {dollars:.4f} USD"


def _plot(path: Path, record: dict[str, Any]) -> None:
    """The radar chart of mean grades per category."""
    from eval.mtbench.judge_tables import mean_grades
    from eval.plots.canvas import output_for
    from eval.plots.radar import draw

    settings = record["settings"]
    title = f"grades by {settings['judge']}, {settings['questions']}"
    draw(mean_grades(record), output_for(path, "radar", path.suffix[1:], 200), title)
