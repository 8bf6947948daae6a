"""A real server on a free port, and models that say what a test tells them."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.app import create_app
from serve.records.journal import Entry, Journal
from serve.settings import Settings
from serve.upstreams.dialects import ANY_SERVER, Dialect
from serve.upstreams.local import ServerLocal
from serve.upstreams.teacher import Teachers
from serve.upstreams.upstream import connect
from tests.serve.release_support import PREFIX, SUFFIX, SYSTEM

SURE, UNSURE = -0.001, -1.5
"""Log-probabilities of the local answer's tokens: above and below the threshold."""
TEACHER_USAGE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}


@contextmanager
def running(app: Any, *, daemon: bool = False) -> Iterator[str]:
    """Serve an ASGI app in a thread; gives its address."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # or answers wait 40 ms
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, ws="none", access_log=False, timeout_graceful_shutdown=5)
    )
    started = threading.Event()
    original = server.startup

    async def startup(sockets: list[socket.socket] | None = None) -> None:
        await original(sockets)
        started.set()

    server.startup = startup  # type: ignore[method-assign]  # uvicorn has no hook for "it listens now"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=daemon)
    thread.start()
    try:
        assert started.wait(30)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@dataclass
class Model:
    """An OpenAI-compatible server with one model. `behave` answers; `asked` is what it was asked."""

    behave: Callable[[Model, dict[str, Any]], Response]
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)
    began: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


class Lab:
    """One server for all models of the tests, each below a path of its own: starting one takes time."""

    def __init__(self) -> None:
        self._models: list[Model] = []
        routes = [Route("/{number:int}/v1/chat/completions", self._chat, methods=["POST"])]
        self._running = running(Starlette(routes=routes), daemon=True)
        self._url = self._running.__enter__()

    def address(self, model: Model) -> str:
        """Where the model answers from now on."""
        self._models.append(model)
        return f"{self._url}/{len(self._models) - 1}"

    async def _chat(self, request: Request) -> Response:
        model = self._models[request.path_params["number"]]
        body = await request.json()
        model.asked.append(body)
        model.headers.append(dict(request.headers))
        response: Response = model.behave(model, body)
        if isinstance(response, Stall):
            await response.wait(request)
        return response


@functools.cache
def lab() -> Lab:
    """Started by the first test that needs it; ends with the process."""
    return Lab()


class Stall(Response):
    """Never answers; notices when the asker hangs up."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    async def wait(self, request: Request) -> None:
        self.model.began.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.model.hung_up.set()


def local_text(label: str = "billing") -> str:
    return f"[[ ## label ## ]]\n{label}\n\n[[ ## completed ## ]]"


def completion(model: str, text: str, usage: Any = None, logprob: float | None = None) -> dict[str, Any]:
    tokens = [
        {"token": piece, "logprob": logprob, "top_logprobs": [{"token": piece, "logprob": logprob}]}
        for piece in (text[:17], text[17:])
    ]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
                "logprobs": {"content": tokens} if logprob is not None else None,
            }
        ],
        "usage": usage or {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }


def local_model(logprob: float = SURE, text: str | None = None) -> Model:
    """A local model of this certainty, whole or as a stream."""

    def behave(_: Model, body: dict[str, Any]) -> Response:
        answer = completion(body["model"], text or local_text(), None, logprob)
        return streamed(as_chunks(answer)) if body.get("stream") else JSONResponse(answer)

    return Model(behave)


