"""Every error that the server raises on purpose, but for `serve.release.ReleaseInvalid`.

ServeError                    the message is value, rule, remedy
├── SettingsError             environment or arguments; lists every fault
├── UpstreamError             a model did not answer; names which
│   ├── UpstreamDown          not reachable, too slow, overloaded, or its answer is broken
│   │   └── UpstreamBusy      ours has more waiting than it may
│   └── UpstreamRefused       the request is at fault, another model would say the same
├── Unaffordable              a call is not made for what it might cost
│   ├── BudgetExceeded        more than is left
│   └── BudgetUnknown         there is a cap, and nobody knows
├── Unredactable              what must not leave cannot be told apart from the rest
├── EmbeddedError             the embedded runtime does not start
├── JournalError              the journal cannot be opened or written
└── ApiError                  what a client is told, in OpenAI's shape
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any


class ServeError(Exception):
    """Base of all."""


class SettingsError(ServeError):
    """Faults in the environment or the arguments, one a line."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


class UpstreamError(ServeError):
    """A model did not answer.

    Args:
        who: `teacher` or `local`.
        message: what happened, without secrets.
        status: the HTTP status that it gave; None where there was none.
        body: its error in OpenAI's shape, where it gave one.
        retry_after: its Retry-After header.
        billable: it has worked on the request, or may have, and may want to be paid for it.
    """

    def __init__(
        self,
        who: str,
        message: str,
        *,
        status: int | None = None,
        body: Mapping[str, Any] | None = None,
        retry_after: str | None = None,
        billable: bool = False,
    ) -> None:
        self.billable = billable
        self.who = who
        self.status = status
        self.body = body
        self.retry_after = retry_after
        super().__init__(message)


class UpstreamDown(UpstreamError):
    """It cannot be reached, is too slow or overloaded, refuses our key, or answers nonsense."""


class UpstreamRefused(UpstreamError):
    """It understood the request and found it at fault."""


class UpstreamBusy(UpstreamDown):
    """As many requests wait for the local model as are let wait."""


class Unaffordable(ServeError):
    """A call is not made for what it might cost."""


class BudgetUnknown(Unaffordable):
    """There is a cap, and what the call may cost at most is not known."""


class Unredactable(ServeError):
    """A request holds something in which personal data cannot be searched for."""


class BudgetExceeded(Unaffordable):
    """It might pass a cap.

    Args:
        scope: whose cap: `all`, `task tickets` or `key alice`.
        retry_after_s: seconds until the day ends and the cap begins anew.
    """

    def __init__(self, scope: str, cap_usd: float, spent_usd: float, retry_after_s: float) -> None:
        self.scope = scope
        self.cap_usd = cap_usd
        self.spent_usd = spent_usd
        self.retry_after_s = retry_after_s
        super().__init__(
            f"the cap of {scope}, ${cap_usd:g} a day, leaves no room for this call (${spent_usd:g} are spent or "
            "reserved); raise daily_usd in serve.yaml or of the key, or wait until midnight UTC"
        )


class EmbeddedError(ServeError):
    """The embedded runtime does not start, or does not answer."""


class JournalError(ServeError):
    """The journal cannot be opened, or what was recorded cannot be written."""


class ApiError(ServeError):
    """What a client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            kind: OpenAI's `error.type`.
            param: the request field at fault.
            body: an upstream's own error, passed on as it is.
        """
        self.status = status
        self.headers = dict(headers or {})
        self.body: dict[str, Any] = (
            dict(body)
            if body
            else {"error": {"message": message, "type": kind, "param": param, "code": code}}
        )
        super().__init__(message)


def unknown_model(name: str, known: Collection[str]) -> ApiError:
    """OpenAI's 404."""
    return ApiError(
        404,
        f'the model "{name}" does not exist; there is {", ".join(sorted(known)) or "no release yet"}',
        param="model",
        code="model_not_found",
    )
