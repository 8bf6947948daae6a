"""Who is let in, for which task, and what may leave with the request: decided before anything is read or routed."""

from __future__ import annotations

from starlette.requests import Request

from serve.config import Config, Egress
from serve.errors import ApiError, unknown_model
from serve.guard.egress import from_header, strictest
from serve.guard.keys import Caller, Keys

EGRESS_HEADER = "x-homestill-egress"


class Door:
    """Checks keys and rules.

    Args:
        keys: of the clients.
        config: the rules of every task.
    """

    def __init__(self, keys: Keys, config: Config) -> None:
        self._keys = keys
        self._config = config

    def caller(self, request: Request) -> Caller:
        """Who asks.

        Raises:
            ApiError: 401, the key is missing or not one of ours.
        """
        caller = self._keys.who(request.headers.get("authorization"))
        if caller is None:
            raise ApiError(
                401,
                self._keys.problem
                or "the API key is missing or unknown; send Authorization: Bearer <key> "
                "(keys come from HOMESTILL_API_KEYS or `python -m serve keys add`)",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return caller

    def is_open_to(self, request: Request) -> bool:
        """Whether this client may see what is not for everybody."""
        return self._keys.who(request.headers.get("authorization")) is not None

    def check_task(self, caller: Caller, task: str) -> None:
        """
        Raises:
            ApiError: 404 for a task that the key is not for: it is not told that there is one.
        """
        if caller.tasks is not None and task not in caller.tasks:
            raise unknown_model(task, caller.tasks)

    def egress(self, request: Request, caller: Caller, task: str) -> Egress:
        """The strictest of what task, key and request header say.

        Raises:
            ApiError: the header says something else; nothing is guessed.
        """
        header = from_header(request.headers.get(EGRESS_HEADER))
        return strictest(self._config.rules(task).egress, caller.egress, header)
