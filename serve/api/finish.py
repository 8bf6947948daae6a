"""The end of a request: all that watch are told once, and what follows from the answer is begun."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from serve.confidence import agreement
from serve.records.audits import compared
from serve.records.journal import Entry
from serve.routing.call import Call
from serve.routing.decision import Decision, Reason
from serve.routing.router import Router

Observer = Callable[[Entry], None]
OK = 200
logger = logging.getLogger("serve")


class Finish:
    """Called exactly once for every request that was let in, however it ended.

    Args:
        observers: journal, metrics, log and whoever else is told.
        router: compares where a task is served by the strategy `shadow`.
        kept: told of every local answer that was kept, to draw audits from.
        traced: told of every request with the client's own trace.
    """

    def __init__(
        self,
        observers: Sequence[Observer],
        router: Router,
        *,
        kept: Callable[[Call, Entry], None] | None = None,
        traced: Callable[..., None] | None = None,
    ) -> None:
        self._observers = observers
        self._router = router
        self._kept = kept
        self._traced = traced
        self._comparing: set[asyncio.Task[None]] = set()

    def __call__(
        self,
        call: Call,
        status: int,
        decision: Decision | None = None,
        *,
        message: Mapping[str, Any] | None = None,
        model: str | None = None,
        usage: Any = None,
        error: str | None = None,
    ) -> None:
        entry = call.entry(status, decision, message=message, model=model, usage=usage, error=error)
        self._tell(entry, call.ask.traceparent)
        if status != OK or decision is None:
            return
        if decision.reason == "confident" and self._kept:
            self._kept(call, entry)
        if call.rules.strategy == "shadow" and decision.route == "teacher" and call.question:
            comparing = asyncio.create_task(self._compare(call, entry, message or {}))
            self._comparing.add(comparing)
            comparing.add_done_callback(self._comparing.discard)

    async def drain(self) -> None:
        """Wait for the comparisons under way."""
        await asyncio.gather(*self._comparing)

    def _tell(self, entry: Entry, traceparent: str | None = None) -> None:
        tell(self._observers, entry)
        if self._traced:
            tell([partial(self._traced, traceparent=traceparent)], entry)

    async def _compare(self, call: Call, told: Entry, message: Mapping[str, Any]) -> None:
        """What the student would have said, and whether it agrees; an entry of its own in the journal."""
        try:
            reason = await self._router.compare(call)
            await call.search(None, message)
            self._tell(_shadow(call, told, message, reason))
        except Exception:  # the client has its answer; what is missing is the comparison
            logger.exception("request %s could not be compared", told.id)


def _shadow(call: Call, told: Entry, message: Mapping[str, Any], reason: Reason) -> Entry:
    assert call.served is not None and call.question is not None
    local = call.local_answer["choices"][0]["message"].get("content") if call.local_answer else None
    fields = compared(call.served.release, call.served.fields[call.question.predictor.name])
    agrees = agreement(local, str(message.get("content") or ""), fields) if local is not None else None
    messages, answer, stored = call.bodies(None, message)
    return replace(
        told,
        messages=messages,
        answer=answer,
        local_answer=stored,
        id=f"{told.id}-shadow",
        endpoint="shadow",
        audited=told.id,
        route="local",
        reason=reason,
        confidence=call.confidence,
        guarantee="none",
        audit=agrees,
        cost_usd=0.0,
    )


def tell(observers: Sequence[Observer], entry: Entry) -> None:
    """One that cannot keep up costs the client nothing, nor the others."""
    for observe in observers:
        try:
            observe(entry)
        except Exception:
            logger.exception("request %s: an observer failed", entry.id)
