"""24 simulated hours of mixed traffic on a clock of their own: money, audits, drift and journal together.

What the teacher charges is counted beside the budget, by somebody who sees only the calls that are made.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from serve.confidence import Field
from serve.config import Config, Price, TaskOverrides
from serve.errors import BudgetExceeded
from serve.guard.budget import NANO, Budget, Reservation, worst_case
from serve.guard.keys import Caller
from serve.records.audits import Audits, Kept, Said, Skipped
from serve.records.drift import Drift, Drifts
from serve.records.entry import Entry, stamp
from serve.records.journal import Journal
from tests.serve.records.drift_support import release, said

START = datetime(2026, 11, 20, 6, tzinfo=UTC).timestamp()
HOUR = 3600.0
PRICE = Price(input=2.5, output=10)
FIELDS = (Field("label", ("a", "b")),)
TASKS = ("tickets", "mail")
CALLERS = (Caller("alice", daily_usd=0.4), Caller("bob"), Caller("carol"))
AUDITOR = Caller("audits")
TIGHT = Config(daily_usd=1.5, tasks={"mail": TaskOverrides(daily_usd=0.8)})
CAPS = {"all": 1.5, "task mail": 0.8, "key alice": 0.4}
"""Of TIGHT, and of the callers."""
RELEASES = {task: release(task=task) for task in TASKS}
SHARE = 0.02
KEPT_LOCALLY = 0.8
AS_CERTIFIED, SHIFTED = 0.02, 0.25
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 300}
WORST = worst_case(BODY, PRICE)


@dataclass
class Bill:
    """Nano-dollars that the teacher charged, and that nobody can know of, by day and scope."""

    charged: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass
class Open:
    """A call under way."""

    reservation: Reservation
    nano: int
    scopes: tuple[tuple[str, str], ...]
    ends: float


class Day:
    """The traffic of a day, and all that it goes through.

    Args:
        config: with the caps.
        shift: from this hour on the local answers are worse.
        crashes: how often the process dies, with all its calls under way.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        requests: int,
        config: Config,
        shift: float = 24.0,
        crashes: int = 0,
    ) -> None:
        self.config = config
        self.random = Random(seed)
        self.now = START
        self.requests = requests
        self.shift = shift
        self.crashes = {requests * (at + 1) // (crashes + 1) for at in range(crashes)}
        self.folder = folder
        self.budgets = [self.opened()]
        self.journal = Journal(f"sqlite:///{folder / 'journal.db'}")
        self.bill = Bill()
        self.open: list[Open] = []
        self.kept = self.refused = self.recorded = 0
        self.drifts = Drifts(self.journal.audits)
        self.audits = self.auditing(seed)
        self.alarmed_at: float | None = None

    def opened(self) -> Budget:
        return Budget(self.folder / "budget.db", self.config, lambda: self.now)

    def auditing(self, seed: int) -> Audits:
        return Audits(self.record, self.drifts, Random(seed + 1), now=self.moment)

    def moment(self) -> datetime:
        return datetime.fromtimestamp(self.now, UTC)

    def record(self, entry: Entry) -> None:
        self.journal.record(entry)
        self.recorded += 1

    async def pass_by(self) -> None:
        auditing = asyncio.create_task(self.audits.run())
        for number in range(self.requests):
            self.now = START + 24 * HOUR * number / self.requests
            self.settle()
            self.request(number)
            if number in self.crashes:
                self.crash()
            if number % 50 == 0:
                await self.audits.drain()
                self.look()
        await self.audits.drain()
        self.look()
        auditing.cancel()
        with suppress(asyncio.CancelledError):
            await auditing

    def request(self, number: int) -> None:
        task, caller = self.random.choice(TASKS), self.random.choice(CALLERS)
        if self.random.random() < KEPT_LOCALLY:
            self.kept += 1
            entry = self.entry(number, task, caller, "local", 0.0)
            if self.audits.draw(SHARE):
                ask = partial(self.audit, task, self.teacher_says())
                self.audits.offer(Kept(entry, RELEASES[task], FIELDS, said("a"), ask))
        else:
            nano = self.charge(task, caller, seconds=self.random.uniform(0, 120))
            entry = self.entry(number, task, caller, "teacher" if nano else None, (nano or 0) / NANO)
        self.record(entry)

    def teacher_says(self) -> str:
        worse = self.now >= START + self.shift * HOUR
        return said("b" if self.random.random() < (SHIFTED if worse else AS_CERTIFIED) else "a")

    def charge(self, task: str, caller: Caller, seconds: float) -> int | None:
        """Make a call to the teacher, if there is money for it; what it will cost."""
        try:
            reservation = self.budgets[-1].admit(
                BODY, PRICE, task=task, rules=self.config.rules(task), caller=caller
            )
        except BudgetExceeded:
            self.refused += 1
            return None
        nano = self.random.randint(1, WORST // 1000) * 1000  # what a price a million tokens can make
        day = self.moment().date().isoformat()
        scopes = ((day, "all"), (day, f"task {task}"), (day, f"key {caller.name}"))
        self.bill.charged.update(dict.fromkeys(scopes, nano))
        self.open.append(Open(reservation, nano, scopes, self.now + seconds))
        return nano

    def settle(self) -> None:
        """End the calls whose time has come."""
        for call in [call for call in self.open if call.ends <= self.now]:
            self.open.remove(call)
            call.reservation.settle(call.nano / NANO)

    def crash(self) -> None:
        """Calls under way are lost: they are charged, and nobody will ever settle them."""
        for call in self.open:
            self.bill.lost.update(dict.fromkeys(call.scopes, WORST - call.nano))
        self.open.clear()
        self.budgets.append(self.opened())

    async def audit(self, task: str, text: str) -> Said:
        nano = self.charge(task, AUDITOR, seconds=0)
        if nano is None:
            raise Skipped("budget", "there is no room")
        self.settle()
        return Said({"model": "gpt", "choices": [{"message": {"content": text}}]}, nano / NANO)

    def look(self) -> None:
        found = [self.drifts.of(task, "v1") for task in TASKS]
        if self.alarmed_at is None and any(drift and drift.alarm for drift in found):
            self.alarmed_at = (self.now - START) / HOUR

    def entry(self, number: int, task: str, caller: Caller, route: str | None, usd: float) -> Entry:
        return Entry(
            id=f"req_{number}",
            asked=task,
            messages=[],
            status=200 if route else 429,
            latency_ms=1.0,
            overhead_ms=0.1,
            task=task,
            release="v1",
            route=route,
            reason="confident" if route == "local" else "low_confidence",
            cost_usd=usd,
            key=caller.name,
            egress="allow",
            endpoint="chat",
            created=stamp(self.moment()),
        )

    def close(self) -> None:
        self.journal.close()
        for budget in self.budgets:
            budget.close()


@pytest.fixture
def live(tmp_path: Path) -> Callable[..., Day]:
    """Lives a day through."""

    def lived(seed: int, **given: Any) -> Day:
        folder = tmp_path / str(seed)
        folder.mkdir()
        day = Day(folder, seed, **given)
        asyncio.run(day.pass_by())
        return day

    return lived


def test_caps_hold_to_the_nano_dollar_over_twenty_crashes(live: Callable[..., Day]) -> None:
    day = live(1, requests=12_000, config=TIGHT, crashes=20)
    day.now += HOUR
    day.settle()
    assert len(day.budgets) == 21 and day.refused > 500 and day.bill.lost
    for (date, scope), charged in day.bill.charged.items():
        assert charged <= CAPS.get(scope, math.inf) * NANO, (date, scope)
    for moment in (START, day.now):
        day.now = moment
        today = day.moment().date().isoformat()
        for scope in ("all", "task mail", "task tickets", "key alice", "key bob", "key audits"):
            known = day.bill.charged[today, scope] + day.bill.lost[today, scope]
            assert round(day.budgets[-1].spent_usd(scope) * NANO) == known > 0, (today, scope)
    first = (datetime.fromtimestamp(START, UTC).date().isoformat(), "all")
    assert day.bill.charged[first] + day.bill.lost[first] > 1.5 * NANO - WORST  # it was spent to the end
    day.close()


def test_audits_are_drawn_at_their_rate_and_the_journal_has_them_all(live: Callable[..., Day]) -> None:
    day = live(2, requests=12_000, config=Config(daily_usd=100))
    audits, deviation = day.audits, math.sqrt(day.kept * SHARE * (1 - SHARE))
    assert abs(audits.drawn - SHARE * day.kept) < 4 * deviation
    assert audits.made + sum(audits.skipped.values()) == audits.drawn
    assert set(audits.skipped) <= {"budget"} and audits.made > 0.5 * audits.drawn
    assert day.journal.flush(30)
    assert day.journal.extent().requests == day.recorded == day.requests + audits.made
    found = {task: len(list(day.journal.audits(task, "v1"))) for task in TASKS}
    seen = {task: drift.audits if (drift := day.drifts.of(task, "v1")) else 0 for task in TASKS}
    assert found == seen and sum(found.values()) == audits.made
    assert day.alarmed_at is None
    day.close()


def test_a_shift_raises_the_alarm_within_hours(live: Callable[..., Day]) -> None:
    day = live(3, requests=12_000, config=Config(daily_usd=100), shift=8)
    assert day.alarmed_at is not None and 8 < day.alarmed_at < 20
    day.close()


def test_without_a_shift_no_day_of_twenty_raises_the_alarm() -> None:
    """Also where every answer is audited, so that the test is looked at many thousand times."""
    random = Random(4)
    for _ in range(20):
        drift = Drift(RELEASES["tickets"].router.audit)
        for _ in range(3000):
            drift.add(0.0 if random.random() < AS_CERTIFIED else 1.0)
        assert not drift.alarm
