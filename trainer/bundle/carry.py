"""Traces on their way between hosts: bought at home, trained on where there is no network; served there, learned from at home.

A file of traces is gzipped JSON lines: first {"carry": 1, "task": name}, then {"table": name, "row": {…}}.
`traces` and `answers` are the store's, of the teacher alone: with them a run on the same task folder replays
its capture and buys nothing. `requests` are the journal's, which an offline endpoint has answered by itself.
Every row has an id of its own, so taking a file twice, or two files that overlap, adds nothing twice.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, create_engine, func, select
from sqlalchemy.dialects.sqlite import insert

from serve.records.entry import Entry
from serve.records.journal import Journal, Selection
from trainer.bundle.secrets import Secrets
from trainer.errors import BundleError
from trainer.runs import Home
from trainer.seam import translated
from trainer.traces import Store, answers, traces

CARRY = 1
BATCH = 500
TABLES = {"traces": traces, "answers": answers}


@dataclass(frozen=True)
class Taken:
    """How many rows of a file were new, by table, and how many it held."""

    task: str
    new: dict[str, int]
    held: dict[str, int]

    def sentence(self) -> str:
        counts = ", ".join(
            f"{self.new[name]} of {self.held[name]} {name}" for name in self.held if self.held[name]
        )
        return f"traces of {self.task}: took {counts or 'nothing'}; the rest was here already"


def give(
    home: Home,
    task: str,
    target: Path,
    *,
    bought: bool = True,
    requests: bool = False,
    secrets: Secrets | None = None,
) -> int:
    """Write what the home knows of a task to a gzipped file, the same bytes for the same rows; their number.

    Args:
        bought: what the teacher was asked.
        requests: what the endpoint was asked.
        secrets: keys that no row may hold.

    Raises:
        BundleError: a row holds a key.
        StoreError: a database cannot be read.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with open(target, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as out:
        out.write(_line({"carry": CARRY, "task": task}))
        for table, row in chain(
            _bought(home, task) if bought else (), _served(home, task) if requests else ()
        ):
            line = _line({"table": table, "row": row})
            if secrets and (found := secrets.in_data(line, shapes=False)):
                raise BundleError(
                    [f"a row of {table} of {task} holds {found}; delete it before anything travels"]
                )
            out.write(line)
            count += 1
    return count


def take(file: Path, home: Home) -> Taken:
    """Add the rows of a file that are not here yet, in one transaction per table of the store.

    Raises:
        BundleError: the file is damaged, or a newer Homestill wrote it; nothing of the store has changed then.
    """
    home.create()
    held, new = dict.fromkeys((*TABLES, "requests"), 0), dict.fromkeys((*TABLES, "requests"), 0)
    Store.open(home.database_url).close()  # made and migrated
    engine = create_engine(home.database_url, connect_args={"timeout": 60})
    served: list[Entry] = []
    try:
        with engine.begin() as connection:
            task, rows = _open(file)
            while batch := list(islice(rows, BATCH)):
                for name, table in TABLES.items():
                    mine = [_checked(row, table) for each, row in batch if each == name]
                    held[name] += len(mine)
                    new[name] += _insert(connection, table, mine)
                served += [_entry(row) for each, row in batch if each == "requests"]
    finally:
        engine.dispose()
    held["requests"] = len(served)
    new["requests"] = _record(home, served)
    return Taken(task, new, held)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _bought(home: Home, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not (home.root / "homestill.db").is_file():
        return
    Store.open(home.database_url).close()  # migrated
    of_traces = select(traces).where(traces.c.task == task).order_by(traces.c.id)
    of_teacher = (
        select(answers)
        .where(answers.c.task == task, answers.c.role == "teacher")
        .order_by(answers.c.system, answers.c.example)
    )
    engine = create_engine(home.database_url)
    try:
        with engine.connect() as connection:
            for name, query in (("traces", of_traces), ("answers", of_teacher)):
                for row in connection.execute(query).mappings():
                    yield name, dict(row)
    finally:
        engine.dispose()


def _served(home: Home, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not (home.root / "journal.db").is_file():
        return
    with _journal(home) as journal:
        for entry in journal.every(Selection(task=task)):
            yield "requests", asdict(entry)


def _open(file: Path) -> tuple[str, Iterator[tuple[str, dict[str, Any]]]]:
    lines = _lines(file)
    head = next(lines, {})
    if head.get("carry") != CARRY or not isinstance(head.get("task"), str):
        raise BundleError(
            [f"{file} is no file of traces of format {CARRY}; export it again, or upgrade Homestill"]
        )
    return head["task"], _named(file, lines)


def _named(file: Path, lines: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in lines:
        if line.get("table") not in (*TABLES, "requests") or not isinstance(line.get("row"), dict):
            raise BundleError(
                [f"{file} holds a row of {line.get('table')!r}, which is not known; upgrade Homestill"]
            )
        yield line["table"], line["row"]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(file, "rt", encoding="utf-8") as text:
            for line in text:
                yield json.loads(line)
    except (OSError, EOFError, ValueError) as error:
        raise BundleError([f"{file} cannot be read ({error}); copy it again"]) from error


def _checked(row: dict[str, Any], table: Table) -> dict[str, Any]:
    known = {column.name for column in table.columns}
    needed = {column.name for column in table.columns if not column.nullable}
    if extra := set(row) - known:
        raise BundleError(
            [f"a row of {table.name} has {', '.join(sorted(extra))}, which is not known; upgrade Homestill"]
        )
    if missing := needed - set(row):
        raise BundleError([f"a row of {table.name} lacks {', '.join(sorted(missing))}; export it again"])
    return row


def _entry(row: dict[str, Any]) -> Entry:
    try:
        return Entry(**row)
    except TypeError as error:
        raise BundleError([f"a served request cannot be read ({error}); upgrade Homestill"]) from error


def _insert(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> int:
    if not rows:
        return 0
    before = connection.execute(select(func.count()).select_from(table)).scalar_one()
    connection.execute(insert(table).on_conflict_do_nothing(), rows)
    return int(connection.execute(select(func.count()).select_from(table)).scalar_one() - before)


def _record(home: Home, entries: list[Entry]) -> int:
    if not entries:
        return 0
    with _journal(home) as journal:
        before = journal.extent().requests
        for entry in entries:
            journal.record(entry)
        journal.flush()
        return journal.extent().requests - before


@contextmanager
def _journal(home: Home) -> Iterator[Journal]:
    with translated(), closing(Journal(f"sqlite:///{home.root / 'journal.db'}")) as journal:
        yield journal
