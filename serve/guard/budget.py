"""What the teacher may cost: the worst case of a call is put aside before it is made, the rest given back after.

    HOMESTILL_HOME/budget.db    spent (day, scope, nano)      settled, by UTC day
                                reserved (call, day, scope, nano)    calls under way

Scopes are `all`, `task <name>` and `key <name>`; money is counted in whole nano-dollars. A reservation
is committed before its call, so what a killed process had under way counts as spent for that day, at its
worst case: nobody can know what it cost. Two processes on one file keep the same caps. Where the file
cannot be written, no call with a cap is made.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from serve.config import Config, Price, TaskRules
from serve.errors import BudgetExceeded, BudgetUnknown, SettingsError
from serve.guard.keys import Caller
from serve.wire.sse import dumps

NANO = 1_000_000_000
LONGEST_ANSWER = 4096
"""Tokens that a teacher may answer with under a cap where the client names no limit."""
UNPRICED = frozenset({"audio", "models", "plugins", "prediction", "search_parameters", "web_search_options"})
"""Fields that cost what no price of tokens says, or beyond the limit for the answer."""
TIERS = frozenset({None, "auto", "default", "flex"})
"""Values of `service_tier` that cost no more than the price list says."""
KEPT_DAYS = 400
PATIENCE_S = 0.25
"""How long another process on the same file is waited for, the event loop with it."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS spent (
    day TEXT NOT NULL, scope TEXT NOT NULL, nano INTEGER NOT NULL, PRIMARY KEY (day, scope)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reserved (
    call TEXT NOT NULL, day TEXT NOT NULL, scope TEXT NOT NULL, nano INTEGER NOT NULL, PRIMARY KEY (call, scope)
) WITHOUT ROWID;
"""
BOOK = "INSERT INTO spent VALUES (?, ?, ?) ON CONFLICT (day, scope) DO UPDATE SET nano = nano + excluded.nano"
BOOK_EVERY_S = 1.0
TOTAL = """
SELECT (SELECT coalesce(sum(nano), 0) FROM spent WHERE day = :day AND scope = :scope)
     + (SELECT coalesce(sum(nano), 0) FROM reserved WHERE day = :day AND scope = :scope)
"""

logger = logging.getLogger("serve")


@dataclass
class Reservation:
    """Money put aside for one call.

    Args:
        body: the request as it may be made: with a limit for its answer where a cap needs one.
    """

    body: Mapping[str, Any]
    _budget: Budget
    _call: str
    """Empty where no cap applies, and so nothing was put aside."""
    _day: str
    _scopes: tuple[str, ...]
    _worst: int
    _caps: Mapping[str, int]
    _open: bool = True

    def again(self) -> None:
        """Another attempt, after one that may have been billed: that one stays spent at its worst case.

        Raises:
            BudgetExceeded: there is no room for one more; nothing is left to settle then.
        """
        if self._call and self._open:
            self.settle(None)
            self._call, self._day = self._budget.reserve(self._scopes, self._worst, self._caps)
            self._open = True

    def settle(self, cost_usd: float | None) -> None:
        """What the call did cost; None, where nobody knows, leaves its worst case spent. Once is enough."""
        if not self._open:
            return
        self._open = False
        nano = self._worst if cost_usd is None else round(cost_usd * NANO)
        if self._call:
            self._budget.settle(self._call, self._day, self._scopes, nano)
        elif nano:
            self._budget.count(self._day, self._scopes, nano)


class Budget:
    """The caps, and what has been spent under them.

    Args:
        path: budget.db, made where there is none.
        config: caps of all calls and of tasks; a key brings its own.
        now: seconds since 1970.

    Raises:
        SettingsError: budget.db cannot be used.
    """

    def __init__(self, path: Path, config: Config, now: Callable[[], float] = time.time) -> None:
        self._config = config
        self._now = now
        self._counted: dict[tuple[str, str], int] = {}
        self._booked = now()
        oldest = (datetime.fromtimestamp(now(), UTC) - timedelta(days=KEPT_DAYS)).date().isoformat()
        try:
            self._database = _opened(path, oldest)
        except sqlite3.Error as error:
            raise SettingsError(
                [f"{path} cannot be used ({error}); make it writable, or move it away"]
            ) from error

    def admit(
        self,
        body: Mapping[str, Any],
        price: Price | None,
        *,
        task: str,
        rules: TaskRules,
        caller: Caller,
    ) -> Reservation:
        """Put a call's worst case aside.

        Raises:
            BudgetExceeded: a cap leaves no room for it.
            BudgetUnknown: under a cap, what the call may cost at most is not known, or cannot be put aside.
        """
        caps = self._caps(task, rules, caller)
        scopes = ("all", f"task {task}", f"key {caller.name}")
        if not caps:
            return Reservation(body, self, "", self._day(), scopes, 0, caps)
        if price is None:
            raise BudgetUnknown(
                f'the price of "{body["model"]}" is not known and {" and ".join(caps)} has a cap; '
                "add it to prices in serve.yaml"
            )
        bounded = capped(body)
        worst = worst_case(bounded, price)
        call, day = self.reserve(scopes, worst, caps)
        return Reservation(bounded, self, call, day, scopes, worst, caps)

    def reserve(self, scopes: tuple[str, ...], worst: int, caps: Mapping[str, int]) -> tuple[str, str]:
        """Put so much aside; the call's id and its day.

        Raises:
            BudgetExceeded, BudgetUnknown: as `admit`.
        """
        call, day = uuid.uuid4().hex, self._day()
        try:
            self._reserve(call, day, scopes, worst, caps)
        except sqlite3.Error as error:
            raise BudgetUnknown(
                f"{' and '.join(caps)} has a cap, and what a call costs cannot be put down ({error}); "
                "make budget.db writable"
            ) from error
        return call, day

    def settle(self, call: str, day: str, scopes: tuple[str, ...], nano: int) -> None:
        """Book a call's cost in place of its reservation, which stays where that cannot be written."""
        try:
            with self._transaction() as database:
                database.execute("DELETE FROM reserved WHERE call = ?", (call,))
                database.executemany(BOOK, [(day, scope, nano) for scope in scopes if nano])
        except sqlite3.Error as error:  # the answer is there, and must not be lost for this
            logger.error("budget.db cannot be written (%s): a call stays spent at its worst case", error)

    def count(self, day: str, scopes: tuple[str, ...], nano: int) -> None:
        """Add to what was spent without any cap, which is counted to be looked at: now and then is enough."""
        for scope in scopes:
            self._counted[day, scope] = self._counted.get((day, scope), 0) + nano
        if self._now() - self._booked >= BOOK_EVERY_S:
            self._book()

    def spent_usd(self, scope: str = "all") -> float:
        """Spent and reserved today."""
        return self._total(self._day(), scope) / NANO

    def close(self) -> None:
        self._book()
        self._database.close()

    def _book(self) -> None:
        self._booked = self._now()
        try:
            with self._transaction() as database:
                database.executemany(BOOK, [(*key, nano) for key, nano in self._counted.items()])
        except sqlite3.Error as error:
            logger.error("budget.db cannot be written (%s); what is spent is counted in memory", error)
        else:
            self._counted.clear()

    def _caps(self, task: str, rules: TaskRules, caller: Caller) -> dict[str, int]:
        """Nano-dollars a day, by scope."""
        caps = {
            "all": self._config.daily_usd,
            f"task {task}": rules.daily_usd,
            f"key {caller.name}": caller.daily_usd,
        }
        return {scope: round(usd * NANO) for scope, usd in caps.items() if usd is not None}

    def _reserve(
        self, call: str, day: str, scopes: tuple[str, ...], worst: int, caps: Mapping[str, int]
    ) -> None:
        with self._transaction() as database:
            for scope, cap in caps.items():
                total = self._total(day, scope)
                if total + worst > cap:
                    raise BudgetExceeded(scope, cap / NANO, total / NANO, self._left_s())
            rows = [(call, day, scope, worst) for scope in scopes]
            database.executemany("INSERT INTO reserved VALUES (?, ?, ?, ?)", rows)

    def _total(self, day: str, scope: str) -> int:
        """Nano-dollars spent and reserved, what was spent without a cap included."""
        (booked,) = self._database.execute(TOTAL, {"day": day, "scope": scope}).fetchone()
        return int(booked) + self._counted.get((day, scope), 0)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Sums and insertions of two processes never mix."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield self._database
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:  # a full disk has rolled it back already
                self._database.execute("ROLLBACK")
            raise

    def _day(self) -> str:
        return datetime.fromtimestamp(self._now(), UTC).date().isoformat()

    def _left_s(self) -> float:
        """Seconds until midnight UTC."""
        return 86_400 - self._now() % 86_400


