from __future__ import annotations

import asyncio
import errno
import inspect
from typing import Any

import aiohttp
import pytest
from aiohttp import client_exceptions
from aiohttp.client_reqrep import ConnectionKey
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from serve.errors import UpstreamDown, UpstreamRefused
from serve.upstreams.upstream import Upstream, connect, retry_after, timed_out
from tests.serve.upstreams.conftest import Ask
from tests.serve.upstreams.raw_server import (
    CHUNKS,
    begun,
    chunk,
    closed_port,
    held,
    in_chunks,
    raw,
    serving,
    status,
    streamed,
    whole,
)

BODY = {"model": "m", "messages": []}
WEBSOCKETS_ONLY = {"WSMessageTypeError"}


def _exceptions() -> list[type[Exception]]:
    found = inspect.getmembers(client_exceptions, inspect.isclass)
    return [kind for name, kind in found if issubclass(kind, Exception) and name not in WEBSOCKETS_ONLY]


def _made(kind: type[Exception]) -> Exception:
    """An instance, whatever its constructor wants."""
    url = URL("http://127.0.0.1/v1")
    key = ConnectionKey("127.0.0.1", 80, False, True, None, None, None)
    information = aiohttp.RequestInfo(url, "POST", CIMultiDictProxy(CIMultiDict()), url)
    wanted: dict[str, Any] = {
        "request_info": information,
        "history": (),
        "connection_key": key,
        "os_error": OSError(errno.ECONNREFUSED, "refused"),
        "certificate_error": ValueError("expired"),
        "path": "/socket",
        "url": url,
        "expected": b"1",
        "got": b"2",
        "host": "127.0.0.1",
        "port": 80,
    }
    parameters = inspect.signature(kind.__init__).parameters.values()
    needed = {each.name: wanted[each.name] for each in parameters if each.name in wanted}
    return kind(**needed)


async def _failure_of(failure: Exception) -> UpstreamDown:
    """What becomes of an exception that a session raises."""

    async def fail(*_: Any) -> aiohttp.ClientResponse:
        raise failure

    upstream = Upstream(
        lambda: aiohttp.ClientSession(middlewares=(fail,)), "http://127.0.0.1/v1", who="local"
    )
    try:
        with pytest.raises(UpstreamDown) as raised:
            await upstream.chat(BODY)
    finally:
        await upstream.close()
    return raised.value


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", _exceptions(), ids=lambda kind: kind.__name__)
async def test_every_exception_of_aiohttp_becomes_ours(kind: type[Exception]) -> None:
    error = await _failure_of(_made(kind))
    assert error.status is None
    assert "local at http://127.0.0.1/v1" in str(error)


def test_the_list_of_exceptions_is_aiohttps() -> None:
    assert {aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError, aiohttp.InvalidURL} <= {
        *_exceptions()
    }
    assert len(_exceptions()) > 20


@pytest.mark.asyncio
async def test_what_may_have_cost_something() -> None:
    refused = await _failure_of(_made(aiohttp.ClientConnectorError))
    late = await _failure_of(aiohttp.SocketTimeoutError())
    never = await _failure_of(aiohttp.ConnectionTimeoutError())
    broken = await _failure_of(aiohttp.ServerDisconnectedError())
    assert [error.billable for error in (refused, late, never, broken)] == [False, True, False, True]
    assert [timed_out(error) for error in (refused, late, never, broken)] == [False, True, False, False]


@pytest.mark.asyncio
async def test_no_secret_in_any_message(upstream: Ask) -> None:
    async with serving(
        status(401, "Incorrect API key provided: sk-secret"), whole({"error": "sk-secret"})
    ) as server:
        asked = upstream(server.url, key="sk-secret")
        for _ in range(2):
            with pytest.raises(UpstreamDown, match="<key>") as raised:
                await asked.chat(BODY)
            assert "sk-secret" not in str(raised.value)
        assert "Authorization: Bearer sk-secret" in server.heads[0]
    with closed_port() as url:
        closed = upstream(url.replace("//", "//user:hidden@"))
        with pytest.raises(UpstreamDown, match=r"at http://127\.0\.0\.1:\d+/v1 ") as raised:
            await closed.chat(BODY)
        assert "hidden" not in str(raised.value)
    both = upstream("http://user:hidden@127.0.0.1:1/v1", key="sk-secret")
    with pytest.raises(UpstreamDown, match="cannot be asked"):  # aiohttp wants one or the other
        await both.chat(BODY)


@pytest.mark.asyncio
async def test_its_own_error_is_passed_on(upstream: Ask) -> None:
    async with serving(status(400, "bad schema"), status(429, "wait", "Retry-After: 2.5\r\n")) as server:
        with pytest.raises(UpstreamRefused) as refused:
            await upstream(server.url).chat(BODY)
        assert refused.value.body is not None
        assert refused.value.body["error"]["code"] == "some_code"
        with pytest.raises(UpstreamDown) as down:
            await upstream(server.url).chat(BODY)
        assert down.value.retry_after == "3"
        assert not down.value.billable


