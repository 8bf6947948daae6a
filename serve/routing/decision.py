"""Who answered and why: the `x-homestill-…` headers, and the same in the body."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from serve.routing.policy import Reason

Route = Literal["local", "teacher"]


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
        return asdict(self)

    def headers(self) -> dict[str, str]:
        """The same as headers; words as they are, the rest as JSON writes it."""
        return {
            f"x-homestill-{name.replace('_', '-')}": value if isinstance(value, str) else json.dumps(value)
            for name, value in asdict(self).items()
        }
