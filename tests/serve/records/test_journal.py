from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from serve.errors import JournalError
from serve.records.journal import BATCH, Entry, Journal, _open


def entry(number: int, task: str | None = "tickets") -> Entry:
    return Entry(
        id=f"req_{number}",
        asked="tickets",
        messages=[{"role": "user", "content": f"Größe {number}"}],
        status=200,
        latency_ms=12.5,
        overhead_ms=0.5,
        task=task,
        route="local",
        reason="confident",
        confidence=0.9,
        answer={"role": "assistant", "content": "ok"},
    )


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'journal.db'}"


def test_entries_come_back_whole_and_in_order(tmp_path: Path) -> None:
    journal = Journal(url(tmp_path))
    recorded = [entry(number, "tickets" if number % 2 else None) for number in range(BATCH + 50)]
    for each in recorded:
        journal.record(each)
    journal.close()
    reopened = Journal(url(tmp_path))
    found = list(reopened.entries(limit=10_000))
    odd = list(reopened.entries("tickets", after=found[9][0], limit=3))
    reopened.close()
    assert [each for _, each in found] == recorded
    assert [each.id for _, each in odd] == ["req_11", "req_13", "req_15"]


def test_what_was_flushed_survives_a_kill(tmp_path: Path) -> None:
    """The child says a number only when all entries up to it are acknowledged; then it is killed."""
    program = f"""
import itertools, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from serve.records.journal import Journal
from tests.serve.records.test_journal import entry
journal = Journal({url(tmp_path)!r})
for number in itertools.count(1):
    journal.record(entry(number))
    if number % 7 == 0:
        assert journal.flush(30)
        print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout
        told = [int(child.stdout.readline()) for _ in range(20)]
        os.kill(child.pid, signal.SIGKILL)
        told += [int(line) for line in child.stdout if line.endswith(b"\n")]
    journal = Journal(url(tmp_path))
    numbers = [int(each.id.removeprefix("req_")) for _, each in journal.entries(limit=1_000_000)]
    journal.close()
    assert numbers[: told[-1]] == list(range(1, told[-1] + 1))


def test_an_entry_is_written_without_anybody_asking(tmp_path: Path) -> None:
    journal = Journal(url(tmp_path))
    journal.record(entry(1))
    seen = threading.Event()

    def look() -> None:
        with sqlite3.connect(tmp_path / "journal.db") as reader:
            while not reader.execute("select count(*) from requests").fetchone()[0]:
                pass
        reader.close()
        seen.set()

    threading.Thread(target=look, daemon=True).start()
    assert seen.wait(10)
    journal.close()


def test_a_locked_database_costs_no_entry(tmp_path: Path) -> None:
    journal = Journal(url(tmp_path))
    with sqlite3.connect(tmp_path / "journal.db") as other:
        other.execute("begin immediate")
        journal.record(entry(1))
        assert not journal.flush(0.1)
        other.rollback()
    other.close()
    assert journal.flush(30)
    assert len(list(journal.entries())) == 1
    journal.close()


def test_one_entry_that_cannot_be_written_takes_no_other_with_it(tmp_path: Path) -> None:
    journal = Journal(url(tmp_path))
    for number in (1, 2, 1, 3):  # an id that is there already
        journal.record(entry(number))
    assert journal.flush(10)
    assert [each.id for _, each in journal.entries()] == ["req_1", "req_2", "req_3"]
    with pytest.raises(JournalError, match="1 requests could not be written"):
        journal.close()
    journal.close()


def test_a_journal_of_tomorrow_or_of_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="folder exists"):
        Journal(url(tmp_path / "missing"))
    engine = _open(url(tmp_path))
    with engine.begin() as connection:
        connection.execute(text("update journal_version set version = 99"))
    engine.dispose()
    with pytest.raises(JournalError, match="schema 99"):
        Journal(url(tmp_path))
