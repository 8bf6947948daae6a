"""Requests are deleted when they are as old as serve.yaml lets them become."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from serve.errors import JournalError
from serve.records.journal import Journal
from serve.records.reading import Selection

EVERY_S = 3600.0
logger = logging.getLogger("serve")


def utc_now() -> datetime:
    return datetime.now(UTC)


class Retention:
    """Deletes at the start and every hour.

    Args:
        keep_days: age in days from which a request goes; None: none ever does.
        clock: with a time zone.
        sleep: seconds.
    """

    def __init__(
        self,
        journal: Journal,
        keep_days: float | None,
        clock: Callable[[], datetime] = utc_now,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._journal = journal
        self._keep_days = keep_days
        self._clock = clock
        self._sleep = sleep

    async def run(self) -> None:
        """Until cancelled; at once where all is kept. A deletion that fails is tried again in an hour."""
        while self._keep_days is not None:
            try:
                await asyncio.to_thread(self.once)
            except JournalError as error:
                logger.error("old requests are not deleted (%s); it is tried again in an hour", error)
            await self._sleep(EVERY_S)

    def once(self) -> int:
        """Delete what is too old now; the number of requests.

        Raises:
            JournalError: the journal cannot be written.
        """
        if self._keep_days is None:
            return 0
        count = self._journal.delete(Selection(before=self._clock() - timedelta(days=self._keep_days)))
        if count:
            logger.info("%d requests older than %g days are deleted from the journal", count, self._keep_days)
        return count
