"""A copy of what cannot be made again: the databases, the releases, the tasks, the endpoint's settings.

The copy is consistent while everything runs: SQLite's own backup copies each database at one moment, the
journal's spool is read before its database (an entry that is in both is the same entry), and a release never
changes once it is there. It is unsigned, as it never leaves its owner; every byte is checked before a restore.
Runs and caches are left out: `homestill run` makes them again, from the store, without buying anything.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from itertools import count
from pathlib import Path

from trainer.bundle.contents import BACKUP, CHECKSUMS, Contents, parse
from trainer.bundle.keys import durable
from trainer.bundle.verify import check_parts, extract
from trainer.bundle.write import Source, write
from trainer.errors import BundleError, BusyError, StoreError

SETTINGS = ("serve.yaml", "keys.json", "bundle.json")
FOLDERS = ("releases", "tasks", "legal")
SPOOL = "journal-*.spool"
LOCKS = (
    SPOOL,
    "runs/*/.lock",
    "runs/*/.capture.lock",
    "studies/*/*/.lock",
    "studies/*/*/runs/.capture.lock",
    "watch/.lock",
    ".load.lock",
)
"""Held by endpoints, runs, captures (which outlive a killed run), studies, the watch and the loading of a bundle."""
BUSY_S = 60.0


def backup(home: Path, folder: Path, now: str) -> Contents:
    """Copy the home into `folder`, which is new or holds an earlier backup; what did not change is kept there.

    Args:
        now: UTC, as `20261121T073000Z`.

    Raises:
        BundleError: the folder holds something else, or the home holds links.
        StoreError: a database is damaged.
        DiskError: there is no room.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)  # it holds what people asked
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".databases-") as work:
        sources = [*_spool(home), *_databases(home, Path(work)), *_files(home)]
        if not sources:
            raise BundleError([f"there is nothing to back up in {home}; set HOMESTILL_HOME to another home"])
        return write(
            folder,
            sources,
            kind=BACKUP,
            created=now,
            homestill=version("homestill"),
            about={},
            seal=lambda where, data: durable(where / CHECKSUMS, data),
        )


def restore(folder: Path, home: Path, *, force: bool = False) -> Contents:
    """Put a backup in the place of the home's databases, releases, tasks and settings.

    Args:
        force: where the home holds such things already, move them to `before-restore-<number>` in it.

    Raises:
        BundleError: the backup is damaged, or the home holds something and `force` is not given.
        BusyError: an endpoint, a run or a watch uses the home.
    """
    contents = read(folder)
    there = [entry for entry in _replaced(home) if entry.exists()]
    if there and not force:
        names = ", ".join(entry.name for entry in there)
        raise BundleError(
            [f"{home} holds {names}; restore into an empty home, or set them aside with --force"]
        )
    _require_idle(home)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)  # it will hold what people asked
    partial = home / ".restore.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for file in contents.files:
        extract(folder, file, partial / file.path)
    if there:
        aside = next(each for number in count(1) if not (each := home / f"before-restore-{number}").exists())
        aside.mkdir()
        for entry in there:
            entry.rename(aside / entry.name)
    for entry in sorted(partial.iterdir()):
        if entry.is_file():
            entry.chmod(0o600)
        entry.rename(home / entry.name)
    partial.rmdir()
    return contents


def read(folder: Path) -> Contents:
    """The backup's list of contents, every byte checked.

    Raises:
        BundleError: with every part that is changed, missing or extra.
    """
    try:
        contents = parse((folder / CHECKSUMS).read_bytes(), BACKUP)
    except FileNotFoundError:
        raise BundleError([f"{folder} holds no finished backup; name another folder"]) from None
    check_parts(folder, contents, {CHECKSUMS})
    return contents


def _spool(home: Path) -> Iterator[Source]:
    for file in sorted(home.glob(SPOOL)):
        try:
            yield Source.data(file.name, file.read_bytes())
        except FileNotFoundError:
            continue  # moved into the database meanwhile, which is copied next


def _databases(home: Path, work: Path) -> Iterator[Source]:
    for file in sorted(home.glob("*.db")):
        copy = work / file.name
        try:
            with (
                closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=BUSY_S)) as source,
                closing(sqlite3.connect(copy)) as target,
            ):
                source.backup(target)
                target.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
                (verdict,) = target.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.Error as error:
            raise StoreError(
                f"{file} cannot be copied ({error}); restore it from an earlier backup"
            ) from error
        if verdict != "ok":
            raise StoreError(f"{file} is damaged ({verdict}); restore it from an earlier backup")
        yield Source.file(file.name, copy)


def _files(home: Path) -> Iterator[Source]:
    for name in SETTINGS:
        if (home / name).is_file():
            yield Source.file(name, home / name)
    in_use = {file: file.read_bytes() for file in sorted(home.glob("releases/*/current"))}
    for file, version_in_use in in_use.items():  # before the versions are listed, so that it is among them
        yield Source.data(file.relative_to(home).as_posix(), version_in_use)
    links = []
    for name in FOLDERS:
        for file in sorted((home / name).rglob("*")):
            parts = file.relative_to(home).parts
            if any(part.startswith(".") or part == "__pycache__" for part in parts) or file in in_use:
                continue
            if file.is_symlink():
                links.append(f"{file} is a link; put the file itself in its place, links are not backed up")
            elif file.is_file():
                yield Source.file("/".join(parts), file)
    if links:
        raise BundleError(links)


def _replaced(home: Path) -> list[Path]:
    """What a restore puts something in the place of, with what belongs to it."""
    if not home.is_dir():
        return []
    databases = [file for pattern in ("*.db", "*.db-wal", "*.db-shm", SPOOL) for file in home.glob(pattern)]
    return [*databases, *(home / name for name in (*SETTINGS, *FOLDERS))]


def _require_idle(home: Path) -> None:
    for lock in [file for pattern in LOCKS for file in home.glob(pattern)]:
        descriptor = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"{lock} is in use: stop the endpoint, the watch and all runs of {home} first"
            ) from None
        finally:
            os.close(descriptor)
