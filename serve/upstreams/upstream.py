"""The one way out: an OpenAI-compatible server, asked over aiohttp, its failures translated here."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.request import getproxies

import aiohttp
import orjson
from yarl import URL

from serve.errors import UpstreamDown, UpstreamError, UpstreamRefused
from serve.wire.sse import DONE, EventTooLong, Parser, dumps

Connect = Callable[[], aiohttp.ClientSession]
CHAT = "/chat/completions"
NO_SUCH_MODEL = 404
DOWN = frozenset({401, 403, 407, 408, 409, 425, 429})
"""Client errors that are about us, our key or the moment, not about the request."""
TIMEOUTS = frozenset({408, 504, 524})
"""Of a gateway, behind which the model may have worked to the end."""
DRAIN_S = 0.05
"""How long the end of a connection's answer is waited for after [DONE], so that the connection can be kept."""
LONGEST_MESSAGE = 500
UNSENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
"""Failures that come before the server has the request."""


def connect(*, proxies: bool) -> Connect:
    """Makes sessions for upstreams. `proxies`: follow HTTPS_PROXY and its like."""

    def make() -> aiohttp.ClientSession:
        # No limit here: how many requests are let in is decided before they get this far. Where no proxy is
        # named, none is looked for: aiohttp would do so in a thread, for every request.
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=proxies and bool(getproxies()),
        )

    return make


@dataclass(frozen=True)
class Patience:
    """Seconds to wait: for a connection, and then between any two pieces of an answer."""

    connect: float = 5.0
    read: float = 120.0


class Server(Protocol):
    """An OpenAI-compatible server, or several that count as one."""

    @property
    def address(self) -> str:
        """Where it is, for messages."""

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A whole answer."""

    def chat_stream(self, body: Mapping[str, Any]) -> AsyncGenerator[bytes]:
        """The data of each event but the closing `[DONE]`."""

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object with which another path answers."""

    async def close(self) -> None:
        """Close its connections."""


