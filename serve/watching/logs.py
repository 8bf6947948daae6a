"""The log: one line a request and one for every event, as text or as JSON. Never a body, never a key."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from serve.records.entry import Entry

FIELDS = (
    "endpoint",
    "asked",
    "task",
    "key",
    "status",
    "route",
    "reason",
    "confidence",
    "threshold",
    "guarantee",
    "degraded",
    "release",
    "model",
    "prompt_tokens",
    "completion_tokens",
    "cost_usd",
    "latency_ms",
    "first_token_ms",
    "overhead_ms",
)
"""Of the entry. Not its error: that repeats what an upstream said, and so perhaps what it was asked; the
journal has it under the same id."""
PLAIN = re.compile(r"[A-Za-z0-9_.:/@+-]+")
"""What stands in the text without quotes."""
CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127)}
"""A line stays one line, and moves no terminal's cursor."""
DEFAULTS = {"degraded": False, "guarantee": "none"}

logger = logging.getLogger("serve.access")


class AccessLog:
    """Writes one line for every ended request.

    Args:
        to: `serve.access`, or a logger of a test's own.
    """

    def __init__(self, to: logging.Logger = logger) -> None:
        self._logger = to

    def observe(self, entry: Entry) -> None:
        """Log an ended request, as a warning where we failed it."""
        level = logging.WARNING if entry.status >= 500 else logging.INFO
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "request", extra={"request": facts(entry)})


def facts(entry: Entry) -> dict[str, Any]:
    """What is logged of a request: what is known and says something."""
    known: dict[str, Any] = {"id": entry.id}
    for name in FIELDS:
        value = getattr(entry, name)
        if value is not None and value != DEFAULTS.get(name):
            known[name] = value
    return known


class TextFormatter(logging.Formatter):
    """`<time> <LEVEL> <message> <name>=<value> …`, one line whatever a value holds."""

    def format(self, record: logging.LogRecord) -> str:
        pairs = getattr(record, "request", {}).items()
        values = "".join(f" {name}={_plain(value)}" for name, value in pairs)
        line = f"{_time(record)} {record.levelname} {record.getMessage()}{values}"
        return line.translate(CONTROL) + _trace(self, record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname.lower(), "message": record.getMessage()}
        trace = _trace(self, record).strip()
        request = getattr(record, "request", {})
        return json.dumps(line | ({"trace": trace} if trace else {}) | request, ensure_ascii=False)


@contextmanager
def configured(log_format: Literal["text", "json"], stream: TextIO | None = None) -> Iterator[logging.Logger]:
    """Let the loggers `serve` and `uvicorn` and those below them write, until the block ends; then all is as before.

    Args:
        stream: None: standard error.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    with ExitStack() as stack:
        for name in ("serve", "uvicorn"):
            stack.enter_context(_writing(logging.getLogger(name), handler))
        yield logging.getLogger("serve")


@contextmanager
def _writing(target: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    level, propagate = target.level, target.propagate
    target.addHandler(handler)
    target.setLevel(logging.INFO)
    target.propagate = False  # or a handler of the root's writes every line again
    try:
        yield
    finally:
        target.removeHandler(handler)
        target.setLevel(level)
        target.propagate = propagate


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return f"\n{formatter.formatException(record.exc_info)}" if record.exc_info else ""


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else json.dumps(value)
    return str(value)
