"""What the journal can be asked. Every call reads the database, so an event loop asks from a thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import ColumnElement, Engine, RowMapping, Text, case, cast, create_engine, func, select
from sqlalchemy.exc import DatabaseError

from serve.errors import JournalError
from serve.records.entry import Entry, stamp
from serve.records.schema import requests

PAGE = 500
OK = 200


@dataclass(frozen=True)
class Selection:
    """Requests for which all that is given holds."""

    before: datetime | None = None
    """Ended before this moment, which has a time zone."""
    key: str | None = None
    """Name of the API key."""
    task: str | None = None

    def where(self) -> list[ColumnElement[bool]]:
        """As SQL conditions; none select all."""
        found = []
        if self.before is not None:
            found.append(requests.c.created < stamp(self.before))
        if self.key is not None:
            found.append(requests.c.key == self.key)
        if self.task is not None:
            found.append(requests.c.task == self.task)
        return found


EVERYTHING = Selection()


@dataclass(frozen=True)
class Extent:
    """How much there is."""

    requests: int
    body_bytes: int
    """Of messages and answers, in characters of JSON."""
    oldest: str | None
    newest: str | None


@dataclass(frozen=True)
class Totals:
    """The requests of one UTC day with the same task, endpoint, route and reason."""

    day: str
    """2026-11-21"""
    task: str | None
    endpoint: str | None
    route: str | None
    reason: str | None
    requests: int
    failed: int
    """Status other than 200."""
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    latency_ms: float
    """Mean."""


class Reader:
    """Reads a journal's database; safe to use from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def entries(
        self, task: str | None = None, after: int = 0, limit: int = 1000
    ) -> Iterator[tuple[int, Entry]]:
        """Numbered entries, oldest first: at most `limit` of `task` (or of all) behind number `after`."""
        query = select(requests).where(requests.c.number > after).order_by(requests.c.number).limit(limit)
        if task is not None:
            query = query.where(requests.c.task == task)
        with self._engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        for row in rows:
            yield row["number"], _entry(row)

    def every(self, selection: Selection = EVERYTHING) -> Iterator[Entry]:
        """All selected entries, oldest first, a page in memory at a time."""
        after = 0
        while True:
            query = select(requests).where(requests.c.number > after, *selection.where())
            with self._engine.connect() as connection:
                rows = connection.execute(query.order_by(requests.c.number).limit(PAGE)).mappings().all()
            if not rows:
                return
            after = rows[-1]["number"]
            yield from map(_entry, rows)

    def recent(self, limit: int = 50, selection: Selection = EVERYTHING) -> list[Entry]:
        """The last entries, newest first."""
        query = select(requests).where(*selection.where()).order_by(requests.c.number.desc()).limit(limit)
        with self._engine.connect() as connection:
            return [_entry(row) for row in connection.execute(query).mappings()]

    def find(self, identity: str) -> Entry | None:
        """The request with this id."""
        with self._engine.connect() as connection:
            row = connection.execute(select(requests).where(requests.c.id == identity)).mappings().first()
        return _entry(row) if row else None

    def audits(self, task: str, release: str | None) -> Iterator[float]:
        """What the audits of a release found (see `Entry.audit`), oldest first."""
        query = (
            select(requests.c.audit)
            .where(requests.c.endpoint == "audit", requests.c.release == release, requests.c.task == task)
            .where(requests.c.audit.is_not(None))
            .order_by(requests.c.number)
        )
        with self._engine.connect() as connection:
            found = connection.execute(query).scalars().all()
        yield from found

    def harvestable(self, task: str, since: datetime) -> int:
        """How many requests with one of the task's own prompts the teacher has answered since, texts kept."""
        column = requests.c
        query = select(func.count()).where(
            column.task == task,
            column.created > stamp(since),
            column.route == "teacher",
            column.status == OK,
            column.egress == "allow",
            column.predictor.is_not(None),
            column.answer.is_not(None),
        )
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def summary(self, since: datetime | None = None) -> list[Totals]:
        """Counts, tokens and cost, the latest day first.

        Args:
            since: requests that ended at this moment or later; None: all.
        """
        column = requests.c
        group = (
            func.substr(column.created, 1, 10).label("day"),
            column.task,
            column.endpoint,
            column.route,
            column.reason,
        )
        query = select(
            *group,
            func.count().label("requests"),
            func.sum(case((column.status != OK, 1), else_=0)).label("failed"),
            func.coalesce(func.sum(column.prompt_tokens), 0).label("prompt_tokens"),
            func.coalesce(func.sum(column.completion_tokens), 0).label("completion_tokens"),
            func.coalesce(func.sum(column.cost_usd), 0.0).label("cost_usd"),
            func.avg(column.latency_ms).label("latency_ms"),
        ).group_by(*group)
        if since is not None:
            query = query.where(column.created >= stamp(since))
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(group[0].desc(), *group[1:])).mappings().all()
        return [Totals(**row) for row in rows]

    def extent(self, selection: Selection = EVERYTHING) -> Extent:
        """How many entries are selected, and how large their bodies are."""
        column = requests.c
        bodies = (cast(column.messages, Text), cast(column.answer, Text), column.local_answer)
        size: Any = sum((func.coalesce(func.length(body), 0) for body in bodies[1:]), func.length(bodies[0]))
        query = select(
            func.count(),
            func.coalesce(func.sum(size), 0),
            func.min(column.created),
            func.max(column.created),
        ).where(*selection.where())
        with self._engine.connect() as connection:
            return Extent(*connection.execute(query).one())


@contextmanager
def reading(file: Path) -> Iterator[Reader]:
    """A journal that belongs to somebody else: nothing is written, not even a newer schema.

    Raises:
        JournalError: it cannot be read, also in the middle.
    """
    engine = create_engine(f"sqlite:///file:{quote(str(file))}?mode=ro&uri=true")
    try:
        yield Reader(engine)
    except DatabaseError as error:
        raise JournalError(
            f"{file} cannot be read ({error.orig}); start the endpoint of this Homestill on it once, or make it readable"
        ) from error
    finally:
        engine.dispose()


def _entry(row: RowMapping) -> Entry:
    values = dict(row)
    del values["number"]
    return Entry(**values)
