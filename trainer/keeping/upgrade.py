"""From an earlier version's home to this one's: databases are migrated, releases are read and checked.

Every earlier schema opens: the store's and the journal's migrations are ordered lists, and a database's version
is how many of them it has seen. Releases are never rewritten, as their hashes are what was signed off; what a
release of an earlier version lacks (interface.json, the audit's baseline), reading it does without.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from serve import release as releases
from serve.records.journal import Journal
from serve.release import ReleaseInvalid
from trainer.runs import Home
from trainer.seam import translated
from trainer.traces import Store


@dataclass(frozen=True)
class Step:
    """One thing that was looked at."""

    name: str
    text: str
    sound: bool = True


def upgrade(home: Home) -> list[Step]:
    """Bring the databases up to date and check every release.

    Raises:
        StoreError: a newer Homestill wrote a database, or it is damaged.
    """
    steps = []
    if (file := home.root / "homestill.db").is_file():
        before = _version(file, "schema_version")
        Store.open(home.database_url).close()
        steps.append(_migrated(file, before, _version(file, "schema_version")))
    if (file := home.root / "journal.db").is_file():
        before = _version(file, "journal_version")
        with translated():
            Journal(f"sqlite:///{file}").close()
        steps.append(_migrated(file, before, _version(file, "journal_version")))
    return [*steps, *_releases(home)]


def _version(file: Path, table: str) -> int:
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
        try:
            (version,) = database.execute(f"SELECT coalesce(max(version), 0) FROM {table}").fetchone()
        except sqlite3.OperationalError:  # from before there were versions, or no database at all
            return 0
    return int(version)


def _migrated(file: Path, before: int, after: int) -> Step:
    text = f"schema {after}" if before == after else f"migrated from schema {before} to {after}"
    return Step(file.name, text)


def _releases(home: Home) -> list[Step]:
    steps = []
    for task in sorted(path for path in home.releases("").glob("*") if path.is_dir()):
        for version in releases.versions(task):
            try:
                found = releases.load(task / version)
            except ReleaseInvalid as error:
                steps.append(Step(f"{task.name} {version}", error.faults[0], sound=False))
                continue
            lacks = [
                name
                for name, there in (("interface.json", found.interface), ("audit", found.router.audit))
                if not there
            ]
            text = "sound" + (f", from before there was {' and '.join(lacks)}" if lacks else "")
            steps.append(Step(f"{task.name} {version}", text))
    return steps
