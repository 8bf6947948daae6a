from __future__ import annotations

import asyncio

import pytest

from serve.errors import UpstreamBusy
from serve.upstreams.gate import Gate

pytestmark = pytest.mark.asyncio


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


class Workers:
    """Requests at a gate, each of which works until it is told to end."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.order: list[int] = []
        self.ends: dict[int, asyncio.Event] = {}

    async def work(self, number: int) -> None:
        self.ends[number] = asyncio.Event()
        async with self.gate.place():
            self.order.append(number)
            await self.ends[number].wait()

    async def begin(self, number: int) -> asyncio.Task[None]:
        task = asyncio.create_task(self.work(number))
        await settle()
        return task


async def test_first_come_first_served_and_no_more_than_that() -> None:
    workers = Workers(Gate(2, 2))
    tasks = [await workers.begin(number) for number in range(4)]
    assert (workers.order, workers.gate.active, workers.gate.waiting) == ([0, 1], 2, 2)
    with pytest.raises(UpstreamBusy, match="2 requests are at work and 2 wait"):
        await workers.work(9)
    workers.ends[1].set()
    await settle()
    assert (workers.order, workers.gate.active, workers.gate.waiting) == ([0, 1, 2], 2, 1)
    tasks.append(await workers.begin(4))
    for number in (0, 2, 3, 4):
        workers.ends[number].set()
        await settle()
    await asyncio.gather(*tasks)
    assert workers.order == [0, 1, 2, 3, 4]
    assert (workers.gate.active, workers.gate.waiting) == (0, 0)


async def test_whoever_goes_away_leaves_its_place() -> None:
    workers = Workers(Gate(1, 2))
    first, second, third = [await workers.begin(number) for number in range(3)]
    second.cancel()
    await settle()
    assert workers.gate.waiting == 1
    first.cancel()
    third.cancel()  # it is being given the place just now
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert (workers.gate.active, workers.gate.waiting) == (0, 0)
    last = await workers.begin(3)
    assert workers.order[-1] == 3
    workers.ends[3].set()
    await last


async def test_without_a_queue() -> None:
    workers = Workers(Gate(1, 0))
    task = await workers.begin(0)
    with pytest.raises(UpstreamBusy):
        await workers.work(1)
    workers.ends[0].set()
    await task
    async with workers.gate.place():
        assert workers.gate.active == 1


async def test_when_to_come_back() -> None:
    now = 0.0
    gate = Gate(2, 1, clock=lambda: now)
    async with gate.place():
        now += 8.0
    workers = Workers(gate)
    tasks = [await workers.begin(number) for number in range(3)]
    with pytest.raises(UpstreamBusy) as raised:
        await workers.work(9)
    assert raised.value.retry_after == "8"  # 2 to go before it, at 2 in 8 s
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
