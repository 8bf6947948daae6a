"""One way to ask, through each of the packages that people point at the endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

KEY = "sk-clients"


@dataclass
class Answer:
    """What a client was told, in the same words for all."""

    texts: list[str]
    """One a choice."""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    """Name and arguments of the first choice's tool calls."""
    ids: list[str | None] = field(default_factory=list)
    """Of the same calls; None where the client drops them."""
    finish: str | None = None
    counts: tuple[int, int] | None = None
    """Tokens of prompt and answer."""
    tokens: list[tuple[str, float, int]] = field(default_factory=list)
    """Token, log-probability, number of alternatives."""
    homestill: Mapping[str, Any] | None = None
    """The decision, where the client shows fields that it does not know."""

    @property
    def text(self) -> str:
        return self.texts[0]


@dataclass
class Failure:
    """An error as the client raised it."""

    kind: str
    status: int | None
    text: str
    retry_after: str | None = None
    """None also where the client does not show headers."""


class Client(Protocol):
    """A package. Features are named as OpenAI names them."""

    name: str
    cannot: Mapping[str, str]
    """Features that it has no words for, and why."""

    def ask(self, model: str, messages: list[dict[str, Any]], **features: Any) -> Answer:
        """A whole answer."""

    def pieces(self, model: str, messages: list[dict[str, Any]], **features: Any) -> Iterator[Answer]:
        """A stream; closing the iterator closes the client's stream."""

    def failure(self, error: Exception) -> Failure:
        """What an exception of the package says."""

    def with_key(self, key: str) -> Client:
        """The same with another key."""

    def close(self) -> None:
        """Close its connections."""


def joined(pieces: list[Answer]) -> Answer:
    """A stream's pieces as the answer that they make."""
    return Answer(
        texts=["".join(piece.text for piece in pieces)],
        calls=_calls(pieces),
        finish=next((piece.finish for piece in pieces if piece.finish), None),
        counts=next((piece.counts for piece in reversed(pieces) if piece.counts), None),
        tokens=[token for piece in pieces for token in piece.tokens],
        homestill=next((piece.homestill for piece in reversed(pieces) if piece.homestill), None),
    )


def _calls(pieces: list[Answer]) -> list[tuple[str, Any]]:
    """Whole calls as they are; cut ones (a name first, then text without one) put together."""
    calls: list[tuple[str, Any]] = []
    for name, arguments in (call for piece in pieces for call in piece.calls):
        if name:
            calls.append((name, arguments))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + arguments)
    return [(name, json.loads(each) if isinstance(each, str) else each) for name, each in calls]


class OpenAI:
    """The `openai` package."""

    name = "openai"
    cannot: Mapping[str, str] = {}

    def __init__(self, url: str, key: str = KEY) -> None:
        import openai

        self._url = url
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)
        self._create: Any = self._client.chat.completions.create

    def ask(self, model: str, messages: list[dict[str, Any]], **features: Any) -> Answer:
        return from_openai(self._create(model=model, messages=messages, **features))

    def pieces(self, model: str, messages: list[dict[str, Any]], **features: Any) -> Iterator[Answer]:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        stream = self._create(model=model, messages=messages, **options, **features)
        with closing(stream):
            for chunk in stream:
                yield from_chunk(chunk)

    def failure(self, error: Exception) -> Failure:
        response = getattr(error, "response", None)
        headers = response.headers if response is not None else {}
        return Failure(
            type(error).__name__, getattr(error, "status_code", None), str(error), headers.get("retry-after")
        )

    def with_key(self, key: str) -> Client:
        return OpenAI(self._url, key)

    def close(self) -> None:
        self._client.close()


class Ollama:
    """The `ollama` package."""

    name = "ollama"
    cannot: Mapping[str, str] = {
        "tool_choice": "Ollama's API has none",
        "n": "Ollama's API gives one answer",
        "nested": "its own types keep one level of a tool's schema",
    }

    def __init__(self, url: str, key: str = KEY) -> None:
        import ollama

        self._url = url
        self._client = ollama.Client(url, headers={"Authorization": f"Bearer {key}"}, timeout=30)

    def ask(self, model: str, messages: list[dict[str, Any]], **features: Any) -> Answer:
        return _from_ollama(self._client.chat(**self._told(model, messages, features), stream=False))

    def pieces(self, model: str, messages: list[dict[str, Any]], **features: Any) -> Iterator[Answer]:
        with closing(self._client.chat(**self._told(model, messages, features), stream=True)) as stream:
            for part in stream:
                yield _from_ollama(part)

    def failure(self, error: Exception) -> Failure:
        return Failure(type(error).__name__, getattr(error, "status_code", None), str(error))

    def with_key(self, key: str) -> Client:
        return Ollama(self._url, key)

    def close(self) -> None:
        self._client._client.close()

    def _told(
        self, model: str, messages: list[dict[str, Any]], features: Mapping[str, Any]
    ) -> dict[str, Any]:
        names = {"max_tokens": "num_predict"}
        alike = ("temperature", "seed", "stop", "max_tokens")
        options = {names.get(name, name): features[name] for name in alike if name in features}
        if isinstance(options.get("stop"), str):
            options["stop"] = [options["stop"]]
        told: dict[str, Any] = {"model": model, "messages": _to_ollama(messages), "options": options}
        told |= {name: features[name] for name in ("tools", "logprobs", "top_logprobs") if name in features}
        form = features.get("response_format")
        if form:
            told["format"] = "json" if form["type"] == "json_object" else form["json_schema"]["schema"]
        return told


