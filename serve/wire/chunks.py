"""Streams of chat.completion.chunk: made from a whole answer, and read on their way through."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.wire.sse import dumps


def from_answer(answer: Mapping[str, Any], homestill: Mapping[str, Any], *, usage: bool) -> Iterator[bytes]:
    """A whole answer with one choice as the stream it would have been; `homestill` goes into the last chunk.

    Args:
        usage: end with a chunk of token counts, as `stream_options.include_usage` asks for.
    """
    choice = answer["choices"][0]
    common = {key: answer.get(key) for key in ("id", "created", "model")} | {
        "object": "chat.completion.chunk"
    }
    message = choice["message"]
    deltas: list[tuple[dict[str, Any], str | None]] = [
        ({"role": "assistant", "content": ""}, None),
        ({"content": message.get("content") or ""}, None),
        ({}, choice.get("finish_reason")),
    ]
    chunks: list[dict[str, Any]] = [
        {**common, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}
        for delta, reason in deltas
    ]
    if usage:
        chunks.append({**common, "choices": [], "usage": answer.get("usage")})
    chunks[-1]["homestill"] = homestill
    return map(dumps, chunks)


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
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    ended: int = 0

    @property
    def finished(self) -> bool:
        """Every choice has its finish_reason; only token counts may follow."""
        return self.ended >= self.choices

    def add(self, data: bytes) -> dict[str, Any]:
        """Read one chunk.

        Raises:
            ValueError: it is no chunk of a chat completion, or reports an error.
        """
        chunk = json.loads(data)
        if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
            raise ValueError(data[:200].decode(errors="replace"))
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

    def _add_choice(self, choice: Mapping[str, Any]) -> None:
        self.ended += choice.get("finish_reason") is not None
        if choice.get("index"):
            return
        delta = choice.get("delta") or {}
        if isinstance(delta.get("content"), str):
            self.text.append(delta["content"])
        for part in delta.get("tool_calls") or []:
            self._add_call(part)

    def _add_call(self, part: Mapping[str, Any]) -> None:
        """Tool calls come in pieces: name and id first, then the arguments bit by bit."""
        empty = {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
        call = self.calls.setdefault(part.get("index") or 0, empty)
        call["id"] = part.get("id") or call["id"]
        for key, text in (part.get("function") or {}).items():
            call["function"][key] = f"{call['function'].get(key) or ''}{text or ''}"
