from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import pytest

from serve.errors import UpstreamDown, UpstreamRefused
from serve.upstreams.pool import Pool

pytestmark = pytest.mark.asyncio


class Host:
    """Answers with its name, unless told to fail."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.fails: Exception | None = None
        self.breaks = False
        self.asked = 0
        self.closed = False
        self.wait: asyncio.Event | None = None

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self.asked += 1
        if self.wait:
            await self.wait.wait()
        if self.fails:
            raise self.fails
        return {"by": self.address, "path": path}

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self.post("/chat", body)

    async def chat_stream(self, body: Mapping[str, Any]) -> AsyncGenerator[bytes]:
        self.asked += 1
        if self.fails and not self.breaks:
            raise self.fails
        yield self.address.encode()
        if self.fails:
            raise self.fails
        yield b"end"

    async def close(self) -> None:
        self.closed = True


class Lab:
    def __init__(self, count: int = 3) -> None:
        self.now = 0.0
        self.hosts = [Host(name) for name in "abc"[:count]]
        self.pool = Pool(self.hosts, 15.0, clock=lambda: self.now)

    async def ask(self, times: int = 1) -> str:
        return "".join([(await self.pool.chat({}))["by"] for _ in range(times)])

    def fail(self, *names: str) -> None:
        for host in self.hosts:
            host.fails = UpstreamDown("local", f"{host.address} is down") if host.address in names else None


async def test_in_turn() -> None:
    lab = Lab()
    assert await lab.ask(6) == "abcabc"
    assert (await lab.pool.post("/embeddings", {})) == {"by": "a", "path": "/embeddings"}


async def test_the_least_busy_one() -> None:
    lab = Lab()
    lab.hosts[1].wait = asyncio.Event()
    assert await lab.ask() == "a"
    asking = asyncio.create_task(lab.pool.chat({}))
    await asyncio.sleep(0)
    assert await lab.ask(4) == "caca"
    lab.hosts[1].wait.set()
    assert (await asking)["by"] == "b"


async def test_a_host_that_fails_rests_and_the_next_one_answers() -> None:
    lab = Lab()
    lab.fail("a")
    assert await lab.ask(6) == "bcbcbc"
    assert (lab.hosts[0].asked, lab.pool.resting) == (1, ["a"])
    lab.fail()
    lab.now += 15.0
    assert lab.pool.resting == []
    assert "a" in await lab.ask(3)


async def test_all_fail() -> None:
    lab = Lab()
    lab.fail("a", "b", "c")
    with pytest.raises(UpstreamDown, match="c is down"):
        await lab.ask()
    assert [host.asked for host in lab.hosts] == [1, 1, 1]
    lab.fail("a", "b")  # c is back, before its rest is over: better tried than not
    assert await lab.ask() == "c"
    assert lab.pool.resting == ["a", "b"]


async def test_a_refusal_is_the_requests_own_fault() -> None:
    lab = Lab()
    lab.hosts[0].fails = UpstreamRefused("local", "no")
    with pytest.raises(UpstreamRefused):
        await lab.ask()
    assert (lab.pool.resting, lab.hosts[1].asked) == ([], 0)


async def test_streams_change_hosts_only_before_the_first_event() -> None:
    lab = Lab()
    lab.fail("a")
    assert [data async for data in lab.pool.chat_stream({})] == [b"b", b"end"]
    assert await lab.ask() == "c"
    lab.fail("b")
    lab.hosts[1].breaks = True
    async with aclosing(lab.pool.chat_stream({})) as events:
        assert await anext(events) == b"b"
        with pytest.raises(UpstreamDown, match="b is down"):
            await anext(events)
    assert lab.pool.resting == ["a", "b"]
    lab.fail("a", "b", "c")
    lab.hosts[1].breaks = False
    with pytest.raises(UpstreamDown):
        assert [data async for data in lab.pool.chat_stream({})]


async def test_a_stream_counts_as_busy_until_it_ends() -> None:
    lab = Lab(2)
    events = lab.pool.chat_stream({})
    assert await anext(events) == b"a"
    assert await lab.ask(3) == "bbb"
    await events.aclose()
    assert "a" in await lab.ask(2)


async def test_one_address_for_messages_and_all_are_closed() -> None:
    lab = Lab()
    assert lab.pool.address == "a, b, c"
    await lab.pool.close()
    assert all(host.closed for host in lab.hosts)
