"""The store opens, migrates, keeps, and says what is wrong with a file that is no store."""

from __future__ import annotations

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event

from trainer.errors import DiskError, StoreError
from trainer.traces import MIGRATIONS, Answer, Store, Trace

TRACE = Trace(
    id="a", task="t", example="e", predictor="p", purpose="capture", program="h", teacher="m", stand_in=False,
    messages=[{"role": "user", "content": "hi"}], completion="yes", response={"k": 1}, prompt_tokens=1,
    completion_tokens=1, cost_usd=0.5, latency_ms=1.0, created="2026-01-01T00:00:00+00:00",
)  # fmt: skip
ANSWER = Answer(
    system="s", example="e", role="student", task="t", outputs={"x": [1]}, score=0.5, latency_ms=1.0,
    prompt_tokens=1, completion_tokens=1, cost_usd=0.0, error=None, calls=[{"logprobs": []}],
)  # fmt: skip


def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'store.db'}"


def test_what_is_added_is_found_by_another_opening(tmp_path: Path) -> None:
    first = Store.open(url(tmp_path))
    first.add_trace(TRACE)
    first.add_trace(dataclasses.replace(TRACE, id="b", purpose="optimize"))
    first.add_answer(ANSWER)
    first.score_traces(["a"], 1.0)
    first.close()
    second = Store.open(url(tmp_path))
    assert second.trace("a") == dataclasses.replace(TRACE, score=1.0)
    assert second.trace("none") is None
    assert second.spent("t") == 1.0
    assert second.answers("s") == {"e": ANSWER}
    assert second.answers("other") == {}
    second.close()


def test_what_was_spent_is_read_off_an_index_in_a_store_of_the_first_version_too(tmp_path: Path) -> None:
    Store.open(url(tmp_path)).close()
    with closing(sqlite3.connect(tmp_path / "store.db")) as raw:
        raw.execute("DROP INDEX ix_traces_cost")
        raw.execute("DELETE FROM schema_version WHERE version > 1")
        raw.execute("INSERT INTO schema_version VALUES (1)")
        raw.commit()
    Store.open(url(tmp_path)).close()
    with closing(sqlite3.connect(tmp_path / "store.db")) as raw:
        plan = raw.execute("EXPLAIN QUERY PLAN SELECT sum(cost_usd) FROM traces WHERE task = 't'").fetchall()
    assert "COVERING INDEX ix_traces_cost" in plan[0][-1]


def test_a_committed_trace_survives_kill_9(tmp_path: Path) -> None:
    code = (
        "import sys, time; from trainer.traces import Store; from tests.trainer.test_traces import TRACE\n"
        "Store.open(sys.argv[1]).add_trace(TRACE); print('stored', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, url(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "stored\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    store = Store.open(url(tmp_path))
    assert store.trace("a") == TRACE
    store.close()


def test_what_another_process_has_stored_is_no_full_disk(tmp_path: Path) -> None:
    with closing(Store.open(url(tmp_path))) as store:
        store.add_trace(TRACE)
        with pytest.raises(StoreError, match=r"another process has stored the same .*; run again"):
            store.add_trace(TRACE)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    Store.open(url(tmp_path)).close()
    raw = sqlite3.connect(tmp_path / "store.db")
    raw.execute("INSERT INTO schema_version VALUES (99)")
    raw.commit()
    raw.close()
    with pytest.raises(StoreError, match=f"schema 99, this Homestill knows up to {len(MIGRATIONS)}"):
        Store.open(url(tmp_path))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the driver leaves a refused file to the collector
def test_a_file_that_is_no_database_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_text("this is no database" * 100, encoding="utf-8")
    with pytest.raises(StoreError, match="cannot be opened") as caught:
        Store.open(url(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "error", "said"),
    [
        ("max_page_count=1", DiskError, r"the disk below .* is full; free some space"),
        ("query_only=ON", StoreError, r".* cannot be written to; make it writable"),
    ],
)
def test_a_full_and_a_read_only_disk_are_called_so(
    tmp_path: Path, state: str, error: type[Exception], said: str
) -> None:
    engine = create_engine(url(tmp_path))
    with closing(Store.open(url(tmp_path))), closing(Store(engine)) as store:
        event.listen(engine, "connect", lambda connection, _: connection.execute(f"PRAGMA {state}"))
        with pytest.raises(error, match=said):
            store.add_trace(dataclasses.replace(TRACE, completion="long" * 100_000))
