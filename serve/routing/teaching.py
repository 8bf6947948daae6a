"""The teacher's side: nothing goes out that must not, nothing is spent that is not there."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

import orjson

from serve.errors import BudgetExceeded, Unaffordable, Unredactable, UpstreamDown, UpstreamError
from serve.guard.budget import Budget, Reservation
from serve.guard.redaction import Redacted
from serve.routing.call import Call
from serve.routing.decision import Reason
from serve.upstreams.teacher import Teacher, cost
from serve.wire.chunks import Collector
from serve.wire.sse import dumps

TEXTS = ("content", "refusal", "reasoning_content")
"""Fields of a message that hold what the teacher says."""


class Withheld(Exception):
    """The teacher is not asked.

    Args:
        reason: what the answer's decision will say.
        retry_after_s: when it might be, where that is known.
    """

    def __init__(self, reason: Reason, problem: str, retry_after_s: float | None = None) -> None:
        self.reason = reason
        self.retry_after_s = retry_after_s
        super().__init__(problem)


class Teaching:
    """Asks teachers on behalf of calls.

    Args:
        budget: every call's worst case is reserved there first.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    async def whole(self, call: Call, teacher: Teacher) -> tuple[dict[str, Any], float | None]:
        """An answer, and what it cost in US dollars where that is known.

        Raises:
            Withheld, UpstreamDown, UpstreamRefused.
        """
        body, redacted, reservation = await self._prepared(call, teacher)
        try:
            answer = await call.wait_for(teacher.chat(body, partial(_tried_again, call, reservation)))
        except BaseException as error:
            reservation.settle(_billed(error))
            raise
        paid = cost(teacher.price, answer.get("usage"))
        reservation.settle(paid)
        return (_restored(answer, redacted, call.body) if redacted else answer), paid

    async def stream(self, call: Call, teacher: Teacher, collector: Collector) -> AsyncGenerator[bytes]:
        """A stream whose first event has come; `collector` sees every one. After it there is no other model
        to turn to, so whatever can be found out before is found out here.

        Raises:
            Withheld, UpstreamDown, UpstreamRefused.
        """
        body, redacted, reservation = await self._prepared(call, teacher)
        body["stream"] = True
        body["stream_options"] = {**(call.body.get("stream_options") or {}), "include_usage": True}
        events = teacher.chat_stream(body, partial(_tried_again, call, reservation))
        try:
            first = await call.wait_for(anext(events, b""))
            collector.add(first)
        except BaseException as error:
            await events.aclose()
            reservation.settle(_billed(error))
            if isinstance(error, ValueError):
                raise UpstreamDown("teacher", f"the teacher sent no stream of chunks: {error}") from error
            raise
        paid = partial(_settle, reservation, teacher, collector)
        followed = _followed(first, events, call, collector, paid)
        return _restored_stream(followed, redacted, call.body) if redacted else followed

    async def _prepared(
        self, call: Call, teacher: Teacher
    ) -> tuple[dict[str, Any], Redacted | None, Reservation]:
        """The request as it may leave, and the money for it."""
        if call.ask.egress == "never":
            raise Withheld(
                "policy", "the rules let nothing of this request leave this machine (egress: never)"
            )
        redacted = None
        if call.ask.egress == "redact":
            try:
                redacted = await call.redacted()
            except Unredactable as error:
                raise Withheld("policy", str(error)) from error
        body = dict(redacted.body if redacted else call.body)
        body["model"] = teacher.model or call.body["model"]
        try:
            reservation = self._budget.admit(
                body,
                teacher.price,
                task=call.task or str(call.body["model"]),
                rules=call.rules,
                caller=call.ask.caller,
            )
        except Unaffordable as error:
            raise _unaffordable(error) from error
        return dict(reservation.body), redacted if redacted and redacted.count else None, reservation


def _unaffordable(error: Unaffordable) -> Withheld:
    return Withheld("budget", str(error), error.retry_after_s if isinstance(error, BudgetExceeded) else None)


