"""The store: traces of the teacher and the answers of every system, in SQLite (or Postgres by URL).

A trace is one predictor call of the teacher. It is committed before the next call of the same
example starts, so a killed capture has paid for nothing that it cannot find again.
An answer is one example put to one system (teacher, base or student), scored by the metric.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
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
    update,
)
from sqlalchemy.exc import DatabaseError, IntegrityError

from trainer.errors import DiskError, HomestillError, StoreError

TRAFFIC = "traffic"
"""`Trace.purpose` of what the endpoint has journaled."""
LOST = "lost"
"""`Trace.purpose` of a call that failed and may have been billed all the same; its cost is the most it can be."""
LITTLE = 1_000_000
"""Free bytes below which what SQLite cannot do is put down to the disk."""
metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, nullable=False))

traces = Table(
    "traces",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("task", String(40), nullable=False, index=True),
    Column("example", String(64), nullable=False, index=True),
    Column("predictor", Text, nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("program", String(64), nullable=False, index=True),
    Column("teacher", Text, nullable=False),
    Column("stand_in", Boolean, nullable=False),
    Column("messages", JSON, nullable=False),
    Column("completion", Text, nullable=False),
    Column("response", JSON, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("cost_usd", Float, nullable=False),
    Column("latency_ms", Float, nullable=False),
    Column("score", Float, nullable=True),
    Column("created", String(32), nullable=False),
)

traces_cost = Index("ix_traces_cost", traces.c.task, traces.c.cost_usd)
"""What a task has spent is asked before every call: read off the index, without the traces themselves."""

answers = Table(
    "answers",
    metadata,
    Column("system", String(64), primary_key=True),
    Column("example", String(64), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("task", String(40), nullable=False, index=True),
    Column("outputs", JSON, nullable=False),
    Column("score", Float, nullable=False),
    Column("strict_score", Float, nullable=False),
    Column("latency_ms", Float, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("cost_usd", Float, nullable=False),
    Column("error", Text, nullable=True),
    Column("calls", JSON, nullable=False),
    Column("created", String(32), nullable=False),
)


@dataclass(frozen=True)
class Trace:
    """One predictor call of the teacher. `id` is the hash of what determines the call."""

    id: str
    task: str
    example: str
    predictor: str
    purpose: str
    """`capture`, `optimize` while a prompt optimizer works, or `traffic` from the endpoint's journal; `lost` without an answer."""
    program: str
    teacher: str
    stand_in: bool
    messages: list[dict[str, str]]
    completion: str
    response: dict[str, Any]
    """The provider's answer as DSPy serialises it, so that a rerun replays it unpaid."""
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    latency_ms: float
    score: float | None = None
    """Score of the whole example; set when its last call has been judged."""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


@dataclass(frozen=True)
class Answer:
    """One example answered by one system and judged by the metric."""

    system: str
    """Identity of what answered: hash of model file, runtime, program and sampling."""
    example: str
    role: str
    """`teacher`, `base` or `student`."""
    task: str
    outputs: dict[str, Any]
    score: float
    """0..1; 0 where the program failed."""
    latency_ms: float
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    error: str | None
    calls: list[dict[str, Any]]
    """Every predictor call: predictor, messages, completion, finish_reason, prompt_tokens, and
    `logprobs` as OpenAI's `choices[].logprobs.content` where the system gave them."""
    strict_score: float = 0.0
    """The metric's verdict as DSPy asks for it while it collects traces: decides what is trained on."""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def create_tables(connection: Connection) -> None:
    metadata.create_all(connection)


def index_cost(connection: Connection) -> None:
    traces_cost.create(connection, checkfirst=True)


MIGRATIONS: list[Callable[[Connection], None]] = [create_tables, index_cost]
"""Applied in order; a store's version is how many of them it has seen."""


