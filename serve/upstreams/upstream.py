"""The one way out: an OpenAI-compatible server, asked over aiohttp, its failures translated here."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from serve.errors import UpstreamDown, UpstreamError, UpstreamRefused
from serve.wire.sse import DONE, EventTooLong, Parser, dumps

Connect = Callable[[], aiohttp.ClientSession]
DOWN = frozenset({401, 403, 407, 408, 409, 425, 429})
"""Client errors that are about us, our key or the moment, not about the request."""
LONGEST_MESSAGE = 500


def connect(*, proxies: bool) -> Connect:
    """Makes sessions for upstreams. `proxies`: follow HTTPS_PROXY and its like."""

    def make() -> aiohttp.ClientSession:
        # No limit here: how many requests are let in is decided before they get this far.
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=proxies)

    return make


@dataclass(frozen=True)
class Patience:
    """Seconds to wait: for a connection, and then between any two pieces of an answer."""

    connect: float = 5.0
    read: float = 120.0


class Upstream:
    """One server. Its connections are opened with the first request, in the loop that makes it.

    Args:
        connect: makes the session.
        base_url: up to and including `/v1`.
        who: `teacher` or `local`, for messages.
        key: bearer key, where it wants one.
    """

    def __init__(
        self,
        connect: Connect,
        base_url: str,
        *,
        who: str,
        key: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        patience = patience or Patience()
        self.base_url = base_url
        self.who = who
        self._connect = connect
        self._key = key
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {key}"} if key else {}
        )
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=patience.connect, sock_read=patience.read
        )
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def close(self) -> None:
        """Close its connections; whoever asks it afterwards is told that it is down."""
        self._closed = True
        if self._session:
            await self._session.close()

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A whole answer: a chat.completion with at least one choice that holds a message.

        Raises:
            UpstreamDown, UpstreamRefused.
        """
        async with self._post(body) as response:
            answer = _json_object(await response.read())
        choices = answer.get("choices") if answer else None
        if not answer or not _are_choices(choices):
            raise self._down("answered without a chat message")
        return answer

    async def chat_stream(self, body: Mapping[str, Any]) -> AsyncGenerator[bytes]:
        """The data of each event but the closing `[DONE]`; closing the iterator hangs up.

        Raises:
            UpstreamDown, UpstreamRefused: also in the middle, where the stream is cut or stalls.
        """
        async with self._post(body) as response:
            if response.content_type != "text/event-stream":
                raise self._down(f"answered {response.content_type} where a stream was asked for")
            parser = Parser()
            try:
                async for received in response.content.iter_any():
                    for data in parser.feed(received):
                        if data == DONE:
                            return
                        yield data
            except EventTooLong as error:
                raise self._down(f"sent a broken stream: {error}") from error
        raise self._down("ended its stream before it was complete")

    @asynccontextmanager
    async def _post(self, body: Mapping[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Everything that can go wrong with the connection becomes one of our errors here."""
        if self._closed:
            raise self._down("was switched off")
        if self._session is None:
            self._session = self._connect()
        data = dumps(body)
        try:
            async with self._session.post(
                f"{self.base_url}/chat/completions", data=data, headers=self._headers, timeout=self._timeout
            ) as response:
                if response.status != 200:
                    raise self._refusal(response, await response.read())
                yield response
        except TimeoutError as error:
            raise self._down("did not answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._down(f"cannot be reached or broke off ({type(error).__name__}: {error})") from error

    def _down(self, what: str) -> UpstreamDown:
        return UpstreamDown(self.who, f"{self.who} at {self.base_url} {what}"[:LONGEST_MESSAGE])

    def _refusal(self, response: aiohttp.ClientResponse, data: bytes) -> UpstreamError:
        status = response.status
        body = _json_object(data)
        found = body.get("error") if body else None
        said = found.get("message") if isinstance(found, dict) else None
        text = str(said or data[:200].decode(errors="replace"))
        if self._key:
            text = text.replace(self._key, "<key>")
        refused = 400 <= status < 500 and status not in DOWN
        return (UpstreamRefused if refused else UpstreamDown)(
            self.who,
            f"{self.who} at {self.base_url} answered HTTP {status}: {text}"[:LONGEST_MESSAGE],
            status=status,
            body=body if isinstance(found, dict) else None,
            retry_after=response.headers.get("Retry-After"),
        )


def _json_object(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _are_choices(choices: Any) -> bool:
    return (
        isinstance(choices, list)
        and bool(choices)
        and all(isinstance(choice, dict) and isinstance(choice.get("message"), dict) for choice in choices)
    )
