"""What goes over the wire: JSON, and server-sent events as far as chat streams use them."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

LONGEST = 4 * 1024 * 1024
DONE = b"[DONE]"
_LINE_END = re.compile(rb"\r\n|\n|\r(?=[^\n])")  # a lone \r at the end may be half of \r\n: wait for more


class EventTooLong(ValueError):
    """An event passed LONGEST bytes without an end."""


class Parser:
    """Cuts a byte stream into the data of its events, wherever the stream itself is cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, received: bytes) -> list[bytes]:
        """The data of every event that is complete now; an event that never ends in a blank line never comes.

        Raises:
            EventTooLong: an event is longer than LONGEST bytes.
        """
        *lines, self._rest = _LINE_END.split(self._rest + received)
        events = []
        for line in lines:
            if line:
                self._keep(line)
            elif self._data:
                events.append(b"\n".join(self._data))
                self._data, self._size = [], 0
        if len(self._rest) + self._size > LONGEST:
            raise EventTooLong(f"an event is longer than {LONGEST} bytes")
        return events

    def _keep(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            data = value.removeprefix(b" ")
            self._data.append(data)
            self._size += len(data)


def dumps(value: Any) -> bytes:
    """JSON in UTF-8; what orjson does not write (a lone surrogate, as JSON's own escape; a huge integer) too."""
    try:
        return orjson.dumps(value)
    except TypeError:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return text.encode(errors="backslashreplace")


def emit(data: bytes) -> bytes:
    """One event with this data, which holds no line end (JSON written by us never does)."""
    return b"data: " + data + b"\n\n"
