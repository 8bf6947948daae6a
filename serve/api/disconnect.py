"""Work that ends when the client goes away: nobody pays for an answer that nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


SOON_S = 0.02
"""An answer that comes within this is not worth looking whether its client is still there."""


class ClientGone(Exception):
    """The client hung up before its answer was complete."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, and cancel it when the client hangs up. The request's body has been read already.

    Raises:
        ClientGone: it hung up; the work has ended.
    """
    working, leaving = asyncio.ensure_future(work), None
    try:
        await asyncio.wait({working}, timeout=SOON_S)
        if not working.done():
            leaving = asyncio.ensure_future(_disconnected(receive))
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        if leaving:
            leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait({working})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
