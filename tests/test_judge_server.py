"""The judge's client and a real HTTP server that limits rates, hangs, breaks its answers and refuses."""

import email.utils
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from endpoint import Answer, Endpoint, error, grade, serving

from corpora.errors import UserError
from eval.mtbench.judge_client import ChatClient


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    with serving(monkeypatch) as server:
        yield server


def client(endpoint: Endpoint, **options: Any) -> ChatClient:
    return ChatClient(endpoint.url, "judge-1", "secret-key", **{"timeout": 60.0, "retries": 3, **options})


# the client -----------------------------------------------------------------------------------------------------------


def test_a_call_speaks_the_protocol(endpoint):
    reply = client(endpoint, max_tokens=77)("be fair", "grade this")
    assert (reply.text, reply.outcome, reply.prompt_tokens, reply.completion_tokens) == (
        "Good. Rating: [[7]]", "answered", 1000, 100,
    )  # fmt: skip
    assert endpoint.requests == [
        {
            "model": "judge-1",
            "messages": [{"role": "system", "content": "be fair"}, {"role": "user", "content": "grade this"}],
            "temperature": 0,
            "max_tokens": 77,
        }
    ]
    assert endpoint.headers[0]["authorization"] == "Bearer secret-key"


def test_a_model_that_knows_other_settings_is_asked_as_it_wants(endpoint):
    """As OpenAI's reasoning models answer: one complaint a setting, and the next call says both."""

    def answer(number, body):
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if "temperature" in body:
            return error(400, "Unsupported value: 'temperature' does not support 0 with this model.")
        return grade()

    endpoint.answer = answer
    judge = client(endpoint, max_tokens=77)
    assert [judge("s", "u").outcome for _ in range(2)] == ["answered"] * 2
    assert [sorted(set(body) - {"model", "messages"}) for body in endpoint.requests] == [
        ["max_tokens", "temperature"], ["max_completion_tokens", "temperature"], ["max_completion_tokens"],
        ["max_completion_tokens"],
    ]  # fmt: skip
    assert endpoint.requests[-1]["max_completion_tokens"] == 77


def test_another_complaint_about_a_setting_fails_and_is_not_asked_for_ever(endpoint):
    endpoint.answer = lambda n, body: error(400, "temperature and max_completion_tokens are both wrong")
    assert client(endpoint)("s", "u").outcome == "failed"
    assert len(endpoint.requests) == 3


HICCUPS: dict[str, Answer] = {
    "rate limit": error(429),
    "server error": error(500),
    "bad gateway in words": (502, b"<html>bad gateway</html>", {}),
    "broken JSON": (200, b'{"choices": [{"mess', {}),
    "another form": (200, {"id": 1}, {}),
    "no choices": (200, {"choices": []}, {}),
    "no text": (200, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}, {}),
    "an error that says it is none": (200, {"error": {"message": "overloaded"}}, {}),
    "an answer that ends early": (200, b'{"choices": []', {"Content-Length": "5000"}),
}


@pytest.mark.parametrize("case", HICCUPS)
def test_what_may_get_better_is_asked_again(endpoint, case):
    endpoint.answer = lambda n, body: HICCUPS[case] if n < 2 else grade()
    assert client(endpoint)("s", "u").outcome == "answered"
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize("case", HICCUPS)
def test_what_does_not_get_better_is_a_failure_after_all_attempts(endpoint, case):
    endpoint.answer = lambda n, body: HICCUPS[case]
    reply = client(endpoint, retries=1)("s", "u")
    assert reply.outcome == "failed"
    assert reply.text
    assert len(endpoint.requests) == 2


def test_a_server_that_hangs_is_left_and_asked_again(endpoint):
    ended, judge = threading.Event(), client(endpoint, timeout=0.5, retries=1)

    def hangs(n: int, body: dict[str, Any]) -> Answer:
        judge._endpoint.timeout = 60  # of the next call, which is answered
        if n == 0:
            ended.wait(60)
        return grade()

    endpoint.answer = hangs
    assert judge("s", "u").outcome == "answered"
    assert len(endpoint.requests) == 2
    endpoint.answer = lambda n, body: hangs(0, body)
    reply = client(endpoint, timeout=0.5, retries=0)("s", "u")
    ended.set()
    assert reply.outcome == "failed"
    assert "within 0.5 s" in reply.text


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(endpoint, form):
    def answer(n: int, body: dict[str, Any]) -> Answer:
        after = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
        return error(429, Retry_After=after) if n == 0 else grade()

    endpoint.answer = answer
    assert client(endpoint)("s", "u").outcome == "answered"
    assert endpoint.times[1] - endpoint.times[0] >= 0.9


