"""What may leave this machine: of all rules that apply to a request, the strictest one holds."""

from __future__ import annotations

from typing import get_args

from serve.config import Egress
from serve.errors import ApiError

STRICTNESS: tuple[Egress, ...] = get_args(Egress)


def strictest(*rules: Egress) -> Egress:
    """Of `allow` < `redact` < `never`."""
    return max(rules, key=STRICTNESS.index, default="allow")


def from_header(value: str | None) -> Egress:
    """What a request's x-homestill-egress asks for; `allow` where it says nothing.

    Raises:
        ApiError: it says something else. Nothing is guessed: the request is not let out.
    """
    for rule in STRICTNESS:
        if rule == (value or "allow").strip().lower():
            return rule
    raise ApiError(
        400,
        f'x-homestill-egress is "{str(value)[:40]}"; use {", ".join(STRICTNESS)}',
        param="x-homestill-egress",
    )
