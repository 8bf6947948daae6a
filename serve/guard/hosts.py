"""Whose browser may speak to this endpoint: the Host header against DNS rebinding, the Origin against other sites."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.errors import ApiError
from serve.wire.sse import dumps

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
ANY = "*"
MISDIRECTED, FORBIDDEN = 421, 403


class HostCheck:
    """Lets through what was sent to a name of ours, and not by another site's page. There is no CORS.

    Args:
        app: what is behind.
        hosts: names beside loopback's; `*` takes every name.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] = ()) -> None:
        self._app = app
        self._hosts = LOOPBACK | {_written(host.lower()) for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._fault(dict(scope["headers"])) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
            return
        body = dumps(error.body)
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": error.status, "headers": head})
        await send({"type": "http.response.body", "body": body})

    def _fault(self, headers: dict[bytes, bytes]) -> ApiError | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if ANY not in self._hosts and name_of(host) not in self._hosts:
            return ApiError(
                MISDIRECTED,
                f'the host "{host[:80]}" is none of ours; ask by a name that is, or add it to limits.hosts in serve.yaml',
                code="unknown_host",
            )
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host:
            return ApiError(
                FORBIDDEN,
                f'pages of "{origin[:80]}" may not ask this endpoint; ask it from a program, or from its own page',
                kind="permission_error",
                code="cross_origin",
            )
        return None


def name_of(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _written(host: str) -> str:
    """An address as the Host header writes it: IPv6 stands in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
