"""From a plan and a task to a record: the model is loaded once, when the first task without a finished run needs it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch

from corpora.errors import UserError
from corpora.files import sha256_of_data
from corpora.machine import peak_memory_mb
from corpora.mmlu import SUBCATEGORIES, Subject, mmlu_directory, read_mmlu
from corpora.storage import identity
from corpora.tokens import start_token_id, tokenizer_fingerprint
from eval.generation import Generation, own_generation
from eval.processes import Processes
from eval.runs import record_of
from eval.tasks import mmlu
from eval.tasks.lm import IntactLM
from eval.tasks.lm_tasks import TaskRun, load_tasks, run_tasks
from quantization.runs.plan import Plan

__all__ = ["Prepared", "TaskRunner", "lead_of"]

log = logging.getLogger(__name__)


MMLU_SHOTS = 5  # in the published table
COUNTS = ("rows", "behind_prefix", "truncated")  # of rows, in a record
DEFAULT_CONTEXT = 2048  # of a model whose configuration names none


def lead_of(plan: Plan, bos: Literal["always", "tokenizer", "never"] = "always") -> tuple[int, ...]:
    """The ids that open every row: the prefix's; without one [BOS], always, only as the tokenizer's own template has
    it, or never.

    Raises UserError for a prefix together with another opening than its own, and for a tokenizer without BOS and EOS:
    nothing could open a text without context, or end an answer.
    """
    if plan.choice.ids:
        if bos != "always":
            raise UserError(f"--bos {bos} is for runs without a prefix: a prefix opens every prompt; leave it out")
        return plan.choice.ids
    start = start_token_id(plan.tokenizer)
    if bos == "always":
        return (start,)
    ids = plan.tokenizer("a")["input_ids"] if bos == "tokenizer" else []
    own = plan.tokenizer.bos_token_id
    return (own,) if own is not None and ids[:1] == [own] else ()


@dataclass(frozen=True)
class Prepared:
    """A task whose data are here. name: of its record's file; measure: its figures, on the first process."""

    name: str
    settings: dict[str, Any]
    measure: Callable[[IntactLM], dict[str, Any] | None]


