"""Audits: a random share of the local answers that were kept, asked of the teacher as well, in the background.

The draw knows nothing of the answer or its confidence, and a client never waits for an audit or pays for it
with an answer. What egress and budget rules forbid is not asked; how often that was is counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from random import Random
from typing import Any

from serve.confidence import Field, agreement
from serve.errors import ServeError, UpstreamError
from serve.records.drift import Drifts
from serve.records.entry import Entry, stamp
from serve.release import Release

AUDIT = "audit"
"""`Entry.endpoint` of an audit."""

logger = logging.getLogger("serve")


class Skipped(ServeError):
    """The teacher was not asked: the rules forbid it, or there is no money.

    Args:
        reason: one word, by which such audits are counted.
    """

    def __init__(self, reason: str, problem: str) -> None:
        self.reason = reason
        super().__init__(problem)


@dataclass(frozen=True)
class Said:
    """What the teacher said to an audit."""

    answer: Mapping[str, Any]
    """A chat.completion."""
    cost_usd: float | None
    attempts: int = 1


@dataclass(frozen=True)
class Kept:
    """A local answer that a client was given as good.

    Args:
        entry: of the request, as the journal has it.
        release: that it came from.
        fields: output fields of its predictor.
        text: the answer.
        ask: asks the teacher the same, within egress and budget rules; raises Skipped or UpstreamError.
    """

    entry: Entry
    release: Release
    fields: Sequence[Field]
    text: str
    ask: Callable[[], Awaitable[Said]]


class Audits:
    """Draws audits and makes them. `run` must be running for any to be made.

    Args:
        record: told of every audit: the journal, and all others that watch.
        drifts: takes in what is found.
        random: draws.
        concurrency: audits that are made at once.
        room: audits that wait; what is drawn beyond them is skipped.
        clock: seconds, for latencies.
        now: for the entries.
    """

    def __init__(
        self,
        record: Callable[[Entry], None],
        drifts: Drifts,
        random: Random,
        *,
        concurrency: int = 2,
        room: int = 64,
        clock: Callable[[], float] = time.perf_counter,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._record = record
        self._drifts = drifts
        self._random = random
        self._concurrency = concurrency
        self._waiting: asyncio.Queue[Kept] = asyncio.Queue(room)
        self._clock = clock
        self._now = now
        self.drawn = 0
        self.made = 0
        self.skipped: Counter[str] = Counter()
        """Drawn audits that were not made, by reason: never, room, budget, policy, failed."""

    def draw(self, share: float) -> bool:
        """Whether a kept answer is audited. Asked once for every one, before anything else is looked at."""
        drawn = self._random.random() < share
        self.drawn += drawn
        return drawn

    def offer(self, kept: Kept) -> None:
        """Audit an answer that was drawn, when its turn comes."""
        if kept.entry.egress == "never":
            self.skipped["never"] += 1
        elif self._waiting.full():
            self.skipped["room"] += 1
        else:
            self._waiting.put_nowait(kept)

    async def run(self) -> None:
        """Make audits until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(self._work())

    async def drain(self) -> None:
        """Wait until none waits or is under way; needs `run`."""
        await self._waiting.join()

    async def _work(self) -> None:
        while True:
            kept = await self._waiting.get()
            try:
                await self._audit(kept)
            except Exception:  # whatever one answer brings up, the next one must be audited
                self.skipped["failed"] += 1
                logger.exception("request %s could not be audited", kept.entry.id)
            finally:
                self._waiting.task_done()

    async def _audit(self, kept: Kept) -> None:
        await self._drifts.follow(kept.release)
        began = self._clock()
        try:
            said = await kept.ask()
        except Skipped as skipped:
            self.skipped[skipped.reason] += 1
            return
        except UpstreamError as error:
            self.skipped["failed"] += 1
            self._record(self._failure(kept, error, began))
            return
        entry = self._entry(kept, said, began)
        self._record(entry)
        self._drifts.observe(entry)
        self.made += 1

    def _entry(self, kept: Kept, said: Said, began: float) -> Entry:
        message = said.answer["choices"][0]["message"]
        usage = said.answer.get("usage") or {}
        told = kept.entry
        # What the teacher said holds the client's own words again, so it is stored only where those may be.
        stored = bool(told.messages) and told.egress == "allow"
        return replace(
            self._blank(kept, began),
            route="teacher",
            model=said.answer.get("model"),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            cost_usd=said.cost_usd,
            attempts=said.attempts,
            answer=message if stored else None,
            local_answer=(told.answer or {}).get("content"),
            audit=agreement(
                kept.text, str(message.get("content") or ""), compared(kept.release, kept.fields)
            ),
        )

    def _failure(self, kept: Kept, error: UpstreamError, began: float) -> Entry:
        cost = None if error.billable else 0.0
        return replace(
            self._blank(kept, began),
            status=error.status or 503,
            error=str(error),
            cost_usd=cost,
        )

    def _blank(self, kept: Kept, began: float) -> Entry:
        """What an audit has in common with the request that it is about."""
        told = kept.entry
        return Entry(
            id=f"{told.id}-{AUDIT}",
            asked=told.asked,
            messages=told.messages,
            status=200,
            latency_ms=round((self._clock() - began) * 1000, 3),
            overhead_ms=0.0,
            task=told.task,
            release=told.release,
            predictor=told.predictor,
            reason=told.reason,
            confidence=told.confidence,
            threshold=told.threshold,
            key=told.key,
            egress=told.egress,
            strategy=told.strategy,
            endpoint=AUDIT,
            audited=told.id,
            created=stamp(self._now()),
        )


def compared(release: Release, fields: Sequence[Field]) -> list[Field]:
    """The fields that certification compared: those that both models tend to word alike. All, where it did not."""
    baseline = release.router.audit
    return [field for field in fields if baseline is None or field.name in baseline.fields]
