"""A judge's endpoint at one boundary: its address, the key that goes there and nowhere else, and what comes back.

A server is a stranger. It may send more than a disk holds, a byte a second, a redirect to another server, or the key in
its messages. So an address is checked and has one spelling; redirects are not followed; a call has a time and a body
has a size; and texts of the server are shown without anything that looks like the key, whole, cut or encoded.
"""

import asyncio
import base64
import json
import logging
import re
import threading
import unicodedata
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from corpora.errors import UserError, one_line, said_by

__all__ = ["OPENAI", "Endpoint", "Key", "NoAnswer", "endpoint_address"]

OPENAI = "https://api.openai.com/v1"
SENT = ("host", "content-length", "content-type", "accept", "user-agent", "connection")
LARGEST = 8 << 20  # bytes of an answer; a judgement has a few thousand
PORTS = {"http": 80, "https": 443}
PIECE = 4  # letters of a key that give it away
SECRET = 8  # a shorter key is a word for a server that asks for none
MASKED = re.compile(r"\*{2,}|…|\.{3,}|•{2,}|x{4,}", re.IGNORECASE)  # as keys are shown in part
SHOWN = 300  # characters of a server's message


def endpoint_address(word: str) -> str:
    """An address of --base-url in its one spelling: small letters, no usual port, no slash at the end.

    Raises UserError for one that no request can go to, and for one with a user and a password, which is not shown.
    """
    example = "give one such as http://localhost:8000/v1"
    netloc = re.match(r"[^/]*//([^/?#]*)", word)
    if "@" in (netloc[1] if netloc else word):
        raise UserError(
            "--base-url holds a user or a password (before @), which is neither sent nor shown; put the key into a "
            "variable, and give the address without it"
        )
    try:
        parts = urlsplit(word)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"--base-url {word!r} is no address ({error}); {example}") from None
    if parts.scheme not in PORTS or not host or port == 0 or not word.isprintable() or re.search(r"[\s\\]", word):
        raise UserError(f"--base-url {word!r} is no address; {example}")
    if parts.query or parts.fragment or word.endswith(("?", "#")):
        raise UserError(f"--base-url {word!r} has a part behind ? or #, which is no part of an endpoint; {example}")
    host = f"[{host}]" if ":" in host else host
    address = f"{parts.scheme}://{host}{'' if port in (None, PORTS[parts.scheme]) else f':{port}'}{parts.path}"
    return address.rstrip("/")


class Key:
    """A judge's key, which is only ever sent. Raises UserError, without it, for what no HTTP header holds."""

    def __init__(self, key: str) -> None:
        if not key or not key.isascii() or not key.isprintable():
            raise UserError("the judge's key has characters that no HTTP header holds; give the variable another value")
        self._key = key
        forms = [key, quote(key, safe=""), key[::-1], key.encode().hex()]
        forms += [base64.b64encode(text.encode()).decode() for text in (key, f" {key}", f"  {key}")]
        letters = ["".join(filter(str.isalnum, form)).lower() for form in forms]
        size = PIECE if len(key) >= SECRET else len(letters[0])
        self._size = size if size >= PIECE else 0
        self._pieces = {text[at : at + size] for text in letters for at in range(len(text) - size + 1)}

    @property
    def header(self) -> str:
        """The value of Authorization."""
        return f"Bearer {self._key}"

    def removed_from(self, text: str) -> str:
        """A text that is kept as it is, but for the key itself."""
        return text.replace(self._key, "…") if len(self._key) >= SECRET else text

    def shown(self, text: str) -> str:
        """A server's message as one short line, without the words that hold a piece of the key, in whatever case,
        cut or spelled, or what a server puts in place of its middle."""
        line = one_line(unicodedata.normalize("NFKC", text[: 10 * SHOWN]))
        found = [(at, letter.lower()[:1]) for at, letter in enumerate(line) if letter.isalnum()]
        plain = "".join(letter for _, letter in found)
        hidden = {
            found[at + more][0]
            for at in range(len(plain) - self._size + 1)
            if self._size and plain[at : at + self._size] in self._pieces
            for more in range(self._size)
        }

        def word(match: re.Match[str]) -> str:
            secret = MASKED.search(match[0]) or not hidden.isdisjoint(range(match.start(), match.end()))
            return "…" if secret else match[0]

        return re.sub(r"\S+", word, line)[:SHOWN]