def _tried_again(call: Call, reservation: Reservation, error: UpstreamDown) -> None:
    """The teacher failed and is asked once more; what the failure may have cost is spent, and more put aside.

    Raises:
        Withheld: there is no room for another attempt.
    """
    call.attempts += 1
    if error.billable:
        try:
            reservation.again()
        except Unaffordable as full:
            raise _unaffordable(full) from error


def _billed(error: BaseException) -> float | None:
    """What a call that failed may have cost: nothing where the teacher said no or never heard of it, else nobody knows."""
    free = isinstance(error, UpstreamError) and not error.billable
    return 0.0 if free else None


def _settle(reservation: Reservation, teacher: Teacher, collector: Collector) -> None:
    reservation.settle(cost(teacher.price, collector.usage))


async def _followed(
    first: bytes,
    rest: AsyncGenerator[bytes],
    call: Call,
    collector: Collector,
    ended: Callable[[], None],
) -> AsyncGenerator[bytes]:
    """The stream as it comes, whatever ends it."""
    try:
        yield first
        while (data := await call.wait_for(anext(rest, None))) is not None:
            collector.add(data)
            yield data
    finally:
        await rest.aclose()
        ended()


def _json_fields(body: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of a message that hold JSON, by what the client asked for: a value that is put into one is escaped."""
    form = body.get("response_format")
    kind = form.get("type") if isinstance(form, Mapping) else None
    return ("content",) if kind in ("json_object", "json_schema") else ()


def _restored(answer: dict[str, Any], redacted: Redacted, body: Mapping[str, Any]) -> dict[str, Any]:
    """With the client's own words where the teacher saw placeholders."""
    escaped = _json_fields(body)
    for choice in answer["choices"]:
        message = choice["message"]
        for field in TEXTS:
            if isinstance(message.get(field), str):
                message[field] = redacted.restore(message[field], json=field in escaped)
        for each in message.get("tool_calls") or []:
            function = each.get("function") or {}
            if isinstance(function.get("arguments"), str):
                function["arguments"] = redacted.restore(function["arguments"], json=True)
    return answer


async def _restored_stream(
    events: AsyncGenerator[bytes], redacted: Redacted, body: Mapping[str, Any]
) -> AsyncGenerator[bytes]:
    """The same for a stream, where a placeholder may be cut anywhere."""
    places = _Places(redacted, _json_fields(body))
    async with aclosing(events) as stream:
        async for data in stream:
            chunk = orjson.loads(data)
            for choice in chunk["choices"]:
                places.restore(choice)
            yield dumps(chunk)


class _Places:
    """The texts that are being streamed: each choice's content, and each of its tool calls' arguments."""

    def __init__(self, redacted: Redacted, escaped: Collection[str]) -> None:
        self._redacted = redacted
        self._escaped = escaped
        self._streams: dict[tuple[Any, ...], Any] = {}

    def restore(self, choice: dict[str, Any]) -> None:
        delta = choice["delta"] = choice.get("delta") or {}
        at = choice.get("index", 0)
        for field in TEXTS:
            if isinstance(delta.get(field), str):
                delta[field] = self._stream(at, field).feed(delta[field])
        for part in delta.get("tool_calls") or []:
            function = part.get("function") or {}
            if isinstance(function.get("arguments"), str):
                function["arguments"] = self._stream(at, part.get("index", 0)).feed(function["arguments"])
        if choice.get("finish_reason"):
            self._flush(at, delta)

    def _stream(self, choice: int, place: str | int) -> Any:
        """Of a field of the message, or of the arguments of its call of this number."""
        key = (choice, place)
        if key not in self._streams:
            json = isinstance(place, int) or place in self._escaped
            self._streams[key] = self._redacted.stream(json=json)
        return self._streams[key]

    def _flush(self, choice: int, delta: dict[str, Any]) -> None:
        """What was held back because it might have been the beginning of a placeholder."""
        for (of, place), stream in self._streams.items():
            rest = stream.flush() if of == choice else ""
            if rest and isinstance(place, str):
                delta[place] = (delta.get(place) or "") + rest
            elif rest:
                part = {"index": place, "function": {"arguments": rest}}
                delta["tool_calls"] = [*(delta.get("tool_calls") or []), part]
