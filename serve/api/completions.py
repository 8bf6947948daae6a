"""POST /v1/completions: OpenAI's older API, as a chat with one message."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.api.chat import Chat
from serve.api.checks import parsed, refuse, shown, validated
from serve.api.replies import EventStream
from serve.wire.sse import dumps

OWN = frozenset({"prompt", "suffix", "echo", "best_of", "logprobs"})
"""Fields that a chat does not have, or has in another form."""
CHATS = ("messages", "tools", "tool_choice", "functions", "function_call", "response_format", "top_logprobs")
"""Fields that a completion does not have; its answer has no place for what they ask for."""
MOST_ALTERNATIVES = 5


class Completions:
    """
    Args:
        chat: answers.
    """

    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def routes(self) -> list[Route]:
        return [Route("/v1/completions", self.create, methods=["POST"])]

    async def create(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = parsed(await self._chat.body(request))
        asked = as_chat(body)
        reply = await self._chat.ask(request, asked, endpoint="completions")
        start = asked["messages"][0]["content"] if body.get("echo") else ""
        if reply.events is not None:
            return EventStream(_chunks(reply.events, start), reply.headers)
        answer = _completion(reply.answer or {}, start)
        return Response(dumps(answer), headers=reply.headers, media_type="application/json")


def as_chat(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat request that a completion request is.

    Raises:
        ApiError: 400 with every fault found.
    """
    prompt, faults = _prompt(body.get("prompt"))
    faults += [(name, told) for name, told in _faults(body).items() if told]
    refuse(faults)
    told = {name: value for name, value in body.items() if name not in OWN}
    told["messages"] = [{"role": "user", "content": prompt}]
    if body.get("logprobs") is not None:
        told |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    return validated(told)


def _prompt(given: Any) -> tuple[str, list[tuple[str, str]]]:
    """A text, alone or as a list's only one."""
    alone = given[0] if isinstance(given, list) and len(given) == 1 else given
    if isinstance(alone, str):
        return alone, []
    return "", [("prompt", f"prompt is {shown(given)}; send one text a request, and no tokens")]


def _faults(body: Mapping[str, Any]) -> dict[str, str]:
    suffix, echo, most = body.get("suffix"), body.get("echo"), body.get("logprobs")
    best, count = body.get("best_of"), body.get("n") or 1
    faults = {}
    if suffix:
        faults["suffix"] = f"suffix is {shown(suffix)}; leave it out: no model here fills in a gap"
    if best not in (None, 1, count) or isinstance(best, bool):
        faults["best_of"] = f"best_of is {shown(best)}; leave it out, or make it n"
    if echo is not None and not isinstance(echo, bool):
        faults["echo"] = f"echo is {shown(echo)}; use true or false"
    whole = isinstance(most, int) and not isinstance(most, bool)
    if most is not None and not (whole and 0 <= most <= MOST_ALTERNATIVES):
        faults["logprobs"] = f"logprobs is {shown(most)}; use 0 to {MOST_ALTERNATIVES}"
    elif most is not None and echo:
        faults["logprobs"] = "logprobs of a prompt are not known; leave out echo or logprobs"
    for name in CHATS:
        if body.get(name) is not None:
            faults[name] = f"{name} is no field of a completion; use /v1/chat/completions"
    return faults


def _completion(answer: Mapping[str, Any], start: str) -> dict[str, Any]:
    choices = []
    for choice in answer["choices"]:
        text = start + _text(choice["message"])
        choices.append(_choice(choice, text, _logprobs(choice, 0)))
    return {**answer, "object": "text_completion", "choices": choices}


async def _chunks(events: AsyncGenerator[bytes], start: str) -> AsyncGenerator[bytes]:
    """The stream's chunks as a completion's; signs of life and errors pass through."""
    lengths: dict[int, int] = {}
    async with aclosing(events) as stream:
        async for data in stream:
            if not data:
                yield data
                continue
            chunk = orjson.loads(data)
            if chunk.get("error"):
                yield data
                return
            told = [each for choice in chunk["choices"] if (each := _piece(choice, start, lengths))]
            if told or not chunk["choices"] or "homestill" in chunk:
                yield dumps({**chunk, "object": "text_completion", "choices": told})


def _piece(choice: Mapping[str, Any], start: str, lengths: dict[int, int]) -> dict[str, Any] | None:
    """A piece of a choice; None for one that says nothing. `lengths`: what each has said so far."""
    index = choice.get("index") or 0
    text = _text(choice.get("delta") or {})
    logprobs = _logprobs(choice, lengths.get(index, 0))
    if index not in lengths:
        text = start + text
    if not text and not logprobs and not choice.get("finish_reason"):
        return None
    lengths[index] = lengths.get(index, 0) + len(text)
    return _choice(choice, text, logprobs)


def _choice(choice: Mapping[str, Any], text: str, logprobs: Any) -> dict[str, Any]:
    return {
        "index": choice.get("index") or 0,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": choice.get("finish_reason"),
    }


def _text(message: Mapping[str, Any]) -> str:
    return message.get("content") or message.get("refusal") or ""


def _logprobs(choice: Mapping[str, Any], offset: int) -> dict[str, Any] | None:
    """In the older form: lists side by side. `offset`: characters of the text before these tokens."""
    tokens = (choice.get("logprobs") or {}).get("content")
    if not tokens:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token["token"])
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [
            {other["token"]: other["logprob"] for other in token.get("top_logprobs") or ()}
            for token in tokens
        ],
        "text_offset": offsets,
    }
