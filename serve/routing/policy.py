"""What may be answered locally, decided before anything is generated. Pure functions of the request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.fingerprint import fingerprint, query
from serve.manifest import PredictorPrompt
from serve.routing.decision import Route

LOCAL_FIELDS = frozenset(
    {
        "model",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        # How to sample. The local model answers as it was certified, and greedily at that: the most
        # likely answer is a draw that each of these allows.
        "temperature",
        "top_p",
        "seed",
        # Done to the answer after it was decided on: cut it, show its log-probabilities.
        "stop",
        "logprobs",
        "top_logprobs",
    }
)
"""Request fields that do not keep a request from the local model."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
}
"""Values of other fields that ask for nothing; null asks for nothing everywhere."""
LOCAL_CALL = "call_local_"
"""How the ids of the local model's tool calls begin: they come back with the tool's result."""
BYTES_PER_TOKEN = 16
"""A text of more bytes than this for each token of the context does not fit, whatever the tokenizer."""


@dataclass(frozen=True)
class Question:
    """A request that a predictor of the release was made for."""

    messages: list[dict[str, str]]
    """Role and text, stripped: what the local model is given."""
    predictor: PredictorPrompt
    query: str
    """The variable part of the last message."""


def demands(request: Mapping[str, Any]) -> list[str]:
    """Fields by which a request asks for more than plain text, sorted; only a teacher is asked for that."""
    return sorted(
        name
        for name, value in request.items()
        if name not in LOCAL_FIELDS and value is not None and value not in NEUTRAL.get(name, ())
    )


def conversation(request: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """Role and stripped text of every message; None when a message holds anything else."""
    messages = [_plain(message) for message in request["messages"]]
    return [message for message in messages if message] if all(messages) else None


def match(messages: Sequence[dict[str, str]], predictors: Sequence[PredictorPrompt]) -> Question | None:
    """The question that `messages` put to one of the certified prompts, or None."""
    if not messages or messages[-1]["role"] != "user":
        return None
    found = fingerprint(messages)
    for predictor in predictors:
        if predictor.fingerprint == found:
            asked = query(messages[-1]["content"], predictor.prefix, predictor.suffix)
            if asked is not None:
                return Question(list(messages), predictor, asked)
    return None


def tool_loop(request: Mapping[str, Any]) -> Route | None:
    """Who began the tool loop that this conversation is in; None where it is in none.

    A model goes on with its own calls only: ids and habits of another one would confuse it.
    """
    called = [message for message in request["messages"] if message.get("tool_calls")]
    if not called or request["messages"][-1].get("role") not in ("tool", "function"):
        return None
    identity = called[-1]["tool_calls"][0].get("id")
    return "local" if str(identity).startswith(LOCAL_CALL) else "teacher"


def too_long(messages: Sequence[Mapping[str, Any]], context: int) -> bool:
    """Whether these messages can be seen, without a tokenizer, not to fit into a context of so many tokens."""
    size = sum(len(str(message.get("content") or "").encode(errors="replace")) for message in messages)
    return size > context * BYTES_PER_TOKEN


def asked(request: Mapping[str, Any]) -> str:
    """The text of the last user message: what a request without a certified prompt is about."""
    for message in reversed(request["messages"]):
        if message.get("role") == "user":
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            return "\n".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
    return ""


def _plain(message: Mapping[str, Any]) -> dict[str, str] | None:
    if any(value is not None for name, value in message.items() if name not in ("role", "content")):
        return None
    content = message.get("content")
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        part = content[0]
        content = part.get("text") if part.get("type") == "text" and part.keys() == {"type", "text"} else None
    return {"role": str(message["role"]), "content": content.strip()} if isinstance(content, str) else None
