"""/metrics: what is counted, under which labels, and what is asked for at the scrape."""

from __future__ import annotations

import timeit
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from serve.watching.gauges import Drift, Gauges, Queue, Spending
from serve.watching.metrics import Metrics
from tests.serve.watching.site_support import Shelf, by_teacher, entry, write_release


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """Of the sample with exactly these labels; None where there is none."""
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    return None


def of(shelf: Shelf, gauges: Gauges | None = None) -> Metrics:
    return Metrics(CollectorRegistry(), shelf, gauges or Gauges())


def test_requests_are_counted_by_who_answered_and_why(shelf: Shelf) -> None:
    metrics = of(shelf)
    for each in (
        entry(),
        entry(),
        by_teacher(),
        by_teacher(task=None, reason="not_this_task", asked="gpt-4o"),
    ):
        metrics.observe(each)
    labels = {"task": "tickets", "endpoint": "chat", "status": "2xx"}
    assert value(metrics, "homestill_requests_total", route="local", reason="confident", **labels) == 2
    assert value(metrics, "homestill_requests_total", route="teacher", reason="low_confidence", **labels) == 1
    assert value(metrics, "homestill_request_seconds_sum", route="local") == pytest.approx(0.1)
    assert value(metrics, "homestill_first_token_seconds_count", route="teacher") == 2
    assert value(metrics, "homestill_tokens_total", route="local", kind="prompt") == 600
    assert value(metrics, "homestill_cost_usd_total", task="tickets", key="alice") == pytest.approx(0.0021)
    assert value(metrics, "homestill_confidence_bucket", task="tickets", le="0.45") == 1
    assert value(metrics, "homestill_confidence_bucket", task="tickets", le="1.0") == 3


def test_what_a_client_writes_is_no_label(shelf: Shelf) -> None:
    metrics = of(shelf)
    for number in range(50):
        metrics.observe(
            by_teacher(task=None, asked=f"model-{number}", model=f"answered-{number}", cost_usd=None)
        )
    assert b"model-" not in metrics.render() and b"answered-" not in metrics.render()
    assert value(metrics, "homestill_unpriced_total", task="none") == 50


def test_a_failure_is_counted_without_a_latency(shelf: Shelf) -> None:
    metrics = of(shelf)
    metrics.observe(
        entry(route=None, reason=None, status=503, confidence=None, first_token_ms=None, cost_usd=None)
    )
    labels = {"task": "tickets", "route": "none", "reason": "none", "endpoint": "chat", "status": "5xx"}
    assert value(metrics, "homestill_requests_total", **labels) == 1
    assert value(metrics, "homestill_request_seconds_count", route="none") is None
    assert value(metrics, "homestill_unpriced_total", task="tickets") is None


def test_audits_are_no_requests_but_cost_what_they_cost(shelf: Shelf) -> None:
    metrics = of(shelf)
    metrics.observe(by_teacher(endpoint="audit", audit=1.0, cost_usd=0.5))
    metrics.observe(by_teacher(endpoint="audit", audit=0.5, cost_usd=0.25))
    metrics.observe(entry(endpoint="shadow", audit=1.0))
    assert b"homestill_requests_total{" not in metrics.render()
    assert value(metrics, "homestill_audits_total", task="tickets", agreed="yes") == 2
    assert value(metrics, "homestill_audits_total", task="tickets", agreed="no") == 1
    assert value(metrics, "homestill_cost_usd_total", task="tickets", key="alice") == 0.75
    assert value(metrics, "homestill_confidence_count", task="tickets") == 1


def test_gauges_are_asked_for_at_every_scrape(shelf: Shelf) -> None:
    queue = Queue(2, 5)
    gauges = Gauges(
        queue=lambda: queue,
        breakers=lambda: {"teacher": "half_open"},
        lost=lambda: 3,
        spending=lambda: [Spending("all", 1.5, 20.0), Spending("key bob", 0.5)],
        drift=lambda: {"tickets": Drift(True, 40, 0.1, 0.05, 0.2, 0.06)},
    )
    metrics = of(shelf, gauges)
    assert value(metrics, "homestill_local_requests", state="waiting") == 5
    queue = Queue(0, 0)
    assert value(metrics, "homestill_local_requests", state="waiting") == 0
    assert value(metrics, "homestill_breaker", upstream="teacher", state="half_open") == 1
    assert value(metrics, "homestill_breaker", upstream="teacher", state="closed") == 0
    assert value(metrics, "homestill_journal_lost_total") == 3
    assert value(metrics, "homestill_budget_cap_usd", scope="all") == 20
    assert value(metrics, "homestill_budget_cap_usd", scope="key bob") is None
    assert value(metrics, "homestill_drift_alarm", task="tickets") == 1


def test_releases_in_use_and_in_trouble(shelf: Shelf) -> None:
    version = write_release(shelf.folder)
    metrics = of(shelf)
    shelf.take_up("tickets")
    shelf.problems["claims"] = "altered"
    labels = {"task": "tickets", "version": version, "guarantee": "0.95@0.95"}
    assert value(metrics, "homestill_release_info", **labels) == 1
    assert value(metrics, "homestill_release_problem", task="claims") == 1


def test_two_endpoints_in_one_process_do_not_mix(shelf: Shelf) -> None:
    one, other = of(shelf), of(shelf)
    one.observe(entry())
    assert value(one, "homestill_request_seconds_count", route="local") == 1
    assert value(other, "homestill_request_seconds_count", route="local") is None


def test_counting_costs_little(shelf: Shelf) -> None:
    """Twenty microseconds on an idle machine; the bound leaves room for a busy one, not for a mistake."""
    metrics, seen = of(shelf), entry()
    assert min(timeit.repeat(lambda: metrics.observe(seen), number=200, repeat=5)) / 200 < 200e-6
