"""A judge's endpoint as a stranger: what it may see, send and be, and whose grades are whose."""

import base64
import gzip
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from common import error_line
from endpoint import Endpoint, error, grade, serving

from corpora.errors import UserError
from corpora.json_lines import read_lines
from eval.__main__ import main
from eval.mtbench import endpoint as boundary
from eval.mtbench.answers import question_file, read_questions
from eval.mtbench.endpoint import OPENAI, Key, endpoint_address
from eval.mtbench.judge_client import ChatClient

KEY = "sk-proj-Ab3dEf6hIj9kLm2nOp5qRs8tUv1wXy4z"


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    with serving(monkeypatch) as server:
        yield server


@pytest.fixture
def other(monkeypatch) -> Iterator[Endpoint]:
    with serving(monkeypatch) as server:
        yield server


def client(endpoint: Endpoint, **options: Any) -> ChatClient:
    return ChatClient(endpoint.url, "judge-1", KEY, **{"timeout": 60.0, "retries": 0, **options})


def shares_a_piece(text: str, key: str, size: int = 4) -> bool:
    """Whether a text has so many characters of a key in a row, spaces and case aside."""
    plain = "".join(text.split()).lower()
    return any(key.lower()[at : at + size] in plain for at in range(len(key) - size + 1))


# the key --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_takes_the_key_or_the_answers_to_another_server(endpoint, other, status):
    endpoint.answer = lambda n, body: error(status, "moved", Location=f"{other.url}/chat/completions")
    with pytest.raises(UserError, match=f"refuses every call .HTTP {status}"):
        client(endpoint)("s", "u")
    assert (len(endpoint.requests), other.requests) == (1, [])
    assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}"


def test_a_server_sees_the_key_and_none_of_openais_variables(endpoint, monkeypatch):
    for name, value in (("OPENAI_ORG_ID", "org-1"), ("OPENAI_PROJECT_ID", "proj-1"), ("OPENAI_ADMIN_KEY", "sk-admin"),
                        ("OPENAI_CUSTOM_HEADERS", "X-Secret: s\nAuthorization: Bearer other")):  # fmt: skip
        monkeypatch.setenv(name, value)
    assert client(endpoint)("s", "u").outcome == "answered"
    (headers,) = endpoint.headers
    assert headers.keys() <= {"host", "content-length", "content-type", "accept", "user-agent", "connection",
                              "authorization", "accept-encoding"}  # fmt: skip
    assert (headers["authorization"], headers["accept-encoding"]) == (f"Bearer {KEY}", "identity")


ECHOES: dict[str, str] = {
    "whole": KEY,
    "in a sentence": f"Incorrect API key provided: {KEY}. You can find it",
    "first and last": f"Incorrect API key provided: {KEY[:5]}***{KEY[-2:]}.",
    "one letter each": f"{KEY[0]}••••{KEY[-1]}",
    "the last four": f"the key ending in {KEY[-4:]} is revoked",
    "upper case": KEY.upper(),
    "in lines": "\n".join(KEY[at : at + 3] for at in range(0, len(KEY), 3)),
    "spaced": " ".join(KEY),
    "with invisible characters": "\u200b".join(KEY),
    "full width": "".join(chr(ord(letter) + 0xFEE0) for letter in KEY),
    "of a URL": quote(f"Bearer {KEY}", safe=""),
    "backwards": KEY[::-1],
    "base64": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
    "hexadecimal": KEY.encode().hex(),
    "far behind": "x " * 140 + KEY,
}


@pytest.mark.parametrize("status", [400, 401, 429, 500, 200])
@pytest.mark.parametrize("case", ECHOES)
def test_no_part_of_the_key_is_shown_however_it_is_echoed(endpoint, case, status):
    endpoint.answer = lambda n, body: error(status, f"no: {ECHOES[case]} is wrong")
    try:
        told = client(endpoint)("s", "u").text
    except UserError as refused:
        told = str(refused).replace(endpoint.url, "")  # a port may look like a piece of it
    assert len(told) < 600
    assert "\n" not in told
    for form in (KEY, KEY[::-1], quote(f"Bearer {KEY}", safe="")[8:], KEY.encode().hex(),
                 base64.b64encode(f"Bearer {KEY}".encode()).decode()[10:]):  # fmt: skip
        assert not shares_a_piece(told, form), told
    assert "***" not in told


