"""A chat request, held against OpenAI's rules as far as routing and the local runtimes rely on them.

Fields that these rules do not name are passed on untouched: what they mean is the answering model's to say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from serve.errors import ApiError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
FORMATS = ("text", "json_object", "json_schema")
LONGEST_NAME = 256
DEEPEST = 100
"""Levels of nesting; every honest request has fewer, and some JSON libraries end at a thousand."""

Rule = Callable[[Any], str]
"""What is wrong with a value; empty where nothing is."""


def checked(data: bytes) -> dict[str, Any]:
    """The body of a chat request.

    Raises:
        ApiError: 400 with every fault found; `param` is the first field at fault.
    """
    return validated(parsed(data))


def validated(body: dict[str, Any]) -> dict[str, Any]:
    """The same for a request that another dialect was translated into.

    Raises:
        ApiError: 400 with every fault found; `param` is the first field at fault.
    """
    faults = [
        (name, told)
        for name, rule in RULES.items()
        if (value := body.get(name)) is not None or name in REQUIRED
        if (told := rule(value))
    ]
    if body.get("top_logprobs") and not body.get("logprobs"):
        faults.append(("top_logprobs", "top_logprobs needs logprobs; set logprobs to true"))
    refuse(faults)
    return body


def parsed(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ApiError: 400, it is none.
    """
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        body = _escaped(data, error)
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object; send model and messages")
    if not _is_shallow(body):
        raise ApiError(400, f"the body is nested more than {DEEPEST} levels deep; send a flatter one")
    return body


def refuse(faults: list[tuple[str, str]]) -> None:
    """One error for all faults, each a field and what is wrong with it.

    Raises:
        ApiError: 400, there are faults.
    """
    if faults:
        raise ApiError(400, "; ".join(told for _, told in faults), param=faults[0][0])


def _escaped(data: bytes, error: ValueError) -> Any:
    """What JSON allows and orjson does not: escapes of lone surrogates. The rest stays refused."""
    try:
        return json.loads(data, parse_constant=_no_constant, parse_float=_finite, parse_int=_of_64_bits)
    except (ValueError, RecursionError):
        raise ApiError(400, f"the body is not JSON ({error}); send a JSON object") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    if math.isfinite(value := float(text)):
        return value
    raise ValueError(f"{text[:20]} is beyond what a number holds")


def _of_64_bits(text: str) -> int:
    if abs(value := int(text)) < 2**64:
        return value
    raise ValueError(f"{text[:20]}… is beyond what an integer holds")


def _is_shallow(value: Any) -> bool:
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [each for one in level for each in (one.values() if isinstance(one, dict) else one)]
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            return True
    return False


