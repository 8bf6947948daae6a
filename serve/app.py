"""The endpoint: everything that is served, put together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serve.api.chat import Chat, Left
from serve.api.completions import Completions
from serve.api.document import Documents
from serve.api.door import Door
from serve.api.embeddings import Embeddings
from serve.api.finish import Finish, Observer, tell
from serve.api.models import Models
from serve.api.ollama import OllamaApi
from serve.api.replies import CLIENT_GONE
from serve.auditing import Auditing
from serve.config import Config
from serve.errors import ApiError
from serve.guard.budget import Budget
from serve.guard.hosts import HostCheck
from serve.guard.keys import Keys
from serve.predict import Predict
from serve.records.journal import Journal
from serve.records.retention import Retention
from serve.routing.router import Router
from serve.settings import Settings
from serve.tasks import Tasks
from serve.upstreams.local import Local
from serve.upstreams.teacher import Teachers
from serve.watching.gauges import Gauges, Queue, Spending
from serve.watching.live import Live
from serve.watching.logs import AccessLog
from serve.watching.metrics import Metrics
from serve.watching.site import routes as site
from serve.watching.tracing import to_collector
from serve.wire.sse import dumps

LAST_AUDITS_S = 5.0
"""How long the end waits for audits under way: their answers are paid for."""
logger = logging.getLogger("serve")


def create_app(
    settings: Settings,
    local: Local,
    teachers: Teachers | None,
    journal: Journal,
    *,
    observers: Sequence[Observer] = (),
    hosts: Sequence[str] = (),
    poll_s: float = 1.0,
) -> Starlette:
    """The ASGI application.

    Args:
        local: runs the releases' models.
        teachers: None offline.
        journal: stays open; whoever opened it closes it.
        observers: told of every ended request, beside the journal, the metrics and the page.
        hosts: names by which it may be asked, beside those of loopback and of serve.yaml.
        poll_s: seconds between two looks at every `current`.
    """
    config = settings.config
    tasks = Tasks(settings.releases, settings.runtime, local, teachers)
    budget = Budget(settings.budget_file, config)
    router = Router(tasks, teachers, config, budget)
    told: list[Observer] = []
    auditing = Auditing(router, journal, lambda entry: tell(told, entry))
    gauges = _gauges(config, tasks, teachers, journal=journal, budget=budget, auditing=auditing)
    live = Live(tasks, gauges)
    metrics = Metrics(CollectorRegistry(), tasks, gauges)
    tracing = to_collector(config.otlp_endpoint, version("homestill")) if config.otlp_endpoint else None
    told += [journal.record, live.observe, metrics.observe, AccessLog().observe, *observers]
    finish = Finish(told, router, kept=auditing.kept, traced=tracing.observe if tracing else None)
    keys = Keys(settings.api_keys, settings.keys_file)
    door = Door(keys, config)
    chat = Chat(door, router, finish, config.limits)
    predict = Predict(tasks, chat.complete, door, config.limits.body_bytes)
    routes = [
        *chat.routes(),
        *Completions(chat).routes(),
        *Embeddings(chat, tasks).routes(),
        *OllamaApi(chat, tasks, version("homestill")).routes(),
        *predict.routes(),
        *Documents(door, predict.interfaces, version("homestill"), secured=keys.required).routes(),
        *Models(door, tasks, journal, offline=settings.offline).routes(),
        *site(live, metrics, tasks, releases=settings.releases, authorize=door.caller),
    ]

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await tasks.refresh()
        for served in tasks.served.values():
            await auditing.follow(served.release)
        retention = Retention(journal, config.journal.keep_days)
        running = [
            asyncio.create_task(work)
            for work in (tasks.watch(poll_s), retention.run(), auditing.audits.run())
        ]
        try:
            yield
        finally:
            await predict.close()
            with suppress(TimeoutError):
                await asyncio.wait_for(auditing.audits.drain(), LAST_AUDITS_S)
            for work in running:
                work.cancel()
                with suppress(asyncio.CancelledError):
                    await work
            await finish.drain()
            await tasks.close()
            if teachers:
                await teachers.close()
            budget.close()
            if tracing:
                await asyncio.to_thread(tracing.close)

    handlers: dict[Any, Callable[[Request, Exception], Any]] = {
        ApiError: _api_error,
        HTTPException: _http_error,
        ClientDisconnect: _client_gone,
        Left: _client_gone,
        Exception: _own_fault,
    }
    checked = Middleware(HostCheck, hosts=(*config.limits.hosts, *hosts))
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan, middleware=[checked])


def _gauges(
    config: Config,
    tasks: Tasks,
    teachers: Teachers | None,
    *,
    journal: Journal,
    budget: Budget,
    auditing: Auditing,
) -> Gauges:
    """What the page and the metrics ask for when somebody looks."""

    def queue() -> Queue:
        models = [served.local for served in tasks.served.values() if served.local]
        return Queue(sum(model.active for model in models), sum(model.waiting for model in models))

    def breakers() -> Mapping[str, str]:
        return teachers.breakers if teachers else {}

    def spending() -> list[Spending]:
        caps = {"all": config.daily_usd}
        caps |= {f"task {name}": config.rules(name).daily_usd for name in tasks.served}
        return [Spending(scope, budget.spent_usd(scope), cap) for scope, cap in caps.items()]

    return Gauges(
        queue=queue,
        breakers=breakers,
        lost=lambda: journal.lost,
        spending=spending,
        drift=lambda: auditing.drift(tasks),
    )


def _json(value: Any, status: int, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, "application/json")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _json(error.body, error.status, error.headers)


async def _http_error(_: Request, error: Exception) -> Response:
    """Starlette's own: no such path, wrong method."""
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, f"{error.detail}; see /docs for what there is").body
    return _json(body, error.status_code, error.headers)


async def _client_gone(_: Request, __: Exception) -> Response:
    """It hung up while it was sending or waiting; nobody reads this."""
    return Response(status_code=CLIENT_GONE)


async def _own_fault(_: Request, error: Exception) -> Response:
    logger.error("a request failed: %r", error)
    body = ApiError(500, "an error of the server; it is in its log", kind="server_error").body
    return _json(body, 500)
