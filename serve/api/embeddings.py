"""POST /v1/embeddings: passed to the task's local runtime. No teacher is asked: its vectors would be others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.api.chat import Chat, Left
from serve.api.checks import parsed, refuse, shown
from serve.api.disconnect import ClientGone, while_connected
from serve.errors import ApiError, UpstreamBusy, UpstreamError, UpstreamRefused, unknown_model
from serve.tasks import Tasks
from serve.upstreams.local import LocalModel
from serve.wire.sse import dumps

NOT_OFFERED = 501


class Embeddings:
    """
    Args:
        chat: knows who is let in, and reads bodies.
        tasks: whose local models are asked.
    """

    def __init__(self, chat: Chat, tasks: Tasks) -> None:
        self._chat = chat
        self._tasks = tasks

    def routes(self) -> list[Route]:
        return [Route("/v1/embeddings", self.create, methods=["POST"])]

    async def create(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        body = parsed(await self._chat.body(request))
        refuse(_faults(body))
        local = self._local(request, body["model"])
        try:
            answer = await while_connected(request.receive, local.embeddings(body))
        except UpstreamError as error:
            raise _told(error) from error
        except ClientGone as gone:
            raise Left from gone
        headers = {"x-homestill-route": "local"}
        return Response(dumps(answer), headers=headers, media_type="application/json")

    def _local(self, request: Request, task: str) -> LocalModel:
        caller = self._chat.door.caller(request)
        self._chat.door.check_task(caller, task)
        served = self._tasks.served.get(task)
        if served is None:
            raise unknown_model(task, caller.tasks if caller.tasks is not None else self._tasks.served)
        if served.local is None:
            told = f"the local model of {task} does not run ({served.problem}); mend it, or roll back"
            raise ApiError(503, told, kind="server_error", code="no_model_available")
        return served.local


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


def _told(error: UpstreamError) -> ApiError:
    headers = {"Retry-After": error.retry_after} if error.retry_after else {}
    if isinstance(error, UpstreamRefused):
        return ApiError(error.status or NOT_OFFERED, str(error), body=error.body, headers=headers)
    code = "local_busy" if isinstance(error, UpstreamBusy) else "local_down"
    return ApiError(503, str(error), kind="server_error", code=code, headers=headers)
