"""Who answered and why: the `x-homestill-…` headers, and the same in the body."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

Route = Literal["local", "teacher"]
Reason = Literal[
    "confident",
    "low_confidence",
    "unparsable",
    "out_of_distribution",
    "too_long",
    "not_this_task",
    "unsupported",
    "tool_loop",
    "policy",
    "budget",
    "optimistic",
    "teacher_down",
    "local_down",
    "local_busy",
    "no_release",
    "offline",
]
"""Why a request went where it went; the values of `x-homestill-reason`."""


@dataclass(frozen=True)
class Decision:
    """One request's outcome; None where a figure does not apply or is not known (never 0 instead)."""

    route: Route
    reason: Reason
    confidence: float | None = None
    threshold: float | None = None
    guarantee: str = "none"
    """`keep@confidence` of the certificate that covers this answer, or `none`."""
    release: str | None = None
    degraded: bool = False
    """The teacher should have answered, and could not."""
    cost_usd: float | None = None
    """Paid to the teacher for this answer: 0 for a local one, None where price or tokens are not known (yet)."""
    overhead_ms: float | None = None
    """Time that was not spent waiting for a model."""

    def body(self) -> dict[str, Any]:
        """The `homestill` object of an answer."""
        return dict(self.__dict__)

    def headers(self) -> dict[str, str]:
        """The same as headers; words as they are, the rest as JSON writes it."""
        return {HEADERS[name]: _written(value) for name, value in self.__dict__.items()}


HEADERS = {field.name: f"x-homestill-{field.name.replace('_', '-')}" for field in fields(Decision)}


def _written(value: str | float | bool | None) -> str:
    if isinstance(value, str):
        return value
    return "null" if value is None else str(value).lower()
