from __future__ import annotations

import asyncio
import copy
import logging
import math
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.manifest import AuditBaseline
from serve.records.drift import ALPHA, EVERY, MOST, Drift, Drifts, confidence_sequence
from serve.records.journal import Journal
from tests.serve.records.drift_support import BASELINE, release
from tests.serve.records.journal_support import entry, record, url


def audited(drift: Drift, rate: float, count: int, random: Random) -> Drift:
    for _ in range(count):
        drift.add(0.5 if random.random() < rate else 1.0)
    return drift


@given(st.lists(st.booleans(), max_size=4 * EVERY), st.floats(1e-3, 0.9))
def test_whatever_came_before_the_next_audit_wins_nothing_on_average(
    history: list[bool], upper: float
) -> None:
    """The gambler's money is a martingale at the largest rate that is allowed: what Ville's inequality asks for."""
    drift = Drift(AuditBaseline(fields=["label"], kept=1, disagreed=0, upper=upper))
    assert drift.wealth == 1.0
    for differs in history:
        drift.add(0.0 if differs else 1.0)
    if drift.wealth > 1e50:
        return  # winnings are cut off far beyond any alarm
    differing, agreeing = copy.deepcopy(drift), copy.deepcopy(drift)
    differing.add(0.0)
    agreeing.add(1.0)
    expected = upper * differing.wealth + (1 - upper) * agreeing.wealth
    assert math.isclose(expected, drift.wealth, rel_tol=1e-9)


def test_more_bets_than_are_kept_only_lose_money() -> None:
    drift = audited(Drift(BASELINE), 0.035, EVERY * MOST, Random(1))
    before = drift.wealth
    differing, agreeing = copy.deepcopy(drift), copy.deepcopy(drift)
    differing.add(0.0)
    agreeing.add(1.0)
    assert BASELINE.upper * differing.wealth + (1 - BASELINE.upper) * agreeing.wealth <= before


def test_it_stays_silent_at_the_largest_rate_that_is_allowed() -> None:
    """Looked at after every audit. 40 runs at ALPHA = 0.01: three alarms would have a probability below 1 %."""
    alarms = sum(audited(Drift(BASELINE), BASELINE.upper, 1500, Random(seed)).alarm for seed in range(40))
    assert alarms <= 2


@pytest.mark.parametrize("before", [0, 3000])
def test_a_shift_is_noticed_however_long_all_was_well(before: int) -> None:
    for seed in range(10):
        random = Random(seed)
        drift = audited(Drift(BASELINE), 0.02, before, random)
        assert not drift.alarm
        assert audited(drift, 0.2, 300, random).alarm


def test_an_alarm_stays() -> None:
    drift = audited(Drift(BASELINE), 1.0, 10, Random(1))
    assert drift.alarm and drift.wealth > 1 / ALPHA
    audited(drift, 0.0, 500, Random(1))
    assert drift.alarm and drift.wealth < 1


def test_winnings_do_not_overflow() -> None:
    assert math.isfinite(audited(Drift(BASELINE), 1.0, 2000, Random(1)).wealth)


@pytest.mark.parametrize("baseline", [None, AuditBaseline(fields=["label"], kept=0, disagreed=0, upper=1.0)])
def test_without_a_rate_to_be_held_against_there_is_no_alarm(baseline: AuditBaseline | None) -> None:
    drift = audited(Drift(baseline), 1.0, 100, Random(1))
    assert not drift.alarm and drift.estimate == 1.0


def test_before_the_first_audit_nothing_is_said() -> None:
    drift = Drift(BASELINE)
    assert (drift.alarm, drift.estimate, drift.interval(), drift.wealth) == (False, None, None, 1.0)


@pytest.mark.parametrize(("events", "trials"), [(0, 1), (1, 1), (0, 50), (3, 100), (50, 100), (100, 100)])
def test_the_interval_ends_where_the_bet_has_won_enough(events: int, trials: int) -> None:
    low, high = confidence_sequence(events, trials)
    assert 0 <= low <= events / trials <= high <= 1

    def won(rate: float) -> float:
        misses = trials - events
        mixture = math.lgamma(events + 0.5) + math.lgamma(misses + 0.5) - math.lgamma(trials + 1)
        return mixture - math.log(math.pi) - events * math.log(rate) - misses * math.log1p(-rate)

    for edge in (low, high):
        if 0 < edge < 1:
            assert won(edge) == pytest.approx(math.log(20), abs=1e-6)


def test_the_interval_holds_at_all_times_at_once() -> None:
    missed = 0
    for seed in range(40):
        random, events = Random(seed), 0
        for trial in range(1, 300):
            events += random.random() < 0.1
            low, high = confidence_sequence(events, trial)
            if not low <= 0.1 <= high:
                missed += 1
                break
    assert missed <= 5  # 5 % of 40 are 2


def test_the_interval_narrows() -> None:
    widths = [high - low for low, high in (confidence_sequence(n // 50, n) for n in (50, 500, 5000, 50_000))]
    assert all(later < earlier / 2 for earlier, later in pairwise(widths))


def test_a_restart_goes_on_where_the_journal_ends(tmp_path: Path) -> None:
    journal, running = Journal(url(tmp_path)), Drift(BASELINE)
    random = Random(3)
    for number in range(60):
        agreement = 0.0 if random.random() < 0.1 else 1.0
        running.add(agreement)
        record(journal, entry(number, endpoint="audit", release="v1", audit=agreement))
    record(journal, entry(100, endpoint="audit", release="v0", audit=0.0))
    record(journal, entry(101, endpoint="audit", release="v1", audit=None))  # it failed
    record(journal, entry(102, endpoint="shadow", release="v1", audit=0.0))

    async def restarted() -> Drift | None:
        drifts = Drifts(journal.audits)
        await asyncio.gather(drifts.follow(release()), drifts.follow(release()))
        return drifts.of("tickets", "v1")

    found = asyncio.run(restarted())
    assert found and (found.audits, found.disagreed, found.wealth) == (60, running.disagreed, running.wealth)
    journal.close()


def test_an_alarm_is_logged_once_with_its_figures(caplog: pytest.LogCaptureFixture) -> None:
    drifts = Drifts(lambda task, version: [])
    asyncio.run(drifts.follow(release()))
    with caplog.at_level(logging.ERROR, "serve"):
        for number in range(20):
            drifts.observe(entry(number, endpoint="audit", release="v1", audit=0.0))
            drifts.observe(entry(number, endpoint="chat", release="v1", audit=0.0))
            drifts.observe(entry(number, endpoint="audit", release="v1", audit=None))
            drifts.observe(entry(number, endpoint="audit", release="another", audit=0.0))
    found = drifts.of("tickets", "v1")
    assert found and found.audits == 20 and drifts.of("tickets", "another") is None
    (line,) = caplog.messages
    assert (
        "task tickets: kept answers of release v1 have become worse" in line and "4.0 % are allowed" in line
    )
