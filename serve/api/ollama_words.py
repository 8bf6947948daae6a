"""Ollama's words for a chat and ours, both ways; nothing here asks anybody.

A request is read as Ollama reads it: unknown fields are let be. What it asks for and OpenAI's API has no
word for is named in the answer (`homestill.ignored`), so that nothing is left out silently.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from serve.api.checks import refuse, shown, validated
from serve.errors import ApiError
from serve.tasks import LATEST
from serve.wire.sse import dumps

RENAMED = ("temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty")
"""Options with OpenAI's own names; `num_predict` is the one with another."""
UNLIMITED = (-1, -2)
IMAGES = {"iVBOR": "image/png", "/9j/": "image/jpeg", "R0lGOD": "image/gif", "UklGR": "image/webp"}
"""How pictures of a kind begin in base64."""
NOT_OFFERED = {
    "suffix": "the models here complete no text in the middle",
    "template": "the prompt's form is part of the release",
    "raw": "the prompt's form is part of the release",
    "context": "nothing is kept between requests; send the conversation to /api/chat",
}
"""Fields of /api/generate that would be wrong to leave out."""


@dataclass
class Asked:
    """A request in OpenAI's words."""

    name: str
    """The model's name as the client wrote it."""
    body: dict[str, Any]
    """A checked chat request; without messages where the model is only to be loaded."""
    ignored: list[str]
    """What there is no word for."""


