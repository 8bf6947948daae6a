from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.dialects import postgresql

from serve.records.entry import from_line, to_line
from serve.records.schema import open_database
from serve.records.writing import insert_entries, insert_lines
from tests.serve.records.journal_support import entry


def test_both_ways_into_the_database_write_the_same(tmp_path: Path) -> None:
    rows = []
    entries = [entry(1), entry(2, answer=None, degraded=True, cost_usd=0.1 + 0.2), entry(3, messages=[])]
    lines = [to_line(each) for each in entries]
    ways: dict[str, Callable[[Connection], None]] = {
        "lines": lambda connection: insert_lines(connection, lines),
        "entries": lambda connection: insert_entries(connection, entries),
    }
    for name, insert in ways.items():
        engine = open_database(f"sqlite:///{tmp_path / name}")
        with engine.begin() as connection:
            insert(connection)
            insert(connection)
            values = connection.execute(
                text("select *, typeof(answer), typeof(degraded) from requests")
            ).all()
        engine.dispose()
        rows.append(values)
    assert len(rows[0]) == len(entries)
    json_columns = {"messages", "answer"}
    for left, right in zip(*rows, strict=True):
        pairs = zip(left._mapping.items(), right._mapping.values(), strict=True)
        assert all(a == b for (name, a), b in pairs if name not in json_columns)


def test_half_a_surrogate_and_a_huge_integer_are_written_as_far_as_json_knows_them() -> None:
    line = to_line(entry(1, local_answer="a\ud800b", messages=[2**70]))
    assert from_line(line).local_answer == "a?b"
    assert str(2**70).encode() in line
    with pytest.raises(ValueError, match="unexpected"):
        from_line(b'{"id": "x", "colour": 1}')


def test_the_statement_for_postgres_knows_an_id_once() -> None:
    said: list[str] = []

    class Postgres:
        dialect = postgresql.dialect()  # type: ignore[no-untyped-call]

        def execute(self, statement: Any, rows: list[Any]) -> None:
            said.append(str(statement.compile(dialect=self.dialect)))

    insert_lines(Postgres(), [to_line(entry(1))])  # type: ignore[arg-type]
    assert said[0].endswith("ON CONFLICT (id) DO NOTHING")
