"""A home that the first version wrote still opens: its store, its journal, its release."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from serve import release as releases
from serve.records.journal import Journal
from trainer.errors import StoreError
from trainer.keeping.upgrade import upgrade
from trainer.runs import Home
from trainer.traces import MIGRATIONS, Store

FIRST = Path(__file__).parents[2] / "fixtures" / "first_version"
VERSION = "20261121T010000Z-00b1240f"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """As the first version left it."""
    home = Home(tmp_path / "home")
    shutil.copytree(FIRST / "releases", home.root / "releases")
    for name in ("homestill", "journal"):
        with closing(sqlite3.connect(home.root / f"{name}.db")) as database:
            database.executescript((FIRST / f"{name}.sql").read_text("utf-8"))
    return home


def test_every_database_is_migrated_and_every_release_read(home: Home) -> None:
    found = {step.name: step for step in upgrade(home)}
    assert found["journal.db"].text == "migrated from schema 1 to 2"
    assert found["homestill.db"].text.endswith(str(len(MIGRATIONS)))
    assert found[f"words {VERSION}"].text == "sound, from before there was interface.json and audit"
    assert all(step.sound for step in found.values())
    again = {step.name: step.text for step in upgrade(home)}
    assert again["journal.db"] == "schema 2"


def test_nothing_of_it_is_lost(home: Home) -> None:
    upgrade(home)
    with closing(Store.open(home.database_url)) as store:
        trace = store.trace("a" * 64)
        assert trace is not None
        assert (trace.cost_usd, trace.completion, trace.response) == (0.25, "odd", {"text": "odd"})
        assert {len(store.answers(system)) for system in ("teacher-system", "student-system-0.97")} == {20}
    with closing(Journal(f"sqlite:///{home.root / 'journal.db'}")) as journal:
        entry = journal.find("r1")
        assert entry is not None
        assert (entry.reason, entry.confidence, entry.key, entry.audit) == ("confident", 0.9, None, None)
        assert entry.messages == [{"role": "user", "content": "word number 2"}]
    release = releases.current(home.releases("words"))
    assert release is not None
    assert release.version == VERSION
    assert release.interface is None


def test_a_newer_store_is_refused_and_a_damaged_release_named(home: Home) -> None:
    (home.releases("words") / VERSION / "router.json").write_text("{}")
    assert [step.name for step in upgrade(home) if not step.sound] == [f"words {VERSION}"]
    with closing(sqlite3.connect(home.root / "homestill.db")) as database:
        database.execute("INSERT INTO schema_version VALUES (99)")
        database.commit()
    with pytest.raises(StoreError, match="schema 99"):
        upgrade(home)


def test_an_empty_home_has_nothing_to_upgrade(tmp_path: Path) -> None:
    assert upgrade(Home(tmp_path)) == []
