"""The log: one line a request and one for every event, as text or as JSON. Never a body, never a key."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, TextIO

from serve.records.entry import Entry

LogFormat = Literal["text", "json"]
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


class AccessLog:
    """Writes one line for every ended request.

    Not through `logging`: what that does for a record costs several times what the line does, for every request.

    Args:
        stream: None: standard error.
    """

    def __init__(self, log_format: LogFormat, stream: TextIO | None = None) -> None:
        self._write = (stream or sys.stderr).write
        self._line = _json_line if log_format == "json" else _text_line

    def observe(self, entry: Entry) -> None:
        """Log an ended request, as a warning where we failed it."""
        level = "WARNING" if entry.status >= 500 else "INFO"
        self._write(self._line(time.time(), level, "request", facts(entry)) + "\n")


def facts(entry: Entry) -> dict[str, Any]:
    """What is logged of a request: what is known and says something."""
    values = vars(entry)
    known = {name: values[name] for name in ("id", *FIELDS) if values[name] is not None}
    for name, default in DEFAULTS.items():
        if known[name] == default:
            del known[name]
    return known


def _text_line(moment: float, level: str, message: str, request: Mapping[str, Any]) -> str:
    """`<time> <LEVEL> <message> <name>=<value> …`, one line whatever a value holds."""
    values = "".join([f" {name}={_plain(value)}" for name, value in request.items()])
    return f"{_time(moment)} {level} {message}{values}".translate(CONTROL)


def _json_line(moment: float, level: str, message: str, request: Mapping[str, Any]) -> str:
    line = {"time": _time(moment), "level": level.lower(), "message": message, **request}
    return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """An event as text, with its traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        line = _text_line(record.created, record.levelname, record.getMessage(), {})
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


class JsonFormatter(logging.Formatter):
    """An event as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        trace = {"trace": self.formatException(record.exc_info)} if record.exc_info else {}
        return _json_line(record.created, record.levelname, record.getMessage(), trace)


@contextmanager
def configured(log_format: LogFormat, stream: TextIO | None = None) -> Iterator[logging.Logger]:
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


def _time(moment: float) -> str:
    whole = int(moment)
    return f"{_second(whole)}.{int((moment - whole) * 1000):03}+00:00"


@lru_cache(maxsize=8)
def _second(since_1970: int) -> str:
    return datetime.fromtimestamp(since_1970, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else json.dumps(value)
    return str(value)
