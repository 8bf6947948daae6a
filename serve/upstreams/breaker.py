"""A circuit breaker: a server that keeps failing is left alone for a while, then tried by one request."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half_open"]


class Resting(Exception):
    """The server is left alone now.

    Args:
        wait_s: seconds after which it may be tried.
        problem: what its last failure was.
    """

    def __init__(self, wait_s: float, problem: str) -> None:
        self.wait_s = wait_s
        self.problem = problem
        super().__init__(problem)


class Breaker:
    """Opens after `failures` failed requests in a row; every `rest_s` seconds one request may probe.

    `admit` gives a ticket that the request's outcome is told with. Outcomes of requests that were let in
    before the breaker last changed are ignored: they say nothing about now.

    Args:
        failures: in a row, at least 1.
        rest_s: seconds.
        clock: seconds, monotonic.
    """

    def __init__(self, failures: int, rest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._rest_s = rest_s
        self._clock = clock
        self._failures = 0
        self._rests_until: float | None = None
        self._probing = False
        self._problem = ""
        self._ticket = 0

    @property
    def state(self) -> State:
        """`half_open`: a probe is under way, or the next request will be one."""
        if self._rests_until is None:
            return "closed"
        return "half_open" if self._probing or self._clock() >= self._rests_until else "open"

    def admit(self) -> int:
        """Let a request in.

        Raises:
            Resting: not now.
        """
        if self._rests_until is None:
            return self._ticket
        wait_s = self._rests_until - self._clock()
        if wait_s > 0 or self._probing:
            raise Resting(max(wait_s, 0.0), self._problem)
        self._probing = True
        self._ticket += 1
        return self._ticket

    def allows_retry(self, ticket: int) -> bool:
        """Whether a request that failed may try again: a probe may not, nor one from before the last change."""
        return ticket == self._ticket and not self._probing

    def alive(self, ticket: int) -> None:
        """The server has begun to answer; a probe has thus found out what it was to find out."""
        if self._probing:
            self.succeeded(ticket)

    def succeeded(self, ticket: int) -> None:
        if ticket == self._ticket:
            self._failures = 0
            if self._probing:
                self._change(rests_until=None)

    def failed(self, ticket: int, problem: str) -> None:
        if ticket != self._ticket:
            return
        self._failures += 1
        self._problem = problem
        if self._probing or self._failures >= self._limit:
            self._change(rests_until=self._clock() + self._rest_s)

    def gave_up(self, ticket: int) -> None:
        """The request was ended from our side; whether the server would have answered is not known."""
        if ticket == self._ticket and self._probing:
            self._probing = False
            self._ticket += 1

    def _change(self, rests_until: float | None) -> None:
        self._rests_until = rests_until
        self._probing = False
        self._ticket += 1