def test_a_server_that_wants_an_hour_has_failed_and_pauses_grow(endpoint, monkeypatch):
    endpoint.answer = lambda n, body: error(429, Retry_After="3600")
    reply = client(endpoint)("s", "u")
    assert reply.outcome == "failed"
    assert "wait 3600 s" in reply.text
    assert len(endpoint.requests) == 1
    waits: list[float] = []
    asked = client(endpoint, retries=4)
    monkeypatch.setattr(asked._stopped, "wait", waits.append)
    endpoint.answer = lambda n, body: error(503)
    asked("s", "u")
    assert all(0.005 * 2**i <= wait <= 0.01 * 2**i for i, wait in enumerate(waits))
    assert len(waits) == 4


@pytest.mark.parametrize("status", [401, 403, 404, 302, 307])
def test_a_wrong_key_name_or_address_ends_everything_and_the_key_is_not_shown(endpoint, status):
    elsewhere = f"{endpoint.url}/chat/completions"  # where the key must not be sent
    endpoint.answer = lambda n, body: error(status, "no such thing for secret-key", Location=elsewhere)
    with pytest.raises(UserError, match=f"refuses every call .HTTP {status}: .*check the key") as caught:
        client(endpoint)("s", "u")
    assert "secret-key" not in str(caught.value)
    assert len(endpoint.requests) == 1


def test_a_prompt_that_is_too_long_fails_alone_and_a_refusal_is_an_answer(endpoint):
    endpoint.answer = lambda n, body: error(400, "maximum context length is 10 tokens")
    reply = client(endpoint)("s", "u")
    assert (reply.outcome, len(endpoint.requests)) == ("failed", 1)
    assert "HTTP 400: maximum context" in reply.text
    withheld = {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}
    for answer in (grade(None, refusal="I cannot grade this."), (200, withheld, {})):
        endpoint.answer = lambda n, body, answer=answer: answer
        assert client(endpoint)("s", "u").outcome == "refused"


EMPTY: dict[str, Answer] = {
    "no word": grade(""),
    "all room reasoned away": (200, {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}, {}),
    "reasoning in a field": grade(None, reasoning_content="It is a [[5]]."),
    "reasoning in a field of another name": grade(None, reasoning="It is a [[5]]."),
    "parts": grade([{"type": "thinking", "thinking": [{"type": "text", "text": "[[5]]"}]}]),
}


@pytest.mark.parametrize("case", EMPTY)
def test_a_judge_that_says_nothing_has_answered(endpoint, case):
    endpoint.answer = lambda n, body: EMPTY[case]
    reply = client(endpoint)("s", "u")
    assert (reply.text, reply.outcome, len(endpoint.requests)) == ("", "answered", 1)


def test_the_reasoning_of_a_server_is_no_part_of_the_text(endpoint):
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "[[5]]"}]}, {"type": "text", "text": "[[9]]"}]
    for answer in (grade("[[9]]", reasoning_content="[[5]]"), grade(parts)):
        endpoint.answer = lambda n, body, answer=answer: answer
        assert client(endpoint)("s", "u").text == "[[9]]"


def test_a_judge_that_is_not_there_fails(endpoint):
    endpoint.close()
    reply = client(endpoint, retries=1)("s", "u")
    assert reply.outcome == "failed"
    assert "connection failed" in reply.text


@pytest.mark.parametrize("key", ["secret\nkey", "sécret-key"])
def test_a_key_that_no_header_holds_is_refused_and_not_shown(key):
    with pytest.raises(UserError, match="the judge's key has characters") as caught:
        ChatClient("http://localhost:8000/v1", "m", key)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x", ""])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(UserError, match="--base-url"):
        ChatClient(url, "m", "k")