def shown(value: Any) -> str:
    """A value as it is quoted in an error, cut short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _number(name: str, low: float, high: float) -> Rule:
    def rule(value: Any) -> str:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return "" if fits and low <= value <= high else f"{name} is {shown(value)}; use {low:g} to {high:g}"

    return rule


def _whole(name: str, low: int, high: int | None = None) -> Rule:
    span = f"{low} to {high}" if high is not None else f"a whole number from {low} on"

    def rule(value: Any) -> str:
        fits = isinstance(value, int) and not isinstance(value, bool)
        return "" if fits and low <= value <= (high or value) else f"{name} is {shown(value)}; use {span}"

    return rule


def _kind(name: str, kind: type, words: str) -> Rule:
    def rule(value: Any) -> str:
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        return "" if fits else f"{name} is {shown(value)}; use {words}"

    return rule


def _model(value: Any) -> str:
    fits = isinstance(value, str) and value and value.isprintable() and len(value) <= LONGEST_NAME
    return (
        ""
        if fits
        else f"model is {shown(value)}; name a task"
        if value is not None
        else "model is missing; name a task"
    )


def _messages(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return "messages is missing or empty; send a list of messages"
    return "; ".join(filter(None, (_message(at, message) for at, message in enumerate(value))))


def _message(at: int, message: Any) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return f"messages[{at}] is no object with a role; send role and content"
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        return f"messages[{at}].role is {shown(role)}; use {', '.join(sorted(ROLES))}"
    if calls is not None and not _are_calls(calls):
        return f"messages[{at}].tool_calls is {shown(calls)}; send calls with a function's name and arguments"
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        return f"messages[{at}].tool_call_id is missing; name the call that this is the result of"
    if content is None:
        return (
            ""
            if role in ("assistant", "function")
            else f"messages[{at}].content is missing; send text or parts"
        )
    if isinstance(content, list):
        fits = all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)
        return "" if fits else f"messages[{at}].content holds a part without a type; send objects with a type"
    return (
        "" if isinstance(content, str) else f"messages[{at}].content is {shown(content)}; send text or parts"
    )


def _are_calls(calls: Any) -> bool:
    return isinstance(calls, list) and all(
        isinstance(call, dict)
        and (not isinstance(call.get("function"), dict) or isinstance(call["function"].get("name"), str))
        for call in calls
    )


def _tools(value: Any) -> str:
    if not isinstance(value, list):
        return f"tools is {shown(value)}; send a list of tools"
    for at, tool in enumerate(value):
        if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
            return f"tools[{at}] is {shown(tool)}; send an object with a type"
        if tool["type"] == "function":
            function = tool.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            if not isinstance(name, str) or not name:
                return f"tools[{at}].function has no name; name the function"
    return ""


def _tool_choice(value: Any) -> str:
    fits = value in ("none", "auto", "required") if isinstance(value, str) else isinstance(value, dict)
    return "" if fits else f"tool_choice is {shown(value)}; use none, auto, required or a tool"


def _format(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in FORMATS:
        return f"response_format is {shown(value)}; use an object whose type is {', '.join(FORMATS)}"
    if kind == "json_schema" and not isinstance((value.get("json_schema") or {}), Mapping):
        return "response_format.json_schema is no object; send name and schema"
    if kind == "json_schema" and not isinstance((value.get("json_schema") or {}).get("schema"), Mapping):
        return "response_format.json_schema.schema is missing; send a JSON schema"
    return ""


def _stop(value: Any) -> str:
    several = isinstance(value, list) and len(value) <= 4 and all(isinstance(each, str) for each in value)
    return (
        ""
        if isinstance(value, str) or several
        else f"stop is {shown(value)}; use a text, or a list of up to 4"
    )


def _stream_options(value: Any) -> str:
    usage = value.get("include_usage") if isinstance(value, dict) else 0
    return (
        ""
        if usage is None or isinstance(usage, bool)
        else f"stream_options is {shown(value)}; use include_usage"
    )


def _bias(value: Any) -> str:
    fits = isinstance(value, dict) and all(
        isinstance(each, int | float) and not isinstance(each, bool) for each in value.values()
    )
    return "" if fits else f"logit_bias is {shown(value)}; use an object of numbers by token"


REQUIRED = ("model", "messages")
RULES: dict[str, Rule] = {
    "model": _model,
    "messages": _messages,
    "stream": _kind("stream", bool, "true or false"),
    "stream_options": _stream_options,
    "max_tokens": _whole("max_tokens", 1),
    "max_completion_tokens": _whole("max_completion_tokens", 1),
    "n": _whole("n", 1, 128),
    "seed": _kind("seed", int, "a whole number"),
    "temperature": _number("temperature", 0, 2),
    "top_p": _number("top_p", 0, 1),
    "presence_penalty": _number("presence_penalty", -2, 2),
    "frequency_penalty": _number("frequency_penalty", -2, 2),
    "logprobs": _kind("logprobs", bool, "true or false"),
    "top_logprobs": _whole("top_logprobs", 0, 20),
    "stop": _stop,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "response_format": _format,
    "logit_bias": _bias,
    "user": _kind("user", str, "a text"),
}
