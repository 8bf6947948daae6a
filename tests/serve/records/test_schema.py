from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text

from serve.errors import JournalError
from serve.records.journal import Journal
from serve.records.schema import open_database
from tests.serve.records.journal_support import entry, record, url

SCHEMA_1 = """
CREATE TABLE journal_version (version INTEGER NOT NULL);
CREATE TABLE requests (
    number INTEGER NOT NULL, id VARCHAR(40) NOT NULL, created VARCHAR(32) NOT NULL, task TEXT,
    release VARCHAR(40), predictor TEXT, asked TEXT NOT NULL, route VARCHAR(16), reason VARCHAR(32),
    confidence FLOAT, threshold FLOAT, guarantee VARCHAR(32) NOT NULL, degraded BOOLEAN NOT NULL,
    streamed BOOLEAN NOT NULL, status INTEGER NOT NULL, model TEXT, prompt_tokens INTEGER,
    completion_tokens INTEGER, cost_usd FLOAT, latency_ms FLOAT NOT NULL, overhead_ms FLOAT NOT NULL,
    messages JSON NOT NULL, answer JSON, local_answer TEXT, error TEXT,
    PRIMARY KEY (number), UNIQUE (id)
);
CREATE INDEX ix_requests_created ON requests (created);
CREATE INDEX ix_requests_task ON requests (task);
INSERT INTO journal_version VALUES (1);
INSERT INTO requests VALUES (
    7, 'req_old', '2026-11-20T10:00:00.000+00:00', 'tickets', NULL, NULL, 'tickets', 'teacher', 'no_release',
    NULL, NULL, 'none', 0, 1, 200, 'gpt-4o', 12, 3, 0.5, 20.0, 0.5, '[{"role":"user","content":"hi"}]', 'null',
    NULL, NULL
);
"""
"""As the first version of Homestill made it."""


def test_a_journal_of_tomorrow_or_of_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="folder exists"):
        Journal(url(tmp_path / "missing"))
    with pytest.raises(JournalError, match="folder for the journal's spool"):
        Journal("sqlite://")
    with pytest.raises(JournalError, match="folder writable"):
        Journal("sqlite://", tmp_path / "missing")
    engine = open_database(url(tmp_path))
    with engine.begin() as connection:
        connection.execute(text("update journal_version set version = 99"))
    engine.dispose()
    with pytest.raises(JournalError, match="schema 99"):
        Journal(url(tmp_path))


def test_nobody_else_may_read_it(tmp_path: Path, journal: Journal) -> None:
    journal.record(entry(1))
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_journal_of_the_first_schema_is_migrated(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "journal.db") as old:
        old.executescript(SCHEMA_1)
    old.close()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    open_database(url(fresh)).dispose()
    for _ in range(2):
        journal = Journal(url(tmp_path))
        record(journal, entry(1, key="alice"))
        (number, first), (_, second) = journal.entries()
        journal.close()
        assert (number, first.id, first.streamed, first.answer, first.key) == (7, "req_old", True, None, None)
        assert second.key == "alice"
    names = []
    for folder in (tmp_path, fresh):
        with sqlite3.connect(folder / "journal.db") as database:
            columns = [row[1] for row in database.execute("pragma table_info(requests)")]
            indices = {row[1] for row in database.execute("pragma index_list(requests)")}
        database.close()
        names.append((columns, indices))
    assert names[0] == names[1]
