"""Who judges: an OpenAI-compatible endpoint, or a local model. Both take a system and a user text and give a `Reply`.

The endpoint is asked through the library `openai`. Its own repetitions are switched off: they know neither broken
answers nor a program that stops. Rate limits, server errors, time-outs and broken answers are tried again here, with a
pause that doubles and is never shorter than the server's Retry-After; what cannot get better is not. Redirects are not
followed, so that the key reaches no other server.
"""

import email.utils
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from corpora.errors import UserError
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
        if not base_url.startswith(("http://", "https://")):
            raise UserError(f"--base-url {base_url} is no address; give one such as http://localhost:8000/v1")
        if not (key.isascii() and key.isprintable()):
            raise UserError("the judge's key has characters that no HTTP header holds; give the variable another value")
        from openai import DefaultHttpxClient, OpenAI  # half a second, which a local judge need not wait

        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it has a line for every call
        http = DefaultHttpxClient(follow_redirects=False)  # the key goes to no other server
        self._client = OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=0, http_client=http)
        self.model, self.timeout, self.retries = model, timeout, retries
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
                    reason = f"{reason}; it asks to wait {error.after:.0f} s"
                    break
                if attempt < self.retries:
                    pause = min(PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1)  # callers spread out
                    self._stopped.wait(max(pause, error.after))
        return Reply(reason, "failed")

    def _ask(self, system: str, user: str) -> Reply:
        """One attempt. An HTTP error is raised to try again, raised as hopeless, or fails this prompt (too long, …)."""
        import openai

        answer: Any = None
        settings = self._settings
        try:
            answer = self._client.chat.completions.create(
                model=self.model, **settings,
                messages=[{"role": "system", "content": system}, {"role": "user", "content": user}],
            )  # fmt: skip
            return _reply(answer)
        except openai.APIStatusError as error:
            status, after = error.status_code, error.response.headers.get("Retry-After")
            message = error.body.get("message") if isinstance(error.body, dict) else None
            text = self._shown(f"HTTP {status}: {message or error.response.reason_phrase}")
            if status == UNSUPPORTED and self._says_otherwise(settings, str(message)):
                return self._ask(system, user)
        except openai.APITimeoutError:
            raise _Again(f"no answer within {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise _Again(self._shown(f"the connection failed ({error.__cause__})")) from None
        except (ValueError, IndexError, TypeError, AttributeError) as error:
            raise _Again(self._shown(f"the answer is not a chat completion ({answer or error})")) from None
        if status in RETRIED or status >= 500:
            raise _Again(text, _seconds(after))
        if status in HOPELESS or status < 400:
            raise UserError(
                f"the judge {self.model} at {self._client.base_url} refuses every call ({text}); check the key, the "
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

    def _shown(self, text: str) -> str:
        """A line of at most 300 characters, without the key."""
        return " ".join(text.replace(self._client.api_key, "…").split())[:300]


def _reply(answer: Any) -> Reply:
    """A chat completion, of whose form the library has checked nothing. Raises the usual errors of access."""
    choice, usage = answer.choices[0], answer.usage
    counts = (int(usage.prompt_tokens or 0), int(usage.completion_tokens or 0)) if usage else (0, 0)
    if choice.message.refusal:
        return Reply(str(choice.message.refusal), "refused", *counts)
    text = choice.message.content
    if text is None and choice.finish_reason == "content_filter":
        return Reply("the content filter withheld the answer", "refused", *counts)
    reasoning = any(getattr(choice.message, name, None) for name in ("reasoning_content", "reasoning"))
    if text is None and (reasoning or choice.finish_reason == "length"):
        text = ""  # its reasoning took all the room there was
    if isinstance(text, list):  # of parts, some of them reasoning
        text = "".join(part["text"] for part in text if part["type"] == "text")
    if not isinstance(text, str):
        raise TypeError("no text")
    return Reply(text, "answered", *counts)


def _seconds(retry_after: str | None) -> float:
    """A Retry-After header, in seconds or as a date; 0 where there is none or it cannot be read."""
    if not retry_after:
        return 0.0
    try:
        return max(float(retry_after), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return 0.0


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
