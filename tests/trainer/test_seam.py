"""What the trainer takes of the endpoint's code: the same words, and errors of its own."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from serve.settings import Settings
from tests.tasks import write_task
from trainer import release, task, watching
from trainer.bundle.carry import give
from trainer.errors import HomestillError, PreflightError, ReleaseError, StoreError
from trainer.harvest import harvest
from trainer.keeping import prune
from trainer.keeping.upgrade import upgrade
from trainer.runs import Home
from trainer.seam import gpu_required, offline
from trainer.traces import Store
from trainer.training.base import hubs_off

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


@pytest.mark.parametrize(
    ("word", "on"),
    [("1", True), ("True", True), ("yes", True), ("", False), ("0", False), ("false", False), ("NO", False)],
)
def test_a_switch_means_here_what_it_means_to_the_endpoint(word: str, on: bool) -> None:
    assert Settings.from_environment({"HOMESTILL_OFFLINE": word}).offline is on
    assert offline({"HOMESTILL_OFFLINE": word}) is hubs_off({"HOMESTILL_OFFLINE": word}) is on
    assert gpu_required({"HOMESTILL_REQUIRE_GPU": word}) is on


def test_a_switch_that_is_neither_on_nor_off_is_refused() -> None:
    with pytest.raises(PreflightError, match='HOMESTILL_OFFLINE is "perhaps"; use 1 or 0'):
        offline({"HOMESTILL_OFFLINE": "perhaps"})


def test_the_switches_of_the_hubs_libraries_count_as_well() -> None:
    assert hubs_off({"HF_HUB_OFFLINE": "ON"})
    assert not hubs_off({"HF_HUB_OFFLINE": "0"})
