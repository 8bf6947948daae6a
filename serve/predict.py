"""POST /v1/predict/{task}: a task's own DSPy program, run on the hybrid; inputs and outputs are JSON.

Every call that the program makes of a model goes through the router and is journaled as a request of
its own, `<request id>-<number of the call>`; in a batch `<request id>-<row>-<number>`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve import interface
from serve.api.chat import Left, new_identity, read
from serve.api.checks import parsed, refuse, shown
from serve.api.disconnect import ClientGone, while_connected
from serve.api.door import Door
from serve.config import Egress
from serve.errors import ApiError, unknown_model
from serve.guard.keys import Caller
from serve.interface import Interface
from serve.predict_lm import Engine, Stopped, run
from serve.predict_program import Loaded, load, program_fault
from serve.release import ReleaseInvalid
from serve.tasks import Served, Tasks
from serve.wire.sse import dumps

THREADS = 32
"""Predictions that are worked on at once; each holds a thread while its models are asked."""
MOST_AT_ONCE = 16
AT_ONCE = 4
LONGEST_BATCH = 1000
logger = logging.getLogger("serve")


class Complete(Protocol):
    """Answers a chat request of this process's own, whole, as `Chat.complete` does."""

    async def __call__(
        self,
        body: Mapping[str, Any],
        *,
        caller: Caller,
        egress: Egress,
        endpoint: str,
        identity: str | None = None,
    ) -> dict[str, Any]:
        """
        Raises:
            ApiError: nobody can answer.
        """
        ...


@dataclass(frozen=True)
class _Asked:
    """One HTTP request, let in."""

    identity: str
    served: Served
    caller: Caller
    egress: Egress
    body: Mapping[str, Any]

    @property
    def task(self) -> str:
        return self.served.release.manifest.task


