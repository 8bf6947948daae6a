"""Every way in which a server can fail, against every class that asks one, whole and streamed."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest

from serve.config import TeacherRules
from serve.errors import UpstreamDown, UpstreamError, UpstreamRefused
from serve.upstreams.dialects import OLLAMA
from serve.upstreams.local import LocalModel
from serve.upstreams.teacher import Teacher
from tests.serve.upstreams.conftest import Ask
from tests.serve.upstreams.raw_server import (
    CHUNKS,
    Behaviour,
    answered,
    begun,
    chunk,
    closed_port,
    completion,
    head,
    held,
    in_chunks,
    raw,
    reset,
    serving,
    sse,
    status,
    streamed,
    whole,
)

pytestmark = pytest.mark.asyncio
BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
SILENCE = ": working"
SHORT_S, LONG_S = 0.1, 10.0
WHOLE = json.dumps(completion()).encode()


@dataclass(frozen=True)
class Fault:
    """A behaviour, and what has to come of it."""

    behaviour: Behaviour
    says: str
    """What the message has to name."""
    error: type[UpstreamError] = UpstreamDown
    status: int | None = None
    asked: int = 3
    """How often a teacher with two retries is asked."""
    local: int = 1
    """How often a local model is asked: once more where a connection may have been closed for idleness."""


COMMON = {
    "reset": Fault(reset, "broke off", local=2),
    "hung up": Fault(raw(b"", hang_up=True), "broke off", local=2),
    "no http": Fault(raw(b"SSH-2.0-OpenSSH\r\n\r\n", hang_up=True), "broke off"),
    "cut head": Fault(raw(b"HTTP/1.1 200 OK\r\nContent-", hang_up=True), "broke off", local=2),
    "slow": Fault(held(), "did not answer in time", asked=1),
    "429": Fault(status(429, "slow down", "Retry-After: 7\r\n"), "slow down", status=429),
    "500": Fault(status(500, "out of memory"), "HTTP 500: out of memory", status=500),
    "502 of a proxy": Fault(answered("502 Bad", b"<h1>no</h1>", "text/html"), "<h1>no", status=502),
    "busy": Fault(answered("503 Busy", b'{"error": "server busy"}'), "server busy", status=503),
    "wrong key": Fault(status(401, "who are you?"), "who are you?", status=401, asked=1),
    "bad request": Fault(status(400, "no tools"), "no tools", UpstreamRefused, 400, asked=1),
    "wrong model": Fault(status(404, "no such model"), "no such model", status=404, asked=1),
    "moved": Fault(raw(head("308 Moved", "text/plain", 0, "Location: /v2\r\n")), "/v2", status=308, asked=1),
}
WHOLE_ONLY = {
    "broken gzip": Fault(answered("200 OK", b"not gzip", more="Content-Encoding: gzip\r\n"), "broke off"),
    "cut": Fault(raw(head("200 OK", "application/json", 500) + WHOLE, hang_up=True), "broke off"),
    "stalled": Fault(held(head("200 OK", "application/json", 500) + WHOLE), "in time", asked=1),
    "malformed": Fault(answered("200 OK", WHOLE[:-1]), "no JSON object"),
    "wrong type": Fault(answered("200 OK", b"<html>", "text/html"), "text/html"),
    "no choices": Fault(whole({"choices": []}), "without a chat message"),
    "no message": Fault(whole({"choices": [{"text": "hi"}]}), "without a chat message"),
    "gave up": Fault(whole(completion(reason=None)), "no finish_reason"),
    "error as answer": Fault(whole({"error": {"message": "runner died"}}), "runner died"),
    "Ollama's error": Fault(whole({"error": "runner died"}), "runner died"),
    "stream instead": Fault(streamed(), "text/event-stream"),
}
STREAM_ONLY = {
    "done at once": Fault(streamed("[DONE]"), "no finish_reason"),
    "nothing": Fault(raw(begun(SILENCE) + b"0\r\n\r\n"), "before it was complete"),
    "stalled": Fault(held(begun(SILENCE)), "in time", asked=1),
    "malformed": Fault(streamed("{not json"), "{not json"),
    "no chunk": Fault(streamed({"hello": 1}), "no chunk"),
    "wrong choices": Fault(streamed({"choices": ["hi"]}), "no chunk"),
    "garbled coding": Fault(raw(head("200 OK", "text/event-stream", None) + b"zz\r\n"), "broke off"),
    "wrong type": Fault(whole(), "application/json where a stream"),
    "error as event": Fault(streamed({"error": {"message": "runner died"}}), "runner died"),
}
IN_THE_MIDDLE: dict[str, tuple[bytes | None, str]] = {
    "cut": (b"", "broke off"),
    "stalled": (None, "in time"),
    "ended": (b"0\r\n\r\n", "before it was complete"),
    "ended as done": (in_chunks(sse("[DONE]"), last=True), "no finish_reason"),
    "malformed": (in_chunks(sse('{"choices": [}'), last=True), "no chunk"),
    "error": (in_chunks(sse({"error": {"message": "runner died"}}), last=False), "runner died"),
    "garbled coding": (b"zz\r\nrubbish\r\n\r\n", "in time"),
}
"""What comes behind the first event (None: nothing at all), and what the message has to name."""

WHOS = ["upstream", "teacher", "local"]


@pytest.fixture
def make(upstream: Ask) -> Callable[..., Any]:
    """The three that ask: bare, patient and local."""

    async def sleep(_: float) -> None:
        """No time for that."""

    async def stop() -> None:
        """Nothing was started."""

    def asker(who: str, url: str, fault: Fault | None = None) -> Any:
        read_s = SHORT_S if fault and fault.says.endswith("in time") else LONG_S
        server = upstream(url, "local" if who == "local" else "teacher", read_s)
        if who == "teacher":
            return Teacher(server, "m", rules=TeacherRules(retries=2), sleep=sleep)
        return LocalModel(server, "m", stop, dialect=OLLAMA) if who == "local" else server

    return asker


def expected(who: str, fault: Fault) -> tuple[type[UpstreamError], int]:
    """The error, and how often the server was asked."""
    if who == "upstream":
        return (UpstreamRefused if fault.status in (400, 404) else UpstreamDown), 1
    return fault.error, fault.asked if who == "teacher" else fault.local


async def collect(stream: AsyncGenerator[bytes]) -> list[Any]:
    async with aclosing(stream) as events:
        return [json.loads(data) async for data in events]


@pytest.mark.parametrize("who", WHOS)
@pytest.mark.parametrize("name", [*COMMON, *WHOLE_ONLY])
async def test_whole(make: Any, who: str, name: str) -> None:
    fault = (COMMON | WHOLE_ONLY)[name]
    error, asked = expected(who, fault)
    async with serving(fault.behaviour) as server:
        with pytest.raises(error) as raised:
            await make(who, server.url, fault).chat(BODY)
        assert fault.says in str(raised.value)
        assert raised.value.status == fault.status
        assert len(server.asked) == asked


@pytest.mark.parametrize("who", WHOS)
@pytest.mark.parametrize("name", [*COMMON, *STREAM_ONLY])
async def test_stream_before_its_first_event(make: Any, who: str, name: str) -> None:
    fault = (COMMON | STREAM_ONLY)[name]
    error, asked = expected(who, fault)
    async with serving(fault.behaviour) as server:
        with pytest.raises(error) as raised:
            await collect(make(who, server.url, fault).chat_stream(BODY | {"stream": True}))
        assert fault.says in str(raised.value)
        assert raised.value.status == fault.status
        assert len(server.asked) == asked


@pytest.mark.parametrize("who", WHOS)
@pytest.mark.parametrize("name", IN_THE_MIDDLE)
async def test_stream_in_the_middle(make: Any, who: str, name: str) -> None:
    """What has come is handed on, the failure is told, and nobody is asked twice."""
    rest, says = IN_THE_MIDDLE[name]
    fault = Fault(held(begun(chunk("Hel")), rest or b""), says)
    async with (
        serving(fault.behaviour) as server,
        aclosing(make(who, server.url, fault).chat_stream(BODY | {"stream": True})) as events,
    ):
        assert json.loads(await anext(events))["choices"][0]["delta"] == {"content": "Hel"}
        if rest is not None:
            server.go_on.set()
        with pytest.raises(UpstreamDown) as raised:
            await anext(events)
        assert says in str(raised.value)
        assert len(server.asked) == 1


@pytest.mark.parametrize("who", WHOS)
@pytest.mark.parametrize("stream", [False, True])
async def test_refused_connections(make: Any, who: str, stream: bool) -> None:
    with closed_port() as url:
        asker = make(who, url)
        with pytest.raises(UpstreamDown, match="cannot be reached"):
            await (collect(asker.chat_stream(BODY)) if stream else asker.chat(BODY))


@pytest.mark.parametrize("who", WHOS)
async def test_what_is_no_fault(make: Any, who: str) -> None:
    packed = gzip.compress(WHOLE)
    async with serving(
        whole(),
        answered("200 OK", packed, more="Content-Encoding: gzip\r\n"),
        streamed(),
        streamed(done=False),
        raw(head("200 OK", "text/event-stream", None) + in_chunks(sse(": hi", *CHUNKS), last=True)),
    ) as server:
        asker = make(who, server.url)
        for _ in range(2):
            assert (await asker.chat(BODY))["choices"][0]["message"]["content"] == "Hello"
        for _ in range(2):
            assert await collect(asker.chat_stream(BODY | {"stream": True})) == CHUNKS
        assert (server.connections, len(server.asked)) == (1, 4)


@pytest.mark.parametrize("who", WHOS)
@pytest.mark.parametrize("stream", [False, True])
async def test_whoever_goes_away_hangs_up(make: Any, who: str, stream: bool) -> None:
    async with serving(held(begun(chunk("Hel")) if stream else b"")) as server:
        asker = make(who, server.url)
        if stream:
            async with aclosing(asker.chat_stream(BODY | {"stream": True})) as events:
                await anext(events)
        else:
            asking = asyncio.create_task(asker.chat(BODY))
            await server.began.wait()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        await server.hung_up.wait()
