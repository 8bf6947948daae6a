"""Clients that never finish asking, over real sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.config import Limits
from serve.listen import configuration

HURRY = Limits(header_s=0.3, idle_s=1)


async def echo(request: Request) -> Response:
    return Response(await request.body())


async def slow(_: Request) -> Response:
    await asyncio.sleep(0.8)  # longer than a request may take to come
    return Response("late")


@contextmanager
def listening() -> Iterator[int]:
    app = Starlette(routes=[Route("/", echo, methods=["POST"]), Route("/slow", slow)])
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = uvicorn.Server(configuration(app, "127.0.0.1", 0, HURRY))
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
        received = b""
        while data := client.recv(65536):
            received += data
        return received


POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


def test_half_a_head_and_half_a_body_are_not_waited_for(port: int) -> None:
    assert said(port).startswith(b"HTTP/1.1 408")
    assert said(port, b"POST / HTTP/1.1\r\nHo").startswith(b"HTTP/1.1 408")
    assert b"200 OK" not in said(port, POST, b"ab")


def test_a_head_without_an_end_is_cut(port: int) -> None:
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"POST / HTTP/1.1\r\n")
        for number in range(10_000):
            client.sendall(b"x-%d: " % number + b"y" * 100 + b"\r\n")


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
