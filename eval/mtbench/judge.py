"""The judge of MT-bench (Zheng et al., NeurIPS 2023, arXiv:2306.05685): single-answer grading and pairwise comparison.

Every turn of a question is judged on its own: two calls a question, or four where two answers are compared in both
orders. Math, reasoning and coding are judged beside a reference answer. Prompts, references, answers and judgements
are files in FastChat's forms. What the judge does not grade counts nowhere: its score is −1.
"""

import json
import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from corpora.errors import UserError
from corpora.json_lines import read_lines
from eval.mtbench.endpoint import OPENAI
from eval.mtbench.forms import AnswerLine, ComparisonLine, GradeLine, PromptLine
from eval.mtbench.json_lines import LineFile, Lines
from eval.mtbench.judge_client import Judge, Reply
from eval.mtbench.reasoning import spoken
from eval.mtbench.verdicts import NO_SCORE, TURNS, rating, verdict

__all__ = [
    "COMPARISONS",
    "GRADES",
    "Job",
    "Materials",
    "judge_all",
    "kept_line",
    "pair_jobs",
    "read_answers",
    "read_materials",
    "single_jobs",
]

WITH_REFERENCE = ("math", "reasoning", "coding")  # FastChat's need_ref_cats
IN_A_ROW = 8  # so many failed calls without a good one between them: the judge is down
SINGLE = {False: "single-v1", True: "single-math-v1"}  # by whether there is a reference
PAIR = {False: "pair-v2", True: "pair-math-v1"}


# what the judge reads -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Materials:
    """Questions with their categories and turns, by id; prompts by name; reference turns by id."""

    questions: dict[int, Any]
    prompts: dict[str, dict[str, Any]]
    references: dict[int, list[str]]


def read_materials(questions: Sequence[Any], prompts: Path, references: Path | None) -> Materials:
    """Read the judge's prompts and the reference answers. Raises UserError for damaged files."""
    named: dict[str, dict[str, Any]] = {}
    for row in read_lines(prompts, "the file of judge prompts", PromptLine):
        if row["name"] in named:
            raise UserError(f"the file of judge prompts {prompts} has {row['name']!r} twice; mend the file")
        named[row["name"]] = row
    return Materials(
        {question.id: question for question in questions},
        named,
        {} if references is None else read_answers(references),
    )


def read_answers(path: Path) -> dict[int, list[str]]:
    """The turns of every question of an answer file, by its last line. Raises UserError for a damaged file."""
    rows = read_lines(path, "the file of answers", AnswerLine, heal=True)
    return {row["question_id"]: row["choices"][0]["turns"] for row in rows}


@dataclass(frozen=True)
class Job:
    """One judgement to make. users: one prompt, or two where the order is changed; line: its file's line, from replies.

    same: whether a line of the file is this judgement, made on the same texts. replies: where a line keeps the replies.
    """

    key: tuple[Any, ...]
    system: str
    users: tuple[str, ...]
    line: Callable[[list[Reply]], dict[str, Any]]
    same: Callable[[dict[str, Any]], bool]
    replies: tuple[str, ...]


