"""POST /v1/chat/completions, and the way that every other dialect takes through it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.api.checks import checked
from serve.api.disconnect import ClientGone, while_connected
from serve.api.door import Door
from serve.api.finish import Finish
from serve.api.replies import CLIENT_GONE, EventStream, Reply, reply, waiting_for
from serve.config import Egress, Limits
from serve.errors import ApiError
from serve.guard.keys import Caller
from serve.routing.call import Ask, Call
from serve.routing.router import Outcome, Router
from serve.wire.sse import dumps

CHAT = "/v1/chat/completions"


class Left(Exception):
    """The client went away before it was answered; all is recorded, nobody reads an answer."""


class Chat:
    """Chat requests, from the door to the reply.

    Args:
        door: lets clients in.
        router: answers.
        finish: told how every request ended.
        limits: how much is read, and how long a stream may be silent.
    """

    def __init__(self, door: Door, router: Router, finish: Finish, limits: Limits) -> None:
        self.door = door
        self._router = router
        self._finish = finish
        self._limits = limits

    def routes(self) -> list[Route]:
        return [Route(CHAT, self.completions, methods=["POST"])]

    async def completions(self, request: Request) -> Response:
        """OpenAI's own dialect."""
        self.door.caller(request)  # before the body is read
        answer = await self.ask(
            request, checked(await read(request, self._limits.body_bytes)), endpoint="chat"
        )
        if answer.events is not None:
            return EventStream(answer.events, answer.headers)
        return Response(dumps(answer.answer), headers=answer.headers, media_type="application/json")

    async def body(self, request: Request) -> bytes:
        """The body of a request of somebody who is let in.

        Raises:
            ApiError: 401 or 413.
        """
        self.door.caller(request)
        return await read(request, self._limits.body_bytes)

    async def ask(self, request: Request, body: Mapping[str, Any], *, endpoint: str) -> Reply:
        """Route a checked chat request whose HTTP body has been read.

        Raises:
            ApiError: not let in, or nobody can answer.
            Left: the client hung up.
        """
        caller, body = self.door.caller(request), self._router.meant(body)
        self.door.check_task(caller, body["model"])
        ask = Ask(
            identity=new_identity(),
            body=body,
            caller=caller,
            egress=self.door.egress(request, caller, body["model"]),
            endpoint=endpoint,
            traceparent=request.headers.get("traceparent"),
        )
        call = self._router.call(ask)
        if not call.streamed:
            return await self._recorded(call, while_connected(request.receive, self._answered(call)))
        answering = asyncio.create_task(self._decided(call))
        first = while_connected(request.receive, self._soon(call, answering))
        return await self._recorded(call, first, answering)

    async def complete(
        self,
        body: Mapping[str, Any],
        *,
        caller: Caller,
        egress: Egress,
        endpoint: str,
        identity: str | None = None,
    ) -> dict[str, Any]:
        """Answer a request of this process's own, whole.

        Raises:
            ApiError: nobody can answer.
        """
        call = self._router.call(Ask(identity or new_identity(), body, caller, egress, endpoint))
        answer = (await self._recorded(call, self._answered(call))).answer
        assert answer is not None
        return answer

    async def _answered(self, call: Call) -> Reply:
        return reply(call, await self._decided(call), self._finish)

    async def _decided(self, call: Call) -> Outcome:
        """The router's answer, when what the journal will keep of it has been searched for personal data."""
        try:
            outcome = await self._router.answer(call)
        except ApiError:
            await call.search()
            raise
        if outcome.answer is not None:
            with suppress(asyncio.CancelledError):  # who leaves now leaves an answer, and it may be paid for
                await call.search(outcome.decision, outcome.answer["choices"][0]["message"])
        return outcome

    async def _soon(self, call: Call, answering: asyncio.Task[Outcome]) -> Reply:
        """A stream with its decision in the headers; where that takes long, one that shows signs of life first."""
        await asyncio.wait({answering}, timeout=self._limits.keep_alive_s)
        if answering.done():
            return reply(call, answering.result(), self._finish)
        headers = {"x-request-id": call.identity}
        return Reply(headers, events=waiting_for(call, answering, self._finish, self._limits.keep_alive_s))

    async def _recorded(
        self, call: Call, answer: Any, answering: asyncio.Task[Outcome] | None = None
    ) -> Reply:
        """The reply; what went wrong before there was one is recorded here."""
        try:
            found: Reply = await answer
            return found
        except ApiError as error:
            self._finish(call, error.status, error=str(error))
            error.headers["x-request-id"] = call.identity
            raise
        except ClientGone as gone:
            if answering:
                answering.cancel()
                await asyncio.wait({answering})
            self._finish(call, CLIENT_GONE, error="the client went away")
            raise Left from gone
        except asyncio.CancelledError:
            self._finish(call, CLIENT_GONE, error="the client went away")
            raise
        except Exception as error:  # ours; the client is told in general words, the journal what it was
            self._finish(call, 500, error=f"{type(error).__name__}: {error}"[:500])
            raise


def new_identity() -> str:
    return f"req_{os.urandom(16).hex()}"


async def read(request: Request, longest: int) -> bytes:
    """The request's body.

    Raises:
        ApiError: 413, it is longer than `longest` bytes.
    """
    received = bytearray()
    async for piece in request.stream():
        received += piece
        if len(received) > longest:
            raise ApiError(
                413, f"the request is longer than {longest} bytes; send less", code="request_too_large"
            )
    return bytes(received)
