"""How much is asked of a local model at once: so many at work, so many in line, and no more."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from serve.errors import UpstreamBusy

SMOOTHING = 0.2
"""Weight of the newest request in the mean duration."""


class Gate:
    """First come, first served.

    Args:
        concurrency: requests at work.
        queue: requests that may wait.
        clock: seconds, monotonic.
    """

    def __init__(self, concurrency: int, queue: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._concurrency = concurrency
        self._queue = queue
        self._clock = clock
        self._places = asyncio.Semaphore(concurrency)
        self._mean_s = 0.0
        self.active = 0
        self.waiting = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place and hold it.

        Raises:
            UpstreamBusy: as many wait already as may.
        """
        if self._places.locked() and self.waiting >= self._queue:
            raise self._busy()
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.active += 1
        began = self._clock()
        try:
            yield
        finally:
            self.active -= 1
            self._places.release()
            took = self._clock() - began
            self._mean_s += SMOOTHING * (took - self._mean_s) if self._mean_s else took

    def _busy(self) -> UpstreamBusy:
        wait_s = max(1, math.ceil(self._mean_s * (self.waiting + 1) / self._concurrency))
        return UpstreamBusy(
            "local",
            f"local: {self.active} requests are at work and {self.waiting} wait, which is all that "
            "local.concurrency and local.queue in serve.yaml let in; raise them, or try again later",
            retry_after=str(wait_s),
        )
