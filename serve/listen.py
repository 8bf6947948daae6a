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

GRACE_S = 30
TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: 90\r\n\r\n"
    b'{"error":{"message":"the request came too slowly","type":"invalid_request_error"}}        '
)
LONGEST_HEAD = 64 * 1024


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
        log_config=None,
        server_header=False,
        timeout_keep_alive=max(1, round(limits.idle_s)),
        timeout_graceful_shutdown=GRACE_S,
    )


def protocol(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, for which a request has to be complete within `limits.header_s`."""

    class Hurrying(HttpToolsProtocol):
        """The clock starts with a connection or a request's first byte, and stops with its last."""

        _deadline: asyncio.TimerHandle | None = None
        _head: int | None = 0
        """Bytes of the head so far; None while a body is read or nothing is."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._stop()
            self._start()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._head is not None:
                self._head += len(data)
                if self._head > LONGEST_HEAD:
                    self._give_up()

        def on_headers_complete(self) -> None:
            self._head = None
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _start(self) -> None:
            self._head = 0
            self._deadline = self.loop.call_later(limits.header_s, self._give_up)

        def _stop(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._stop()
            if not self.transport.is_closing():
                if self._head is not None:  # once the head is there, what is written is the app's
                    self.transport.write(TOO_SLOW)
                self.transport.close()

    return Hurrying