def test_messages_stay_readable():
    assert Key(KEY).shown("HTTP 400: maximum context length is 10 tokens") == (
        "HTTP 400: maximum context length is 10 tokens"
    )
    assert Key("x").shown("HTTP 500: exit 1") == "HTTP 500: exit 1"  # any word, for a server that asks for none
    assert Key(KEY).shown("\x1b[2Ja\r\nb") == "\\u001b[2Ja b"


def test_an_answer_that_holds_the_key_is_kept_without_it(endpoint):
    endpoint.answer = lambda n, body: grade(f"Your key is {KEY}. [[7]]")
    assert client(endpoint)("s", "u").text == "Your key is …. [[7]]"


@pytest.mark.parametrize("key", ["sk-a\nsk-b", "sk-\x00b", "ské", "sk-\udcff", "sk-中"])
def test_a_key_that_no_header_holds_is_refused_without_it(key):
    with pytest.raises(UserError, match="characters that no HTTP header holds") as caught:
        Key(key)
    assert "sk" not in str(caught.value)


# what comes back ------------------------------------------------------------------------------------------------------


class Raw:
    """A server that answers every call with what `send` writes to the connection."""

    def __init__(self, send: Callable[[socket.socket], None]) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.send = send
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with closing(connection):
            try:
                connection.recv(1 << 16)
                self.send(connection)
            except OSError:
                pass


def drip(data: bytes) -> Callable[[socket.socket], None]:
    def send(connection: socket.socket) -> None:
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)

    return send