def _to_ollama(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls without ids and with objects; results by the tool's name."""
    names: dict[Any, str] = {}
    told = []
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls") or ()}
        each = {"role": message["role"], "content": message.get("content") or ""}
        if calls:
            each["tool_calls"] = [
                {"function": {"name": call["name"], "arguments": json.loads(call["arguments"])}}
                for call in calls
            ]
        if message["role"] == "tool":
            each["tool_name"] = names[message["tool_call_id"]]
        told.append(each)
    return told


def _from_ollama(part: Any) -> Answer:
    calls = part.message.tool_calls or []
    return Answer(
        texts=[part.message.content or ""],
        calls=[(call.function.name, dict(call.function.arguments)) for call in calls],
        ids=[None for _ in calls],
        finish=part.done_reason,
        counts=(part.prompt_eval_count, part.eval_count) if part.done else None,
        tokens=[(each.token, each.logprob, len(each.top_logprobs or ())) for each in part.logprobs or ()],
    )


class LiteLLM:
    """The `litellm` package."""

    name = "litellm"
    cannot: Mapping[str, str] = {}

    def __init__(self, url: str, key: str = KEY) -> None:
        import litellm

        self._url = url
        self._litellm = litellm
        # Given tools it imports its MCP gateway first, which wants a package that it does not require.
        self._known: dict[str, Any] = {"max_retries": 0, "timeout": 30, "_skip_mcp_handler": True}
        self._known |= {"api_base": f"{url}/v1", "api_key": key}

    def ask(self, model: str, messages: list[dict[str, Any]], **features: Any) -> Answer:
        return from_openai(self._litellm.completion(f"openai/{model}", messages, **self._known, **features))

    def pieces(self, model: str, messages: list[dict[str, Any]], **features: Any) -> Iterator[Answer]:
        options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        stream: Any = self._litellm.completion(
            f"openai/{model}", messages, **options, **self._known, **features
        )
        try:
            for chunk in stream:
                yield from_chunk(chunk)
        finally:
            stream.completion_stream.close()  # its own wrapper has no way to close

    def failure(self, error: Exception) -> Failure:
        headers = getattr(error, "litellm_response_headers", None) or {}
        return Failure(
            type(error).__name__, getattr(error, "status_code", None), str(error), headers.get("retry-after")
        )

    def with_key(self, key: str) -> Client:
        return LiteLLM(self._url, key)

    def close(self) -> None:
        """Its connections belong to the package."""


class DSPy:
    """The `dspy` package's LM."""

    name = "dspy"
    cannot: Mapping[str, str] = {
        "stream": "it streams programs, not chats",
        "finish": "its answers do not say why they ended",
        "tool_choice": "its LM passes no choice on that names a function",
    }

    def __init__(self, url: str, key: str = KEY) -> None:
        self._url = url
        self._known = {"api_base": f"{url}/v1", "api_key": key, "cache": False, "num_retries": 0}

    def ask(self, model: str, messages: list[dict[str, Any]], **features: Any) -> Answer:
        import dspy

        lm = dspy.LM(f"openai/{model}", **self._known, **features)
        outputs = lm(messages=messages)
        usage = lm.history[-1]["usage"]
        first = outputs[0] if isinstance(outputs[0], dict) else {}
        calls = [plain(call) for call in first.get("tool_calls") or ()]
        logprobs = plain(first.get("logprobs")) or {}
        return Answer(
            texts=[each.get("text") or "" if isinstance(each, dict) else each for each in outputs],
            calls=[(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls],
            ids=[call["id"] for call in calls],
            counts=(usage["prompt_tokens"], usage["completion_tokens"]),
            tokens=[_token(each) for each in logprobs.get("content") or ()],
        )

    def pieces(self, model: str, messages: list[dict[str, Any]], **features: Any) -> Iterator[Answer]:
        raise NotImplementedError(self.cannot["stream"])

    def failure(self, error: Exception) -> Failure:
        return Failure(type(error).__name__, getattr(error, "status", None), str(error))

    def with_key(self, key: str) -> Client:
        return DSPy(self._url, key)

    def close(self) -> None:
        """Its connections belong to the package."""


CLIENTS: list[type[Any]] = [OpenAI, Ollama, LiteLLM, DSPy]


def plain(value: Any) -> Any:
    """A package's own object as JSON would have it."""
    return value.model_dump() if hasattr(value, "model_dump") else value


def from_openai(answer: Any) -> Answer:
    """A chat.completion as an object with attributes."""
    found = plain(answer)
    first = found["choices"][0]
    calls = first["message"].get("tool_calls") or []
    return Answer(
        texts=[choice["message"].get("content") or "" for choice in found["choices"]],
        calls=[(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls],
        ids=[call["id"] for call in calls],
        finish=first["finish_reason"],
        counts=(found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]),
        tokens=[_token(each) for each in (first.get("logprobs") or {}).get("content") or ()],
        homestill=found.get("homestill"),
    )


def from_chunk(chunk: Any) -> Answer:
    """A chat.completion.chunk as an object with attributes."""
    found = plain(chunk)
    usage = found.get("usage")
    counts = (usage["prompt_tokens"], usage["completion_tokens"]) if usage else None
    choice = found["choices"][0] if found["choices"] else {"delta": {}}
    delta = choice["delta"] or {}
    return Answer(
        texts=[delta.get("content") or ""],
        calls=[
            (call["function"].get("name") or "", call["function"].get("arguments") or "")
            for call in delta.get("tool_calls") or ()
        ],
        finish=choice.get("finish_reason"),
        counts=counts,
        tokens=[_token(each) for each in (choice.get("logprobs") or {}).get("content") or ()],
        homestill=found.get("homestill"),
    )


def _token(each: Mapping[str, Any]) -> tuple[str, float, int]:
    return each["token"], each["logprob"], len(each.get("top_logprobs") or ())
