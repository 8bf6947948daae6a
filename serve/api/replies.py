"""What goes back to the client, whole or as a stream, and into the journal when it is complete."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.disconnect import ClientGone, while_connected
from serve.errors import ApiError, UpstreamError
from serve.records.journal import Journal
from serve.routing.router import Call, Outcome
from serve.wire.chunks import Collector, from_answer
from serve.wire.sse import DONE, dumps, emit

CLIENT_GONE = 499
BROKEN = 502
logger = logging.getLogger("serve")


class EventStream(Response):
    """Server-sent events. A client that hangs up ends the iterator at once, even while it waits."""

    def __init__(self, events: AsyncGenerator[bytes], headers: Mapping[str, str]) -> None:
        super().__init__(headers={**headers, "cache-control": "no-store", "x-accel-buffering": "no"})
        self._events = events
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self.raw_headers.append((b"content-type", b"text/event-stream; charset=utf-8"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await while_connected(receive, self._send_all(send))
        except ClientGone:
            logger.info("a client left its stream")

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def whole(call: Call, outcome: Outcome, journal: Journal) -> dict[str, Any]:
    """A complete answer as the client gets it, journaled."""
    answer = dict(outcome.answer or {})
    decision = replace(outcome.decision, overhead_ms=call.overhead_ms())
    answer["model"] = answer.get("model") or outcome.model
    answer["homestill"] = decision.body()
    answer.setdefault("created", int(time.time()))
    if decision.route == "local":
        answer["choices"] = [_without_logprobs(answer["choices"][0])]  # ours to decide by, not asked for
    message = answer["choices"][0]["message"]
    journal.record(
        call.entry(200, decision, message=message, model=answer["model"], usage=answer.get("usage"))
    )
    return answer


async def from_whole(call: Call, answer: Mapping[str, Any]) -> AsyncGenerator[bytes]:
    """A complete answer as a stream."""
    usage = bool((call.body.get("stream_options") or {}).get("include_usage"))
    for data in from_answer(answer, answer["homestill"], usage=usage):
        yield emit(data)
    yield emit(DONE)


async def passed_through(call: Call, outcome: Outcome, journal: Journal) -> AsyncGenerator[bytes]:
    """A teacher's stream, chunk by chunk; the last one, held back until it is known to be, carries the decision."""
    assert outcome.stream is not None
    collector = Collector(call.body.get("n") or 1)
    status, problem = CLIENT_GONE, "the client went away"
    decision = outcome.decision
    try:
        async with aclosing(outcome.stream) as stream:
            held: list[dict[str, Any]] = []
            async for data in stream:
                chunk = collector.add(data)
                if collector.finished:
                    held.append(chunk)
                else:
                    yield emit(data)
        cost = (
            outcome.teacher.price.cost(collector.usage) if outcome.teacher and outcome.teacher.price else None
        )
        decision = replace(decision, cost_usd=cost, overhead_ms=call.overhead_ms())
        status, problem = 200, ""
        for data in _ending(call, held, decision.body()):
            yield emit(data)
        yield emit(DONE)
    except (UpstreamError, ValueError) as error:  # after the first byte there is no other model to turn to
        status, problem = BROKEN, str(error)
        body = ApiError(BROKEN, f"the teacher's stream broke off: {error}", kind="server_error").body
        yield emit(dumps({**body, "homestill": decision.body()}))
    finally:
        journal.record(
            call.entry(
                status,
                decision,
                message=collector.message(),
                model=collector.model or outcome.model,
                usage=collector.usage,
                error=problem or None,
            )
        )


def _ending(call: Call, held: list[dict[str, Any]], homestill: Mapping[str, Any]) -> list[bytes]:
    """The last chunks with the decision; token counts only where the client asked for them."""
    wanted = (call.body.get("stream_options") or {}).get("include_usage")
    kept = held if wanted else [chunk for chunk in held if chunk["choices"]]
    if kept:
        kept[-1]["homestill"] = homestill
    return [dumps(chunk) for chunk in kept]


def _without_logprobs(choice: Mapping[str, Any]) -> dict[str, Any]:
    return {**choice, "logprobs": None}
