"""POST /v1/embeddings: passed to the task's local runtime. No teacher is asked: its vectors would be others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.api.chat import Chat, Left, new_identity
from serve.api.checks import parsed, refuse, shown
from serve.api.disconnect import ClientGone, while_connected
from serve.api.replies import CLIENT_GONE
from serve.errors import ApiError, UpstreamBusy, UpstreamError, UpstreamRefused, unknown_model
from serve.guard.keys import Caller
from serve.records.entry import Entry
from serve.release import Release
from serve.tasks import Tasks
from serve.upstreams.local import LocalModel
from serve.wire.sse import dumps

NOT_OFFERED = 501


class Embeddings:
    """
    Args:
        chat: knows who is let in, and reads bodies.
        tasks: whose local models are asked.
        record: told how every request ended; of its texts nothing is kept.
    """

    def __init__(self, chat: Chat, tasks: Tasks, record: Callable[[Entry], None]) -> None:
        self._chat = chat
        self._tasks = tasks
        self._record = record

    def routes(self) -> list[Route]:
        return [Route("/v1/embeddings", self.create, methods=["POST"])]

    async def create(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        began = time.perf_counter()
        body = parsed(await self._chat.body(request))
        refuse(_faults(body))
        caller = self._chat.door.caller(request)
        release, local = self._local(caller, body["model"])
        told = Entry(
            id=new_identity(),
            asked=body["model"],
            messages=[],
            status=200,
            latency_ms=0.0,
            overhead_ms=0.0,
            task=release.manifest.task,
            release=release.version,
            key=caller.name,
            endpoint="embeddings",
        )
        try:
            answer = await while_connected(request.receive, local.embeddings(body))
            tokens = (answer.get("usage") or {}).get("prompt_tokens")
            told = replace(told, route="local", model=answer.get("model"), prompt_tokens=tokens)
        except UpstreamError as error:
            refused = _refusal(error)
            told = replace(told, status=refused.status, error=str(error))
            raise refused from error
        except ClientGone as gone:
            told = replace(told, status=CLIENT_GONE, error="the client went away")
            raise Left from gone
        finally:
            self._record(replace(told, latency_ms=round((time.perf_counter() - began) * 1000, 3)))
        headers = {"x-homestill-route": "local", "x-request-id": told.id}
        return Response(dumps(answer), headers=headers, media_type="application/json")

    def _local(self, caller: Caller, task: str) -> tuple[Release, LocalModel]:
        self._chat.door.check_task(caller, task)
        served = self._tasks.served.get(task)
        if served is None:
            raise unknown_model(task, caller.tasks if caller.tasks is not None else self._tasks.served)
        if served.local is None:
            told = f"the local model of {task} does not run ({served.problem}); mend it, or roll back"
            raise ApiError(503, told, kind="server_error", code="no_model_available")
        return served.release, served.local


def _faults(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    faults = []
    model, given = body.get("model"), body.get("input")
    if not isinstance(model, str) or not model:
        faults.append(("model", "model is missing or no text; name a task"))
    texts = isinstance(given, str) or (
        isinstance(given, list) and all(isinstance(each, str | int | list) for each in given)
    )
    if not texts or not given:
        faults.append(("input", f"input is {shown(given)}; send a text, or a list of texts"))
    return faults


def _refusal(error: UpstreamError) -> ApiError:
    headers = {"Retry-After": error.retry_after} if error.retry_after else {}
    if isinstance(error, UpstreamRefused):
        return ApiError(error.status or NOT_OFFERED, str(error), body=error.body, headers=headers)
    code = "local_busy" if isinstance(error, UpstreamBusy) else "local_down"
    return ApiError(503, str(error), kind="server_error", code=code, headers=headers)
