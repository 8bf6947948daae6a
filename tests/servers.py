"""Real HTTP servers on loopback for tests, and a pretend teacher to run on one."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Run an ASGI app on a free loopback port; gives its address without a trailing slash."""
    listening = socket.socket(
        socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )  # asyncio sets TCP_NODELAY on these
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listening.close()


class PretendTeacher:
    """An OpenAI-compatible app that answers tests.tasks' question rightly, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failures: list[int] = []
        """Statuses to answer with before it answers rightly again."""
        self.answer = "[[ ## label ## ]]\n{label}\n\n[[ ## completed ## ]]"
        self.hold: threading.Event | None = None
        """Where set, answers wait for it."""
        self.arrived = threading.Semaphore(0)
        self.app = Starlette(routes=[Route("/v1/chat/completions", self._chat, methods=["POST"])])

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        prompt = body["messages"][-1]["content"]
        self.asked.append(prompt)
        self.arrived.release()
        if self.failures:
            return JSONResponse(
                {"error": {"message": "not now", "type": "x"}}, self.failures.pop(0), {"retry-after": "0"}
            )
        if self.hold:
            await asyncio.to_thread(self.hold.wait)
        number = int(prompt.split("word number ")[1].split()[0])
        text = self.answer.format(label="odd" if number % 2 else "even")
        return JSONResponse(completion(body["model"], text))


def completion(model: str, text: str) -> dict[str, Any]:
    """A chat completion in OpenAI's shape, with made-up token counts."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-test",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
