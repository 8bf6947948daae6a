"""What is known of a served request when it has ended."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson


def stamp(moment: datetime) -> str:
    """UTC in ISO 8601 with milliseconds: such texts sort as the moments do."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")


@dataclass
class Entry:
    """One served request; never changed. None where a figure is not known or does not apply.

    Not frozen: that sets each of its fields through a call, which costs more than all the rest of it.
    """

    id: str
    """The request id that the client saw."""
    asked: str
    """`model` as the client sent it."""
    messages: list[Any]
    """Empty where the rules keep no bodies."""
    status: int
    """HTTP status; 499 where the client went away before the end."""
    latency_ms: float
    overhead_ms: float
    """Part of the latency that was not spent waiting for a model."""
    task: str | None = None
    release: str | None = None
    predictor: str | None = None
    route: str | None = None
    """None where nobody answered."""
    reason: str | None = None
    confidence: float | None = None
    threshold: float | None = None
    guarantee: str = "none"
    degraded: bool = False
    streamed: bool = False
    model: str | None = None
    """The model that answered."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost_usd: float | None = None
    """What the teacher cost; None where its price or its tokens are not known."""
    answer: dict[str, Any] | None = None
    """The message that was answered, in OpenAI's shape."""
    local_answer: str | None = None
    """What the local model said, where the teacher was asked after it."""
    error: str | None = None
    key: str | None = None
    """Name of the API key."""
    egress: str | None = None
    """What was let leave this machine: allow, redact or never. The bodies of such an entry obey it too."""
    strategy: str | None = None
    endpoint: str | None = None
    """chat, completions, ollama, predict or embeddings; audit and shadow for questions that no client asked."""
    first_token_ms: float | None = None
    attempts: int | None = None
    """How often the teacher was asked."""
    audit: float | None = None
    """Share of the fields in which the local answer and the teacher's agree (1: all), where both were asked."""
    audited: str | None = None
    """The request that an audit or a shadow belongs to."""
    created: str = field(default_factory=lambda: stamp(datetime.now(UTC)))


def to_line(entry: Entry) -> bytes:
    """The entry as JSON without a line end. Half a surrogate pair, which is no text, becomes a question mark.

    Raises:
        TypeError, ValueError: its messages or its answer hold what JSON does not know.
    """
    values = vars(entry)
    try:
        return orjson.dumps(values)
    except TypeError:  # also an integer beyond 64 bits, which json writes
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
        return text.encode(errors="replace")


def from_line(line: bytes) -> Entry:
    """The entry that `to_line` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        return Entry(**orjson.loads(line))
    except TypeError as error:
        raise ValueError(str(error)) from error
