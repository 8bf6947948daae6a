"""What is served, and whether it is well: /v1/models and /healthz."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.api.door import Door
from serve.errors import unknown_model
from serve.records.journal import Journal
from serve.tasks import Tasks
from serve.wire.sse import dumps


class Models:
    """The tasks as OpenAI's models.

    Args:
        offline: no teacher client was constructed.
    """

    def __init__(self, door: Door, tasks: Tasks, journal: Journal, *, offline: bool) -> None:
        self._door = door
        self._tasks = tasks
        self._journal = journal
        self._offline = offline

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.all),
            Route("/v1/models/{name:path}", self.one),
            Route("/healthz", self.health),
        ]

    async def all(self, request: Request) -> Response:
        """GET /v1/models: the tasks that have a release and that this key is for."""
        caller = self._door.caller(request)
        names = [name for name in sorted(self._tasks.served) if caller.tasks is None or name in caller.tasks]
        return _json({"object": "list", "data": [self._model(name) for name in names]})

    async def one(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        caller, name = self._door.caller(request), request.path_params["name"]
        self._door.check_task(caller, name)
        if name not in self._tasks.served:
            raise unknown_model(name, self._tasks.served)
        return _json(self._model(name))

    async def health(self, request: Request) -> Response:
        """GET /healthz: open to all; why a release is not in use is told to those with a key."""
        names = sorted(self._tasks.served.keys() | self._tasks.problems.keys())
        told = self._door.is_open_to(request)
        return _json(
            {
                "status": "ok",
                "offline": self._offline,
                "journal": {"lost": self._journal.lost},
                "tasks": {name: self._health_of(name, told=told) for name in names},
            }
        )

    def _model(self, name: str) -> dict[str, Any]:
        served = self._tasks.served[name]
        release = served.release
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "homestill",
            "homestill": {
                "release": release.version,
                "certified": release.router.certified,
                "threshold": release.router.threshold,
                "guarantee": served.guarantee,
            },
        }

    def _health_of(self, name: str, *, told: bool) -> dict[str, Any]:
        served = self._tasks.served.get(name)
        problem = self._tasks.problems.get(name)
        return {
            "release": served.release.version if served else None,
            "local": bool(served and served.local),
        } | ({"problem": problem if told else "see the log"} if problem else {})


def _json(value: Any) -> Response:
    return Response(dumps(value), media_type="application/json")
