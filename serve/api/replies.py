"""What goes back to the client, whole or as a stream, and to all that watch when it is complete."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.disconnect import ClientGone, while_connected
from serve.api.finish import Finish
from serve.errors import ApiError, UpstreamError
from serve.routing.call import Call
from serve.routing.decision import Decision
from serve.routing.router import Outcome
from serve.wire.chunks import from_answer
from serve.wire.sse import DONE, dumps, emit

CLIENT_GONE = 499
BROKEN = 502
KEEP_ALIVE = b""
"""An event without data: a comment that keeps proxies and clients from giving up."""
ERROR = b'{"error"'
logger = logging.getLogger("serve")


@dataclass(frozen=True)
class Reply:
    """An answer before it is written down in some client's dialect."""

    headers: dict[str, str]
    answer: dict[str, Any] | None = None
    """A whole chat.completion with its `homestill` object."""
    events: AsyncGenerator[bytes] | None = None
    """The data of each chat.completion.chunk. KEEP_ALIVE stands for a sign of life, an object with
    `error` for a failure half way; the last chunk has the `homestill` object."""


class EventStream(Response):
    """Server-sent events. A client that hangs up ends the iterator at once, even while it waits."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], headers: Mapping[str, str]) -> None:
        super().__init__(headers={**headers, "cache-control": "no-store", "x-accel-buffering": "no"})
        self._events = events
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await while_connected(receive, self._send_all(send))
        except ClientGone:
            logger.info("a client left its stream")

    async def _send_all(self, send: Send) -> None:
        event = b""
        async with aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": self.written(event), "more_body": True})
        # after an error there is no end that looks like success
        ending = b"" if event.startswith(ERROR) else self.ending()
        await send({"type": "http.response.body", "body": ending})

    def written(self, event: bytes) -> bytes:
        """One event as it goes over the wire."""
        return emit(event) if event else b": still deciding\n\n"

    def ending(self) -> bytes:
        """What closes the stream."""
        return emit(DONE)


def reply(call: Call, outcome: Outcome, finish: Finish) -> Reply:
    """The outcome as the client gets it; recorded now, or when its stream has ended."""
    headers = {"x-request-id": call.identity, **outcome.decision.headers()}
    return (
        Reply(headers, events=_events(call, outcome, finish))
        if call.streamed
        else Reply(headers, answer=_whole(call, outcome, finish))
    )


async def waiting_for(
    call: Call, answering: asyncio.Task[Outcome], finish: Finish, keep_alive_s: float
) -> AsyncGenerator[bytes]:
    """A stream that is not decided yet: signs of life, then the answer. Too late for another status than 200."""
    try:
        while not answering.done():
            yield KEEP_ALIVE
            await asyncio.wait({answering}, timeout=keep_alive_s)
        outcome = answering.result()
    except ApiError as error:
        finish(call, error.status, error=str(error))
        yield dumps(error.body)
        return
    except BaseException:  # the client went away meanwhile
        answering.cancel()
        await asyncio.wait({answering})
        finish(call, CLIENT_GONE, error="the client went away")
        raise
    async with aclosing(_events(call, outcome, finish)) as events:
        async for event in events:
            yield event


def _events(call: Call, outcome: Outcome, finish: Finish) -> AsyncGenerator[bytes]:
    if outcome.stream is not None:
        return _passed_through(call, outcome, finish)
    return _from_whole(call, outcome, finish)


def _whole(call: Call, outcome: Outcome, finish: Finish) -> dict[str, Any]:
    answer = dict(outcome.answer or {})
    decision = replace(outcome.decision, overhead_ms=call.overhead_ms())
    answer["model"] = answer.get("model") or outcome.model
    answer["homestill"] = decision.body()
    answer.setdefault("created", int(time.time()))
    if decision.route == "local":
        answer["choices"] = [_as_asked(call.body, choice) for choice in answer["choices"]]
    call.first_token()
    finish(
        call,
        200,
        decision,
        message=answer["choices"][0]["message"],
        model=answer["model"],
        usage=answer.get("usage"),
    )
    return answer


async def _from_whole(call: Call, outcome: Outcome, finish: Finish) -> AsyncGenerator[bytes]:
    """A complete answer as a stream."""
    answer = _whole(call, outcome, finish)
    usage = bool((call.body.get("stream_options") or {}).get("include_usage"))
    for data in from_answer(answer, answer["homestill"], usage=usage):
        yield data


async def _passed_through(call: Call, outcome: Outcome, finish: Finish) -> AsyncGenerator[bytes]:
    """A model's stream, chunk by chunk; the last ones, held back until they are known to be, carry the decision."""
    assert outcome.stream is not None
    collector, decision = outcome.collector, outcome.decision
    status, problem = CLIENT_GONE, "the client went away"
    held: list[bytes] = []
    try:
        async with aclosing(outcome.stream) as stream:
            async for data in stream:
                call.first_token()
                if collector.finished:
                    held.append(data)
                else:
                    yield _without_logprobs(call, data) if decision.route == "local" else data
        decision = replace(outcome.ending(decision), overhead_ms=call.overhead_ms())
        status, problem = 200, ""
        for data in _ending(call, held, decision):
            yield data
        await call.search(decision, collector.message())
    except (UpstreamError, ValueError) as error:  # after the first byte there is no other model to turn to
        status, problem = BROKEN, str(error)
        body = ApiError(
            BROKEN, f"the {decision.route} model's stream broke off: {error}", kind="server_error"
        ).body
        yield dumps({**body, "homestill": decision.body()})
    finally:
        finish(
            call,
            status,
            decision,
            message=collector.message(),
            model=collector.model or outcome.model,
            usage=collector.usage,
            error=problem or None,
        )


def _ending(call: Call, held: list[bytes], decision: Decision) -> list[bytes]:
    """The last chunks with the decision; token counts only where the client asked for them."""
    wanted = (call.body.get("stream_options") or {}).get("include_usage")
    chunks = [orjson.loads(data) for data in held]
    kept = chunks if wanted else [chunk for chunk in chunks if chunk["choices"]]
    if kept:
        kept[-1]["homestill"] = decision.body()
    return [dumps(chunk) for chunk in kept]


def _as_asked(body: Mapping[str, Any], choice: Mapping[str, Any]) -> dict[str, Any]:
    """A local choice with what the client asked for and nothing more: its stop texts, its log-probabilities."""
    shaped = {**choice, "logprobs": _logprobs(body, choice)}
    stop = body.get("stop") or []
    text = choice["message"].get("content")
    places = [
        place
        for each in ([stop] if isinstance(stop, str) else stop)
        if each and text and (place := text.find(each)) >= 0
    ]
    if places:
        shaped["message"] = {**choice["message"], "content": text[: min(places)]}
        shaped["finish_reason"] = "stop"
    return shaped


def _logprobs(body: Mapping[str, Any], choice: Mapping[str, Any]) -> Any:
    """We decide by them; the client sees them, and as many alternatives, as it asked for."""
    found = choice.get("logprobs")
    if not body.get("logprobs") or not found:
        return None
    most = body.get("top_logprobs") or 0
    tokens = [
        {**token, "top_logprobs": (token.get("top_logprobs") or [])[:most]}
        for token in found["content"] or []
    ]
    return {**found, "content": tokens}


def _without_logprobs(call: Call, data: bytes) -> bytes:
    if call.body.get("logprobs"):
        return data
    chunk = orjson.loads(data)
    for choice in chunk["choices"]:
        choice["logprobs"] = None
    return dumps(chunk)
