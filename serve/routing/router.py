"""The way of a request: policy → local answer → confidence ≥ threshold ? keep : teacher.

Everything outside is behind `Tasks` (local models, teachers of releases) and `Teachers`; what is
decided here is journaled by whoever sends the answer, with `Call.entry`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve.confidence import LocalAnswer, confidence, parse
from serve.errors import ApiError, UpstreamDown, UpstreamError, UpstreamRefused, unknown_model
from serve.records.journal import Entry
from serve.routing.decision import Decision
from serve.routing.policy import Question, Reason, conversation, demands, match
from serve.tasks import Served, Tasks
from serve.upstreams.teacher import Teacher, Teachers
from serve.wire.chunks import Collector

TOP_LOGPROBS = 5
RATE_LIMITED = 429


class Call:
    """One request on its way, with what has become of it so far."""

    def __init__(
        self, identity: str, body: Mapping[str, Any], served: Served | None, clock: Callable[[], float]
    ) -> None:
        self.identity = identity
        self.body = body
        self.served = served
        self.question: Question | None = None
        self.confidence: float | None = None
        self.local_answer: dict[str, Any] | None = None
        self.local_problem = ""
        self._clock = clock
        self._started = clock()
        self._waited = 0.0

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))

    async def wait_for(self, answer: Any) -> Any:
        """Await a model; the time counts as its own, not as our overhead."""
        began = self._clock()
        try:
            return await answer
        finally:
            self._waited += self._clock() - began

    def latency_ms(self) -> float:
        return round((self._clock() - self._started) * 1000, 3)

    def overhead_ms(self) -> float:
        return round((self._clock() - self._started - self._waited) * 1000, 3)

    def decision(self, route: str, reason: Reason, *, covered: bool, degraded: bool = False) -> Decision:
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
            cost_usd=0.0 if route == "local" else None,
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
        """What the journal is told."""
        counts = usage if isinstance(usage, Mapping) else {}
        local = self.local_answer if decision is None or decision.route == "teacher" else None
        outcome = decision.body() if decision else {}
        outcome["overhead_ms"] = self.overhead_ms()
        return Entry(
            id=self.identity,
            asked=self.body["model"],
            messages=self.body["messages"],
            status=status,
            latency_ms=self.latency_ms(),
            task=self.served.release.manifest.task if self.served else None,
            predictor=self.question.predictor.name if self.question else None,
            streamed=self.streamed,
            model=model,
            prompt_tokens=counts.get("prompt_tokens"),
            completion_tokens=counts.get("completion_tokens"),
            answer=dict(message) if message else None,
            local_answer=local["choices"][0]["message"].get("content") if local else None,
            error=error,
            **outcome,
        )


@dataclass(frozen=True)
class Outcome:
    """A whole answer, or a teacher's stream whose first event has come already."""

    decision: Decision
    answer: dict[str, Any] | None = None
    stream: AsyncGenerator[bytes] | None = None
    teacher: Teacher | None = None
    model: str | None = None
    """The model that was asked; what it calls itself in its answer goes before."""