class TaskRunner:
    """Runs tasks on one plan. See `python -m eval tasks --help` for the arguments."""

    def __init__(
        self,
        plan: Plan,
        processes: Processes,
        *,
        source: str,
        fewshot: int | None,
        protocol: str,
        bos: Literal["always", "tokenizer", "never"],
        limit: int | None,
        batch_size: int,
    ):
        self.plan = plan
        self.processes = processes
        self.source = source
        self.fewshot = fewshot
        self.protocol = protocol
        self.limit = limit
        self.batch_size = batch_size
        self.lead = lead_of(plan, bos)
        self.generation: Generation | None = None  # read when a task generates
        self._lm: IntactLM | None = None

    def prepare(self, run: TaskRun) -> Prepared:
        """Read a task's data. Raises UserError for whatever is missing, before any task has run."""
        hendrycks = run.name == "mmlu" and self.protocol == "hendrycks"
        if hendrycks:
            shots: Any = MMLU_SHOTS if self.fewshot is None else self.fewshot
            sampled = self._sampled("mmlu")
            subjects = read_mmlu(mmlu_directory(sample=sampled))
            absent = sorted(SUBCATEGORIES.keys() - {subject.name for subject in subjects})
            if absent and not sampled:
                names = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
                log.warning("MMLU: %d of its subjects are not here (%s); the score is without them", len(absent), names)
            short = next((s for s in subjects if len(s.dev) < shots), None)
            if short is not None:
                raise UserError(f"--fewshot {shots}: {short.files[0]} has only {len(short.dev)} examples to show")
            data = identity({"files": [sha256_of_data(file) for subject in subjects for file in subject.files]})
        else:
            fewshot = MMLU_SHOTS if run.name == "mmlu" and self.fewshot is None else self.fewshot
            tasks, data = load_tasks(run, self.source, fewshot)
            shots = max(int(task.config.num_fewshot) for task in tasks.values())
            generates = any(task.OUTPUT_TYPE == "generate_until" for task in tasks.values())
            if generates and self.plan.tokenizer.eos_token_id is None:
                raise UserError(
                    f"{run.name} generates its answers, and the tokenizer {self.plan.tokenizer.name_or_path!r} has no "
                    "EOS token to end one; set eos_token in its tokenizer_config.json"
                )
        settings = self.plan.describe() | {
            "task_name": run.name,
            "protocol": "hendrycks" if hendrycks else "lm-eval",
            "fewshot": shots,
            "data": self.source,
            "data_sha256": data,
            "lead": list(self.lead),
            "limit": self.limit,
            "batch_size": self.batch_size,
            "tokenizer": tokenizer_fingerprint(self.plan.tokenizer),
        }
        if not hendrycks:
            settings["lm_eval"] = version("lm_eval")  # whose task files make the prompts
            if generates:
                self.generation = own_generation(self.plan.checkpoint.directory, self.plan.tokenizer)
                settings["generation"] = self.generation.describe()

        def measure(lm: IntactLM) -> dict[str, Any] | None:
            return self._hendrycks(lm, subjects, shots) if hendrycks else run_tasks(lm, tasks, self.limit)

        return Prepared(f"{settings['model']}-{settings['weights']}-{run.name}", settings, measure)

    def record(self, task: Prepared, force: bool = False) -> dict[str, Any]:
        """The record of a task, read back or made now."""

        def figures() -> dict[str, Any]:
            lm = self._loaded()
            lm.counts.clear()
            lm.intact.usage.clear()
            started = time.perf_counter()
            measured = task.measure(lm)
            seconds = time.perf_counter() - started
            counts = self.processes.summed(torch.tensor([lm.counts[key] for key in COUNTS]))
            return (measured or {}) | {
                "rows": dict(zip(COUNTS, counts.tolist(), strict=True)),
                "seconds": round(seconds, 3),
                "peak_memory_mb": round(peak_memory_mb(self.plan.device.type), 1),
                **({} if (kv := lm.intact.kv_figures(lm.max_length)) is None else {"kv_cache": kv}),
                **self.plan.outcome(),
            }

        record = record_of("tasks", task.name, task.settings, figures, force=force, write=self.processes.is_first)
        if self.processes.is_first:
            _report_cuts(task.settings["task_name"], record)
        return record

    def _sampled(self, name: str) -> bool:
        """Whether the sample is asked for. Raises UserError where only files will do."""
        if self.source == "hub":
            raise UserError(
                f"--data hub: the protocol hendrycks of {name} reads the authors' files, which are not on the hub; use "
                "--data local, or --protocol lm-eval"
            )
        return self.source == "sample"

    def _loaded(self) -> IntactLM:
        if self._lm is None:
            self._lm = IntactLM(
                self.plan.load(),
                self.plan.tokenizer,
                self.lead,
                generation=self.generation,
                batch_size=self.batch_size,
                context=self.plan.context or DEFAULT_CONTEXT,
                accelerator=self.processes.accelerator(),
            )
        return self._lm

    def _hendrycks(self, lm: IntactLM, subjects: list[Subject], shots: int) -> dict[str, Any]:
        """MMLU's figures by its authors' protocol; each process answers its share of the questions."""
        tests = [subject.test[: self.limit] for subject in subjects]
        questions = [(subject, question) for subject, test in zip(subjects, tests, strict=True) for question in test]
        mine = self.processes.mine(range(len(questions)))
        prompts = [
            mmlu.fitting_prompt(lm, questions[i][0].name, questions[i][1], questions[i][0].dev[:shots]) for i in mine
        ]
        right = torch.zeros(len(questions), dtype=torch.long)
        for i, answer in zip(mine, mmlu.answers(lm, prompts), strict=True):
            right[i] = int(answer == questions[i][1].answer)
        fewer = torch.tensor([sum(p.shots < shots for p in prompts), sum(p.cut for p in prompts)])
        fewer = self.processes.summed(fewer)
        right = self.processes.summed(right)
        measured = mmlu.figures(subjects, right.split([len(test) for test in tests]))
        return measured | {"prompts": {"fewer_examples": int(fewer[0]), "cut": int(fewer[1])}}


def _report_cuts(task: str, record: dict[str, Any]) -> None:
    """Say which prompts were not read whole: their scores are not quite the task's."""
    rows, prompts = record["rows"], record.get("prompts", {})
    if rows["truncated"]:
        log.warning("%s: %d of %d rows were too long for the model's context and lost their first tokens behind the "
                    "prefix", task, rows["truncated"], rows["rows"])  # fmt: skip
    if prompts.get("fewer_examples"):
        log.warning("%s: %d prompts show fewer examples, to fit %d tokens; %d questions were cut", task,
                    prompts["fewer_examples"], mmlu.LONGEST_PROMPT, prompts["cut"])  # fmt: skip