@pytest.mark.asyncio
async def test_a_gateways_timeout_may_be_billed(upstream: Ask) -> None:
    async with serving(status(504, "upstream timed out")) as server:
        with pytest.raises(UpstreamDown) as down:
            await upstream(server.url).chat(BODY)
    assert down.value.billable


@pytest.mark.asyncio
async def test_other_paths(upstream: Ask) -> None:
    async with serving(whole({"object": "list", "data": []})) as server:
        assert await upstream(server.url).post("/embeddings", {"input": "x"}) == {
            "object": "list",
            "data": [],
        }
        assert server.paths == ["/v1/embeddings"]


@pytest.mark.asyncio
async def test_a_connection_is_kept_though_the_end_comes_after_done(upstream: Ask) -> None:
    """Servers send the end of the coding in a packet of its own."""

    async def two_packets(server: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(begun(*CHUNKS, "[DONE]"))
        await writer.drain()
        await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")

    async with serving(two_packets) as server:
        asked = upstream(server.url)
        for _ in range(3):
            assert len([data async for data in asked.chat_stream(BODY)]) == len(CHUNKS)
        assert (len(server.asked), server.connections) == (3, 1)


@pytest.mark.asyncio
async def test_done_ends_a_stream_though_the_server_holds_the_connection(upstream: Ask) -> None:
    async with serving(held(begun(*CHUNKS, "[DONE]"))) as server:
        assert len([data async for data in upstream(server.url).chat_stream(BODY)]) == len(CHUNKS)
        await server.hung_up.wait()


@pytest.mark.asyncio
async def test_every_choice_has_to_end(upstream: Ask) -> None:
    second = {"choices": [{"index": 1, "delta": {"content": "Hi"}, "finish_reason": None}]}
    end = {"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]}
    async with serving(
        streamed(chunk("Hi", "stop"), second), streamed(chunk("Hi", "stop"), second, end)
    ) as server:
        asked = upstream(server.url)
        with pytest.raises(UpstreamDown, match="no finish_reason"):
            assert [data async for data in asked.chat_stream(BODY)]
        assert len([data async for data in asked.chat_stream(BODY)]) == 3


@pytest.mark.asyncio
async def test_an_endless_event(upstream: Ask) -> None:
    data = in_chunks(b"data: " + b"x" * 2**20, last=False)

    async def endless(_: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(begun(chunk("Hi")))
        while not writer.is_closing():
            writer.write(data)
            await writer.drain()

    async with serving(endless) as server:
        with pytest.raises(UpstreamDown, match="longer than"):
            assert [each async for each in upstream(server.url).chat_stream(BODY)]


@pytest.mark.asyncio
async def test_a_connection_that_was_closed_for_idleness_is_opened_again(upstream: Ask) -> None:
    async with serving(whole(), raw(b"", hang_up=True), whole()) as server:
        local = upstream(server.url, "local")
        await local.chat(BODY)
        await local.chat(BODY)
        assert (len(server.asked), server.connections) == (3, 2)


@pytest.mark.asyncio
async def test_closed(upstream: Ask) -> None:
    async with serving(whole()) as server:
        asked = upstream(server.url)
        await asked.chat(BODY)
        await asked.close()
        with pytest.raises(UpstreamDown, match="switched off"):
            await asked.chat(BODY)


@pytest.mark.asyncio
async def test_text_that_utf8_cannot_hold(upstream: Ask) -> None:
    async with serving(whole()) as server:
        await upstream(server.url).chat({"messages": [{"role": "user", "content": "\ud800"}]})
        assert server.asked[0]["messages"][0]["content"] == "\ud800"


def test_retry_after() -> None:
    now = 1_000_000_000.0  # Sun, 09 Sep 2001 01:46:40 GMT
    assert retry_after("7", now) == "7"
    assert retry_after(" 0.2 ", now) == "1"
    assert retry_after("Sun, 09 Sep 2001 01:47:00 GMT", now) == "20"
    assert retry_after("Sun, 09 Sep 2001 01:40:00 GMT", now) == "0"
    assert [retry_after(text, now) for text in (None, "", "soon", "-1", "inf", "nan", "9" * 400)] == [
        None
    ] * 7


@given(st.text())
def test_retry_after_of_anything(text: str) -> None:
    assert (retry_after(text, 0.0) or "0").isdecimal()


@pytest.mark.asyncio
async def test_sessions_look_for_proxies_only_where_some_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    seen = []
    for proxies, url in ((True, None), (False, "http://127.0.0.1:1"), (True, "http://127.0.0.1:1")):
        if url:
            monkeypatch.setenv("HTTPS_PROXY", url)
        async with connect(proxies=proxies)() as session:
            seen.append(session.trust_env)
    assert seen == [False, False, True]