def endless(start: bytes) -> Callable[[socket.socket], None]:
    def send(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(b" " * (1 << 16))

    return send


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
GOOD = json.dumps(grade()[1]).encode()
STRANGERS: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "a body a byte at a time": (drip(HEAD + b"Content-Length: 100000\r\n\r\n" + b" " * 9999), "within 1 s"),
    "headers a byte at a time": (drip(HEAD * 1000), "no answer within 1 s"),
    "an error a byte at a time": (drip(b"HTTP/1.1 500 No\r\nContent-Length: 9999\r\n\r\n" + b" " * 9999), "within 1 s"),
    "gigabytes": (endless(HEAD + b"Content-Length: 5000000000\r\n\r\n"), "is longer than 1 MB"),
    "gigabytes of an error": (endless(b"HTTP/1.1 400 No\r\nContent-Length: 5000000000\r\n\r\n"), "is longer than 1 MB"),
    "an endless header": (endless(HEAD + b"X: "), "the connection failed"),
    "no HTTP": (lambda c: c.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), "the connection failed"),
    "nothing": (lambda c: None, "the connection failed"),
    "a compressed answer": (
        lambda c: c.sendall(HEAD + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\n" + gzip.compress(GOOD)),
        "compressed",
    ),
    "a length that lies": (lambda c: c.sendall(HEAD + b"Content-Length: 99999\r\n\r\n" + GOOD), "connection failed"),
    "a negative length": (lambda c: c.sendall(HEAD + b"Content-Length: -1\r\n\r\n" + GOOD), "connection failed"),
    "chunks that are none": (
        lambda c: c.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + GOOD), "connection failed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGERS)
def test_a_call_has_a_time_and_an_answer_a_size(monkeypatch, case):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(boundary, "LARGEST", 1 << 20)
    send, named = STRANGERS[case]
    server = Raw(send)
    timeout = 1.0 if "within 1 s" in named else 60.0
    judge, started = ChatClient(server.url, "m", KEY, timeout=timeout, retries=0), time.monotonic()
    reply = judge("s", "u")
    assert time.monotonic() - started < 50  # a byte at a time takes minutes
    assert reply.outcome == "failed"
    assert named in reply.text
    server.socket.close()


def completion(**parts: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": "[[7]]"}, "finish_reason": "stop"}], **parts}


NO_COMPLETIONS: dict[str, Any] = {
    "no JSON": b"<html>",
    "other bytes": b"\xff\xfe\x00",
    "deep": b"[" * 200_000,
    "a long integer": b'{"choices": ' + b"9" * 5000 + b"}",
    "a list": [],
    "null": None,
    "choices a text": {"choices": "abc"},
    "choices an object": {"choices": {"0": {}}},
    "choices of null": {"choices": [None]},
    "no message": {"choices": [{}]},
    "a message of text": {"choices": [{"message": "[[7]]"}]},
    "a number as text": {"choices": [{"message": {"content": 7}}]},
    "parts of text": {"choices": [{"message": {"content": ["[[7]]"]}}]},
    "a refusal that is a list": {"choices": [{"message": {"content": "a", "refusal": ["b"]}}]},
}


@pytest.mark.parametrize("case", NO_COMPLETIONS)
def test_what_is_no_completion_is_no_grade(endpoint, case):
    endpoint.answer = lambda n, body: (200, NO_COMPLETIONS[case], {"Content-Type": "application/json; charset=zip"})
    reply = client(endpoint)("s", "u")
    assert (reply.outcome, reply.text[:37]) == ("failed", "the answer is not a chat completion (")


@pytest.mark.parametrize("usage", [None, "many", [], {"prompt_tokens": "9"}, {"prompt_tokens": -1},
                                   {"prompt_tokens": 10**30, "completion_tokens": True}])  # fmt: skip
def test_counts_that_are_none_cost_no_grade(endpoint, usage):
    endpoint.answer = lambda n, body: (200, completion(usage=usage), {"Content-Type": "text/plain; charset=rot13"})
    reply = client(endpoint)("s", "u")
    assert (reply.text, reply.outcome, reply.prompt_tokens, reply.completion_tokens) == ("[[7]]", "answered", 0, 0)


def test_a_number_that_is_not_finite_costs_no_grade(endpoint):
    body = json.dumps(completion()).replace('"stop"', '"stop", "logprobs": [NaN, 1e999]').encode()
    endpoint.answer = lambda n, _: (200, body, {})
    assert client(endpoint)("s", "u").text == "[[7]]"


def completion_of(escaped: bytes) -> bytes:
    return json.dumps(completion()).encode().replace(b"[[7]]", escaped)


def test_an_emoji_that_a_server_cut_is_kept_as_a_sign(endpoint):
    endpoint.answer = lambda n, body: (
        200,
        rb'{"choices": [{"message": {"content": "\ud83d\ude00 \ud83d [[7]]"}}]}',
        {},
    )
    assert client(endpoint)("s", "u").text == "😀 � [[7]]"


@pytest.mark.parametrize(("after", "waits"), [
    ("nan", True), ("-1", True), ("inf", True), ("soon", True), ("", True), ("Mon, 99 Xxx 0000 99:99:99 GMT", True),
    ("1e308", False), ("Fri, 31 Dec 9999 23:59:59 GMT", False), ("601", False),
])  # fmt: skip
def test_a_retry_after_that_makes_no_sense_is_none(endpoint, after, waits):
    endpoint.answer = lambda n, body: error(429, Retry_After=after) if n == 0 else grade()
    reply = client(endpoint, retries=1)("s", "u")
    assert reply.outcome == ("answered" if waits else "failed")
    assert len(endpoint.requests) == (2 if waits else 1)
    assert len(reply.text) < 100


# addresses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "address"), [
    ("http://localhost:8000/v1", "http://localhost:8000/v1"),
    ("HTTPS://API.OpenAI.com:443/v1/", OPENAI),
    ("http://[::1]:80/v1//", "http://[::1]/v1"),
    ("http://127.0.0.1", "http://127.0.0.1"),
    ("https://gateway/@cf/v1", "https://gateway/@cf/v1"),
])  # fmt: skip
def test_an_address_has_one_spelling(word, address):
    assert endpoint_address(word) == endpoint_address(address) == address


