from __future__ import annotations

import logging
import sqlite3
import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, text

from serve.errors import JournalError
from serve.records.entry import Entry, to_line
from serve.records.journal import Journal
from serve.records.reading import Selection
from serve.records.schema import requests
from tests.serve.records.journal_support import (
    child,
    entry,
    kill,
    left_by_a_killed_process,
    parts,
    record,
    url,
)

KILLED = """
import itertools, sys
from pathlib import Path
from serve.records.journal import Journal
from tests.serve.records.journal_support import entry, url
journal = Journal(url(Path(sys.argv[1])))
for number in itertools.count():
    journal.record(entry(number, id=f"{sys.argv[2]}_{number}"))
    print(f"{sys.argv[2]}_{number}", flush=True)
"""
BESIDE = """
import sys
from pathlib import Path
from serve.records.journal import Journal
from tests.serve.records.journal_support import entry, url
journal = Journal(url(Path(sys.argv[1])))
for number in range(200):
    journal.record(entry(number, id=f"{sys.argv[2]}_{number}"))
journal.close()
"""
DISK_FULL = """
import logging, resource, signal, sys
from pathlib import Path
from serve.records.journal import Journal
from tests.serve.records.journal_support import entry, url
logging.basicConfig(stream=sys.stdout, format="log %(levelname)s")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(url(Path(sys.argv[1])))
large = [{"role": "user", "content": "x" * 50_000}]
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
for number in range(20):
    journal.record(entry(number, messages=large))
print("lost", journal.lost, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.record(entry(20, messages=large))
print("flushed", journal.flush(30), "lost", journal.lost, len(list(journal.entries())), flush=True)
"""


def test_entries_come_back_whole_and_in_order(tmp_path: Path) -> None:
    journal = Journal(url(tmp_path))
    full = entry(
        0,
        release="r1",
        predictor="predict",
        threshold=0.8,
        guarantee="0.98@0.95",
        degraded=True,
        streamed=True,
        model="m",
        prompt_tokens=3,
        completion_tokens=4,
        cost_usd=0.0001,
        local_answer="no",
        error="e",
        key="alice",
        egress="redact",
        strategy="certified",
        first_token_ms=1.5,
        attempts=2,
        audit=0.5,
        audited="req_9",
    )
    assert all(getattr(full, each.name) is not None for each in fields(Entry))
    recorded = [full, *(entry(number, "tickets" if number % 2 else None) for number in range(1, 150))]
    for each in recorded:
        journal.record(each)
    journal.close()
    reopened = Journal(url(tmp_path))
    found = list(reopened.entries(limit=10_000))
    odd = list(reopened.entries("tickets", after=found[9][0], limit=3))
    every = list(reopened.every(Selection(task="tickets")))
    reopened.close()
    assert [each for _, each in found] == recorded
    assert [each.id for _, each in odd] == ["req_11", "req_13", "req_15"]
    assert every == [each for each in recorded if each.task]


TEXTS = st.text(max_size=20)
ENTRIES = st.builds(
    lambda answer, local, number, share, messages: entry(
        1, answer=answer, local_answer=local, prompt_tokens=number, latency_ms=share, messages=messages
    ),
    st.none() | st.dictionaries(TEXTS, TEXTS | st.none() | st.booleans(), max_size=3),
    st.none() | TEXTS,
    st.none() | st.integers(0, 2**63 - 1),
    st.integers(0, 10**9).map(lambda value: value / 1000),
    st.lists(st.recursive(TEXTS | st.integers(-(2**63), 2**63 - 1), st.lists, max_leaves=5)),
)


@settings(max_examples=60)
@given(ENTRIES)
def test_whatever_an_entry_holds_comes_back(journal: Journal, given_entry: Entry) -> None:
    """Also by the way for lines that SQLite cannot cut up itself, such as those with a NUL."""
    record(journal, given_entry)
    found = journal.find("req_1")
    with journal._engine.begin() as connection:
        connection.execute(delete(requests))
    assert found == given_entry


def test_nothing_acknowledged_is_lost_when_the_process_is_killed_twenty_times(tmp_path: Path) -> None:
    """The child names each id when `record` has returned; no commit is waited for."""
    told: list[str] = []
    for run in range(20):
        process = child(KILLED, str(tmp_path), f"run{run}")
        assert process.stdout
        told += [process.stdout.readline() for _ in range(1 + 13 * run)]
        told += kill(process)
    journal = Journal(url(tmp_path))
    found = [each.id for each in journal.every()]
    journal.close()
    assert len(told) > 20 * 13 * 9
    assert not {line.strip() for line in told} - set(found)
    assert len(found) == len(set(found))
    assert parts(tmp_path) == []


