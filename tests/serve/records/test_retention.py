from __future__ import annotations

import asyncio
import logging
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from serve.records.entry import stamp
from serve.records.journal import Journal
from serve.records.retention import EVERY_S, Retention
from tests.serve.records.journal_support import entry, url

START = datetime(2026, 11, 20, 12, tzinfo=UTC)


class Hours:
    """A clock that moves by what is slept, and ends after so many sleeps."""

    def __init__(self, sleeps: int) -> None:
        self.now = START
        self.left = sleeps

    async def sleep(self, seconds: float) -> None:
        if not self.left:
            raise asyncio.CancelledError
        self.left -= 1
        self.now += timedelta(seconds=seconds)


def remaining(journal: Journal) -> list[str]:
    return [each.id for each in journal.every()]


def run(retention: Retention) -> None:
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(retention.run())


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    opened = Journal(url(tmp_path))
    for hours in (30, 24, 23, 21):
        opened.record(entry(hours, created=stamp(START - timedelta(hours=hours))))
    assert opened.flush(30)
    return opened


@pytest.mark.parametrize(("sleeps", "left"), [(0, ["req_24", "req_23", "req_21"]), (2, ["req_21"])])
def test_old_requests_go_at_the_start_and_every_hour(journal: Journal, sleeps: int, left: list[str]) -> None:
    hours = Hours(sleeps)
    run(Retention(journal, 1.0, lambda: hours.now, hours.sleep))
    assert hours.now == START + timedelta(seconds=EVERY_S * sleeps)
    assert remaining(journal) == left
    journal.close()


def test_without_an_age_all_is_kept(journal: Journal) -> None:
    retention = Retention(journal, None)
    asyncio.run(retention.run())
    assert retention.once() == 0
    assert len(remaining(journal)) == 4
    journal.close()


def test_a_deletion_that_fails_is_tried_again(
    tmp_path: Path, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    hours = Hours(1)

    def rename(name: str, to: str) -> None:
        with sqlite3.connect(tmp_path / "journal.db") as other:
            other.execute(f"alter table {name} rename to {to}")
        other.close()

    async def sleep(seconds: float) -> None:
        if hours.left:
            rename("aside", "requests")
        await hours.sleep(seconds)

    rename("requests", "aside")
    with caplog.at_level(logging.INFO, "serve"):
        run(Retention(journal, 1.0, lambda: hours.now, sleep))
    assert "old requests are not deleted (the journal cannot be written (no such table" in caplog.text
    assert "2 requests older than 1 days are deleted" in caplog.text
    assert remaining(journal) == ["req_23", "req_21"]
    journal.close()