class NoAnswer(Exception):
    """A call that brought no whole answer; the message says why."""


@dataclass(frozen=True)
class Answered:
    """What a server sent. value: of its JSON, None if it is none."""

    status: int
    retry_after: str
    value: Any


class Endpoint:
    """An OpenAI-compatible server, asked through the library `openai`. Calls may come from several threads; all are
    made in one loop of their own, where a call can be left at any moment: with a server that drips, a limit for single
    reads never ends."""

    def __init__(self, address: str, key: Key, timeout: float) -> None:
        import openai  # half a second, which a local judge need not wait

        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it has a line for every call
        self.address, self.timeout = address, timeout
        try:
            http = _bounded_client(key, openai_too=address == OPENAI)
            # Repetitions of its own know neither broken answers nor a program that stops.
            self._client = openai.AsyncOpenAI(
                base_url=address, api_key="in the header", timeout=None, max_retries=0, http_client=http
            )
            # It imports much, for which no call's time is meant.
            self._completions = self._client.chat.completions.with_raw_response
        except (openai.OpenAIError, ValueError, TypeError, ImportError) as error:  # of variables such as https_proxy
            raise UserError(f"the connection to the judge cannot be set up ({key.shown(said_by(error))})") from None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def ask(self, **request: Any) -> Answered:
        """A call of chat completions. Raises NoAnswer if no whole answer comes in time."""
        return asyncio.run_coroutine_threadsafe(self._ask(request), self._loop).result()

    async def _ask(self, request: dict[str, Any]) -> Answered:
        import openai

        try:
            async with asyncio.timeout(self.timeout):
                raw = await self._completions.create(**request)
            response = raw.http_response
        except TimeoutError:
            raise NoAnswer(f"no answer within {self.timeout:g} s") from None
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, NoAnswer):
                raise error.__cause__ from None
            raise NoAnswer(f"the connection failed ({said_by(error.__cause__ or error)})") from None
        return Answered(response.status_code, response.headers.get("Retry-After", ""), _value(response.content))


def _bounded_client(key: Key, openai_too: bool) -> Any:
    """An HTTP client that sends little and takes little. openai_too: whether OpenAI's own headers are sent."""
    from openai import DefaultAsyncHttpxClient

    class Bounded(DefaultAsyncHttpxClient):
        async def send(self, request: Any, **options: Any) -> Any:
            # The library adds what the variables OPENAI_ORG_ID, OPENAI_PROJECT_ID and OPENAI_CUSTOM_HEADERS say.
            headers = {
                name: value
                for name, value in request.headers.items()
                if name in SENT or (openai_too and name.startswith("openai-"))
            }
            # Whoever compresses makes a large answer of a small one.
            headers |= {"Authorization": key.header, "Accept-Encoding": "identity"}
            sent = type(request)(
                request.method, request.url, headers=headers, content=request.content, extensions=request.extensions
            )
            response = await super().send(sent, **{**options, "stream": True, "follow_redirects": False})
            try:
                if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
                    raise NoAnswer("the answer is compressed, which it was not asked to be")
                content = bytearray()
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) > LARGEST:
                        raise NoAnswer(f"the answer is longer than {LARGEST >> 20} MB")
            finally:
                await response.aclose()
            # Of the other headers none is used; a charset would be believed.
            kept = {name: value for name, value in response.headers.items() if name.lower() == "retry-after"}
            return type(response)(response.status_code, headers=kept, content=bytes(content), request=request)

    return Bounded()


def _value(content: bytes) -> Any:
    """The value of JSON, with � for halves of characters (a server cuts an emoji in two); None for what is none."""
    try:
        text = json.dumps(json.loads(content), ensure_ascii=False)
        return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except (ValueError, RecursionError):
        return None
