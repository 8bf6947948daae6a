"""The journal's database: its table, what became of it over time, and how it is opened."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    Index,
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
    text,
)
from sqlalchemy.exc import DatabaseError

from serve.errors import JournalError

SQLITE = "sqlite"
metadata = MetaData()

journal_version = Table("journal_version", metadata, Column("version", Integer, nullable=False))

requests = Table(
    "requests",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
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
    Column("answer", JSON(none_as_null=True), nullable=True),
    Column("local_answer", Text, nullable=True),
    Column("error", Text, nullable=True),
    Column("key", Text, nullable=True, index=True),
    Column("egress", String(16), nullable=True),
    Column("strategy", String(16), nullable=True),
    Column("endpoint", String(16), nullable=True),
    Column("first_token_ms", Float, nullable=True),
    Column("attempts", Integer, nullable=True),
    Column("audit", Float, nullable=True),
    Column("audited", String(64), nullable=True),
    Index("ix_requests_endpoint_release", "endpoint", "release"),  # audits are read by it
)
ADDED = requests.columns[-8:]
"""What schema 1 had not."""


def create_tables(connection: Connection) -> None:
    """Schema 1, or for a new journal all there is."""
    metadata.create_all(connection)


def add_columns(connection: Connection) -> None:
    """Schema 2: who asked, under which rules, and what audits found."""
    known = {column["name"] for column in inspect(connection).get_columns(requests.name)}
    for column in ADDED:
        if column.name not in known:
            name, kind = connection.dialect.identifier_preparer.quote(column.name), column.type
            definition = f"{name} {kind.compile(connection.dialect)}"
            connection.execute(text(f"ALTER TABLE {requests.name} ADD COLUMN {definition}"))
    for index in requests.indexes:
        index.create(connection, checkfirst=True)


MIGRATIONS: list[Callable[[Connection], None]] = [create_tables, add_columns]
"""Applied in order; a journal's version is how many of them it has seen."""


def open_database(url: str) -> Engine:
    """The database, made or migrated where it must be.

    Args:
        url: SQLAlchemy's.

    Raises:
        JournalError: it cannot be opened, or a newer Homestill wrote it.
    """
    engine = create_engine(url, pool_pre_ping=not url.startswith(SQLITE))
    file = database_file(engine)
    if engine.dialect.name == SQLITE:
        event.listen(engine, "connect", _prepare)
    try:
        if file:
            os.close(
                os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
            )  # for nobody else's eyes; SQLite's own is 644
        _migrate(engine)
    except (DatabaseError, OSError) as error:
        engine.dispose()
        cause = error.orig if isinstance(error, DatabaseError) else error
        raise JournalError(
            f"{url} cannot be opened ({cause}); check that its folder exists and is writable"
        ) from error
    except JournalError:
        engine.dispose()
        raise
    return engine


def database_file(engine: Engine) -> Path | None:
    """Where an SQLite database is; None for others, and for one in memory."""
    name = engine.url.database if engine.dialect.name == SQLITE else None
    return Path(name) if name and name != ":memory:" else None


def _prepare(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute(
        "PRAGMA synchronous=NORMAL"
    )  # a commit survives the process; syncing would cost each batch
    cursor.execute("PRAGMA secure_delete=ON")  # what a client has had deleted is not to be found in the file
    cursor.close()


def _migrate(engine: Engine) -> None:
    with engine.connect() as connection:
        if _version(connection) == len(MIGRATIONS):
            return
    with engine.begin() as connection:
        if engine.dialect.name == SQLITE:
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # two servers that start at once migrate in turn
        version = _version(connection)
        for migration in MIGRATIONS[version:]:
            migration(connection)
        if version < len(MIGRATIONS):
            connection.execute(insert(journal_version).values(version=len(MIGRATIONS)))


def _version(connection: Connection) -> int:
    known = inspect(connection).has_table(journal_version.name)
    version = (
        connection.execute(select(func.max(journal_version.c.version))).scalar() if known else None
    ) or 0
    if version > len(MIGRATIONS):
        raise JournalError(
            f"the journal has schema {version}, this Homestill knows up to {len(MIGRATIONS)}; upgrade Homestill"
        )
    return version
