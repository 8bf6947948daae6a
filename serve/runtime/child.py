"""The embedded runtime's own process: one GGUF behind OpenAI's chat interface on a loopback port.

`serve.runtime.embedded` starts it with one JSON argument and holds the other end of its standard input: when
that closes, whatever killed the parent, this process ends itself. It answers one request at a time.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.errors import ApiError, EmbeddedError
from serve.runtime.generation import Generated, Generator, Sampling
from serve.wire.sse import DONE, dumps, emit

NOT_OFFERED = ("tools", "functions", "logit_bias", "presence_penalty", "frequency_penalty")
"""What this runtime would have to ignore; asked for with a value, it is an error instead."""


Heard = tuple[str, "dict[str, Any] | None"] | None
"""A piece of an answer and its token, or that there are no more."""


@dataclass(frozen=True)
class Config:
    """The JSON argument."""

    gguf: str
    alias: str
    context: int
    threads: int
    port: int
    adapter: str | None = None


def create_app(generator: Generator, alias: str) -> Starlette:
    """The runtime's interface: `/v1/models`, `/v1/chat/completions`, and `/extras/render`, which shows a prompt."""
    turn = asyncio.Lock()

    async def models(_: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [{"id": alias, "object": "model", "owned_by": "local"}]}
        )

    async def render(request: Request) -> Response:
        text, tokens = generator.render(messages_of(await _json(request)))
        return JSONResponse({"prompt": text, "tokens": tokens})

    async def chat(request: Request) -> Response:
        body = await _json(request)
        messages, sampling = messages_of(body), sampling_of(body)
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return await streamed(generator, messages, sampling, alias, usage=usage)
        async with turn:
            answer = await _generate(request, generator, messages, sampling)
        return JSONResponse(completion(answer, alias))

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status)

    routes = [
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/extras/render", render, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={ApiError: refuse})


async def _generate(
    request: Request, generator: Generator, messages: list[dict[str, str]], sampling: Sampling
) -> Generated:
    """Generate in a thread; a client that goes away stops the generation at the next token."""
    stop = threading.Event()
    work = asyncio.create_task(asyncio.to_thread(generator.answer, messages, sampling, stop.is_set))
    gone = asyncio.create_task(_disconnected(request))
    await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    gone.cancel()
    return await work


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON ({error})") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    return body


def messages_of(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The conversation as text, every content stripped.

    Raises:
        ApiError: it is missing, or a content is not text.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages is missing or empty; send a list of messages", param="messages")
    return [_message(message) for message in messages]


def _message(message: Any) -> dict[str, str]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise ApiError(400, "a message has no text; this model reads role and text only", param="messages")
    return {"role": message["role"], "content": content.strip()}


def sampling_of(body: Mapping[str, Any]) -> Sampling:
    """How to sample, from a chat request.

    Raises:
        ApiError: the request asks for something that this runtime does not do, or a value is wrong.
    """
    asked = [name for name in NOT_OFFERED if body.get(name)]
    if asked or body.get("n") not in (None, 1):
        raise ApiError(
            400, f"the embedded runtime does not offer {', '.join(asked) or 'n > 1'}; leave it out"
        )
    stop = body.get("stop") or ()
    schema = schema_of(body.get("response_format"))
    try:
        top_logprobs = int(body.get("top_logprobs") or 0)
        if not 0 <= top_logprobs <= 20:
            raise ValueError(f"top_logprobs is {top_logprobs}; use 0-20")
        longest = body.get("max_completion_tokens") or body.get("max_tokens")
        return Sampling(
            max_tokens=int(longest) if longest is not None else None,
            temperature=float(body["temperature"]) if body.get("temperature") is not None else 1.0,
            top_p=float(body["top_p"]) if body.get("top_p") is not None else 1.0,
            seed=int(body["seed"]) if body.get("seed") is not None else None,
            stop=(stop,) if isinstance(stop, str) else tuple(str(text) for text in stop),
            logprobs=bool(body.get("logprobs")),
            top_logprobs=top_logprobs,
            schema=schema,
        )
    except (TypeError, ValueError) as error:
        raise ApiError(400, f"a sampling parameter is wrong: {error}") from error


def schema_of(response_format: Any) -> str | None:
    """The JSON schema that a response_format asks for, as text.

    Raises:
        ApiError: it asks for something else.
    """
    kind = response_format.get("type") if isinstance(response_format, dict) else response_format
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return json.dumps({"type": "object"})
    schema = (response_format.get("json_schema") or {}).get("schema") if kind == "json_schema" else None
    if not isinstance(schema, dict):
        raise ApiError(
            400,
            f"response_format is {json.dumps(response_format)[:80]}; use text, json_object or json_schema with a schema",
            param="response_format",
        )
    return json.dumps(schema)


async def streamed(
    generator: Generator, messages: list[dict[str, str]], sampling: Sampling, alias: str, *, usage: bool
) -> Response:
    """The answer as server-sent events, one for each token. What is wrong with the request is found out before.

    Raises:
        ApiError: as `Generator.answer`.
    """
    loop, heard, stop = asyncio.get_running_loop(), asyncio.Queue[Heard](), threading.Event()

    def told(text: str, entry: dict[str, Any] | None) -> None:
        loop.call_soon_threadsafe(heard.put_nowait, (text, entry))

    work = asyncio.create_task(asyncio.to_thread(generator.answer, messages, sampling, stop.is_set, told))
    work.add_done_callback(lambda _: heard.put_nowait(None))
    first = await heard.get()
    if first is None and work.exception():
        work.result()

    async def events() -> AsyncIterator[bytes]:
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": alias}
        head["object"] = "chat.completion.chunk"
        piece = first
        try:
            yield _event(head, {"role": "assistant", "content": ""})
            while piece is not None:
                text, entry = piece
                yield _event(head, {"content": text}, logprobs={"content": [entry]} if entry else None)
                piece = await heard.get()
            answer = await work
            yield _event(head, {}, reason=answer.finish_reason)
            if usage:
                yield emit(dumps({**head, "choices": [], "usage": usage_of(answer)}))
            yield emit(DONE)
        finally:
            stop.set()  # the client may have left; the generator ends with its next token

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(
    head: Mapping[str, Any], delta: dict[str, Any], *, logprobs: Any = None, reason: str | None = None
) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    return emit(dumps({**head, "choices": [choice]}))


def usage_of(answer: Generated) -> dict[str, int]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def completion(answer: Generated, alias: str) -> dict[str, Any]:
    """OpenAI's chat.completion."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text},
        "logprobs": {"content": answer.tokens} if answer.tokens is not None else None,
        "finish_reason": answer.finish_reason,
    }
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": alias,
        "choices": [choice],
        "usage": usage_of(answer),
    }


def end_with_parent() -> None:
    """End this process when its standard input closes: the parent holds the other end, and nobody else."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def main(argument: str) -> None:
    """Load the model, then listen. The parent keeps the port reserved, so nobody else can take it meanwhile."""
    end_with_parent()
    config = Config(**json.loads(argument))
    try:
        adapter = Path(config.adapter) if config.adapter else None
        generator = Generator.load(Path(config.gguf), config.context, config.threads, adapter)
    except EmbeddedError as error:
        sys.exit(str(error))
    # asyncio sends small answers at once only on sockets that say TCP; without it each waits 40 ms for an ACK.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", config.port))
    server = uvicorn.Config(
        create_app(generator, config.alias),
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,  # longer than any client's pool keeps a connection: none is closed under a request
    )
    uvicorn.Server(server).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1])
