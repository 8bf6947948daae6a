"""Chat requests go straight to their handler; everything else, and every other method, through Starlette.

Starlette matches routes one after the other and wraps each request in four layers of error handling: a
seventh of what a chat request costs in all. What it would do with an error is done here in one place, for both ways.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api.chat import CHAT, Left
from serve.api.replies import CLIENT_GONE
from serve.errors import ApiError
from serve.wire.sse import dumps

logger = logging.getLogger("serve")


class Direct:
    """An ASGI application in front of another one.

    Args:
        app: takes what is no chat request.
        completions: answers `POST /v1/chat/completions`.
    """

    def __init__(self, app: ASGIApp, completions: Callable[[Request], Awaitable[Response]]) -> None:
        self._app = app
        self._completions = completions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != CHAT or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await self._completions(request)
        except tuple(EXPECTED) as error:
            response = await _expected(request, error)
        except Exception as error:
            await (await own_fault(request, error))(scope, receive, send)
            raise  # for the server's log, as Starlette does
        await response(scope, receive, send)


def _json(value: Any, status: int, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, "application/json")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _json(error.body, error.status, error.headers)


async def _http_error(_: Request, error: Exception) -> Response:
    """Starlette's own: no such path, wrong method."""
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, f"{error.detail}; see /docs for what there is").body
    return _json(body, error.status_code, error.headers)


async def _client_gone(_: Request, __: Exception) -> Response:
    """It hung up while it was sending or waiting; nobody reads this."""
    return Response(status_code=CLIENT_GONE)


async def own_fault(_: Request, error: Exception) -> Response:
    """What is told of an error that nobody foresaw."""
    logger.error("a request failed: %r", error)
    body = ApiError(500, "an error of the server; it is in its log", kind="server_error").body
    return _json(body, 500)


Handler = Callable[[Request, Exception], Awaitable[Response]]
EXPECTED: dict[type[Exception], Handler] = {
    ApiError: _api_error,
    HTTPException: _http_error,
    ClientDisconnect: _client_gone,
    Left: _client_gone,
}
"""How each error that a request may end with is answered."""


async def _expected(request: Request, error: Exception) -> Response:
    handler = next(EXPECTED[kind] for kind in type(error).__mro__ if kind in EXPECTED)
    return await handler(request, error)
