"""How the endpoint listens: uvicorn on uvloop and httptools, with an end to clients that never finish asking.

uvicorn gives up on idle connections only between requests. A client that sends its request a byte a
minute would hold its connection for ever; a few thousand of those, and nobody else gets in.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.config import Limits
from serve.wire.sse import dumps

GRACE_S = 30
LONGEST_HEAD = 64 * 1024
SLOWEST_BODY = 1024
"""Bytes a second. A body that comes faster may take longer than its head ..."""
BODY_TURNS = 12
"""... by this factor: 2 minutes, where a head has 10 seconds."""


def configuration(app: Any, host: str, port: int, limits: Limits) -> uvicorn.Config:
    """For one worker on one address."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="uvloop",
        http=protocol(limits),
        ws="none",
        access_log=False,
        proxy_headers=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=max(1, round(limits.idle_s)),
        timeout_graceful_shutdown=GRACE_S,
    )


def protocol(limits: Limits) -> type[asyncio.Protocol]:
    """The protocol with these limits; uvicorn makes its instances itself, so they stand in the class."""
    return type("Hurrying", (Hurrying,), {"header_s": limits.header_s})


class Hurrying(HttpToolsProtocol):
    """uvicorn's HTTP protocol with a clock, which starts with a connection or a request's first byte and stops with
    its last. A head has `header_s` to come, and its body as long again and again while it comes at
    `SLOWEST_BODY`, at most `BODY_TURNS` times.
    """

    header_s: float

    _deadline: asyncio.TimerHandle | None = None
    _head: int | None = None
    """Bytes of the head so far; None while a body is read or nothing is."""
    _turns = 0
    _body = 0
    """Bytes of the body in this turn."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._body += len(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > LONGEST_HEAD:
                self._refuse(431, "Request Header Fields Too Large", f"over {LONGEST_HEAD} bytes of headers")
        elif self._deadline is None and not self._answering():
            self._start()  # empty lines, which stop uvicorn's own clock and begin no request

    def on_headers_complete(self) -> None:
        self._head = None
        self._body = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _start(self) -> None:
        self._head, self._turns = 0, BODY_TURNS
        self._wait()

    def _wait(self) -> None:
        self._stop()
        self._body = 0
        self._deadline = self.loop.call_later(self.header_s, self._late)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _late(self) -> None:
        self._turns -= 1
        comes = self._head is None and self._body >= SLOWEST_BODY * self.header_s
        before = bool(self.pipeline) or (self._head is not None and self._answering())
        if before or (comes and self._turns > 0):  # the request before is answered first
            self._wait()
        elif self._head is None:  # once the head is there, what is written is the app's
            self._close()
        else:
            self._refuse(408, "Request Timeout", f"the request did not come within {self.header_s:g} s")

    def _refuse(self, status: int, phrase: str, message: str) -> None:
        if not (self._answering() or self.transport.is_closing()):
            body = dumps({"error": {"message": message, "type": "invalid_request_error"}})
            head = (
                f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
                f"content-length: {len(body)}\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self._close()

    def _close(self) -> None:
        self._stop()
        self.transport.close()
