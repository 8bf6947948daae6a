from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from random import Random
from typing import Any

import pytest

from serve.confidence import Field
from serve.errors import UpstreamDown
from serve.manifest import AuditBaseline
from serve.records.audits import Audits, Kept, Said, Skipped
from serve.records.drift import Drifts
from serve.records.entry import Entry
from serve.release import Release
from tests.serve.records.drift_support import release, said
from tests.serve.records.journal_support import entry

pytestmark = pytest.mark.asyncio
FIELDS = (Field("reasoning"), Field("label", ("a", "b")))
NOW = datetime(2026, 11, 21, 8, tzinfo=UTC)


class Bench:
    """Audits with nothing behind them: what is recorded is kept in a list."""

    def __init__(self, past: tuple[float, ...] = (), **given: Any) -> None:
        self.recorded: list[Entry] = []
        self.drifts = Drifts(lambda task, version: past)
        ticks = iter(range(10**6))
        self.audits = Audits(
            self.recorded.append,
            self.drifts,
            Random(1),
            clock=lambda: next(ticks) * 0.25,
            now=lambda: NOW,
            **given,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Audits]:
        running = asyncio.create_task(self.audits.run())
        try:
            yield self.audits
            await self.audits.drain()
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


def teacher(text: str, **given: Any) -> Callable[[], Awaitable[Said]]:
    async def ask() -> Said:
        answer = {
            "model": "gpt",
            "choices": [{"message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 70, "completion_tokens": 9},
        }
        return Said(answer, given.get("cost_usd", 0.002), given.get("attempts", 1))

    return ask


def failing(error: Exception) -> Callable[[], Awaitable[Said]]:
    async def ask() -> Said:
        raise error

    return ask


def kept(
    number: int = 1,
    ask: Callable[[], Awaitable[Said]] | None = None,
    of: Release | None = None,
    **values: Any,
) -> Kept:
    told: dict[str, Any] = {
        "release": "v1",
        "egress": "allow",
        "key": "alice",
        "guarantee": "0.98@0.95",
        "cost_usd": 0.0,
        "answer": {"role": "assistant", "content": said("a")},
    }
    ask = ask or teacher(said("a", "it says so"))
    return Kept(entry(number, **told | values), of or release(), FIELDS, said("a"), ask)


async def test_an_audit_is_an_entry_of_its_own() -> None:
    bench = Bench()
    async with bench.running() as audits:
        audits.offer(kept(7, teacher(said("a", "it says so"), attempts=2)))
    (found,) = bench.recorded
    assert (found.id, found.audited, found.endpoint) == ("req_7-audit", "req_7", "audit")
    assert (found.audit, found.route, found.model, found.guarantee) == (1.0, "teacher", "gpt", "none")
    assert (found.prompt_tokens, found.completion_tokens, found.cost_usd, found.attempts) == (70, 9, 0.002, 2)
    assert (found.task, found.release, found.key, found.confidence) == ("tickets", "v1", "alice", 0.9)
    assert (found.latency_ms, found.created) == (250.0, "2026-11-21T08:00:00.000+00:00")
    assert found.answer and found.answer["content"] == said("a", "it says so")
    assert found.local_answer == said("a")
    drift = bench.drifts.of("tickets", "v1")
    assert drift and (drift.audits, drift.disagreed, bench.audits.made) == (1, 0, 1)


@pytest.mark.parametrize(
    ("text", "fields", "agreement"),
    [
        (said("a", "otherwise"), ["label"], 1.0),
        (said("a", "otherwise"), ["reasoning", "label"], 0.5),
        (said("b"), ["label"], 0.0),
        ("I cannot help with that", ["label"], 0.0),
        (said("a", "  so "), None, 1.0),
        (said("a", "otherwise"), None, 0.5),
    ],
)
async def test_the_fields_that_certification_compared_are_compared(
    text: str, fields: list[str] | None, agreement: float
) -> None:
    baseline = AuditBaseline(fields=fields, kept=9, disagreed=0, upper=0.3) if fields else None
    bench = Bench()
    async with bench.running() as audits:
        audits.offer(kept(1, teacher(text), release(baseline)))
    assert [found.audit for found in bench.recorded] == [agreement]


async def test_answers_are_drawn_at_the_share_that_was_set() -> None:
    audits, share, count = Bench().audits, 0.02, 20_000
    drawn = sum(audits.draw(share) for _ in range(count))
    assert abs(drawn - share * count) < 4 * math.sqrt(count * share * (1 - share))
    assert audits.drawn == drawn
    assert not any(audits.draw(0.0) for _ in range(100)) and all(audits.draw(1.0) for _ in range(100))


@pytest.mark.parametrize(
    ("values", "messages", "answer"),
    [
        ({"egress": "allow"}, True, True),
        ({"egress": "redact"}, True, False),
        ({"egress": "allow", "messages": [], "answer": None}, False, False),
    ],
)
async def test_nothing_is_stored_that_the_request_itself_does_not_store(
    values: dict[str, Any], messages: bool, answer: bool
) -> None:
    """The teacher's answer has the client's own words put back."""
    bench = Bench()
    async with bench.running() as audits:
        audits.offer(kept(1, teacher(said("a", "bob@example.org")), **values))
    (found,) = bench.recorded
    assert (bool(found.messages), bool(found.answer), found.audit) == (messages, answer, 1.0)
    assert ("bob@example.org" in str(vars(found))) == answer


async def test_what_must_not_leave_is_not_audited() -> None:
    bench = Bench()
    async with bench.running() as audits:
        audits.offer(kept(1, failing(AssertionError("asked")), egress="never"))
    assert (bench.recorded, bench.audits.skipped) == ([], {"never": 1})


async def test_without_money_an_audit_is_left_out_and_counted() -> None:
    bench = Bench()
    async with bench.running() as audits:
        audits.offer(kept(1, failing(Skipped("budget", "the cap of all leaves no room"))))
        audits.offer(kept(2, failing(Skipped("policy", "cannot be redacted"))))
        audits.offer(kept(3))
    assert [found.audited for found in bench.recorded] == ["req_3"]
    assert bench.audits.skipped == {"budget": 1, "policy": 1}


@pytest.mark.parametrize(("billable", "cost"), [(False, 0.0), (True, None)])
async def test_a_teacher_that_fails_is_in_the_journal_and_proves_nothing(
    billable: bool, cost: float | None
) -> None:
    bench = Bench()
    async with bench.running() as audits:
        audits.offer(kept(1, failing(UpstreamDown("teacher", "it is away", status=502, billable=billable))))
    (found,) = bench.recorded
    assert (found.status, found.error, found.audit, found.cost_usd) == (502, "it is away", None, cost)
    drift = bench.drifts.of("tickets", "v1")
    assert drift and drift.audits == 0 and bench.audits.skipped == {"failed": 1}


async def test_one_audit_that_breaks_does_not_end_the_others(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(concurrency=1)
    with caplog.at_level(logging.ERROR, "serve"):
        async with bench.running() as audits:
            audits.offer(kept(1, failing(KeyError("choices"))))
            audits.offer(kept(2))
    assert [found.audited for found in bench.recorded] == ["req_2"]
    assert "request req_1 could not be audited" in caplog.text


async def test_so_many_are_made_at_once_and_so_many_wait() -> None:
    bench, open_now, most = Bench(concurrency=2, room=3), 0, 0
    begun, go = asyncio.Semaphore(0), asyncio.Event()

    async def ask() -> Said:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        begun.release()
        await go.wait()
        open_now -= 1
        return await teacher(said("a"))()

    async with bench.running() as audits:
        for number in range(2):
            audits.offer(kept(number, ask))
        await begun.acquire()
        await begun.acquire()
        for number in range(2, 7):
            audits.offer(kept(number, ask))
        assert audits.skipped == {"room": 2}
        go.set()
    assert (len(bench.recorded), most) == (5, 2)


async def test_what_earlier_audits_found_comes_first() -> None:
    bench = Bench(past=(0.0, 1.0, 1.0))
    async with bench.running() as audits:
        audits.offer(kept(1, teacher(said("b"))))
    drift = bench.drifts.of("tickets", "v1")
    assert drift and (drift.audits, drift.disagreed) == (4, 2)