def _prompt(
    materials: Materials, names: dict[bool, str], number: int, turn: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """The prompt for a question and a turn, and the texts that do not depend on the answers."""
    question = materials.questions[number]
    referenced = question.category in WITH_REFERENCE
    name = names[referenced] + ("-multi-turn" if turn == 2 else "")
    if name not in materials.prompts:
        raise UserError(f"the judge prompts have no {name!r}; known are {', '.join(materials.prompts)}")
    texts = {"question": question.turns[0]} if turn == 1 else {}
    if turn == 2:
        texts |= {"question_1": question.turns[0], "question_2": question.turns[1]}
    if referenced:
        if number not in materials.references:
            raise UserError(
                f"question {number} ({question.category}) is judged beside a reference answer, but there is none; give "
                "a file that has it: --references FILE"
            )
        for i, text in enumerate(materials.references[number][:turn], 1):
            texts[f"ref_answer_{i}"] = text
    return materials.prompts[name], texts


def _filled(prompt: dict[str, Any], texts: dict[str, str]) -> str:
    try:
        return prompt["prompt_template"].format(**texts)
    except KeyError as error:
        raise UserError(
            f"the judge prompt {prompt['name']!r} has a place for {error}, which is not known there; known are "
            f"{', '.join(texts)}"
        ) from None


def _usage(replies: Iterable[Reply]) -> dict[str, int]:
    replies = list(replies)
    return {
        "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
        "completion_tokens": sum(reply.completion_tokens for reply in replies),
    }


def _outcome(replies: Sequence[Reply], scored: bool) -> str:
    """What became of a judgement: failed and refused go first, then scored, empty (reasoning alone) or "no rating"."""
    said = {reply.outcome for reply in replies}
    unscored = "no rating" if all(spoken(reply.text).strip() for reply in replies) else "empty"
    return next((word for word in ("failed", "refused") if word in said), "scored" if scored else unscored)


def _at(key: tuple[Any, ...], endpoint: str | None) -> tuple[Any, ...]:
    """What a judgement is about, with where it was made unless that is OpenAI's, or a local model."""
    return key if endpoint in (None, OPENAI) else (*key, endpoint)


GRADES = Lines(
    "a file of grades",
    GradeLine,
    lambda line: _at((line["question_id"], line["model"], tuple(line["judge"]), line["turn"]), line.get("endpoint")),
)
COMPARISONS = Lines(
    "a file of comparisons",
    ComparisonLine,
    lambda line: _at(
        (line["question_id"], line["model_1"], line["model_2"], tuple(line["judge"]), line["turn"]),
        line.get("endpoint"),
    ),
)


def single_jobs(materials: Materials, judge: str, model: str, answers: dict[int, list[str]]) -> list[Job]:
    """Two judgements for every answered question."""
    return [
        _single_job(materials, judge, model, number, turn, answers[number])
        for turn in TURNS
        for number in sorted(answers)
    ]


def _single_job(materials: Materials, judge: str, model: str, number: int, turn: int, answer: list[str]) -> Job:
    prompt, texts = _prompt(materials, SINGLE, number, turn)
    texts |= {"answer": answer[0]} if turn == 1 else {"answer_1": answer[0], "answer_2": answer[1]}
    user = _filled(prompt, texts)

    def line(replies: list[Reply]) -> dict[str, Any]:
        (reply,) = replies
        score = rating(reply.text) if reply.outcome == "answered" else NO_SCORE
        return {
            "question_id": number,
            "model": model,
            "judge": [judge, prompt["name"]],
            "user_prompt": user,
            "judgment": reply.text,
            "score": score,
            "turn": turn,
            "tstamp": time.time(),
            "outcome": _outcome(replies, score != NO_SCORE),
            "usage": _usage(replies),
        }

    key = (number, model, (judge, prompt["name"]), turn)
    return Job(key, prompt["system_prompt"], (user,), line, lambda row: row["user_prompt"] == user, ("judgment",))


def pair_jobs(
    materials: Materials,
    judge: str,
    models: tuple[str, str],
    answers: tuple[dict[int, list[str]], dict[int, list[str]]],
) -> list[Job]:
    """Two comparisons, each in both orders, for every question that both models answered."""
    return [
        _pair_job(materials, judge, models, number, turn, (answers[0][number], answers[1][number]))
        for turn in TURNS
        for number in sorted(answers[0].keys() & answers[1].keys())
    ]


def _pair_job(
    materials: Materials,
    judge: str,
    models: tuple[str, str],
    number: int,
    turn: int,
    answers: tuple[list[str], list[str]],
) -> Job:
    prompt, texts = _prompt(materials, PAIR, number, turn)

    def user(first: list[str], second: list[str]) -> str:
        if turn == 1:
            return _filled(prompt, texts | {"answer_a": first[0], "answer_b": second[0]})
        pairs = {f"answer_{name}_{i + 1}": a[i] for name, a in (("a", first), ("b", second)) for i in range(len(TURNS))}
        return _filled(prompt, texts | pairs)

    users = (user(*answers), user(*answers[::-1]))

    def line(replies: list[Reply]) -> dict[str, Any]:
        said = [verdict(reply.text) if reply.outcome == "answered" else "error" for reply in replies]
        names = ({"A": "model_1", "B": "model_2"}, {"A": "model_2", "B": "model_1"})
        won = [names[game].get(word, word) for game, word in enumerate(said)]
        return {
            "question_id": number,
            "model_1": models[0],
            "model_2": models[1],
            "g1_winner": won[0],
            "g2_winner": won[1],
            "judge": [judge, prompt["name"]],
            "g1_user_prompt": users[0],
            "g1_judgment": replies[0].text,
            "g2_user_prompt": users[1],
            "g2_judgment": replies[1].text,
            "turn": turn,
            "tstamp": time.time(),
            "outcome": _outcome(replies, "error" not in won),
            "usage": _usage(replies),
        }

    key = (number, *models, (judge, prompt["name"]), turn)
    return Job(
        key,
        prompt["system_prompt"],
        users,
        line,
        lambda row: (row.get("g1_user_prompt"), row.get("g2_user_prompt")) == users,
        ("g1_judgment", "g2_judgment"),
    )


# judging --------------------------------------------------------------------------------------------------------------


def judge_all(
    jobs: Sequence[Job],
    judge: Judge,
    file: LineFile,
    protocol: Mapping[str, Any],
    *,
    concurrency: int,
    report: Callable[[], object] = lambda: None,
) -> str | None:
    """Make every judgement that the file does not hold. Returns why it stopped early, None if it did not.

    protocol: what decides a judgement besides its texts and the judge's name; it is kept in every line, and a judgement
    by another one is made again (of a line that says nothing of it, as FastChat's do not, it is taken to be the same).
    Its `endpoint` is where the judge is: judgements of one name at two addresses stand beside each other.
    A judgement that failed is on file as unscored and is made again next time; a refusal or an answer without a rating
    is what the judge has to say and stays. After `IN_A_ROW` failures in a row the judge is taken to be down.
    """
    left = []
    for job in jobs:
        line = kept_line(job, file, protocol)
        if line is None or line.get("outcome") == "failed":
            left.append(job)
            continue
        report()
        if changed := _read_anew(job, line):
            file.append(line | changed)
    failures, stop = 0, getattr(judge, "stop", lambda: None)

    def ask(job: Job) -> list[Reply]:
        return [judge(job.system, user) for user in job.users]

    def keep(job: Job, replies: list[Reply]) -> bool:
        file.append(line := {**job.line(replies), **protocol})
        report()
        return line["outcome"] != "failed"

    todo = iter(left)
    waiting: dict[Future[list[Reply]], Job] = {}
    with ThreadPoolExecutor(max_workers=concurrency) as pool:
        try:
            while True:
                waiting |= {pool.submit(ask, job): job for job in islice(todo, concurrency - len(waiting))}
                if not waiting:
                    return None
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    failures = 0 if keep(waiting.pop(done), replies := done.result()) else failures + 1
                    if failures >= max(IN_A_ROW, concurrency):
                        return next(reply.text for reply in replies if reply.outcome == "failed")
        finally:
            stop()
            for call, job in waiting.items():  # under way when the others stopped: paid for, so kept
                if call.exception() is None:
                    keep(job, call.result())


def kept_line(job: Job, file: LineFile, protocol: Mapping[str, Any]) -> dict[str, Any] | None:
    """The line of a judgement on the same texts by the same protocol, failed or not; None if the file has none.

    A line that names no address was made at OpenAI's, which is the default, or by a local model. Raises UserError
    where another address is asked for the same: what that line was made by is not known, nor paid for twice.
    """
    endpoint = protocol.get("endpoint")
    decided = {"endpoint": endpoint, **protocol}

    def same(line: dict[str, Any]) -> bool:
        return all(line.get(name, value) == value for name, value in decided.items()) and job.same(line)

    if (line := file.rows.get(_at(job.key, endpoint))) is not None:
        return line if same(line) else None
    nameless = file.rows.get(job.key)
    if nameless is None or "endpoint" in nameless or nameless.get("outcome") == "failed" or not same(nameless):
        return None
    named = re.sub(r"[\\&#]", r"\\\g<0>", json.dumps(endpoint))  # signs that mean something to sed
    script = f"""/"endpoint": /!s#}}$#, "endpoint": {named}}}#"""
    raise UserError(
        f"{file.path} holds judgements of these answers by {job.key[-2][0]} that name no address, so they may have "
        f"been made at {endpoint} or elsewhere; write into them where, such as "
        f"sed -i {shlex.quote(script)} {shlex.quote(str(file.path))}, or move the file away"
    )


def _read_anew(job: Job, line: dict[str, Any]) -> dict[str, Any]:
    """What a line's replies say, where the line says something else: it was written when reasoning still counted."""
    if line.get("outcome") == "refused" or not all(isinstance(line.get(name), str) for name in job.replies):
        return {}
    again = job.line([Reply(line[name], "answered") for name in job.replies])
    told = ("score", "g1_winner", "g2_winner", "outcome")
    return {name: again[name] for name in told if name in line and name in again and line[name] != again[name]}
