"""Clients that never finish asking, over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.config import Limits
from serve.listen import LONGEST_HEAD, configuration

HURRY = Limits(header_s=0.3, idle_s=1)


async def echo(request: Request) -> Response:
    return Response(await request.body())


async def slow(_: Request) -> Response:
    await asyncio.sleep(0.8)  # longer than a request may take to come
    return Response("late")


@contextmanager
def listening(limits: Limits = HURRY) -> Iterator[int]:
    app = Starlette(routes=[Route("/", echo, methods=["POST"]), Route("/slow", slow)])
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = uvicorn.Server(configuration(app, "127.0.0.1", 0, limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with listening() as found:
        yield found


def said(port: int, *pieces: bytes) -> bytes:
    """Send, and read until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        for piece in pieces:
            client.sendall(piece)
        return rest(client)


POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


def test_half_a_head_and_half_a_body_are_not_waited_for(port: int) -> None:
    assert said(port).startswith(b"HTTP/1.1 408")
    assert said(port, b"POST / HTTP/1.1\r\nHo").startswith(b"HTTP/1.1 408")
    assert b"200 OK" not in said(port, POST, b"ab")


def bodied(length: int) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % length


def slowly(client: socket.socket, piece: bytes, times: int, pause: float = 0.1) -> None:
    """A slow client; nothing waits for it but the server."""
    for _ in range(times):
        client.sendall(piece)
        time.sleep(pause)


def rest(client: socket.socket) -> bytes:
    received = b""
    while data := client.recv(65536):
        received += data
    return received


def test_a_body_may_take_longer_than_a_head_while_it_comes() -> None:
    with (
        listening(Limits(header_s=0.8, idle_s=1)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as client,
    ):
        client.sendall(bodied(10 * 2000))
        slowly(client, b"z" * 2000, 10)  # 20 kB/s, for 1 s
        assert rest(client).endswith(b"z" * 20_000)


def test_a_body_that_trickles_is_not_waited_for(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client, pytest.raises(OSError):
        client.sendall(bodied(1000))
        slowly(client, b"z", 100)


def test_no_body_is_waited_for_without_an_end() -> None:
    limits = Limits(header_s=0.1, idle_s=1)
    with (
        listening(limits) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as client,
        pytest.raises(OSError),
    ):
        client.sendall(bodied(10**6))
        slowly(client, b"z" * 5000, 200, pause=0.02)  # 250 kB/s, for 4 s if it is let


def test_empty_lines_hold_no_connection(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(POST + b"abcd")
        received = b""
        while not received.endswith(b"abcd"):
            received += client.recv(65536)
        client.sendall(b"\r\n")
        assert rest(client).startswith(b"HTTP/1.1 408")


def test_a_head_without_an_end_is_refused(port: int) -> None:
    # a byte more than is let in: had the server more to read, its answer might be lost on the way
    head = b"POST / HTTP/1.1\r\nx: "
    received = said(port, head + b"y" * (LONGEST_HEAD + 1 - len(head)))
    assert received.startswith(b"HTTP/1.1 431")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_a_request_that_waits_for_the_one_before_spoils_nothing(port: int) -> None:
    received = said(port, b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n" + POST)
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert b"late" in received
    assert b"408" not in received


def test_a_whole_request_is_answered_and_its_connection_idles_no_longer_than_allowed(port: int) -> None:
    received = said(port, POST + b"abcd")
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert received.endswith(b"abcd")
    assert b"server:" not in received.lower()


def test_the_second_request_of_a_connection_is_hurried_too(port: int) -> None:
    received = said(port, POST + b"abcd", POST)
    assert received.count(b"200 OK") == 1


def test_a_slow_answer_is_nobodys_fault(port: int) -> None:
    assert said(port, b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n").endswith(b"late")
