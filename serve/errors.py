"""Every error that the server raises on purpose, but for `serve.release.ReleaseInvalid`.

ServeError                    the message is value, rule, remedy
├── SettingsError             environment or arguments; lists every fault
├── UpstreamError             a model did not answer; names which
│   ├── UpstreamDown          not reachable, too slow, overloaded, or its answer is broken
│   └── UpstreamRefused       the request is at fault, another model would say the same
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
    """

    def __init__(
        self,
        who: str,
        message: str,
        *,
        status: int | None = None,
        body: Mapping[str, Any] | None = None,
        retry_after: str | None = None,
    ) -> None:
        self.who = who
        self.status = status
        self.body = body
        self.retry_after = retry_after
        super().__init__(message)


class UpstreamDown(UpstreamError):
    """It cannot be reached, is too slow or overloaded, refuses our key, or answers nonsense."""


class UpstreamRefused(UpstreamError):
    """It understood the request and found it at fault."""


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