class Upstream:
    """One server. Its connections are opened with the first request, in the loop that makes it.

    Args:
        connect: makes the session.
        base_url: up to and including `/v1`.
        who: `teacher` or `local`, for messages.
        key: bearer key, where it wants one.
        down: which client errors are not the request's fault.
        reconnect: ask once more where a connection is closed before any answer, as servers do with one that
            they find idle for too long just when it is used again.
        wall: seconds since 1970, for dates in Retry-After.
    """

    def __init__(
        self,
        connect: Connect,
        base_url: str,
        *,
        who: str,
        key: str | None = None,
        patience: Patience | None = None,
        down: frozenset[int] = DOWN,
        reconnect: bool = False,
        wall: Callable[[], float] = time.time,
    ) -> None:
        patience = patience or Patience()
        self.base_url = base_url.rstrip("/")
        self.who = who
        self._connect = connect
        self._wall = wall
        self._down_on = down
        self._tries = 2 if reconnect else 1
        url = URL(self.base_url)
        self._address = str(url.with_user(None)) if url.host else self.base_url
        self._secrets = [secret for secret in (key, url.password) if secret]
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {key}"} if key else {}
        )
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=patience.connect, sock_read=patience.read
        )
        self._read_s = patience.read
        self._urls: dict[str, URL] = {}
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    @property
    def address(self) -> str:
        """The base URL without a password."""
        return self._address

    async def close(self) -> None:
        """Close its connections; whoever asks it afterwards is told that it is down."""
        self._closed = True
        if self._session:
            await self._session.close()

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A whole answer: a chat.completion whose choices all hold a message and say why they ended.

        Raises:
            UpstreamDown, UpstreamRefused.
        """
        answer = await self.post(CHAT, body)
        choices = answer.get("choices")
        if not _are_choices(choices):
            raise self._down("answered without a chat message")
        if not all(choice.get("finish_reason") for choice in answer["choices"]):
            raise self._down("gave up in the middle of its answer (no finish_reason)")
        return answer

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object with which `path` (below the base URL, `/embeddings` for one) answers.

        Raises:
            UpstreamDown, UpstreamRefused.
        """
        async with self._open(path, body) as response:
            answer = _json_object(await self._all(response))
        if answer is None:
            raise self._down(f"answered {response.content_type} that is no JSON object")
        if answer.get("error"):
            raise self._failed(answer)
        return answer

    async def chat_stream(self, body: Mapping[str, Any]) -> AsyncGenerator[bytes]:
        """The data of each event but the closing `[DONE]`; every one is a chunk. Closing the iterator hangs up.

        Args:
            body: with `stream: true`.

        Raises:
            UpstreamDown, UpstreamRefused: also in the middle, where the stream is cut, stalls or is broken.
        """
        async with self._open(CHAT, body) as response:
            if response.content_type != "text/event-stream":
                raise self._down(f"answered {response.content_type} where a stream was asked for")
            parser, choices = Parser(), _Choices()
            while received := await self._piece(response):
                for data in self._events(parser, received):
                    if data != DONE:
                        self._read(choices, data)
                        yield data
                    elif choices.ended:
                        await _drain(response)
                        return
                    else:
                        raise self._down("ended its stream in the middle of its answer (no finish_reason)")
        if not choices.ended:
            raise self._down("ended its stream before it was complete")

    async def _all(self, response: aiohttp.ClientResponse) -> bytes:
        if response.content.is_eof():  # a short answer comes with its head: there is nothing to wait for
            return response.content.read_nowait()
        pieces = []
        while received := await self._piece(response):
            pieces.append(received)
        return b"".join(pieces)

    async def _piece(self, response: aiohttp.ClientResponse) -> bytes:
        """What has come since; empty at the end. aiohttp's own `sock_read` ends with the connection, and a
        reader that was not told of that end (after a broken chunk header, in 3.14) would wait for ever.
        """
        async with asyncio.timeout(self._read_s):
            return await response.content.readany()

    def _events(self, parser: Parser, received: bytes) -> list[bytes]:
        try:
            return parser.feed(received)
        except EventTooLong as error:
            raise self._down(f"sent a broken stream: {error}") from error

    def _read(self, choices: _Choices, data: bytes) -> None:
        chunk = _json_object(data)
        if chunk and chunk.get("error"):
            raise self._failed(chunk)
        if chunk is None or not choices.read(chunk.get("choices")):
            raise self._down(
                f"sent a broken stream: {self._without_secrets(_text(data))} is no chunk of an answer"
            )

    @asynccontextmanager
    async def _open(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Everything that can go wrong with the connection becomes one of our errors here."""
        try:
            async with await self._respond(path, dumps(body)) as response:
                if response.status != 200:
                    raise self._refusal(response, await self._all(response))
                yield response
        except TimeoutError as error:
            raise self._down("did not answer in time", billable=not isinstance(error, UNSENT)) from error
        except (aiohttp.ClientError, OSError) as error:
            what = self._without_secrets(f"{type(error).__name__}: {error}")
            billable = not isinstance(error, UNSENT)
            raise self._down(f"cannot be reached or broke off ({what})", billable=billable) from error

    async def _respond(self, path: str, data: bytes) -> aiohttp.ClientResponse:
        for left in reversed(range(self._tries)):
            if self._closed:
                raise self._down("was switched off", billable=False)
            if self._session is None:
                self._session = self._connect()
            url = self._urls.get(path) or self._urls.setdefault(path, URL(self.base_url + path))
            try:
                # A redirect is not followed: whoever is there was not chosen by the settings.
                return await self._session.post(
                    url, data=data, headers=self._headers, timeout=self._timeout, allow_redirects=False
                )
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                if not left or isinstance(error, aiohttp.ClientConnectorError):
                    raise
            except ValueError as error:  # an address that aiohttp cannot ask
                what = self._without_secrets(str(error))
                raise self._down(f"cannot be asked ({what})", billable=False) from error
        raise AssertionError("unreachable: the last try returns or raises")

    def _down(self, what: str, *, billable: bool = True) -> UpstreamDown:
        """Whoever has the request may have worked on it, whatever came of that."""
        message = f"{self.who} at {self._address} {what}"
        return UpstreamDown(self.who, message[:LONGEST_MESSAGE], billable=billable)

    def _failed(self, answer: Mapping[str, Any]) -> UpstreamDown:
        """For an error that comes as an answer, with status 200."""
        error = self._down(
            f"answered an error: {self._without_secrets(_said(answer) or str(answer['error']))}"
        )
        error.body = answer if isinstance(answer["error"], dict) else None
        return error

    def _refusal(self, response: aiohttp.ClientResponse, data: bytes) -> UpstreamError:
        status, body = response.status, _json_object(data)
        text = _said(body) or _text(data)
        if 300 <= status < 400:
            text = f"it moved to {response.headers.get('Location')}; set the address to that"
        refused = 400 <= status < 500 and status not in self._down_on
        shaped = body if body and isinstance(body.get("error"), dict) else None
        message = f"{self.who} at {self._address} answered HTTP {status}: {self._without_secrets(text)}"
        return (UpstreamRefused if refused else UpstreamDown)(
            self.who,
            message[:LONGEST_MESSAGE],
            status=status,
            body=shaped,
            billable=status in TIMEOUTS,
            retry_after=retry_after(response.headers.get("Retry-After"), self._wall()),
        )

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "<key>")
        return text


class _Choices:
    """Which choices a stream has begun, and which have said why they ended."""

    def __init__(self) -> None:
        self._begun: set[int] = set()
        self._ended: set[int] = set()

    @property
    def ended(self) -> bool:
        """All; token counts may still follow."""
        return bool(self._begun) and self._begun == self._ended

    def read(self, choices: Any) -> bool:
        """Whether these are a chunk's choices."""
        if not isinstance(choices, list):
            return False
        for choice in choices:
            if not isinstance(choice, dict) or not isinstance(index := choice.get("index", 0), int):
                return False
            self._begun.add(index)
            if choice.get("finish_reason"):  # some servers say "" until the end
                self._ended.add(index)
        return True


def retry_after(header: str | None, now: float) -> str | None:
    """Whole seconds from a Retry-After header, which may be a date; None where it says neither.

    Args:
        now: seconds since 1970.
    """
    text = (header or "").strip()
    try:
        plain = text.replace(".", "", 1).isdecimal()
        seconds = float(text) if plain else parsedate_to_datetime(text).timestamp() - now
        return str(max(0, math.ceil(seconds)))
    except (ValueError, TypeError, OverflowError):
        return None


def timed_out(error: BaseException) -> bool:
    """Whether the server had the request and said nothing for too long."""
    return isinstance(error.__cause__, TimeoutError) and not isinstance(error.__cause__, UNSENT)


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Read what is left behind [DONE]: a connection that has nothing left to read is used again."""
    if response.content.at_eof():
        return
    with suppress(TimeoutError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(DRAIN_S):
            async for _ in response.content.iter_any():
                pass


def _json_object(data: bytes) -> dict[str, Any] | None:
    try:
        value = orjson.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _said(body: Mapping[str, Any] | None) -> str | None:
    """The error's message, in OpenAI's shape or in Ollama's own."""
    found = body.get("error") if body else None
    said = found.get("message") if isinstance(found, dict) else found
    return said if isinstance(said, str) else None


def _text(data: bytes) -> str:
    return data[:200].decode(errors="replace")


def _are_choices(choices: Any) -> bool:
    return (
        isinstance(choices, list)
        and bool(choices)
        and all(isinstance(choice, dict) and isinstance(choice.get("message"), dict) for choice in choices)
    )
