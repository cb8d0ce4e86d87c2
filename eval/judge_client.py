"""Who judges: an OpenAI-compatible endpoint, or a local model. Both take a system and a user text and give a `Reply`.

The endpoint's client is the standard library's. Rate limits, server errors, time-outs and broken answers are tried
again, with a pause that doubles and is never shorter than the server's Retry-After; what cannot get better is not.
"""

import email.utils
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpora.errors import UserError

__all__ = ["ChatClient", "Judge", "Reply", "local_judge"]

PAUSE = 1.0  # seconds before the first repetition; doubles
LONGEST_PAUSE = 60.0
LONGEST_RETRY_AFTER = 600.0  # a server that asks for more has failed
RETRIED = (408, 409, 425, 429)  # and every 5xx
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
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self.model, self.key = model, key
        self.timeout, self.retries, self.max_tokens = timeout, retries, max_tokens
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
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        request = urllib.request.Request(
            self.url,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            return self._refused(error)
        except TimeoutError:
            raise _Again(f"no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            raise _Again(f"the connection failed ({reason or type(error).__name__})") from None
        try:
            return _reply(json.loads(content))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _Again(f"the answer is not a chat completion ({content[:80]!r})") from None

    def _refused(self, error: urllib.error.HTTPError) -> Reply:
        """An HTTP error: raised to try again, raised as hopeless, or the reply for this prompt alone (too long, …)."""
        try:
            message = json.loads(error.read()[:10_000])["error"]["message"]
        except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
            message = error.reason
        text = f"HTTP {error.code}: {' '.join(str(message).split())[:300]}".replace(self.key, "…")
        if error.code in RETRIED or error.code >= 500:
            raise _Again(text, _seconds(error.headers.get("Retry-After")))
        if error.code in HOPELESS or error.code < 400:
            raise UserError(
                f"the judge {self.model} at {self.url} refuses every call ({text}); check the key, the name of the "
                "model and --base-url"
            )
        return Reply(text, "failed")


def _reply(answer: Any) -> Reply:
    """A chat completion. Raises one of the usual errors of access if it is not of that form."""
    choice = answer["choices"][0]
    message, usage = choice["message"], answer.get("usage") or {}
    counts = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    if message.get("refusal"):
        return Reply(str(message["refusal"]), "refused", *counts)
    text = message.get("content")
    if text is None and choice.get("finish_reason") == "content_filter":
        return Reply("the content filter withheld the answer", "refused", *counts)
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


def local_judge(directory: Path, device: str, max_tokens: int) -> Judge:
    """A local model as a judge: greedy, in its own chat template, system and user text in one turn."""
    from eval.chat_templates import chat_template
    from eval.mtbench import Answerer
    from quantization.loading import plan_run
    from quantization.named import named_recipe
    from quantization.options import chosen_device

    plan = plan_run(directory, named_recipe("fp16"), device=chosen_device(device))
    template = chat_template("auto", plan.tokenizer, plan.checkpoint.family_name)
    answerer = Answerer(plan.load(), template, seed=0, max_new_tokens=max_tokens, context=plan.context)

    def judge(system: str, user: str) -> Reply:
        ids = template.ids([f"{system}\n\n{user}"])
        (answer,) = answerer.complete([ids], [0.0], [None])
        if not answer.tokens:
            return Reply(f"the prompt of {len(ids)} tokens leaves no room in a context of {plan.context}", "failed")
        return Reply(answer.text, "answered", len(ids), answer.tokens)

    return judge