class Store:
    """Traces and answers. Safe to use from several threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str) -> Store:
        """Open the database, made or migrated as needed.

        Raises:
            DiskError: the disk is full.
            StoreError: it cannot be opened, or a newer Homestill wrote it.
        """
        engine = create_engine(url)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _durable_sqlite)
        try:
            with engine.begin() as connection:
                _migrate(connection)
        except DatabaseError as error:
            raise _refused(engine, error) or StoreError(
                f"{url} cannot be opened ({error.orig}); check the path and that it is a database"
            ) from error
        return cls(engine)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except IntegrityError as error:
            raise StoreError(
                f"another process has stored the same ({error.orig}); run again, it is found then"
            ) from error
        except DatabaseError as error:
            raise _refused(self._engine, error) or StoreError(
                f"the database cannot be used: {error.orig}; look after it and its disk, and run again"
            ) from error

    def add_trace(self, trace: Trace) -> None:
        """Commit a trace; when this returns it survives a kill."""
        with self._begin() as connection:
            connection.execute(insert(traces).values(**asdict(trace)))

    def trace(self, identity: str) -> Trace | None:
        with self._begin() as connection:
            row = connection.execute(select(traces).where(traces.c.id == identity)).mappings().first()
        return Trace(**row) if row else None

    def traffic(self, task: str) -> list[Trace]:
        """The task's traces that come from the endpoint's journal, in an order of their own."""
        query = select(traces).where(traces.c.task == task, traces.c.purpose == TRAFFIC).order_by(traces.c.id)
        with self._begin() as connection:
            return [Trace(**row) for row in connection.execute(query).mappings()]

    def asked(self, task: str) -> set[str]:
        """The examples of which calls are stored."""
        query = (
            select(traces.c.example).where(traces.c.task == task, traces.c.purpose == "capture").distinct()
        )
        with self._begin() as connection:
            return set(connection.execute(query).scalars())

    def score_traces(self, identities: Sequence[str], score: float) -> None:
        """Write the score of an example to the traces that led to it."""
        with self._begin() as connection:
            connection.execute(update(traces).where(traces.c.id.in_(identities)).values(score=score))

    def spent(self, task: str) -> float:
        """US dollars that the task's traces have cost so far."""
        with self._begin() as connection:
            query = select(func.coalesce(func.sum(traces.c.cost_usd), 0.0)).where(traces.c.task == task)
            return float(connection.execute(query).scalar_one())

    def add_answer(self, answer: Answer) -> None:
        with self._begin() as connection:
            connection.execute(insert(answers).values(**asdict(answer)))

    def answers(self, system: str) -> dict[str, Answer]:
        """All answers of one system, by example."""
        with self._begin() as connection:
            rows = connection.execute(select(answers).where(answers.c.system == system)).mappings().all()
        return {row["example"]: Answer(**row) for row in rows}


def _refused(engine: Engine, error: DatabaseError) -> HomestillError | None:
    """A full disk or a read-only one, as SQLite tells them in several ways; None where it is something else."""
    reason = getattr(error.orig, "sqlite_errorname", "")
    folder = Path(engine.url.database or ".").resolve().parent
    if not reason or not folder.is_dir():
        return None
    if reason == "SQLITE_FULL" or shutil.disk_usage(folder).free < LITTLE:
        return DiskError(
            f"the disk below {folder} is full; free some space (homestill prune says what may go) and run again"
        )
    if reason.startswith("SQLITE_READONLY") or not os.access(folder, os.W_OK):
        return StoreError(
            f"{folder} cannot be written to; make it writable, or point HOMESTILL_HOME at another folder"
        )
    return None


def _durable_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # a commit that returned is on the disk: calls cost money
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.close()


def _migrate(connection: Connection) -> None:
    known = inspect(connection).has_table("schema_version")
    found = connection.execute(select(func.max(schema_version.c.version))).scalar() if known else None
    version = found or 0
    if version > len(MIGRATIONS):
        raise StoreError(
            f"the database has schema {version}, this Homestill knows up to {len(MIGRATIONS)}; upgrade Homestill"
        )
    for migration in MIGRATIONS[version:]:
        migration(connection)
    if version < len(MIGRATIONS):
        connection.execute(insert(schema_version).values(version=len(MIGRATIONS)))