def _opened(path: Path, oldest: str) -> sqlite3.Connection:
    """budget.db without the days before `oldest`."""
    database = sqlite3.connect(path, isolation_level=None, timeout=PATIENCE_S, check_same_thread=False)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=NORMAL")  # a commit survives the process, which is what counts
    database.executescript(SCHEMA)
    for table in ("spent", "reserved"):
        database.execute(f"DELETE FROM {table} WHERE day < ?", (oldest,))
    return database


def capped(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The request with a limit for its answer: without one nobody can say what it costs at most."""
    if body.get("max_completion_tokens") or body.get("max_tokens"):
        return body
    return {**body, "max_completion_tokens": LONGEST_ANSWER}


def worst_case(body: Mapping[str, Any], price: Price) -> int:
    """Most that a request with a limit for its answer can cost, in nano-dollars.

    A token holds at least one byte of UTF-8, and JSON's own brackets outweigh what a chat template adds. No
    tighter bound holds for every tokenizer; it is about four times too much for English, while the call lasts.

    Raises:
        BudgetUnknown: it asks for an image or the like, whose cost depends on the model.
    """
    beyond = _unpriced(body)
    if beyond:
        raise BudgetUnknown(
            f"what a request with {beyond} costs at most is not known, and there is a cap; "
            "send text alone, or take the cap away"
        )
    prompt = len(dumps(body))
    limits = (body.get("max_completion_tokens") or 0, body.get("max_tokens") or 0)
    answer = max(map(int, limits)) * int(body.get("n") or 1)
    return math.ceil((price.input * prompt + price.output * answer) * (NANO // 1_000_000))


def _unpriced(body: Mapping[str, Any]) -> str | None:
    """What in a request has a cost that tokens do not bound."""
    for name in UNPRICED:
        if body.get(name):
            return name
    if body.get("service_tier") not in TIERS:
        return f"service_tier {body['service_tier']}"
    for tool in body.get("tools") or ():
        if tool.get("type") != "function":
            return f"a tool of type {tool.get('type')}"
    for message in body["messages"]:
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if part.get("type") not in ("text", "refusal"):
                return str(part.get("type"))
        if message.get("audio"):
            return "audio"
    return None