@pytest.mark.parametrize("word", [
    "", "localhost:8000/v1", "ftp://x", "http://", "http:// x", "http://[::1", "http://h:99999/v1", "http://h:x/v1",
    "http://h:0", "http://h/v1?key=s", "http://h/v1#a", "http://h\\evil/v1", "http://h/v1\n", "http://h/\x1b[2J",
    "http://h/\u202ev1", "//h/v1", "http:///v1", "https://",
])  # fmt: skip
def test_what_is_no_address_is_refused_before_anything_is_sent(word):
    with pytest.raises(UserError, match=r"--base-url .*give one such as"):
        endpoint_address(word)


@pytest.mark.parametrize("word", [
    "http://user:hunter2@h/v1", "http://hunter2@h", "http://user:hunter2@h:99999", "user:hunter2@h", "http://u:hunter2@[::1",
])  # fmt: skip
def test_a_password_in_an_address_is_neither_sent_nor_shown(word):
    with pytest.raises(UserError, match="holds a user or a password") as caught:
        endpoint_address(word)
    assert "hunter2" not in str(caught.value)


# the program ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def answers(intactkv_root: Path) -> Path:
    path = intactkv_root / "m-seed_42.jsonl"
    rows = [{"question_id": q.id, "model_id": "../../ESCAPED", "choices": [{"turns": [f"says {q.id}", "more"]}]}
            for q in read_questions(question_file("sample"))[:2]]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def program(monkeypatch, run_main, answers):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    common = ("--answers", answers, "--judge-model", "org/judge-1", "--retries", 0, "--timeout", 60)
    return partial(run_main, main, "judge", *common)


def judgements(root: Path) -> Path:
    return root / "outputs/mt_bench/model_judgment/org-judge-1_single.jsonl"


def test_grades_of_one_name_at_two_addresses_are_two_peoples(program, endpoint, other, intactkv_root):
    endpoint.answer, other.answer = (lambda n, body: grade("[[3]]")), (lambda n, body: grade("[[9]]"))
    for server, mean in ((endpoint, "3.00"), (other, "9.00"), (endpoint, "3.00")):
        code, out, err = program("--base-url", server.url)
        assert code == 0, err
        assert f" {mean} " in out
        assert f"the judge is at {server.url}" in out
    assert (len(endpoint.requests), len(other.requests)) == (4, 4)
    lines = read_lines(judgements(intactkv_root), "it")
    assert sorted((line["endpoint"], line["score"]) for line in lines) == sorted(
        [(endpoint.url, 3)] * 4 + [(other.url, 9)] * 4
    )
    records = [json.loads(path.read_text()) for path in (intactkv_root / "outputs/runs").glob("judge-*.json")]
    assert {record["settings"]["endpoint"] for record in records} == {endpoint.url, other.url}
    # The same server, spelled otherwise.
    assert program("--base-url", endpoint.url.replace("http", "HTTP") + "/")[0] == 0
    assert len(endpoint.requests) == 4


