"""GET /api/live: the last hour and the last requests, out of ended requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.watching.gauges import Drift, Gauges, Spending
from serve.watching.live import BINS, RECENT, Live, histogram, quantile
from tests.serve.watching.site_support import THRESHOLD, Shelf, by_teacher, entry, write_release


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def task_of(snapshot: dict[str, Any], name: str) -> dict[str, Any]:
    found = [task for task in snapshot["tasks"] if task["name"] == name]
    assert len(found) == 1
    return dict(found[0])


def test_before_the_first_request_nothing_is_claimed(shelf: Shelf) -> None:
    shown = Live(shelf, Gauges(), Clock()).snapshot()
    assert shown["total"]["local_share"] is None
    assert shown["recent"] == shown["tasks"] == shown["spending"] == []
    assert len(shown["minutes"]) == 60 and shown["minutes"][-1]["requests"] == 0


def test_the_local_share_is_of_answers(shelf: Shelf) -> None:
    live = Live(shelf, Gauges(), Clock())
    for each in (entry(), entry(), entry(), by_teacher(), entry(status=503, route=None), entry(status=499)):
        live.observe(each)
    total = live.snapshot()["total"]
    assert (total["local"], total["teacher"], total["failed"]) == (3, 1, 2)
    assert total["local_share"] == 0.75 and total["requests"] == 6


def test_the_hour_rolls_on(shelf: Shelf) -> None:
    clock = Clock()
    live = Live(shelf, Gauges(), clock)
    live.observe(entry())
    clock.now += 59 * 60
    live.observe(by_teacher())
    minutes = live.snapshot()["minutes"]
    assert (minutes[0]["local"], minutes[-1]["teacher"]) == (1, 1)
    assert minutes[-1]["at"] == clock.now // 60 * 60
    clock.now += 60
    assert live.snapshot()["total"]["local"] == 0
    clock.now += 3600
    assert live.snapshot()["total"]["requests"] == 0


def test_latencies_by_who_answered(shelf: Shelf) -> None:
    live = Live(shelf, Gauges(), Clock())
    for latency in range(1, 101):
        live.observe(entry(latency_ms=float(latency), first_token_ms=None if latency % 2 else latency / 2))
    live.observe(by_teacher(latency_ms=700.0))
    latency = live.snapshot()["latency_ms"]
    assert latency["local"] == {"n": 100, "p50": 50.0, "p95": 95.0, "first_token_p50": 25.0}
    assert latency["teacher"]["p95"] == 700.0


def test_a_histogram_belongs_to_one_release(shelf: Shelf) -> None:
    version = write_release(shelf.folder)
    shelf.take_up("tickets")
    live = Live(shelf, Gauges(), Clock())
    live.observe(entry(release="before", confidence=0.1))
    live.observe(entry(release=version, confidence=0.93))
    live.observe(entry(release=version, confidence=1.0, endpoint="shadow"))
    live.observe(entry(release=version, confidence=0.99, endpoint="audit"))
    task = task_of(live.snapshot(), "tickets")
    assert (task["threshold"], task["guarantee"], task["release"]) == (THRESHOLD, "0.95@0.95", version)
    assert task["confidence"]["bins"] == [0] * 18 + [1, 1]
    assert task["requests"] == 2  # what nobody asked is no request


def test_what_others_know_is_asked_for(shelf: Shelf) -> None:
    shelf.problems["claims"] = "altered"
    gauges = Gauges(
        lost=lambda: 2,
        breakers=lambda: {"teacher": "open"},
        spending=lambda: [Spending("all", 1.0, 2.0)],
        drift=lambda: {"claims": Drift(False, 0)},
    )
    shown = Live(shelf, gauges, Clock()).snapshot()
    assert shown["journal"] == {"lost": 2} and shown["breakers"] == {"teacher": "open"}
    assert shown["spending"] == [{"scope": "all", "spent_usd": 1.0, "cap_usd": 2.0}]
    assert task_of(shown, "claims")["problem"] == "altered"
    assert task_of(shown, "claims")["drift"]["audits"] == 0


def test_recent_requests_newest_first_without_bodies(shelf: Shelf) -> None:
    live = Live(shelf, Gauges(), Clock())
    for number in range(RECENT + 5):
        live.observe(entry(id=f"req_{number}", error="x" * 1000))
    live.observe(by_teacher(endpoint="audit"))
    shown = live.snapshot(recent=3)["recent"]
    assert [each["id"] for each in shown] == ["req_204", "req_203", "req_202"]
    assert len(live.snapshot(recent=1000)["recent"]) == RECENT
    assert live.snapshot(recent=0)["recent"] == []
    assert "secret" not in json.dumps(live.snapshot()) and len(shown[0]["error"]) == 300


def test_what_is_no_task_is_counted_together_and_comes_last(shelf: Shelf) -> None:
    live = Live(shelf, Gauges(), Clock())
    for asked in ("gpt-4o", "zzz", "tickets"):
        live.observe(by_teacher(task="tickets" if asked == "tickets" else None, asked=asked))
    tasks = live.snapshot()["tasks"]
    assert [(task["name"], task["requests"]) for task in tasks] == [("tickets", 1), ("other", 2)]


@given(st.lists(st.floats(0, 1)))
def test_every_confidence_is_in_one_bin(values: list[float]) -> None:
    bins = histogram(values)
    assert len(bins) == BINS and sum(bins) == len(values)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_quantile_has_its_share_below_it(values: list[float], share: float) -> None:
    found = quantile(sorted(values), share)
    assert found is not None
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert sum(value < found for value in values) < share * len(values) + 1e-9