class Predict:
    """Runs tasks' programs.

    Args:
        tasks: whose releases hold the programs.
        complete: the router, for each call of a program.
        door: lets clients in.
        body_bytes: how much is read.
        threads: predictions at once; further ones wait.
    """

    def __init__(
        self, tasks: Tasks, complete: Complete, door: Door, body_bytes: int, *, threads: int = THREADS
    ) -> None:
        self._tasks = tasks
        self._complete = complete
        self._door = door
        self._body_bytes = body_bytes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="predict")
        self._loaded: dict[str, Loaded] = {}
        self._loading = asyncio.Lock()
        self._running: set[Engine] = set()
        self._interfaces: dict[str, Interface | None] = {}

    @property
    def running(self) -> int:
        """Predictions that have begun and not ended."""
        return len(self._running)

    def routes(self) -> list[Route]:
        return [
            Route("/v1/predict/{task}", self.predict, methods=["POST"]),
            Route("/v1/predict/{task}/batch", self.batch, methods=["POST"]),
        ]

    def interfaces(self) -> dict[str, Interface]:
        """What each served task takes and gives; tasks whose releases do not say so are left out."""
        releases = {name: served.release for name, served in self._tasks.served.items()}
        versions = {release.version for release in releases.values()}
        self._interfaces = {key: kept for key, kept in self._interfaces.items() if key in versions}
        for release in releases.values():
            if release.version not in self._interfaces:
                self._interfaces[release.version] = _interface(release.interface)
        found = {name: self._interfaces[release.version] for name, release in releases.items()}
        return {name: known for name, known in found.items() if known}

    async def predict(self, request: Request) -> Response:
        """One prediction; an object with `batch` is a batch, unless the program has an input of that name."""
        asked = await self._asked(request)
        loaded = await self._program(asked)
        if "batch" in asked.body and "batch" not in loaded.inputs.names:
            return await self._batched(request, asked, loaded)
        found = await _connected(request, self._one(asked, loaded, asked.body, asked.identity))
        return _json(found, {"x-request-id": asked.identity, **_headers(found["homestill"])})

    async def batch(self, request: Request) -> Response:
        """Many predictions in one request."""
        asked = await self._asked(request)
        return await self._batched(request, asked, await self._program(asked))

    async def close(self) -> None:
        """Stop every prediction under way."""
        for engine in list(self._running):
            engine.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _asked(self, request: Request) -> _Asked:
        caller, task = self._door.caller(request), request.path_params["task"]
        self._door.check_task(caller, task)
        egress = self._door.egress(request, caller, task)
        served = self._tasks.served.get(task)
        if served is None:
            raise unknown_model(task, caller.tasks if caller.tasks is not None else self._tasks.served)
        body = parsed(await read(request, self._body_bytes))
        return _Asked(new_identity(), served, caller, egress, body)

    async def _program(self, asked: _Asked) -> Loaded:
        """The program of the release that is in use; those of others are let go."""
        release = asked.served.release
        async with self._loading:  # once, however many wait for it
            in_use = {name: served.release.version for name, served in self._tasks.served.items()}
            self._loaded = {
                task: kept for task, kept in self._loaded.items() if in_use.get(task) == kept.version
            }
            found = self._loaded.get(asked.task)
            if found is None or found.version != release.version:
                found = await self._load(asked)
                self._loaded[asked.task] = found
            return found

    async def _load(self, asked: _Asked) -> Loaded:
        try:
            return await asyncio.to_thread(load, asked.served.release)
        except ReleaseInvalid as error:
            raise ApiError(503, str(error), kind="server_error", code="release_invalid") from error
        except ApiError as error:
            logger.error("task %s: %s", asked.task, error)
            raise

    async def _batched(self, request: Request, asked: _Asked, loaded: Loaded) -> Response:
        rows, at_once = _batch(asked.body)
        places = asyncio.Semaphore(at_once)

        async def answered(number: int, row: Any) -> dict[str, Any]:
            async with places:
                try:
                    return await self._one(asked, loaded, row, f"{asked.identity}-{number}")
                except ApiError as error:
                    return {"outputs": None, "homestill": None, **error.body}

        working = asyncio.gather(*(answered(number, row) for number, row in enumerate(rows, 1)))
        results = await _connected(request, _awaited(working))
        calls = [call for each in results for call in (each["homestill"] or {}).get("calls", ())]
        summary = _summary(asked, calls)
        summary.pop("calls")  # they stand with their rows
        body = {"results": results, "homestill": summary}
        return _json(body, {"x-request-id": asked.identity, **_headers(summary)})

    async def _one(self, asked: _Asked, loaded: Loaded, values: Any, identity: str) -> dict[str, Any]:
        """One prediction.

        Raises:
            ApiError: inputs at fault, a model out, or the program failed; with what was called until then.
        """
        if not isinstance(values, dict):
            refuse([("batch", f"a row is {shown(values)}; send an object with the inputs")])
        refuse(loaded.inputs.faults(values))
        loop = asyncio.get_running_loop()
        engine = Engine(partial(self._ask, asked, identity), loop, loaded)
        self._running.add(engine)
        try:
            outputs = await loop.run_in_executor(self._pool, run, loaded, values, engine)
        except Stopped as stopped:
            message = "the server is being stopped; ask again"
            raise ApiError(503, message, kind="server_error", headers={"Retry-After": "1"}) from stopped
        except Exception as error:
            raise _failed(asked, engine, error) from error
        finally:
            engine.stop()
            self._running.discard(engine)
        if engine.failed:  # the program went on without the answer; that is not what was certified
            raise _failed(asked, engine, engine.failed)
        return {"outputs": outputs, "homestill": _summary(asked, engine.calls)}

    async def _ask(self, asked: _Asked, identity: str, body: dict[str, Any], number: int) -> dict[str, Any]:
        return await self._complete(
            body,
            caller=asked.caller,
            egress=asked.egress,
            endpoint="predict",
            identity=f"{identity}-{number}",
        )


def _interface(path: Any) -> Interface | None:
    try:
        return interface.read(path) if path else None
    except ReleaseInvalid as error:
        logger.error("%s", error)
        return None