def test_grades_without_an_address_are_openais_or_their_owner_says_whose(program, endpoint, intactkv_root, monkeypatch):
    assert program("--base-url", endpoint.url)[0] == 0
    path = judgements(intactkv_root)
    rows = [{name: part for name, part in line.items() if name != "endpoint"} for line in read_lines(path, "it")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # as they were written before
    before = path.read_bytes()
    line = error_line(program("--base-url", endpoint.url)[2])
    assert "judgements of these answers by org/judge-1 that name no address" in line
    assert (len(endpoint.requests), path.read_bytes()) == (4, before)
    # They count as OpenAI's: nothing is sent there, and the record is called as before.
    monkeypatch.setattr(ChatClient, "__call__", lambda *_: pytest.fail("paid twice"))
    code, out, err = program()
    assert code == 0, err
    assert "the judge is at" not in out
    assert path.read_bytes() == before
    # The command of the message tells whose they are.
    command = line.partition("such as ")[2].partition(", or move")[0]
    assert os.system(command) == 0
    assert {row["endpoint"] for row in read_lines(path, "it")} == {endpoint.url}
    code, out, err = program("--base-url", endpoint.url)
    assert code == 0, err
    assert len(endpoint.requests) == 4


def test_judges_of_long_names_have_files_of_their_own(program, endpoint, intactkv_root):
    for name, mean in (("a" * 300, "3.00"), ("a" * 299 + "b", "9.00")):
        endpoint.answer = lambda n, body, mean=mean: grade(f"[[{mean}]]")
        code, out, err = program("--base-url", endpoint.url, "--judge-model", name)
        assert code == 0, err
        assert f" {mean} " in out
    files = list(judgements(intactkv_root).parent.iterdir())
    assert len(files) == 2
    assert all(file.name.startswith("a" * 100) and len(file.name) < 180 for file in files)


def test_old_grades_of_other_answers_count_nowhere_while_the_judge_is_down(program, endpoint, answers):
    assert program("--base-url", endpoint.url)[0] == 0
    answers.write_text(answers.read_text().replace("says", "now says"))
    endpoint.answer = lambda n, body: error(503)
    code, out, err = program("--base-url", endpoint.url, "--concurrency", 1)
    assert code == 2
    assert "4 of 4 judgements are unscored" in error_line(err)
    assert "7.00" not in out


BAD: dict[str, tuple[list[object], str]] = {
    "a timeout that is no number": (["--timeout", "nan"], "--timeout: nan is not allowed"),
    "an endless timeout": (["--timeout", "inf"], "--timeout: inf is not"),
    "no time": (["--timeout", "0"], "--timeout: 0 is not"),
    "a negative time": (["--timeout", "-1"], "--timeout: -1 is not"),
    "too many calls": (["--concurrency", 10**22], "--concurrency: 10000000000000000000000 is not"),
    "too many repetitions": (["--retries", 10**22], "--retries: 10000000000000000000000 is not"),
    "negative repetitions": (["--retries", "-1"], "--retries: -1 is not"),
    "a price that is none": (["--price-in", "nan", "--price-out", "1"], "--price-in: nan is not"),
    "a negative price": (["--price-in", "1", "--price-out", "-1"], "--price-out: -1 is not"),
    "too many tokens": (["--max-tokens", 10**22], "--max-tokens: 10000000000000000000000 is not"),
    "a key as a variable": (["--key-variable", KEY], "--key-variable takes the name of a variable"),
    "a name of several lines": (["--judge-model", "a\nb"], "--judge-model: 'a\\nb' is not allowed"),
    "a password": (["--base-url", "http://u:hunter2@h"], "holds a user or a password"),
    "a password and a line end": (["--base-url", "http://u:hunter2@h\n"], "--base-url: what was given is not allowed"),
    "a key and a line end": (["--key-variable", f"{KEY}\n"], "--key-variable: what was given is not allowed"),
    "a long key as a variable": (["--key-variable", KEY * 9], "--key-variable takes the name of a variable"),
    "a port": (["--base-url", "http://h:99999"], "--base-url 'http://h:99999' is no address"),
    "a folder of answers": (["--answers", "."], "is a folder"),
    "a device of answers": (["--answers", "/dev/zero"], "is a pipe or device"),
    "a folder of prompts": (["--prompts", "."], "is a folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_nonsense_is_one_line_and_nothing_is_sent_or_written(case, program, endpoint, intactkv_root):
    arguments, named = BAD[case]
    before = sorted(intactkv_root.rglob("*"))
    code, out, err = program("--base-url", endpoint.url, *arguments)
    assert (code, out) == (2, "")
    assert named in error_line(err)
    assert KEY[:9] not in err
    assert "hunter2" not in err
    assert (endpoint.requests, sorted(intactkv_root.rglob("*"))) == ([], before)


def test_a_key_of_two_lines_is_not_shown_by_the_program(program, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-first\nsk-second")
    assert "first" not in error_line(program("--base-url", endpoint.url)[2])
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")  # as `$(cat FILE)` of some shells leaves it
    assert program("--base-url", endpoint.url)[0] == 0
    assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}"


def test_names_that_look_like_paths_and_steer_terminals_do_neither(program, endpoint, intactkv_root, tmp_path):
    around = set(tmp_path.parent.rglob("*"))
    code, out, err = program("--base-url", endpoint.url, "--judge-model", "../../../org/judge")
    assert code == 0, err
    new = set(tmp_path.parent.rglob("*")) - around
    assert new
    assert all(path.is_relative_to(intactkv_root / "outputs") for path in new)
    endpoint.answer = lambda n, body: error(500, "\x1b]0;owned\x07\r\n\x9b2J\u202e")
    code, out, err = program("--base-url", endpoint.url)
    assert code == 2
    assert "\\u001b]0;owned\\u0007 \\u009b2J\\u202e" in error_line(err)
    assert not set("\x1b\x07\x9b\u202e") & set(out + err)


def test_a_prompt_asks_for_texts_and_for_nothing_else(program, endpoint, tmp_path):
    """A format may ask for a field of what is filled in, or for gigabytes of spaces."""
    prompts = tmp_path / "p.jsonl"
    for place in ("{answer.__class__}", "{answer[0]}", "{answer:>9999999999}", "{answer!r}", "{0}", "{", "{}"):
        prompts.write_text(json.dumps({"name": "single-v1", "system_prompt": "", "prompt_template": place}) + "\n")
        code, _, err = program("--base-url", endpoint.url, "--prompts", prompts)
        assert code == 2
        assert "'prompt_template'" in error_line(err)
    prompts.write_text((json.dumps({"name": "n", "system_prompt": "", "prompt_template": "{answer}"}) + "\n") * 2)
    assert "has 'n' twice" in error_line(program("--base-url", endpoint.url, "--prompts", prompts)[2])
    assert endpoint.requests == []


DAMAGED: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "a broken line inside": lambda rows: "\n".join(['{"question_id": 1, "mod', *map(json.dumps, rows)]) + "\n",
    "no address": lambda rows: "".join(json.dumps(row | {"endpoint": 7}) + "\n" for row in rows),
    "a grade in words": lambda rows: "".join(json.dumps(row | {"score": "9"}) + "\n" for row in rows),
    "a grade that is none": lambda rows: "".join(json.dumps(row | {"score": float("nan")}) + "\n" for row in rows),
    "no judge": lambda rows: "".join(json.dumps(row | {"judge": None}) + "\n" for row in rows),
    "a model that is a list": lambda rows: "".join(json.dumps(row | {"model": ["m"]}) + "\n" for row in rows),
    "counts in words": lambda rows: "".join(json.dumps(row | {"usage": {"prompt_tokens": "9"}}) + "\n" for row in rows),
    "a third turn": lambda rows: "".join(json.dumps(row | {"turn": 3}) + "\n" for row in rows),
    "an outcome of its own": lambda rows: "".join(json.dumps(row | {"outcome": "good"}) + "\n" for row in rows),
    "something else": lambda rows: "my notes\n",
    "without an end": lambda rows: "my notes",
    "questions": lambda rows: question_file("sample").read_text(),
    "deep": lambda rows: '{"question_id": ' + "[" * 100_000,
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_file_of_judgements_that_is_damaged_or_anothers_stays_as_it_is(case, program, endpoint, intactkv_root):
    assert program("--base-url", endpoint.url)[0] == 0
    path = judgements(intactkv_root)
    path.write_text(DAMAGED[case](read_lines(path, "it")))
    before, asked = path.read_bytes(), len(endpoint.requests)
    code, out, err = program("--base-url", endpoint.url)
    assert (code, out) == (2, "")
    assert f"{path}, line " in error_line(err)
    assert (path.read_bytes(), len(endpoint.requests)) == (before, asked)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no lock stays


@pytest.mark.parametrize("kind", ["a link", "a pipe", "a folder"])
def test_judgements_are_appended_to_plain_files_only(kind, program, endpoint, intactkv_root, tmp_path):
    path, elsewhere = judgements(intactkv_root), tmp_path / "elsewhere"
    path.parent.mkdir(parents=True)
    elsewhere.write_text("")
    {"a link": lambda: path.symlink_to(elsewhere), "a pipe": lambda: os.mkfifo(path), "a folder": path.mkdir}[kind]()
    code, _, err = program("--base-url", endpoint.url)
    assert code == 2
    assert "not a plain file" in error_line(err)
    assert (endpoint.requests, elsewhere.read_text()) == ([], "")
