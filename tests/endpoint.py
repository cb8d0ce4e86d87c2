"""A real HTTP server that speaks the protocol of chat completions, as well or as badly as a test wants."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from eval.mtbench import judge_client

Answer = tuple[int, Any, dict[str, str]]  # status, body (JSON, or bytes as they are), headers


def grade(text: str = "Good. Rating: [[7]]", **message: Any) -> Answer:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}],
                 "usage": {"prompt_tokens": 1000, "completion_tokens": 100}}, {}  # fmt: skip


def error(status: int, message: str = "not now", **headers: str) -> Answer:
    return status, {"error": {"message": message}}, {name.replace("_", "-"): value for name, value in headers.items()}


class Endpoint:
    """A server on a free port. answer: what it says to the n-th call (from 0) with that body; requests: what came."""

    def __init__(self) -> None:
        self.answer: Callable[[int, dict[str, Any]], Answer] = lambda n, body: grade()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer.times.append(time.monotonic())
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                assert self.path == "/v1/chat/completions"
                try:
                    status, content, headers = outer.answer(number, body)
                finally:
                    with lock:
                        outer.at_once -= 1
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    for name, value in ({"Content-Length": str(len(data))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client had waited long enough

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """An endpoint that proxies do not hide, and clients that do not pause long."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(judge_client, "PAUSE", 0.01)
    server = Endpoint()
    try:
        yield server
    finally:
        server.close()
