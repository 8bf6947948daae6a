"""A backup holds what cannot be made again, is taken while everything runs, and is checked before it is put back."""

from __future__ import annotations

import fcntl
import shutil
import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from serve import release as releases
from serve.records.journal import Journal
from tests.finished import finished_run
from tests.trainer.bundle.test_carry import ENTRY, TRACE
from trainer import release
from trainer.errors import BundleError, BusyError, StoreError
from trainer.keeping.backup import backup, read, restore
from trainer.runs import Home
from trainer.traces import Store

NOW = "20261121T073000Z"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a release, a trace, a served request, budgets, settings and keys."""
    run = finished_run(tmp_path_factory.mktemp("made"), train=6, calibrate=12, test=8)
    release.run(run)
    run.store.add_trace(TRACE)
    run.store.close()
    root = run.home.root
    with closing(Journal(f"sqlite:///{root / 'journal.db'}")) as journal:
        journal.record(ENTRY)
    with closing(sqlite3.connect(root / "budget.db")) as database:
        database.execute("CREATE TABLE spent (day TEXT)")
        database.commit()
    (root / "serve.yaml").write_text("{}\n")
    (root / "keys.json").write_text("{}\n")
    return root


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(made, tmp_path / "home")
    return tmp_path / "home"


def _release_files(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in (root / "releases").rglob("*")
        if path.is_file()
    }


def test_a_restored_home_is_the_one_that_was_backed_up(home: Path, tmp_path: Path) -> None:
    backup(home, tmp_path / "backup", NOW)
    there = tmp_path / "there"
    restore(tmp_path / "backup", there)
    assert _release_files(there) == _release_files(home)
    assert releases.current(there / "releases" / "words") is not None
    with closing(Store.open(Home(there).database_url)) as store:
        assert store.trace(TRACE.id) == TRACE
        assert len(store.answers("teacher-system")) == 20
    with closing(Journal(f"sqlite:///{there / 'journal.db'}")) as journal:
        assert journal.find("r1") == ENTRY
    assert {each.name for each in there.iterdir()} >= {"budget.db", "serve.yaml", "keys.json"}
    assert (there / "keys.json").stat().st_mode & 0o077 == 0
    assert there.stat().st_mode & 0o077 == 0
    assert (tmp_path / "backup").stat().st_mode & 0o077 == 0
    assert not (there / "runs").exists()


def test_a_backup_under_load_holds_all_that_was_there_before(home: Path, tmp_path: Path) -> None:
    """The journal moves entries from its spool to its database meanwhile; none falls between the two."""
    stop, count = threading.Event(), 0
    with closing(Journal(f"sqlite:///{home / 'journal.db'}")) as journal:

        def serve() -> None:
            nonlocal count
            while not stop.is_set():
                journal.record(replace(ENTRY, id=f"n{count}"))
                count += 1

        writer = threading.Thread(target=serve)
        writer.start()
        try:
            while count < 200:
                assert writer.is_alive()
            before = count
            backup(home, tmp_path / "backup", NOW)
        finally:
            stop.set()
            writer.join()
    restore(tmp_path / "backup", tmp_path / "there")
    with closing(Journal(f"sqlite:///{tmp_path / 'there' / 'journal.db'}")) as journal:
        journal.flush()
        assert all(journal.find(f"n{number}") for number in range(0, before, 10))
        assert journal.find(f"n{before - 1}") is not None


def test_a_second_backup_in_the_same_folder_copies_no_release_again(home: Path, tmp_path: Path) -> None:
    backup(home, tmp_path / "backup", NOW)
    models = {path: path.stat().st_ino for path in (tmp_path / "backup").rglob("model.gguf")}
    (home / "serve.yaml").write_text("tasks: {}\n")
    backup(home, tmp_path / "backup", "20261122T000000Z")
    assert models
    assert {path: path.stat().st_ino for path in models} == models
    assert read(tmp_path / "backup").created == "20261122T000000Z"
    assert (tmp_path / "backup" / "serve.yaml").read_text() == "tasks: {}\n"


def test_a_damaged_backup_is_not_put_back(home: Path, tmp_path: Path) -> None:
    backup(home, tmp_path / "backup", NOW)
    (tmp_path / "backup" / "keys.json").write_text("[]\n")
    with pytest.raises(BundleError, match=r"keys\.json is not what was signed"):
        restore(tmp_path / "backup", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_what_is_there_is_set_aside_and_only_when_told(home: Path, tmp_path: Path) -> None:
    backup(home, tmp_path / "backup", NOW)
    (home / "serve.yaml").write_text("changed: since\n")
    with pytest.raises(BundleError, match="--force"):
        restore(tmp_path / "backup", home)
    for _ in range(2):
        restore(tmp_path / "backup", home, force=True)
        assert (home / "serve.yaml").read_text() == "{}\n"
    assert (home / "runs").is_dir()
    assert (home / "before-restore-1" / "serve.yaml").read_text() == "changed: since\n"
    assert (home / "before-restore-2" / "homestill.db").is_file()


def test_nothing_is_restored_under_a_running_endpoint(home: Path, tmp_path: Path) -> None:
    backup(home, tmp_path / "backup", NOW)
    with (
        closing(Journal(f"sqlite:///{home / 'journal.db'}")),
        pytest.raises(BusyError, match="stop the endpoint"),
    ):
        restore(tmp_path / "backup", home, force=True)


@pytest.mark.parametrize(
    "lock",
    [
        "runs/words/.lock",
        "runs/words/.capture.lock",
        "studies/words/order/.lock",
        "studies/words/order/runs/.capture.lock",
        "watch/.lock",
        ".load.lock",
    ],
)
def test_nothing_is_restored_while_anything_may_write(home: Path, tmp_path: Path, lock: str) -> None:
    """A capture outlives its killed run, to store what was on its way."""
    backup(home, tmp_path / "backup", NOW)
    (home / lock).parent.mkdir(parents=True, exist_ok=True)
    with open(home / lock, "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="is in use: stop the endpoint"):
            restore(tmp_path / "backup", home, force=True)
    restore(tmp_path / "backup", home, force=True)


def test_links_are_refused_rather_than_left_out(home: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (home / "tasks" / "words" / ".git").mkdir(parents=True)
    for name in ("rows.jsonl", "folder", ".git/link"):
        (home / "tasks" / "words" / name).symlink_to(tmp_path / "data")
    with pytest.raises(BundleError) as refused:
        backup(home, tmp_path / "backup", NOW)
    assert [fault.partition(" is a link; ")[0] for fault in refused.value.faults] == [
        str(home / "tasks" / "words" / name) for name in ("folder", "rows.jsonl")
    ]


def test_a_damaged_database_and_an_empty_home_are_said(tmp_path: Path) -> None:
    root = tmp_path / "home"
    root.mkdir()
    with pytest.raises(BundleError, match="nothing to back up"):
        backup(root, tmp_path / "one", NOW)
    (root / "homestill.db").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    with pytest.raises(StoreError, match=r"homestill\.db"):
        backup(root, tmp_path / "two", NOW)
    with pytest.raises(BundleError, match="no finished backup"):
        read(tmp_path / "two")
