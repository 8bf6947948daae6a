from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest

from serve.errors import JournalError
from serve.records.entry import to_line
from serve.records.journal import Journal
from serve.records.reading import Selection
from tests.serve.records.journal_support import (
    NOON,
    at,
    entry,
    left_by_a_killed_process,
    record,
    url,
)


@pytest.mark.parametrize(
    ("selection", "left"),
    [
        (Selection(before=NOON), {2, 3, 4}),
        (Selection(key="alice"), {1, 4}),
        (Selection(task="mail"), {1, 2}),
        (Selection(before=NOON + timedelta(hours=2), key="alice", task="mail"), {1, 2, 4}),
        (Selection(task="none"), {1, 2, 3, 4}),
    ],
)
def test_deletion_by_age_key_and_task(journal: Journal, selection: Selection, left: set[int]) -> None:
    record(
        journal,
        entry(1, created=at(-1)),
        entry(2, created=at(0), key="alice"),
        entry(3, "mail", created=at(1), key="alice"),
        entry(4, "mail", created=at(1), key="bob"),
    )
    assert journal.delete(selection) == 4 - len(left)
    assert {each.id for each in journal.every()} == {f"req_{number}" for number in left}


def test_a_deletion_must_say_what(journal: Journal) -> None:
    with pytest.raises(ValueError, match="at least one"):
        journal.delete(Selection())


def test_nothing_of_what_was_deleted_is_left_in_any_file(tmp_path: Path, journal: Journal) -> None:
    secret = "Kennwort-Rosenholz"
    many = [{"role": "user", "content": f"{secret} " * 400}]  # more than a page, so on pages of its own too
    for number in range(300):
        keyed = number % 3 == 0
        content = many if number % 2 else [{"role": "user", "content": secret}]
        messages = content if keyed else entry(number).messages
        journal.record(entry(number, key="alice" if keyed else "bob", messages=messages))
    left_by_a_killed_process(tmp_path, to_line(entry(1000, key="alice", local_answer=secret)) + b"\n")
    assert journal.flush(30)
    assert any(secret.encode() in path.read_bytes() for path in tmp_path.iterdir())
    assert journal.delete(Selection(key="alice")) == 101
    assert [path.name for path in tmp_path.iterdir() if secret.encode() in path.read_bytes()] == []
    assert len(list(journal.every())) == 200


def test_a_deletion_sees_what_another_process_has_not_committed_yet(tmp_path: Path, journal: Journal) -> None:
    other = Journal(url(tmp_path))
    for number in range(50):
        other.record(entry(number, key="alice"))
    assert journal.delete(Selection(key="alice")) == 50
    other.close()


def test_more_than_one_transaction_is_deleted(journal: Journal) -> None:
    record(journal, *(entry(number) for number in range(4500)))
    assert journal.delete(Selection(task="tickets")) == 4500
    assert journal.extent().requests == 0


def test_a_spool_that_cannot_be_read_is_said(tmp_path: Path, journal: Journal) -> None:
    os.mkdir(tmp_path / "journal-1-folder.spool")
    with pytest.raises(JournalError, match="spool cannot be read"):
        journal.delete(Selection(key="alice"))
    os.rmdir(tmp_path / "journal-1-folder.spool")
