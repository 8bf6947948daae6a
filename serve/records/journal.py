"""The journal: every served request with its decision, for audits and as new traces.

`record` only queues. One thread writes what is queued in one transaction, at once while there is
little to do, in larger batches the more there is, so an entry is on its way for as long as one commit
takes, a few milliseconds, and never longer than that plus LINGER_S. A killed process loses at most the
entries of that window; after `flush` returned nothing is lost. A power cut may cost what SQLite has
not synced yet (WAL, synchronous=NORMAL), never the journal itself.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    insert,
    inspect,
    select,
)
from sqlalchemy.exc import DatabaseError, OperationalError

from serve.errors import JournalError

LINGER_S = 0.02
"""How long the writer waits for company after the first entry of a batch."""
BATCH = 500
WAITING = 20_000
"""Entries that may wait while the database cannot be written; further ones are counted as lost."""
RETRY_S = 1.0

logger = logging.getLogger("serve")
metadata = MetaData()

journal_version = Table("journal_version", metadata, Column("version", Integer, nullable=False))

requests = Table(
    "requests",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("created", String(32), nullable=False, index=True),
    Column("task", Text, nullable=True, index=True),
    Column("release", String(40), nullable=True),
    Column("predictor", Text, nullable=True),
    Column("asked", Text, nullable=False),
    Column("route", String(16), nullable=True),
    Column("reason", String(32), nullable=True),
    Column("confidence", Float, nullable=True),
    Column("threshold", Float, nullable=True),
    Column("guarantee", String(32), nullable=False),
    Column("degraded", Boolean, nullable=False),
    Column("streamed", Boolean, nullable=False),
    Column("status", Integer, nullable=False),
    Column("model", Text, nullable=True),
    Column("prompt_tokens", Integer, nullable=True),
    Column("completion_tokens", Integer, nullable=True),
    Column("cost_usd", Float, nullable=True),
    Column("latency_ms", Float, nullable=False),
    Column("overhead_ms", Float, nullable=False),
    Column("messages", JSON, nullable=False),
    Column("answer", JSON, nullable=True),
    Column("local_answer", Text, nullable=True),
    Column("error", Text, nullable=True),
)


@dataclass(frozen=True)
class Entry:
    """One served request. None where a figure is not known or does not apply."""

    id: str
    """The request id that the client saw."""
    asked: str
    """`model` as the client sent it."""
    messages: list[Any]
    status: int
    """HTTP status; 499 where the client went away before the end."""
    latency_ms: float
    overhead_ms: float
    """Part of the latency that was not spent waiting for a model."""
    task: str | None = None
    release: str | None = None
    predictor: str | None = None
    route: str | None = None
    """None where nobody answered."""
    reason: str | None = None
    confidence: float | None = None
    threshold: float | None = None
    guarantee: str = "none"
    degraded: bool = False
    streamed: bool = False
    model: str | None = None
    """The model that answered."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost_usd: float | None = None
    """What the teacher cost; None where its price or its tokens are not known."""
    answer: dict[str, Any] | None = None
    """The message that was answered, in OpenAI's shape."""
    local_answer: str | None = None
    """What the local model said, where the teacher was asked after it."""
    error: str | None = None
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))


def create_tables(connection: Connection) -> None:
    metadata.create_all(connection)


MIGRATIONS: list[Callable[[Connection], None]] = [create_tables]
"""Applied in order; a journal's version is how many of them it has seen."""


class Journal:
    """Made or migrated when it is opened. `record` may be called from any thread, and never waits.

    Args:
        url: SQLAlchemy's, `sqlite:///…/journal.db`.

    Raises:
        JournalError: it cannot be opened, or a newer Homestill wrote it.
    """

    def __init__(self, url: str) -> None:
        self._engine = _open(url)
        self._queue: queue.Queue[Entry | threading.Event | None] = queue.Queue()
        self._closed = False
        self.lost = 0
        """Entries given up because the database could not be written for long."""
        self._writer = threading.Thread(target=self._write_all, daemon=True, name="journal")
        self._writer.start()

    def record(self, entry: Entry) -> None:
        """Queue an entry to be written."""
        if self._queue.qsize() >= WAITING:
            self.lost += 1
            return
        self._queue.put(entry)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was recorded before is committed; False when that took longer than `timeout`."""
        written = threading.Event()
        self._queue.put(written)
        return written.wait(timeout)

    def close(self) -> None:
        """Write what is queued and close; safe to call again.

        Raises:
            JournalError: the rest could not be written.
        """
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._writer.join()
        self._engine.dispose()
        if self.lost:
            raise JournalError(f"{self.lost} requests could not be written to the journal; see the log")

    def entries(
        self, task: str | None = None, after: int = 0, limit: int = 1000
    ) -> Iterator[tuple[int, Entry]]:
        """Numbered entries, oldest first: those of `task` (or of all) behind number `after`, read in pages."""
        query = select(requests).where(requests.c.number > after).order_by(requests.c.number).limit(limit)
        if task is not None:
            query = query.where(requests.c.task == task)
        with self._engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        for row in rows:
            values = dict(row)
            yield values.pop("number"), Entry(**values)

    def _write_all(self) -> None:
        going = True
        while going:
            batch, written, going = self._next_batch()
            if batch:
                self._write(batch)
            if written:
                written.set()

    def _next_batch(self) -> tuple[list[Entry], threading.Event | None, bool]:
        """Entries to write, who waits for them, and whether more may come."""
        batch: list[Entry] = []
        item = self._queue.get()
        deadline = time.monotonic() + LINGER_S
        while isinstance(item, Entry):
            batch.append(item)
            if len(batch) >= BATCH:
                return batch, None, True
            try:
                item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return batch, None, True
        return batch, item, item is not None

    def _write(self, batch: list[Entry]) -> None:
        """Commit a batch; wait while the database cannot be written, leave out what can never be."""
        while True:
            try:
                with self._engine.begin() as connection:
                    connection.execute(insert(requests), [asdict(entry) for entry in batch])
                return
            except OperationalError as error:
                logger.error("the journal cannot be written (%s); %d requests wait", error.orig, len(batch))
                if self._closed:
                    self.lost += len(batch)
                    return
                time.sleep(RETRY_S)
            except (DatabaseError, ValueError, OverflowError) as error:
                if len(batch) == 1:
                    logger.error("request %s cannot be journaled (%s)", batch[0].id, error)
                    self.lost += 1
                    return
                for entry in batch:
                    self._write([entry])
                return


def _open(url: str) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _wal)
    try:
        with engine.begin() as connection:
            _migrate(connection)
    except DatabaseError as error:
        engine.dispose()
        raise JournalError(
            f"{url} cannot be opened ({error.orig}); check that its folder exists and is writable"
        ) from error
    except JournalError:
        engine.dispose()
        raise
    return engine


def _wal(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute(
        "PRAGMA synchronous=NORMAL"
    )  # a commit survives the process; syncing would cost each batch
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.close()


def _migrate(connection: Connection) -> None:
    known = inspect(connection).has_table("journal_version")
    version = (
        connection.execute(select(func.max(journal_version.c.version))).scalar() if known else None
    ) or 0
    if version > len(MIGRATIONS):
        raise JournalError(
            f"the journal has schema {version}, this Homestill knows up to {len(MIGRATIONS)}; upgrade Homestill"
        )
    for migration in MIGRATIONS[version:]:
        migration(connection)
    if version < len(MIGRATIONS):
        connection.execute(insert(journal_version).values(version=len(MIGRATIONS)))
