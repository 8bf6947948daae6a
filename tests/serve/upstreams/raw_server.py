"""A server that speaks bytes: every request is answered by the next behaviour of a list, the last one again and
again. It can do what no web framework would: hang up, stall, cut an answer off, speak no HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

Behaviour = Callable[["RawServer", asyncio.StreamWriter], Awaitable[None]]


class RawServer:
    """What it was asked, and over how many connections."""

    def __init__(self, *behaviours: Behaviour) -> None:
        self._behaviours = behaviours
        self._tasks: list[asyncio.Task[None]] = []
        self.url = ""
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.heads: list[str] = []
        self.connections = 0
        self.began = asyncio.Event()
        """A request is being answered."""
        self.go_on = asyncio.Event()
        """Set by a test: what `held` waits for."""
        self.hung_up = asyncio.Event()
        """A client closed its connection before it had its answer."""

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._tasks.append(asyncio.create_task(self._serve(reader, writer)))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        early = b""
        try:
            while not writer.is_closing():
                await self._read(reader, early)
                early = await self._answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, early: bytes) -> None:
        head = (early + await reader.readuntil(b"\r\n\r\n")).decode()
        lengths = [line for line in head.lower().split("\r\n") if line.startswith("content-length:")]
        self.heads.append(head)
        self.paths.append(head.split(" ")[1])
        self.asked.append(json.loads(await reader.readexactly(int(lengths[0].partition(":")[2]))))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """Answer while the client stays; what it has sent of its next request already."""
        behaviour = self._behaviours[min(len(self.asked), len(self._behaviours)) - 1]
        answering = asyncio.ensure_future(behaviour(self, writer))
        watching = asyncio.create_task(reader.read(1))
        self.began.set()
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self.hung_up.set()
                writer.close()
        finally:
            answering.cancel()
            watching.cancel()
        _, early = await asyncio.gather(answering, watching, return_exceptions=True)
        return early if isinstance(early, bytes) else b""


@asynccontextmanager
async def serving(*behaviours: Behaviour) -> AsyncIterator[RawServer]:
    """A server on a free port, which ends with the block."""
    server = RawServer(*behaviours)
    # asyncio sends small answers at once only on sockets that say TCP; without it each waits 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    async with await asyncio.start_server(server.accept, sock=listener):
        try:
            yield server
        finally:
            await server.close()


@contextmanager
def closed_port() -> Iterator[str]:
    """An address that refuses connections."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}/v1"


def head(status: str, content_type: str, length: int | None, more: str = "") -> bytes:
    """Of an answer; without a length it comes in chunks."""
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n{framing}\r\n{more}\r\n".encode()


def raw(data: bytes, *, hang_up: bool = False) -> Behaviour:
    """These bytes, then maybe the end of the connection."""

    async def behave(_: RawServer, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if hang_up:
            writer.close()

    return behave


def reset(_: RawServer, writer: asyncio.StreamWriter) -> Awaitable[None]:
    """The connection is torn down without a word."""
    linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    return asyncio.sleep(0)


def answered(status: str, body: bytes, content_type: str = "application/json", more: str = "") -> Behaviour:
    """A whole answer."""
    return raw(head(status, content_type, len(body), more) + body)


def held(sent: bytes = b"", rest: bytes = b"") -> Behaviour:
    """Sends this, and no more until `go_on`; then the rest, and hangs up."""

    async def behave(server: RawServer, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await server.go_on.wait()
        writer.write(rest)
        await writer.drain()
        writer.close()

    return behave


def status(code: int, message: str = "no", more: str = "") -> Behaviour:
    """An error in OpenAI's shape."""
    error = {"error": {"message": message, "type": "some_error", "param": None, "code": "some_code"}}
    return answered(f"{code} Whatever", json.dumps(error).encode(), more=more)


def completion(text: str = "Hello", reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **message},
        "finish_reason": reason,
    }
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    return {"id": "c", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}


def whole(answer: Any = None) -> Behaviour:
    """An answer as JSON."""
    return answered("200 OK", json.dumps(completion() if answer is None else answer).encode())


def chunk(text: str | None = None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": [choice], **more}


USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}
CHUNKS = [chunk("Hel"), chunk("lo"), chunk(None, "stop"), {**chunk(), **USAGE}]


def sse(*events: Any) -> bytes:
    """Events: objects, texts as they are, and comments, which begin with a colon."""
    texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
    lines = [text if text.startswith(":") else f"data: {text}" for text in texts]
    return "".join(f"{line}\n\n" for line in lines).encode()


def in_chunks(data: bytes, *, last: bool) -> bytes:
    """A body in HTTP's chunked coding. `last`: with its end."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n" + (b"0\r\n\r\n" if last else b"")


def begun(*events: Any) -> bytes:
    """The head of a stream and its first events."""
    return head("200 OK", "text/event-stream; charset=utf-8", None) + in_chunks(sse(*events), last=False)


def streamed(*events: Any, done: bool = True) -> Behaviour:
    """A whole stream; CHUNKS where none are given."""
    body = sse(*(events or CHUNKS), *(["[DONE]"] if done else []))
    return raw(head("200 OK", "text/event-stream", None) + in_chunks(body, last=True))
