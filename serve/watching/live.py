"""What the page shows: the last requests and the last hour, in memory, from the entries of ended requests."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from serve.records.entry import Entry
from serve.watching.gauges import BACKGROUND, Gauges, ServedTasks, answered
from serve.watching.logs import FIELDS

RECENT = 200
MINUTES = 60
BINS = 20
SAMPLE = 500
"""Answers of a route that its latency is told from."""
CONFIDENCES = 2000
"""Local answers of a release that its histogram is made of."""
OTHER = "other"
"""Name of what was asked that is no task here."""
SHOWN = ("id", "created", *FIELDS, "strategy", "streamed", "error")
"""Of an entry, on the page: no messages, no answers."""
LONGEST_ERROR = 300


@dataclass
class Count:
    """Requests of a minute, or of several, by who answered."""

    local: int = 0
    teacher: int = 0
    failed: int = 0
    cost_usd: float = 0.0

    def add(self, other: Count) -> None:
        self.local += other.local
        self.teacher += other.teacher
        self.failed += other.failed
        self.cost_usd += other.cost_usd

    def figures(self) -> dict[str, Any]:
        known = self.local + self.teacher
        return {
            **asdict(self),
            "requests": known + self.failed,
            "local_share": self.local / known if known else None,
        }


@dataclass
class _Confidences:
    """Of one task's current release: those of another model do not belong into one histogram."""

    release: str | None = None
    values: deque[float] = field(default_factory=lambda: deque(maxlen=CONFIDENCES))


class Live:
    """One observer of entries; `snapshot` is what GET /api/live answers.

    Args:
        tasks: whose releases are in use.
        gauges: asked at every snapshot.
        clock: seconds since 1970.
    """

    def __init__(self, tasks: ServedTasks, gauges: Gauges, clock: Callable[[], float] = time.time) -> None:
        self._tasks = tasks
        self._gauges = gauges
        self._clock = clock
        self._started = clock()
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._minutes: deque[tuple[int, dict[str, Count]]] = deque(maxlen=MINUTES)
        self._latencies: dict[str, deque[tuple[float, float | None]]] = defaultdict(
            lambda: deque(maxlen=SAMPLE)
        )
        self._confidences: dict[str, _Confidences] = defaultdict(_Confidences)

    def observe(self, entry: Entry) -> None:
        """Take note of an ended request; its bodies are not kept."""
        if entry.confidence is not None and entry.task and entry.endpoint != "audit":
            self._note_confidence(entry.task, entry.release, entry.confidence)
        count = self._minute().setdefault(entry.task or OTHER, Count())
        count.cost_usd += entry.cost_usd or 0.0
        if entry.endpoint in BACKGROUND:
            return
        self._recent.append(_shown(entry))
        if not answered(entry):
            count.failed += 1
            return
        if entry.route == "local":
            count.local += 1
        else:
            count.teacher += 1
        self._latencies[str(entry.route)].append((entry.latency_ms, entry.first_token_ms))

    def snapshot(self, recent: int = 50) -> dict[str, Any]:
        """Everything that the page shows, as JSON.

        Args:
            recent: of the last requests, at most so many, newest first.
        """
        minutes = self._last_minutes()
        tasks = self._by_task(minutes)
        return {
            "now": self._clock(),
            "started": self._started,
            "minutes": [{"at": at * 60, **_sum(counts.values()).figures()} for at, counts in minutes],
            "total": _sum(tasks.values()).figures(),
            "latency_ms": {route: _latency(values) for route, values in self._latencies.items()},
            "tasks": [self._task(name, tasks.get(name, Count())) for name in self._names(tasks)],
            "spending": [asdict(each) for each in self._gauges.spending()],
            "queue": asdict(self._gauges.queue()),
            "breakers": dict(self._gauges.breakers()),
            "journal": {"lost": self._gauges.lost()},
            "recent": list(self._recent)[: -recent - 1 : -1],
        }

    def _note_confidence(self, task: str, release: str | None, value: float) -> None:
        known = self._confidences[task]
        if known.release != release:
            known.release = release
            known.values.clear()
        known.values.append(value)

    def _minute(self) -> dict[str, Count]:
        now = int(self._clock() // 60)
        if not self._minutes or self._minutes[-1][0] < now:
            self._minutes.append((now, {}))
        return self._minutes[-1][1]

    def _last_minutes(self) -> list[tuple[int, dict[str, Count]]]:
        """The hour until now, oldest first, minutes without a request too."""
        known = dict(self._minutes)
        now = int(self._clock() // 60)
        return [(at, known.get(at, {})) for at in range(now - MINUTES + 1, now + 1)]

    def _by_task(self, minutes: Iterable[tuple[int, Mapping[str, Count]]]) -> dict[str, Count]:
        found: dict[str, Count] = defaultdict(Count)
        for _, counts in minutes:
            for task, count in counts.items():
                found[task].add(count)
        return found

    def _names(self, seen: Iterable[str]) -> list[str]:
        """Tasks in use, in trouble or asked for, in this order of the alphabet; what is no task comes last."""
        names = {*self._tasks.served, *self._tasks.problems, *seen}
        return sorted(names, key=lambda name: (name == OTHER and name not in self._tasks.served, name))

    def _task(self, name: str, count: Count) -> dict[str, Any]:
        served = self._tasks.served.get(name)
        drift = self._gauges.drift().get(name)
        confidences = self._confidences.get(name) or _Confidences()
        return {
            "name": name,
            **count.figures(),
            "release": served.release.version if served else None,
            "threshold": served.release.router.threshold if served else None,
            "guarantee": served.guarantee if served else "none",
            "problem": self._tasks.problems.get(name),
            "confidence": {"release": confidences.release, "bins": histogram(confidences.values)},
            "drift": asdict(drift) if drift else None,
        }


def histogram(values: Iterable[float]) -> list[int]:
    """How many values (0..1) lie in each of BINS equal bins; 1 belongs to the last."""
    bins = [0] * BINS
    for value in values:
        bins[min(BINS - 1, max(0, int(value * BINS)))] += 1
    return bins


def quantile(ordered: list[float], share: float) -> float | None:
    """The smallest value that at least `share` of all are not above; None without values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def _latency(values: Iterable[tuple[float, float | None]]) -> dict[str, Any]:
    """Milliseconds."""
    pairs = list(values)
    whole = sorted(total for total, _ in pairs)
    first = sorted(value for _, value in pairs if value is not None)
    return {
        "n": len(pairs),
        "p50": quantile(whole, 0.5),
        "p95": quantile(whole, 0.95),
        "first_token_p50": quantile(first, 0.5),
    }


def _sum(counts: Iterable[Count]) -> Count:
    total = Count()
    for count in counts:
        total.add(count)
    return total


def _shown(entry: Entry) -> dict[str, Any]:
    values = {name: getattr(entry, name) for name in SHOWN}
    values["error"] = entry.error[:LONGEST_ERROR] if entry.error else None
    return values
