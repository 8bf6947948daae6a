#!/usr/bin/env python
"""An OpenAI-compatible server that stands in for an API teacher, from answers that are known.

It reads rows of inputs and right answers, finds the row that a DSPy chat prompt asks about, and
replies in DSPy's chat format: at no cost, without a network, and always alike. A chosen share of its
answers is wrong, as a real teacher's are. It is no model: reports made with it have to say so.
"""

import argparse
import ast
import asyncio
import hashlib
import json
import re
import socket
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "standin-teacher"
HEADERS = {"x-stand-in": "true"}
BLOCK = re.compile(r"\[\[ ## (\w+) ## \]\]\n(.*?)(?=\n\n\[\[ ## |\n\nRespond with |\Z)", re.S)
OUTPUT = re.compile(r"^\d+\. `(\w+)` \((.*?)\):", re.M)
WORD = re.compile(r"\w+")

Row = dict[str, Any]


def share(*parts: str) -> float:
    """A number in [0, 1) that depends on the parts only."""
    return int.from_bytes(hashlib.sha256("\x1f".join(parts).encode()).digest()[:6], "big") / 2**48


def count_tokens(text: str) -> int:
    """About as many as a real tokenizer counts."""
    return len(re.findall(r"\w{1,8}|[^\w\s]+", text))


class Answers:
    """The known rows, found by their inputs; the nearest by shared words where none is equal."""

    def __init__(self, rows: Iterable[Row], inputs: Sequence[str]) -> None:
        self.inputs = tuple(inputs)
        self.rows = list(rows)
        self._exact = {self.key(row): row for row in self.rows}
        self._bags = [frozenset(WORD.findall(self.key(row).casefold())) for row in self.rows]
        self._where: dict[str, list[int]] = defaultdict(list)
        for place, bag in enumerate(self._bags):
            for word in bag:
                self._where[word].append(place)

    @classmethod
    def read(cls, paths: Iterable[Path], inputs: Sequence[str]) -> "Answers":
        """Reads JSON lines; raises ValueError where a row lacks an input."""
        rows = [
            json.loads(line)
            for path in paths
            for line in path.read_text("utf-8").splitlines()
            if line.strip()
        ]
        if not rows or any(name not in row for row in rows for name in inputs):
            raise ValueError(f"every row of the answers needs the inputs {', '.join(inputs)}; give --inputs")
        return cls(rows, inputs)

    def key(self, values: Row) -> str:
        """One string of all inputs."""
        return "\x1f".join(" ".join(str(values.get(name, "")).split()) for name in self.inputs)

    def find(self, values: Row) -> Row:
        """The row with these inputs, or the nearest one."""
        key = self.key(values)
        return self._exact.get(key) or self._nearest(key)

    def _nearest(self, key: str) -> Row:
        """By the Jaccard similarity of the sets of words; the first row wins a tie."""
        asked = frozenset(WORD.findall(key.casefold()))
        shared = Counter(place for word in asked for place in self._where.get(word, ()))
        if not shared:
            return self.rows[0]
        best = max(shared, key=lambda place: (shared[place] / len(asked | self._bags[place]), -place))
        return self.rows[best]


def message_text(message: Row) -> str:
    """A message's text, whether it is one string or parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def asked_inputs(messages: Sequence[Row]) -> Row:
    """The input fields of the last user message; the whole text under every name where it has none."""
    text = message_text([m for m in messages if m.get("role") == "user"][-1])
    return dict(BLOCK.findall(text)) or defaultdict(lambda: text)


def asked_outputs(messages: Sequence[Row]) -> dict[str, list[Any]]:
    """Output field -> the values allowed (empty for any), as the system message lists them."""
    text = "\n".join(message_text(m) for m in messages if m.get("role") in ("system", "developer"))
    part = text.partition("Your output fields are:")[2].partition("All interactions")[0]
    return {name: allowed_values(kind) for name, kind in OUTPUT.findall(part)}


def allowed_values(kind: str) -> list[Any]:
    """The labels of `Literal['a', 'b']`; none for another type."""
    if not kind.startswith("Literal["):
        return []
    return list(ast.literal_eval(kind.removeprefix("Literal")))


def with_mistake(row: Row, outputs: dict[str, list[Any]], key: str, rate: float) -> Row:
    """The row, for a share `rate` of all inputs with one label changed; the same one every time."""
    labels = sorted(name for name, values in outputs.items() if len(values) > 1)
    if not labels or share("mistake", key) >= rate:
        return row
    name = labels[int(share("field", key) * len(labels))]
    others = [value for value in outputs[name] if value != row.get(name)]
    return row | {name: others[int(share("value", key) * len(others))]}


def in_chat_format(row: Row, outputs: Iterable[str]) -> str:
    """The reply as DSPy's ChatAdapter reads it."""
    blocks = [f"[[ ## {name} ## ]]\n{as_text(row.get(name, ''))}\n" for name in outputs]
    return "\n".join([*blocks, "[[ ## completed ## ]]"])


