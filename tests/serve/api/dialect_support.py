"""Dialects around a chat that answers what a test tells it, and keeps what it was asked."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.api.chat import read
from serve.api.door import Door
from serve.api.replies import Reply
from serve.config import Config
from serve.errors import ApiError
from serve.guard.keys import Keys
from serve.wire.chunks import from_answer
from serve.wire.sse import dumps

HOMESTILL = {"route": "teacher", "reason": "no_release", "cost_usd": None}
LONGEST = 1 << 20


@dataclass
class FakeChat:
    """What `Chat` is to a dialect."""

    door: Door
    answer: dict[str, Any] | None = None
    events: Sequence[bytes] | None = None
    """Sent as they are, instead of the answer as a stream."""
    error: ApiError | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    endpoints: list[str] = field(default_factory=list)

    async def body(self, request: Request) -> bytes:
        self.door.caller(request)
        return await read(request, LONGEST)

    async def ask(self, request: Request, body: dict[str, Any], *, endpoint: str) -> Reply:
        self.asked.append(body)
        self.endpoints.append(endpoint)
        if self.error:
            raise self.error
        headers = {"x-request-id": "req_1", "x-homestill-route": "teacher"}
        assert self.answer is not None
        if body.get("stream"):
            whole = from_answer(self.answer, HOMESTILL, usage=bool(body.get("stream_options")))
            return Reply(headers, events=_sent(whole if self.events is None else self.events))
        return Reply(headers, answer={**self.answer, "homestill": HOMESTILL})


async def _sent(events: Any) -> AsyncGenerator[bytes]:
    for event in events:
        yield event


def chat(tmp_path: Any, *, keys: tuple[str, ...] = (), **known: Any) -> FakeChat:
    """A chat behind the real door."""
    return FakeChat(Door(Keys(keys, tmp_path / "keys.json"), Config()), **known)


def answer(message: dict[str, Any] | str, reason: str = "stop", **more: Any) -> dict[str, Any]:
    """A whole chat.completion."""
    said = {"content": message} if isinstance(message, str) else message
    choice = {"index": 0, "message": {"role": "assistant", **said}, "finish_reason": reason, **more}
    usage = {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}
    known = {"id": "c", "object": "chat.completion", "created": 1, "model": "gpt-4o-2026"}
    return {**known, "choices": [choice], "usage": usage}


LOGPROBS = {
    "content": [
        {"token": "Hel", "logprob": -0.1, "bytes": [72], "top_logprobs": [{"token": "Hel", "logprob": -0.1}]},
        {"token": "lo", "logprob": -0.2, "bytes": [108], "top_logprobs": [{"token": "lo", "logprob": -0.2}]},
    ]
}


@contextmanager
def client(routes: list[Route]) -> Iterator[httpx.AsyncClient]:
    """Asks the routes in process; streams come whole, so what is sent when is not seen here."""

    async def told(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return Response(dumps(error.body), error.status, error.headers, "application/json")

    app = Starlette(routes=routes, exception_handlers={ApiError: told})
    yield httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    """NDJSON."""
    return [json.loads(line) for line in response.text.splitlines()]


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events; comments are left out."""
    found = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [one if one == "[DONE]" else orjson.loads(one) for one in found]


def tasks(tmp_path: Any, *, local: Any = "runs", teacher: Any = "there") -> Any:
    """One task, `tickets`, with as much of a release as is listed."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"12345")
    manifest = SimpleNamespace(
        task="tickets",
        version="20261120T221500Z-1a2b3c4d",
        base=SimpleNamespace(name="unsloth/Llama-3.2-1B-Instruct"),
        model=SimpleNamespace(sha256="a" * 64, quantization="q4_k_m", ollama="tickets:1a2b3c4d"),
    )
    sampling = SimpleNamespace(temperature=0.0, max_tokens=64, context=512)
    release = SimpleNamespace(
        version=manifest.version,
        manifest=manifest,
        model=gguf,
        router=SimpleNamespace(sampling=sampling, threshold=0.8),
    )
    served = SimpleNamespace(
        release=release, local=local, teacher=teacher, guarantee="0.95@0.9", problem="it fell over"
    )
    return SimpleNamespace(served={"tickets": served}, problems={})
