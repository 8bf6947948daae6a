"""Ollama's API: the hybrid as if it were an Ollama whose models are the tasks."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.api.chat import Chat
from serve.api.checks import parsed
from serve.api.ollama_words import (
    Asked,
    Ids,
    calls_of,
    done_reason,
    from_chat,
    from_generate,
    task_of,
    text_of,
)
from serve.api.replies import EventStream
from serve.errors import ApiError, unknown_model
from serve.guard.keys import Caller
from serve.tasks import LATEST, Served, Tasks
from serve.wire.chunks import Collector
from serve.wire.sse import dumps

SPOKEN = "0.33.0"
"""The Ollama whose API this is; clients ask for it to know what they may use."""
FAMILY = "homestill"
NEVER = "0001-01-01T00:00:00Z"
"""When a model that is not unloaded expires."""
NS = 1_000_000_000
ELSEWHERE = {
    "/api/pull": "models come as releases; run the task with homestill to make one",
    "/api/push": "releases are folders; copy the folder to where it is needed",
    "/api/create": "models come as releases; run the task with homestill to make one",
    "/api/copy": "a task has one name; write another task to have another",
    "/api/delete": "releases are folders; remove the task's `current` file to stop serving it",
    "/api/embed": "embeddings are at /v1/embeddings",
    "/api/embeddings": "embeddings are at /v1/embeddings",
    "/api/blobs/{digest}": "models come as releases; run the task with homestill to make one",
}
"""What Ollama offers and this does not."""
Handler = Callable[[Request], Awaitable[Response]]


class Shape(Protocol):
    """How one of the two endpoints writes an answer, or a piece of one."""

    def __call__(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]: ...


class OllamaApi:
    """Ollama's endpoints, as translations around `Chat.ask`.

    Args:
        chat: answers.
        tasks: what is listed.
        version: of this software.
        clock: nanoseconds, monotonic.
        now: the present moment.
    """

    def __init__(
        self,
        chat: Chat,
        tasks: Tasks,
        version: str,
        *,
        clock: Callable[[], int] = time.perf_counter_ns,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._chat = chat
        self._tasks = tasks
        self._version = version
        self._clock = clock
        self._now = now
        self._ids = Ids()

    def routes(self) -> list[Route]:
        offered: list[tuple[str, Handler, str]] = [
            ("/api/chat", self.chat, "POST"),
            ("/api/generate", self.generate, "POST"),
            ("/api/show", self.show, "POST"),
            ("/api/tags", self.tags, "GET"),
            ("/api/ps", self.ps, "GET"),
            ("/api/version", self.version, "GET"),
        ]
        here = [Route(path, _in_its_words(handler), methods=[method]) for path, handler, method in offered]
        every = ["GET", "POST", "PUT", "DELETE"]
        return here + [Route(path, _in_its_words(self.elsewhere), methods=every) for path in ELSEWHERE]

    async def chat(self, request: Request) -> Response:
        """POST /api/chat."""
        body = parsed(await self._chat.body(request))
        return await self._answer(request, body, from_chat(body, self._ids), _as_message)

    async def generate(self, request: Request) -> Response:
        """POST /api/generate."""
        body = parsed(await self._chat.body(request))
        return await self._answer(request, body, from_generate(body), _as_response)

    async def tags(self, request: Request) -> Response:
        """GET /api/tags: the tasks that have a release and that this key is for."""
        caller = self._chat.door.caller(request)
        return _json({"models": [self._listed(name) for name in self._names(caller)]})

    async def ps(self, request: Request) -> Response:
        """GET /api/ps: the tasks whose local model runs."""
        caller = self._chat.door.caller(request)
        running = [name for name in self._names(caller) if self._tasks.served[name].local]
        return _json({"models": [self._running(name) for name in running]})

    async def show(self, request: Request) -> Response:
        """POST /api/show."""
        body = parsed(await self._chat.body(request))
        name = body.get("model") or body.get("name")
        if not isinstance(name, str):
            raise ApiError(400, "model is missing or no text; name a task", param="model")
        return _json(_shown(self._served(request, name)))

    async def version(self, _: Request) -> Response:
        """GET /api/version, open to all: it tells nothing but what is spoken here."""
        return _json({"version": f"{SPOKEN}-homestill.{self._version}"})

    async def elsewhere(self, request: Request) -> Response:
        """What is not offered."""
        self._chat.door.caller(request)
        path = request.scope["path"]
        why = ELSEWHERE.get(path) or ELSEWHERE["/api/blobs/{digest}"]
        raise ApiError(501, f"{path} is not offered here: {why}")

    async def _answer(
        self, request: Request, body: Mapping[str, Any], asked: Asked, shape: Shape
    ) -> Response:
        if not asked.body["messages"]:
            return self._loaded(request, body, asked, shape)
        writing = _Writing(asked, shape, self._clock, self._now, self._ids)
        reply = await self._chat.ask(request, asked.body, endpoint="ollama")
        if reply.events is not None:
            return _Lines(writing.lines(reply.events), reply.headers)
        return _json(writing.whole(reply.answer or {}), reply.headers)

    def _loaded(self, request: Request, body: Mapping[str, Any], asked: Asked, shape: Shape) -> Response:
        """The answer to no question: the model is there, and stays."""
        self._served(request, asked.name)
        reason = "unload" if body.get("keep_alive") in (0, "0", "0s", "0m") else "load"
        done = {"done": True, "done_reason": reason}
        return _json({"model": asked.name, "created_at": _stamp(self._now()), **shape("", []), **done})

    def _served(self, request: Request, name: str) -> Served:
        task = task_of(name)
        self._chat.door.check_task(caller := self._chat.door.caller(request), task)
        if task not in self._tasks.served:
            raise unknown_model(name, self._names(caller))
        return self._tasks.served[task]

    def _names(self, caller: Caller) -> list[str]:
        return [name for name in sorted(self._tasks.served) if caller.tasks is None or name in caller.tasks]

    def _listed(self, name: str) -> dict[str, Any]:
        served = self._tasks.served[name]
        return {
            "name": f"{name}{LATEST}",
            "model": f"{name}{LATEST}",
            "modified_at": _made(served),
            "size": _size(served),
            "digest": served.release.manifest.model.sha256,
            "details": _details(served),
            "capabilities": _capabilities(served),
        }

    def _running(self, name: str) -> dict[str, Any]:
        known = self._listed(name) | {"expires_at": NEVER, "size_vram": 0}
        return known | {"context_length": self._tasks.served[name].release.router.sampling.context}


@dataclass
class _Writing:
    """One answer in Ollama's words."""

    asked: Asked
    shape: Shape
    clock: Callable[[], int]
    now: Callable[[], datetime]
    ids: Ids
    began: int = field(init=False)
    first: int | None = None

    def __post_init__(self) -> None:
        self.began = self.clock()

    def whole(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        choice = answer["choices"][0]
        message = choice["message"]
        found = (choice.get("logprobs") or {}).get("content")
        told = self._piece(self.shape(text_of(message), self._calls(message)), found)
        return told | self._end(choice.get("finish_reason"), answer)

    async def lines(self, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        """A stream's lines. Signs of life are pieces without text: a client reads every line as JSON."""
        collector = Collector()
        homestill: dict[str, Any] = {}
        async with aclosing(events) as stream:
            async for data in stream:
                if not data:
                    yield dumps(self._piece(self.shape("", [])) | {"done": False})
                    continue
                chunk = orjson.loads(data)
                if chunk.get("error"):
                    yield dumps({"error": chunk["error"].get("message"), "homestill": chunk.get("homestill")})
                    return
                collector.add(data)
                homestill = chunk.get("homestill") or homestill
                for line in self._pieces(chunk):
                    yield dumps(line)
        for line in self._ending(collector, homestill):
            yield dumps(line)

    def _pieces(self, chunk: Mapping[str, Any]) -> list[dict[str, Any]]:
        lines = []
        for choice in chunk["choices"]:
            text = text_of(choice.get("delta") or {})
            found = (choice.get("logprobs") or {}).get("content")
            if text or found:
                self.first = self.first or self.clock()
                lines.append(self._piece(self.shape(text, []), found) | {"done": False})
        return lines

    def _ending(self, collector: Collector, homestill: dict[str, Any]) -> list[dict[str, Any]]:
        """Tool calls go out when their arguments are complete, which is now."""
        try:
            calls = self._calls(collector.message())
        except ApiError as error:
            return [{"error": str(error)}]
        lines = [self._piece(self.shape("", calls)) | {"done": False}] if calls else []
        answer = {"usage": collector.usage, "model": collector.model, "homestill": homestill}
        end = self._end(collector.finish_reason, answer)
        return [*lines, self._piece(self.shape("", [])) | end]

    def _calls(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        calls = calls_of(message)
        self.ids.keep(self.asked.body["messages"][-1], calls)
        return calls

    def _piece(self, said: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
        known = {"model": self.asked.name, "created_at": _stamp(self.now()), **said}
        return known | ({"logprobs": logprobs} if logprobs else {})

    def _end(self, finish_reason: str | None, answer: Mapping[str, Any]) -> dict[str, Any]:
        ended, usage = self.clock(), answer.get("usage") or {}
        first = self.first or self.began
        homestill = {**(answer.get("homestill") or {}), "model": answer.get("model")}
        if self.asked.ignored:
            homestill["ignored"] = self.asked.ignored
        return {
            "done": True,
            "done_reason": done_reason(finish_reason),
            "total_duration": ended - self.began,
            "load_duration": 0,
            "prompt_eval_count": usage.get("prompt_tokens") or 0,
            "prompt_eval_duration": first - self.began,
            "eval_count": usage.get("completion_tokens") or 0,
            "eval_duration": ended - first,
            "homestill": homestill,
        }


class _Lines(EventStream):
    """A JSON object a line."""

    media_type = "application/x-ndjson"

    def written(self, event: bytes) -> bytes:
        return event + b"\n"

    def ending(self) -> bytes:
        return b""


def _as_message(text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    said = {"role": "assistant", "content": text}
    return {"message": said | ({"tool_calls": calls} if calls else {})}


def _as_response(text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"response": text} | ({"tool_calls": calls} if calls else {})


def _in_its_words(handler: Handler) -> Handler:
    """The same with Ollama's errors: one text."""

    async def handled(request: Request) -> Response:
        try:
            return await handler(request)
        except ApiError as error:
            found = error.body.get("error")
            told = found.get("message") if isinstance(found, Mapping) else found
            return _json({"error": told or str(error)}, error.headers, error.status)

    return handled


def _shown(served: Served) -> dict[str, Any]:
    release = served.release
    manifest, router = release.manifest, release.router
    sampling = router.sampling
    parameters = {
        "temperature": sampling.temperature,
        "num_predict": sampling.max_tokens,
        "num_ctx": sampling.context,
    }
    return {
        "modelfile": f"FROM {manifest.model.ollama or manifest.version}",
        "template": "{{ .Prompt }}",
        "parameters": "\n".join(f"{name:<30} {value}" for name, value in parameters.items()),
        "details": _details(served),
        "model_info": {
            "general.architecture": FAMILY,
            "general.basename": manifest.base.name,
            f"{FAMILY}.context_length": sampling.context,
            f"{FAMILY}.release": manifest.version,
            f"{FAMILY}.threshold": router.threshold,
            f"{FAMILY}.guarantee": served.guarantee,
        },
        "capabilities": _capabilities(served),
        "modified_at": _made(served),
    }


def _details(served: Served) -> dict[str, Any]:
    manifest = served.release.manifest
    return {
        "parent_model": manifest.base.name,
        "format": "gguf",
        "family": FAMILY,
        "families": [FAMILY],
        "parameter_size": "",
        "quantization_level": manifest.model.quantization.upper(),
        "context_length": served.release.router.sampling.context,
    }


def _capabilities(served: Served) -> list[str]:
    """Tools are the teacher's to call."""
    return ["completion", "tools"] if served.teacher else ["completion"]


def _size(served: Served) -> int:
    with suppress(FileNotFoundError):  # a release may be removed while it is in use
        return served.release.model.stat().st_size
    return 0


def _made(served: Served) -> str:
    """A release's version begins with its moment."""
    moment = datetime.strptime(served.release.version[:16], "%Y%m%dT%H%M%SZ")
    return _stamp(moment.replace(tzinfo=UTC))


def _stamp(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _json(value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    return Response(dumps(value), status, dict(headers or {}), "application/json")