class Router:
    """Answers chat requests.

    Args:
        tasks: what has a release.
        teachers: None offline.
        clock: seconds.
    """

    def __init__(
        self, tasks: Tasks, teachers: Teachers | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._tasks = tasks
        self._teachers = teachers
        self._clock = clock

    def call(self, identity: str, body: Mapping[str, Any]) -> Call:
        """Begin a request."""
        return Call(identity, body, self._tasks.served.get(body["model"]), self._clock)

    async def answer(self, call: Call) -> Outcome:
        """Decide and answer.

        Raises:
            ApiError: neither model can answer, or the teacher finds the request at fault.
        """
        reason = self._before(call)
        if reason is None:
            reason = await self._try_local(call)
        if reason == "confident":
            return self._local_outcome(call, call.decision("local", "confident", covered=True))
        teacher = self._teacher(call)
        if teacher is None and call.served is None:
            raise unknown_model(call.body["model"], self._tasks.served)
        if teacher is None:
            return await self._without_teacher(
                call, "offline", "the teacher is switched off (HOMESTILL_OFFLINE)"
            )
        # A teacher's answer keeps the promise as well: it is what the local one is measured against.
        decision = call.decision("teacher", reason, covered=call.question is not None)
        try:
            return await self._ask_teacher(call, teacher, decision)
        except UpstreamRefused as error:
            raise ApiError(error.status or 400, str(error), body=error.body) from error
        except UpstreamDown as error:
            return await self._without_teacher(call, "teacher_down", str(error), error)

    def _before(self, call: Call) -> Reason | None:
        """Why the local model is not asked first; None when it is. Sets `call.question`."""
        served = call.served
        if served is None or served.refused:
            return "no_release"
        messages = None if demands(call.body) else conversation(call.body)
        if messages is None:
            return "policy"
        call.question = match(messages, served.release.router.predictors)
        if call.question is None:
            return "not_this_task"
        if not served.release.router.certified:
            return "policy"
        return "local_down" if served.local is None else None

    async def _try_local(self, call: Call) -> Reason:
        """Ask the local model, and say how its answer is to be taken. Sets `call.confidence`."""
        served, question = call.served, call.question
        assert served is not None and question is not None
        if not await self._ask_local(call, question.messages):
            return "local_down"
        answer = _local_answer(call.local_answer, question)
        fields = served.fields[question.predictor.name]
        threshold = served.release.router.threshold
        if served.model is None or threshold is None or (answer.text and not answer.logprobs):
            call.local_problem = "local model gave no log-probabilities"
            return "local_down"
        call.confidence = confidence(answer, fields, served.neighbours, served.model)
        if call.confidence >= threshold:
            return "confident"
        return "unparsable" if parse(answer.text, fields) is None else "low_confidence"

    async def _ask_local(self, call: Call, messages: list[dict[str, str]]) -> bool:
        """Whether it answered; the answer, or what was wrong, goes into `call`."""
        served = call.served
        if served is None or served.local is None:
            call.local_problem = served.problem if served else "there is no release of this task"
            return False
        sampling = served.release.router.sampling
        wanted = call.body.get("max_completion_tokens") or call.body.get("max_tokens")
        body = {
            "messages": messages,
            "temperature": sampling.temperature,
            "max_tokens": min(wanted or sampling.max_tokens, sampling.max_tokens),
            "logprobs": True,
            "top_logprobs": TOP_LOGPROBS,
        }
        try:
            call.local_answer = await call.wait_for(served.local.chat(body))
        except UpstreamError as error:
            call.local_problem = str(error)
        return call.local_answer is not None

    def _teacher(self, call: Call) -> Teacher | None:
        if self._teachers is None:
            return None
        return call.served.teacher if call.served else self._teachers.before_release()

    async def _ask_teacher(self, call: Call, teacher: Teacher, decision: Decision) -> Outcome:
        model = teacher.model or call.body["model"]
        body: dict[str, Any] = {**call.body, "model": model}
        if not call.streamed:
            answer = await call.wait_for(teacher.upstream.chat(body))
            cost = teacher.price.cost(answer.get("usage")) if teacher.price else None
            decision = replace(decision, cost_usd=cost, overhead_ms=call.overhead_ms())
            return Outcome(decision, answer=answer, teacher=teacher, model=model)
        body["stream_options"] = {**(call.body.get("stream_options") or {}), "include_usage": True}
        events = teacher.upstream.chat_stream(body)
        first = await call.wait_for(anext(events, b""))  # after the first byte there is no way back
        try:
            Collector().add(first)
        except ValueError as error:
            await events.aclose()
            raise UpstreamDown(
                "teacher", f"teacher at {teacher.upstream.base_url} sent no stream of chunks: {error}"
            ) from error
        decision = replace(decision, overhead_ms=call.overhead_ms())
        return Outcome(decision, stream=_with_first(first, events, call), teacher=teacher, model=model)

    async def _without_teacher(
        self, call: Call, reason: Reason, problem: str, error: UpstreamError | None = None
    ) -> Outcome:
        """The local answer, whatever its confidence; without a promise."""
        if call.local_answer is None and not call.local_problem:
            messages = None if demands(call.body) else conversation(call.body)
            if messages is None:
                asked = ", ".join(demands(call.body)) or "messages that hold more than text"
                call.local_problem = f"the local model cannot do what is asked ({asked})"
            else:
                await self._ask_local(call, messages)
        if call.local_answer is not None:
            decision = call.decision("local", reason, covered=False, degraded=reason == "teacher_down")
            return self._local_outcome(call, decision)
        raise _nobody(call, problem, error)

    def _local_outcome(self, call: Call, decision: Decision) -> Outcome:
        assert call.local_answer is not None and call.served is not None and call.served.local is not None
        return Outcome(decision, answer=call.local_answer, model=call.served.local.name)


def _local_answer(answer: Mapping[str, Any] | None, question: Question) -> LocalAnswer:
    assert answer is not None
    choice = answer["choices"][0]
    content = (choice.get("logprobs") or {}).get("content") or []
    return LocalAnswer(
        text=choice["message"].get("content") or "",
        logprobs=[_known_to_certify(token) for token in content],
        finish_reason=choice.get("finish_reason") or "length",  # a runtime that gave up says nothing
        prompt_tokens=(answer.get("usage") or {}).get("prompt_tokens") or 0,
        query=question.query,
    )


def _known_to_certify(token: Mapping[str, Any]) -> dict[str, Any]:
    """Without `bytes`: the answers that the confidence model was fitted on did not keep them."""
    return {key: token.get(key) for key in ("token", "logprob", "top_logprobs")}


async def _with_first(first: bytes, rest: AsyncGenerator[bytes], call: Call) -> AsyncGenerator[bytes]:
    """A stream whose first event was taken off to look at it."""
    try:
        yield first
        while True:
            data = await call.wait_for(anext(rest, None))
            if data is None:
                return
            yield data
    finally:
        await rest.aclose()


def _nobody(call: Call, problem: str, error: UpstreamError | None) -> ApiError:
    """Both models are out: one error that names both. A rate limit alone is passed on as such."""
    headers = {"Retry-After": error.retry_after} if error and error.retry_after else {}
    if error and error.status == RATE_LIMITED and call.served is None:
        return ApiError(RATE_LIMITED, str(error), kind="rate_limit_error", body=error.body, headers=headers)
    message = f"neither model can answer. Teacher: {problem}. Local: {call.local_problem}"
    return ApiError(503, message, kind="server_error", code="no_model_available", headers=headers)
