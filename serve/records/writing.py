"""How entries get into the database, each id once."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError

from serve.records.entry import Entry, from_line
from serve.records.schema import SQLITE, requests

SLICE = 64
"""Lines that go to SQLite in one statement."""
NUL = b"\\u0000"


def insert_entries(connection: Connection, entries: Sequence[Entry]) -> None:
    """Insert those whose id is not there yet.

    Raises:
        SQLAlchemyError: as the database says.
    """
    kind = sqlite if connection.dialect.name == SQLITE else postgresql
    if entries:
        statement = kind.insert(requests).on_conflict_do_nothing(index_elements=[requests.c.id])
        connection.execute(statement, [vars(entry) for entry in entries])


def insert_lines(connection: Connection, lines: Sequence[bytes]) -> None:
    """The same for the lines of a spool.

    SQLite takes them as they are and cuts them up itself: Python would hold its global lock for as long,
    and the event loop would wait (measured: 40 µs of every request, up to 5 ms at once).

    Raises:
        ValueError: one of them is no entry, or is none that SQLite can cut up: a NUL would end its text.
        SQLAlchemyError: as the database says.
    """
    if connection.dialect.name != SQLITE:
        insert_entries(connection, [from_line(line) for line in lines])
        return
    for start in range(0, len(lines), SLICE):
        data = b"[" + b",".join(lines[start : start + SLICE]) + b"]"
        if NUL in data:
            raise ValueError("a text holds a NUL")
        try:
            connection.exec_driver_sql(_FROM_JSON, (data,))
        except OperationalError as error:  # how SQLite calls JSON that it cannot read
            if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
                raise ValueError(str(error.orig)) from error
            raise


def _from_json() -> str:
    names = [column.name for column in requests.columns if column is not requests.c.number]
    values = ", ".join(f"json_extract(value, '$.{name}')" for name in names)
    columns = ", ".join(f'"{name}"' for name in names)
    return (
        f"INSERT INTO requests ({columns}) SELECT {values} FROM json_each(CAST(? AS TEXT)) "
        "WHERE true ON CONFLICT (id) DO NOTHING"
    )


_FROM_JSON = _from_json()
