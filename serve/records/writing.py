"""How entries get into the database, each id once."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import orjson
from sqlalchemy import JSON, Connection
from sqlalchemy.dialects import postgresql, sqlite

from serve.records.entry import Entry, from_line
from serve.records.schema import SQLITE, requests

SLICE = 64
"""Lines that go to SQLite in one statement."""
COLUMNS = [column for column in requests.columns if column is not requests.c.number]
AS_JSON = [column.name for column in COLUMNS if isinstance(column.type, JSON)]
IN_ORDER = itemgetter(*(column.name for column in COLUMNS))


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

    SQLite gets plain tuples: SQLAlchemy's handling of types costs as much again as all the rest. A slice at a time,
    so that Python's global lock is not held from the event loop for long.

    Raises:
        ValueError: one of them is no entry.
        SQLAlchemyError: as the database says.
    """
    if connection.dialect.name != SQLITE:
        insert_entries(connection, [from_line(line) for line in lines])
        return
    for start in range(0, len(lines), SLICE):
        connection.exec_driver_sql(_INSERT, [_row(line) for line in lines[start : start + SLICE]])


def _row(line: bytes) -> tuple[Any, ...]:
    values = orjson.loads(line)
    try:
        for name in AS_JSON:
            if values[name] is not None:
                values[name] = orjson.dumps(values[name]).decode()
        row: tuple[Any, ...] = IN_ORDER(values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a line is no journal entry: {error!r}") from error
    return row


_NAMES = ", ".join(f'"{column.name}"' for column in COLUMNS)
_INSERT = (
    f"INSERT INTO requests ({_NAMES}) VALUES ({', '.join('?' * len(COLUMNS))}) ON CONFLICT (id) DO NOTHING"
)
