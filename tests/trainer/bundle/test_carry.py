"""Traces travel: everything that a replay needs, each row once, no key with them."""

from __future__ import annotations

import gzip
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from serve.records.entry import Entry
from serve.records.journal import Journal
from trainer.bundle.carry import give, take
from trainer.bundle.secrets import Secrets
from trainer.errors import BundleError
from trainer.runs import Home
from trainer.traces import Answer, Store, Trace

TRACE = Trace(
    id="a" * 64,
    task="words",
    example="e1",
    predictor="sort",
    purpose="capture",
    program="p" * 64,
    teacher="openai/pretend",
    stand_in=True,
    messages=[{"role": "user", "content": "Grüße, one"}],
    completion="odd",
    response={"text": "odd", "usage": {"input": 3}},
    prompt_tokens=3,
    completion_tokens=1,
    cost_usd=0.25,
    latency_ms=12.5,
    score=1.0,
)
ANSWER = Answer(
    system="s" * 64,
    example="e1",
    role="teacher",
    task="words",
    outputs={"label": "odd"},
    score=1.0,
    latency_ms=12.5,
    prompt_tokens=3,
    completion_tokens=1,
    cost_usd=0.25,
    error=None,
    calls=[],
)
ENTRY = Entry(
    id="r1",
    asked="words",
    messages=[{"role": "user", "content": "two"}],
    status=200,
    latency_ms=1,
    overhead_ms=1,
    task="words",
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """With a trace, answers of three roles, and requests of two tasks."""
    home = Home(tmp_path / "home")
    home.root.mkdir()
    with closing(Store.open(home.database_url)) as store:
        store.add_trace(TRACE)
        store.add_trace(replace(TRACE, id="b" * 64, task="other"))
        for role in ("teacher", "base", "student"):
            store.add_answer(replace(ANSWER, system=role, role=role))
    with closing(Journal(f"sqlite:///{home.root / 'journal.db'}")) as journal:
        journal.record(ENTRY)
        journal.record(replace(ENTRY, id="r2", task="other"))
    return home


def test_a_task_arrives_as_it_left_and_only_once(home: Home, tmp_path: Path) -> None:
    assert give(home, "words", tmp_path / "w.jsonl.gz", requests=True) == 3
    there = Home(tmp_path / "there")
    first = take(tmp_path / "w.jsonl.gz", there)
    assert first.new == first.held == {"traces": 1, "answers": 1, "requests": 1}
    again = take(tmp_path / "w.jsonl.gz", there)
    assert again.new == {"traces": 0, "answers": 0, "requests": 0}
    assert "took 0 of 1 traces" in again.sentence()
    with closing(Store.open(there.database_url)) as store:
        assert store.trace("a" * 64) == TRACE
        assert set(store.answers("teacher")) == {"e1"}
        assert store.answers("student") == {}
        assert store.spent("words") == 0.25
    with closing(Journal(f"sqlite:///{there.root / 'journal.db'}")) as journal:
        assert journal.find("r1") == ENTRY


def test_the_same_rows_make_the_same_file(home: Home, tmp_path: Path) -> None:
    for name in ("one.gz", "two.gz"):
        give(home, "words", tmp_path / name, requests=True)
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()


def test_what_is_asked_for_alone_travels(home: Home, tmp_path: Path) -> None:
    assert give(home, "words", tmp_path / "a.gz") == 2
    assert give(home, "words", tmp_path / "b.gz", bought=False, requests=True) == 1
    assert give(Home(tmp_path / "empty"), "words", tmp_path / "c.gz", requests=True) == 0


def test_a_row_with_a_key_stays(home: Home, tmp_path: Path) -> None:
    with closing(Store.open(home.database_url)) as store:
        store.add_trace(replace(TRACE, id="c" * 64, completion="the key is s3cr3t-of-ours"))
    secrets = Secrets({"PROVIDER_API_KEY": "s3cr3t-of-ours"})
    with pytest.raises(BundleError, match="value of PROVIDER_API_KEY") as refused:
        give(home, "words", tmp_path / "w.gz", secrets=secrets)
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([{"carry": 2, "task": "words"}], "no file of traces of format 1"),
        ([{"carry": 1, "task": "words"}, {"table": "sqlite_master", "row": {}}], "sqlite_master"),
        ([{"carry": 1, "task": "words"}, {"table": "traces", "row": {"id": "x"}}], "lacks"),
        ([{"carry": 1, "task": "words"}, {"table": "traces", "row": {"later": 1}}], "has later"),
        ([{"carry": 1, "task": "words"}, {"table": "requests", "row": {"later": 1}}], "upgrade Homestill"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, rows: list[dict[str, object]], fault: str) -> None:
    file = tmp_path / "w.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    with pytest.raises(BundleError, match=fault):
        take(file, Home(tmp_path / "home"))


def test_a_cut_off_file_takes_nothing(home: Home, tmp_path: Path) -> None:
    file = tmp_path / "w.gz"
    give(home, "words", file)
    file.write_bytes(file.read_bytes()[:-20])
    there = Home(tmp_path / "there")
    with pytest.raises(BundleError, match="cannot be read"):
        take(file, there)
    with closing(Store.open(there.database_url)) as store:
        assert store.trace("a" * 64) is None
