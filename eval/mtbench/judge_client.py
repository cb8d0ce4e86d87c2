"""Who judges: an OpenAI-compatible endpoint, or a local model. Both take a system and a user text and give a `Reply`.

Rate limits, server errors, time-outs and broken answers of an endpoint are tried again, with a pause that doubles and
is never shorter than the server's Retry-After; what cannot get better is not. Redirects are not followed.
"""

import email.utils
import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import responses
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import Field
from transformers import LogitsProcessor, LogitsProcessorList
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError
from corpora.json_files import fitted
from eval.mtbench.endpoint import Endpoint, Key, NoAnswer, endpoint_address
from eval.mtbench.reasoning import CLOSINGS, left_open, opened_at_the_end

__all__ = ["ChatClient", "Judge", "Reply", "local_judge"]

log = logging.getLogger(__name__)

PAUSE = 1.0  # seconds before the first repetition; doubles
LONGEST_PAUSE = 60.0
LONGEST_RETRY_AFTER = 600.0  # a server that asks for more has failed
RETRIED = (408, 409, 425, 429)  # and every 5xx
UNSUPPORTED = 400  # also where a parameter is one that the model does not know
HOPELESS = (401, 403, 404, 405)  # the key, the model's name or the address is wrong: no call will succeed


@dataclass(frozen=True)
class Reply:
    """What a judge said. outcome: "answered", "refused" (by the judge itself) or "failed" (nothing usable came)."""

    text: str
    outcome: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


Judge = Callable[[str, str], Reply]  # (system, user) -> reply


class _Again(Exception):
    """An attempt that may succeed later. after: seconds the server asks for."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class ChatClient:
    """A judge behind an endpoint. Calls may come from several threads."""

    def __init__(
        self, base_url: str, model: str, key: str, *, timeout: float = 120, retries: int = 5, max_tokens: int = 2048
    ) -> None:
        self._key = Key(key)
        self._endpoint = Endpoint(endpoint_address(base_url), self._key, timeout)
        self.model, self.retries = model, retries
        self._settings: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens}
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let calls that wait for their next attempt give up at once."""
        self._stopped.set()

    def __call__(self, system: str, user: str) -> Reply:
        """Ask once, and again where that may help. Raises UserError where no call can succeed (key, model, address)."""
        reason = "it was stopped"
        for attempt in range(self.retries + 1):
            if self._stopped.is_set():
                break
            try:
                return self._ask(system, user)
            except _Again as error:
                reason = str(error)
                if error.after > LONGEST_RETRY_AFTER:
                    reason = f"{reason}; it asks to wait {error.after:.6g} s"
                    break
                if attempt < self.retries:
                    pause = min(PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1)  # callers spread out
                    self._stopped.wait(max(pause, error.after))
        return Reply(reason, "failed")

    def _ask(self, system: str, user: str) -> Reply:
        """One attempt. An HTTP error is raised to try again, raised as hopeless, or fails this prompt (too long, …)."""
        settings = self._settings
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            answer = self._endpoint.ask(model=self.model, messages=messages, **settings)
        except NoAnswer as error:
            raise _Again(self._key.shown(str(error))) from None
        if 200 <= answer.status < 300:
            return self._reply(answer.value)
        complaint = _complaint(answer.value)
        text = self._key.shown(f"HTTP {answer.status}: {complaint or responses.get(answer.status, 'no reason')}")
        if answer.status == UNSUPPORTED and self._says_otherwise(settings, complaint):
            return self._ask(system, user)
        if answer.status in RETRIED or answer.status >= 500:
            raise _Again(text, _seconds(answer.retry_after))
        if answer.status in HOPELESS or answer.status < 400:
            raise UserError(
                f"the judge {self.model} at {self._endpoint.address} refuses every call ({text}); check the key, the "
                "name of the model and --base-url"
            )
        return Reply(text, "failed")

    def _says_otherwise(self, used: dict[str, Any], complaint: str) -> bool:
        """Say a setting as the endpoint wants it, from now on. False if the complaint is about something else.

        OpenAI's reasoning models know no max_tokens and no temperature but their own.
        """
        if self._settings is not used:  # another call was told so meanwhile
            return True
        settings = dict(used)
        if "max_completion_tokens" in complaint and "max_tokens" in settings:
            settings["max_completion_tokens"] = settings.pop("max_tokens")
        elif "temperature" in complaint and "temperature" in settings:
            del settings["temperature"]
            log.warning("the judge %s takes no temperature of 0; it grades at its own, so grades vary", self.model)
        if settings == used:
            return False
        self._settings = settings
        return True

    def _reply(self, value: Any) -> Reply:
        """What a chat completion says."""
        try:
            fitted(value, _Completion, "the answer")
        except UserError:
            raise _Again(self._key.shown(f"the answer is not a chat completion ({json.dumps(value)[:2000]})")) from None
        choice, counts = value["choices"][0], _usage(value.get("usage"))
        message, reason = choice["message"], choice.get("finish_reason")
        text = message.get("content")
        if message.get("refusal"):
            return Reply(self._key.removed_from(message["refusal"]), "refused", *counts)
        if text is None and reason == "content_filter":
            return Reply("the content filter withheld the answer", "refused", *counts)
        reasoning = any(message.get(name) for name in ("reasoning_content", "reasoning"))
        if text is None and (reasoning or reason == "length"):
            text = ""  # its reasoning took all the room there was
        if isinstance(text, list):  # of parts, some of them reasoning
            text = "".join(part.get("text", "") for part in text if part["type"] == "text")
        if text is None:
            raise _Again("the answer has no text")
        return Reply(self._key.removed_from(text), "answered", *counts)