def test_what_a_killed_process_left_is_written_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [to_line(entry(number)) for number in range(4)]
    journal = Journal(url(tmp_path))
    record(journal, entry(0))  # the kill came between the commit and the end of the part
    journal.close()
    left_by_a_killed_process(tmp_path, b"\n".join(lines[:3]) + b'\n{"id": "req_torn", "mess')
    left_by_a_killed_process(tmp_path, lines[3] + b"\n", "2-dead")
    with caplog.at_level(logging.WARNING, "serve"):
        journal = Journal(url(tmp_path))
    assert [each.id for each in journal.every()] == ["req_0", "req_1", "req_2", "req_3"]
    assert journal.lost == 0
    journal.close()
    assert parts(tmp_path) == []
    assert "3 requests that a killed process left" in caplog.text


def test_a_line_that_is_no_entry_takes_no_other_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = replace(entry(2), asked=None)  # type: ignore[arg-type]
    lines = [to_line(entry(1)), b"\x00\x00\x00", to_line(wrong), to_line(entry(3))]
    left_by_a_killed_process(tmp_path, b"\n".join(lines) + b"\n")
    journal = Journal(url(tmp_path))
    assert [each.id for each in journal.every()] == ["req_1", "req_3"]
    with pytest.raises(JournalError, match="2 requests could not be written"):
        journal.close()
    journal.close()
    assert "no journal entry" in caplog.text
    assert "req_2 cannot be journaled (NOT NULL constraint failed: requests.asked)" in caplog.text


def test_an_entry_that_can_never_be_written_takes_no_other_with_it(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    record(
        journal,
        entry(1),
        entry(2, asked=None),
        entry(3, messages=[{"content": "\x00"}], local_answer="a\x00b"),
        entry(4, messages=[object()]),
        entry(5),
    )
    assert [each.id for each in journal.every()] == ["req_1", "req_3", "req_5"]
    found = journal.find("req_3")
    assert found
    assert found.local_answer == "a\x00b"
    assert journal.lost == 2
    journal.lost = 0
    assert "req_2 cannot be journaled" in caplog.text
    assert "first req_4" in caplog.text


def test_processes_that_start_and_write_at_once_lose_nothing(tmp_path: Path) -> None:
    processes = [child(BESIDE, str(tmp_path), name) for name in "abc"]
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0, 0]
    journal = Journal(url(tmp_path))
    assert {each.id for each in journal.every()} == {f"{name}_{n}" for name in "abc" for n in range(200)}
    journal.close()
    assert parts(tmp_path) == []


def test_a_full_disk_costs_entries_but_no_request(tmp_path: Path) -> None:
    process = child(DISK_FULL, str(tmp_path))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.splitlines() == ["log ERROR", "lost 20", "log WARNING", "flushed True lost 20 1"]


def test_an_entry_is_written_without_anybody_asking(tmp_path: Path, journal: Journal) -> None:
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


def test_a_locked_database_costs_no_entry(tmp_path: Path, journal: Journal) -> None:
    with sqlite3.connect(tmp_path / "journal.db") as other:
        other.execute("begin immediate")
        journal.record(entry(1))
        assert not journal.flush(0.1)
        other.rollback()
    other.close()
    assert journal.flush(30)
    assert len(list(journal.entries())) == 1


def test_what_cannot_be_written_at_the_end_waits_for_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(url(tmp_path))
    with journal._engine.begin() as connection:
        connection.execute(text("alter table requests rename to aside"))
    journal.record(entry(1))
    journal.close()
    assert journal.lost == 0
    assert "no such table" in caplog.text
    assert len(parts(tmp_path)) == 1
    with sqlite3.connect(tmp_path / "journal.db") as mended:
        mended.execute("alter table aside rename to requests")
    mended.close()
    journal = Journal(url(tmp_path))
    assert journal.find("req_1")
    journal.close()


def test_after_its_end_a_journal_takes_nothing(tmp_path: Path) -> None:
    journal = Journal(url(tmp_path))
    journal.close()
    journal.record(entry(1))
    assert journal.lost == 1
    assert journal.flush(0)