def as_text(value: Any) -> str:
    """Text as it is, other values as DSPy writes them."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


@dataclass
class Settings:
    """How the server behaves."""

    latency_s: float = 0.02
    mistakes: float = 0.03
    fail_every: int = 0
    fail_status: int = 429


@dataclass
class Teacher:
    """Answers chat requests and counts them."""

    answers: Answers
    settings: Settings = field(default_factory=Settings)
    requests: int = 0
    failed: int = 0
    prompts: Counter[str] = field(default_factory=Counter)

    def reply(self, messages: Sequence[Row]) -> str:
        """The text for a prompt: always the same for the same inputs and fields."""
        values, outputs = asked_inputs(messages), asked_outputs(messages)
        row = self.answers.find(values)
        row = with_mistake(row, outputs, self.answers.key(values), self.settings.mistakes)
        return in_chat_format(row, outputs) if outputs else json.dumps(row, ensure_ascii=False)

    def counts(self) -> Row:
        """Requests in all, and how often the same prompt was answered."""
        return {
            "requests": self.requests,
            "failed": self.failed,
            "distinct_prompts": len(self.prompts),
            "max_per_prompt": max(self.prompts.values(), default=0),
            "repeated_prompts": sum(count > 1 for count in self.prompts.values()),
        }

    def fails(self) -> bool:
        """Whether the request now counted is one of those that have to fail."""
        return bool(self.settings.fail_every) and self.requests % self.settings.fail_every == 0


def problem(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    """OpenAI's error shape."""
    body = {"error": {"message": text, "type": "stand_in_error", "code": status}}
    return JSONResponse(body, status, headers=HEADERS | (headers or {}))


def envelope(kind: str, choices: list[Row], usage: Row | None = None) -> Row:
    """What a completion and a chunk have in common."""
    body = {
        "id": "chatcmpl-standin",
        "object": kind,
        "created": int(time.time()),
        "model": MODEL,
        "choices": choices,
    }
    return body if usage is None else body | {"usage": usage}


def completion(text: str, usage: Row, count: int) -> Row:
    """A whole answer, `count` times."""
    return envelope(
        "chat.completion",
        [
            {
                "index": i,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
                "logprobs": None,
            }
            for i in range(count)
        ],
        usage,
    )


async def events(text: str, usage: Row | None) -> AsyncIterator[str]:
    """The same answer as server-sent events, a word at a time."""
    deltas: list[Row] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": piece} for piece in re.findall(r"\S+\s*|\s+", text)]
    ends: list[str | None] = [None] * len(deltas) + ["stop"]
    for delta, end in zip([*deltas, {}], ends, strict=True):
        choice = {"index": 0, "delta": delta, "finish_reason": end}
        yield f"data: {json.dumps(envelope('chat.completion.chunk', [choice]))}\n\n"
    if usage:
        yield f"data: {json.dumps(envelope('chat.completion.chunk', [], usage))}\n\n"
    yield "data: [DONE]\n\n"


async def chat(request: Request) -> Response:
    """POST /v1/chat/completions"""
    teacher: Teacher = request.app.state.teacher
    teacher.requests += 1
    if teacher.fails():
        teacher.failed += 1
        return problem(teacher.settings.fail_status, "asked to fail (--fail-every)", {"Retry-After": "0"})
    try:
        body = json.loads(await request.body())
        messages = body["messages"]
        text = teacher.reply(messages)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return problem(400, f"cannot read the request: {error!r}; send messages with a user message")
    if str(body.get("model", "")).rpartition("/")[2] != MODEL:
        return problem(404, f"model is {body.get('model')!r}; use {MODEL}")
    teacher.prompts[hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()] += 1
    await asyncio.sleep(teacher.settings.latency_s)
    count = int(body.get("n") or 1)
    given, made = sum(count_tokens(message_text(m)) + 4 for m in messages), count_tokens(text) * count
    usage = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
    if body.get("stream"):
        wanted = usage if (body.get("stream_options") or {}).get("include_usage") else None
        return StreamingResponse(events(text, wanted), media_type="text/event-stream", headers=HEADERS)
    return JSONResponse(completion(text, usage, count), headers=HEADERS)


async def models(_: Request) -> Response:
    """GET /v1/models"""
    return JSONResponse(
        {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "stand-in"}]},
        headers=HEADERS,
    )


async def counts(request: Request) -> Response:
    """GET /counts"""
    return JSONResponse(request.app.state.teacher.counts(), headers=HEADERS)


def create_app(teacher: Teacher) -> Starlette:
    """The server around a teacher."""
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/counts", counts),
        ]
    )
    app.state.teacher = teacher
    return app


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python examples/standin_teacher.py --answers examples/tickets/data/*.jsonl --port 8899",
    )
    add = parser.add_argument
    add(
        "--answers", nargs="+", type=Path, required=True, help="JSONL files: inputs and right answers by name"
    )
    add("--inputs", nargs="+", default=["text"], help="names of the inputs in them (default: text)")
    add("--port", type=int, default=8899, help="0 for a free one (default: %(default)s)")
    add("--port-file", type=Path, help="the port is written here once it listens")
    add("--latency-ms", type=float, default=20, help="before every answer (default: %(default)s)")
    add(
        "--mistakes",
        type=float,
        default=0.03,
        help="share of the inputs answered wrongly (default: %(default)s)",
    )
    add("--fail-every", type=int, default=0, metavar="N", help="every Nth request fails (default: none)")
    add("--fail-status", type=int, default=429, help="with this status (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Serves on 127.0.0.1 until it is stopped."""
    given = arguments()
    settings = Settings(given.latency_ms / 1000, given.mistakes, given.fail_every, given.fail_status)
    teacher = Teacher(Answers.read(given.answers, given.inputs), settings)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio: TCP_NODELAY
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", given.port))
    listener.listen(1024)
    port = listener.getsockname()[1]
    print(f"{MODEL} on http://127.0.0.1:{port}/v1 with {len(teacher.answers.rows)} known answers", flush=True)
    if given.port_file:
        given.port_file.write_text(f"{port}\n")
    config = uvicorn.Config(create_app(teacher), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
