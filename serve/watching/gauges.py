"""What is so at this moment, asked of those who know when somebody looks: the page and the metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from serve.records.entry import Entry
from serve.tasks import Served

BACKGROUND = frozenset({"audit", "shadow"})
"""Endpoints of entries that no client asked for: they are counted apart."""


class ServedTasks(Protocol):
    """`serve.tasks.Tasks`, as far as it is looked at."""

    @property
    def served(self) -> Mapping[str, Served]: ...

    @property
    def problems(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Queue:
    """Requests at the local models."""

    active: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class Spending:
    """US dollars on this UTC day, reserved ones included."""

    scope: str
    """`all`, `task tickets` or `key alice`, as in `BudgetExceeded`."""
    spent_usd: float
    cap_usd: float | None = None


@dataclass(frozen=True)
class Drift:
    """What the audits of a task's kept answers say."""

    alarm: bool
    audits: int
    disagreement: float | None = None
    """Share of audited answers that differ from the teacher's, with its interval; None before the first."""
    low: float | None = None
    high: float | None = None
    allowed: float | None = None
    """The share that certification allows; None: the release has no baseline, so there is no alarm."""


@dataclass(frozen=True)
class Gauges:
    """Callables that answer at once; each default says that there is nothing."""

    queue: Callable[[], Queue] = Queue
    breakers: Callable[[], Mapping[str, str]] = dict
    """closed, open or half_open, by the upstream's name."""
    lost: Callable[[], int] = int
    """Entries that the journal gave up."""
    spending: Callable[[], Sequence[Spending]] = tuple
    drift: Callable[[], Mapping[str, Drift]] = dict
    """By task."""


def answered(entry: Entry) -> bool:
    """Whether the client got an answer."""
    return entry.route is not None and 200 <= entry.status < 300
