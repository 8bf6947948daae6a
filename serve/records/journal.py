"""The journal: every served request with its decision, for audits and as new traces.

`record` appends a line to the spool; a thread moves whole parts of the spool into the database, each in one
transaction, and then removes them. When `record` has returned, a kill of the process costs nothing: whoever
opens the journal next adopts its spool, and an id that is in the database already is not written again. A
power cut may cost what the kernel has not written yet, never the journal itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, delete, select
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    ProgrammingError,
    SQLAlchemyError,
)

from serve.errors import JournalError
from serve.records.entry import Entry, from_line, to_line
from serve.records.reading import Extent, Reader, Selection, Totals
from serve.records.schema import SQLITE, database_file, open_database, requests
from serve.records.spool import Part, Spool
from serve.records.writing import insert_entries, insert_lines

__all__ = ["Entry", "Extent", "Journal", "Selection", "Totals"]

LINGER_S = 0.05
"""How long the writer waits for company after the first line of a part."""
RETRY_S = 1.0
SETTLE_S = 30.0
"""How long a start waits for what a killed process left, and a deletion for what is not committed yet."""
ROOM = 2000
"""Entries that are deleted in one transaction: a server that writes meanwhile waits no longer than that."""
FAULTS = (IntegrityError, DataError, InterfaceError, ProgrammingError, ValueError, TypeError, OverflowError)
"""An entry is to blame; whatever else a database says may pass, and the entry waits."""

logger = logging.getLogger("serve")
T = TypeVar("T")


class Journal(Reader):
    """Made or migrated when it is opened. `record` may be called from any thread, and waits for no commit.

    Args:
        url: SQLAlchemy's, `sqlite:///…/journal.db`.
        spool: folder of the spool; None: beside the SQLite file.

    Raises:
        JournalError: it cannot be opened, or a newer Homestill wrote it.
    """

    def __init__(self, url: str, spool: Path | None = None) -> None:
        super().__init__(open_database(url))
        self.lost = 0
        """Entries given up: the spool could not be written, or the database will never take them."""
        self._refused = self._outage = False
        self._wake, self._closing = threading.Event(), threading.Event()
        self._moved = threading.Condition()
        self._waiting = 0
        try:
            self._spool = Spool(self._folder(spool))
            self._spool.adopt()
        except OSError as error:
            self._engine.dispose()
            raise JournalError(
                f"the journal's spool cannot be written ({error}); make its folder writable"
            ) from error
        self._writer = threading.Thread(target=self._write_all, daemon=True, name="journal")
        self._writer.start()
        if not self.flush(SETTLE_S):
            logger.warning("what a killed process left for the journal cannot be written yet; it is kept")

    def record(self, entry: Entry) -> None:
        """Keep an entry: when this returns, it survives the death of the process.

        A full disk is not the client's fault: the entry is counted as lost then, and the log says so once.
        """
        try:
            self._spool.append(to_line(entry))
        except (OSError, TypeError, ValueError) as error:
            self._give_up(1)
            if not self._refused:
                logger.error("requests are not journaled (%s), first %s; make room", error, entry.id)
            self._refused = True
            return
        if self._refused:
            self._refused = False
            logger.warning("requests are journaled again; %d were lost", self.lost)
        if not self._wake.is_set():
            self._wake.set()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was recorded before is committed; False when that took longer than `timeout`."""
        mark = self._spool.mark()
        with self._moved:
            self._waiting += 1
            self._wake.set()
            self._moved.notify_all()
            self._moved.wait_for(lambda: self._spool.reached(mark) or not self._writer.is_alive(), timeout)
            self._waiting -= 1
        return self._spool.reached(mark)

    def close(self) -> None:
        """Write what is spooled and close; safe to call again. What cannot be written waits for the next start.

        Raises:
            JournalError: entries were lost.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake.set()
        with self._moved:
            self._moved.notify_all()
        self._writer.join()
        self._spool.close()
        self._engine.dispose()
        if self.lost:
            raise JournalError(f"{self.lost} requests could not be written to the journal; see the log")

    def delete(self, selection: Selection) -> int:
        """Delete what is selected, in the database and in every spool; the number of entries.

        Nothing of them is left in an SQLite file. Takes its time: an event loop calls it from a thread.

        Raises:
            ValueError: nothing is said about what to delete.
            JournalError: it cannot be written, or requests that might be meant cannot be seen yet.
        """
        if not (conditions := selection.where()):
            raise ValueError("a deletion needs a time, a key or a task; give at least one")
        self._settle()
        chosen = select(requests.c.number).where(*conditions).limit(ROOM).scalar_subquery()
        found = 0
        try:
            while True:
                with self._engine.begin() as connection:
                    count = connection.execute(delete(requests).where(requests.c.number.in_(chosen))).rowcount
                found += count
                if count < ROOM:
                    break
            if found:
                self._wipe()
        except SQLAlchemyError as error:
            raise JournalError(
                f"the journal cannot be written ({_cause(error)}); {found} requests are deleted, delete again"
            ) from error
        return found

    def _folder(self, given: Path | None) -> Path:
        file = database_file(self._engine)
        if given is None and file is None:
            self._engine.dispose()
            raise JournalError(f"{self._engine.url!r} is no file; name a folder for the journal's spool")
        return given or Path(str(file)).parent

    def _settle(self) -> None:
        """Wait for what any process has recorded up to now."""
        deadline = time.monotonic() + SETTLE_S
        try:
            self._spool.adopt()
        except OSError as error:
            raise JournalError(f"the journal's spool cannot be read ({error}); make it readable") from error
        others = self._spool.foreign()
        settled = self.flush(SETTLE_S)
        while settled and (others := others & self._spool.foreign()):
            time.sleep(LINGER_S)
            settled = time.monotonic() < deadline
        if not settled:
            raise JournalError(
                f"requests wait in the journal's spool and were not written within {SETTLE_S:g} s; "
                "see the log of the server for the reason, and delete again"
            )

    def _wipe(self) -> None:
        """Clear the write-ahead log, where deleted rows would stay readable."""
        if self._engine.dialect.name != SQLITE:
            return
        with self._engine.connect() as connection:
            busy, *_ = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
        if busy:
            logger.warning(
                "a reader keeps the journal's write-ahead log; what was deleted stays in it until it ends"
            )

    def _write_all(self) -> None:
        done = False
        while not done:
            self._wake.wait()
            with self._moved:
                self._moved.wait_for(lambda: self._waiting or self._closing.is_set(), LINGER_S)
            self._wake.clear()
            closing, failed = self._closing.is_set(), True
            try:
                self._move_oldest()
                self._outage = failed = False
            except (OSError, SQLAlchemyError) as error:
                self._say_outage(error)
                self._closing.wait(RETRY_S)
            waiting = self._spool.waiting()
            done = closing and (failed or not waiting)
            if waiting:
                self._wake.set()
            with self._moved:
                self._moved.notify_all()

    def _move_oldest(self) -> None:
        if part := self._spool.take():
            self._give_up(self._move(part))
            self._spool.done(part)

    def _say_outage(self, error: Exception) -> None:
        if not self._outage:
            logger.error("the journal cannot be written (%s); requests wait in its spool", _cause(error))
        self._outage = True

    def _give_up(self, count: int) -> None:
        with self._moved:
            self.lost += count

    def _move(self, part: Part) -> int:
        """Commit a part's lines; how many of them will never be taken.

        Raises:
            OSError, SQLAlchemyError: not now.
        """
        lines = part.lines()
        if not part.adopted and self._commit(insert_lines, lines) is None:  # our own are whole
            return 0
        entries = [entry for line in lines if (entry := _checked(line, part))]
        if part.adopted:
            logger.warning("%d requests that a killed process left are written to the journal", len(entries))
        lost = len(lines) - len(entries)
        if self._commit(insert_entries, entries) is None:
            return lost
        for entry in entries:
            if fault := self._commit(insert_entries, [entry]):
                lost += 1
                logger.error("request %s cannot be journaled (%s)", entry.id, _cause(fault))
        return lost

    def _commit(
        self, insert: Callable[[Connection, Sequence[T]], None], what: Sequence[T]
    ) -> Exception | None:
        """Insert all or nothing. Returns what is wrong with them where that is the reason.

        Raises:
            SQLAlchemyError: the database cannot be written now.
        """
        try:
            with self._engine.begin() as connection:
                insert(connection, what)
        except FAULTS as error:
            return error
        return None


def _checked(line: bytes, part: Part) -> Entry | None:
    try:
        return from_line(line)
    except ValueError as error:
        logger.error("a line of %s is no journal entry (%s); it is left out", part.path.name, error)
        return None


def _cause(error: Exception) -> object:
    """What the database said, without the statement and its values: requests have no place in a log."""
    return error.orig if isinstance(error, DBAPIError) else error
