"""Work that ends when the client goes away: nobody pays for an answer that nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.types import Receive

T = TypeVar("T")


SOON_S = 0.02
"""An answer that comes within this is not worth looking whether its client is still there."""


class ClientGone(Exception):
    """The client hung up before its answer was complete."""


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Await `work`, and cancel it when the client hangs up. The request's body has been read already.

    Raises:
        ClientGone: it hung up; the work has ended.
    """
    watch = _Watch(receive)
    try:
        return await work
    except asyncio.CancelledError:
        if watch.gone:
            raise ClientGone from None
        raise
    finally:
        watch.stop()


class _Watch:
    """Cancels the task that it was made in when the client hangs up. An answer that comes soon costs no task."""

    def __init__(self, receive: Receive) -> None:
        task = asyncio.current_task()
        assert task is not None  # ASGI runs in one
        self.gone = False
        self._receive = receive
        self._working = task
        self._watching: asyncio.Task[None] | None = None
        self._soon = asyncio.get_running_loop().call_later(SOON_S, self._begin)

    def stop(self) -> None:
        self._soon.cancel()
        if self._watching:
            self._watching.cancel()
        if self.gone:
            self._working.uncancel()

    def _begin(self) -> None:
        self._watching = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._working.cancel()