class _Part(TypedDict):
    type: str
    text: NotRequired[str]


class _Message(TypedDict):
    content: NotRequired[str | list[_Part] | None]
    refusal: NotRequired[str | None]


class _Choice(TypedDict):
    message: _Message
    finish_reason: NotRequired[str | None]


class _Completion(TypedDict):
    choices: Annotated[list[_Choice], Field(min_length=1)]


def _usage(value: Any) -> tuple[int, int]:
    """The tokens of a prompt and of an answer, 0 where a server counts none: an answer is none the worse for that."""
    counts = value if isinstance(value, dict) else {}
    found = (counts.get(name) for name in ("prompt_tokens", "completion_tokens"))
    prompt, completion = (n if type(n) is int and 0 <= n < 2**53 else 0 for n in found)
    return prompt, completion


def _complaint(value: Any) -> str:
    """The message of an answer that is an error; "" where it has none."""
    for _ in range(2):
        value = value.get("error", value.get("message")) if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _seconds(retry_after: str) -> float:
    """A Retry-After header, in seconds or as a date; 0 where there is none or it cannot be read."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, IndexError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


class _OneOf(LogitsProcessor):
    """Leaves, behind the first `start` columns, only tokens that go on with one of some endings; then only `end`."""

    def __init__(self, endings: Sequence[Sequence[int]], start: int, end: int) -> None:
        self.endings, self.start, self.end = [list(ending) for ending in endings], start, end

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """input_ids: (1, L); scores: (1, vocabulary). Returns scores of the same shape."""
        said = input_ids[0, self.start :].tolist()
        fitting = [ending for ending in self.endings if ending[: len(said)] == said]
        allowed = {ending[len(said)] for ending in fitting if len(ending) > len(said)} or {self.end}
        left = scores.new_full(scores.shape, float("-inf"))
        left[:, list(allowed)] = scores[:, list(allowed)]
        return left


def local_judge(
    directory: Path, device: torch.device, max_tokens: int, endings: Sequence[str], is_decided: Callable[[str], bool]
) -> Judge:
    """A local model as a judge: greedy, in its own chat template, system and user text in one turn.

    endings: the last lines that decide, all beginning alike ("Rating: [[1]]", …). is_decided: whether a text holds a
    decision; where it holds none, the model's own text, its reasoning closed, is followed by the ending that it finds
    most likely, token by token, so that also a small model decides.
    """
    from corpora.tokens import encode
    from eval.generation import own_generation
    from eval.mtbench.answers import Answerer
    from eval.mtbench.chat_templates import chat_template
    from quantization.named import named_recipe
    from quantization.runs.plan import plan_run

    plan = plan_run(directory, named_recipe("fp16"), device=device)
    template = chat_template("auto", plan.tokenizer, plan.checkpoint.family_name)
    generation = own_generation(directory, plan.tokenizer)
    answerer = Answerer(plan.load(), template, generation, seed=0, max_new_tokens=max_tokens, context=plan.context)
    tokens = [encode(plan.tokenizer, f"\n\n{ending}") for ending in endings]
    if len(set(map(tuple, tokens))) < len(tokens):
        raise UserError(
            f"the tokenizer of {directory} has the same tokens for several of {', '.join(endings[:3])}, …: this model "
            "cannot say which it means; take another judge"
        )
    spare = max(len(encode(plan.tokenizer, closing)) for closing in CLOSINGS)
    alike = next(i for i, column in enumerate(zip(*tokens, strict=False)) if len(set(column)) > 1)
    lead, tails = tokens[0][:alike], [ending[alike:] for ending in tokens]
    longest = max(map(len, tokens))

    def generate(ids: list[int], room: int, cache: Any = None, **options: Any) -> tuple[list[int], Any]:
        output = answerer.model.generate(
            torch.tensor([ids]), past_key_values=cache, do_sample=False, max_new_tokens=room,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        return output.sequences[0, len(ids) :].tolist(), output.past_key_values

    @torch.inference_mode()
    def judge(system: str, user: str) -> Reply:
        asked = [f"{system}\n\n{user}"]
        ids, opening = template.ids(asked), opened_at_the_end(template.text(asked))
        room = max_tokens if plan.context is None else min(max_tokens, plan.context - len(ids) - spare - longest)
        if room < 1:
            return Reply(f"the prompt of {len(ids)} tokens leaves no room in a context of {plan.context}", "failed")
        new, cache = generate(ids, room)
        said = answerer.cut(new, room)
        text = f"{opening}{said.text}"
        if is_decided(text):
            return Reply(text, "answered", len(ids), said.tokens)
        own = new[: said.tokens - 1] if said.stopped == "end" else new
        closing = left_open(text)
        before = [*ids, *own, *encode(plan.tokenizer, closing), *lead]
        chosen, _ = generate(before, longest, cache, logits_processor=LogitsProcessorList([
            _OneOf(tails, len(before), generation.pad)
        ]))  # fmt: skip
        (index,) = (i for i, tail in enumerate(tails) if chosen[: len(tail)] == tail)
        return Reply(f"{text}{closing}\n\n{endings[index]}", "answered", len(ids), said.tokens + len(tokens[index]))

    return judge