def _batch(body: Mapping[str, Any]) -> tuple[Sequence[Any], int]:
    """The rows, and how many of them at once."""
    rows, at_once = body.get("batch"), body.get("concurrency", AT_ONCE)
    faults = []
    if not isinstance(rows, list) or not 0 < len(rows) <= LONGEST_BATCH:
        told = f"batch is {shown(rows)}; send a list of 1 to {LONGEST_BATCH} objects with the inputs"
        faults.append(("batch", told))
    if isinstance(at_once, bool) or not isinstance(at_once, int) or not 1 <= at_once <= MOST_AT_ONCE:
        faults.append(("concurrency", f"concurrency is {shown(at_once)}; use 1 to {MOST_AT_ONCE}"))
    unknown = [name for name in body if name not in ("batch", "concurrency")]
    faults += [(name, f"{name} is no field of a batch; send batch and concurrency") for name in unknown]
    refuse(faults)
    return rows or [], at_once


def _failed(asked: _Asked, engine: Engine, error: BaseException) -> ApiError:
    """What the client is told: the model's error where one was out, else the program's."""
    told = {"homestill": _summary(asked, engine.calls)}
    headers = {"x-request-id": asked.identity}
    cause = engine.failed or _upstream(error)
    if cause is None:
        fault = program_fault(asked.task, error, body=told)
        fault.headers.update(headers)
        logger.error("request %s: the program of %s failed: %s", asked.identity, asked.task, _where(error))
        return fault
    return ApiError(
        cause.status, str(cause), headers={**cause.headers, **headers}, body={**cause.body, **told}
    )


def _upstream(error: BaseException | None) -> ApiError | None:
    """An error of the router that passed through DSPy."""
    while error is not None:
        if isinstance(error, ApiError):
            return error
        error = error.__cause__
    return None


def _where(error: BaseException) -> str:
    """Type and place of an error; its text may hold what must not be logged."""
    at = error.__traceback__
    while at and at.tb_next:
        at = at.tb_next
    place = f" at {at.tb_frame.f_code.co_filename}:{at.tb_lineno}" if at else ""
    return f"{type(error).__name__}{place}"


def _summary(asked: _Asked, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All calls in one: nothing is promised or known that is not so for each of them."""
    routes = {call["route"] for call in calls}
    guarantees = {call["guarantee"] for call in calls}
    return {
        "route": next(iter(routes)) if len(routes) == 1 else "mixed" if routes else None,
        "reason": _decisive(calls),
        "confidence": _all_or_none(min, [call["confidence"] for call in calls]),
        "threshold": asked.served.release.router.threshold,
        "guarantee": guarantees.pop() if len(guarantees) == 1 else "none",
        "release": asked.served.release.version,
        "degraded": any(call["degraded"] for call in calls),
        "cost_usd": _all_or_none(sum, [call["cost_usd"] for call in calls]) if calls else 0.0,
        "overhead_ms": _all_or_none(sum, [call["overhead_ms"] for call in calls]),
        "calls": list(calls),
    }


def _decisive(calls: Sequence[Mapping[str, Any]]) -> str | None:
    """Why not all of it is local and proven: the reason of the first call that is not; else that of all."""
    reasons = [
        call["reason"]
        for call in sorted(calls, key=lambda call: (call["route"] == "local", call["reason"] == "confident"))
    ]
    return reasons[0] if reasons else None


def _all_or_none(fold: Any, values: Sequence[float | None]) -> float | None:
    """The fold of all values; None where one is not known."""
    known = [value for value in values if value is not None]
    return fold(known) if known and len(known) == len(values) else None


def _headers(summary: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"x-homestill-{name.replace('_', '-')}": value if isinstance(value, str) else dumps(value).decode()
        for name, value in summary.items()
        if name != "calls"
    }


async def _connected(request: Request, work: Any) -> Any:
    try:
        return await while_connected(request.receive, work)
    except ClientGone as gone:
        raise Left from gone


async def _awaited(future: asyncio.Future[Any]) -> Any:
    return await future


def _json(value: Any, headers: Mapping[str, str]) -> Response:
    return Response(dumps(value), headers=dict(headers), media_type="application/json")
