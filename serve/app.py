"""The endpoint: OpenAI's chat interface over ASGI."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from serve.api.disconnect import ClientGone, while_connected
from serve.api.replies import EventStream, from_whole, passed_through, whole
from serve.errors import ApiError, unknown_model
from serve.records.journal import Journal
from serve.routing.router import Call, Outcome, Router
from serve.settings import Settings
from serve.tasks import Tasks
from serve.upstreams.local import Local
from serve.upstreams.teacher import Teachers
from serve.wire.sse import dumps

CLIENT_GONE = 499
logger = logging.getLogger("serve")


class Endpoint:
    """The request handlers, over what `create_app` was given."""

    def __init__(self, settings: Settings, tasks: Tasks, router: Router, journal: Journal) -> None:
        self._settings = settings
        self._tasks = tasks
        self._router = router
        self._journal = journal
        self._keys = [_digest(key) for key in settings.api_keys]

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self._authorize(request)
        body = checked(await self._read(request))
        call = self._router.call(f"req_{uuid.uuid4().hex}", body)
        try:
            outcome = await while_connected(request.receive, self._router.answer(call))
        except ApiError as error:
            self._journal.record(call.entry(error.status, error=str(error)))
            error.headers["x-request-id"] = call.identity
            raise
        except ClientGone:
            self._journal.record(call.entry(CLIENT_GONE, error="the client went away"))
            return Response(status_code=CLIENT_GONE)
        return self._reply(call, outcome)

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the tasks that have a release."""
        self._authorize(request)
        return _json({"object": "list", "data": [self._model(name) for name in sorted(self._tasks.served)]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        self._authorize(request)
        name = request.path_params["name"]
        if name not in self._tasks.served:
            raise unknown_model(name, self._tasks.served)
        return _json(self._model(name))

    async def health(self, request: Request) -> Response:
        """GET /healthz: open to all; why a release is not in use is told to those with a key."""
        names = sorted(self._tasks.served.keys() | self._tasks.problems.keys())
        told = self._is_authorized(request)
        return _json(
            {
                "status": "ok",
                "offline": self._settings.offline,
                "journal": {"lost": self._journal.lost},
                "tasks": {name: self._task_health(name, told=told) for name in names},
            }
        )

    def _reply(self, call: Call, outcome: Outcome) -> Response:
        headers = {"x-request-id": call.identity, **outcome.decision.headers()}
        if outcome.stream is not None:
            return EventStream(passed_through(call, outcome, self._journal), headers)
        answer = whole(call, outcome, self._journal)
        if call.streamed:
            return EventStream(from_whole(call, answer), headers)
        return Response(dumps(answer), headers=headers, media_type="application/json")

    def _model(self, name: str) -> dict[str, Any]:
        release = self._tasks.served[name].release
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "homestill",
            "homestill": {
                "release": release.version,
                "certified": release.router.certified,
                "threshold": release.router.threshold,
                "guarantee": self._tasks.served[name].guarantee,
            },
        }

    def _task_health(self, name: str, *, told: bool) -> dict[str, Any]:
        served = self._tasks.served.get(name)
        problem = self._tasks.problems.get(name)
        return {
            "release": served.release.version if served else None,
            "local": bool(served and served.local),
        } | ({"problem": problem if told else "see the log"} if problem else {})

    def _is_authorized(self, request: Request) -> bool:
        """Whether a key was given that is one of ours; every key is compared, in constant time."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip())
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        return not self._keys or (any(matches) and scheme.lower() == "bearer")

    def _authorize(self, request: Request) -> None:
        if not self._is_authorized(request):
            raise ApiError(
                401,
                "the API key is missing or not one of HOMESTILL_API_KEYS; send Authorization: Bearer <key>",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, request: Request) -> bytes:
        longest = self._settings.max_body_bytes
        received = bytearray()
        async for piece in request.stream():
            received += piece
            if len(received) > longest:
                raise ApiError(
                    413, f"the request is longer than {longest} bytes; send less", code="request_too_large"
                )
        return bytes(received)


def create_app(
    settings: Settings, local: Local, teachers: Teachers | None, journal: Journal, *, poll_s: float = 1.0
) -> Starlette:
    """The ASGI application.

    Args:
        local: runs the releases' models.
        teachers: None offline.
        journal: stays open; whoever opened it closes it.
        poll_s: seconds between two looks at every `current`.
    """
    tasks = Tasks(settings.releases, settings.runtime, local, teachers)
    endpoint = Endpoint(settings, tasks, Router(tasks, teachers), journal)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await tasks.refresh()
        watching = asyncio.create_task(tasks.watch(poll_s))
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await tasks.close()
            if teachers:
                await teachers.close()

    routes = [
        Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
        Route("/v1/models", endpoint.models),
        Route("/v1/models/{name:path}", endpoint.model),
        Route("/healthz", endpoint.health),
    ]
    handlers: dict[Any, Callable[[Request, Exception], Any]] = {
        ApiError: _api_error,
        HTTPException: _http_error,
        ClientDisconnect: _client_gone,
        Exception: _own_fault,
    }
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


def checked(data: bytes) -> dict[str, Any]:
    """The request, as far as routing needs it; every other field is the answering model's to judge.

    Raises:
        ApiError: not JSON, or one of these fields is missing or of the wrong type.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error}); send a JSON object") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object; send model and messages")
    model, messages = body.get("model"), body.get("messages")
    if not isinstance(model, str) or not model or not _is_text(model):
        raise ApiError(400, "model is missing or no text; name a task", param="model")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages is missing or empty; send a list of messages", param="messages")
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise ApiError(400, "a message is no object with a role; send role and content", param="messages")
    for name, kinds in (("stream", bool), ("stream_options", dict), ("max_tokens", int), ("n", int)):
        if body.get(name) is not None and not isinstance(body[name], kinds):
            raise ApiError(400, f"{name} is {json.dumps(body[name])[:60]}; use {kinds.__name__}", param=name)
    return body


def _is_text(value: str) -> bool:
    return value.isprintable() and len(value) <= 256


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, "application/json")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _json(error.body, error.status, error.headers)


async def _http_error(_: Request, error: Exception) -> Response:
    """Starlette's own: no such path, wrong method."""
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, f"{error.detail}; see /v1/models and POST /v1/chat/completions").body
    return _json(body, error.status_code, error.headers)


async def _client_gone(_: Request, __: Exception) -> Response:
    """It hung up while it was sending; nobody reads this."""
    return Response(status_code=CLIENT_GONE)


async def _own_fault(_: Request, error: Exception) -> Response:
    logger.error("a request failed: %r", error)
    body = ApiError(500, "an error of the server; it is in its log", kind="server_error").body
    return _json(body, 500)
