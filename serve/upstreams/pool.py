"""Several hosts with the same models, as if they were one server."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from serve.errors import UpstreamDown
from serve.upstreams.upstream import Server

T = TypeVar("T")


class _Host:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.active = 0
        self.last_turn = 0
        self.rests_until = 0.0


class Pool:
    """The least busy host answers, in turn where several are; one that fails rests, and the next one is asked.

    A host that rests is asked only when every other one has failed too.

    Args:
        servers: at least one.
        rest_s: seconds.
        clock: seconds, monotonic.
    """

    def __init__(
        self, servers: Sequence[Server], rest_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._hosts = [_Host(server) for server in servers]
        self._rest_s = rest_s
        self._clock = clock
        self._turn = 0

    @property
    def address(self) -> str:
        return ", ".join(host.server.address for host in self._hosts)

    @property
    def resting(self) -> list[str]:
        """Addresses of the hosts that are left alone now."""
        now = self._clock()
        return [host.server.address for host in self._hosts if host.rests_until > now]

    async def close(self) -> None:
        for host in self._hosts:
            await host.server.close()

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A whole answer.

        Raises:
            UpstreamDown: no host answers; the last one's error.
            UpstreamRefused.
        """
        return await self._ask(lambda server: server.chat(body))

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object with which `path` answers. Raises as `chat` does."""
        return await self._ask(lambda server: server.post(path, body))

    async def chat_stream(self, body: Mapping[str, Any]) -> AsyncGenerator[bytes]:
        """The data of each event. A host that fails before its first one is no failure if another answers.

        Raises:
            UpstreamDown, UpstreamRefused.
        """
        order = self._order()
        for host in order:
            began = False
            try:
                with self._working(host):
                    async with aclosing(host.server.chat_stream(body)) as events:
                        async for data in events:
                            began = True
                            yield data
                return
            except UpstreamDown:
                if began or host is order[-1]:
                    raise

    async def _ask(self, ask: Callable[[Server], Awaitable[T]]) -> T:
        *others, last = self._order()
        for host in others:
            try:
                with self._working(host):
                    return await ask(host.server)
            except UpstreamDown:
                continue
        with self._working(last):
            return await ask(last.server)

    def _order(self) -> list[_Host]:
        """In which to ask."""
        now = self._clock()
        return sorted(self._hosts, key=lambda host: (host.rests_until > now, host.active, host.last_turn))

    @contextmanager
    def _working(self, host: _Host) -> Iterator[None]:
        host.active += 1
        self._turn += 1
        host.last_turn = self._turn
        try:
            yield
        except UpstreamDown:
            host.rests_until = self._clock() + self._rest_s
            raise
        else:
            host.rests_until = 0.0
        finally:
            host.active -= 1
