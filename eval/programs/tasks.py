"""python -m eval tasks: MMLU, zero-shot QA and any other task of lm-eval's harness."""

import argparse
import json
from typing import Any

from corpora import values
from corpora.errors import UserError
from eval.programs.start import start
from quantization.programs.options import add_plan_options

__all__ = ["add", "run"]

EXAMPLES = """\
tasks:
  mmlu         57 subjects, 5 examples shown; --protocol says whose prompts
  qa           openbookqa, winogrande, arc_challenge, arc_easy, boolq, hellaswag, lambada_openai
  csqa         boolq, arc_challenge, arc_easy, hellaswag, piqa, winogrande
  bigbench     bbh, BIG-Bench Hard
  piqa, gsm8k, truthfulqa, and every other name of lm-eval's harness (lm_eval ls tasks)

examples:
  python -m eval tasks --tasks mmlu --model modelzoo/vicuna-v1.5/vicuna-v1.5-7b --recipe rtn-w3 --prefix bos
  python -m eval tasks --tasks qa --data sample --model modelzoo/smollm2/smollm2-135m
"""


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    tasks = commands.add_parser(
        "tasks",
        help="MMLU, zero-shot QA, any task of lm-eval",
        description="Tasks, through lm-eval's harness, on any recipe, with and without a prefix. Every task leaves a "
        "record in outputs/runs/; a finished one is read back. Under `accelerate launch` the questions are shared.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_plan_options(tasks, several=True)
    group = tasks.add_argument_group("tasks and protocol")
    group.add_argument("--tasks", type=values.name, required=True, metavar="NAME,…", help="names, joined by commas")
    group.add_argument(
        "--data",
        choices=["local", "sample", "hub"],
        help="local: files in datasets/ (python -m corpora lists them); sample: small items that are made by rule or "
        "written for this project, no benchmark; hub: what lm-eval fetches by itself (default: local, but sample for "
        "the embedded model)",
    )
    group.add_argument(
        "--fewshot", type=values.count(0), metavar="K", help="examples shown (default: the task's own; mmlu: 5)"
    )
    group.add_argument(
        "--protocol",
        choices=["hendrycks", "lm-eval"],
        help="of mmlu. hendrycks: the authors' and IntactKV's prompts, examples dropped past 2048 tokens (default); "
        "lm-eval: the harness' own, as of all other tasks",
    )
    group.add_argument(
        "--bos",
        default="always",
        choices=["always", "tokenizer", "never"],
        help="without a prefix: [BOS] in front of every prompt (default), only if the tokenizer itself puts it there, "
        "as stock lm-eval does today, or never, as lm-eval 0.4.2 did",
    )
    group.add_argument(
        "--limit", type=values.count(), metavar="N", help="at most N questions of each task (mmlu: each subject)"
    )
    group.add_argument(
        "--batch-size", type=values.count(), default=8, metavar="ROWS", help="rows per forward pass (default: 8)"
    )
    tasks.add_argument("--json", action="store_true", help="print the run records instead of the table")
    tasks.add_argument("--force", action="store_true", help="run again, even if there is a record")


def run(options: argparse.Namespace) -> None:
    """Score every task that has no finished run, and print all."""
    import logging

    from corpora.catalog import model_defaults

    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks is empty; name one, for example --tasks qa")
    if options.protocol == "hendrycks" and "mmlu" not in names:
        raise UserError(
            f"--protocol hendrycks is one of mmlu, but --tasks are {', '.join(names)}, which are asked as lm-eval's "
            "harness asks them; leave it out, or name mmlu"
        )
    plan, processes = start(options)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    source = options.data or model_defaults(plan.checkpoint.family_name).default_task_data

    from eval.tasks.lm_tasks import task_runs
    from eval.tasks.task_runner import TaskRunner

    runner = TaskRunner(
        plan,
        processes,
        source=source,
        fewshot=options.fewshot,
        protocol=options.protocol or "hendrycks",
        bos=options.bos,
        limit=options.limit,
        batch_size=options.batch_size,
    )
    prepared = [runner.prepare(task) for task in task_runs(names)]  # all of them: what is missing shows at once
    records = [runner.record(task, force=options.force) for task in prepared]
    if not processes.is_first:
        return
    if options.json:
        print(json.dumps(records[0] if len(records) == 1 else records, indent=2))
    else:
        from eval.tables.render import render
        from eval.tables.tasks import run_tables

        print(render(run_tables(records), "markdown"), end="")
