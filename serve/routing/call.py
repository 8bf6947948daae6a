"""One request on its way through the router, with what has become of it so far."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from serve.config import Egress, TaskRules
from serve.errors import Unredactable
from serve.evidence import Evidence
from serve.guard.keys import Caller
from serve.guard.redaction import Redacted, redact
from serve.records.journal import Entry
from serve.routing.decision import Decision, Reason
from serve.routing.policy import Question
from serve.tasks import Served

T = TypeVar("T")
Clock = Callable[[], float]


@dataclass(frozen=True)
class Ask:
    """A request as it came in: checked, and let in."""

    identity: str
    body: Mapping[str, Any]
    caller: Caller
    egress: Egress = "allow"
    """The strictest of task, key and request header."""
    endpoint: str = "chat"
    traceparent: str | None = None


class Call:
    """What the router knows of a request.

    Args:
        served: the release that answers for the task; None before its first.
        rules: of the task.
        clock: seconds.
    """

    def __init__(
        self, ask: Ask, served: Served | None, rules: TaskRules, clock: Clock = time.perf_counter
    ) -> None:
        self.ask = ask
        self.body = ask.body
        self.served = served
        self.rules = rules
        self.alone = False
        """No teacher can be asked, so an answer is followed to its end, whatever it is worth."""
        self.question: Question | None = None
        self.evidence: Evidence | None = None
        """What is known so far of the student's answer to a certified prompt."""
        self.confidence: float | None = None
        self.local_answer: dict[str, Any] | None = None
        self.given_up = ""
        """What the student had said when it was certain that it would not be kept."""
        self.local_problem = ""
        self.agreement: float | None = None
        """Of both models' answers, where a strategy asks both."""
        self.first_token_ms: float | None = None
        self.attempts = 1
        """How often the teacher was asked, retries with it."""
        self._redacted: Redacted | None = None
        self._searched: tuple[dict[str, Any] | None, dict[str, Any] | None] = None, None
        """What was to be stored, and what is stored of it."""
        self._clock = clock
        self._started = clock()
        self._waited = 0.0

    @property
    def identity(self) -> str:
        return self.ask.identity

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def task(self) -> str | None:
        return self.served.release.manifest.task if self.served else None

    async def redacted(self) -> Redacted:
        """The request with placeholders for what must not leave; made once.

        In a thread: a table of numbers takes 30 µs a character, in which nobody else would be answered.

        Raises:
            Unredactable: it holds a part that cannot be searched.
        """
        if self._redacted is None:
            self._redacted = await asyncio.to_thread(redact, dict(self.body), self.rules.phone_region)
        return self._redacted

    async def wait_for(self, answer: Awaitable[T]) -> T:
        """Await a model; the time counts as its own, not as our overhead."""
        began = self._clock()
        try:
            return await answer
        finally:
            self._waited += self._clock() - began

    def first_token(self) -> None:
        """Something of the answer is on its way to the client."""
        if self.first_token_ms is None:
            self.first_token_ms = self.latency_ms()

    def latency_ms(self) -> float:
        return round((self._clock() - self._started) * 1000, 3)

    def overhead_ms(self) -> float:
        return round((self._clock() - self._started - self._waited) * 1000, 3)

    def decision(
        self,
        route: str,
        reason: Reason,
        *,
        covered: bool,
        degraded: bool = False,
        cost_usd: float | None = None,
    ) -> Decision:
        """The outcome as of now. `covered`: the certificate holds for this answer."""
        served = self.served
        return Decision(
            route="local" if route == "local" else "teacher",
            reason=reason,
            confidence=None if self.confidence is None else round(self.confidence, 6),
            threshold=served.release.router.threshold if served else None,
            guarantee=served.guarantee if served and covered else "none",
            release=served.release.version if served else None,
            degraded=degraded,
            cost_usd=0.0 if route == "local" else cost_usd,
            overhead_ms=self.overhead_ms(),
        )

    def entry(
        self,
        status: int,
        decision: Decision | None = None,
        *,
        message: Mapping[str, Any] | None = None,
        model: str | None = None,
        usage: Any = None,
        error: str | None = None,
    ) -> Entry:
        """What the journal and all that watch are told."""
        counts = usage if isinstance(usage, Mapping) else {}
        outcome = decision.body() if decision else {}
        outcome["overhead_ms"] = self.overhead_ms()
        messages, answer, local = self.bodies(decision, message)
        return Entry(
            id=self.identity,
            asked=self.body["model"],
            messages=messages,
            status=status,
            latency_ms=self.latency_ms(),
            task=self.task,
            predictor=self.question.predictor.name if self.question else None,
            streamed=self.streamed,
            model=model,
            prompt_tokens=counts.get("prompt_tokens"),
            completion_tokens=counts.get("completion_tokens"),
            answer=answer,
            local_answer=local,
            error=error,
            key=self.ask.caller.name,
            egress=self.ask.egress,
            strategy=self.rules.strategy,
            endpoint=self.ask.endpoint,
            first_token_ms=self.first_token_ms,
            attempts=self.attempts,
            audit=self.agreement,
            **outcome,
        )

    async def search(
        self, decision: Decision | None = None, message: Mapping[str, Any] | None = None
    ) -> None:
        """Redact in a thread what `entry` will store of the same, so that it need not, and nobody waits."""
        stored = self._stored(decision, message)
        if stored and self.ask.egress == "redact":
            self._searched = stored, await asyncio.to_thread(_redacted, stored, self.rules.phone_region)

    def bodies(
        self, decision: Decision | None, message: Mapping[str, Any] | None
    ) -> tuple[list[Any], dict[str, Any] | None, str | None]:
        """Messages, answer and the local answer that was not kept, as far as they may be stored."""
        stored = self._stored(decision, message)
        if stored and self.ask.egress == "redact":
            known, found = self._searched
            stored = found if known == stored else _redacted(stored, self.rules.phone_region)
        if stored is None:
            return [], None, None
        *messages, answer, other = stored["messages"]
        return messages, answer or None, other["content"]

    def _stored(
        self, decision: Decision | None, message: Mapping[str, Any] | None
    ) -> dict[str, list[Any]] | None:
        """What of texts may be stored, before it is redacted: the messages, the answer, the local one.

        What may not leave this machine is not stored either: stored requests become traces, and traces
        are shown to teachers.
        """
        if not self.rules.bodies or self.ask.egress == "never":
            return None
        local: str | None = None
        if self.local_answer and (decision is None or decision.route == "teacher"):
            local = self.local_answer["choices"][0]["message"].get("content")
        elif self.given_up:
            local = self.given_up
        return {"messages": [*self.body["messages"], dict(message or {}), {"content": local}]}


def _redacted(stored: Mapping[str, Any], phone_region: str) -> dict[str, Any] | None:
    """None: it cannot be searched."""
    try:
        return redact(stored, phone_region).body
    except Unredactable:
        return None
