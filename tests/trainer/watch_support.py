"""Journal entries for the tests of the watch."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from serve.records.entry import stamp
from serve.records.journal import Entry


def entry(identity: str, task: str, created: datetime, **changes: Any) -> Entry:
    """An entry that the teacher answered; keyword arguments replace fields of it."""
    values: dict[str, Any] = {
        "id": identity,
        "asked": task,
        "messages": [{"role": "user", "content": "a question"}],
        "status": 200,
        "latency_ms": 5.0,
        "overhead_ms": 1.0,
        "task": task,
        "route": "teacher",
        "predictor": "sort",
        "egress": "allow",
        "answer": {"role": "assistant", "content": "an answer"},
        "created": stamp(created),
    }
    return Entry(**values | changes)
