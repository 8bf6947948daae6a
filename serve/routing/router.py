"""The way of a request: policy → local answer → confidence ≥ threshold ? keep : teacher.

Everything outside is behind `Tasks` (local models, teachers of releases), `Teachers` and `Budget`; what
is decided here is recorded by whoever sends the answer, with `Call.entry`.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from serve.config import Config
from serve.errors import ApiError, UpstreamDown, UpstreamError, UpstreamRefused, unknown_model
from serve.guard.budget import Budget
from serve.guard.keys import Caller
from serve.routing import student
from serve.routing.call import Ask, Call, Clock
from serve.routing.decision import Decision, Reason
from serve.routing.policy import demands, tool_loop
from serve.routing.strategies import strategies
from serve.routing.teaching import Teaching, Withheld
from serve.tasks import LATEST, Tasks
from serve.upstreams.teacher import Teacher, Teachers, cost
from serve.wire.chunks import Collector

RATE_LIMITED = 429
AUDITOR = Caller("audits")
STATUS_OF = {"budget": RATE_LIMITED, "policy": 403}
"""HTTP status where neither model answers, by the reason why the teacher does not; else 503."""


@dataclass
class Outcome:
    """A whole answer, or a stream whose first event has come already."""

    decision: Decision
    answer: dict[str, Any] | None = None
    stream: AsyncGenerator[bytes] | None = None
    collector: Collector = field(default_factory=Collector)
    """What the stream has said so far."""
    model: str | None = None
    """The model that was asked; what it calls itself in its answer goes before."""
    ending: Callable[[Decision], Decision] = lambda decision: decision
    """The decision as it stands when a stream has ended."""


class Router:
    """Answers chat requests.

    Args:
        tasks: what has a release.
        teachers: None offline.
        budget: of the teacher's cost.
        random: draws for the strategy `random`.
        clock: seconds.
    """

    def __init__(
        self,
        tasks: Tasks,
        teachers: Teachers | None,
        config: Config,
        budget: Budget,
        *,
        random: Random | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._tasks = tasks
        self._teachers = teachers
        self._config = config
        self._teaching = Teaching(budget)
        self._strategies = strategies(random or Random())
        self._clock = clock

    def call(self, ask: Ask) -> Call:
        """Begin a request."""
        model = ask.body["model"]
        return Call(ask, self._tasks.served.get(model), self._config.rules(model), self._clock)

    def meant(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The request with its task's plain name: in Ollama's lists `tickets` is `tickets:latest`."""
        name = body["model"].removesuffix(LATEST)
        known = name in self._tasks.served or name in self._tasks.problems or name in self._config.tasks
        return {**body, "model": name} if known and name != body["model"] else body

    async def answer(self, call: Call) -> Outcome:
        """Decide and answer.

        Raises:
            ApiError: neither model can answer, or the teacher finds the request at fault.
        """
        strategy = self._strategies[call.rules.strategy]
        call.alone = self._teacher(call) is None or call.ask.egress == "never"
        reason = strategy.before(call)
        if reason is None and call.rules.strategy != "shadow":
            if (
                call.streamed
                and call.rules.stream == "optimistic"
                and call.question
                and _as_it_comes(call.body)
            ):
                return await self._optimistic(call)
            reason = await strategy.judge(call)
            if reason == "confident":
                return _local(call, call.decision("local", "confident", covered=strategy.promises))
        elif reason == "tool_loop" and tool_loop(call.body) == "local" and await self._free_answer(call):
            return _local(call, call.decision("local", "tool_loop", covered=False))
        return await self._ask_teacher(call, reason or "policy")

    async def compare(self, call: Call) -> Reason:
        """Ask the student alone, as `shadow` does beside the teacher's answer."""
        call.alone = True  # to its end, so that there is something to compare
        return await self._strategies["shadow"].judge(call)

    async def second_opinion(self, call: Call) -> tuple[dict[str, Any], float | None, int]:
        """What the teacher says to a request that was answered already: its answer, cost in US dollars, attempts.

        Raises:
            Withheld: the rules or the budget forbid it, or there is no teacher.
            UpstreamError.
        """
        body = {key: value for key, value in call.body.items() if key not in ("stream", "stream_options")}
        ask = replace(call.ask, body=body, caller=AUDITOR)  # it is not the client who spends this
        again = Call(ask, call.served, call.rules, self._clock)
        teacher = self._teacher(again)
        if teacher is None:
            raise Withheld("offline", "the teacher is switched off (HOMESTILL_OFFLINE)")
        answer, paid = await self._teaching.whole(again, teacher)
        return answer, paid, again.attempts

    async def _ask_teacher(self, call: Call, reason: Reason) -> Outcome:
        teacher = self._teacher(call)
        if teacher is None and call.served is None:
            raise unknown_model(call.body["model"], self._tasks.served)
        if teacher is None:
            return await self._without_teacher(call, "offline", "it is switched off (HOMESTILL_OFFLINE)")
        try:
            return await self._taught(call, teacher, reason)
        except UpstreamRefused as error:
            raise ApiError(error.status or 400, str(error), body=error.body) from error
        except UpstreamDown as error:
            return await self._without_teacher(call, "teacher_down", str(error), error)
        except Withheld as error:
            return await self._without_teacher(call, error.reason, str(error), error)

    async def _taught(self, call: Call, teacher: Teacher, reason: Reason) -> Outcome:
        # A teacher's answer keeps the promise as well: it is what the local one is measured against.
        covered = call.question is not None
        model = teacher.model or call.body["model"]
        if not call.streamed:
            answer, paid = await self._teaching.whole(call, teacher)
            decision = call.decision("teacher", reason, covered=covered, cost_usd=paid)
            return Outcome(decision, answer=answer, model=model)
        collector = Collector(call.body.get("n") or 1)
        stream = await self._teaching.stream(call, teacher, collector)

        def ending(decision: Decision) -> Decision:
            return replace(decision, cost_usd=cost(teacher.price, collector.usage))

        decision = call.decision("teacher", reason, covered=covered)
        return Outcome(decision, stream=stream, collector=collector, model=model, ending=ending)

    async def _optimistic(self, call: Call) -> Outcome:
        """The student's tokens at once, by the task's explicit choice; what they were worth is known at the end."""
        assert call.served is not None and call.question is not None
        body = student.certified_body(call, call.question)
        collector = Collector()
        try:
            stream = await student.stream(call, body, collector)
        except UpstreamError as error:
            call.local_problem = str(error)
            return await self._ask_teacher(call, student.reason_of(error))

        def ending(decision: Decision) -> Decision:
            call.confidence = student.confidence_of(call, collector.answer())
            return call.decision("local", decision.reason, covered=False)

        decision = call.decision("local", "optimistic", covered=False)
        return Outcome(decision, stream=stream, collector=collector, ending=ending)

    async def _without_teacher(
        self, call: Call, reason: Reason, problem: str, error: UpstreamError | Withheld | None = None
    ) -> Outcome:
        """The local answer, whatever its confidence; without a promise."""
        if call.local_answer is not None or await self._free_answer(call):
            degraded = reason in ("teacher_down", "budget")
            return _local(call, call.decision("local", reason, covered=False, degraded=degraded))
        raise _nobody(call, reason, problem, error)

    async def _free_answer(self, call: Call) -> bool:
        """Whether the student answers this request without a certificate. Nothing is left out silently."""
        served = call.served
        if served is None or served.local is None:
            call.local_problem = served.problem if served else "there is no release of this task"
            return False
        cannot = served.local.unsupported(call.body)
        if cannot:
            call.local_problem = f"the local model cannot do what is asked ({', '.join(cannot)})"
            return False
        if call.local_problem:
            return False  # it has failed for this request already
        plain = call.question is not None and not demands(call.body)
        body = (
            student.certified_body(call, call.question)
            if plain and call.question
            else student.free_body(call)
        )
        return await student.ask(call, body) is None

    def _teacher(self, call: Call) -> Teacher | None:
        if self._teachers is None:
            return None
        return call.served.teacher if call.served else self._teachers.before_release(call.body["model"])


