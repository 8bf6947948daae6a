"""The asking side of the router's benchmark: one request after the other on each of N connections.

    python load.py PORT PATH BODY_FILE CONNECTIONS SECONDS [RATE]

With RATE (requests/s) requests start by the clock instead, on whichever connection is free, and a latency
counts from the moment when the request was due: a slow answer is not hidden by asking later. Prints JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from pathlib import Path

import uvloop

WARM_UP_S = 1.0
TICK_S = 0.001
"""Shortest sleep: one that spins takes the stub's core. What falls due meanwhile starts late, and is counted so."""


class Load:
    """What all connections share."""

    def __init__(self, request: bytes, rate: float | None) -> None:
        self.request = request
        self.rate = rate
        self.latencies: list[float] = []
        self.errors = 0
        self.begin = time.perf_counter() + WARM_UP_S
        self.due: deque[float] = deque()
        self.idle: deque[Connection] = deque()

    def done(self, connection: Connection, asked: float, status: bytes) -> None:
        now = time.perf_counter()
        if asked >= self.begin:
            self.latencies.append(now - asked)
            self.errors += status != b"200"
        if self.rate is None:
            connection.ask(now)
        elif self.due:
            connection.ask(self.due.popleft())
        else:
            self.idle.append(connection)

    async def by_the_clock(self, seconds: float) -> None:
        assert self.rate is not None
        due, end = time.perf_counter(), time.perf_counter() + WARM_UP_S + seconds
        while due < end:
            await asyncio.sleep(max(TICK_S, due - time.perf_counter()))
            while due <= time.perf_counter():
                if self.idle:
                    self.idle.popleft().ask(due)
                else:
                    self.due.append(due)
                due += 1 / self.rate


class Connection(asyncio.Protocol):
    """Knows answers with a content-length or in chunks."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._received = b""
        self._asked = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        if self._load.rate is None:
            self.ask(time.perf_counter())
        else:
            self._load.idle.append(self)

    def ask(self, due: float) -> None:
        self._asked, self._received = due, b""
        self._transport.write(self._load.request)  # type: ignore[attr-defined]  # a stream's transport writes

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
        complete = len(body) >= int(length) if length else body.endswith(b"0\r\n\r\n")
        if complete:
            self._load.done(self, self._asked, head[9:12])


async def main(
    where: tuple[int, str], body: bytes, connections: int, seconds: float, rate: float | None
) -> None:
    port, path = where
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    load = Load(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, rate)
    loop = asyncio.get_running_loop()
    for _ in range(connections):
        await loop.create_connection(lambda: Connection(load), "127.0.0.1", port)
    if rate is None:
        await asyncio.sleep(WARM_UP_S + seconds)
    else:
        await load.by_the_clock(seconds)
    found = sorted(load.latencies)
    at = {f"p{share}": found[min(len(found) - 1, len(found) * share // 100)] * 1000 for share in (50, 90, 99)}
    print(json.dumps({"requests_per_s": len(found) / seconds, "errors": load.errors, **at}))


if __name__ == "__main__":
    port, path, file, connections, seconds, *rate = sys.argv[1:]
    uvloop.run(
        main(
            (int(port), path),
            Path(file).read_bytes(),
            int(connections),
            float(seconds),
            float(rate[0]) if rate else None,
        )
    )