class Ids:
    """Ids of the tool calls that were handed out. Ollama's clients send the calls back without them, and by
    its ids a conversation is known as that of the model which began it.

    Args:
        most: answers that are remembered; those before are forgotten.
    """

    def __init__(self, most: int = 10_000) -> None:
        self._most = most
        self._known: OrderedDict[bytes, list[str]] = OrderedDict()

    def keep(self, before: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> None:
        """`calls`, in Ollama's words, were the answer to `before`, the last message of the request."""
        if calls and all(isinstance(call.get("id"), str) for call in calls):
            self._known[_key(before, calls)] = [call["id"] for call in calls]
            if len(self._known) > self._most:
                self._known.popitem(last=False)

    def of(self, before: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> list[str] | None:
        """The ids with which these calls were handed out."""
        return self._known.get(_key(before, calls))


def _key(before: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> bytes:
    named = [[call["function"]["name"], call["function"].get("arguments") or {}] for call in calls]
    text = json.dumps([before.get("content"), named], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()


def task_of(name: str) -> str:
    """`tickets:latest` is `tickets`."""
    return name.removesuffix(LATEST)


def from_chat(body: Mapping[str, Any], ids: Ids) -> Asked:
    """A request of /api/chat.

    Args:
        ids: of the calls that were handed out before.

    Raises:
        ApiError: 400 with every fault found.
    """
    reading = _Reading(ids)
    messages = reading.messages(body.get("messages"))
    return reading.asked(body, messages)


def from_generate(body: Mapping[str, Any]) -> Asked:
    """A request of /api/generate: a chat of at most two messages.

    Raises:
        ApiError: 400 with every fault found.
    """
    reading = _Reading(Ids(0))
    for name, why in NOT_OFFERED.items():
        if body.get(name):
            reading.fault(name, f"{name} is not offered: {why}; leave it out")
    messages = []
    prompt, system = reading.text(body, "prompt"), reading.text(body, "system")
    if prompt or body.get("images"):
        messages = [{"role": "system", "content": system}] if system else []
        content = reading.content("images", prompt, body.get("images"))
        messages.append({"role": "user", "content": content})
    return reading.asked(body, messages)


@dataclass
class _Reading:
    """Reads one request and keeps every fault."""

    ids: Ids
    faults: list[tuple[str, str]] = field(default_factory=list)

    def fault(self, name: str, told: str) -> None:
        self.faults.append((name, told))

    def asked(self, body: Mapping[str, Any], messages: list[dict[str, Any]]) -> Asked:
        name = body.get("model") or ""
        if not isinstance(name, str) or not name:
            self.fault("model", "model is missing or no text; name a task")
        options = body.get("options") or {}
        if not isinstance(options, dict):
            self.fault("options", f"options is {shown(options)}; send an object")
            options = {}
        told: dict[str, Any] = {"model": task_of(str(name)), "messages": messages}
        told |= self._options(options) | self._format(body.get("format"))
        stream = body.get("stream")
        told["stream"] = True if stream is None else stream
        if told["stream"] is True:
            told["stream_options"] = {"include_usage": True}
        if body.get("tools"):
            told["tools"] = body["tools"]
        if body.get("logprobs"):
            told |= {"logprobs": body["logprobs"], "top_logprobs": body.get("top_logprobs") or 0}
        refuse(self.faults)
        known = {"num_predict", *RENAMED}
        ignored = sorted(key for key, value in options.items() if key not in known and value is not None)
        checked = validated(told) if messages else told
        return Asked(str(name), checked, ignored + (["think"] if body.get("think") else []))

    def text(self, body: Mapping[str, Any], name: str) -> str:
        value = body.get(name) or ""
        if isinstance(value, str):
            return value
        self.fault(name, f"{name} is {shown(value)}; send a text")
        return ""

    def messages(self, given: Any) -> list[dict[str, Any]]:
        if not given:
            return []
        if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
            self.fault("messages", f"messages is {shown(given)}; send a list of objects")
            return []
        open_calls: list[dict[str, Any]] = []
        told: list[dict[str, Any]] = []
        for message in given:
            told.append(self._message(message, told, open_calls))
        return told

    def content(self, where: str, text: str, images: Any) -> Any:
        """A text, or parts where there are pictures."""
        if not images:
            return text
        if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
            self.fault(where, f"{where} is no list of base64 texts; send pictures in base64")
            return text
        parts = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
        return [{"type": "text", "text": text}, *parts] if text else parts

    def _message(
        self, message: Mapping[str, Any], before: list[dict[str, Any]], open_calls: list[dict[str, Any]]
    ) -> dict[str, Any]:
        where = f"messages[{len(before)}]"
        text = message.get("content") or ""
        if not isinstance(text, str):
            self.fault("messages", f"{where}.content is {shown(text)}; send a text, and pictures as images")
            text = ""
        told: dict[str, Any] = {"role": message.get("role")}
        told["content"] = self.content(f"{where}.images", text, message.get("images"))
        if message.get("tool_calls"):
            told["tool_calls"] = calls = self._calls(where, message["tool_calls"], before)
            open_calls[:] = [dict(call) for call in calls]
        if told["role"] == "tool":
            told["tool_call_id"] = self._answered(where, message, open_calls)
        return told

    def _calls(self, where: str, given: Any, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """OpenAI wants the arguments as text, and an id that Ollama's clients may not have kept."""
        if not isinstance(given, list) or not all(_is_call(call) for call in given):
            self.fault(
                "messages", f"{where}.tool_calls is {shown(given)}; send functions with name and arguments"
            )
            return []
        known = self.ids.of(before[-1], given) if before else None
        calls = []
        for number, call in enumerate(given):
            own = known[number] if known else f"call_{len(before)}_{number}"
            arguments = dumps(call["function"].get("arguments") or {}).decode()
            function = {"name": call["function"]["name"], "arguments": arguments}
            identity = call["id"] if isinstance(call.get("id"), str) and call["id"] else own
            calls.append({"id": identity, "type": "function", "function": function})
        return calls

    def _answered(self, where: str, message: Mapping[str, Any], open_calls: list[dict[str, Any]]) -> Any:
        """Which call a result belongs to: by its id, else by the tool's name, else by order."""
        name = message.get("tool_name") or message.get("name")
        named = [call for call in open_calls if call["function"]["name"] == name]
        known = [call for call in open_calls if call["id"] == message.get("tool_call_id")]
        found = (known or named or open_calls)[:1]
        if found:
            open_calls.remove(found[0])
        identity = message.get("tool_call_id") or (found[0]["id"] if found else None)
        if identity is None:
            self.fault("messages", f"{where} is a tool's result without a call before it; send the call too")
        return identity

    def _options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        told = {name: options[name] for name in RENAMED if options.get(name) is not None}
        seed, most = told.get("seed"), options.get("num_predict")
        if isinstance(seed, int) and seed < 0:  # any
            del told["seed"]
        if not told.get("stop", True):
            del told["stop"]
        if most is None or (most in UNLIMITED and not isinstance(most, bool)):
            return told
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            self.fault(
                "num_predict", f"num_predict is {shown(most)}; use a whole number from 1 on, or -1 for all"
            )
        return told | {"max_tokens": most}

    def _format(self, given: Any) -> dict[str, Any]:
        if not given:
            return {}
        if given == "json":
            return {"response_format": {"type": "json_object"}}
        if isinstance(given, dict):
            schema = {"name": "answer", "schema": given}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        self.fault("format", f'format is {shown(given)}; use "json" or a JSON schema')
        return {}


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments") or {}, dict)
    )


def _data_url(image: str) -> str:
    if image.startswith("data:"):
        return image
    kind = next((kind for start, kind in IMAGES.items() if image.startswith(start)), "image/jpeg")
    return f"data:{kind};base64,{image}"


def calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A message's tool calls, with the arguments as objects.

    Raises:
        ApiError: 502, the model wrote arguments that are none.
    """
    calls = []
    for number, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") or {}
        try:
            arguments = orjson.loads(function.get("arguments") or "{}")
        except orjson.JSONDecodeError:
            arguments = None
        if not isinstance(arguments, dict):
            raise ApiError(
                502,
                f"the model called {shown(function.get('name'))} with arguments that are no JSON object "
                f"({shown(function.get('arguments'))}); ask again",
            )
        named = {"index": number, "name": function.get("name"), "arguments": arguments}
        calls.append({"id": call.get("id"), "function": named})
    return calls


def text_of(message: Mapping[str, Any]) -> str:
    """What a message, or a piece of one, says; a refusal is said as well."""
    return message.get("content") or message.get("refusal") or ""


def done_reason(finish_reason: str | None) -> str:
    """Ollama knows two."""
    return "length" if finish_reason == "length" else "stop"
