from __future__ import annotations

from datetime import timedelta

from serve.records.journal import Journal
from serve.records.reading import Selection
from tests.serve.records.journal_support import NOON, at, entry, record


def test_what_can_be_asked(journal: Journal) -> None:
    record(
        journal,
        entry(1, created=at(-24), prompt_tokens=10, completion_tokens=2, cost_usd=0.0),
        entry(2, created=at(0), prompt_tokens=10, completion_tokens=2, cost_usd=0.0, latency_ms=20.0),
        entry(3, created=at(1), prompt_tokens=10, completion_tokens=4, cost_usd=0.0, latency_ms=40.0),
        entry(4, created=at(2), route="teacher", reason="low_confidence", cost_usd=0.25),
        entry(5, "mail", created=at(3), route=None, reason=None, status=503, key="alice"),
        entry(6, created=at(4), endpoint="audit", release="r1", audit=1.0),
        entry(7, "mail", created=at(4), endpoint="audit", release="r1", audit=0.25),
        entry(8, created=at(4), endpoint="audit", release="r2", audit=0.5),
        entry(9, created=at(5), endpoint="audit", release="r1", audit=0.0),
        entry(10, created=at(5), endpoint="shadow", release="r1", audit=0.75),
    )
    assert list(journal.audits("tickets", "r1")) == [1.0, 0.0]
    assert [each.id for each in journal.recent(2)] == ["req_10", "req_9"]
    assert [each.id for each in journal.recent(9, Selection(key="alice"))] == ["req_5"]
    assert journal.find("req_0") is None
    totals = [each for each in journal.summary(NOON) if each.endpoint == "chat"]
    found = {(each.task, each.route, each.reason): each for each in totals}
    assert len(found) == len(totals) == 3
    local = found["tickets", "local", "confident"]
    assert (local.day, local.requests, local.failed) == ("2026-11-20", 2, 0)
    assert (local.prompt_tokens, local.completion_tokens, local.latency_ms) == (20, 6, 30.0)
    assert found["tickets", "teacher", "low_confidence"].cost_usd == 0.25
    assert found["mail", None, None].failed == 1
    assert {each.day for each in journal.summary()} == {"2026-11-19", "2026-11-20"}
    extent = journal.extent(Selection(before=NOON + timedelta(hours=1)))
    assert (extent.requests, extent.oldest, extent.newest) == (2, at(-24), at(0))
    one = '[{"role":"user","content":"Größe 1"}]{"role":"assistant","content":"ok"}'
    assert extent.body_bytes == 2 * len(one)