def as_chunks(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """A whole answer as the stream of a local runtime: one token at a time, then the counts."""
    name, choice = answer["model"], answer["choices"][0]
    chunks = [chunk(name, {"role": "assistant", "content": ""})]
    for token in (choice["logprobs"] or {"content": []})["content"]:
        piece = chunk(name, {"content": token["token"]})
        piece["choices"][0]["logprobs"] = {"content": [token]}
        chunks.append(piece)
    chunks.append(chunk(name, {}, choice["finish_reason"]))
    return [*chunks, {**chunk(name, {}), "choices": [], "usage": answer["usage"]}]


TEACHER_PIECES = ["Hel", "lo ", "wörld"]


def teacher_model() -> Model:
    """A teacher that answers whole or streams, with usage where it is asked for."""

    def behave(_: Model, body: dict[str, Any]) -> Response:
        name = f"{body['model']}-2026"
        if not body.get("stream"):
            return JSONResponse(completion(name, "".join(TEACHER_PIECES), TEACHER_USAGE))
        chunks = [chunk(name, {"role": "assistant", "content": ""})]
        chunks += [chunk(name, {"content": piece}) for piece in TEACHER_PIECES]
        chunks.append(chunk(name, {}, "stop"))
        if (body.get("stream_options") or {}).get("include_usage"):
            chunks.append({**chunk(name, {}), "choices": [], "usage": TEACHER_USAGE})
        return streamed(chunks)

    return Model(behave)


def chunk(model: str, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [choice]}


def streamed(chunks: list[dict[str, Any]], *, done: bool = True) -> Response:
    async def events() -> AsyncIterator[bytes]:
        for each in chunks:
            yield f"data: {json.dumps(each)}\n\n".encode()
        if done:
            yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def held_stream(chunks: list[dict[str, Any]]) -> Callable[[Model, dict[str, Any]], Response]:
    """Streams the chunks, then says nothing more until `go_on`, and then ends; notices a hang-up."""

    def behave(model: Model, _: dict[str, Any]) -> Response:
        async def events() -> AsyncIterator[bytes]:
            for each in chunks:
                yield f"data: {json.dumps(each)}\n\n".encode()
            model.began.set()
            try:
                while not model.go_on.is_set():
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                model.hung_up.set()
                raise
            yield f"data: {json.dumps(chunk('m', {}, 'stop'))}\n\n".encode()
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return behave


def status(code: int, message: str = "no", headers: dict[str, str] | None = None) -> Model:
    """Always this error."""
    error = {"error": {"message": message, "type": "some_error", "param": None, "code": "some_code"}}
    return Model(lambda *_: JSONResponse(error, code, headers))


def question(text: str = "My invoice is wrong", **more: Any) -> dict[str, Any]:
    """A request that the release was made for."""
    return {
        "model": "tickets",
        "messages": [SYSTEM, {"role": "user", "content": f"{PREFIX}{text}{SUFFIX}"}],
        **more,
    }


@dataclass
class Hybrid:
    """A running endpoint with its two models."""

    url: str
    client: httpx.Client
    journal: Journal
    journal_url: str

    def ask(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=body, headers=headers)

    def until_entries(self, count: int) -> None:
        """Wait until so many requests are in the journal."""
        deadline = time.monotonic() + 20
        while len(self.entries()) < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def entries(self) -> list[Entry]:
        """What was journaled, everything written."""
        assert self.journal.flush(10)
        return [entry for _, entry in self.journal.entries()]


@contextmanager
def hybrid(
    home: Path,
    local: Model | str | None,
    teacher: Model | str | None,
    settings: Settings | None = None,
    dialect: Dialect = ANY_SERVER,
) -> Iterator[Hybrid]:
    """The endpoint over these models; a text is the address of one, None a port where nobody listens."""
    with _address(local) as local_url, _address(teacher) as teacher_url:
        base = settings or Settings(home)
        chosen = replace(
            base, local=f"{local_url}/v1", teacher_api_base=f"{teacher_url}/v1", teacher_key="sk-teacher"
        )
        journal = Journal(chosen.journal_url)
        runtime = ServerLocal(
            connect(proxies=False), chosen.local, dialect=dialect, rules=chosen.config.local
        )
        teachers = None if chosen.offline else Teachers(chosen, connect(proxies=False))
        app = create_app(chosen, runtime, teachers, journal, poll_s=0.02)
        try:
            with running(app) as url, httpx.Client(base_url=url, timeout=30) as client:
                yield Hybrid(url, client, journal, chosen.journal_url)
        finally:
            journal.close()


def journaled(served: Hybrid) -> list[Entry]:
    """What is in the journal after the endpoint has ended."""
    journal = Journal(served.journal_url)
    try:
        return [entry for _, entry in journal.entries()]
    finally:
        journal.close()


@contextmanager
def _address(model: Model | str | None) -> Iterator[str]:
    if isinstance(model, Model):
        yield lab().address(model)
    elif model:
        yield model
    else:
        with closed_port() as url:
            yield url


@contextmanager
def closed_port() -> Iterator[str]:
    """An address that refuses connections."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}"


def told(response: httpx.Response) -> dict[str, str]:
    """The decision's headers, by short name."""
    start = "x-homestill-"
    return {name[len(start) :]: value for name, value in response.headers.items() if name.startswith(start)}


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream's events, read as JSON where they are."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def hang_up_after(url: str, body: dict[str, Any], began: threading.Event) -> None:
    """Ask, wait until somebody works on the question, and close the connection."""
    asked = httpx.Request("POST", f"{url}/v1/chat/completions", json=body)
    with socket.create_connection((asked.url.host, asked.url.port or 0)) as connection:
        head = f"POST {asked.url.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(asked.content)}\r\n\r\n"
        connection.sendall(head.encode() + asked.content)
        assert began.wait(10)
