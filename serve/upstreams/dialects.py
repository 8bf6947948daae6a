"""What a local runtime makes of OpenAI's request: what it cannot do, and what it must be told in other words.

Nothing is left to a runtime that would ignore it or take it for something else: a field is passed on,
translated, known to change nothing, or `unsupported`, and then another model is asked.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SAMPLING = frozenset({"temperature", "top_p", "seed", "stop", "max_tokens", "max_completion_tokens"})
COMMON = SAMPLING | {"model", "messages", "stream", "stream_options", "n", "logprobs", "top_logprobs"}
"""What every runtime does, some of it with this module's help."""
HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
    }
)
"""Fields that change nothing in the answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none",),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
}
"""Values that ask for nothing; null asks for nothing everywhere."""
FORMATS = ("text", "json_object", "json_schema")
BEYOND_TEXT = frozenset({"audio", "modalities", "web_search_options"})
"""What no model that writes text alone can do."""


@dataclass(frozen=True)
class Dialect:
    """A kind of local runtime."""

    name: str
    fields: frozenset[str] | None
    """What it does as it is asked; None: whatever it is sent, it does or refuses."""
    tools: bool = True
    several: bool = False
    """`n` is passed on; else it is asked n times."""
    embeddings: bool = True

    def unsupported(self, body: Mapping[str, Any]) -> list[str]:
        """The fields of this request that it cannot do, sorted."""
        return sorted({*self._beyond(body), *self._message_faults(body.get("messages") or ())})

    def translated(self, body: Mapping[str, Any], temperature: float) -> dict[str, Any]:
        """The request in its words, without `n`; what is `unsupported` must not be in it.

        Args:
            temperature: where the request says none. Always sent: Ollama takes 1.0 for a missing one, whatever
                the model's own parameters say.
        """
        told = {name: value for name, value in body.items() if self._is_told(name, value)}
        longest = told.pop("max_completion_tokens", None)
        if longest is not None:
            told["max_tokens"] = longest
        told.setdefault("temperature", temperature)
        told.setdefault("top_p", 1.0)
        told["messages"] = [_plain(message) for message in body["messages"]]
        if body.get("tool_choice") == "none":
            told.pop("tools", None)
            told.pop("parallel_tool_calls", None)
        return told

    def _beyond(self, body: Mapping[str, Any]) -> Iterator[str]:
        for name, value in body.items():
            if value is None or name in HARMLESS or value in NEUTRAL.get(name, ()):
                continue
            if name == "tools" and body.get("tool_choice") == "none":
                continue
            unknown = self.fields is not None and name not in self.fields
            if unknown or name in BEYOND_TEXT or (name == "response_format" and not _is_known_format(value)):
                yield name

    def _message_faults(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """Messages are read as they are where the runtime refuses by itself what it cannot read."""
        if self.fields is not None and not all(self._reads(message) for message in messages):
            yield "messages"

    def _reads(self, message: Mapping[str, Any]) -> bool:
        called = message.get("tool_calls") or message.get("role") == "tool"
        foreign = message.get("function_call") or message.get("audio") or message.get("role") == "function"
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        return not foreign and (self.tools or not called) and all(_is_text(part) for part in parts)

    def _is_told(self, name: str, value: Any) -> bool:
        if value is None or name == "n" or value in NEUTRAL.get(name, ()):
            return False
        return self.fields is None or name in self.fields


OLLAMA = Dialect("ollama", COMMON | {"tools", "presence_penalty", "frequency_penalty", "response_format"})
"""Its `/v1` ignores every other field without a word, `tool_choice` among them."""
EMBEDDED = Dialect("embedded", COMMON | {"response_format"}, tools=False, embeddings=False)
ANY_SERVER = Dialect("url", None, several=True)
"""vLLM, Ray Serve LLM, llama-server: they say no to what they cannot do."""


def merged(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Answers to one question as one answer with as many choices, and the tokens of all."""
    first = answers[0]
    if len(answers) > 1:
        choices = [choice for answer in answers for choice in answer["choices"]]
        first["choices"] = [{**choice, "index": index} for index, choice in enumerate(choices)]
        first["usage"] = summed([answer.get("usage") for answer in answers])
    return first


def summed(usages: Sequence[Any]) -> dict[str, int] | None:
    """The counts of all; None where one is not known."""
    if not all(isinstance(usage, Mapping) for usage in usages):
        return None
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {name: sum(usage.get(name) or 0 for usage in usages) for name in names}


def with_own_ids(answer: dict[str, Any]) -> dict[str, Any]:
    """Tool calls whose id is missing or not the only one of its kind get one of their own."""
    seen: set[Any] = set()
    for choice in answer["choices"]:
        for call in choice["message"].get("tool_calls") or ():
            if not call.get("id") or call["id"] in seen:
                call["id"] = f"call_{uuid.uuid4().hex}"
            seen.add(call["id"])
    return answer


def reseeded(told: dict[str, Any], by: int) -> dict[str, Any]:
    """The same request with another seed, where it has one: or every choice would be the same."""
    return {**told, "seed": told["seed"] + by} if by and "seed" in told else told


def _plain(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Text parts as one text (Ollama makes a message of each), and the role that templates know."""
    content = message.get("content")
    if isinstance(content, list) and all(_is_text(part) for part in content):
        message = {**message, "content": "".join(part["text"] for part in content)}
    if message.get("role") == "developer":
        message = {**message, "role": "system"}
    return message


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_known_format(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("type") in FORMATS
