"""Whatever the trainer asks of the endpoint's records, what goes wrong is an error of the trainer's."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.tasks import write_task
from trainer import release, task, watching
from trainer.bundle.carry import give
from trainer.errors import HomestillError, ReleaseError, StoreError
from trainer.harvest import harvest
from trainer.keeping import prune
from trainer.keeping.upgrade import upgrade
from trainer.runs import Home
from trainer.traces import Store

FIRST = Path(__file__).parents[1] / "fixtures" / "first_version"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def journal_of_the_first_version(home: Home) -> None:
    with closing(sqlite3.connect(home.root / "journal.db")) as database:
        database.executescript((FIRST / "journal.sql").read_text("utf-8"))


def journal_of_a_later_version(home: Home) -> None:
    with closing(sqlite3.connect(home.root / "journal.db")) as database:
        database.executescript(
            "CREATE TABLE journal_version (version); INSERT INTO journal_version VALUES (99)"
        )


def current_that_is_none(home: Home) -> None:
    home.releases("words").mkdir(parents=True)
    (home.releases("words") / "current").write_text("the newest\n")


def harvested(home: Home) -> None:
    loaded = task.load(write_task(home.root / "words"))
    with closing(Store.open("sqlite://")) as store:
        harvest(loaded, home, store)


def counted(home: Home) -> None:
    watching.new_answers(home, "words", datetime(2026, 1, 1, tzinfo=UTC))


def carried(home: Home) -> None:
    give(home, "words", home.root / "out.gz", requests=True)


def pruned(home: Home) -> None:
    prune.plan(home)


def rolled_back(home: Home) -> None:
    release.rollback(home, "words", None)


@pytest.mark.parametrize(
    ("broken", "asked", "raised"),
    [
        (journal_of_the_first_version, harvested, StoreError),
        (journal_of_the_first_version, counted, StoreError),
        (journal_of_a_later_version, upgrade, StoreError),
        (journal_of_a_later_version, carried, StoreError),
        (current_that_is_none, pruned, ReleaseError),
        (current_that_is_none, rolled_back, ReleaseError),
    ],
)
def test_an_error_of_the_endpoints_code_is_told_as_ours(
    home: Home,
    broken: Callable[[Home], None],
    asked: Callable[[Home], object],
    raised: type[HomestillError],
) -> None:
    broken(home)
    with pytest.raises(raised, match=";"):  # with its remedy
        asked(home)
