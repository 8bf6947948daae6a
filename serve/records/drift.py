"""Whether kept answers have become worse than they were at certification: a test that may be looked at any time.

Null hypothesis: an audited answer differs from the teacher's with a probability of at most `upper`, whatever
came before. Against each of a few larger rates a gambler bets a likelihood ratio; the money is a nonnegative
supermartingale, so it ever reaches 1/ALPHA with probability at most ALPHA (Ville 1939; Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting", 2024). A bet that has run since long before a change
has lost its money by then, so after every EVERY audits some of what is still in the purse is bet anew (in the
spirit of Shin, Ramdas and Rinaldo's e-detectors, 2023, but with one purse for all: the total error stays ALPHA).

`upper` is itself a bound that holds with 97.5 %: a release whose answers stay as they were is called worse with a
probability of at most ALPHA + 0.025 over its whole life.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from serve.manifest import AuditBaseline
from serve.records.entry import Entry
from serve.release import Release

ALPHA = 0.01
"""Probability of ever calling a release worse that is not."""
LEVEL = 0.05
"""1 − coverage of the interval that is shown."""
TOWARDS = np.array((0.02, 0.05, 0.1, 0.2, 0.4, 0.8))
"""The rates that are bet on: so far on the way from `upper` to 1."""
EVERY = 25
MOST = 64
"""Bets under way; of more, the poorest ends, which can only lose money."""
RICHEST = 1e100
"""Where winnings end, far beyond any alarm."""

logger = logging.getLogger("serve")


class Drift:
    """What the audits of one release say.

    Args:
        baseline: how often kept answers differed at certification; None: not known, so there is no alarm.
    """

    def __init__(self, baseline: AuditBaseline | None) -> None:
        self.allowed = baseline.upper if baseline else None
        """The rate that is no reason for an alarm."""
        self.audits = 0
        self.disagreed = 0
        self.alarm = False
        """Once raised it stays, until there is another release."""
        self._begun = 0
        self._money: NDArray[np.float64] = np.empty((0, len(TOWARDS)))  # [bets under way, rates]
        self._factors = _factors(self.allowed) if self.allowed is not None and self.allowed < 1 else None

    def add(self, agreement: float) -> None:
        """An audit's outcome.

        Args:
            agreement: share of the fields that agree; less than 1 is a disagreement.
        """
        differs = agreement < 1
        if self._factors is not None:
            if self.audits % EVERY == 0:
                self._begin()
            self._money = np.minimum(self._money * self._factors[int(differs)], RICHEST)
            self.alarm = self.alarm or self.wealth >= 1 / ALPHA
        self.audits += 1
        self.disagreed += differs

    @property
    def wealth(self) -> float:
        """What the gambler has, of 1 at the beginning: the money that is bet, and what is left in the purse."""
        return float(self._money.sum()) + 1 / (self._begun + 1)

    @property
    def estimate(self) -> float | None:
        """Share of the audited answers that differ; None before the first."""
        return self.disagreed / self.audits if self.audits else None

    def interval(self) -> tuple[float, float] | None:
        """Where that share lies, with a probability of 1 − LEVEL at all times at once; None before the first."""
        return confidence_sequence(self.disagreed, self.audits) if self.audits else None

    def _begin(self) -> None:
        """Bet 1/(k + 1)(k + 2) of the first money in round k = 0, 1, …; after it 1/(k + 2) is left."""
        share = 1 / ((self._begun + 1) * (self._begun + 2))
        self._begun += 1
        self._money = np.vstack([self._money, np.full(len(TOWARDS), share / len(TOWARDS))])
        if len(self._money) > MOST:
            self._money = np.delete(self._money, int(self._money.sum(axis=1).argmin()), axis=0)


class Drifts:
    """The drift of every release that is audited, kept up from the journal.

    Args:
        past: what earlier audits of a task's release found, oldest first; asked from a thread.
    """

    def __init__(self, past: Callable[[str, str], Iterable[float]]) -> None:
        self._past = past
        self._known: dict[tuple[str, str], Drift] = {}
        self._reading = asyncio.Lock()

    async def follow(self, release: Release) -> None:
        """Begin with what the journal has of a release. Its audits of this process must come after that."""
        key = (release.manifest.task, release.version)
        async with self._reading:
            if key not in self._known:
                self._known[key] = await asyncio.to_thread(self._read, *key, release.router.audit)

    def observe(self, entry: Entry) -> None:
        """Take in an audit; every other entry is left alone."""
        if entry.endpoint != "audit" or entry.audit is None:
            return
        drift = self._known.get((entry.task or "", entry.release or ""))
        if drift is None:
            return
        calm = not drift.alarm
        drift.add(entry.audit)
        if drift.alarm and calm:
            logger.error(
                "task %s: kept answers of release %s have become worse: %d of %d audited ones differ from the "
                "teacher's, %.1f %% are allowed; train on newer traces, or roll back",
                entry.task,
                entry.release,
                drift.disagreed,
                drift.audits,
                100 * (drift.allowed or 0),
            )

    def of(self, task: str, release: str) -> Drift | None:
        """None: not followed yet."""
        return self._known.get((task, release))

    def _read(self, task: str, release: str, baseline: AuditBaseline | None) -> Drift:
        drift = Drift(baseline)
        for agreement in self._past(task, release):
            drift.add(agreement)
        return drift


def confidence_sequence(events: int, trials: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval for a rate that holds at all times at once with probability 1 − level.

    All rates against which a bet on Beta(1/2, 1/2) has not won 1/level yet: log p is between the two points
    where log B(h + ½, n − h + ½) − log B(½, ½) − h log p − (n − h) log(1 − p) = log 1/level.
    Source: Robbins, "Statistical methods related to the law of the iterated logarithm", 1970.
    """
    misses = trials - events
    prior = 2 * math.lgamma(0.5)
    evidence = math.lgamma(events + 0.5) + math.lgamma(misses + 0.5) - math.lgamma(trials + 1) - prior

    def ruled_out(rate: float) -> bool:
        likelihood = events * math.log(rate) + misses * math.log1p(-rate)
        return evidence - likelihood >= -math.log(level)

    middle = min(max(events / trials, 1e-12), 1 - 1e-12)
    low = _edge(ruled_out, 1e-15, middle) if events else 0.0
    high = _edge(ruled_out, 1 - 1e-15, middle) if misses else 1.0
    return low, high


def _edge(ruled_out: Callable[[float], bool], outside: float, inside: float) -> float:
    """Where between the two a rate begins to be possible; on the outer side of it."""
    for _ in range(60):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if ruled_out(middle) else (outside, middle)
    return outside


def _factors(allowed: float) -> NDArray[np.float64]:
    """[2, rates]: what a bet's money is multiplied by where an answer agrees (0) or differs (1)."""
    rates = allowed + TOWARDS * (1 - allowed)
    return np.array([(1 - rates) / (1 - allowed), rates / allowed])