def _as_it_comes(body: Mapping[str, Any]) -> bool:
    """Whether the student's stream is all that was asked for: what is done to a decided answer is not done to it."""
    return not (demands(body) or body.get("stop") or body.get("logprobs"))


def _local(call: Call, decision: Decision) -> Outcome:
    assert call.local_answer is not None and call.served is not None and call.served.local is not None
    return Outcome(decision, answer=call.local_answer, model=call.served.local.name)


def _nobody(call: Call, reason: Reason, problem: str, error: UpstreamError | Withheld | None) -> ApiError:
    """Both models are out: one error that names both. A rate limit alone is passed on as such."""
    wait = _retry_after(error)
    headers = {"Retry-After": wait} if wait else {}
    if isinstance(error, UpstreamError) and error.status == RATE_LIMITED and call.served is None:
        return ApiError(RATE_LIMITED, str(error), kind="rate_limit_error", body=error.body, headers=headers)
    status = STATUS_OF.get(reason, 503)
    kind = {RATE_LIMITED: "insufficient_quota", 403: "permission_error"}.get(status, "server_error")
    message = f"neither model can answer. Teacher: {problem}. Local: {call.local_problem}"
    return ApiError(status, message, kind=kind, code="no_model_available", headers=headers)


def _retry_after(error: UpstreamError | Withheld | None) -> str | None:
    if isinstance(error, Withheld):
        return None if error.retry_after_s is None else str(math.ceil(error.retry_after_s))
    return error.retry_after if error else None
