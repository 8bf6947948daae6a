"""Streams of chat.completion.chunk: made from a whole answer, and read on their way through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from serve.wire.sse import dumps


def from_answer(answer: Mapping[str, Any], homestill: Mapping[str, Any], *, usage: bool) -> Iterator[bytes]:
    """A whole answer as the stream it would have been; `homestill` goes into the last chunk.

    Args:
        usage: end with a chunk of token counts, as `stream_options.include_usage` asks for.
    """
    common = {key: answer.get(key) for key in ("id", "created", "model")}
    common["object"] = "chat.completion.chunk"
    chunks = [{**common, "choices": [piece]} for choice in answer["choices"] for piece in _pieces(choice)]
    if usage:
        chunks.append({**common, "choices": [], "usage": answer.get("usage")})
    chunks[-1]["homestill"] = homestill
    return map(dumps, chunks)


def _pieces(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    message = choice["message"]
    calls = [{"index": at, **call} for at, call in enumerate(message.get("tool_calls") or [])]
    deltas: list[tuple[dict[str, Any], Any, str | None]] = [
        ({"role": "assistant", "content": None if calls else ""}, None, None)
    ]
    if message.get("content"):
        deltas.append(({"content": message["content"]}, choice.get("logprobs"), None))
    deltas += [({"tool_calls": [call]}, None, None) for call in calls]
    deltas.append(({}, None, choice.get("finish_reason")))
    return [
        {"index": choice.get("index", 0), "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        for delta, logprobs, reason in deltas
    ]


@dataclass
class Collector:
    """What a stream has said so far.

    Args:
        choices: how many answers it carries (`n`).
    """

    choices: int = 1
    usage: Mapping[str, Any] | None = None
    model: str | None = None
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    finish_reason: str | None = None
    ended: int = 0
    _first: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Every choice has its finish_reason; only token counts may follow."""
        return self.ended >= self.choices

    def add(self, data: bytes) -> dict[str, Any]:
        """Read one chunk.

        Raises:
            ValueError: it is no chunk of a chat completion, or reports an error.
        """
        chunk = orjson.loads(data)
        if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
            raise ValueError(data[:200].decode(errors="replace"))
        self._first = self._first or chunk
        self.model = chunk.get("model") or self.model
        self.usage = chunk.get("usage") or self.usage
        try:
            for choice in chunk["choices"]:
                self._add_choice(choice)
        except (AttributeError, TypeError) as error:  # a list where an object belongs, or the like
            raise ValueError(data[:200].decode(errors="replace")) from error
        return chunk

    def message(self) -> dict[str, Any]:
        """The first choice's message as a whole."""
        calls = [call for _, call in sorted(self.calls.items())]
        content = "".join(self.text) or (None if calls else "")
        return {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})

    def answer(self) -> dict[str, Any]:
        """The chat.completion with its first choice that the stream was, log-probabilities with it."""
        choice = {
            "index": 0,
            "message": self.message(),
            "logprobs": {"content": self.logprobs} if self.logprobs else None,
            "finish_reason": self.finish_reason,
        }
        return {
            "id": self._first.get("id"),
            "object": "chat.completion",
            "created": self._first.get("created"),
            "model": self.model,
            "choices": [choice],
            "usage": self.usage,
        }

    def _add_choice(self, choice: Mapping[str, Any]) -> None:
        self.ended += bool(choice.get("finish_reason"))
        if choice.get("index"):
            return
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta") or {}
        if isinstance(delta.get("content"), str):
            self.text.append(delta["content"])
        self.logprobs += (choice.get("logprobs") or {}).get("content") or []
        for part in delta.get("tool_calls") or []:
            self._add_call(part)

    def _add_call(self, part: Mapping[str, Any]) -> None:
        """Tool calls come in pieces: name and id first, then the arguments bit by bit."""
        empty = {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
        call = self.calls.setdefault(part.get("index") or 0, empty)
        call["id"] = part.get("id") or call["id"]
        for key, text in (part.get("function") or {}).items():
            call["function"][key] = f"{call['function'].get(key) or ''}{text or ''}"
